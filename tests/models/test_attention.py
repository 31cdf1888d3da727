"""Packed rows of token trees give every supported architecture's own numbers: forward, gradients, whatever the layout."""

from __future__ import annotations

import pytest
import torch

from preftune.models import attention
from preftune.models.attention import NAME, TreePlan, tree_attention
from preftune.models.policy import LanguageModel, layout_gap, probe_trees, settle_layout
from preftune.packing.batch import collate
from tests import tiny

TREES = [tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2), tiny.tree(1, (3, 3, 10), seed=3)]

ALIKE = [tiny.tree(16, (5, 8), seed=1), tiny.tree(11, (7,), seed=2), tiny.tree(20, (3, 1, 10), seed=3)]
"""The same with prompts that begin with the same ten tokens, and a response of one token."""
for _tree in ALIKE:
    _tree.prompt[:10] = ALIKE[0].prompt[:10]
TREES_BY_NAME = {"different prompts": TREES, "prompts that begin alike": ALIKE}


def plain_logps(model, trees):
    """[M] from one unpadded plain forward a response: transformers alone."""
    out = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([[*tree.prompt, *response]])
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            logp = torch.log_softmax(logits, -1)
            at = torch.arange(len(tree.prompt) - 1, ids.shape[1] - 1)
            out.append(logp[at, torch.tensor(response)])
    return torch.cat(out)


def tree_model(kind, **changes):
    inner = tiny.model(kind, **changes)
    inner.set_attn_implementation(NAME)
    return LanguageModel(inner)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_what_prompts_begin_with_is_in_the_row_once():
    assert collate(TREES).layout.shared == 0 and collate(ALIKE).layout.shared == 10
    assert collate(ALIKE).tokens == sum(t.tokens for t in ALIKE) - 20
    assert collate(probe_trees(1000)).layout.shared == 10, "a model proves itself on such a row before it is read so"


@pytest.mark.parametrize("trees", TREES_BY_NAME)
@pytest.mark.parametrize("dense_tokens", [768, 12, 0], ids=["dense", "some of each", "branches"])
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_regression_22_packed_equals_plain_forward_and_gradient(kind, dense_tokens, trees, monkeypatch):
    trees = TREES_BY_NAME[trees]
    monkeypatch.setattr(attention, "DENSE_TOKENS", dense_tokens)
    packed, plain = tree_model(kind), tiny.model(kind)
    plain.set_attn_implementation("eager")
    assert packed.backbone.packed
    weight = torch.linspace(-1, 1, sum(t.response_tokens for t in trees))
    ours, theirs = packed(collate(trees)), plain_logps(plain, trees)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    expected = gradients(plain)
    got = gradients(packed.hf)
    assert got.keys() == expected.keys() and len(got) > 10
    for name, grad in expected.items():
        torch.testing.assert_close(
            got[name], grad, atol=1e-5 * max(1.0, grad.abs().max().item()), rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("trees", TREES_BY_NAME)
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_regression_23_padded_rows_equal_packed(kind, trees):
    model, batch = tree_model(kind), collate(TREES_BY_NAME[trees])
    packed, states = model(batch), model.backbone(batch)
    model.backbone.use_packed(False)
    torch.testing.assert_close(model(batch), packed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.backbone(batch), states, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("trees", TREES_BY_NAME)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_flex_attention_gives_the_same_numbers(window, softcap, trees):
    """The GPU path, run without its compiler."""
    batch = collate(TREES_BY_NAME[trees])
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, batch.tokens, 16) for heads in (4, 2, 2))
    plan = TreePlan(batch.layout)
    ours, _ = tree_attention(torch.nn.Identity(), q, k, v, None, sliding_window=window, softcap=softcap, tree=plan)
    flex = attention._flex_attention(q[0], k[0], v[0], plan, window, 0.25, softcap)
    torch.testing.assert_close(flex.transpose(0, 1)[None], ours, atol=1e-5, rtol=1e-5)


def test_attention_sinks_take_their_share():
    """With one key a sink of logit 0 halves the output of a query whose score is 0."""
    q = torch.zeros(1, 2, 1, 4)
    k, v = torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4)
    plan = TreePlan(collate([tiny.tree(1, (1,))]).layout)
    q2, k2, v2 = (t.expand(1, 2, 2, 4) for t in (q, k, v))
    out, _ = tree_attention(torch.nn.Identity(), q2, k2, v2, None, s_aux=torch.zeros(2), tree=plan)
    torch.testing.assert_close(out[0, 0], torch.full((2, 4), 0.5))
    torch.testing.assert_close(out[0, 1], torch.full((2, 4), 2 / 3))


def test_what_cannot_be_honoured_is_refused():
    q = torch.zeros(1, 2, 2, 4)
    plan = TreePlan(collate([tiny.tree(1, (1,))]).layout)
    with pytest.raises(ValueError, match="position_bias"):
        tree_attention(torch.nn.Identity(), q, q, q, None, position_bias=torch.zeros(1), tree=plan)
    with pytest.raises(ValueError, match="without its plan"):
        tree_attention(torch.nn.Identity(), q, q, q, None)


def test_a_model_without_the_interface_falls_back_with_one_notice():
    bloom = tiny.model("bloom", n_layer=2, n_head=4)
    model = LanguageModel(bloom)
    notice = settle_layout(model)
    assert not model.backbone.packed and "padded rows" in notice
    torch.testing.assert_close(model(collate(TREES)), plain_logps(bloom, TREES), atol=1e-5, rtol=1e-5)


def test_a_layout_that_gives_other_numbers_is_not_used(monkeypatch):
    model = tree_model("llama")
    assert settle_layout(model) is None and model.backbone.packed
    monkeypatch.setattr(attention, "_visible", lambda q, qb, k, kb, w: torch.ones(len(q), len(k), dtype=torch.bool))
    assert layout_gap(model, probe_trees(300)) > 1e-3
    assert "differ" in settle_layout(model) and not model.backbone.packed


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_changes_no_number(kind):
    plain, saving = tree_model(kind), tree_model(kind)
    saving.hf.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    for model in (plain, saving):
        model.train()
        model(collate(TREES)).sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")
