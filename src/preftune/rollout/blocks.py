"""Keys and values in blocks of a fixed number of tokens, which what has ended leaves to what comes: nothing is moved, zeroed or copied.

A prompt and each response have a list of blocks, numbered alike in all layers; `kernels/blocks.py` says what is in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preftune.kernels import find

FEWEST = 16
"""Blocks made at a time at least."""


class Blocks:
    """The blocks of a call of `generate`; None takes the place of it where no kernel reads them."""

    def __init__(self, kernels: Any, layers: int, dtype: torch.dtype) -> None:
        self.kernels, self.tokens, self.dtype = kernels, kernels.TOKENS, dtype
        self.count = 0
        self.free: list[int] = []
        self.prompts: list[list[int]] = []
        self.rows: list[list[int]] = []
        self.memory: list[list[Tensor]] = [[] for _ in range(layers)]
        self.addresses = [torch.zeros(0, dtype=torch.long) for _ in range(layers)]

    @classmethod
    def of(cls, layers: int, like: Tensor) -> Blocks | None:
        """Blocks for keys and values of this type, where kernels read them."""
        kernels = find("blocks")
        return cls(kernels, layers, like.dtype) if kernels is not None and kernels.takes(like) else None

    def holds(self, v: Tensor, softcap: float | None, sinks: Tensor | None) -> bool:
        """Whether a layer with such values and options keeps them here."""
        return softcap is None and sinks is None and v.dtype == self.dtype and bool(self.kernels.takes(v))

    def needed(self, tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-tokens // self.tokens)

    def _taken(self, count: int) -> list[int]:
        if len(self.free) < count:
            more = max(count - len(self.free), FEWEST)
            self.free += range(self.count + more - 1, self.count - 1, -1)
            self.count += more
        return [self.free.pop() for _ in range(count)]

    def where(self, layer: int, kv: int, width: int) -> Tensor:
        """Address of each block of a layer."""
        known = self.addresses[layer]
        if len(known) < self.count:
            fresh = torch.empty(self.count - len(known), self.kernels.size(kv, width, self.dtype), dtype=torch.int32)
            self.memory[layer].append(fresh)
            known = torch.cat([known, fresh.data_ptr() + fresh.stride(0) * 4 * torch.arange(len(fresh))])
            self.addresses[layer] = known
        return known

    def add_prompts(self, lengths: Sequence[int], responses: Sequence[int]) -> Tensor:
        """Blocks for new prompts and rows for their responses; [n, 3] which block takes which of the packed tokens: the first, how many."""
        jobs, first = [], 0
        for length, count in zip(lengths, responses, strict=True):
            self.prompts.append(self._taken(self.needed(length)))
            for start, block in enumerate(self.prompts[-1]):
                jobs.append((block, first + start * self.tokens, min(self.tokens, length - start * self.tokens)))
            self.rows += [[] for _ in range(count)]
            first += length
        return torch.tensor(jobs)

    def keep(self, part: str, order: Sequence[int]) -> None:
        """Only these of the `prompts` or `rows` go on, in this order; the others leave their blocks."""
        before: list[list[int]] = getattr(self, part)
        kept = set(order)
        for at, blocks in enumerate(before):
            if at not in kept:
                self.free += blocks
        setattr(self, part, [before[at] for at in order])

    def step(self, group: Sequence[int], own: Sequence[int], lengths: Sequence[int], shared: int) -> tuple[Any, Any]:
        """What the kernel is told of a step in which row b gets the `own[b]`-th token of its response to prompt `group[b]`."""
        for blocks, tokens in zip(self.rows, own, strict=True):
            blocks += self._taken(self.needed(tokens + 1) - len(blocks))
        counts = [0] * len(lengths)
        for one in group:
            counts[one] += 1
        pieces = self.kernels.pieces(counts, shared)
        order = sorted(range(len(group)), key=group.__getitem__)
        prompt_table, own_table = _table(self.prompts), _table(self.rows)
        longest = max(self.needed(lengths[g]) + self.needed(own[b] + 1) for b, g in enumerate(group))
        told = (torch.tensor(pieces), torch.tensor(order), torch.tensor(lengths), torch.tensor(own), prompt_table, own_table)
        sizes = len(pieces) // 3, prompt_table.shape[1], own_table.shape[1], max(pieces[2::3]), longest * self.tokens
        return told, sizes


def _table(lists: Sequence[Sequence[int]]) -> Tensor:
    """The lists as lines of a matrix, with zeros behind the shorter ones."""
    wide = max(map(len, lists), default=0)
    return torch.tensor([[*one, *[0] * (wide - len(one))] for one in lists])
