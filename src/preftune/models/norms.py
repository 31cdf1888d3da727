"""RMSNorm with a backward pass of its own, and how a module proves to be what it looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from preftune.kernels import find


def flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[.., D] states as [T, D], in `dtype`."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


class RootMeanSquare(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (RMSNorm, arXiv 1910.07467 eq. 4); keeps x and one number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        kernels = _norm_kernels(x, weight)
        ctx.kernels, ctx.eps = kernels, eps
        if kernels is not None:
            ctx.save_for_backward(x, weight, None)
            out: Tensor = kernels.add_norm(x.reshape(-1, x.shape[-1]), None, weight, eps, x.dtype).view(x.shape)
            return out
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (precise * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        if ctx.kernels is not None:
            both = (t.reshape(-1, x.shape[-1]).contiguous() for t in (x, grad))
            d_x, d_weight = ctx.kernels.norm_back(*both, weight, ctx.eps)
            return d_x.view(x.shape), d_weight, None
        rows, slope, scale, wide = flat(x, scale.dtype), flat(grad, scale.dtype), scale.view(-1, 1), weight.to(scale.dtype)
        pulled = slope * rows * scale
        d_weight = pulled.sum(0).to(weight.dtype) if need_weight else None
        if not need_x:
            return None, d_weight, None
        along = torch.mv(pulled, wide).mul_(-1 / x.shape[-1]).unsqueeze(1) * scale
        return (slope * wide).addcmul_(rows, along).mul_(scale).to(x.dtype).view(x.shape), d_weight, None


def _norm_kernels(x: Tensor, weight: Tensor) -> Any:
    """The kernels, where they can do this norm forward and backward."""
    whole = x.dtype == weight.dtype == torch.float32 and x.is_contiguous() and weight.is_contiguous()
    kernels = find("pointwise") if whole else None
    return kernels if kernels is not None and kernels.takes(x) else None


class LeanNorm(nn.Module):
    """RMSNorm by `RootMeanSquare`."""

    @staticmethod
    def looks_like(module: Any) -> bool:
        weight = getattr(module, "weight", None)
        return "RMSNorm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.ndim == 1 and _eps(module) is not None

    @staticmethod
    def equals(module: Any) -> bool:
        return agree(module, lambda x: RootMeanSquare.apply(x, module.weight, _eps(module)), module.weight)

    @property
    def eps_(self) -> float:
        """What is added to the mean square, whatever the architecture calls it."""
        found = _eps(self)
        assert found is not None
        return found

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] to [.., D]."""
        return RootMeanSquare.apply(x, self.weight, self.eps_)


def _eps(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def is_lean_norm(module: nn.Module) -> bool:
    """Whether it is an RMSNorm of the plain form; `eps_` and `weight` are its parts."""
    return isinstance(module, LeanNorm)


@torch.no_grad()
def agree(module: nn.Module, lean: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether `lean` gives what `module` does, on states that are as wide as `like` and of its type.

    Each row as a whole: where a few large numbers meet in a sum, a small result has none of its digits from rounding alone.
    """
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(4, like.shape[-1], generator=generator)).to(like.device, like.dtype)
    try:
        ours, theirs = lean(x).double(), module(x).double()
        return bool(((ours - theirs).norm(dim=-1) <= (1e-2 if like.dtype.itemsize < 4 else 1e-5) * theirs.norm(dim=-1)).all())
    except (RuntimeError, TypeError, AttributeError):
        return False
