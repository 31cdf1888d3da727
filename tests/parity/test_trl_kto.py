"""KTO's loss, gradient and baseline beside TRL's own trainer, on the same real text, the same tokens and the same mismatched rows."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune.formats import read
from preftune.methods import find
from preftune.methods.unpaired import mismatched
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel
from preftune.packing.chat import Tree
from preftune.training.distributed import World
from preftune.training.learner import Learner
from preftune.training.reference import live_reference
from tests import tiny

trl = pytest.importorskip("trl", reason="needs TRL, a development dependency")
datasets = pytest.importorskip("datasets")

RECORDS = 7
WEIGHTS = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7}


@pytest.fixture(scope="module")
def rows():
    """Real responses of the bundled pairs, one of each pair, called good or bad: an odd step with four of one and three of the other."""
    found = [e for e in read("sample:hh_pairs").examples if sum(len(r.text) for r in e.responses) < 500][:RECORDS]
    turns = lambda messages: [{"role": m.role, "content": m.content} for m in messages]
    say = lambda response: [{"role": "assistant", "content": response.text}]
    return [{"prompt": turns(e.prompt), "completion": say(e.responses[i % 2]), "label": i % 2 == 0} for i, e in enumerate(found)]


def trees_of(batch: dict[str, Tensor], prefix: str) -> list[Tree]:
    """TRL's rows of one response each as our trees: the same tokens."""
    trees = []
    for row, (ids, mask, attention) in enumerate(
        zip(*(batch[f"{prefix}{name}"] for name in ("input_ids", "completion_mask", "attention_mask")), strict=True)
    ):
        real = ids[attention == 1].numpy()
        start = int(mask[attention == 1].argmax())
        label = {} if prefix else {"labels": np.array([float(batch["label"][row])])}
        trees.append(Tree(str(row), "", real[:start], (real[start:],), (True,), np.array([np.nan]), np.zeros((1, 1)), **label))
    return trees


def ours(model) -> LanguageModel:
    inner = copy.deepcopy(model)
    inner.set_attn_implementation(NAME)
    return LanguageModel(inner)


@pytest.mark.parametrize(("seeds", "baseline"), [((2, 1), False), ((1, 2), True)], ids=["baseline cut at 0", "baseline above 0"])
def test_regression_28_kto_loss_gradient_and_baseline_equal_trl(rows, tmp_path, seeds, baseline):
    policy, reference = (tiny.model(seed=seed, max_position_embeddings=2048) for seed in seeds)
    frozen = ours(reference).eval().requires_grad_(False)
    method = find("kto")
    learner = Learner(method, method.knobs(**WEIGHTS), ours(policy), World(torch.device("cpu")), 300, live_reference(frozen))
    trainer = trl.KTOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.KTOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=RECORDS,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to=[],
            max_length=None,
            train_sampling_strategy="sequential",
            **WEIGHTS,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    trees, theirs = trees_of(batch, ""), trees_of(batch, "KL_")
    learner.method = dataclasses.replace(method, survey=dataclasses.replace(method.survey, trees=lambda step: theirs))
    mean = learner.survey(trees)
    assert mean > 0.1 if baseline else mean < -0.1
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(max(0.0, mean), rel=1e-4)
    total = 0.0
    for one in learner._batches(trees):
        found, _ = learner.loss(one, mean)
        found.backward()
        total += found.item()
    assert total == pytest.approx(loss.item(), rel=5e-5), "TRL sums log-probabilities in fp32, we in float64"
    gradients = {name: p.grad for name, p in learner.model.hf.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and len(expected) > 10
    for name, gradient in expected.items():
        size = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(gradients[name] / size, gradient / size, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    back = mismatched(trees[::-1])[::-1]  # TRL turns the responses the other way round, and cuts none
    for one, other in zip(back, theirs, strict=True):
        assert np.array_equal(one.prompt, other.prompt)
        assert np.array_equal(one.responses[0], other.responses[0][: len(one.responses[0])])
