"""From scores of responses and spans to rewards of tokens: penalties on a response's form, and where a score lands.

Shapes: G prompts with N responses, or R responses with T tokens padded on the right. Nothing here carries a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MissingEnd = Literal["subtract", "replace", "mask"]


@torch.no_grad()
def missing_end(scores: Tensor, finished: Tensor, mode: MissingEnd, penalty: float = 1.0) -> tuple[Tensor, Tensor]:
    """What a response loses that was cut off before it ended: scores and weights in the loss, both [G, N].

    `scores` [G, N]; `finished` [G, N], true where the response ended by itself: those stay as they are. `subtract`: score - penalty.
    `replace`: - penalty, whatever the score, one that was NaN too (OpenAI's lm-human-preferences, with 1); for normalised scores.
    `mask`: the score stays and the weight is 0 (DAPO's overlong filtering, arXiv:2503.14476). All other weights are 1.

    >>> scores, finished = torch.tensor([[2.0, 2.0]]), torch.tensor([[True, False]])
    >>> [[one.tolist() for one in missing_end(scores, finished, mode)] for mode in ("subtract", "replace", "mask")]
    [[[[2.0, 1.0]], [[1.0, 1.0]]], [[[2.0, -1.0]], [[1.0, 1.0]]], [[[2.0, 2.0]], [[1.0, 0.0]]]]
    """
    finished, weights = finished.bool(), torch.ones_like(scores)
    if mode == "subtract":
        return torch.where(finished, scores, scores - penalty), weights
    if mode == "replace":
        return torch.where(finished, scores, torch.full_like(scores, -penalty)), weights
    if mode == "mask":
        return scores.clone(), finished.to(scores.dtype)
    raise ValueError(f"mode is subtract, replace or mask, not {mode!r}")


@torch.no_grad()
def overlong_penalty(lengths: Tensor, longest: int, buffer: int) -> Tensor:
    """0 up to longest - buffer tokens, then straight down to -1 at `longest`, and -1 beyond; of any shape (DAPO, arXiv:2503.14476, eq. 13).

    >>> overlong_penalty(torch.tensor([80, 90, 100, 101]), 100, 20).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    return ((longest - buffer - lengths) / max(buffer, 1)).clamp(-1, 0)


def repetition_penalty(tokens: Sequence[int], n: int, penalty: float) -> float:
    """`penalty` * (1 - unique n-grams / n-grams), 0 where there is no n-gram (arXiv:2502.03373). `penalty` is 0 or negative.

    >>> repetition_penalty([5, 5, 5, 5, 5], 2, -1.0)
    -0.75
    """
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    repeated = len(grams) - len(set(grams))
    return penalty * repeated / len(grams) if repeated else 0.0


@torch.no_grad()
def placed(scores: Tensor, lengths: Tensor, width: int) -> Tensor:
    """[R, width] with each score on its response's last token, column length - 1, and 0 elsewhere.

    `scores` [R]; `lengths` [R] count tokens, the padding not among them, and are at most `width` (else a RuntimeError); a response of no
    tokens has no place. NaN stays NaN: leave unscorable responses out before.

    >>> placed(torch.tensor([2.0, 0.5]), torch.tensor([1, 3]), 3).tolist()
    [[2.0, 0.0, 0.0], [0.0, 0.0, 0.5]]
    """
    grid = torch.zeros(len(scores), width, dtype=scores.dtype, device=scores.device)
    there = torch.where(lengths > 0, scores, torch.zeros_like(scores))
    return grid.scatter(1, (lengths - 1).clamp(min=0).long().unsqueeze(1), there.unsqueeze(1)) if width else grid


@torch.no_grad()
def shaped(rewards: Tensor, old: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t - beta (log pi_old - log ref) on the tokens of `mask`, 0 elsewhere; all [R, T] (arXiv:2203.02155, eq. 2, token by token).

    Summed over a response it is R - beta log(pi_old / ref).
    """
    return torch.where(mask.bool(), rewards - beta * (old - reference), torch.zeros_like(rewards))


def segment_end(ends: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The token on which each span's reward lands: the last whose characters start before the span's end (arXiv:2306.01693).

    `ends` are the spans' ends in characters, exclusive; `offsets` the tokens' (start, end) in the same text. Tokens of no characters,
    such as those that begin and end a turn, are passed over. A span that ends beyond the last token (cut text) gets the last one, one
    that ends before the first the first; with no characters at all it is the last token.

    >>> segment_end([5, 11], [(0, 5), (5, 11), (0, 0)])
    [0, 1]
    """
    if not offsets:
        raise ValueError("a response without tokens has no place for a reward")
    starts = [(start, index) for index, (start, end) in enumerate(offsets) if end > start] or [(0, len(offsets) - 1)]
    return [max((index for start, index in starts if start < end), default=starts[0][1]) for end in ends]
