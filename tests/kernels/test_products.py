"""Products with weights laid out for them, against plain ones in float64."""

from __future__ import annotations

import pytest
import torch

from preftune import kernels
from preftune.rollout.weights import product

found = kernels.find("products")
pytestmark = pytest.mark.skipif(found is None, reason="no compiled kernels on this machine (numba)")
pairs = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(found is None or not found.takes(torch.empty(32, 32).bfloat16()), reason="no AVX512-BF16")
)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, pairs])


def drawn(*shape, seed, dtype):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("rows", [*range(1, 26), 191, 192, 193, 500])
@pytest.mark.parametrize(("wide", "inner"), [(32, 2), (96, 18), (160, 64), (64, 160)])
@pytest.mark.parametrize("with_bias", [False, True])
@BOTH
def test_it_is_the_product(dtype, with_bias, rows, wide, inner):
    x, weight = drawn(rows, inner, seed=0, dtype=dtype), drawn(wide, inner, seed=1, dtype=dtype)
    bias = drawn(wide, seed=2, dtype=dtype) if with_bias else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.takes(weight) or (dtype == torch.bfloat16 and inner % 32 and found.amx.compiled())  # whole tiles
    made = product(weight, bias)(x)
    assert made.dtype == dtype and made.shape == exact.shape
    torch.testing.assert_close(made.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6 * inner)


@BOTH
def test_a_row_does_not_depend_on_those_beside_it_nor_on_threads(dtype):
    x, times = drawn(200, 64, seed=0, dtype=dtype), product(drawn(96, 64, seed=1, dtype=dtype))
    whole, threads = times(x), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(times(x), whole)
            for rows in (1, 2, 3, 4, 5, 6, 7, 13):
                assert torch.equal(times(x[rows : 2 * rows]), whole[rows : 2 * rows])
    finally:
        torch.set_num_threads(threads)


@BOTH
def test_any_shape_and_layout_in_memory(dtype):
    x, times = drawn(4, 7, 64, seed=0, dtype=dtype), product(drawn(96, 64, seed=1, dtype=dtype))
    whole = times(x.flatten(0, 1))
    assert torch.equal(times(x), whole.view(4, 7, 96))
    apart = torch.empty(28, 130, dtype=x.dtype)[:, 1:129:2].copy_(x.flatten(0, 1))
    assert not apart.is_contiguous() and torch.equal(times(apart), whole)
    turned = drawn(64, 96, seed=1, dtype=dtype).T.contiguous().T
    assert torch.equal(product(turned.T)(x), product(turned.T.contiguous())(x))


@BOTH
def test_what_it_does_not_take(dtype):
    weight = drawn(96, 64, seed=0, dtype=dtype)
    assert found.takes(weight) and not found.takes(weight.double()) and not found.takes(weight[:90])
    assert found.takes(weight[:, :63]) == (dtype == torch.float32)
    with pytest.raises(ValueError, match="of \\[90, 64\\]"):
        found.lay_out(weight[:90])
    x = drawn(5, 64, seed=1, dtype=dtype)
    torch.testing.assert_close(product(weight[:90])(x), product(weight)(x)[:, :90], rtol=2**-7, atol=1e-3)


@BOTH
def test_nan_and_infinity_stay_in_their_row(dtype):
    x, times = drawn(9, 64, seed=0, dtype=dtype), product(drawn(96, 64, seed=1, dtype=dtype))
    whole = times(x)
    x[3, 5], x[7, 6] = float("nan"), float("inf")
    made = times(x)
    assert made[3].isnan().all() and not made[7].isfinite().any()
    others = [0, 1, 2, 4, 5, 6, 8]
    assert torch.equal(made[others], whole[others])


def test_pytorchs_own_products_between_them_stay_as_they_are():
    """A unit for whole tiles has to be set up, and both sides set it up in their own way."""
    if not found.takes(torch.empty(32, 32, dtype=torch.bfloat16)):
        pytest.skip("no AVX512-BF16")
    x, weight = drawn(40, 64, seed=0, dtype=torch.bfloat16), drawn(96, 64, seed=1, dtype=torch.bfloat16)
    large, times = drawn(257, 320, seed=2, dtype=torch.bfloat16), product(weight)
    alone, own = large @ large.T, times(x)
    for rows in (1, 17, 32, 40):
        assert torch.equal(times(x[:rows]), own[:rows])
        assert torch.equal(large @ large.T, alone)


def test_where_the_system_keeps_whole_tiles_to_itself_bf16_is_left_to_pytorch(monkeypatch):
    """Compiled code for them would end the process."""
    monkeypatch.setattr(found.amx, "compiled", lambda: True)
    monkeypatch.setattr(found.amx, "_PERMITTED", False)
    weight = drawn(96, 64, seed=1, dtype=torch.bfloat16)
    states = drawn(2, 40, 32, seed=2, dtype=torch.bfloat16)
    assert not found.takes(weight) and not kernels.find("blocks").takes(states)
    assert not kernels.find("trees").takes(states, states)
    with pytest.raises(ValueError, match="not multiplied by panels"):
        found.lay_out(weight)
    x = drawn(5, 64, seed=0, dtype=torch.bfloat16)
    torch.testing.assert_close(product(weight)(x).double(), x.double() @ weight.double().T, rtol=2**-7, atol=1e-2)
    assert found.takes(weight.float()) and kernels.find("blocks").takes(states.float())
