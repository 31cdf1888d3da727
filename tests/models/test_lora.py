"""Adapters: off they are the starting model, merged they are what they were, and peft can load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preftune.errors import UserError
from preftune.models import load
from preftune.models.attention import NAME
from preftune.models.lora import Adapter
from preftune.models.policy import LanguageModel, RewardModel
from preftune.models.save import save_model
from preftune.packing.batch import collate
from tests import tiny
from tests.training import runs
from tests.training.runs import LORA, command

TREES = [tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2)]


def adapted(kind: str, *, targets: str | tuple[str, ...] = "all-linear", reward: bool = False) -> tuple[Any, Adapter]:
    """A model with an adapter that has moved from its start."""
    inner = tiny.model(kind)
    inner.set_attn_implementation(NAME)
    torch.manual_seed(2)
    model = RewardModel(inner) if reward else LanguageModel(inner)
    adapter = Adapter(inner, rank=4, alpha=8, dropout=0.0, targets=targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval(), adapter


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_switched_off_it_is_the_starting_model_bit_for_bit(kind: str) -> None:
    start = tiny.model(kind)
    start.set_attn_implementation(NAME)
    model, adapter = adapted(kind)
    with torch.no_grad():
        expected, moved = LanguageModel(start)(collate(TREES)), model(collate(TREES))
        with adapter.off():
            assert torch.equal(model(collate(TREES)), expected)
        assert torch.equal(model(collate(TREES)), moved)
    assert (moved - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_written_while_it_trains_it_is_what_merging_gives_and_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    start = load.locate(str(tiny.save(tmp_path / "start", kind)))
    model, adapter = adapted(kind)
    tokenizer = load.load_tokenizer(start)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(collate(TREES))
        save_model(model, tokenizer, tmp_path / "pushed")
        assert torch.equal(model(collate(TREES)), expected)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    save_model(model, tokenizer, tmp_path / "merged", adapter=adapter)
    pushed, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("pushed", "merged"))
    assert pushed.keys() == merged.keys() and all(torch.equal(pushed[name], merged[name]) for name in merged)
    assert not (tmp_path / "pushed" / "adapter").exists()
    assert (tmp_path / "pushed" / "config.json").read_text() == (tmp_path / "merged" / "config.json").read_text()


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_merged_and_saved_it_gives_what_the_adapter_gave(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    start = tiny.save(tmp_path / "start", kind)
    model, adapter = adapted(kind)
    with torch.no_grad():
        expected = model(collate(TREES))
    save_model(model, load.load_tokenizer(load.locate(str(start))), tmp_path / "final", adapter=adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final", attn_implementation=NAME)
    base = AutoModelForCausalLM.from_pretrained(start, attn_implementation=NAME)
    beside = PeftModel.from_pretrained(base, str(tmp_path / "final" / "adapter"))
    for one in (merged, beside.base_model.model):
        with torch.no_grad():
            torch.testing.assert_close(LanguageModel(one)(collate(TREES)), expected, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in load_file(tmp_path / "final" / "model.safetensors"))
    assert all("lora" in name for name in load_file(tmp_path / "final" / "adapter" / "adapter_model.safetensors"))


def test_regression_18_a_reward_model_with_an_adapter_keeps_its_head(tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start")
    model, adapter = adapted("llama", reward=True)
    with torch.no_grad():
        expected = model(collate(TREES))
    save_model(model, load.load_tokenizer(load.locate(str(start))), tmp_path / "final", adapter=adapter)
    classifier = load.load_classifier(load.locate(str(tmp_path / "final")))
    assert classifier is not None
    with torch.no_grad():
        torch.testing.assert_close(RewardModel(classifier, head=classifier.score)(collate(TREES)), expected, atol=1e-5, rtol=1e-4)


def test_named_targets_get_the_adapter_and_a_wrong_name_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model, _ = adapted("llama", targets=("q_proj", "v_proj"))
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "v_proj"}
    with pytest.raises(UserError, match=r"lora\.targets: no layer matches.*q_proj"):
        runs.train(command("sft", tiny_llama, tmp_path / "run", *LORA, "lora.targets=[query]"))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_only_adapters_train_and_are_in_the_checkpoint(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    assert runs.train(command(method, tiny_llama, tmp_path / "run", *LORA)) == 0
    held = load_file(sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    assert held and all("lora_" in name for name in held)
    start, final = (load_file(path / "model.safetensors") for path in (tiny_llama, tmp_path / "run" / "final"))
    assert start.keys() == final.keys()
    moved = {name for name in start if not torch.equal(start[name], final[name])}
    assert moved == {name for name in start if "proj" in name}


def test_dropout_is_refused_where_it_would_move_the_policy_from_its_reference(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lora\.dropout"):
        runs.train(command("dpo", tiny_llama, tmp_path / "run", *LORA, "lora.dropout=0.1"))
