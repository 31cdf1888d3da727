"""Methods that train a policy on single responses marked good or bad."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from preftune.configfile import problem
from preftune.errors import UserError
from preftune.methods.base import Knobs, Method, Outputs, Survey
from preftune.objectives.metrics import Metrics, Ratio, mean_over
from preftune.objectives.unpaired import kto
from preftune.packing.batch import Batch, by_response
from preftune.packing.chat import SCORE, Tree
from preftune.records import Example


class KTOKnobs(Knobs):
    """Kahneman-Tversky optimisation."""

    beta: float = Field(0.1, gt=0.0, description="strength of the pull towards the reference: smaller moves further")
    desirable_weight: float = Field(1.0, gt=0.0, description="weight of the loss of a desirable response")
    undesirable_weight: float = Field(1.0, gt=0.0, description="weight of the loss of an undesirable response")
    threshold: float | None = Field(
        None, description="of records without labels: a response scored above it is desirable, others are not; null takes labels from pairs"
    )
    dead_band: float | None = Field(None, gt=0.0, description="scores no further than this from `threshold` give no label; null is none")

    @model_validator(mode="after")
    def _consistent(self) -> KTOKnobs:
        if self.dead_band is not None and self.threshold is None:
            raise problem("`dead_band` has no effect without `threshold`", "method.dead_band")
        return self


def labels_of(tree: Tree, knobs: KTOKnobs) -> np.ndarray:
    """[N] 1 desirable, 0 undesirable, NaN neither: people's own labels, else by `threshold` from scores, else from pairs."""
    if tree.labels is not None:
        return tree.labels
    return _from_pairs(tree.preference) if knobs.threshold is None else _from_scores(tree, knobs.threshold, knobs.dead_band or 0.0)


def _from_scores(tree: Tree, threshold: float, band: float) -> np.ndarray:
    """A plain score, else the overall one, above or below the band around the threshold; without a band, at the threshold is not above."""
    nothing = np.full(len(tree.responses), np.nan)
    plain, overall = tree.ratings.get(SCORE, nothing), tree.ratings.get("overall", nothing)
    score = np.where(np.isnan(plain), overall, plain)
    low = score < threshold - band if band else score <= threshold
    return np.select([score > threshold + band, low], [1.0, 0.0], np.nan)


def _from_pairs(preference: np.ndarray) -> np.ndarray:
    """Unbeaten ones that beat another are desirable, beaten ones that beat no other undesirable, those between are left out."""
    beats = preference > preference.T
    wins, loses = beats.any(1), beats.any(0)
    return np.select([wins & ~loses, loses & ~wins], [1.0, 0.0], np.nan)


def keep_labelled(tree: Tree, knobs: KTOKnobs) -> Tree | str:
    """The responses that have or get a label."""
    labels = labels_of(tree, knobs)
    known = np.flatnonzero(~np.isnan(labels))
    if not len(known):
        return "no_label"
    labelled = replace(tree, labels=labels)
    return labelled if len(known) == len(labels) else labelled.keep(known.tolist())


def mismatched(trees: Sequence[Tree]) -> list[Tree]:
    """Each prompt of the step with the responses of another record: of the next one, as in the paper.

    Where the next one has the same prompt, or a response that is given to that prompt anywhere in the step, it is the next one further
    on, one that no other prompt has taken if there is any: then the responses are those of the step, each once. A prompt for which
    there is none is left out. Responses are cut, so that no prompt and response together are longer than the step's longest.
    """
    ids: dict[bytes, int] = {}
    prompts = np.array([ids.setdefault(t.prompt.tobytes(), len(ids)) for t in trees])
    own: dict[int, set[bytes]] = defaultdict(set)
    holders: dict[bytes, set[int]] = defaultdict(set)
    for i, tree in enumerate(trees):
        for response in tree.responses:
            own[prompts[i]].add(response.tobytes())
            holders[response.tobytes()].add(i)

    @lru_cache(64)
    def others(prompt: int) -> np.ndarray:
        """[records] those of other prompts that have no response in common with this one."""
        mask = prompts != prompt
        mask[list(set().union(*(holders[response] for response in own[prompt])))] = False
        return mask

    longest = max((len(t.prompt) + len(r) for t in trees for r in t.responses), default=0)
    taken = np.zeros(len(trees), dtype=bool)
    found = []
    for i, tree in enumerate(trees):
        further = (np.flatnonzero(np.roll(others(prompts[i]), -i - 1)) + i + 1) % len(trees)
        for j in further[np.argsort(taken[further], kind="stable")]:
            cut = tuple(r[: longest - len(tree.prompt)] for r in trees[j].responses)
            if own[prompts[i]].isdisjoint(r.tobytes() for r in cut):
                taken[j] = True
                found.append(_unjudged(tree, cut))
                break
    return found


def _unjudged(tree: Tree, responses: tuple[np.ndarray, ...]) -> Tree:
    """The tree's prompt with these responses, of which nobody has said anything."""
    n = len(responses)
    return Tree(tree.id, tree.where, tree.prompt, responses, (False,) * n, np.full(n, np.nan), np.zeros((n, n)))


def _ratio_to_reference(out: Outputs, batch: Batch) -> Ratio:
    assert out.token_logp is not None and out.reference_logp is not None
    return mean_over(batch.per_response(out.token_logp) - out.reference_logp, batch.present)


def _kto(out: Outputs, batch: Batch, knobs: KTOKnobs) -> tuple[Tensor, Metrics]:
    assert out.token_logp is not None and out.reference_logp is not None and out.survey is not None and batch.labels is not None
    logp = batch.per_response(out.token_logp)
    weights = knobs.desirable_weight, knobs.undesirable_weight
    return kto(logp, out.reference_logp, batch.labels, batch.response_weight, out.survey, knobs.beta, *weights)


def _demand_threshold(examples: Sequence[Example], knobs: KTOKnobs) -> None:
    if knobs.threshold is not None and all(any(r.label is not None for r in e.responses) for e in examples):
        raise UserError("`threshold` has no effect: every record has labels of its own", where="method.threshold", fix="Leave it out.")


def _counts(trees: Sequence[Tree]) -> tuple[int, int]:
    """Desirable and undesirable responses."""
    labels = np.concatenate([t.labels for t in trees if t.labels is not None])
    return int((labels == 1).sum()), int((labels == 0).sum())


def _first_loss(trees: Sequence[Tree], knobs: KTOKnobs) -> float:
    good, bad = _counts(trees)
    return 0.5 * (knobs.desirable_weight * good + knobs.undesirable_weight * bad) / (good + bad)


def balance(trees: Sequence[Tree], knobs: KTOKnobs) -> str | None:
    """What to set where desirable and undesirable responses do not weigh about the same: the first 1 to 3/2 of the second (2402.01306)."""
    good, bad = _counts(trees)
    counts = f"{good} desirable and {bad} undesirable responses"
    if not good or not bad:
        return f"{counts}: with one kind alone nothing tells the policy what sets them apart; give records of the other kind too."
    ratio = knobs.desirable_weight * good / (knobs.undesirable_weight * bad)
    if 1.0 <= ratio <= 1.5:
        return None
    name = "desirable_weight" if ratio < 1 else "undesirable_weight"
    value = float(f"{getattr(knobs, name) * (1.2 / ratio if ratio < 1 else ratio / 1.2):.2g}")  # 1.2, to be inside when rounded
    return (
        f"{counts}: weighed by `method.desirable_weight` and `method.undesirable_weight` they stand as {ratio:.3g} to 1, "
        f"outside 1 to 1.5; `method.{name}={value:g}` would balance them."
    )


ROWS: tuple[Method, ...] = (
    Method(
        name="kto",
        title="Kahneman-Tversky optimisation",
        paper="2402.01306",
        summary="raise responses that people call good and lower those they call bad, one by one, relative to a frozen reference",
        when="For thumbs up and down, where responses were judged alone. With clean pairs DPO uses them better.",
        needs="a response with a label, or what labels come from: a preference, or a score and `method.threshold`",
        model="policy",
        knobs=KTOKnobs,
        loss=_kto,
        keep=keep_labelled,
        reduction=by_response,
        reference=True,
        defaults={"lr": 1e-6},
        first_loss=_first_loss,
        survey=Survey(mismatched, _ratio_to_reference),
        min_prompts_per_step=2,
        advise=balance,
        demands=_demand_threshold,
    ),
)
