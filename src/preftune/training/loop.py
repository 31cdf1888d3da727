"""The one loop. It yields steps and knows neither files nor methods; whoever iterates logs, evaluates, saves and stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from preftune.packing.chat import Tree
from preftune.packing.order import Cursor, steps
from preftune.training.learner import Learner, Step


@dataclass(frozen=True)
class Position:
    """Where a run stands: optimizer steps done, and how far the data has been read."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)


def fit(
    learner: Learner,
    trees: Sequence[Tree],
    *,
    prompts_per_step: int,
    epochs: int,
    max_steps: int,
    seed: int,
    start: Position | None = None,
    give_up: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Position, Step]]:
    """Train from `start` and yield the position after each step. A step that was not taken counts too: its records are not seen again."""
    position = start or Position()
    for chosen, cursor in steps(len(trees), prompts_per_step, epochs, seed, position.cursor):
        if position.step >= max_steps:
            return
        step = learner.step([trees[i] for i in chosen], position.step, give_up)
        position = Position(position.step + 1, cursor)
        yield position, step
