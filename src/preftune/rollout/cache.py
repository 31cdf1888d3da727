"""Keys and values of responses under way: a prompt's once for its whole group, each response's own behind it.

A decoding step reads one packed row of B new tokens. Each attends to its group's prompt, all responses of the group together, and to
its own tokens so far; the two parts are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from preftune.models.attention import TreePlan
from preftune.packing.batch import Layout

LEAST = -80.0
"""Scores this far below the largest weigh nothing in fp32 (1.8e-35), and neither do masked ones, which are put here: exp underflowing to 0
takes ten times as long on a CPU.
"""
GROW = 64
"""Token places that a full cache gains at least."""


class Rows:
    """A growing [rows, Hkv, tokens, d] store of one layer's keys or values."""

    def __init__(self) -> None:
        self.data: Tensor | None = None

    def reserve(self, rows: int, tokens: int, like: Tensor) -> Tensor:
        """Room for so many rows and tokens; `like` [Hkv, ..., d] gives heads, width, type and device."""
        have = (0, 0) if self.data is None else (self.data.shape[0], self.data.shape[2])
        if self.data is None or rows > have[0] or tokens > have[1]:
            size = max(rows, have[0]), tokens if tokens <= have[1] else max(tokens, min(2 * have[1], have[1] + 4 * GROW), GROW)
            grown = like.new_zeros((size[0], like.shape[0], max(size[1], have[1]), like.shape[-1]))
            if self.data is not None:
                grown[: have[0], :, : have[1]] = self.data
            self.data = grown
        return self.data


class Cache:
    """Keys and values of all layers."""

    def __init__(self, layers: int) -> None:
        self.prompt = [(Rows(), Rows()) for _ in range(layers)]
        self.own = [(Rows(), Rows()) for _ in range(layers)]

    def move(self, part: str, source: list[int], target: list[int], tokens: int) -> None:
        """Copy whole rows of `prompt` or `own`, their first `tokens` tokens: what finished makes place for what goes on."""
        if source and tokens:
            for pair in getattr(self, part):
                for rows in pair:
                    rows.data[target, :, :tokens] = rows.data[source, :, :tokens]


class Prefill(TreePlan):
    """Prompts of new groups: their keys and values go into the cache as they are computed."""

    def __init__(self, cache: Cache, lengths: tuple[int, ...], first: int) -> None:
        super().__init__(Layout(tuple((length, ()) for length in lengths)))
        self.cache, self.lengths, self.first, self.layer = cache, lengths, first, 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """As the row's own attention, and keep the keys and values."""
        keys, values = self.cache.prompt[self.layer]
        self.layer += 1
        for rows, new in ((keys, k.to(v.dtype)), (values, v)):
            data = rows.reserve(self.first + len(self.lengths), max(self.lengths), new)
            for g, part in enumerate(new.split(self.lengths, dim=1)):
                data[self.first + g, :, : part.shape[1]] = part
        return super().attend(q, k, v, window=window, scaling=scaling, softcap=softcap, sinks=sinks)


class Decode:
    """One step: B rows, row b the `own[b]`-th token of its response (from 0) behind the prompt of group `group[b]`."""

    def __init__(self, cache: Cache, group: Tensor, own: Tensor, prompts: Tensor) -> None:
        self.cache, self.layer = cache, 0
        self.rows = len(group)
        self.index = torch.arange(self.rows, device=group.device)
        self.own, self.group, self.prompts = own, group, prompts
        self.longest_own, self.longest_prompt = int(own.max()) + 1, int(prompts.max())
        self.position = prompts[group] + own
        # where each row stands among those of its group, and the grid [groups, most rows] of row numbers that follows from it
        order = torch.argsort(group, stable=True)
        counts = torch.bincount(group, minlength=len(prompts))
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(group)
        place[order] = self.index - starts[group[order]]
        self.most = int(counts.max())
        self.cell = group * self.most + place
        self.grid = torch.zeros(len(prompts) * self.most, dtype=torch.long, device=group.device)
        self.grid[self.cell] = self.index
        self._masks: dict[tuple[str, int | None], Tensor | None] = {}

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """[H, B, d] queries over [Hkv, B, d] new keys and all cached ones."""
        heads, rows, width = q.shape
        kv, k = k.shape[0], k.to(v.dtype)  # under autocast rotary embeddings leave keys in fp32, and every product would cast all of them
        groups, shared = len(self.prompts), heads // kv
        prompt_keys, prompt_values = (r.data[:groups, :, : self.longest_prompt] for r in self.cache.prompt[self.layer])  # type: ignore[index]
        own_keys, own_values = (r.reserve(rows, self.longest_own, new) for r, new in zip(self.cache.own[self.layer], (k, v), strict=True))
        self.layer += 1
        own_keys[self.index, :, self.own] = k.transpose(0, 1)
        own_values[self.index, :, self.own] = v.transpose(0, 1)
        own_keys, own_values = own_keys[:rows, :, : self.longest_own], own_values[:rows, :, : self.longest_own]
        query = (q * scaling).transpose(0, 1).reshape(rows, kv, shared, width)
        together = query[self.grid].view(groups, self.most, kv, shared, width).transpose(1, 2).reshape(groups, kv, -1, width)
        first, first_log = _part(together, prompt_keys, prompt_values, self._prompt_mask(window, shared), softcap)
        spread = lambda x: x.view(groups, kv, self.most, shared, -1).transpose(1, 2).flatten(0, 1)[self.cell]
        first, first_log = spread(first), spread(first_log)
        second, second_log = _part(query, own_keys, own_values, self._own_mask(window), softcap)
        ahead = first_log - second_log
        out = first * torch.sigmoid(ahead) + second * torch.sigmoid(-ahead)
        if sinks is not None:
            out = out * torch.sigmoid(torch.logaddexp(first_log, second_log) - sinks.float().view(1, kv, shared, 1))
        return out.to(q.dtype).view(rows, heads, width).transpose(0, 1)

    def _prompt_mask(self, window: int | None, shared: int) -> Tensor | None:
        """Additive [groups, 1, 1 or rows * shared, longest prompt], None where all of it is seen."""
        key = ("prompt", window)
        if key not in self._masks:
            at = torch.arange(self.longest_prompt, device=self.prompts.device)
            seen = (at[None, :] < self.prompts[:, None])[:, None, None, :]
            if window is not None and int(self.position.max()) >= window:
                near = self.position[self.grid].view(len(self.prompts), self.most, 1) - at < window
                seen = seen & near.repeat_interleave(shared, 1).unsqueeze(1)
            self._masks[key] = None if bool(seen.all()) else _additive(seen)
        return self._masks[key]

    def _own_mask(self, window: int | None) -> Tensor | None:
        """Additive [B, 1, 1, longest own], None where all of it is seen."""
        key = ("own", window)
        if key not in self._masks:
            at = torch.arange(self.longest_own, device=self.own.device)
            behind = self.own[:, None] - at[None, :]
            seen = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
            self._masks[key] = None if bool(seen.all()) else _additive(seen[:, None, None, :])
        return self._masks[key]


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -1e30)


def _part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Softmax attention of [.., Q, d] over [.., K, d] keys in fp32, and the [.., Q, 1] log-sum-exp of its scores."""
    scores = torch.matmul(q, k.transpose(-1, -2)).float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores += mask
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).clamp_(min=LEAST).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.matmul(weights.to(v.dtype), v).float() / total, top + total.log()
