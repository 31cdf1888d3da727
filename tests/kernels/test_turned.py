"""Matrices turned over by kernels, and gradients of weights made of them."""

from __future__ import annotations

import pytest
import torch

from preftune import kernels
from preftune.models import lean

found = kernels.find("turned")
pytestmark = pytest.mark.skipif(found is None, reason="no compiled kernels on this machine (numba)")
SHAPES = [(1, 1), (1, 70), (70, 1), (64, 64), (63, 129), (200, 96)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_it_is_the_same_matrix_turned_over(shape, threads):
    x, before = drawn(*shape), torch.get_num_threads()
    apart = torch.empty(shape[0], shape[1] + 5, dtype=torch.bfloat16)[:, : shape[1]].copy_(x)
    try:
        torch.set_num_threads(threads)
        for source in (x, apart):
            assert torch.equal(found.turned(source), x.T) and found.turned(source).is_contiguous()
            assert torch.equal(found.turned(source, torch.float32), x.T.float())
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("wide", "narrow"), [(96, 40), (40, 96), (64, 64)])
def test_gradients_of_a_weight_are_the_plain_product(wide, narrow, monkeypatch):
    grads, rows = drawn(77, wide, seed=1), drawn(77, narrow, seed=2)
    exact = grads.double().T @ rows.double()
    made = found.pulled(grads, rows)
    assert made.dtype == torch.float32 and made.is_contiguous()
    torch.testing.assert_close(made.double(), exact, rtol=2**-8, atol=1e-5)
    for known in (True, False):
        monkeypatch.setattr(found, "compiled", lambda known=known: known)
        for dtype in (torch.float32, torch.bfloat16):
            torch.testing.assert_close(lean.pulled(grads, rows, dtype).double(), exact, rtol=2**-7, atol=1e-5)


def test_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(found, "compiled", lambda: True)
    x = drawn(8, 8)
    assert found.takes_pairs(x, x) and not found.takes_pairs(x, x.float()) and not found.takes_pairs(x, x.T)
    monkeypatch.setattr(found, "compiled", lambda: False)
    assert not found.takes_pairs(x, x)
