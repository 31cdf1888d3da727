"""Weights as thousands of small products want them: cast once instead of at every step and, on a CPU, laid out as oneDNN reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""[.., D] states to [.., V]."""

ROWS = 32
"""Rows of a typical step, for which the layout is chosen."""


def product(weight: Tensor, bias: Tensor | None = None) -> Product:
    """x @ weight.T + bias for x of the weight's type; on a CPU in bf16 the weight is laid out once, where each product would do it anew."""
    ready = weight.detach()
    if ready.device.type == "cpu" and ready.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available():
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(ready.contiguous(), ROWS)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        except (AttributeError, NotImplementedError, RuntimeError):  # another build of torch: the plain product is as right
            pass
    return lambda x: F.linear(x, ready, bias)


@contextlib.contextmanager
def prepared(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """For a while, linear layers but the language head multiply by weights prepared in `dtype`; the weights themselves are not touched."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    changed: list[nn.Linear] = []
    try:
        if dtype != torch.float32:
            for module in model.modules():
                if type(module) is nn.Linear and module is not head:
                    vars(module)["forward"] = _forward(module, dtype)
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _forward(module: nn.Linear, dtype: torch.dtype) -> Product:
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    times = product(module.weight.detach().to(dtype), bias)
    return lambda x: times(x.to(dtype))
