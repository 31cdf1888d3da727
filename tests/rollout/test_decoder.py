"""The decoder by hand gives the states of the model's own modules, or gives way to them."""

from __future__ import annotations

import pytest
import torch

from preftune.models import load
from preftune.models.attention import NAME, TreePlan
from preftune.models.lean import is_lean_gated
from preftune.models.policy import LanguageModel
from preftune.packing.batch import Layout
from preftune.rollout.decoder import Decoder
from preftune.rollout.weights import prepared
from tests import tiny

IDS, POSITIONS = torch.arange(20, 42), torch.cat([torch.arange(13), torch.arange(9)])
BY_HAND = {"llama", "mistral", "qwen2", "qwen3"}


def language_model(kind, compute=torch.float32, **changes):
    inner = tiny.model(kind, **changes)
    inner.set_attn_implementation(NAME)
    return LanguageModel(inner, compute=compute)


@torch.no_grad()
def both(model):
    """States by hand, or None where the decoder gives way, and by modules."""
    with prepared(model.hf, model.backbone.compute), model.backbone.precision():
        decoder = Decoder(model.backbone)
        plan = lambda: TreePlan(Layout(((13, ()), (9, ()))))
        theirs = decoder._by_modules(IDS, POSITIONS, plan())
        return (decoder(IDS, POSITIONS, plan()) if decoder.layers else None), theirs


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_states_are_those_of_the_modules(kind):
    ours, theirs = both(language_model(kind))
    assert (ours is not None) == (kind in BY_HAND)
    if ours is not None:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
@torch.no_grad()
def test_states_of_some_tokens_are_those_among_all(kind):
    model, wanted = language_model(kind), torch.tensor([12, 21, 3])
    with prepared(model.hf, torch.float32):
        decoder, plan = Decoder(model.backbone), lambda: TreePlan(Layout(((13, ()), (9, ()))))
        whole, some = decoder(IDS, POSITIONS, plan()), decoder(IDS, POSITIONS, plan(), wanted)
    torch.testing.assert_close(some, whole[wanted], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(BY_HAND))
def test_states_in_bf16(kind):
    ours, theirs = both(language_model(kind, torch.bfloat16))
    assert ours is not None and (ours - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_a_window_shorter_than_the_probe_is_kept():
    ours, theirs = both(language_model("mistral", sliding_window=4))
    wide, _ = both(language_model("mistral", sliding_window=64))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours, wide)


def test_layers_of_the_same_parts_that_do_something_else_are_left_to_themselves():
    """Granite has Llama's parts, and multiplies what a block adds."""
    model = language_model("llama")
    layer = model.hf.model.layers[0]
    plain = type(layer).forward
    layer.__class__ = type("Granite", (type(layer),), {"forward": lambda self, x, **options: x + 0.2 * (plain(self, x, **options) - x)})
    ours, _ = both(model)
    assert ours is None


def test_an_adapter_is_left_to_its_library():
    from preftune.models.lora import Adapter

    model = language_model("llama")
    Adapter(model.hf, rank=2, alpha=4, dropout=0.0, targets=("q_proj", "down_proj"))
    ours, _ = both(model)
    assert ours is None


@pytest.mark.model
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_real_small_model_is_lean_and_goes_by_hand(compute):
    """Its states hold a few numbers a thousand times the others; a comparison number by number took rounding there for another block."""
    model = LanguageModel(load.load_causal_lm(load.locate("smollm2")), compute=compute)
    assert all(is_lean_gated(layer.mlp) for layer in model.hf.model.layers)
    with prepared(model.hf, compute), model.backbone.precision():
        assert len(Decoder(model.backbone).layers) == 30
