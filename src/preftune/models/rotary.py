"""Rotary embeddings in one pass over queries and keys, inside an architecture's own attention.

Its `forward` stays the code that transformers has; only the function by which it turns queries and keys is another, and only where the
architecture's own proves to be the usual one (arXiv 2104.09864, eq. 34). Where kernels cannot do it, its own does.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from preftune.kernels import find

NAME = "apply_rotary_pos_emb"
"""What transformers calls it, in every architecture's module."""
Turn = Callable[..., tuple[Tensor, Tensor]]
"""Queries [1, H, T, d], keys [1, Hkv, T, d], cosines and sines [1, T, d] to queries and keys turned."""


class _Turned(torch.autograd.Function):
    """[1, H, T, d] turned by angles whose cosines and sines [1, T, d] need no gradient; in the type that it came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, kernels: Any) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(cos, sin)
        made: Tensor = kernels.rotate(x[0], cos[0], sin[0])
        return made.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.kernels.rotate_back(grad[0], cos[0], sin[0]).unsqueeze(0), None, None, None


def by_kernels(theirs: Turn) -> Turn:
    """`theirs`, done by the kernels where they can."""

    @functools.wraps(theirs)
    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        kernels = None if more or options else find("pointwise")
        if kernels is None or not all(_takes(kernels, x, cos, sin) for x in (q, k)):
            return theirs(q, k, cos, sin, *more, **options)
        return _Turned.apply(q, cos, sin, kernels), _Turned.apply(k, cos, sin, kernels)

    return turn


def _takes(kernels: Any, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if x.ndim != 4 or len(x) != 1 or not kernels.takes(x):
        return False
    return all(a.shape == (1, *x.shape[2:]) and a.dtype == torch.float32 and a.is_contiguous() and not a.requires_grad for a in (cos, sin))


def turned_by_kernels(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The same class of attention with `by_kernels` in the place of its function; None where it has that or none of the usual form."""
    forward: Any = kind.forward
    code, names = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    theirs = names.get(NAME)
    if hasattr(kind, "turns_by_kernels") or code is None or NAME not in code.co_names or theirs is None or not _usual(theirs):
        return None
    made = types.FunctionType(code, {**names, NAME: by_kernels(theirs)}, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": made, "turns_by_kernels": True})


@torch.no_grad()
def _usual(theirs: Turn) -> bool:
    """Whether it turns the first half of every head against the second."""
    generator = torch.Generator().manual_seed(0)
    q, k, cos, sin = (torch.randn(shape, generator=generator) for shape in ((1, 2, 5, 8), (1, 1, 5, 8), (1, 5, 8), (1, 5, 8)))
    half = lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1)
    try:
        found = theirs(q, k, cos, sin)
        return all(torch.allclose(one, x * cos + half(x) * sin, atol=1e-5) for one, x in zip(found, (q, k), strict=True))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
