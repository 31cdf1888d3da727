"""The order in which records are seen: a permutation that is a pure function of seed and epoch, and a cursor that can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """[count] the order of records in this epoch; the same on every machine."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch]))).permutation(count)


@dataclass(frozen=True)
class Cursor:
    """How far the data has been read: `taken` records of `epoch`."""

    epoch: int = 0
    taken: int = 0


def steps(count: int, prompts_per_step: int, epochs: int, seed: int, start: Cursor | None = None) -> Iterator[tuple[np.ndarray, Cursor]]:
    """Record indices of each step, and the cursor after it. The last step of an epoch may be smaller; no record is skipped or repeated."""
    cursor = start or Cursor()
    for epoch in range(cursor.epoch, epochs):
        order = permutation(count, seed, epoch)
        at = cursor.taken if epoch == cursor.epoch else 0
        while at < count:
            chosen = order[at : at + prompts_per_step]
            at += len(chosen)
            yield chosen, (Cursor(epoch, at) if at < count else Cursor(epoch + 1, 0))


def steps_per_epoch(count: int, prompts_per_step: int) -> int:
    """Optimizer steps in one pass over the data."""
    return -(-count // prompts_per_step)
