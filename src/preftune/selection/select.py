"""Scored records to training records, and what the selection did to their scores."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from preftune.errors import UserError
from preftune.records import Example, Response
from preftune.selection.pairing import PAIRINGS
from preftune.selection.rejection import statistical_rejection

Chooser = Callable[[Example, np.ndarray], Sequence[int]]
"""A record and the [N] scores of its responses to the indices of those that stay, in order."""


@dataclass(frozen=True)
class Selected:
    """Records that came of a selection; `prompts_without` had no response that stayed."""

    examples: list[Example]
    before: np.ndarray
    """Scores of all responses that have one."""
    after: np.ndarray
    """Scores of the responses that stayed, once for each time they stand in a record."""
    prompts_without: int
    unscored: int = 0
    """Responses without a score, which are never chosen."""

    def among(self, later: Selected) -> Selected:
        """This selection and a later one from its records, as one."""
        return Selected(later.examples, self.before, later.after, self.prompts_without + later.prompts_without, self.unscored)


def finished(examples: Sequence[Example]) -> list[Example]:
    """The records with only the responses that came to their end."""
    return [replace(e, responses=tuple(r for r in e.responses if r.finished), comparisons=()) for e in examples]


def scores_of(example: Example, by: str | None) -> np.ndarray:
    """[N] scores of the responses, of attribute `by` where scores are mappings; NaN where one is missing.

    Raises UserError for a score that is no finite number, and for scores by attribute where `by` names none.
    """
    found = []
    for number, response in enumerate(example.responses, start=1):
        value = response.score
        if isinstance(value, Mapping):
            if by is None:
                raise UserError("responses are scored by attribute", where=example.where, fix=f"Name one with --by: {', '.join(value)}.")
            value = value.get(by)
        if value is not None and not np.isfinite(value):
            raise UserError(f"response {number} has the score {value}", where=example.where, fix="Score the file anew: `preftune score`.")
        found.append(np.nan if value is None else float(value))
    return np.array(found)


def with_scores(examples: Sequence[Example], by: str | None = None) -> tuple[list[Example], int]:
    """The records with only those responses that have a score, and how many have none. Raises UserError where no response has one."""
    kept, unscored = [], 0
    for example in examples:
        known = ~np.isnan(scores_of(example, by))
        unscored += int((~known).sum())
        one = replace(example, responses=tuple(r for r, k in zip(example.responses, known, strict=True) if k), comparisons=())
        kept.append(example if known.all() else one)
    if unscored and not any(example.responses for example in kept):
        what = f"no response has a score{f' of {by!r}' if by else ''}"
        raise UserError(what, where=examples[0].where, fix="Score the file first: `preftune score`.")
    return kept, unscored


def choose(examples: Sequence[Example], chooser: Chooser, by: str | None = None) -> Selected:
    """Each record with only the responses that `chooser` names, of those with a score; records left without any are left out."""
    kept, before, after = [], [], []
    known, unscored = with_scores(examples, by)
    for example in known:
        scores = scores_of(example, by)
        chosen = list(chooser(example, scores))
        before.append(scores)
        after.append(scores[chosen])
        if chosen:
            kept.append(replace(example, responses=tuple(_plain(example.responses[i]) for i in chosen), comparisons=()))
    return Selected(kept, _flat(before), _flat(after), len(examples) - len(kept), unscored)


def best(example: Example, scores: np.ndarray) -> Sequence[int]:
    """The best response, the first of several: Best-of-N."""
    return [int(scores.argmax())] if len(scores) else []


def top(count: int) -> Chooser:
    """The `count` best responses of each prompt."""
    return lambda example, scores: np.argsort(-scores, kind="stable")[:count].tolist()


def threshold(least: float) -> Chooser:
    """Every response that scores at least this."""
    return lambda example, scores: np.flatnonzero(scores >= least).tolist()


def raft(examples: Sequence[Example], share: float, by: str | None = None) -> Selected:
    """RAFT's global option: the best `share` of all responses of the file, whatever their prompt (arXiv:2304.06767); at least one."""
    known, unscored = with_scores(examples, by)
    every = _flat([scores_of(example, by) for example in known])
    count = max(1, round(share * len(every)))
    chosen = set(np.argsort(-every, kind="stable")[:count].tolist())
    at = 0

    def chooser(example: Example, scores: np.ndarray) -> Sequence[int]:
        nonlocal at
        mine = [i for i in range(len(scores)) if at + i in chosen]
        at += len(scores)
        return mine

    return replace(choose(known, chooser, by), unscored=unscored)


def rso(count: int, beta: float, seed: int) -> Chooser:
    """Statistical rejection sampling of `count` responses of each prompt; equal texts are one candidate, and fewer may stay."""

    def chooser(example: Example, scores: np.ndarray) -> Sequence[int]:
        texts = [response.text for response in example.responses]
        first = [i for i, text in enumerate(texts) if texts.index(text) == i]
        accepted = statistical_rejection(scores[first].tolist(), min(count, len(first)), beta, _random(seed, example))
        return [first[i] for i in accepted]

    return chooser


def pairs(examples: Sequence[Example], how: str, seed: int = 0, by: str | None = None) -> Selected:
    """A record for each decided meeting, (better, worse) with ranks 1 and 2; `how` is a key of PAIRINGS."""
    made, before, after, without = [], [], [], 0
    known, unscored = with_scores(examples, by)
    for example in known:
        scores = scores_of(example, by)
        before.append(scores)
        found = PAIRINGS[how](scores.tolist(), _random(seed, example))
        without += not found
        for number, (better, worse) in enumerate(found):
            two = tuple(replace(example.responses[i], rank=rank) for rank, i in enumerate((better, worse), start=1))
            name = f"{example.id}-{number}" if len(found) > 1 else example.id
            made.append(replace(example, id=name, responses=two, comparisons=()))
            after.append(scores[[better, worse]])
    return Selected(made, _flat(before), _flat(after), without, unscored)


def _plain(response: Response) -> Response:
    """A rank among responses that are gone says nothing."""
    return replace(response, rank=None)


def _random(seed: int, example: Example) -> np.random.Generator:
    """Numbers that depend on the seed and the record alone, not on its place in the file."""
    digest = hashlib.blake2b(example.id.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)
