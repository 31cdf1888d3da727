"""Losses and gradients of SFT, reward model and DPO beside TRL's own trainers, on the same real text and the same tokens."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

from preftune.formats import read
from preftune.methods import Outputs, find
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel, RewardModel
from preftune.packing.batch import Totals, collate
from preftune.packing.chat import Tree
from preftune.training.reference import live_reference
from tests import tiny

trl = pytest.importorskip("trl", reason="needs TRL, a development dependency")
datasets = pytest.importorskip("datasets")

PAIRS = 6


@pytest.fixture(scope="module")
def rows():
    """Real pairs of the bundled sample, as TRL wants them."""
    turns = lambda messages: [{"role": m.role, "content": m.content} for m in messages]
    say = lambda response: [{"role": "assistant", "content": response.text}]
    found = [e for e in read("sample:hh_pairs").examples if sum(len(r.text) for r in e.responses) < 500][:PAIRS]
    return [{"prompt": turns(e.prompt), "chosen": say(e.responses[0]), "rejected": say(e.responses[1])} for e in found]


def arguments(kind, tmp_path, **changes):
    return kind(
        output_dir=str(tmp_path),
        per_device_train_batch_size=PAIRS,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
        max_length=None,
        **changes,
    )


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    """Relative to each tensor's own size."""
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, expected in theirs.items():
        size = expected.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours[name] / size, expected / size, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def pair_trees(ids, mask, attention):
    """TRL's batch [chosen rows, rejected rows] as our trees: the same tokens, prompts shared."""
    trees = []
    for chosen, rejected in zip(range(len(ids) // 2), range(len(ids) // 2, len(ids)), strict=True):
        prompt = int(mask[chosen].argmax())
        cut = lambda row, p=prompt: ids[row][attention[row] == 1].numpy()[p:]
        assert torch.equal(ids[chosen][:prompt], ids[rejected][:prompt])
        both = (cut(chosen), cut(rejected))
        preference = np.array([[0.0, 1.0], [0.0, 0.0]])
        trees.append(Tree(str(chosen), "", ids[chosen][:prompt].numpy(), both, (True, True), np.array([1.0, 0.0]), preference))
    return trees


def ours_with_tree_attention(model):
    model = copy.deepcopy(model)
    model.set_attn_implementation(NAME)
    return model


def test_dpo_loss_and_gradient_equal_trl(rows, tmp_path):
    policy, reference = tiny.model(seed=1, max_position_embeddings=2048), tiny.model(seed=2, max_position_embeddings=2048)
    ours = LanguageModel(ours_with_tree_attention(policy))
    frozen = LanguageModel(ours_with_tree_attention(reference))
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments(trl.DPOConfig, tmp_path, beta=0.1),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    trees = pair_trees(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])
    assert sum(t.tokens for t in trees) < batch["attention_mask"].sum()
    method = find("dpo")
    packed = collate(trees, Totals.of(trees), method.reduction)
    out = Outputs(token_logp=ours(packed), reference_logp=packed.per_response(live_reference(frozen)(packed)))
    found, _ = method.loss(out, packed, method.knobs(beta=0.1))
    found.backward()
    assert abs(loss.item() - np.log(2)) > 0.05, "the two models must differ for the comparison to mean anything"
    assert found.item() == pytest.approx(loss.item(), rel=5e-5), "TRL sums log-probabilities in fp32, we in float64"
    assert_same_gradients(gradients(ours.hf), gradients(trainer.model))


@pytest.mark.parametrize(("centering", "margins"), [(0.0, None), (0.01, None), (0.01, [3.0, 1.0, 1 / 3, 0.0, 2.0, 2 / 3])])
def test_reward_loss_and_gradient_equal_trl(rows, tmp_path, centering, margins):
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(tiny.model(max_position_embeddings=2048).config)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_config(config).float()
    inner = ours_with_tree_attention(classifier)
    ours = RewardModel(inner, head=inner.score)
    trainer = trl.RewardTrainer(
        model=classifier,
        args=arguments(trl.RewardConfig, tmp_path, center_rewards_coefficient=centering or None),
        train_dataset=datasets.Dataset.from_list([{**r, "margin": m} for r, m in zip(rows, margins, strict=True)] if margins else rows),
        processing_class=tiny.tokenizer(pad="<unk>"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    ids, attention = batch["input_ids"], batch["attention_mask"]
    half = len(ids) // 2
    shared = [int((ids[i] == ids[i + half]).long().cumprod(0).sum()) for i in range(half)]
    mask = torch.zeros_like(ids)
    for i, length in enumerate(shared):
        mask[i, length:] = mask[i + half, length:] = 1
    method = find("reward")
    trees = pair_trees(ids, mask, attention)
    if margins:
        assert sorted(batch["margin"].tolist()) == pytest.approx(sorted(margins))
        trees = [dataclasses.replace(t, margin=m * t.preference) for t, m in zip(trees, batch["margin"].tolist(), strict=True)]
    packed = collate(trees, Totals.of(trees), method.reduction)
    knobs = method.knobs(centering=centering, margin="given" if margins else "none")
    found, metrics = method.loss(Outputs(rewards=ours(packed)), packed, knobs)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients(inner), gradients(trainer.model))
    accuracy = metrics["accuracy"][0] / metrics["accuracy"][1]
    assert accuracy.item() == pytest.approx(trainer._metrics["train"]["accuracy"][-1])


def test_sft_loss_and_gradient_equal_trl(rows, tmp_path):
    policy = tiny.model(seed=1, max_position_embeddings=2048)
    ours = LanguageModel(ours_with_tree_attention(policy))
    trainer = trl.SFTTrainer(
        model=policy,
        args=arguments(trl.SFTConfig, tmp_path, completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]),
        processing_class=tiny.tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"]
    loss = trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=(labels != -100).sum())
    loss.backward()
    trees = []
    for row in range(len(labels)):
        real = batch["attention_mask"][row] == 1 if "attention_mask" in batch else torch.ones_like(labels[row], dtype=torch.bool)
        ids, target = batch["input_ids"][row][real].numpy(), labels[row][real].numpy()
        start = int((target != -100).argmax())
        trees.append(Tree(str(row), "", ids[:start], (ids[start:],), (True,), np.array([1.0]), np.zeros((1, 1))))
    method = find("sft")
    packed = collate(trees, Totals.of(trees), method.reduction)
    found, _ = method.loss(Outputs(token_logp=ours(packed)), packed, method.knobs())
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert_same_gradients(gradients(ours.hf), gradients(trainer.model))
