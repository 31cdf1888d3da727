"""Policy gradient losses and their gradients beside TRL's own GRPO and RLOO losses, called on numbers instead of a model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.objectives.advantages import group_relative, leave_one_out
from preftune.objectives.kl import kl_estimate
from preftune.objectives.policy_gradient import cispo, clipped, sequence_log_ratio

trl = pytest.importorskip("trl", reason="needs TRL, a development dependency")

LENGTHS = torch.tensor([5, 1, 3, 6])
MASK = torch.arange(6) < LENGTHS.unsqueeze(1)
RESPONSE = torch.arange(4).repeat_interleave(LENGTHS)
ADVANTAGE = torch.tensor([1.2, -0.7, 0.0, -0.5], dtype=torch.float64)


class Numbers:
    """Log-probabilities [4, 6] of a policy, of the one that drew the tokens and of a reference; far enough apart for the clip to bite."""

    def __init__(self, spread: float = 0.5) -> None:
        draw = torch.Generator().manual_seed(7)
        noise = lambda: spread * torch.randn(4, 6, dtype=torch.float64, generator=draw)
        self.old = -1 - noise().abs()
        self.logp = (self.old + noise()).requires_grad_()
        self.reference = self.old + noise()

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """[M] each, the policy's differentiable."""
        return self.logp[MASK], self.old[MASK], self.reference[MASK]

    def inputs(self) -> dict[str, Tensor]:
        nothing = torch.zeros(4, 0, dtype=torch.long)
        return {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": torch.zeros(4, 6, dtype=torch.long),
            "completion_mask": MASK.long(),
            "advantages": ADVANTAGE,
            "old_per_token_logps": self.old,
            "old_logps": (self.old * MASK).sum(1),
            "ref_per_token_logps": self.reference,
            "num_items_in_batch": MASK.sum(),
        }

    def theirs(self, trainer: Any, **changes: Any) -> tuple[Tensor, Tensor]:
        """Loss and gradient of a TRL trainer's loss with these attributes."""
        args = SimpleNamespace(delta=None, use_bias_correction_kl=changes.pop("use_bias_correction_kl", False))
        accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
        attributes: dict[str, Any] = dict.fromkeys(
            ["aux_loss_enabled", "use_vllm", "_entropy_bonus_enabled", "vllm_importance_sampling_correction"], False
        )
        attributes |= dict(beta=0.0, epsilon_low=0.2, epsilon_high=0.2, loss_type="dapo", importance_sampling_level="token")
        attributes |= dict(top_entropy_quantile=1.0, off_policy_mask_threshold=None, max_completion_length=8, args=args)
        attributes |= dict(model=SimpleNamespace(training=False), accelerator=accelerator)
        stand_in = SimpleNamespace(
            **(attributes | changes),
            _metrics={"eval": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *a, **k: (self.logp, torch.zeros_like(self.logp), None),
        )
        loss = trainer._compute_loss(stand_in, None, self.inputs())
        self.clip_share = stand_in._metrics["eval"].get("clip_ratio/region_mean", [None])[0]
        return loss.detach(), torch.autograd.grad(loss, self.logp)[0]

    def same(self, losses: Tensor, weight: Tensor, theirs: tuple[Tensor, Tensor]) -> None:
        """Ours [M] under weights [M] is theirs, in value and in gradient."""
        loss = (losses * weight).sum()
        torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, self.logp)[0]), theirs)


WEIGHTS = {
    "grpo": 1 / 4 / LENGTHS[RESPONSE],
    "dapo": torch.full((15,), 1 / 15, dtype=torch.float64),
    "dr_grpo": torch.full((15,), 1 / 4 / 8, dtype=torch.float64),
}


@pytest.mark.parametrize("loss_type", WEIGHTS)
@pytest.mark.parametrize("high", [0.2, 0.28])
def test_clipped_is_grpo_s_loss(loss_type: str, high: float) -> None:
    numbers = Numbers()
    theirs = numbers.theirs(trl.GRPOTrainer, loss_type=loss_type, epsilon_high=high)
    logp, old, _ = numbers.flat()
    losses, was = clipped(logp - old, ADVANTAGE[RESPONSE], 0.2, high)
    numbers.same(losses, WEIGHTS[loss_type], theirs)
    assert was.double().mean().item() == pytest.approx(numbers.clip_share) and 0 < numbers.clip_share < 1


@pytest.mark.parametrize("kind, corrected", [("k3", False), ("k3_is", True)])
def test_the_penalty_is_grpo_s(kind: Any, corrected: bool) -> None:
    numbers = Numbers()
    theirs = numbers.theirs(trl.GRPOTrainer, beta=0.3, use_bias_correction_kl=corrected)
    logp, old, reference = numbers.flat()
    losses = clipped(logp - old, ADVANTAGE[RESPONSE])[0] + 0.3 * kl_estimate(logp, reference, kind, old)
    numbers.same(losses, WEIGHTS["dapo"], theirs)


def test_cispo_is_trl_s_without_a_lower_bound() -> None:
    """TRL names the bound on the ratio itself, we its distance from 1."""
    numbers = Numbers()
    theirs = numbers.theirs(trl.GRPOTrainer, loss_type="cispo", epsilon_high=1.5)
    logp, old, _ = numbers.flat()
    losses, was = cispo(logp - old, logp, ADVANTAGE[RESPONSE], 1.0, 0.5)
    numbers.same(losses, WEIGHTS["dapo"], theirs)
    assert was.any() and not was.all()


def test_the_mean_sequence_ratio_is_gspo_s() -> None:
    numbers = Numbers()
    theirs = numbers.theirs(trl.GRPOTrainer, loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.1, epsilon_high=0.1)
    logp, old, _ = numbers.flat()
    losses, was = clipped(sequence_log_ratio(logp - old, RESPONSE, 4, mean=True), ADVANTAGE[RESPONSE], 0.1, 0.1)
    numbers.same(losses, WEIGHTS["grpo"], theirs)
    assert was.any() and not was.all()


def test_the_summed_sequence_ratio_is_rloo_s() -> None:
    numbers = Numbers()
    theirs = numbers.theirs(trl.RLOOTrainer)
    logp, old, _ = numbers.flat()
    losses, was = clipped(sequence_log_ratio(logp - old, RESPONSE, 4, mean=False), ADVANTAGE[RESPONSE])
    numbers.same(losses, WEIGHTS["grpo"], theirs)
    assert was.any() and not was.all()


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_is_grpo_s_advantage(scale: Any) -> None:
    """TRL's lines on `rewards`, of which some are NaN, around its own deviation of them."""
    from trl.trainer.utils import nanstd

    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    scores[0, 1] = scores[2, 3] = float("nan")
    scores[4] = 0.1
    centred = scores - scores.nanmean(1, keepdim=True)
    deviation = {"group": lambda: nanstd(scores, dim=1)[:, None], "batch": lambda: nanstd(scores), "none": lambda: torch.tensor(1 - 1e-4)}
    theirs = (centred / (deviation[scale]() + 1e-4)).nan_to_num(0.0)
    torch.testing.assert_close(group_relative(scores, torch.ones(5, 4), scale), theirs, atol=1e-7, rtol=1e-7)


def test_leave_one_out_is_rloo_s_advantage() -> None:
    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    baseline = (scores.sum(1, keepdim=True) - scores) / (4 - 1)
    torch.testing.assert_close(leave_one_out(scores, torch.ones(5, 4)), scores - baseline)
