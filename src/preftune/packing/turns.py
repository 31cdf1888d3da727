"""Every assistant turn of a conversation as something to learn, each in exactly the context it has at inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from preftune.records import Example, Response

if TYPE_CHECKING:
    from preftune.packing.chat import Tree


def one_record_a_turn(example: Example) -> list[Example]:
    """A record for each assistant turn of the history, whose prompt is all before it, then the record itself.

    A turn of the history is finished and nobody judged it. One with nothing before it, or with no text, teaches no answer and is left out.
    """
    if isinstance(example.prompt, str):
        return [example]
    history = [(k, m.content) for k, m in enumerate(example.prompt) if k and m.role == "assistant" and m.content.strip()]
    earlier = [replace(example, prompt=example.prompt[:k], responses=(Response(text),), comparisons=()) for k, text in history]
    return [*earlier, example]


def join(turns: Sequence[Tree]) -> list[Tree]:
    """The trees of one conversation's turns, in order, with each turn in the row of the one before where its prompt continues that row.

    A template may write an answer otherwise once it is history (without its thoughts, say); then a new tree begins with that turn.
    """
    rows: list[Tree] = []
    for turn in turns:
        longer = _continued(rows[-1], turn) if rows else None
        if longer is None:
            rows.append(turn)
        else:
            rows[-1] = longer
    return rows


def _continued(row: Tree, turn: Tree) -> Tree | None:
    """Both in one row, what stands between them without loss; None where the turn's prompt is not the row, token by token, and more."""
    if len(row.responses) != 1 or len(turn.responses) != 1:
        return None
    before = np.concatenate([row.prompt, row.responses[0]])
    between = turn.prompt[len(before) :]
    if not len(between) or not np.array_equal(turn.prompt[: len(before)], before):
        return None
    carried = np.ones(len(row.responses[0]), dtype=bool) if row.carries is None else row.carries[0]
    parts = carried, np.zeros(len(between), dtype=bool), np.ones(len(turn.responses[0]), dtype=bool)
    return replace(
        turn,
        prompt=row.prompt,
        responses=(np.concatenate([row.responses[0], between, turn.responses[0]]),),
        carries=(np.concatenate(parts),),
    )


def spoken(tree: Tree) -> list[tuple[np.ndarray, bool]]:
    """Token ids of each assistant turn that carries loss, end-of-turn token included, and whether it is finished."""
    found: list[tuple[np.ndarray, bool]] = []
    for n, (ids, finished) in enumerate(zip(tree.responses, tree.finished, strict=True)):
        if tree.carries is None:
            found.append((ids, finished))
            continue
        edges = np.flatnonzero(np.diff(tree.carries[n].astype(int), prepend=0, append=0))
        runs = [ids[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
        found += [(run, finished or at < len(runs) - 1) for at, run in enumerate(runs)]
    return found
