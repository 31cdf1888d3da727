"""Keys and values of responses under way: a prompt's once for its whole group, each response's own behind it.

A decoding step reads one packed row of B new tokens. Each attends to its group's prompt, for all responses of the group in one product,
and to its own tokens so far; one softmax runs over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from preftune.models.attention import TreePlan
from preftune.packing.batch import Layout
from preftune.rollout.blocks import Blocks

GROW = 32
"""Token places that a full store of responses gains. All places are read and the empty ones masked: on a CPU batched products of a slice
take several times as long as those of a whole tensor."""
LANES = 16
"""The same of a store of prompts; compiled kernels read so many places at once."""


class Rows:
    """A store [rows, Hkv, tokens, d] of one layer's keys or values; in memory, `across` has the tokens of one of the d side by side."""

    def __init__(self, grow: int, across: bool = False) -> None:
        self.grow, self.across = grow, across
        self.data: Tensor | None = None

    def reserve(self, rows: int, tokens: int, like: Tensor) -> Tensor:
        """The store with room for so many rows and tokens; `like` [Hkv, ..., d] gives heads, width and type."""
        have, wide = (0, 0) if self.data is None else (self.data.shape[0], self.data.shape[2])
        if self.data is None or rows > have or tokens > wide:
            self._resize(max(rows, have), max(self._places(tokens), wide), like)
        assert self.data is not None
        return self.data

    def fit(self, rows: int, tokens: int, like: Tensor) -> Tensor:
        """The same where no row uses more than so many tokens: what lies far behind them is given up, for it would be read all the same."""
        data, wanted = self.reserve(rows, tokens, like), self._places(tokens)
        if data.shape[2] > wanted + wanted // 4:
            self._resize(data.shape[0], wanted, like)
        assert self.data is not None
        return self.data

    def _places(self, tokens: int) -> int:
        return -(-tokens // self.grow) * self.grow

    def _resize(self, rows: int, tokens: int, like: Tensor) -> None:
        heads, width = like.shape[0], like.shape[-1]
        fresh = like.new_zeros((rows, heads, width, tokens)).mT if self.across else like.new_zeros((rows, heads, tokens, width))
        if self.data is not None:
            kept = min(tokens, self.data.shape[2])
            fresh[: self.data.shape[0], :, :kept] = self.data[:, :, :kept]
        self.data = fresh


class Cache:
    """Keys and values of all layers: in `blocks` where there are any and they take the layer's, else in a store of each part and layer."""

    def __init__(self, layers: int, blocks: Blocks | None = None) -> None:
        self.blocks = blocks
        self.prompt = [(Rows(LANES, across=True), Rows(LANES)) for _ in range(layers)]
        self.own = [(Rows(GROW, across=True), Rows(GROW)) for _ in range(layers)]

    def move(self, part: str, source: list[int], target: list[int], tokens: int) -> None:
        """Copy whole rows of `prompt` or `own`, their first `tokens` tokens: what finished makes place for what goes on."""
        if source and tokens:
            for pair in getattr(self, part):
                for rows in pair:
                    if rows.data is not None:
                        rows.data[target, :, :tokens] = rows.data[source, :, :tokens]


class Prefill(TreePlan):
    """Prompts of new groups: their keys and values go into the cache as they are computed."""

    def __init__(self, cache: Cache, lengths: tuple[int, ...], first: int, responses: Sequence[int] = (), shared: int = 0) -> None:
        super().__init__(Layout(tuple((length, ()) for length in lengths), shared))
        self.cache, self.lengths, self.first, self.layer = cache, lengths, first, 0
        self.jobs = None if cache.blocks is None else cache.blocks.add_prompts(lengths, responses)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """As the row's own attention, and keep the keys and values."""
        layer, blocks = self.layer, self.cache.blocks
        keys, values = (self.layout.spread(x, 1) for x in (k.to(v.dtype), v))
        self.layer += 1
        if blocks is not None and blocks.holds(v, softcap, sinks):
            blocks.kernels.store(keys, values, blocks.where(layer, len(v), v.shape[2]), self.jobs)
        else:
            for rows, new in zip(self.cache.prompt[layer], (keys, values), strict=True):
                data = rows.reserve(self.first + len(self.lengths), max(self.lengths), new)
                for g, part in enumerate(new.split(self.lengths, dim=1)):
                    data[self.first + g, :, : part.shape[1]] = part
        return super().attend(q, k, v, window=window, scaling=scaling, softcap=softcap, sinks=sinks)


class _Grid:
    """Rows group by group: `order` [B] and where each group `starts`, and as cells [groups, most] of a grid."""

    def __init__(self, group: Tensor, groups: int) -> None:
        index = torch.arange(len(group), device=group.device)
        self.order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=groups)
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = torch.empty_like(group)
        place[self.order] = index - self.starts[group[self.order]]
        self.most = int(counts.max())
        self.cell = group * self.most + place
        self.in_order = len(self.cell) == groups * self.most and bool((self.cell == index).all())
        self.cells = torch.zeros(groups * self.most, dtype=torch.long, device=group.device)
        self.cells[self.cell] = index


class Decode:
    """One step: B rows, row b the `own[b]`-th token of its response (from 0) behind the prompt of group `group[b]`."""

    def __init__(self, cache: Cache, group: Tensor, own: Tensor, prompts: Tensor) -> None:
        self.cache, self.layer = cache, 0
        self.group, self.prompts = group, prompts
        self.rows, self.groups = len(group), len(prompts)
        self.own, self.lengths = own, prompts[group]
        self.longest_own, self.longest_prompt = int(own.max()) + 1, int(prompts.max())
        self.position = self.lengths + own
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._told: dict[int, Any] = {}

    @cached_property
    def grid(self) -> _Grid:
        """Where each row stands among those of its group."""
        return _Grid(self.group, self.groups)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """[H, B, d] queries over [Hkv, B, d] new keys and all cached ones."""
        k = k.to(v.dtype)  # under autocast rotary embeddings leave keys in fp32, and every product would cast all of them
        blocks = self.cache.blocks
        if blocks is not None and blocks.holds(v, softcap, sinks):
            by_row = [x if x.stride(2) == 1 else x.contiguous() for x in (x.transpose(0, 1) for x in (q.to(v.dtype), k, v))]
            told, sizes = self.told(blocks, len(q) // len(v))  # takes the blocks that are needed
            where, self.layer = blocks.where(self.layer, len(v), v.shape[2]), self.layer + 1
            attended: Tensor = blocks.kernels.step(*by_row, None, where, told, sizes, window, scaling)
            return attended.transpose(0, 1)
        stores = self._stores(k, v)
        self.layer += 1
        return self._plainly(q, k, v, *stores, window, scaling, softcap, sinks)

    def told(self, blocks: Blocks, shared: int) -> Any:
        """What kernels are told of this step, where so many queries share a key."""
        if shared not in self._told:
            self._told[shared] = blocks.step(self.group.tolist(), self.own.tolist(), self.prompts.tolist(), shared)
        return self._told[shared]

    def told_of_all(self, heads: int, kv: int, width: int) -> Any:
        """Addresses of all layers' blocks, and what kernels are told, for layers that are alike."""
        blocks = self.cache.blocks
        assert blocks is not None
        told, sizes = self.told(blocks, heads // kv)
        return [blocks.where(layer, kv, width) for layer in range(len(blocks.addresses))], told, sizes

    def _stores(self, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Keys and values of the prompts, and those of the rows' own tokens with room for a further one."""
        prompt, own = self.cache.prompt[self.layer], self.cache.own[self.layer]
        keys, values = (r.fit(self.groups, self.longest_prompt, new)[: self.groups] for r, new in zip(prompt, (k, v), strict=True))
        own_keys, own_values = (r.fit(self.rows, self.longest_own, new) for r, new in zip(own, (k, v), strict=True))
        return (keys, values), (own_keys, own_values)

    def _plainly(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prompt: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor],
        window: int | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        heads, rows, width = q.shape
        kv, index = k.shape[0], torch.arange(rows, device=q.device)
        own[0][index, :, self.own] = k.transpose(0, 1)
        own[1][index, :, self.own] = v.transpose(0, 1)
        own_keys, own_values = own[0][:rows], own[1][:rows]
        query = (q * scaling).to(v.dtype).transpose(0, 1).reshape(rows, kv, heads // kv, width)
        on_prompt = self._by_row(torch.matmul(self._by_group(query), prompt[0].mT))
        scores = torch.cat([on_prompt, torch.matmul(query, own_keys.mT)], -1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.add_(self._mask(on_prompt.shape[-1], own_keys.shape[2], window, scores.dtype))
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype).view(1, kv, -1, 1).expand(rows, -1, -1, 1)], -1)
        weights = torch.softmax(scores, -1)  # in fp32 inside, and rounded once
        first, second, _ = weights.split([on_prompt.shape[-1], own_keys.shape[2], int(sinks is not None)], -1)
        out = self._by_row(torch.matmul(self._by_group(first), prompt[1])).to(q.dtype) + torch.matmul(second, own_values)
        return out.reshape(rows, heads, width).transpose(0, 1)

    def _by_group(self, x: Tensor) -> Tensor:
        """[B, Hkv, shared, n] as [groups, Hkv, most rows * shared, n]."""
        _, kv, shared, n = x.shape
        grid = self.grid
        cells = x if grid.in_order else x[grid.cells]
        return cells.reshape(self.groups, grid.most, kv, shared, n).transpose(1, 2).reshape(self.groups, kv, -1, n)

    def _by_row(self, x: Tensor) -> Tensor:
        """What `_by_group` gave, the other way."""
        _, kv, both, n = x.shape
        grid = self.grid
        cells = x.view(self.groups, kv, grid.most, both // grid.most, n).transpose(1, 2).flatten(0, 1)
        return cells if grid.in_order else cells[grid.cell]

    def _mask(self, prompt: int, own: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive [B, 1, 1, prompt + own], over the stored places of prompts and of the rows' own tokens."""
        key = (prompt, own, window, dtype)
        if key not in self._masks:
            at = torch.cat([torch.arange(prompt), torch.arange(own)]).to(self.own.device)
            behind = (torch.arange(prompt + own) >= prompt).to(self.own.device)
            seen = torch.where(behind, at <= self.own[:, None], at < self.lengths[:, None])
            if window is not None:
                seen &= self.position[:, None] - (at + behind * self.lengths[:, None]) < window
            self._masks[key] = torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, -1e30)[:, None, None, :]
        return self._masks[key]
