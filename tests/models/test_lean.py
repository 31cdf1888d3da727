"""Lean layers give the numbers and gradients of the layers whose place they take, and keep less."""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from preftune.models import lean, load
from preftune.models.attention import NAME, _additive, _dense, _DenseTrees
from preftune.models.lean import LeanLinear, _Feed, _Gated, _LeanGated, _Products, freeze, make_lean
from preftune.models.lora import Adapter
from preftune.models.norms import LeanNorm, RootMeanSquare
from preftune.models.policy import LanguageModel
from preftune.packing.batch import collate
from preftune.rollout.weights import prepared
from tests import tiny

DOUBLE = {"dtype": torch.float64, "requires_grad": True}
TREES = [tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2)]


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).requires_grad_()


def test_gradients_are_those_of_finite_differences():
    x = draw(2, 3, 6)
    assert torch.autograd.gradcheck(lambda *a: RootMeanSquare.apply(*a, 1e-5), (x, draw(6)))
    wide = (draw(8, 6), draw(4, 6), draw(4, 6), draw(8), None, draw(4))
    assert torch.autograd.gradcheck(lambda x, *p: _Products.apply(x, torch.float64, 3, *p), (x, *wide))
    assert torch.autograd.gradcheck(lambda *a: _Feed.apply(a[0], torch.float64, nn.SiLU(), *a[1:]), (x, draw(5, 6), draw(5, 6), draw(6, 5)))
    assert torch.autograd.gradcheck(lambda g, u: _Gated.apply(g.mT, u, nn.SiLU()), (draw(2, 6, 3), draw(2, 3, 6)))


def test_attention_of_whole_trees_equals_plain_products_and_finite_differences():
    lengths = [3, 4]
    masks = [_additive(torch.ones(n, n, dtype=torch.bool).tril(), torch.float64) for n in lengths]
    q, k, v = draw(4, 7, 2), draw(2, 7, 2), draw(2, 7, 3)
    parts = zip(*(t.split(lengths, 1) for t in (q, k, v)), masks, strict=True)
    plain = torch.cat([_dense(*part, 1.0, None, None) for part in parts], 1)
    torch.testing.assert_close(_DenseTrees.apply(q, k, v, lengths, masks), plain, atol=1e-6, rtol=1e-6)  # the plain softmax is in fp32
    assert torch.autograd.gradcheck(lambda *a: _DenseTrees.apply(*a, lengths, masks), (q, k, v))


def lean_parts(model):
    kinds = (LeanNorm, _LeanGated, LeanLinear)
    return {kind: sum(isinstance(m, kind) for m in model.modules()) for kind in kinds}


def test_what_is_made_lean():
    llama = tiny.model("llama")
    layers = llama.config.num_hidden_layers
    before = {name: id(p) for name, p in llama.named_parameters()}
    make_lean(llama)
    assert lean_parts(llama) == {LeanNorm: 2 * layers + 1, _LeanGated: layers, LeanLinear: 7 * layers}
    assert type(llama.lm_head) is nn.Linear
    assert {name: id(p) for name, p in llama.named_parameters()} == before
    make_lean(llama)
    assert lean_parts(llama) == {LeanNorm: 2 * layers + 1, _LeanGated: layers, LeanLinear: 7 * layers}


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text"])
def test_a_norm_of_another_form_is_left_alone(kind):
    """Gemma multiplies by 1 + weight."""
    model = tiny.model(kind)
    make_lean(model)
    assert lean_parts(model)[LeanNorm] == 0


def test_a_block_of_another_form_is_left_alone():
    model = tiny.model("llama")
    block = model.model.layers[0].mlp
    plain = type(block)

    class Doubled(plain):
        def forward(self, x):
            return 2 * super().forward(x)

    block.__class__ = Doubled
    make_lean(model)
    assert not isinstance(block, _LeanGated) and isinstance(model.model.layers[1].mlp, _LeanGated)


def step(model, compute=torch.bfloat16):
    batch = collate(TREES)
    logp = LanguageModel(model, compute=compute)(batch)
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return logp.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def far(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "phi3", "opt"])
def test_bf16_is_as_near_to_fp32_as_without(kind, monkeypatch):
    lean_logp, lean_grads = step(tiny.model(kind))
    with monkeypatch.context() as patch:
        patch.setattr("preftune.models.policy.make_lean", lambda model: None)
        plain_logp, plain_grads = step(tiny.model(kind))
        logp, grads = step(tiny.model(kind), torch.float32)
    assert far(lean_logp, logp) <= 1.5 * far(plain_logp, logp) + 1e-4
    assert lean_grads.keys() == plain_grads.keys()
    off = [(far(lean_grads[n], g), far(plain_grads[n], g)) for n, g in grads.items() if g.norm() > 0]
    assert sum(a for a, _ in off) <= 1.2 * sum(b for _, b in off)


def kept(model):
    """Bytes that autograd keeps for the backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        alive = LanguageModel(model, compute=torch.bfloat16)(collate(TREES))
    assert alive.requires_grad
    return sum(storage.nbytes() for storage in found.values())


def test_less_than_half_is_kept(monkeypatch):
    less = kept(tiny.model("llama"))
    monkeypatch.setattr("preftune.models.policy.make_lean", lambda model: None)
    assert less < 0.5 * kept(tiny.model("llama"))


def test_a_frozen_layer_keeps_no_states():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _Products.apply(x, torch.float32, 1, weight, None)
    assert [t.shape for t in saved] == [weight.shape]


def test_a_copy_reads_its_own_weights():
    model = LanguageModel(tiny.model("llama"))
    batch = collate(TREES)
    before = model(batch)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(twin(batch), before, atol=0, rtol=0)
    assert not torch.allclose(model(batch), before)
    with torch.no_grad(), prepared(model.hf, torch.bfloat16):
        twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(batch), model(batch), atol=0, rtol=0)


def test_one_product_serves_the_layers_that_read_the_same_states(monkeypatch):
    calls = []
    times = lean._times
    monkeypatch.setattr(lean, "_times", lambda rows, weights: calls.append(len(weights)) or times(rows, weights))
    model = LanguageModel(tiny.model("llama"), compute=torch.bfloat16)
    calls.clear()
    model(collate(TREES))
    assert calls == [3, 1, 2, 1] * model.hf.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3", "gpt_neox", "gpt2"])
def test_frozen_weights_give_the_same_bits_and_lie_in_half_the_memory(kind, tmp_path):
    folder = tiny.save(tmp_path / kind, kind)
    model, frozen = (LanguageModel(load.load_causal_lm(load.locate(str(folder))), compute=torch.bfloat16) for _ in range(2))
    freeze(frozen.hf, torch.bfloat16)
    batch = collate(TREES)
    with torch.no_grad():
        assert torch.equal(frozen(batch), model.eval()(batch))
    assert not any(p.requires_grad for p in frozen.parameters())
    types = {name: p.dtype for name, p in frozen.hf.named_parameters()}
    linear = {f"{name}.weight" for name, m in frozen.hf.named_modules() if isinstance(m, nn.Linear)}
    assert all(types[name] == torch.bfloat16 for name in linear & types.keys())
    assert all(kind == torch.float32 for name, kind in types.items() if "embed" in name or "norm" in name)


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped into memory is read from /proc")
def test_frozen_weights_let_the_file_go_that_they_were_read_from(tmp_path):
    folder = tiny.save(tmp_path / "model")
    mapped = lambda: str(folder) in Path("/proc/self/maps").read_text()
    model = LanguageModel(load.load_causal_lm(load.locate(str(folder))), compute=torch.bfloat16)
    assert mapped()
    freeze(model.hf, torch.bfloat16)
    gc.collect()
    assert not mapped()


def test_frozen_in_fp32_nothing_changes():
    model = tiny.model("llama")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    make_lean(model)
    freeze(model, torch.float32)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before and not any(p.requires_grad for p in model.parameters())


def test_layers_given_other_states_than_their_siblings():
    block = nn.ModuleDict({"q_proj": nn.Linear(4, 3), "k_proj": nn.Linear(4, 2), "v_proj": nn.Linear(4, 2)})
    plain = copy.deepcopy(block)
    make_lean(block)
    assert all(type(layer) is LeanLinear for layer in block.values())
    x, y = torch.randn(5, 4), torch.randn(5, 4)
    for name, states in (("q_proj", x), ("k_proj", y), ("v_proj", x), ("k_proj", x), ("q_proj", y), ("q_proj", y)):
        torch.testing.assert_close(block[name](states), plain[name](states))


def test_with_an_adapter_and_prepared_for_sampling(monkeypatch):
    """Other libraries and the sampler put themselves in a layer's place: the block around it gives way."""
    batch = collate(TREES)
    plain = tiny.model("llama")
    adapted = LanguageModel(tiny.model("llama"))
    adapter = Adapter(adapted.hf, rank=2, alpha=4, dropout=0.0, targets="all-linear")
    with torch.no_grad():
        for name, parameter in adapted.hf.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved = adapted(batch)
    with adapter.off():
        torch.testing.assert_close(adapted(batch), LanguageModel(plain)(batch), atol=1e-6, rtol=1e-6)
    assert not torch.allclose(moved, LanguageModel(plain)(batch))
    model = LanguageModel(tiny.model("llama"), compute=torch.bfloat16)
    used = []
    monkeypatch.setattr(lean, "_times", lambda *a: used.append(a))
    with torch.no_grad(), prepared(model.hf, torch.bfloat16):
        model(batch)
    assert not used


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_what_nobody_reads_is_not_fed_forward_in_the_last_layer(kind, monkeypatch):
    """States and gradients are those of all tokens, where they are read."""
    batch = collate([tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2)])
    model = tiny.model(kind)
    model.set_attn_implementation(NAME)
    backbone, read = LanguageModel(model).backbone, batch.predict
    fed = []
    once = _LeanGated.fed
    monkeypatch.setattr(_LeanGated, "fed", lambda self, x: fed.append(x.flatten(0, -2).shape[0]) or once(self, x))

    def seen(*told):
        fed.clear()
        model.zero_grad()
        states = backbone(batch, *told).index_select(0, read)
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        return states, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, list(fed)

    (states, slopes, all_of_them), (ours, mine, counted) = seen(), seen(read)
    assert all_of_them == [batch.tokens] * 2 and counted == [batch.tokens, len(read.unique())]
    torch.testing.assert_close(ours, states)
    for name, grad in slopes.items():
        torch.testing.assert_close(mine[name], grad, msg=name)
    assert backbone(batch, read)[0].shape == states[0].shape and model.base_model.layers[-1].mlp.only is None


def test_under_checkpointing_all_tokens_are_fed():
    """The layer runs again in backward, perhaps when another batch has been read."""
    model = tiny.model("llama")
    model.set_attn_implementation(NAME)
    model.gradient_checkpointing_enable()
    learner = LanguageModel(model).train()
    one, other = collate([tiny.tree(9, (5, 8), seed=1)]), collate([tiny.tree(4, (7,), seed=2)])
    loss = learner(one).sum() + learner(other).sum()
    loss.backward()
    mine = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.gradient_checkpointing_disable()
    model.zero_grad()
    (learner(one).sum() + learner(other).sum()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(mine[name], p.grad, msg=name)
