"""Scores less what they cost in divergence, r - beta (log pi(y|x) - log pi_ref(y|x)): RAFT may rank by them (arXiv:2304.06767)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preftune import formats
from preftune.models.policy import LanguageModel
from preftune.models.values import response_values
from preftune.packing.chat import ChatTokenizer, Tree
from preftune.records import Example, Response
from preftune.training.failpoints import failpoint

if TYPE_CHECKING:
    from preftune.rounds.run import Rounds

PENALISED = "penalised.jsonl"
"""Records with the scores by which responses are chosen, where those are not the judge's own."""
JUDGED = "judged"
"""Where a response's `meta` keeps the judge's own score beside one that is less a penalty."""
DIVERGENCE = "divergence"
"""Where it keeps log pi - log pi_ref."""


def judged(response: Response) -> float:
    """The judge's own score, NaN of a response that it could not score."""
    found = response.meta.get(JUDGED, response.score)
    return math.nan if found is None else float(found)


def scores_of(example: Example) -> list[float]:
    """The judge's own scores of the responses that it could score."""
    return [score for score in map(judged, example.responses) if not math.isnan(score)]


def log_ratios(
    examples: Sequence[Example],
    policy: Callable[[], LanguageModel],
    reference: Callable[[], LanguageModel],
    tokenizer: ChatTokenizer,
    max_length: int,
    budget: int,
) -> list[np.ndarray]:
    """[N] log pi(y|x) - log pi_ref(y|x) of each record's responses, one model after the other; 0 of a response that cannot be trained on.

    Both sides read the text as training will, and not the tokens that were drawn: where they differ, so would the two log-probabilities.
    """
    trees: list[Tree] = []
    places: list[tuple[int, list[int]]] = []
    for at, example in enumerate(examples):
        fits = lambda response, e=example: tokenizer.encode(replace(e, responses=(response,), comparisons=()), max_length)[0] is not None
        usable = [n for n, response in enumerate(example.responses) if fits(response)]
        if usable:
            tree, *_ = tokenizer.encode(replace(example, responses=tuple(example.responses[n] for n in usable), comparisons=()), max_length)
            assert tree is not None
            trees.append(tree)
            places.append((at, usable))
    found = [np.zeros(len(example.responses)) for example in examples]
    ours = response_values(policy(), trees, budget)
    theirs = response_values(reference(), trees, budget)
    for (at, usable), p, q in zip(places, ours, theirs, strict=True):
        found[at][usable] = p - q
    return found


def less(examples: Sequence[Example], ratios: Sequence[np.ndarray], beta: float) -> list[Example]:
    """The records with penalised scores; a response's `meta` keeps the judge's. One without a score stays as it is."""

    def one(response: Response, ratio: float) -> Response:
        if response.score is None:
            return response
        own = judged(response)
        return replace(response, score=own - beta * ratio, meta={**response.meta, JUDGED: own, DIVERGENCE: ratio})

    return [
        replace(example, responses=tuple(one(r, float(d)) for r, d in zip(example.responses, mine, strict=True)))
        for example, mine in zip(examples, ratios, strict=True)
    ]


def penalised(run: Rounds, output: Path, scored: Sequence[Example], number: int) -> Sequence[Example]:
    """The records by whose scores responses of round `number` are chosen: those of the judge, or less their divergence."""
    beta = run.row.penalty(run.config.method)
    if not beta:
        return scored
    if output.exists():
        return formats.read(output).examples
    run.settle()
    model, reference = run.model(number - 1), run.config.reference or run.config.model
    ratios = [np.zeros(len(example.responses)) for example in scored]
    if model != reference:
        tokenizer, config = run.policy(model)[1], run.config
        sides = (lambda: run.policy(model)[0]), (lambda: run.policy(reference)[0])
        ratios = log_ratios(scored, *sides, tokenizer, config.max_length, config.tokens_per_microbatch)
    found = less(scored, ratios, beta)
    formats.write(found, output)
    failpoint("round.penalised")
    run.pause()
    return found


def divergence(examples: Sequence[Example]) -> dict[str, float]:
    """The mean divergence of the responses, where it was computed."""
    found = [r.meta[DIVERGENCE] for e in examples for r in e.responses if DIVERGENCE in r.meta]
    return {"divergence": float(np.mean(found))} if found else {}
