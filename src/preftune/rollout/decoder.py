"""A decoder's forward pass in as few calls as it takes, for layers of the plain kind (Llama, Mistral, Qwen2, Qwen3 and their like).

A step of few rows is thousands of small operations, and a fifth of its time goes to the modules around them. Whether a model is of the
plain kind is not read from its name: its own forward pass must give the same states, else it is used itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from preftune.kernels import find
from preftune.models.attention import Plan, TreePlan
from preftune.models.lean import LeanLinear, compute_type, gate_kernels, is_lean_gated
from preftune.models.norms import is_lean_norm
from preftune.models.policy import TOLERANCE, Backbone
from preftune.packing.batch import Layout
from preftune.rollout.blocks import Blocks
from preftune.rollout.cache import Decode
from preftune.rollout.weights import InPanels, Together

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROBE = 6
"""Tokens on which the two ways are compared."""


class _Listener(TreePlan):
    """The attention of one prompt, and what each layer asks of it."""

    def __init__(self, tokens: int) -> None:
        super().__init__(Layout(((tokens, ()),)))
        self.asked: list[dict[str, Any]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        self.asked.append(options)
        return super().attend(q, k, v, **options)


@dataclass(frozen=True)
class _Layer:
    """The parts of one layer, and how its attention is scaled and masked."""

    before: Any
    attention: Any
    between: Any
    feed: Any
    options: dict[str, Any]
    out: Callable[[Tensor], Tensor]
    gate_and_up: Callable[[Tensor], Sequence[Tensor]]
    down: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, layer: Any, options: dict[str, Any]) -> _Layer:
        """The parts of a module of the plain kind; products of prepared weights without the modules around them."""
        attention, feed = layer.self_attn, layer.mlp
        both = feed.gate_proj.joined
        pair = both.products if isinstance(both, Together) and len(both.sizes) == 2 else lambda x: (feed.gate_proj(x), feed.up_proj(x))
        norms = layer.input_layernorm, layer.post_attention_layernorm
        return cls(norms[0], attention, norms[1], feed, options, _product(attention.o_proj), pair, _product(feed.down_proj))


class Decoder:
    """Hidden states of a packed row: by hand where that gives the model's own, else by its own modules."""

    def __init__(self, backbone: Backbone, blocks: Blocks | None = None) -> None:
        """To be made, and used, where weights are prepared and the backbone's precision is on."""
        self.step: Any = None
        self.inner = backbone.hf.base_model
        self.layers: list[_Layer] = []
        if not _looks_plain(self.inner):
            return
        ids = torch.arange(PROBE, device=backbone.device) * (self.inner.embed_tokens.num_embeddings // PROBE)
        listener = _Listener(PROBE)
        theirs = self._by_modules(ids, torch.arange(PROBE, device=ids.device), listener)
        self.layers = [_Layer.of(layer, options) for layer, options in zip(self.inner.layers, listener.asked, strict=True)]
        ours = self._by_hand(ids, torch.arange(PROBE, device=ids.device), TreePlan(listener.layout))
        if not float((ours - theirs).norm() / theirs.norm()) < TOLERANCE[backbone.compute]:
            self.layers = []
        elif blocks is not None:
            self.step = _in_one_call(self.layers, self.inner.norm, blocks, backbone.compute)

    def __call__(self, ids: Tensor, positions: Tensor, plan: Plan, wanted: Tensor | None = None) -> Tensor:
        """[T, D] states, after the final norm, of [T] ids at [T] positions, or of those of them that are `wanted`."""
        if self.layers:
            return self._by_hand(ids, positions, plan, wanted)
        states = self._by_modules(ids, positions, plan)
        return states if wanted is None else states[wanted]

    def _by_modules(self, ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        return self.inner(input_ids=ids[None], position_ids=positions[None], use_cache=False, tree=plan).last_hidden_state[0]

    def _by_hand(self, ids: Tensor, positions: Tensor, plan: Plan, wanted: Tensor | None = None) -> Tensor:
        states = self.inner.embed_tokens(ids)
        cos, sin = (part[0] for part in self.inner.rotary_emb(states[None], positions[None]))
        kernels = find("pointwise")
        if kernels is not None and not all(map(kernels.takes, (states, cos, sin))):
            kernels = None
        compute = compute_type(states)
        whole = states.dtype == torch.float32 and kernels is not None and states.is_contiguous()
        if isinstance(plan, Decode) and self.step is not None and whole and _turns(cos, self.step.width):
            return self.step(states, torch.stack((cos, sin), 1), *plan.told_of_all(self.step.heads, self.step.kv, self.step.width))
        added = None
        for layer in self.layers:
            x = _norm(kernels, layer.before, states, added, compute)
            q, k, v = _turned(kernels, layer.attention, x, cos, sin)
            seen = plan.attend(q, k, v, **layer.options).transpose(0, 1)
            if wanted is not None and layer is self.layers[-1]:  # nobody reads what the others would become
                states, seen = states[wanted], seen[wanted]
            added = layer.out(seen.reshape(len(states), -1))
            added = _fed(layer, _norm(kernels, layer.between, states, added, compute))
        return _norm(None, self.inner.norm, states, added, compute)


def _turns(cos: Tensor, width: int) -> bool:
    """Whether kernels turn heads of this width by these angles."""
    return cos.dtype == torch.float32 and cos.shape[-1] == width


def _looks_plain(inner: Any) -> bool:
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    return all(hasattr(inner, part) for part in parts) and is_lean_norm(inner.norm) and all(map(_plain_layer, inner.layers))


def _plain_layer(layer: Any) -> bool:
    if {name for name, _ in layer.named_children()} != PARTS or not is_lean_gated(layer.mlp):
        return False
    linear = dict(layer.self_attn.named_children())
    norms = [linear.pop(name) for name in ("q_norm", "k_norm") if name in linear]
    return (
        len(norms) in (0, 2)
        and is_lean_norm(layer.input_layernorm)
        and is_lean_norm(layer.post_attention_layernorm)
        and set(linear) == {"q_proj", "k_proj", "v_proj", "o_proj"}
        and all(type(one) is LeanLinear for one in (*linear.values(), layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj))
    )


def _norm(kernels: Any, norm: Any, states: Tensor, added: Tensor | None, compute: torch.dtype) -> Tensor:
    """RMSNorm of [T, D] states, to which [T, D] are added in place first; kernels give it in the type of the next product, `compute`."""
    if kernels is not None and states.dtype == norm.weight.dtype == torch.float32 and (added is None or added.dtype == compute):
        out: Tensor = kernels.add_norm(states, added, norm.weight, norm.eps_, compute)
        return out
    if added is not None:
        states += added
    return (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + norm.eps_)).mul_(norm.weight)


def _fed(layer: _Layer, x: Tensor) -> Tensor:
    """What the feed-forward block adds, [T, D] of [T, D]."""
    act = layer.feed.act_fn
    gate, up = layer.gate_and_up(x)
    kernels = gate_kernels(act, gate)
    return layer.down(act(gate).mul_(up) if kernels is None else kernels.silu_gated(gate, up))


def _product(layer: Any) -> Callable[[Tensor], Tensor]:
    joined = layer.joined
    return joined.whole if isinstance(joined, Together) and len(joined.sizes) == 1 else layer


def _in_one_call(layers: Sequence[_Layer], last: Any, blocks: Blocks, compute: torch.dtype) -> Any:
    """The layers of a step as one kernel; None where they have what it does not know."""
    kernels = find("layers")
    if kernels is None:
        return None
    made, shapes = [], set()
    for layer in layers:
        attention, feed, options = layer.attention, layer.feed, layer.options
        products = [one.joined for one in (attention.q_proj, attention.o_proj, feed.gate_proj, feed.down_proj)]
        if not all(isinstance(one, Together) and isinstance(one.times, InPanels) for one in products):
            return None
        sizes, width = [one.sizes for one in products], attention.head_dim
        like = torch.empty((0, width), dtype=compute)
        known = isinstance(feed.act_fn, SiLUActivation | nn.SiLU) and not hasattr(attention, "q_norm")
        norms = [(one.weight, one.eps_) for one in (layer.before, layer.between, last)]
        if not known or [len(one) for one in sizes] != [3, 1, 2, 1] or not blocks.holds(like, options["softcap"], options["sinks"]):
            return None
        if any(weight.dtype != torch.float32 or not weight.is_contiguous() for weight, _ in norms):
            return None
        inward, outward, wide, narrow = (kernels.Weights(one.times.panels, one.times.bias) for one in products)
        made.append(kernels.Layer(norms[0], inward, outward, norms[1], wide, narrow, options["window"], options["scaling"]))
        shapes.add((sizes[0][0] // width, sizes[0][1] // width, width, sizes[2][0]))
    return kernels.Layers(made, norms[2], *shapes.pop()[:3], compute) if len(shapes) == 1 else None


def _turned(kernels: Any, attention: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[H, T, d] queries and [Hkv, T, d] keys and values of [T, D] states, queries and keys turned by rotary embeddings [T, d] in fp32."""
    joined, width = attention.q_proj.joined, attention.head_dim
    if isinstance(joined, Together):
        heads, (both, v) = joined.sizes[0] // width, joined.apart(x, joined.sizes[0] + joined.sizes[1])
    else:
        q, k, v = joined.products(x)
        heads, both = q.shape[-1] // width, torch.cat([q, k], -1)
    if hasattr(attention, "q_norm"):
        apart = both.view(len(x), -1, width)
        both = torch.cat([attention.q_norm(apart[:, :heads]), attention.k_norm(apart[:, heads:])], 1).flatten(1)
    v = v.view(len(x), -1, width).transpose(0, 1)
    kv = len(v)
    if kernels is not None and kernels.takes(both) and cos.shape[-1] == width:
        q, k = kernels.turn(both, heads, kv, cos, sin)
        return q.transpose(0, 1), k.transpose(0, 1), v
    apart = both.view(len(x), -1, width).to(cos.dtype)
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), width // 2
    turned = apart * cos
    turned[..., :half].addcmul_(apart[..., half:], -sin[..., :half])
    turned[..., half:].addcmul_(apart[..., :half], sin[..., half:])
    q, k = turned.transpose(0, 1).split([heads, kv])
    return q, k, v
