"""Weights as thousands of small products want them: cast once instead of at every step, on a CPU laid out as oneDNN reads them, and those
that read the same states side by side, so that one product serves them all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""[.., D] states to [.., V]."""

ROWS = 32
"""Rows of a typical step, for which the layout is chosen."""
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one block that most architectures give the same states."""


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
            for block in model.modules():
                layers = {name: m for name, m in block.named_children() if type(m) is nn.Linear and m is not head}
                for names in _sets(list(layers)):
                    together = Together([layers[name] for name in names], dtype)
                    for at, name in enumerate(names):
                        vars(layers[name])["forward"] = together.layer(at)
                        changed.append(layers[name])
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]


def _sets(names: list[str]) -> Iterator[Sequence[str]]:
    """The layers of a block, those that may read the same states together."""
    for siblings in SIBLINGS:
        if all(name in names for name in siblings):
            yield siblings
            names = [name for name in names if name not in siblings]
    yield from ([name] for name in names)


class Together:
    """Layers whose products are made at once when the first of them is given its states; each of the others then finds its own.

    One that is given other states than the first makes another product of all, so that nothing depends on how a block is written.
    """

    def __init__(self, layers: Sequence[nn.Linear], dtype: torch.dtype) -> None:
        weights = [layer.weight.detach().to(dtype) for layer in layers]
        biases = [layer.bias for layer in layers]
        bias = None
        if any(one is not None for one in biases):
            whole = [w.new_zeros(len(w)) if one is None else one.detach().to(dtype) for w, one in zip(weights, biases, strict=True)]
            bias = torch.cat(whole)
        self.dtype, self.times = dtype, product(torch.cat(weights) if len(weights) > 1 else weights[0], bias)
        self.sizes = [len(w) for w in weights]
        self.states: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def layer(self, at: int) -> Product:
        """The forward of layer `at`."""
        return lambda x: self.of(at, x)

    def of(self, at: int, x: Tensor) -> Tensor:
        """Layer `at` of `x`. The others' products are kept until they are asked for."""
        if x is not self.states or at not in self.waiting:
            made = self.times(x.to(self.dtype))
            if len(self.sizes) == 1:
                return made
            self.states, self.waiting = x, dict(enumerate(made.split(self.sizes, -1)))
        found = self.waiting.pop(at)
        if not self.waiting:
            self.states = None
        return found
