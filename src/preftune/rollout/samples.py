"""What the engine gives: responses with their log-probabilities, and responses under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from preftune.packing.chat import Tree

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sample:
    """One response: `ids` end with the token that ends a turn where it was reached."""

    prompt: int
    """Index of its prompt among those asked for."""
    number: int
    """Which of the prompt's N responses it is."""
    ids: tuple[int, ...]
    finish: Finish
    """stop: the model ended its turn, or a stop text appeared; length: it was cut."""
    logp: np.ndarray
    """[T] log-probability of each token at temperature 1."""
    drawn_logp: np.ndarray
    """[T] log-probability under the distribution it was drawn from (temperature, truncation, penalty)."""
    text_end: int | None = None
    """Characters of the decoded text before the stop text that ended it."""


@dataclass
class Row:
    """A response under way."""

    prompt: int
    number: int
    uniform: np.ndarray
    """[T] one number for each token it may have."""
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    drawn: list[float] = field(default_factory=list)
    finish: Finish | None = None
    text_end: int | None = None

    def sample(self) -> Sample:
        """The response once it has ended."""
        assert self.finish is not None
        return Sample(self.prompt, self.number, tuple(self.ids), self.finish, np.array(self.logp), np.array(self.drawn), self.text_end)


def as_tree(prompt: Sequence[int], samples: Sequence[Sample], *, name: str = "", where: str = "") -> Tree:
    """A prompt's responses as a record's tree, nothing said of them yet."""
    count = len(samples)
    return Tree(
        id=name,
        where=where,
        prompt=np.asarray(prompt, dtype=np.int64),
        responses=tuple(np.asarray(s.ids, dtype=np.int64) for s in samples),
        finished=tuple(s.finish == "stop" for s in samples),
        scores=np.full(count, np.nan),
        preference=np.zeros((count, count)),
    )
