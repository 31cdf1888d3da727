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
    """Scores of all responses looked at."""
    after: np.ndarray
    """Scores of the responses that stayed, once for each time they stand in a record."""
    prompts_without: int

    def among(self, later: Selected) -> Selected:
        """This selection and a later one from its records, as one."""
        return Selected(later.examples, self.before, later.after, self.prompts_without + later.prompts_without)


def finished(examples: Sequence[Example]) -> list[Example]:
    """The records with only the responses that came to their end."""
    return [replace(e, responses=tuple(r for r in e.responses if r.finished), comparisons=()) for e in examples]


def scores_of(example: Example, by: str | None) -> np.ndarray:
    """[N] scores of the responses, of attribute `by` where scores are mappings. Raises UserError where one is missing or not finite."""
    found = []
    for number, response in enumerate(example.responses, start=1):
        value = response.score
        if isinstance(value, Mapping):
            if by is None:
                raise UserError("responses are scored by attribute", where=example.where, fix=f"Name one with --by: {', '.join(value)}.")
            value = value.get(by)
        if value is None or not np.isfinite(value):
            what = f"no score{f' of {by!r}' if by else ''}" if value is None else f"the score {value}"
            raise UserError(f"response {number} has {what}", where=example.where, fix="Score the file first: `preftune score`.")
        found.append(float(value))
    return np.array(found)


def choose(examples: Sequence[Example], chooser: Chooser, by: str | None = None) -> Selected:
    """Each record with only the responses that `chooser` names; records left without any are counted and left out."""
    kept, before, after = [], [], []
    for example in examples:
        scores = scores_of(example, by)
        chosen = list(chooser(example, scores))
        before.append(scores)
        after.append(scores[chosen])
        if chosen:
            kept.append(replace(example, responses=tuple(_plain(example.responses[i]) for i in chosen), comparisons=()))
    return Selected(kept, _flat(before), _flat(after), len(examples) - len(kept))


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
    every = _flat([scores_of(example, by) for example in examples])
    count = max(1, round(share * len(every)))
    chosen = set(np.argsort(-every, kind="stable")[:count].tolist())
    at = 0

    def chooser(example: Example, scores: np.ndarray) -> Sequence[int]:
        nonlocal at
        mine = [i for i in range(len(scores)) if at + i in chosen]
        at += len(scores)
        return mine

    return choose(examples, chooser, by)


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
    for example in examples:
        scores = scores_of(example, by)
        before.append(scores)
        found = PAIRINGS[how](scores.tolist(), _random(seed, example))
        without += not found
        for number, (better, worse) in enumerate(found):
            two = tuple(replace(example.responses[i], rank=rank) for rank, i in enumerate((better, worse), start=1))
            name = f"{example.id}-{number}" if len(found) > 1 else example.id
            made.append(replace(example, id=name, responses=two, comparisons=()))
            after.append(scores[[better, worse]])
    return Selected(made, _flat(before), _flat(after), without)


def _plain(response: Response) -> Response:
    """A rank among responses that are gone says nothing."""
    return replace(response, rank=None)


def _random(seed: int, example: Example) -> np.random.Generator:
    """Numbers that depend on the seed and the record alone, not on its place in the file."""
    digest = hashlib.blake2b(example.id.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])


def _flat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)
