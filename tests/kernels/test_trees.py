"""Attention of trees by the kernels, forward and backward, against plain products in float64."""

from __future__ import annotations

import pytest
import torch

from preftune import kernels
from preftune.models.attention import TreePlan, _dense
from preftune.packing.batch import Layout

found = kernels.find("trees")
pytestmark = pytest.mark.skipif(found is None, reason="no compiled kernels on this machine (numba)")
pairs = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(found is None or not found.multiplies_pairs(), reason="no AVX512-BF16"))
BOTH = pytest.mark.parametrize("dtype", [torch.float32, pairs])
NEAR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
"""Half of a step of bf16."""

ROWS = {
    "two responses": [(9, (5, 8)), (4, (7,))],
    "one token each, a prompt alone": [(1, (1, 1)), (30, ()), (2, (1,))],
    "no prompt": [(0, (3, 50)), (5, (2,))],
    "blocks and pairs that end anywhere": [(64, (48, 65)), (131, (97, 1, 47, 49)), (96, (96,))],
}
COMMON = {
    "two trees": (8, [(9, (5, 8)), (20, (7,))]),
    "blocks that begin behind what is shared": (50, [(64, (48, 65)), (131, (97, 1, 47, 49)), (51, (96,)), (200, ())]),
    "longer than a block": (98, [(99, (3,)), (150, (1, 30))]),
}
"""Tokens that all prompts begin with, and the trees."""
SHAPES = [(4, 2, 16), (6, 2, 64), (3, 3, 80), (8, 1, 128)]


def made(heads, tokens, width, seed, dtype):
    """[heads, tokens, width] as a model makes them: heads of a token side by side."""
    drawn = torch.randn(tokens, heads, width, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).transpose(0, 1)


def given(trees, heads, kv, width, dtype):
    tokens = sum(p + sum(r) for p, r in trees)
    q, k, v, grad = (made(h, tokens, width, seed, dtype) for seed, h in enumerate((heads, kv, kv, heads)))
    return q, k, v, grad


def exact(trees, q, k, v, grad, window):
    """Result and gradients by plain products in float64, tree by tree."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    plan = TreePlan(Layout(tuple(trees)))
    lengths = plan.layout.lengths
    parts = enumerate(zip(*(x.split(lengths, 1) for x in leaves), strict=True))
    scaling = q.shape[-1] ** -0.5
    out = torch.cat([_dense(*part, plan.dense_mask(i, window, part[0]), scaling, None, None) for i, part in parts], 1)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.double())


def ours(trees, q, k, v, grad, window, common=0):
    how = trees, common, window, q.shape[-1] ** -0.5
    out, stats = found.forward(q, k, v, *how)
    return out, *found.backward(q, k, v, grad, stats, *how)


def far(one, other):
    return float((one.double() - other).norm() / other.norm().clamp_min(1e-3))


@pytest.mark.parametrize("parts", ["few", "many"])
@pytest.mark.parametrize("window", [None, 2, 7, 50, 100])
@pytest.mark.parametrize(("heads", "kv", "width"), SHAPES)
@pytest.mark.parametrize("row", ROWS)
@BOTH
def test_it_is_attention_and_its_gradients(dtype, row, heads, kv, width, window, parts, monkeypatch):
    monkeypatch.setattr(found, "_PARTS", 0 if parts == "few" else 2**20)
    trees, states = ROWS[row], given(ROWS[row], heads, kv, width, dtype)
    for mine, true in zip(ours(trees, *states, window), exact(trees, *states, window), strict=True):
        assert mine.dtype == dtype and mine.shape == true.shape
        assert far(mine, true) < NEAR[dtype]


@pytest.mark.parametrize("parts", ["few", "many"])
@pytest.mark.parametrize("window", [None, 7, 50, 100])
@pytest.mark.parametrize(("heads", "kv", "width"), SHAPES)
@pytest.mark.parametrize("row", COMMON)
@BOTH
def test_what_all_prompts_begin_with_lies_once(dtype, row, heads, kv, width, window, parts, monkeypatch):
    """As if it stood before each tree; the gradients there are the sums of all trees'."""
    monkeypatch.setattr(found, "_PARTS", 0 if parts == "few" else 2**20)
    common, trees = COMMON[row]
    layout = Layout(tuple(trees), common)
    tokens = common + sum(layout.own)
    q, k, v, grad = (made(h, tokens, width, seed, dtype) for seed, h in enumerate((heads, kv, kv, heads)))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    plan, scaling = TreePlan(layout.apart), width**-0.5
    parts = enumerate(zip(*(layout.spread(x, 1).split(layout.lengths, 1) for x in leaves), strict=True))
    apart = torch.cat([_dense(*part, plan.dense_mask(i, window, part[0]), scaling, None, None) for i, part in parts], 1)
    true = layout.gathered(apart, 1)
    expected = true.detach(), *torch.autograd.grad(true, leaves, grad.double())
    for mine, other in zip(ours(trees, q, k, v, grad, window, common), expected, strict=True):
        assert mine.shape == other.shape and far(mine, other) < NEAR[dtype]


@BOTH
def test_no_branch_sees_another_nor_what_lies_behind(dtype):
    trees = ROWS["blocks and pairs that end anywhere"]
    q, k, v, grad = given(trees, 6, 2, 64, dtype)
    before, *slopes = ours(trees, q, k, v, grad, None)
    start = 177 + 131 + 97 + 1  # the third response of the second tree
    changed = torch.zeros(q.shape[1], dtype=torch.bool)
    changed[start + 20 : start + 47] = True
    for x in (k, v):
        x[:, changed] = 100.0
    after, d_q, d_k, d_v = ours(trees, q, k, v, grad, None)
    assert torch.equal(after[:, ~changed], before[:, ~changed]) and (after != before)[:, changed].any(-1).all()
    assert torch.equal(d_q[:, ~changed], slopes[0][:, ~changed])
    elsewhere = torch.ones_like(changed)
    elsewhere[177 : 177 + 131] = elsewhere[start : start + 47] = False  # the prompt's keys are pulled by what sees them
    for mine, other in zip((d_k, d_v), slopes[1:], strict=True):
        assert torch.equal(mine[:, elsewhere], other[:, elsewhere])


@BOTH
def test_nan_stays_in_its_tree(dtype):
    trees = ROWS["blocks and pairs that end anywhere"]
    parts = given(trees, 6, 2, 64, dtype)
    whole = ours(trees, *parts, None)
    for x in parts:
        x[:, 200] = float("nan")
    for mine, other in zip(ours(trees, *parts, None), whole, strict=True):
        assert mine[:, 200].isnan().all() and torch.equal(mine[:, :177], other[:, :177]) and torch.equal(mine[:, 502:], other[:, 502:])


@BOTH
def test_threads_and_neighbours_change_nothing(dtype, monkeypatch):
    """A tree's numbers are its own: alone, among others, by one thread or two. How heads are cut rounds sums of gradients apart."""
    trees = ROWS["blocks and pairs that end anywhere"]
    parts = given(trees, 6, 2, 64, dtype)
    cut, *slopes = ours(trees, *parts, None)
    monkeypatch.setattr(found, "_PARTS", 0)
    whole = ours(trees, *parts, None)
    assert torch.equal(cut, whole[0]) and torch.equal(slopes[0], whole[1])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for mine, other in zip(ours(trees, *parts, None), whole, strict=True):
                assert torch.equal(mine, other)
    finally:
        torch.set_num_threads(threads)
    second = [x[:, 177 : 177 + 325] for x in parts]
    for mine, other in zip(ours(trees[1:2], *second, None), whole, strict=True):
        assert torch.equal(mine, other[:, 177 : 177 + 325])


@BOTH
def test_any_layout_in_memory(dtype):
    trees = ROWS["two responses"]
    q, k, v, grad = given(trees, 4, 2, 16, dtype)
    plain = ours(trees, q, k, v, grad, None)
    odd = [torch.randn(*x.shape[:2], 2 * x.shape[2] + 1).to(x.dtype)[..., 1 : 1 + x.shape[2]].copy_(x) for x in (q, k, v, grad)]
    apart = [torch.empty(*x.shape, 2, dtype=x.dtype)[..., 0].copy_(x) for x in (q, k, v, grad)]
    for laid in (odd, apart, [x.contiguous() for x in (q, k, v, grad)]):
        for mine, other in zip(ours(trees, *laid, None), plain, strict=True):
            assert torch.equal(mine, other)


@BOTH
def test_large_scores_are_no_trouble(dtype):
    trees = ROWS["two responses"]
    q, k, v, grad = given(trees, 4, 2, 16, dtype)
    parts = (q * 300, k, v, grad)
    for mine, true in zip(ours(trees, *parts, None), exact(trees, *parts, None), strict=True):
        assert mine.isfinite().all() and (true.norm() < 1e-6 or far(mine, true) < (2e-5 if dtype == torch.float32 else 2e-2))


@BOTH
def test_what_it_does_not_take(dtype):
    q, _, v, _ = given(ROWS["two responses"], 4, 2, 16, dtype)
    assert found.takes(q, v) and not found.takes(q.double(), v.double()) and not found.takes(q, v[..., :8])
    assert not found.takes(q, v.half())
    assert not found.takes(q[..., :8], v[..., :8])
