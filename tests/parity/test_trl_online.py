"""A whole step of GRPO and RLOO beside TRL's own: a rollout's real tokens, through TRL's loss on plain transformers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from preftune.online.run import OnlineRun
from preftune.packing.chat import Tree
from tests import tiny
from tests.online import small

trl = pytest.importorskip("trl", reason="needs TRL, a development dependency")

WEIGH = {"grpo": "response", "dapo": "token", "dr_grpo": "budget"}
TEMPERATURE = 1.2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place, and another model that is the reference."""
    folder = small.place(tmp_path_factory.mktemp("trl"))
    tiny.save(folder / "reference", seed=7)
    return folder


def padded(rows: list[Any], left: bool, fill: float = 0) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one tensor, and its mask."""
    width = max(map(len, rows))
    out, mask = torch.full((len(rows), width), fill, dtype=torch.as_tensor(rows[0]).dtype), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        out[i, part], mask[i, part] = torch.as_tensor(row), 1
    return out, mask


def stand_in(**changes: Any) -> Any:
    """As much of a TRL trainer as its loss reads."""
    args = SimpleNamespace(delta=None, use_bias_correction_kl=changes.pop("use_bias_correction_kl", False))
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    attributes: dict[str, Any] = dict.fromkeys(
        ["aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled", "vllm_importance_sampling_correction"], False
    )
    attributes |= dict(beta=0.0, epsilon_low=0.2, epsilon_high=0.2, loss_type="dapo", importance_sampling_level="token")
    attributes |= dict(top_entropy_quantile=1.0, off_policy_mask_threshold=None, max_completion_length=8, args=args)
    attributes |= dict(model=SimpleNamespace(training=False), accelerator=accelerator)
    found = SimpleNamespace(**(attributes | changes), _metrics={"eval": defaultdict(list)})
    found._get_per_token_logps_and_entropies = plain_logps
    return found


def plain_logps(model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **options: Any) -> tuple[Tensor, Tensor, None]:
    """Log-probabilities and entropies of the last tokens, from plain transformers' logits; TRL's own needs its patched model."""
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions).logits[:, -logits_to_keep - 1 : -1]
    each = (logits / TEMPERATURE).log_softmax(-1)
    entropy = -(each.exp() * each).sum(-1)
    return each.gather(2, input_ids[:, -logits_to_keep:, None]).squeeze(2), entropy, None


def inputs(trees: list[Tree], advantages: list[float]) -> dict[str, Tensor]:
    """TRL's batch of these trees: prompts padded on the left, responses on the right."""
    responses = [r for tree in trees for r in tree.responses]
    prompt_ids, prompt_mask = padded([tree.prompt for tree in trees for _ in tree.responses], left=True)
    completion_ids, completion_mask = padded(responses, left=False)
    told = lambda name: padded([np.asarray(one, dtype=np.float32) for tree in trees for one in tree.told[name]], left=False)[0]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(advantages, dtype=torch.float32),
        "old_per_token_logps": told("old"),
        "old_logps": told("old").sum(1),
        "ref_per_token_logps": told("reference"),
        "num_items_in_batch": completion_mask.sum(),
    }


def second_step(run: OnlineRun) -> list[Tree]:
    """The trees of a rollout's second step, after a first that moved the policy."""
    found = small.rollout(run)
    first, second = ([found.trees[i] for i in group] for group in run.collector.step_groups(len(found.trees), 1))
    run.learner.step(first, 0)
    assert len({len(r) for tree in second for r in tree.responses}) > 2
    return second


def ours(run: OnlineRun, trees: list[Tree]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the step, over several micro-batches."""
    run.learner.model.train()
    total = 0.0
    for loss, _ in run.learner.losses(trees, 1, lambda: False):
        loss.backward()
        total += float(loss.detach())
    return total, {name.removeprefix("backbone.hf."): p.grad for name, p in run.learner.parameters.items() if p.grad is not None}


def theirs(run: OnlineRun, place: Path, kind: Any, trees: list[Tree], advantages: list[float], **changes: Any) -> tuple[float, Any, Any]:
    """The same of TRL's loss on a plain copy of the policy; and what it logged."""
    plain = AutoModelForCausalLM.from_pretrained(place / "model")
    state = {name.removeprefix("backbone.hf."): value for name, value in run.learner.actor.state_dict().items()}
    plain.load_state_dict(state)
    trainer = stand_in(**changes)
    loss = kind._compute_loss(trainer, plain, inputs(trees, advantages))
    loss.backward()
    return loss.item(), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}, trainer._metrics["eval"]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, expected in theirs.items():
        size = expected.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(ours[name] / size, expected / size, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


BASE = ("prompts_per_step=3", "rollout.prompts=6", "rollout.n=4", f"rollout.temperature={TEMPERATURE}", "lr=5e-3")


@pytest.mark.parametrize("loss_type", WEIGH)
@pytest.mark.parametrize(("beta", "kl_loss"), [(0.0, "k3"), (0.3, "k3"), (0.3, "k3_is")])
def test_a_step_of_grpo_is_trl_s(loss_type: str, beta: float, kl_loss: str, place: Path, tmp_path: Path) -> None:
    scale = "none" if loss_type == "dr_grpo" else "group"
    more = (
        f"method.weigh={WEIGH[loss_type]}",
        f"method.scale={scale}",
        f"method.kl={beta}",
        "method.clip_high=0.28",
        f"reference={place}/reference",
    )
    more += (f"method.kl_loss={kl_loss}",) if beta else ()
    with small.opened(place, tmp_path / "run", "grpo", *BASE, *more) as run:
        trees = second_step(run)
        advantages = []
        for tree in trees:
            centred = tree.scores - tree.scores.mean()
            advantages += list(centred / (tree.scores.std(ddof=1) + 1e-4) if scale == "group" else centred)
        loss, grads = ours(run, trees)
        corrected = {"use_bias_correction_kl": kl_loss == "k3_is"}
        expected, their_grads, logged = theirs(
            run, place, trl.GRPOTrainer, trees, advantages, loss_type=loss_type, beta=beta, epsilon_high=0.28, **corrected
        )
        assert loss == pytest.approx(expected, abs=2e-5) and abs(expected) > 1e-3
        same(grads, their_grads)
        assert logged["clip_ratio/region_mean"][0] > 0, "the clip bites somewhere"
        if beta:
            _, metrics = next(iter(run.learner.losses(trees, 1, lambda: False)))
            assert "kl_loss" in metrics


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_a_step_of_rloo_is_trl_s(beta: float, place: Path, tmp_path: Path) -> None:
    """The KL stands in its reward: sums over tokens, taken off before the others' mean is."""
    with small.opened(place, tmp_path / "run", "rloo", *BASE, f"method.kl={beta}", f"reference={place}/reference") as run:
        trees = second_step(run)
        advantages = []
        for tree in trees:
            kl = np.array([sum(old - ref) for old, ref in zip(tree.told["old"], tree.told["reference"], strict=True)])
            rewards = tree.scores - beta * kl
            advantages += list(rewards - (rewards.sum() - rewards) / (len(rewards) - 1))
        loss, grads = ours(run, trees)
        expected, their_grads, logged = theirs(run, place, trl.RLOOTrainer, trees, advantages, beta=beta)
        assert loss == pytest.approx(expected, abs=5e-5) and abs(expected) > 1e-3
        same(grads, their_grads)
        assert logged["clip_ratio/region_mean"][0] > 0
