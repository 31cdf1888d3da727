"""Rotary embeddings by kernels inside an architecture's own attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from preftune import kernels
from preftune.models import rotary
from preftune.models.attention import NAME
from preftune.models.lean import make_lean
from preftune.models.policy import LanguageModel
from preftune.models.rotary import by_kernels, turned_by_kernels
from preftune.packing.batch import collate
from tests import tiny

TREES = [tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2)]


def attentions(model):
    return [m for name, m in model.named_modules() if name.endswith("self_attn")]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_the_usual_form_is_turned_by_kernels_in_the_architecture_s_own_code(kind):
    model = tiny.model(kind)
    before = [type(one) for one in attentions(model)]
    make_lean(model)
    make_lean(model)  # a second time changes nothing
    for kept, one in zip(before, attentions(model), strict=True):
        assert type(one).__mro__[1] is kept and type(one).__name__ == kept.__name__
        assert type(one).forward.__code__ is kept.forward.__code__
        assert type(one).forward.__globals__[rotary.NAME].__wrapped__ is kept.forward.__globals__[rotary.NAME]
    assert type(copy.deepcopy(model.base_model.layers[0].self_attn)) is type(attentions(model)[0])


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_attention_that_turns_nothing_is_left_as_it_is(kind):
    model = tiny.model(kind)
    before = {name: type(m) for name, m in model.named_modules() if name.endswith(("attn", "attention"))}
    make_lean(model)
    assert before and {name: type(model.get_submodule(name)) for name in before} == before


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    """As Cohere turns: neighbours against each other."""
    half = lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return tuple(x * cos.unsqueeze(unsqueeze_dim) + half(x) * sin.unsqueeze(unsqueeze_dim) for x in (q, k))


def test_neighbours_turned_against_each_other_are_another_form(monkeypatch):
    kind = type(attentions(tiny.model("llama"))[0])
    assert turned_by_kernels(kind) is not None
    monkeypatch.setitem(kind.forward.__globals__, rotary.NAME, interleaved)
    assert turned_by_kernels(kind) is None
    assert turned_by_kernels(nn.Linear) is None


@pytest.mark.skipif(kernels.find("pointwise") is None, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_theirs(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as theirs

    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 7, heads, 16, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for heads in (4, 2))
    angles = torch.randn(1, 7, 8, generator=generator).repeat(1, 1, 2)
    cos, sin, pull = angles.cos(), angles.sin(), [torch.randn(x.shape, generator=generator) for x in (q, k)]
    found, wanted = by_kernels(theirs)(q, k, cos, sin), theirs(q, k, cos, sin)
    assert [one.dtype for one in found] == [dtype] * 2
    near = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(found, tuple(one.to(dtype) for one in wanted), **near)
    ours = torch.autograd.grad(found, (q, k), [p.to(dtype) for p in pull])
    torch.testing.assert_close(ours, torch.autograd.grad(wanted, (q, k), pull), **near)


def test_what_kernels_do_not_take_goes_its_own_way(monkeypatch):
    """Several rows, other types, heads wider than the angles, a model's own options: all by the function that was there."""
    asked = []
    mine = by_kernels(lambda *given, **options: asked.append(given) or given[:2])
    q, k, cos = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 5, 8)
    several = [torch.cat([x, x]) for x in (q, k, cos)]
    for one, other, angles, options in (
        (several[0], several[1], several[2], {}),
        (q.double(), k.double(), cos.double(), {}),
        (q, k, cos[..., :4], {}),
        (q, k, cos.requires_grad_(), {}),
        (q, k, cos.detach(), {"unsqueeze_dim": 1}),
    ):
        before = len(asked)
        assert mine(one, other, angles, angles, **options)[0] is one and len(asked) == before + 1
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert mine(q, k, cos.detach(), cos.detach())[0] is q


@pytest.mark.skipif(kernels.find("pointwise") is None, reason="no compiled kernels on this machine")
def test_a_packed_row_is_turned_by_them(monkeypatch):
    used = []
    whole = rotary._Turned.apply
    monkeypatch.setattr(rotary._Turned, "apply", lambda *given: used.append(given[0].shape) or whole(*given))
    inner = tiny.model("llama")
    inner.set_attn_implementation(NAME)
    model = LanguageModel(inner, compute=torch.bfloat16)
    model(collate(TREES)).sum().backward()
    assert len(used) == 2 * model.hf.config.num_hidden_layers
    used.clear()
    model.backbone.use_packed(False)
    model(collate(TREES))
    assert not used  # padded rows are several
