"""Log-probabilities of chosen tokens from hidden states, without holding the logits of all positions unless they are few."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from preftune.kernels import find
from preftune.models.lean import pulled

CHUNK_BYTES = 128 * 2**20
"""Logits in flight at once, in fp32."""
KEPT_BYTES = 256 * 2**20
"""Logits up to this size are kept for the backward pass, in the type of the products, where kernels read them as they are."""


class _ChunkedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T + bias)[target] and the entropy, chunk by chunk; the chunk is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        compute: torch.dtype,
        with_entropy: bool,
        backward_follows: bool,
    ) -> tuple[Tensor, Tensor | None]:
        w = weight.to(compute)
        size = len(hidden) * weight.shape[0] * w.element_size()
        keeps = backward_follows and size <= KEPT_BYTES and _kernels(w, bias, scale, softcap) is not None
        rows = max(1, len(hidden) if keeps else CHUNK_BYTES // (4 * weight.shape[0]))
        lse = torch.empty(len(hidden), dtype=_accumulate(compute), device=hidden.device)
        picked = torch.empty_like(lse)
        entropy = torch.empty_like(lse) if with_entropy else None
        ctx.kept = []
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = hidden[part].to(compute) @ w.T
            if (kernels := _kernels(logits, bias, scale, softcap)) is not None:
                picked[part] = logits.gather(1, targets[part, None]).squeeze(1).float() * scale
                lse[part], told = kernels.log_sums(logits, scale)
                if keeps:
                    ctx.kept.append((w, logits))
                if entropy is not None:
                    entropy[part] = told
                continue
            logits, _ = finished(logits, bias, scale, softcap, compute)
            picked[part] = logits.gather(1, targets[part, None]).squeeze(1)
            if entropy is None:
                lse[part] = torch.logsumexp(logits, dim=-1)
                continue
            top = logits.amax(1, keepdim=True)  # the steps of logsumexp, for the same bits, and one more product
            weights = logits.sub_(top).exp()
            total = weights.sum(1)
            lse[part] = total.log() + top.squeeze(1)
            entropy[part] = total.log() - torch.linalg.vecdot(weights, logits) / total
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.options = (scale, softcap, compute, rows)
        return picked - lse, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        scale, softcap, compute, rows = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        precise = _accumulate(compute)
        d_weight: Tensor | None = None
        d_bias = torch.zeros(bias.shape, dtype=precise, device=weight.device) if need_bias and bias is not None else None
        w, products = ctx.kept.pop() if ctx.kept else (weight.to(compute), None)  # they are read once, and written over
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h = hidden[part].to(compute)
            g = lse.new_zeros(len(h)) if grad is None else grad[part].to(precise)
            e = None if entropy is None or grad_entropy is None else (entropy[part], grad_entropy[part].to(precise))
            d = _slopes(h @ w.T if products is None else products, lse[part], targets[part], g, e, bias, scale, softcap)
            if d_bias is not None:
                d_bias += d.sum(0)
            d = d.to(compute)
            if d_hidden is not None:
                d_hidden[part] = (d @ w).to(d_hidden.dtype)
            if need_weight and d_weight is None:
                d_weight = pulled(d, h, precise)
            elif d_weight is not None and compute == precise:
                d_weight.addmm_(d.T, h)
            elif d_weight is not None:
                d_weight += d.T @ h
        if need_weight and d_weight is None:
            d_weight = torch.zeros(weight.shape, dtype=precise, device=weight.device)
        cast = lambda t, like: None if t is None else t.to(like.dtype)
        return d_hidden, cast(d_weight, weight), cast(d_bias, bias), None, None, None, None, None, None


def _slopes(
    products: Tensor,
    lse: Tensor,
    targets: Tensor,
    g: Tensor,
    e: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    scale: float,
    softcap: Any,
) -> Tensor:
    """[rows, V] gradient of the products, in whose place it may be, from `g` of the log-probabilities and, with entropies, theirs."""
    if (kernels := _kernels(products, bias, scale, softcap)) is not None:
        entropy, pull = (None, None) if e is None else (t.contiguous() for t in e)
        made: Tensor = kernels.log_sums_back(products, lse, entropy, targets.contiguous(), g.contiguous(), pull, scale)
        return made
    logits, slope = finished(products, bias, scale, softcap, products.dtype)
    logp = logits.sub_(lse[:, None])
    along = g[:, None] if e is None else (logp + e[0][:, None]).mul_(e[1][:, None]).add_(g[:, None])
    d = logp.exp_().mul_(-along)
    d.scatter_add_(1, targets[:, None], g[:, None])
    if slope is not None:
        d.mul_(slope)
    return d.mul_(scale) if scale != 1.0 else d


def _kernels(logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Any:
    """The kernels, where they can do these logits."""
    kernels = find("logprobs") if bias is None and softcap is None and scale > 0 else None
    return kernels if kernels is not None and kernels.takes(logits) else None


def _accumulate(compute: torch.dtype) -> torch.dtype:
    """fp32, or float64 where products run in float64."""
    return torch.promote_types(compute, torch.float32)


def finished(
    products: Tensor, bias: Tensor | None, scale: float, softcap: float | None, compute: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Logits [rows, V] in fp32 or better from `hidden @ weight.T` in `compute`; with a soft cap also their slope to the uncapped ones.

    The products are changed in place.
    """
    logits = products.to(_accumulate(compute))
    if bias is not None:
        logits += bias
    if softcap is None:
        return (logits if scale == 1.0 else logits.mul_(scale)), None
    capped = torch.tanh(logits / softcap)
    slope = 1 - capped.square()
    return capped.mul_(softcap * scale), slope


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """[M] fp32 log-probabilities of `targets` [M] given `hidden` [M, D] and the LM head's `weight` [V, D].

    Logits are `scale * cap(hidden @ weight.T + bias)`, cap(z) = softcap * tanh(z / softcap) where a soft cap is set; products run in
    `compute`, softmax in fp32 (in float64 for float64 products). Equals `log_softmax(...).gather(...)` in value and gradient.
    """
    return _ChunkedLogProbs.apply(hidden, weight, bias, targets, scale, softcap, compute, False, torch.is_grad_enabled())[0]


def chunked_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    compute: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """What `chunked_logprobs` gives, and the [M] entropy (nats) of each token's distribution, from one pass over the logits."""
    options = scale, softcap, compute, True, torch.is_grad_enabled()
    found: tuple[Tensor, Tensor] = _ChunkedLogProbs.apply(hidden, weight, bias, targets, *options)
    return found
