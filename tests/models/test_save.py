"""What is saved, plain transformers loads, and it gives the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from preftune.errors import UserError
from preftune.models import load, save
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel, RewardModel, settle_layout
from preftune.models.save import save_model
from preftune.packing.batch import collate
from preftune.packing.chat import ChatTokenizer, Tree
from tests import tiny
from tests.training import runs
from tests.training.runs import LORA, command

TREES = [tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2), tiny.tree(14, (3, 3, 10), seed=3)]
ROTARY = {"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox"}
"""Positions are relative, so plain transformers needs no position_ids with left padding."""


def rows_of(trees: list[Tree]) -> list[list[int]]:
    return [[*map(int, tree.prompt), *map(int, response)] for tree in trees for response in tree.responses]


def ended(trees: list[Tree], end: int = 2) -> list[Tree]:
    """The trees with the end-of-turn token behind every response, as finished responses have it."""
    import dataclasses

    import numpy as np

    return [dataclasses.replace(t, responses=tuple(np.append(r, end) for r in t.responses)) for t in trees]


def scores_of(
    model: Any, rows: list[list[int]], pad: int, side: str, *, batch: int, extra: int = 0, positions: bool = False
) -> torch.Tensor:
    """Scores by plain transformers from padded rows."""
    out = []
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        width = max(map(len, part)) + extra
        fill = [[pad] * (width - len(row)) for row in part]
        left = side == "left"
        ids = torch.tensor([f + row if left else row + f for row, f in zip(part, fill, strict=True)])
        mask = torch.tensor([[0] * len(f) + [1] * len(r) if left else [1] * len(r) + [0] * len(f) for r, f in zip(part, fill, strict=True)])
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
        with torch.no_grad():
            out.append(model(input_ids=ids, attention_mask=mask, **places).logits[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_saved_policy_is_a_plain_model_with_equal_outputs(kind: str, tmp_path: Path) -> None:
    source = load.locate(str(tiny.save(tmp_path / "start", kind)))
    model, tokenizer = LanguageModel(load.load_causal_lm(source)), load.load_tokenizer(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # as if trained
    save_model(model, tokenizer, tmp_path / "final")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert type(plain) is type(model.hf) and plain.config._attn_implementation != NAME
    again = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert again.chat_template == tiny.TEMPLATE and again("a b").input_ids == tiny.tokenizer()("a b").input_ids
    ours = model(collate(TREES))
    theirs = []
    for tree in TREES:
        for response in tree.responses:
            ids = torch.tensor([[*tree.prompt, *response]])
            with torch.no_grad():
                logits = plain(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1]
            theirs.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-5, rtol=1e-5)
    saved, held = plain.state_dict(), model.hf.state_dict()
    assert saved.keys() == held.keys() and all(torch.equal(tensor, held[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_regression_17_43_a_saved_reward_model_scores_alike_whatever_the_padding_and_the_batch(kind: str, tmp_path: Path) -> None:
    """pad == eos in the tokenizer, and every response ends with it."""
    source = load.locate(str(tiny.save(tmp_path / "start", kind)))
    torch.manual_seed(3)
    model, tokenizer = RewardModel(load.load_causal_lm(source)), load.load_tokenizer(source)
    settle_layout(model)
    trees = ended(TREES)
    with torch.no_grad():
        model.head.weight.mul_(5)
        batch = collate(trees)
        ours = model(batch)[batch.present]
    assert ours.std() > 0.05
    for i, tree in enumerate(trees):  # batch mates
        with torch.no_grad():
            torch.testing.assert_close(model(collate([tree]))[0], model(batch)[i, : len(tree.responses)], atol=1e-5, rtol=1e-5)
    model.backbone.use_packed(False)
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[batch.present], ours, atol=1e-5, rtol=1e-5)
    save_model(model, tokenizer, tmp_path / "final")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert plain.config.num_labels == 1 and plain.config.id2label == {0: "reward"}
    pad = AutoTokenizer.from_pretrained(tmp_path / "final").pad_token_id
    assert pad == plain.config.get_text_config().pad_token_id != 2
    rows = rows_of(trees) * 11
    assert len(rows) >= 64
    places = kind not in ROTARY and kind != "opt"  # OPT counts positions from the mask itself
    for size, extra in ((1, 0), (64, 0), (64, 5)):
        for side in ("right", "left"):
            scores = scores_of(plain, rows, pad, side, batch=size, extra=extra, positions=places and side == "left")
            torch.testing.assert_close(scores, ours.repeat(11), atol=2e-5, rtol=1e-4, msg=lambda m, s=side, n=size: f"{s} {n}: {m}")


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_regression_18_a_reward_model_saved_and_loaded_is_bit_for_bit_the_same(kind: str, tmp_path: Path) -> None:
    source = load.locate(str(tiny.save(tmp_path / "start", kind)))
    model, tokenizer = RewardModel(load.load_causal_lm(source)), load.load_tokenizer(source)
    settle_layout(model)
    save_model(model, tokenizer, tmp_path / "final")
    classifier = load.load_classifier(load.locate(str(tmp_path / "final")))
    again = RewardModel(classifier, head=load.score_head(classifier)[1])
    settle_layout(again)
    assert again.backbone.packed == model.backbone.packed
    assert torch.equal(again.head.weight, model.head.weight)
    held, found = model.hf.base_model.state_dict(), again.hf.base_model.state_dict()
    assert held.keys() == found.keys() and all(torch.equal(found[name], tensor) for name, tensor in held.items())
    with torch.no_grad():  # products may round by where in memory their factors lie
        torch.testing.assert_close(again(collate(TREES)), model(collate(TREES)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "LoRA"])
def test_regression_18_the_trained_head_is_saved_and_trains_on_from_there(lora: tuple[str, ...], tiny_llama: Path, tmp_path: Path) -> None:
    assert runs.train(command("reward", tiny_llama, tmp_path / "one", *lora)) == 0
    final = tmp_path / "one" / "final"
    last = sorted((tmp_path / "one" / "checkpoints").glob("step-*"))
    head = [load_file(path / "model.safetensors")["head.weight"] for path in last]
    assert not torch.equal(head[0], head[1])  # it trained
    assert torch.equal(load_file(final / "model.safetensors")["score.weight"], head[1])
    assert runs.train(command("reward", final, tmp_path / "two", "lr=1e-9", *lora)) == 0
    first = next(row for row in runs.rows(tmp_path / "two") if row["kind"] == "eval")
    before = [row for row in runs.rows(tmp_path / "one") if row["kind"] == "eval"][-1]
    assert first["step"] == 0 and first["loss"] == pytest.approx(before["loss"], abs=1e-5)
    assert first["accuracy"] == before["accuracy"]
    again = load_file(tmp_path / "two" / "final" / "model.safetensors")
    torch.testing.assert_close(again["score.weight"], head[1], atol=1e-6, rtol=0)
    manifest = json.loads((tmp_path / "two" / "run.json").read_text())
    assert manifest["parents"] == [str(tmp_path / "one")]


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_dropout_of_the_config_is_off_in_training_and_back_in_what_is_saved(method: str, tmp_path: Path) -> None:
    rates = {"attn_pdrop": 0.11, "embd_pdrop": 0.12, "resid_pdrop": 0.13}
    start = tiny.save(tmp_path / "start", "gpt2")
    config = json.loads((start / "config.json").read_text()) | rates
    (start / "config.json").write_text(json.dumps(config))
    model = start
    for turn in ("one", "two"):  # a reward model is loaded by another way the second time
        assert runs.train(command(method, model, tmp_path / turn, "max_steps=1")) == 0
        model = tmp_path / turn / "final"
        saved = json.loads((model / "config.json").read_text())
        assert {key: saved[key] for key in rates} == rates


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start")
    many = AutoModelForSequenceClassification.from_pretrained(start, num_labels=3)
    many.save_pretrained(start)
    with pytest.raises(UserError, match="3 labels"):
        runs.train(command("reward", start, tmp_path / "run"))


def test_a_tokenizer_with_nothing_to_pad_with_is_refused() -> None:
    inner = tiny.tokenizer(template=None)
    assert save.pad_token(ChatTokenizer(tiny.tokenizer())) not in (1, 2)
    inner.unk_token = None
    inner.additional_special_tokens = []
    inner.extra_special_tokens = []
    with pytest.raises(UserError, match="pad without ending a turn"):
        save.pad_token(ChatTokenizer(inner))


def test_a_save_that_fails_leaves_the_model_before_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = load.locate(str(tiny.save(tmp_path / "start")))
    model, tokenizer = LanguageModel(load.load_causal_lm(source)), load.load_tokenizer(source)
    save_model(model, tokenizer, tmp_path / "out" / "final")
    before = runs.digests_of_tree(tmp_path / "out")
    monkeypatch.setattr(save, "_sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with torch.no_grad():
        next(model.parameters()).zero_()
    with pytest.raises(OSError, match="No space"):
        save_model(model, tokenizer, tmp_path / "out" / "final")
    assert runs.digests_of_tree(tmp_path / "out") == before
