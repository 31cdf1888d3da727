"""Layers that remember less: the parts nearly every decoder is made of, with the same numbers and a backward pass of their own.

Autograd keeps every intermediate result, and under autocast a cast of the states for each linear layer that reads them. Here a norm keeps
its input, linear layers of the same states share one product and one cast, and a gated feed-forward block computes its activation again.
`make_lean` changes the class of a module, never its parameters or their names, and only where the module proves to be what it looks like.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from preftune.kernels import find
from preftune.models.norms import LeanNorm, agree, flat
from preftune.models.rotary import turned_by_kernels

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linear layers of one block that most architectures give the same states."""


def sets_of_siblings(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """The linear layers of a block, those that may read the same states together."""
    left = list(names)
    for siblings in SIBLINGS:
        if all(name in left for name in siblings):
            yield siblings
            left = [name for name in left if name not in siblings]
    yield from ([name] for name in left)


def plain_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers right inside `block`, but for those that some other library has replaced by its own."""
    return {name: m for name, m in block.named_children() if isinstance(m, nn.Linear) and type(m) in (nn.Linear, LeanLinear)}


def make_lean(model: nn.Module) -> None:
    """Make the parts of `model` lean that can be, in place; what has another form is left as it is."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for block in list(model.modules()):
        if isinstance(block, LeanNorm | _LeanGated):
            continue
        layers = {name: m for name, m in plain_linears(block).items() if m is not head}
        for names in sets_of_siblings(list(layers)):
            joined = Joined([layers[name] for name in names])
            for at, name in enumerate(names):
                layers[name].__class__ = LeanLinear
                vars(layers[name]).update(joined=joined, at=at)
        for kind in (LeanNorm, _LeanGated):
            if kind.looks_like(block) and kind.equals(block):
                block.__class__ = type(type(block).__name__, (kind, type(block)), {})
        block.__class__ = turned_by_kernels(type(block)) or type(block)


@torch.no_grad()
def freeze(model: nn.Module, compute: torch.dtype) -> None:
    """Keep the weights of a lean model that trains no more in the type of its products: the same numbers, cast once."""
    model.eval().requires_grad_(False)
    if compute == torch.float32:
        return
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is not None:
        head.weight = nn.Parameter(head.weight.to(compute), requires_grad=False)  # embeddings tied to it stay as they are
    for joined in {m.joined for m in model.modules() if type(m) is LeanLinear}:
        whole, *apart = _cast([layer.weight for layer in joined.layers], compute)
        if not apart:
            for layer, part in zip(joined.layers, whole.split([len(layer.weight) for layer in joined.layers]), strict=True):
                layer.weight.data = part
    for left in model.parameters():
        if left.dtype != compute:
            left.data = left.data.clone()  # else it would hold the whole file that it was read from in memory


def _cast(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """[V_i, D] weights as products of `dtype` take them: as one where they lie so or need a cast, else themselves; in fp32 themselves,
    since a file may have left only some of two equal models' weights side by side.
    """
    if all(w.dtype == dtype for w in weights):
        return (_as_one(weights),) if dtype != torch.float32 and _follow(weights) else tuple(weights)
    sizes = [len(w) for w in weights]
    whole = weights[0].new_empty((sum(sizes), weights[0].shape[1]), dtype=dtype)
    for into, weight in zip(whole.split(sizes), weights, strict=True):
        into.copy_(weight)
    return (whole,)


def _follow(weights: Sequence[Tensor]) -> bool:
    """Whether they are parts of one matrix, in its order, as `freeze` leaves them."""
    one_memory = len({w.untyped_storage().data_ptr() for w in weights}) == 1 and all(w.is_contiguous() for w in weights)
    return one_memory and all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(weights))


def _as_one(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].as_strided((sum(map(len, weights)), weights[0].shape[1]), weights[0].stride())


def _times(rows: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """rows @ weight.T for each [V_i, D] weight, in the type of `rows`."""
    sizes = [len(w) for w in weights]
    if (kernels := _kernels(rows, weights)) is not None:
        whole: Tensor = kernels.times(rows, weights)
        return whole.split(sizes, 1)
    ready = _cast(weights, rows.dtype)
    made = tuple(rows @ w.T for w in ready)
    return made if len(made) == len(weights) else made[0].split(sizes, 1)


def _times_back(grads: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Gradient of the rows, from those of their products with `weights`, side by side."""
    if (kernels := _kernels(grads, weights)) is not None:
        found: Tensor = kernels.times_back(grads, weights)
        return found
    ready = _cast(weights, grads.dtype)
    d_rows: Tensor | None = None
    for grad, weight in zip(grads.split([len(w) for w in ready], 1), ready, strict=True):
        d_rows = grad @ weight if d_rows is None else d_rows.addmm_(grad, weight)
    assert d_rows is not None
    return d_rows


def _kernels(rows: Tensor, weights: Sequence[Tensor]) -> Any:
    """The kernels, where they multiply such rows with these weights."""
    kernels = find("linear") if rows.dtype == torch.bfloat16 else None
    return kernels if kernels is not None and kernels.takes(rows, weights) else None


def pulled(grads: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient [V, D] of a weight in its `dtype`: grads.T @ rows of [T, V] gradients of its products and the [T, D] rows it multiplied."""
    for kernels in (find("turned"), find("linear")):
        if kernels is not None and kernels.takes_pairs(grads, rows):
            found: Tensor = kernels.pulled(grads, rows)
            return found.to(dtype)
    return (grads.T @ rows).to(dtype)


def compute_type(x: Tensor) -> torch.dtype:
    """The type of a product of `x` by the rules of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class _Products(torch.autograd.Function):
    """x @ weight.T + bias for `count` weights [V_i, D] in `compute`, one product where they need a cast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: torch.dtype, count: int, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        rows = flat(x, compute)
        weights = [p for p in parameters[:count] if p is not None]
        out = tuple(
            (part if bias is None else part + bias.to(compute)).view(*x.shape[:-1], -1)
            for part, bias in zip(_times(rows, weights), parameters[count:], strict=True)
        )
        ctx.save_for_backward(rows if any(ctx.needs_input_grad[3 : 3 + count]) else None, *weights)
        ctx.like, ctx.compute = (x.shape, x.dtype), compute
        ctx.types = [None if p is None else p.dtype for p in parameters]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, *weights = ctx.saved_tensors
        parts = [flat(grad, ctx.compute) for grad in grads]
        need_x, _, _, *needed = ctx.needs_input_grad
        shape, dtype = ctx.like
        whole = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        d_x = _times_back(whole, weights).to(dtype).view(shape) if need_x else None
        found: list[Tensor | None] = [None] * len(needed)
        if all(needed[: len(parts)]):
            of_all = pulled(whole, rows, ctx.types[0]).split([grad.shape[1] for grad in parts])
            found[: len(parts)] = [one.to(kind) for one, kind in zip(of_all, ctx.types, strict=False)]
        for i, grad in enumerate(parts):
            if needed[i] and found[i] is None:
                found[i] = pulled(grad, rows, ctx.types[i])
            if needed[len(parts) + i]:
                found[len(parts) + i] = grad.sum(0, dtype=ctx.types[len(parts) + i])
        return d_x, None, None, *found


class Joined:
    """Linear layers whose products are made at once when the first of them is given its states; each of the others then finds its own.

    One that is given other states than the first makes another product of all, so that nothing depends on how a block is written.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = layers
        self.states: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Joined:
        memo[id(self)] = fresh = Joined([])  # also of weights prepared for a while: a copy reads its own
        fresh.layers = copy.deepcopy(self.layers, memo)
        return fresh

    def products(self, x: Tensor) -> Sequence[Tensor]:
        """[.., V_i] of each layer."""
        weights, biases = [layer.weight for layer in self.layers], [layer.bias for layer in self.layers]
        return _Products.apply(x, compute_type(x), len(weights), *weights, *biases)

    def of(self, at: int, x: Tensor) -> Tensor:
        """Layer `at` of `x`. The others' products are kept until they are asked for."""
        if x is not self.states or at not in self.waiting:
            self.states, self.waiting = x, dict(enumerate(self.products(x)))
        found = self.waiting.pop(at)
        if not self.waiting:
            self.states = None
        return found


class LeanLinear(nn.Linear):
    """A linear layer that shares its product with its siblings."""

    joined: Joined
    at: int

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] to [.., V]."""
        return self.joined.of(self.at, x)


class _Feed(torch.autograd.Function):
    """(act(x @ gate.T) * (x @ up.T)) @ down.T, gate and up [I, D], down [D, I]; the activation is computed again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: torch.dtype, act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, down: Tensor
    ) -> Tensor:
        rows = flat(x, compute)
        g, u = _times(rows, (gate, up))
        ctx.save_for_backward(rows, g, u, gate, up, down)
        ctx.act, ctx.like = act, (x.shape, x.dtype)
        return _times(_gated(act, g, u), (down,))[0].view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, g, u, gate, up, down = ctx.saved_tensors
        grad = flat(grad, rows.dtype)
        need_x, _, _, *needed = ctx.needs_input_grad
        inner, d_both = _gated_back(ctx.act, g, u, _times_back(grad, (down,)))
        of_both: Tensor | tuple[None, None] = pulled(d_both, rows, gate.dtype) if any(needed[:2]) else (None, None)
        d_gate, d_up = of_both.chunk(2) if isinstance(of_both, Tensor) else of_both
        d_down = pulled(grad, inner, down.dtype) if needed[2] else None
        shape, dtype = ctx.like
        d_x = _times_back(d_both, (gate, up)).to(dtype).view(shape) if need_x else None
        return d_x, None, None, d_gate if needed[0] else None, d_up if needed[1] else None, d_down


class _Gated(torch.autograd.Function):
    """act(gate) * up of [.., I] each, computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _gated(act, *(t.contiguous().flatten(0, -2) for t in (gate, up))).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        _, d_both = _gated_back(ctx.act, *(t.contiguous().flatten(0, -2) for t in (gate, up, grad)))
        d_gate, d_up = d_both.chunk(2, 1)
        return d_gate.reshape(gate.shape), d_up.reshape(up.shape), None


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, of [T, I] each."""
    kernels = gate_kernels(act, gate)
    made: Tensor = act(gate) * up if kernels is None else kernels.silu_gated(gate, up)
    return made


def _gated_back(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor, pull: Tensor) -> tuple[Tensor, Tensor]:
    """act(gate) * up again, and [T, 2 I]: the gradients of gate and of up side by side, from that of the product."""
    kernels = gate_kernels(act, gate)
    if kernels is not None:
        found: tuple[Tensor, Tensor] = kernels.silu_gated_back(gate, up, pull)
        return found
    with torch.enable_grad():
        gate, up = (t.detach().requires_grad_() for t in (gate, up))
        inner = act(gate) * up
    return inner.detach(), torch.cat(torch.autograd.grad(inner, (gate, up), pull), 1)


def gate_kernels(act: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """The kernels, where they can do this activation of `x`."""
    kernels = find("pointwise") if isinstance(act, SiLUActivation | nn.SiLU) else None
    return kernels if kernels is not None and kernels.takes(x) else None


class _LeanGated(nn.Module):
    """A gated feed-forward block by `_Feed`."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    only: Tensor | None = None
    """[M] the tokens whose results will be read, of all that it is given; None where all of them may be."""

    @staticmethod
    def looks_like(module: Any) -> bool:
        layers = plain_linears(module)
        unbiased = all(layer.bias is None for layer in layers.values())
        return set(layers) == {"gate_proj", "up_proj", "down_proj"} and unbiased and _act(module)

    @staticmethod
    def equals(module: Any) -> bool:
        return agree(module, lambda x: _LeanGated.fed(module, x), module.gate_proj.weight[0])

    def forward(self, x: Tensor) -> Tensor:
        """[.., D] to [.., D], zeros for tokens that nobody will read."""
        if self.only is not None:
            whole = x.flatten(0, -2)
            made = self.fed(whole.index_select(0, self.only))
            return made.new_zeros(whole.shape).index_copy(0, self.only, made).view(x.shape)
        return self.fed(x)

    def fed(self, x: Tensor) -> Tensor:
        """[.., D] to [.., D]."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        if any(type(layer) is not LeanLinear or type(layer.joined) is not Joined for layer in layers):  # an adapter, or prepared to sample
            return self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x), self.act_fn))
        return _Feed.apply(x, compute_type(x), self.act_fn, *(layer.weight for layer in layers))


def is_lean_gated(module: nn.Module) -> bool:
    """Whether it is down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    return isinstance(module, _LeanGated)


def _act(module: Any) -> bool:
    act = getattr(module, "act_fn", None)
    return callable(act) and not (isinstance(act, nn.Module) and any(True for _ in act.parameters()))


@contextlib.contextmanager
def only_read(decoder: Any, read: Tensor | None) -> Iterator[None]:
    """For one forward pass: of the last layer's results only those of tokens `read` [M] are wanted, so only they are fed forward.

    Not under gradient checkpointing, which runs the layer again when this has ended.
    """
    layers = getattr(decoder, "layers", None)
    last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else nn.Module()
    feeds: list[Any] = [part for part in last.children() if is_lean_gated(part)]
    if read is None or len(feeds) != 1 or getattr(last, "gradient_checkpointing", False):
        yield
        return
    feeds[0].only = read.unique()
    try:
        yield
    finally:
        feeds[0].only = None
