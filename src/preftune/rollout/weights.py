"""Weights as thousands of small products want them: cast once instead of at every step, on a CPU laid out as oneDNN reads them, and those
that read the same states side by side, so that one product serves them all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preftune.kernels import find
from preftune.models.lean import Joined, LeanLinear, make_lean

Product = Callable[[Tensor], Tensor]
"""[.., D] states to [.., V]."""

COPIED_PART = 4
"""Fp32 weights are copied where all of them are at most one part in so many of the machine's memory."""
ROWS = 128
"""Rows for which oneDNN chooses the layout; measured from 16 to 2048 rows, no other hint was faster."""


class InPanels:
    """The product with a weight that is laid out for kernels."""

    def __init__(self, kernels: Any, weight: Tensor, bias: Tensor | None) -> None:
        self.kernels, self.panels, self.bias = kernels, kernels.lay_out(weight), bias

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.kernels.multiply(x, self.panels, self.bias)
        return found


def product(weight: Tensor, bias: Tensor | None = None, *, copied: bool = True) -> Product:
    """x @ weight.T + bias for x of the weight's type; on a CPU the weight is laid out once, where each product would do it anew.

    Not `copied`, it is read where it lies.
    """
    ready = weight.detach()
    kernels = find("products") if copied else None
    if kernels is not None and kernels.takes(ready):
        return InPanels(kernels, ready, bias)
    if copied and ready.device.type == "cpu" and ready.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(ready.contiguous(), ROWS)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        except (AttributeError, NotImplementedError, RuntimeError):  # another build of torch: the plain product is as right
            pass
    return lambda x: F.linear(x, ready, bias)


@contextlib.contextmanager
def prepared(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """For a while, linear layers but the language head multiply by weights prepared in `dtype`; the weights themselves are not touched."""
    make_lean(model)
    copies = dtype != torch.float32 or room_for_copies(model)
    changed: list[tuple[LeanLinear, Joined]] = []
    try:
        together: dict[Joined, Together] = {}
        for layer in model.modules():
            if type(layer) is LeanLinear and copies and (dtype != torch.float32 or _gains(layer.joined.layers)):
                changed.append((layer, layer.joined))
                if layer.joined not in together:
                    together[layer.joined] = Together(layer.joined.layers, dtype)
                layer.joined = together[layer.joined]
        yield
    finally:
        for layer, joined in changed:
            layer.joined = joined


def room_for_copies(model: nn.Module) -> bool:
    """Whether all weights once more are a small part of the machine's memory.

    Not of what is free now: how weights lie decides how sums are rounded, and a run that goes on must draw what it would have drawn.
    """
    return sum(p.nbytes for p in model.parameters()) <= _memory() // COPIED_PART


def _memory() -> int:
    """Bytes of the machine's memory; 0 where the system does not say."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _gains(layers: Sequence[nn.Linear]) -> bool:
    """Whether products of fp32 weights are faster with a copy of them: where kernels take it, else they stay as they lie."""
    kernels = find("products")
    return kernels is not None and all(kernels.takes(layer.weight) for layer in layers)


class Together(Joined):
    """Layers that share a product of weights prepared in `dtype`."""

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        super().__init__(layers)
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        biases = [layer.bias for layer in layers]
        bias = None
        if any(one is not None for one in biases):
            whole = [w.new_zeros(len(w)) if one is None else one.detach().to(dtype) for w, one in zip(weights, biases, strict=True)]
            bias = torch.cat(whole)
        self.dtype, self.times = dtype, product(torch.cat(weights) if len(weights) > 1 else weights[0], bias)
        self.sizes = [len(w) for w in weights]

    def whole(self, x: Tensor) -> Tensor:
        """The products of all layers side by side."""
        return self.times(x.to(self.dtype))

    def products(self, x: Tensor) -> Sequence[Tensor]:
        """[.., V_i] of each layer."""
        return self.whole(x).split_with_sizes(self.sizes, -1)

    def apart(self, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """The products of all layers side by side, [.., first] and [.., the rest]."""
        whole = self.whole(x)
        return whole[..., :first], whole[..., first:]
