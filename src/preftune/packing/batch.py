"""The one batch: a packed row of token trees, each prompt once and its N responses behind it, no padding anywhere.

What all prompts begin with, as a system message, is in the row once too.

Legend: G prompts, N responses a prompt at most, R responses in all, T packed tokens, M response tokens (those that carry loss).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preftune.packing.chat import Tree

LEAST_SHARED = 8
"""Tokens that prompts must have in common before they are kept once: fewer are not worth the way around them."""


@dataclass(frozen=True)
class Layout:
    """Where the trees lie in the packed row: per tree the length of its whole prompt and the lengths of its responses.

    The first `shared` tokens of all prompts are the same ones: they lie once, at the start of the row, and what is left of each tree
    follows them.
    """

    trees: tuple[tuple[int, tuple[int, ...]], ...]
    shared: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each tree, the shared ones among them."""
        return tuple(prompt + sum(responses) for prompt, responses in self.trees)

    @property
    def own(self) -> tuple[int, ...]:
        """Tokens of each tree behind the shared ones."""
        return tuple(length - self.shared for length in self.lengths)

    @property
    def apart(self) -> Layout:
        """The same trees with nothing shared."""
        return Layout(self.trees)

    def spread(self, x: Tensor, dim: int = 0) -> Tensor:
        """What belongs to the row's tokens, as it belongs to those of the row in which nothing is shared."""
        if not self.shared:
            return x
        shared, *own = x.split([self.shared, *self.own], dim)
        return torch.cat([part for one in own for part in (shared, one)], dim)

    def gathered(self, x: Tensor, dim: int = 0) -> Tensor:
        """The other way; what belongs to the shared tokens is the first tree's."""
        if not self.shared:
            return x
        parts = x.split([n for own in self.own for n in (self.shared, own)], dim)
        return torch.cat([parts[0], *parts[1::2]], dim)

    def rows(self) -> list[tuple[int, int, int, int]]:
        """For each response: start and length of its prompt, start and length of itself, in the row in which nothing is shared."""
        out, start = [], 0
        for prompt, responses in self.trees:
            at = start + prompt
            for length in responses:
                out.append((start, prompt, at, length))
                at += length
            start = at
        return out


@dataclass(frozen=True)
class Totals:
    """What a whole optimizer step holds, over all its micro-batches and processes: the denominators of every loss."""

    tokens: float
    """Tokens that carry loss, each as often as its response's weight."""
    responses: int
    """Responses; one that weighs nothing because nothing could score it counts as not there."""
    prompts: int

    @staticmethod
    def of(trees: Sequence[Tree]) -> Totals:
        """Counts over these trees."""
        return Totals(sum(float(_tokens_of(t).sum()) for t in trees), sum(map(_responses_of, trees)), len(trees))


def _responses_of(tree: Tree) -> int:
    """Responses that count in a mean over responses."""
    return len(tree.responses) - (0 if tree.weights is None else int((np.isnan(tree.scores) & (tree.weights == 0)).sum()))


def _tokens_of(tree: Tree) -> np.ndarray:
    """[N] weighted tokens of each response."""
    tokens = np.array([tree.loss_tokens(n) for n in range(len(tree.responses))], dtype=float)
    return tokens if tree.weights is None else tokens * tree.weights


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    input_ids: Tensor
    """[T] packed tokens."""
    position_ids: Tensor
    """[T] a response token's position continues its prompt's."""
    layout: Layout
    predict: Tensor
    """[M] packed index whose hidden state predicts the m-th token that carries loss."""
    targets: Tensor
    """[M] the tokens that carry loss."""
    response: Tensor
    """[M] index of each token's response in the flattened [G * N] grid."""
    last: Tensor
    """[R] packed index of each response's last token; [0] where the row has been left without these."""
    cell: Tensor
    """[R] index of each response in the flattened [G * N] grid."""
    present: Tensor
    """[G, N] False where a prompt has fewer than N responses."""
    length: Tensor
    """[G, N] response tokens, float."""
    scores: Tensor
    """[G, N] higher is better, NaN where nothing orders the response."""
    preference: Tensor
    """[G, N, N] how strongly i is preferred over j."""
    token_weight: Tensor
    """[M] weights of token losses: they sum to 1 over the whole step."""
    prompt_weight: Tensor
    """[G] weights of prompt losses: they sum to 1 over the whole step."""
    response_weight: Tensor
    """[G, N] weights of losses of single responses: they sum to 1 over the whole step."""
    ids: tuple[str, ...] = ()
    reference_logp: Tensor | None = None
    """[G, N] summed log-probability under the frozen reference, where the method needs it."""
    margin: Tensor | None = None
    """[G, N, N] strength of the preference of i over j, 0 where people gave none; None where no record of the batch has any."""
    labels: Tensor | None = None
    """[G, N] 1 desirable, 0 undesirable, NaN unlabelled."""
    rated: Tensor | None = None
    """[G, N, A] the ratings to be learnt, NaN where unrated."""
    told: Mapping[str, Tensor] = field(default_factory=dict)
    """[M] numbers of the tokens that carry loss, by name: what was known of them before this step."""
    temperature: float = 1.0
    """Log-probabilities are those of the logits divided by this."""

    @property
    def best(self) -> Tensor:
        """[G, N] weights that sum to 1 over a prompt's best responses; over all of them where nothing orders them."""
        scores = self.scores.masked_fill(self.scores.isnan() | ~self.present, -torch.inf)
        top = self.present & (scores == scores.amax(1, keepdim=True))
        return top / top.sum(1, keepdim=True).clamp(min=1)

    @property
    def better(self) -> Tensor:
        """[G, N, N] True where response i has a higher score than j."""
        return self.scores.unsqueeze(2) > self.scores.unsqueeze(1)

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return len(self.input_ids)

    @functools.cached_property
    def predicting(self) -> Batch:
        """The batch without the last token of each response, which predicts nothing: what a language model need read of it."""
        if not len(self.last):
            return self
        kept = torch.ones_like(self.input_ids, dtype=torch.bool)
        kept[self.last] = False
        layout = replace(self.layout, trees=tuple((prompt, tuple(n - 1 for n in sizes)) for prompt, sizes in self.layout.trees))
        ids, positions, predict = self.input_ids[kept], self.position_ids[kept], (kept.cumsum(0) - 1)[self.predict]
        return replace(self, layout=layout, last=self.last[:0], input_ids=ids, position_ids=positions, predict=predict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, told={name: values.to(device) for name, values in self.told.items()}, **moved)

    def per_response(self, values: Tensor) -> Tensor:
        """Sum [M] token values into [G, N] float64: sums of thousands of log-probabilities are large, and losses read their differences."""
        grid = torch.zeros(self.present.numel(), dtype=torch.float64, device=values.device)
        return grid.index_add(0, self.response, values.double()).view(self.present.shape)

    def mean_per_response(self, values: Tensor) -> Tensor:
        """Mean of [M] token values over each response's tokens, [G, N] float64; 0 where there is no response."""
        return self.per_response(values) / self.length.clamp(min=1)

    def on_grid(self, values: Tensor) -> Tensor:
        """Lay [R, ...] values of responses on the [G, N, ...] grid, zeros where there is no response."""
        rest = values.shape[1:]
        grid = torch.zeros((self.present.numel(), *rest), dtype=values.dtype, device=values.device)
        return grid.index_put((self.cell,), values).view(*self.present.shape, *rest)


def by_token(trees: Sequence[Tree], totals: Totals) -> np.ndarray:
    """Every response token of the step counts the same."""
    return _spread(trees, lambda t, n: 1.0 / max(totals.tokens, 1e-9))


def by_response(trees: Sequence[Tree], totals: Totals) -> np.ndarray:
    """Every response of the step counts the same, long or short."""
    return _spread(trees, lambda t, n: 1.0 / t.loss_tokens(n) / max(totals.responses, 1))


def by_prompt(trees: Sequence[Tree], totals: Totals) -> np.ndarray:
    """Every prompt of the step counts the same, however many responses it has."""
    return _spread(trees, lambda t, n: 1.0 / t.loss_tokens(n) / len(t.responses) / max(totals.prompts, 1))


def _spread(trees: Sequence[Tree], weight: Callable[[Tree, int], float]) -> np.ndarray:
    """[M] token weights: each response's `weight` on each of its tokens, times the response's own weight."""
    own = lambda t, n: 1.0 if t.weights is None else float(t.weights[n])
    return np.concatenate([np.full(t.loss_tokens(n), weight(t, n) * own(t, n)) for t in trees for n in range(len(t.responses))])


Reduction = Callable[[Sequence[Tree], Totals], np.ndarray]
"""Trees and what the whole step holds, to the [M] weights of its tokens; those of prompts and responses follow from the totals."""


def collate(trees: Sequence[Tree], totals: Totals | None = None, reduction: Reduction = by_token) -> Batch:
    """Pack trees into one row. `totals` are those of the whole step; by default this batch is the whole step."""
    totals = totals or Totals.of(trees)
    width = max(len(t.responses) for t in trees)
    shared = common_prefix([t.prompt for t in trees])
    layout = Layout(tuple((len(t.prompt), tuple(len(r) for r in t.responses)) for t in trees), shared)
    ids, positions, predict, targets, response, last, cell = [], [], [], [], [], [], []
    scores = np.full((len(trees), width), np.nan)
    preference = np.zeros((len(trees), width, width))
    length = np.zeros((len(trees), width))
    known = all(t.reference is not None for t in trees)
    reference = np.zeros((len(trees), width))
    margin = np.zeros((len(trees), width, width)) if any(t.margin is not None for t in trees) else None
    labels = np.full((len(trees), width), np.nan) if any(t.labels is not None for t in trees) else None
    heads = next((t.rated.shape[1] for t in trees if t.rated is not None), 0)
    rated = np.full((len(trees), width, heads), np.nan) if heads else None
    response_weight = np.zeros((len(trees), width))
    at = 0
    for g, tree in enumerate(trees):
        p, n = len(tree.prompt), len(tree.responses)
        if p == 0:
            raise ValueError(f"record {tree.id} has an empty prompt: its first response token has nothing to be predicted from")
        own = shared if g else 0
        ids.append(tree.prompt[own:])
        positions.append(np.arange(own, p))
        at += p - own
        prompt_end = at - 1
        for i, tokens in enumerate(tree.responses):
            size = len(tokens)
            ids.append(tokens)
            positions.append(np.arange(p, p + size))
            carries = slice(None) if tree.carries is None else tree.carries[i]
            predict.append(np.concatenate([[prompt_end], np.arange(at, at + size - 1)])[carries])
            targets.append(tokens[carries])
            length[g, i] = len(targets[-1])
            response.append(np.full(len(targets[-1]), g * width + i))
            at += size
            last.append(at - 1)
            cell.append(g * width + i)
        scores[g, :n] = tree.scores
        preference[g, :n, :n] = tree.preference
        response_weight[g, :n] = 1.0 / max(totals.responses, 1)
        if known:
            reference[g, :n] = tree.reference
        if margin is not None and tree.margin is not None:
            margin[g, :n, :n] = tree.margin
        if labels is not None and tree.labels is not None:
            labels[g, :n] = tree.labels
        if rated is not None and tree.rated is not None:
            rated[g, :n] = tree.rated
    maybe = lambda values: None if values is None else torch.from_numpy(values).float()
    whole = lambda parts: torch.from_numpy(np.concatenate(parts).astype(np.int64))
    return Batch(
        input_ids=whole(ids),
        position_ids=whole(positions),
        layout=layout,
        predict=whole(predict),
        targets=whole(targets),
        response=whole(response),
        last=torch.tensor(last),
        cell=torch.tensor(cell),
        present=torch.from_numpy(response_weight > 0),
        length=torch.from_numpy(length).float(),
        scores=torch.from_numpy(scores).float(),
        preference=torch.from_numpy(preference).float(),
        token_weight=torch.from_numpy(reduction(trees, totals)).float(),
        prompt_weight=torch.full((len(trees),), 1.0 / max(totals.prompts, 1)),
        response_weight=torch.from_numpy(response_weight).float(),
        ids=tuple(t.id for t in trees),
        reference_logp=torch.from_numpy(reference) if known else None,
        margin=maybe(margin),
        labels=maybe(labels),
        rated=maybe(rated),
        told={name: torch.from_numpy(np.concatenate([v for t in trees for v in t.told[name]])).float() for name in trees[0].told},
    )


def common_prefix(prompts: Sequence[np.ndarray]) -> int:
    """How many tokens, from the first on, lie once in a row of trees with these prompts: an even number, less than any one's, 0 if not
    worth it.

    Even, so that kernels which read tokens by pairs find no pair of which only half is shared.
    """
    if len(prompts) < 2:
        return 0
    first, length = prompts[0], min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        if length < LEAST_SHARED:
            return 0
        differs = np.flatnonzero(first[:length] != prompt[:length])
        length = int(differs[0]) if len(differs) else length
    return length // 2 * 2 if length >= LEAST_SHARED else 0


def microbatches(trees: Sequence[Tree], tokens_per_microbatch: int, processes: int = 1, rank: int = 0) -> list[list[int]]:
    """Indices of `trees` for each micro-batch of this process: filled by tokens, longest first.

    First-fit decreasing, so that a step that cannot fit in memory fails on its first micro-batch. A tree longer than the budget goes alone.
    What all of them begin with counts once in each micro-batch.
    With several processes the same bins are made everywhere and dealt out by load; a process may get none.
    """
    shared = common_prefix([t.prompt for t in trees])
    order = sorted(range(len(trees)), key=lambda i: (-trees[i].tokens, i))
    bins: list[list[int]] = []
    loads: list[int] = []
    budget = tokens_per_microbatch
    if processes > 1:
        whole = sum(t.tokens - shared for t in trees)
        budget = min(budget, max(-(-whole // processes) + shared, max((t.tokens for t in trees), default=1)))
    for index in order:
        size = trees[index].tokens - shared
        for b, load in enumerate(loads):
            if load + size <= budget:
                bins[b].append(index)
                loads[b] += size
                break
        else:
            bins.append([index])
            loads.append(shared + size)
    if processes == 1:
        return bins
    shares = [0] * processes
    mine = []
    for b in sorted(range(len(bins)), key=lambda b: (-loads[b], b)):
        owner = min(range(processes), key=lambda r: (shares[r], r))
        shares[owner] += loads[b]
        if owner == rank:
            mine.append(bins[b])
    return mine
