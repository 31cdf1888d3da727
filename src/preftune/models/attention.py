"""Tree attention: each response attends to its prompt and to itself only, through transformers' attention interface.

Registered once under a name that any Hugging Face decoder supporting the interface accepts. The plan of a packed row travels as the
keyword argument `tree`. On a CPU a kernel does all trees where it can. Else a short tree is one dense block there (batched
products beat flash attention's CPU backward), a long one goes response by response through SDPA; on CUDA the whole row is one
FlexAttention call with a block mask.
`scaling`, `sliding_window`, `softcap` and `s_aux` (attention sinks) are honoured; anything else that changes scores is refused.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from preftune.kernels import find
from preftune.packing.batch import Layout

NAME = "preftune_tree"
DENSE_TOKENS = 1280
"""Trees up to this many tokens are one dense block on CPU."""
KEPT_TOKENS = 768
"""The same where scores are capped or have sinks: there autograd keeps the block's weights."""
_SHARED = -1
"""In the place of a tree's number, for the tokens that all trees begin with."""
_IGNORED = {"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "output_attentions", "past_key_values", "deterministic"}
_REFUSED = ("position_bias", "head_mask", "cache", "alibi")


class TreePlan:
    """Masks of one packed row, made once and used by every layer."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._masks: dict[tuple[Any, ...], Tensor] = {}
        self._blocks: dict[Any, Any] = {}

    @functools.cached_property
    def apart(self) -> TreePlan:
        """The plan of the same trees with nothing shared."""
        return TreePlan(self.layout.apart)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """[H, T, d] queries over [Hkv, T, d] keys of the row, to [H, T, d]; called once a layer."""
        if q.is_cuda and sinks is None:
            return _flex_attention(q, k, v, self, window, scaling, softcap)
        return _cpu_attention(q, k, v, self, window, scaling, softcap, sinks)

    def dense_mask(self, tree: int, window: int | None, like: Tensor) -> Tensor:
        """[L, L] additive mask of one whole tree."""
        prompt, responses = self.layout.trees[tree]
        key = (prompt, responses, window, like.dtype)
        if key not in self._masks:
            position, branch = _positions(prompt, responses, like.device)
            self._masks[key] = _additive(_visible(position, branch, position, branch, window), like.dtype)
        return self._masks[key]

    def branch_mask(self, prompt: int, response: int, window: int | None, like: Tensor) -> Tensor:
        """[R, P + R] additive mask of one response over its prompt and itself; with response 0, the prompt's own [P, P]."""
        key = ("branch", prompt, response, window, like.dtype)
        if key not in self._masks:
            k = torch.arange(prompt + response, device=like.device)
            q = k[prompt:] if response else k
            zero = torch.zeros_like
            self._masks[key] = _additive(_visible(q, zero(q), k, zero(k), window), like.dtype)
        return self._masks[key]

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """FlexAttention's block mask of the whole row."""
        if window not in self._blocks:
            from torch.nn.attention.flex_attention import create_block_mask

            tree, position, branch = _row_coordinates(self.layout, device)

            def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                seen = (tree[q] == tree[k]) | (tree[k] == _SHARED)
                seen = seen & (position[q] >= position[k]) & ((branch[k] == 0) | (branch[q] == branch[k]))
                return seen if window is None else seen & (position[q] - position[k] < window)

            self._blocks[window] = create_block_mask(visible, None, None, len(tree), len(tree), device=str(device))
        return self._blocks[window]


def _positions(prompt: int, responses: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """[L] positions and [L] branch numbers (0 is the prompt) of one tree."""
    position = torch.cat([torch.arange(prompt), *(torch.arange(prompt, prompt + r) for r in responses)])
    branch = torch.repeat_interleave(torch.arange(len(responses) + 1), torch.tensor([prompt, *responses]))
    return position.to(device), branch.to(device)


def _row_coordinates(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """[T] tree, position and branch number of every token of the row."""
    parts = [_positions(p, r, torch.device("cpu")) for p, r in layout.trees]
    tree = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(layout.lengths))
    whole = (tree, torch.cat([p for p, _ in parts]), torch.cat([b for _, b in parts]))
    tree, position, branch = (layout.gathered(x).to(device) for x in whole)
    tree[: layout.shared] = _SHARED
    return tree, position, branch


def _visible(q: Tensor, q_branch: Tensor, k: Tensor, k_branch: Tensor, window: int | None) -> Tensor:
    """[Q, K] may a query at position q of its branch see a key at position k of its branch?"""
    seen = (q[:, None] >= k[None, :]) & ((k_branch[None, :] == 0) | (q_branch[:, None] == k_branch[None, :]))
    return seen if window is None else seen & (q[:, None] - k[None, :] < window)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Attention of [H, Q, d] over [Hkv, K, d] by plain batched products; softmax in fp32. Returns [H, Q, d]."""
    heads, queries, width = q.shape
    groups = heads // k.shape[0]
    scores = torch.bmm(q.reshape(k.shape[0], groups * queries, width) * scaling, k.transpose(1, 2)).view(heads, queries, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        column = sinks.reshape(-1, 1, 1).expand(heads, queries, 1).to(scores.dtype)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1, dtype=torch.float32)[..., :-1].to(v.dtype)
    else:
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.bmm(weights.view(k.shape[0], groups * queries, -1), v).view(heads, queries, v.shape[-1])


class _DenseTrees(torch.autograd.Function):
    """Softmax attention of a row's trees, each one dense block of its own; the weights are computed again in backward.

    Queries [H, T, d] (times `scaling` by then), keys and values [Hkv, T, d], all of one type; `masks` [L, L] of each tree. In bf16 the
    softmax runs in fp32 inside, and the weights are rounded once, as they are multiplied.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], masks: list[Tensor]) -> Tensor:
        groups = len(q) // len(k)
        out = q.new_empty((q.shape[1], len(q), v.shape[-1])).transpose(0, 1)  # as the model reads it next: heads of a token side by side
        for a, b, c, into, mask in zip(*(t.split(lengths, 1) for t in (q, k, v, out)), masks, strict=True):
            weights = _weights(_grouped(a, groups), b.contiguous(), mask)
            into.copy_(torch.bmm(weights, c.contiguous()).view(into.shape))
        ctx.lengths, ctx.masks = lengths, masks
        ctx.save_for_backward(q, k, v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        groups = len(q) // len(k)
        d_q, d_k, d_v = (torch.empty_like(t) for t in (q, k, v))
        parts = (t.split(ctx.lengths, 1) for t in (grad, q, k, v, d_q, d_k, d_v))
        for mask, g, a, b, c, into_q, into_k, into_v in zip(ctx.masks, *parts, strict=True):
            pull, queries, keys = _grouped(g, groups), _grouped(a, groups), b.contiguous()
            weights = _weights(queries, keys, mask)
            into_v.copy_(torch.bmm(weights.transpose(1, 2), pull))
            slope = torch.bmm(pull, c.contiguous().transpose(1, 2))
            slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
            into_q.copy_(torch.bmm(slope, keys).view(into_q.shape))
            into_k.copy_(torch.bmm(slope.transpose(1, 2), queries))
        return d_q, d_k, d_v, None, None


class _ByKernel(torch.autograd.Function):
    """The same by the kernels: each branch over its prompt and itself. Keeps two numbers a row beside what it is given."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernels: Any, *how: Any) -> Tensor:
        out, stats = kernels.forward(q, k, v, *how)  # trees, shared, window, scaling
        ctx.save_for_backward(q, k, v, stats)
        ctx.kernels, ctx.how = kernels, how
        made: Tensor = out
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, stats = ctx.saved_tensors
        return *ctx.kernels.backward(q, k, v, grad, stats, *ctx.how), None, None, None, None, None


def _weights(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    """[Hkv, groups * L, L] softmax of queries [Hkv, groups * L, d] over keys [Hkv, L, d] where the additive `mask` [L, L] lets them."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    kernels = find("pointwise")
    if kernels is not None and kernels.takes(scores):
        weights: Tensor = kernels.tree_softmax(scores, mask)
        return weights
    scores.view(-1, *mask.shape).add_(mask)
    return torch.softmax(scores, -1)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[H, L, n] as [Hkv, groups * L, n]."""
    return x.reshape(len(x) // groups, groups * x.shape[1], x.shape[2])


def _branch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    if softcap is not None or sinks is not None:
        return _dense(q, k, v, mask, scaling, softcap, sinks)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scaling, enable_gqa=q.shape[0] != k.shape[0])
    return out[0]


def _by_branches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreePlan,
    tree: int,
    window: int | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One long tree: its prompt, then each response over prompt and itself, so that cost grows with the sum of their lengths."""
    prompt, responses = plan.layout.trees[tree]
    sizes = [prompt, *responses]
    qs, ks, vs = q.split(sizes, dim=1), k.split(sizes, dim=1), v.split(sizes, dim=1)
    out = [_branch(qs[0], ks[0], vs[0], plan.branch_mask(prompt, 0, window, q), scaling, softcap, sinks)]
    for n, size in enumerate(responses, start=1):
        if not size:
            continue
        mask = plan.branch_mask(prompt, size, window, q)
        keys, values = torch.cat([ks[0], ks[n]], dim=1), torch.cat([vs[0], vs[n]], dim=1)
        out.append(_branch(qs[n], keys, values, mask, scaling, softcap, sinks))
    return torch.cat(out, dim=1)


def _cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, window: int | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    plain = softcap is None and sinks is None
    dense = DENSE_TOKENS if plain else min(DENSE_TOKENS, KEPT_TOKENS)
    if plain and scaling > 0:
        kernels, queries = find("trees"), q.to(v.dtype)
        if kernels is not None and kernels.takes(queries, v):
            return _ByKernel.apply(queries, k.to(v.dtype), v, kernels, plan.layout.trees, plan.layout.shared, window, scaling)
    if plan.layout.shared:  # each tree on its own: only attention itself is computed more than once
        q, k, v = (plan.layout.spread(x, 1) for x in (q, k, v))
        return plan.layout.gathered(_cpu_attention(q, k, v, plan.apart, window, scaling, softcap, sinks), 1)
    lengths = plan.layout.lengths
    if plain and max(lengths) <= dense:
        masks = [plan.dense_mask(i, window, v) for i in range(len(lengths))]
        return _DenseTrees.apply((q * scaling).to(v.dtype), k.to(v.dtype), v, list(lengths), masks)
    out = []
    for i, (a, b, c) in enumerate(zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True)):
        if lengths[i] > dense:
            out.append(_by_branches(a, b, c, plan, i, window, scaling, softcap, sinks))
        elif plain:
            out.append(_DenseTrees.apply((a * scaling).to(c.dtype), b.to(c.dtype), c, [lengths[i]], [plan.dense_mask(i, window, c)]))
        else:
            out.append(_dense(a, b, c, plan.dense_mask(i, window, q), scaling, softcap, sinks))
    return torch.cat(out, dim=1)


_compiled_flex: Any = None


def _flex_attention(q: Tensor, k: Tensor, v: Tensor, plan: TreePlan, window: int | None, scaling: float, softcap: float | None) -> Tensor:
    global _compiled_flex
    from torch.nn.attention.flex_attention import flex_attention

    if _compiled_flex is None:
        _compiled_flex = torch.compile(flex_attention, dynamic=True) if q.is_cuda else flex_attention

    modify = None
    if softcap is not None:
        cap = softcap

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.tanh(score / cap) * cap

    block = plan.block_mask(window, q.device)
    return _compiled_flex(q[None], k[None], v[None], modify, block, scaling, q.shape[0] != k.shape[0])[0]


class Plan(Protocol):
    """What a packed row's attention is to do; one call of the model is one plan."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor: ...


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    tree: Plan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one packed row: [1, H, T, d] queries over [1, Hkv, T, d] keys, to [1, T, H, d]. Called by transformers."""
    if tree is None:
        raise ValueError("tree attention was called without its plan: the model does not pass keyword arguments on to its attention")
    unknown = [name for name in _REFUSED if options.get(name) is not None]
    if unknown:
        raise ValueError(f"tree attention cannot honour {', '.join(unknown)}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = tree.attend(query[0], key[0], value[0], window=sliding_window, scaling=scaling, softcap=softcap, sinks=s_aux)
    return out.transpose(0, 1).unsqueeze(0), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The plan holds the mask; transformers need not make one."""
    return None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)
