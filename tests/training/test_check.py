"""`preftune check`: every line passes on a sound model and data, and each fails with its cause when that is planted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from preftune.cli.main import resolve, run
from preftune.methods import METHODS
from preftune.training import check
from preftune.training.distributed import World
from preftune.training.setup import Setup, prepare
from tests import tiny
from tests.training.runs import LORA, NEEDS_RATINGS, command

NAMES = [
    "records",
    "one BOS",
    "EOS on finished responses",
    "responses survive tokenising",
    "every record carries loss",
    "packed = padded",
    "first loss",
    "the longest micro-batch fits",
]


def setup_of(method: str, model: Path, *words: str) -> Setup:
    name, config = resolve(command(method, model, Path("unused"), *words))
    return prepare(name, config, World(torch.device("cpu")), Console(quiet=True))


def line(setup: Setup, name: str) -> check.Line:
    return next(one for one in check.checks(setup, everything=True) if one.name == name)


@pytest.mark.parametrize("words", [(), LORA, ("precision=bf16",), ("gradient_checkpointing=true",)], ids=["fp32", "LoRA", "bf16", "saving"])
@pytest.mark.parametrize("method", METHODS)
def test_all_lines_pass_on_a_sound_model_and_data(
    method: str, words: tuple[str, ...], tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", *command(method, tiny_llama, tmp_path / "run", *words)]) == 0
    shown = [one for one in capfd.readouterr().err.splitlines() if one.startswith(("pass", "FAIL"))]
    assert [one.split("  ")[1].split(":")[0] for one in shown] == NAMES
    assert all(one.startswith("pass") for one in shown)
    read = ("10 records read as kwise: 8 kept", 2) if method in NEEDS_RATINGS else ("11 records read as hh: 7 kept", 4)
    assert read[0] in shown[0] and f"{read[1]} dropped, prompt_too_long" in shown[0]
    if METHODS[method].reference:
        assert "policy and reference agree" in shown[6]
    assert not (tmp_path / "run").exists()


def test_every_architecture_passes_the_layout_line(tmp_path: Path) -> None:
    for kind in ("gpt2", "gemma2", "mistral"):
        setup = setup_of("dpo", tiny.save(tmp_path / kind, kind))
        assert line(setup, "packed = padded").passed
        assert "differ by" in line(setup, "packed = padded").detail


def planted(setup: Setup, **changes: Any) -> Setup:
    """The setup with its second record changed."""
    setup.train.trees[1] = dataclasses.replace(setup.train.trees[1], **changes)
    return setup


def test_two_bos_fail_by_record(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model")
    tiny.tokenizer(bos=True).save_pretrained(model)
    setup = setup_of("sft", model)
    found = line(setup, "one BOS")
    assert found.passed and "exactly one, at position 0" in found.detail
    tree = setup.train.trees[1]
    found = line(planted(setup, prompt=np.concatenate([[1], tree.prompt])), "one BOS")
    assert not found.passed and found.detail.startswith(f"{tree.where}: 2 BOS tokens")


def test_a_finished_response_without_end_fails_by_record(tiny_llama: Path) -> None:
    setup = setup_of("sft", tiny_llama)
    tree = setup.train.trees[1]
    found = line(planted(setup, finished=(True,), responses=(np.array([9, 10]),)), "EOS on finished responses")
    assert not found.passed and tree.where in found.detail and "does not end with 2" in found.detail


def test_a_response_that_decodes_to_another_text_fails_by_record(tiny_llama: Path) -> None:
    setup = setup_of("sft", tiny_llama, "max_length=256", "tokens_per_microbatch=256")
    index, tree = next((i, t) for i, t in enumerate(setup.train.trees) if all(t.finished))
    sound = line(setup, "responses survive tokenising")
    assert sound.passed and " 0 finished" not in sound.detail
    setup.train.trees[index] = dataclasses.replace(tree, responses=(np.append(tree.responses[0][1:-1], 2),))
    found = line(setup, "responses survive tokenising")
    assert not found.passed and "1 responses decode to another text" in found.detail and tree.where in found.detail


def test_a_record_without_loss_fails_by_record(tiny_llama: Path) -> None:
    setup = setup_of("sft", tiny_llama)
    some = planted(setup, responses=(np.zeros(0, dtype=np.int64),)).train.trees
    found = check._loss_carried(some)
    assert not found.passed and found.detail == f"{some[1].where}: no token carries loss"


def test_a_layout_that_differs_fails_with_the_gap(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.models import attention

    setup = setup_of("dpo", tiny_llama)
    monkeypatch.setattr(attention, "_visible", lambda q, qb, k, kb, w: torch.ones(len(q), len(k), dtype=torch.bool))
    found = line(setup, "packed = padded")
    assert not found.passed and "differ by" in found.detail


def test_a_reference_that_is_not_the_policy_fails(tiny_llama: Path) -> None:
    setup = setup_of("dpo", tiny_llama)
    with torch.no_grad():
        setup.learner.model.hf.lm_head.weight.mul_(1.5)
    found = line(setup, "first loss")
    assert not found.passed and "theory says 0.6931472: policy and reference differ" in found.detail


def test_numbers_that_are_not_finite_fail(tiny_llama: Path) -> None:
    setup = setup_of("sft", tiny_llama)
    with torch.no_grad():
        setup.learner.model.hf.lm_head.weight[3] = float("nan")
    found = line(setup, "first loss")
    assert not found.passed and "not finite" in found.detail


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_does_not_suffice_fails_with_the_size(error: Exception, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of("sft", tiny_llama)

    def full(batch: Any, survey: Any) -> Any:
        raise error

    monkeypatch.setattr(setup.learner, "loss", full)
    found = check._longest_fits(setup)
    assert not found.passed and "160 tokens" in found.detail and str(error)[:10] in found.detail
    assert all(p.grad is None for p in setup.learner.parameters.values())


def test_a_failing_line_is_exit_code_2_and_stops_a_run(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "layout_gap", lambda model, trees: 0.25)
    words = command("dpo", tiny_llama, tmp_path / "run")
    assert run(["check", *words]) == 2
    assert "FAIL  packed = padded: hidden states differ by 2.5e-01" in capfd.readouterr().err
    assert run(["train", *words]) == 2
    assert "preftune: check failed: packed = padded" in capfd.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
