"""Chunked log-probabilities against log_softmax and gather: values, gradients, precision, and what is held at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from preftune import kernels
from preftune.models import logprobs
from preftune.models.logprobs import chunked_logprobs, chunked_logprobs_and_entropy

ROWS, WIDTH, VOCABULARY = 23, 12, 40
OPTIONS = [{}, {"scale": 0.25}, {"softcap": 3.0}, {"scale": 1.7, "softcap": 2.0}]
IDS = ["plain", "scale", "softcap", "scale and softcap"]


def inputs(*, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    random = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (ROWS,), generator=random)
    return draw(ROWS, WIDTH), draw(VOCABULARY, WIDTH), draw(VOCABULARY) if bias else None, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None):
    """Transformers' way: all logits at once."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits * scale, -1).gather(1, targets[:, None]).squeeze(1)


def rows_at_once(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * VOCABULARY * rows)
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 0)


def run(function, leaves: tuple[Tensor | None, ...], *args, **options) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradients of an uneven sum of them."""
    out = function(*args, **options)
    asked = [leaf for leaf in leaves if leaf is not None]
    return out, list(torch.autograd.grad((out * torch.linspace(-1, 2, len(out), dtype=out.dtype)).sum(), asked))


@pytest.mark.parametrize("rows", [1, 2, 7, 22, 23, 24, 1000])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_regression_15_chunked_equals_plain(options: dict, bias: bool, rows: int, monkeypatch) -> None:
    rows_at_once(monkeypatch, rows)
    hidden, weight, b, targets = inputs(bias=bias)
    ours = run(chunked_logprobs, (hidden, weight, b), hidden, weight, targets, bias=b, **options)
    theirs = run(plain, (hidden, weight, b), hidden, weight, targets, bias=b, **options)
    assert ours[0].dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_regression_15_gradients_by_finite_differences(options: dict, monkeypatch) -> None:
    rows_at_once(monkeypatch, 9)
    hidden, weight, bias, targets = inputs(dtype=torch.float64)
    function = lambda h, w, b: chunked_logprobs(h, w, targets, bias=b, compute=torch.float64, **options)
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_regression_15_bf16_products_over_fp32_weights(options: dict, rows: int, monkeypatch) -> None:
    """As autocast does it: bf16 products, fp32 softmax, fp32 gradients of fp32 leaves; chunks add up in fp32."""
    rows_at_once(monkeypatch, rows)
    hidden, weight, bias, targets = inputs()
    ours = run(chunked_logprobs, (hidden, weight, bias), hidden, weight, targets, bias=bias, compute=torch.bfloat16, **options)
    rounded = hidden.bfloat16().float(), weight.bfloat16().float()
    theirs = run(plain, (hidden, weight, bias), *rounded, targets, bias=bias, **options)
    assert [g.dtype for g in ours[1]] == [torch.float32] * 3 and ours[0].dtype == torch.float32
    torch.testing.assert_close(ours[0], theirs[0], atol=0.06, rtol=0.01)
    for got, expected in zip(ours[1], theirs[1], strict=True):
        assert (got - expected).norm() < 0.02 * expected.norm()


def test_gradients_are_made_only_where_they_are_wanted() -> None:
    hidden, weight, bias, targets = inputs()
    wanted = run(chunked_logprobs, (hidden,), hidden, weight.detach(), targets, bias=bias.detach())
    everything = run(chunked_logprobs, (hidden, weight, bias), hidden, weight, targets, bias=bias)
    assert torch.equal(wanted[1][0], everything[1][0])
    frozen = run(chunked_logprobs, (weight,), hidden.detach(), weight, targets, bias=bias.detach())
    assert torch.equal(frozen[1][0], everything[1][1])


def test_no_rows() -> None:
    hidden, weight, _, targets = inputs()
    out, (grad,) = run(chunked_logprobs, (weight,), hidden[:0], weight, targets[:0])
    assert out.shape == (0,) and not grad.any()


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_regression_29_a_sum_over_4096_tokens_stays_near_float64(size: float) -> None:
    """fp32 softmax and sum: within 1e-6, relatively; bf16 products, rounded before the softmax, within 1e-3."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 16, generator=random)
    weight = torch.randn(2048, 16, generator=random) * size / 4
    targets = torch.randint(2048, (4096,), generator=random)
    exact = plain(hidden.double(), weight.double(), targets).sum().item()
    assert chunked_logprobs(hidden, weight, targets).sum().item() == pytest.approx(exact, rel=1e-6)
    rough = chunked_logprobs(hidden, weight, targets, compute=torch.bfloat16)
    assert rough.dtype == torch.float32 and rough.sum().item() == pytest.approx(exact, rel=1e-3)


def test_logits_far_from_zero_stay_finite() -> None:
    hidden, weight, _, targets = inputs()
    out, grads = run(chunked_logprobs, (hidden, weight), hidden * 1e3, weight * 1e2, targets)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)


class Largest(TorchDispatchMode):
    """The most elements that any operation gave back, weights' shape apart."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.elements = weight, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape not in (self.weight.shape, self.weight.T.shape):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_the_logits_of_all_positions_are_never_held_at_once(options: dict, monkeypatch) -> None:
    rows_at_once(monkeypatch, 4)
    hidden, weight, bias, targets = inputs()
    with Largest(weight) as ours:
        run(chunked_logprobs, (hidden, weight, bias), hidden, weight, targets, bias=bias, **options)
    with Largest(weight) as theirs:
        run(plain, (hidden, weight, bias), hidden, weight, targets, bias=bias, **options)
    assert theirs.elements == ROWS * VOCABULARY
    assert ours.elements == max(4 * VOCABULARY, ROWS * WIDTH)


def test_few_logits_are_kept_for_the_backward_pass_and_many_are_not(monkeypatch) -> None:
    hidden, weight, _, targets = inputs(bias=False)
    products: list[tuple[int, ...]] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and out.shape[1] == VOCABULARY:
                products.append(tuple(out.shape))
            return out

    def both() -> tuple[list[Tensor], list[Tensor]]:
        logp, entropy = chunked_logprobs_and_entropy(hidden, weight, targets)
        loss = (logp * torch.linspace(-1, 2, ROWS)).sum() + 0.3 * entropy.sum()
        return [list(torch.autograd.grad(loss, [hidden, weight], retain_graph=True)) for _ in range(2)]

    with Products():
        kept, again = both()
    if kernels.find("logprobs") is not None:
        assert products == [(ROWS, VOCABULARY)] * 2  # the second backward pass finds them no more
    products.clear()
    rows_at_once(monkeypatch, 8)
    with Products():
        chunked, _ = both()
    assert products == [(8, VOCABULARY), (8, VOCABULARY), (7, VOCABULARY)] * 3
    for one in (kept, again):
        torch.testing.assert_close(one, chunked, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * VOCABULARY * 8)
    products.clear()
    with torch.no_grad(), Products():
        chunked_logprobs(hidden, weight, targets)
    assert products == [(8, VOCABULARY), (8, VOCABULARY), (7, VOCABULARY)]


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_entropy_is_that_of_the_whole_softmax_and_the_log_probabilities_keep_their_bits(options: dict, rows: int, monkeypatch) -> None:
    rows_at_once(monkeypatch, rows)
    hidden, weight, b, targets = inputs()
    logp, entropy = chunked_logprobs_and_entropy(hidden, weight, targets, bias=b, **options)
    assert torch.equal(logp, chunked_logprobs(hidden, weight, targets, bias=b, **options))
    every = torch.stack([plain(hidden, weight, torch.full_like(targets, v), bias=b, **options) for v in range(VOCABULARY)], 1)
    torch.testing.assert_close(entropy, -(every.exp() * every).sum(1), atol=1e-5, rtol=1e-5)
    uneven = torch.linspace(-1, 2, len(logp))
    for mix in (0.0, 1.0, 0.3):  # the entropy's gradient alone, none of it, and both
        ours = torch.autograd.grad((uneven * (mix * logp + (1 - mix) * entropy)).sum(), [hidden, weight, b], retain_graph=True)
        theirs = plain(hidden, weight, targets, bias=b, **options)
        wanted = torch.autograd.grad(
            (uneven * (mix * theirs - (1 - mix) * (every.exp() * every).sum(1))).sum(), [hidden, weight, b], retain_graph=True
        )
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=2e-5)
    alone = torch.autograd.grad(entropy.sum(), [hidden])[0]
    torch.testing.assert_close(alone, torch.autograd.grad(-(every.exp() * every).sum(), [hidden])[0], atol=1e-5, rtol=1e-5)


def test_a_uniform_policy_has_the_entropy_of_its_vocabulary_and_no_gradient_of_it() -> None:
    hidden, weight, _, targets = inputs(bias=False)
    with torch.no_grad():
        weight.zero_()
    _, entropy = chunked_logprobs_and_entropy(hidden, weight, targets)
    torch.testing.assert_close(entropy, torch.full_like(entropy, VOCABULARY).log())
    assert torch.autograd.grad(entropy.sum(), [weight])[0].abs().max() < 1e-6
