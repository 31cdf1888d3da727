"""Methods that train a policy on pairs without a reward model: DPO and its family."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from preftune.methods.base import Method, Outputs, PairKnobs, keep_preferred
from preftune.objectives.metrics import Metrics
from preftune.objectives.pairwise import dpo_sigmoid
from preftune.packing.batch import Batch, by_prompt


class DPOKnobs(PairKnobs):
    """Direct preference optimisation."""

    beta: float = Field(0.1, gt=0.0, description="strength of the pull towards the reference: smaller moves further")


def _dpo(out: Outputs, batch: Batch, knobs: DPOKnobs) -> tuple[Tensor, Metrics]:
    assert out.token_logp is not None and out.reference_logp is not None
    logp = batch.per_response(out.token_logp)
    return dpo_sigmoid(logp, out.reference_logp, batch.preference, batch.prompt_weight, knobs.beta)


ROWS = (
    Method(
        name="dpo",
        title="Direct preference optimisation",
        paper="2305.18290",
        summary="raise preferred over dispreferred responses relative to a frozen reference, without a reward model",
        when="The usual first choice with pairs. Start from a model that saw the chosen responses; watch the chosen log-probability.",
        needs="two or more responses with a rank, a score or comparisons",
        model="policy",
        knobs=DPOKnobs,
        loss=_dpo,
        keep=keep_preferred,
        reduction=by_prompt,
        reference=True,
        defaults={"lr": 1e-6},
        better=("accuracy", "max"),
        first_loss=lambda trees, knobs: math.log(2.0),
    ),
)
