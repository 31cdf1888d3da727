"""Losses and gradients of DPO's family beside TRL's DPO, CPO and ORPO trainers, on the same real text and the same tokens."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from preftune.formats import read
from preftune.methods import Outputs, find
from preftune.models.policy import LanguageModel
from preftune.packing.batch import Batch, Totals, collate
from preftune.packing.chat import Tree
from preftune.training.reference import live_reference
from tests import tiny
from tests.parity.test_trl import arguments, assert_same_gradients, gradients, ours_with_tree_attention, pair_trees

trl = pytest.importorskip("trl", reason="needs TRL, a development dependency")
datasets = pytest.importorskip("datasets")

PAIRS = 4


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Short real pairs of the bundled sample, as TRL wants them."""
    turns = lambda messages: [{"role": m.role, "content": m.content} for m in messages]
    say = lambda response: [{"role": "assistant", "content": response.text}]
    size = lambda e: sum(len(m.content) for m in e.prompt) + sum(len(r.text) for r in e.responses)
    found = [e for e in read("sample:hh_pairs").examples if size(e) < 400 and len({len(r.text) for r in e.responses}) > 1][:PAIRS]
    return [{"prompt": turns(e.prompt), "chosen": say(e.responses[0]), "rejected": say(e.responses[1])} for e in found]


def small(seed: int) -> Any:
    """A random policy whose predictions are far from uniform."""
    return tiny.model(seed=seed, max_position_embeddings=1024)


def near(policy: Any) -> Any:
    """A reference a little away from the policy, as after some training: log-ratios of a few nats."""
    torch.manual_seed(5)
    other = tiny.model(seed=1, max_position_embeddings=1024)
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), policy.parameters(), strict=True):
            ours.copy_(theirs + 0.03 * torch.randn_like(theirs) * theirs.abs().mean())
    return other


def ours(name: str, trees: list[Tree], policy: Any, reference: Any = None, **knobs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Our loss and gradients on the trees."""
    model, method = LanguageModel(ours_with_tree_attention(policy)), find(name)
    batch = collate(trees, Totals.of(trees), method.reduction)
    frozen = None if reference is None else batch.per_response(live_reference(LanguageModel(ours_with_tree_attention(reference)))(batch))
    loss, _ = method.loss(Outputs(token_logp=model(batch), reference_logp=frozen), batch, method.knobs(**knobs))
    loss.backward()
    return loss, gradients(model.hf)


# ---------------------------------------------------------------- DPOTrainer

COMPARED = [
    ("dpo_hinge", {}, {"loss_type": "hinge"}),
    ("dpo_hinge", {"beta": 0.02}, {"loss_type": "hinge", "beta": 0.02}),
    ("ipo", {}, {"loss_type": "ipo"}),
    ("ipo", {"beta": 0.5}, {"loss_type": "ipo", "beta": 0.5}),
    ("dpo_robust", {"epsilon": 0.2}, {"loss_type": "robust", "label_smoothing": 0.2}),
    ("dpo_len", {"beta": 5.0}, {"loss_type": "sigmoid_norm", "beta": 5.0}),
    ("rso_sigmoid_norm", {}, {"loss_type": "sigmoid", "beta": 0.05}),
    ("rso_hinge_norm", {}, {"loss_type": "hinge", "beta": 0.05}),
    ("dpo", {"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ("dpo", {"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    ("dpo", {"f_divergence": "alpha", "alpha": 0.3}, {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}),
    ("dpo_hinge", {"f_divergence": "js"}, {"loss_type": "hinge", "f_divergence_type": "js_divergence"}),
    ("dpo_robust", {"f_divergence": "js"}, {"loss_type": "robust", "label_smoothing": 0.1, "f_divergence_type": "js_divergence"}),
]


@pytest.fixture(scope="module")
def compared(rows, tmp_path_factory) -> tuple[Any, Any, Any, dict[str, Any], list[Tree]]:
    """One DPO trainer, whose loss each test sets; its policy and reference, a batch, and that batch as trees."""
    policy = small(1)
    reference = near(policy)
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=arguments(trl.DPOConfig, tmp_path_factory.mktemp("dpo"), beta=0.1),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    return trainer, policy, reference, batch, pair_trees(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])


def theirs(trainer: Any, batch: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    settings = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", **settings}
    trainer.loss_types, trainer.loss_weights = [settings["loss_type"]], [1.0]
    for name in ("beta", "label_smoothing", "f_divergence_type"):
        setattr(trainer, name, settings[name])
    trainer.f_alpha_divergence_coef = settings.get("f_alpha_divergence_coef", 0.5)
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    return loss, gradients(trainer.model)


@pytest.mark.parametrize(("name", "knobs", "settings"), COMPARED, ids=lambda x: x if isinstance(x, str) else None)
def test_loss_and_gradient_equal_trl(compared, name, knobs, settings) -> None:
    trainer, policy, reference, batch, trees = compared
    expected, wanted = theirs(trainer, batch, **settings)
    found, got = ours(name, trees, policy, reference, **knobs)
    assert abs(found.item() - (find(name).first_loss([], find(name).knobs(**knobs)) or 0)) > 1e-3, "policy and reference must differ"
    assert found.item() == pytest.approx(expected.item(), rel=1e-4), "TRL sums log-probabilities in fp32, we in float64"
    assert_same_gradients(got, wanted)


@pytest.fixture(scope="module")
def one_pair(compared) -> tuple[Any, Any, Any, dict[str, Any], list[Tree]]:
    """A batch of one pair, where a mean over the batch's tokens is one over the response's."""
    trainer, policy, reference, batch, _ = compared
    batch = {key: value[[0, PAIRS]] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    return trainer, policy, reference, batch, pair_trees(batch["input_ids"], batch["completion_mask"], batch["attention_mask"])


def test_the_imitation_term_is_trl_s_where_one_response_is_the_batch(one_pair) -> None:
    """TRL's `sft` is a mean over all tokens of a micro-batch, so that long responses count for more; ours over each response's."""
    trainer, policy, reference, batch, trees = one_pair
    pair, _ = theirs(trainer, batch)
    sft, slope = theirs(trainer, batch, loss_type="sft")
    found, got = ours("dpo", trees, policy, reference, sft_weight=0.3)
    _, alone = ours("dpo", trees, policy, reference)
    assert found.item() == pytest.approx(pair.item() + 0.3 * sft.item(), rel=1e-4)
    assert_same_gradients({name: (got[name] - alone[name]) / 0.3 for name in got}, slope)


# ---------------------------------------------------------------- CPOTrainer and ORPOTrainer

ALONE = [
    ("cpo", {"sft_weight": 0.0}, {"loss_type": "sigmoid"}),
    ("cpo", {"sft_weight": 0.0, "beta": 0.5}, {"loss_type": "sigmoid", "beta": 0.5}),
    ("slic", {"sft_weight": 0.0, "beta": 0.03}, {"loss_type": "hinge", "beta": 0.03}),
    ("simpo", {}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}),
    ("dpo", {"reference_free": True}, {"loss_type": "sigmoid"}),
    ("dpo_hinge", {"reference_free": True}, {"loss_type": "hinge"}),
    ("ipo", {"reference_free": True}, {"loss_type": "ipo"}),
    ("dpo_len", {"reference_free": True, "beta": 2.0}, {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.0}),
    ("cdpo", {"reference_free": True, "epsilon": 0.2}, {"loss_type": "sigmoid", "label_smoothing": 0.2}),
]


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory) -> tuple[Any, Any, dict[str, Any], list[Tree]]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    policy = small(1)
    trainer = CPOTrainer(
        model=policy,
        args=arguments(CPOConfig, tmp_path_factory.mktemp("cpo"), cpo_alpha=0.0),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    return trainer, policy, batch, trees_of(batch)


def trees_of(batch: dict[str, Any]) -> list[Tree]:
    """The trainers' batch as our trees: the same tokens, prompts shared; prompts carry the label -100."""
    trees = []
    for i in range(len(batch["chosen_input_ids"])):
        sides = []
        for side in ("chosen", "rejected"):
            real = batch[f"{side}_attention_mask"][i] == 1
            sides.append((batch[f"{side}_input_ids"][i][real].numpy(), batch[f"{side}_labels"][i][real].numpy() != -100))
        start = int(sides[0][1].argmax())
        assert all(mask[start:].all() and not mask[:start].any() for _, mask in sides)
        assert np.array_equal(sides[0][0][:start], sides[1][0][:start])
        both = tuple(ids[start:] for ids, _ in sides)
        order = np.array([[0.0, 1.0], [0.0, 0.0]])
        trees.append(Tree(str(i), "", sides[0][0][:start], both, (True, True), np.array([1.0, 0.0]), order))
    return trees


def theirs_alone(trainer: Any, batch: dict[str, Any], **settings: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    for name, value in {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 0.0, **settings}.items():
        setattr(trainer, name, value)
    trainer.model.zero_grad()
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    return loss, gradients(trainer.model)


@pytest.mark.parametrize(("name", "knobs", "settings"), ALONE, ids=lambda x: x if isinstance(x, str) else None)
def test_loss_and_gradient_without_reference_equal_trl(alone, name, knobs, settings) -> None:
    """TRL's CPO has no reference, and TRL's DPO no `reference_free`: with that knob our rows are the former's losses."""
    trainer, policy, batch, trees = alone
    expected, wanted = theirs_alone(trainer, batch, **settings)
    found, got = ours(name, trees, policy, **knobs)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients(got, wanted)


def one_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value[:1] for key, value in batch.items()}


def test_cpo_with_imitation_equals_trl_where_one_response_is_the_batch(alone) -> None:
    trainer, policy, batch, _ = alone
    batch = one_of(batch)
    for name, kind, beta in (("cpo", "sigmoid", 0.1), ("slic", "hinge", 0.03), ("simpo", "simpo", 2.0)):
        expected, wanted = theirs_alone(trainer, batch, loss_type=kind, beta=beta, simpo_gamma=0.5 * beta, cpo_alpha=0.7)
        found, got = ours(name, trees_of(batch), policy, beta=beta, sft_weight=0.7)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
        assert_same_gradients(got, wanted)


def test_orpo_equals_trl_but_for_the_prompt_in_its_likelihood(rows, tmp_path) -> None:
    """TRL's NLL counts prompt tokens, ours the response's alone. With that term apart all else is equal; so is the whole loss of
    one pair whose prompt is one token long, up to that token, which nothing predicts."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy = small(1)
    trainer = ORPOTrainer(
        model=policy,
        args=arguments(ORPOConfig, tmp_path, beta=0.1),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    expected, wanted = odds_alone(trainer, batch)
    trees = trees_of(batch)
    found, got = ours("orpo", trees, policy)
    imitation, slope = likelihood_alone(trees, policy)
    assert found.item() - imitation.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients({name: got[name] - slope[name] for name in got}, wanted)

    short = bare_prompt(one_of(batch))
    trainer.model.zero_grad()
    expected, _ = trainer.get_batch_loss_metrics(trainer.model, short)
    expected.backward()
    found, got = ours("orpo", trees_of(short), policy)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert_same_gradients(got, gradients(trainer.model))


def odds_alone(trainer: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    trainer.model.zero_grad()
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, batch)
    losses, *_ = trainer.odds_ratio_loss(chosen, rejected)
    loss = -losses.mean()
    loss.backward()
    return loss, gradients(trainer.model)


def likelihood_alone(trees: list[Tree], policy: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The NLL of the chosen responses, each a mean over its tokens."""
    model = LanguageModel(ours_with_tree_attention(policy))
    batch: Batch = collate(trees)
    loss = -batch.mean_per_response(model(batch))[:, 0].mean()
    loss.backward()
    return loss, gradients(model.hf)


def bare_prompt(batch: dict[str, Any]) -> dict[str, Any]:
    """The same responses after the last token of their prompt alone."""
    start = int((batch["chosen_labels"][0] != -100).long().argmax()) - 1
    return {key: value[:, start:] if key.startswith(("chosen_", "rejected_")) else value for key, value in batch.items()}
