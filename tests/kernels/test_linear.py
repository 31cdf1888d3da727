"""Products of linear layers in training, by pairs of bf16, against float64."""

from __future__ import annotations

import pytest
import torch

from preftune import kernels
from preftune.models import lean

found = kernels.find("linear")
pytestmark = pytest.mark.skipif(found is None or not found.amx.has_pairs(), reason="no AVX512-BF16, or no compiled kernels (numba)")
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
ROWS = pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 97, 192, 193, 400])


@pytest.fixture
def by_pairs(monkeypatch):
    """A CPU with whole tiles multiplies pairs as well, if slower."""
    monkeypatch.setattr(found.amx, "compiled", lambda: False)


def drawn(*shape, seed, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(made, exact, inner):
    torch.testing.assert_close(made.double(), exact, rtol=2**-8 if made.dtype == torch.bfloat16 else 1e-6, atol=1e-6 * inner)


@ROWS
@TYPES
@pytest.mark.parametrize(("columns", "inner"), [((32,), 32), ((96, 32, 64), 160), ((64, 64), 96)])
def test_products_of_rows_and_back_to_them_are_those_of_weights_cast(dtype, rows, columns, inner):
    weights = [drawn(n, inner, seed=i, dtype=dtype) for i, n in enumerate(columns)]
    x, grads = drawn(rows, inner, seed=7), drawn(rows, sum(columns), seed=8)
    exact = torch.cat(weights).bfloat16().double()
    near(found.times(x, weights), x.double() @ exact.T, inner)
    near(found.times_back(grads, weights), grads.double() @ exact, sum(columns))


@ROWS
@pytest.mark.parametrize(("wide", "narrow"), [(32, 32), (160, 64), (64, 160)])
def test_the_gradient_of_a_weight_keeps_its_sums_in_fp32(rows, wide, narrow):
    grads, x = drawn(rows, wide, seed=1), drawn(rows, narrow, seed=2)
    made = found.pulled(grads, x)
    assert made.dtype == torch.float32
    near(made, grads.double().T @ x.double(), rows)


@pytest.mark.parametrize("rows", [1, 7, 61, 200])
@TYPES
def test_nothing_depends_on_threads_nor_a_row_on_those_beside_it(dtype, rows):
    weights, threads = [drawn(64, 96, seed=0, dtype=dtype), drawn(32, 96, seed=1, dtype=dtype)], torch.get_num_threads()
    x, grads = drawn(rows, 96, seed=2), drawn(rows, 96, seed=3)
    whole, back, gradient = found.times(x, weights), found.times_back(grads, weights), found.pulled(grads, x)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(found.times(x, weights), whole) and torch.equal(found.times_back(grads, weights), back)
            assert torch.equal(found.pulled(grads, x), gradient)
            assert torch.equal(found.times(x[rows // 2 :], weights), whole[rows // 2 :])
            assert torch.equal(found.times_back(grads[rows // 2 :], weights), back[rows // 2 :])
    finally:
        torch.set_num_threads(threads)


def test_frozen_weights_make_the_same_numbers_as_those_that_train():
    """A policy and its reference, bit by bit: the first loss of DPO is ln 2."""
    weights, x = [drawn(64, 96, seed=0, dtype=torch.float32)], drawn(50, 96, seed=1)
    assert torch.equal(found.times(x, weights), found.times(x, [w.bfloat16() for w in weights]))


@pytest.mark.usefixtures("by_pairs")
def test_what_it_does_not_take():
    x, w = drawn(4, 64, seed=0), drawn(96, 64, seed=1, dtype=torch.float32)
    assert found.takes(x, [w]) and found.takes(x, [w, w[:32]]) and found.takes_pairs(x, x[:, :32].contiguous())
    for weights in ([w.double()], [w, w.bfloat16()], [w[:40]], [w[:, :32]], [w.half()], [w.T]):
        assert not found.takes(x, weights)
    assert not found.takes(x.float(), [w]) and not found.takes(drawn(4, 60, seed=0), [w[:, :60].contiguous()])
    assert not found.takes_pairs(x, x[:, :32]) and not found.takes_pairs(x, x.float())


@pytest.mark.usefixtures("by_pairs")
def test_a_lean_block_computes_by_it_what_pytorch_computes(monkeypatch):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, (out, inner) in {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}.items():
                self.add_module(name, torch.nn.Linear(inner, out, bias=False))
            self.act_fn = torch.nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(0)
    block, x = Block(), torch.randn(70, 64, requires_grad=True)
    lean.make_lean(block)
    assert lean.is_lean_gated(block)
    called = []
    for name in ("times", "times_back", "pulled"):
        own = getattr(found, name)
        monkeypatch.setattr(found, name, lambda *given, own=own, name=name: called.append(name) or own(*given))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            made = block(x)
        return made, *torch.autograd.grad(made.square().sum(), [x, *block.parameters()])

    by_kernels = run()
    assert sorted(called) == ["pulled"] * 2 + ["times"] * 2 + ["times_back"] * 2
    monkeypatch.setenv(kernels.SWITCH, "off")
    for made, plain in zip(by_kernels, run(), strict=True):
        assert made.dtype == plain.dtype
        assert (made - plain).norm() < 0.01 * plain.norm()
    assert len(called) == 6
