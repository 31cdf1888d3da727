"""What a round and an evaluation say of themselves, in numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from preftune import formats
from preftune.evaluation.statistics import clustered_mean_ci
from preftune.records import Example
from preftune.rewards.judge import without_score
from preftune.rounds.penalty import scores_of
from preftune.selection.best_of_n import in_words


def change(before: Sequence[float | None], after: Sequence[float | None]) -> dict[str, Any]:
    """Mean change of the held-out prompts' scores, with its 95% interval over prompts: each is compared with itself.

    Prompts without a score on either side are left out; nothing is said where none is left.
    """
    both = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if not both:
        return {}
    found = clustered_mean_ci(both)
    return {"change": found.value, "low": found.low, "high": found.high, "prompts": len(both)}


def merged(examples: Sequence[Example]) -> list[Example]:
    """Records of one prompt as one record with all their responses, in order."""
    found: dict[str, Example] = {}
    for example in examples:
        key = formats.prompt_key(example)
        earlier = found.get(key)
        found[key] = example if earlier is None else replace(earlier, responses=(*earlier.responses, *example.responses))
    return list(found.values())


def evaluated(scored: Sequence[Example]) -> dict[str, Any]:
    """Figures of the held-out responses; `scores` has the mean of each prompt's responses that could be scored, None where none could."""
    scores = [float(np.mean(known)) if (known := scores_of(e)) else None for e in scored]
    responses = [r for e in scored for r in e.responses]
    mean = clustered_mean_ci([score for score in scores if score is not None])
    return {
        **({"score": mean.value, "score_low": mean.low, "score_high": mean.high} if mean.n else {}),
        "unscorable": without_score(scored) / len(responses),
        "response_tokens": float(np.mean([r.meta["tokens"] for r in responses])),
        "finished": float(np.mean([r.finished for r in responses])),
        "scores": scores,
    }


def sentence(facts: dict[str, Any]) -> str:
    """A round's selection in words."""
    without = f", {facts['prompts_without']} prompts are left with nothing" if facts["prompts_without"] else ""
    without += f", {facts['unscorable']:.0%} could not be scored" if facts["unscorable"] else ""
    return (
        f"{facts['selected']} of {facts['responses']} responses stay ({facts['selected'] / facts['responses']:.0%}){without}; "
        f"mean score {facts['score_sampled']:.3f} before, {facts['score_selected']:.3f} after; {in_words(facts['best_of_n'])}"
    )


def score_words(facts: dict[str, Any]) -> str:
    """An evaluation in words."""
    scored = "no response could be scored"
    if "score" in facts:
        scored = f"score {facts['score']:.3f} ({facts['score_low']:.3f} to {facts['score_high']:.3f})"
    return f"{scored}, {facts['response_tokens']:.0f} tokens a response, {facts['finished']:.0%} of them finished"
