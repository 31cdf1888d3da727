"""Methods that learn to write what was written: supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from preftune.methods.base import Knobs, Method, Outputs, keep_best
from preftune.objectives.likelihood import negative_log_likelihood
from preftune.objectives.metrics import Metrics
from preftune.packing.batch import Batch, by_token


class SFTKnobs(Knobs):
    """Supervised fine-tuning has no settings of its own."""


def _sft(out: Outputs, batch: Batch, knobs: SFTKnobs) -> tuple[Tensor, Metrics]:
    assert out.token_logp is not None
    return negative_log_likelihood(out.token_logp, batch.token_weight)


ROWS = (
    Method(
        name="sft",
        title="Supervised fine-tuning",
        paper="2203.02155",
        summary="learn to write the best response of each record, token by token",
        when="First, to give policy and reference a common start. Not enough where people can compare but not write good responses.",
        needs="a response (the best one is used where several are ordered)",
        model="policy",
        knobs=SFTKnobs,
        loss=_sft,
        keep=keep_best,
        reduction=by_token,
        defaults={"lr": 2e-5},
    ),
)
