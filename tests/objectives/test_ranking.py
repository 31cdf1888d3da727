"""RRHF, PRO, KnowPAT and listwise DPO beside hand-worked numbers (methods E.7, F.1-F.3), slow loops and finite differences."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.objectives.dpo import preference_loss, sigmoid
from preftune.objectives.metrics import Metrics
from preftune.objectives.ranking import Ranked, gap_contrast, knowpat, listwise_dpo, mu, pro, rrhf

NAN = float("nan")


def t(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ranked(logp: Tensor, scores: Tensor, length: Tensor | None = None) -> Ranked:
    """[G, N] sums of log-probabilities, scores (NaN where there is no response) and lengths (1 where not told)."""
    present = ~scores.isnan()
    length = present.to(logp.dtype) if length is None else length
    top = present & (scores == scores.nan_to_num(-torch.inf).amax(1, keepdim=True))
    order = scores.unsqueeze(2) > scores.unsqueeze(1)
    weight = torch.full((len(logp),), 1 / len(logp), dtype=logp.dtype)
    return Ranked(logp, length, order, top.to(logp.dtype) / top.sum(1, keepdim=True), weight)


def in_order(*values: float) -> Ranked:
    """One prompt, best response first, one token each."""
    return ranked(t(list(values)), t(list(range(len(values), 0, -1))))


Loss = Callable[[Ranked, Tensor], tuple[Tensor, Metrics]]
"""Ranked responses and [G, N] numbers of another kind (ratings, or the reference) to loss and metrics."""

LOSSES: dict[str, Loss] = {
    "rrhf": lambda r, extra: rrhf(r, 1.5),
    "rrhf, square root, summed": lambda r, extra: rrhf(r, 0.7, 0.5, True),
    "pro": lambda r, extra: pro(r, 0.2),
    "pro, gaps": lambda r, extra: pro(r, 0.2, extra),
    "knowpat": lambda r, extra: knowpat(r, 0.8),
    "listwise dpo": lambda r, extra: listwise_dpo(r, extra, 0.3),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


# ---------------------------------------------------------------- hand-worked numbers


def test_rrhf_by_hand() -> None:
    """F.1: p = (-.5, -.4, -1), best first: only the second is likelier than a better one, by .1."""
    three = in_order(-0.5, -0.4, -1.0)
    assert rrhf(three)[0].item() == pytest.approx(0.1 + 0.5, abs=1e-12)
    assert rrhf(three, 3.0)[0].item() == pytest.approx(0.3 + 0.5, abs=1e-12)


def test_rrhf_sums_or_means_the_best_and_divides_by_a_power_of_the_length() -> None:
    """Sums (-4, -1) over 4 and 1 tokens: p = (-2, -1) by the square root of the length, (-4, -1) by its zeroth power."""
    two = ranked(t([-4.0, -1.0]), t([2.0, 1.0]), t([4.0, 1.0]))
    assert rrhf(two)[0].item() == pytest.approx(0 + 1)
    assert rrhf(two, exponent=0.5)[0].item() == pytest.approx(1 + 1)
    assert rrhf(two, exponent=0.0, summed=True)[0].item() == pytest.approx(3 + 4)


def test_rrhf_in_the_right_order_is_plain_fine_tuning() -> None:
    """F.1: no rank loss and no gradient of it: only the best response is moved, each of its tokens by 1 / |y|."""
    logp = t([-0.8, -1.6, -6.0]).requires_grad_()
    loss, _ = rrhf(ranked(logp, t([3.0, 2.0, 1.0]), t([2.0, 2.0, 3.0])), 100.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.4) and logp.grad.tolist() == [[-0.5, 0, 0]]


def test_rrhf_pushes_only_pairs_in_the_wrong_order_by_1_over_their_length() -> None:
    """p = (-1, -.5, -2, -.25), best first: wrong are (1, 2), (1, 4), (2, 4) and (3, 4); without the likelihood term's -1/2 on the best."""
    logp, length = t([-2.0, -2.0, -2.0, -2.0]).requires_grad_(), t([2.0, 4.0, 1.0, 8.0])
    loss, _ = rrhf(ranked(logp, t([4.0, 3.0, 2.0, 1.0]), length))
    loss.backward()
    assert loss.item() == pytest.approx(0.5 + 0.75 + 0.25 + 1.75 + 1)
    assert logp.grad.tolist() == [[-2 / 2 - 1 / 2, (1 - 1) / 4, -1 / 1, 3 / 8]]


def test_pro_by_hand() -> None:
    """F.2: pairs are -log sigmoid of the difference, times the gap; three responses, simple and with gaps."""
    pair, three = in_order(-0.5, -1.0), in_order(-0.5, -0.4, -1.0)
    assert pro(pair, 0.0)[0].item() == pytest.approx(0.474077, abs=1e-6)
    assert pro(pair, 0.0, t([5.0, 3.0]))[0].item() == pytest.approx(0.313262, abs=1e-6)
    assert pro(three, 0.0)[0].item() == pytest.approx(1.435064, abs=1e-6)
    assert pro(three, 0.0, t([3.0, 2.0, 1.0]))[0].item() == pytest.approx(1.597508, abs=1e-6)


def test_pro_adds_the_best_response_s_sum_times_the_square_of_the_others() -> None:
    """.05 * (3 - 1)^2 * 1.5, and .05 * (2 - 1)^2 * 1.5 where one response of the grid is not there."""
    logp, length = t([-1.5, -0.4, -1.0], [-1.5, -2.0, 0.0]), t([3.0, 1.0, 1.0], [3.0, 2.0, 0.0])
    both = ranked(logp, t([3.0, 2.0, 1.0], [2.0, 1.0, NAN]), length)
    assert (pro(both)[0] - pro(both, 0.0)[0]).item() == pytest.approx((0.05 * 4 * 1.5 + 0.05 * 1.5) / 2)


def test_knowpat_by_hand() -> None:
    """E.7: S = (-.5, -.4, -1) gives 2.382290 / 2, two responses 1.287339; lambda and the likelihood of the best beside it."""
    three, two = in_order(-0.5, -0.4, -1.0), in_order(-0.5, -1.0)
    assert knowpat(three, 1.0)[0].item() == pytest.approx(1.191145 + 0.5, abs=1e-6)
    assert knowpat(two, 1.0)[0].item() == pytest.approx(1.287339 + 0.5, abs=1e-6)
    assert knowpat(three)[0].item() == pytest.approx(0.01 * 1.191145 + 0.5, abs=1e-8)


@pytest.mark.parametrize("k", [2, 3, 4, 6])
def test_listwise_dpo_starts_at_the_log_of_the_number_of_orders(k: int) -> None:
    logp = -torch.arange(1.0, k + 1, dtype=torch.float64).unsqueeze(0)
    loss, metrics = listwise_dpo(ranked(logp, -logp), logp, 0.1)
    assert loss.item() == pytest.approx(math.log(math.factorial(k)), abs=1e-12)
    assert (metrics["accuracy"][0] / metrics["accuracy"][1]).item() == 0.5


@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=2, max_size=2), st.floats(0.01, 5))
@settings(deadline=None)
def test_listwise_dpo_of_two_is_dpo(values: list[tuple[float, float]], beta: float) -> None:
    logp, reference = t([a for a, _ in values]).requires_grad_(), t([b for _, b in values])
    two = ranked(logp, t([0.0, 1.0]))
    ours, metrics = listwise_dpo(two, reference, beta)
    theirs, wanted = preference_loss(beta * (logp - reference), logp, two.order.double(), two.weight, sigmoid)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(ours, logp), torch.autograd.grad(theirs, logp), atol=1e-12, rtol=0)
    assert {name: [x.item() for x in metrics[name]] for name in wanted.keys() & metrics} == {
        name: [x.item() for x in wanted[name]] for name in wanted.keys() & metrics
    }


def test_listwise_dpo_is_a_distribution_over_orders() -> None:
    logp, reference = t([-3.0, -1.0, -7.0, -2.0]), t([-2.0, -2.0, -4.0, -6.0])
    chances = [
        math.exp(-listwise_dpo(ranked(logp, t(list(order))), reference, 0.4)[0].item()) for order in itertools.permutations(range(4))
    ]
    assert sum(chances) == pytest.approx(1)


# ---------------------------------------------------------------- slow loops, by formula


@dataclasses.dataclass
class Record:
    """One prompt's responses, worst numbers first or not: tokens, how good, and numbers of another kind."""

    tokens: list[np.ndarray]
    scores: list[float]
    extra: list[float]

    @property
    def mean(self) -> list[float]:
        return [float(x.mean()) for x in self.tokens]

    @property
    def sums(self) -> list[float]:
        return [float(x.sum()) for x in self.tokens]

    def below(self, k: int) -> list[int]:
        return [i for i in range(len(self.scores)) if self.scores[i] < self.scores[k]]

    def of_best(self, values: Sequence[float]) -> float:
        """Mean over the responses that nothing beats."""
        return float(np.mean([v for v, score in zip(values, self.scores, strict=True) if score == max(self.scores)]))


def slow_rrhf(record: Record, weight: float, exponent: float, summed: bool) -> float:
    p = [total / len(x) ** exponent for total, x in zip(record.sums, record.tokens, strict=True)]
    wrong = sum(max(0.0, p[j] - p[i]) for i in range(len(p)) for j in record.below(i))
    return weight * wrong - record.of_best(record.sums if summed else record.mean)


def slow_plackett_luce(record: Record, values: list[float]) -> float:
    total = 0.0
    for k in range(len(values)):
        total += np.log(np.exp(values[k]) + sum(np.exp(values[i]) for i in record.below(k))) - values[k]
    return total


def slow_pro(record: Record, sft_weight: float, gaps: bool) -> float:
    s, total = record.mean, 0.0
    for k in range(len(s)) if gaps else ():
        temperatures = {i: 1 / (record.extra[k] - record.extra[i]) for i in record.below(k)}
        if temperatures:
            own = np.exp(s[k] / min(temperatures.values()))
            total -= np.log(own / (own + sum(np.exp(s[i] / temperature) for i, temperature in temperatures.items())))
    total = total if gaps else slow_plackett_luce(record, s)
    return total - sft_weight * (len(s) - 1) ** 2 * record.of_best(record.sums)


def slow_knowpat(record: Record, weight: float) -> float:
    s, terms = record.mean, []
    for k in range(len(s)):
        if record.below(k):
            share = 1.0 if max(s) == min(s) else (s[k] - min(s)) / (max(s) - min(s))
            terms.append(share * (np.log1p(np.exp(-s[k])) + np.mean([np.log1p(np.exp(s[i])) for i in record.below(k)])))
    return weight * float(np.mean(terms)) - record.of_best(s)


SLOW: dict[str, Callable[[Record], float]] = {
    "rrhf": lambda r: slow_rrhf(r, 1.5, 1.0, False),
    "rrhf, square root, summed": lambda r: slow_rrhf(r, 0.7, 0.5, True),
    "pro": lambda r: slow_pro(r, 0.2, False),
    "pro, gaps": lambda r: slow_pro(r, 0.2, True),
    "knowpat": lambda r: slow_knowpat(r, 0.8),
    "listwise dpo": lambda r: slow_plackett_luce(r, [0.3 * (a - b) for a, b in zip(r.sums, r.extra, strict=True)]),
}


def on_grid(records: Sequence[Record], absent: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[G, N] sums, scores, lengths and other numbers; `absent` stands in the last where there is no response."""
    width = max(len(r.scores) for r in records)
    fill = lambda rows, value: t(*([*row, *[value] * (width - len(row))] for row in rows))
    lengths = [[float(len(x)) for x in r.tokens] for r in records]
    return (
        fill([r.sums for r in records], 0.0),
        fill([r.scores for r in records], NAN),
        fill(lengths, 0.0),
        fill([r.extra for r in records], absent),
    )


@st.composite
def records(draw) -> list[Record]:
    """Two to six responses each, ties among them, not all tied; the other numbers agree with the scores, as ratings do."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        n = draw(st.integers(2, 6))
        scores = [float(x) for x in draw(st.permutations([0, 1, *draw(st.lists(st.integers(0, 3), min_size=n - 2, max_size=n - 2))]))]
        rng = np.random.default_rng(draw(st.integers(0, 10**6)))
        tokens = [-rng.exponential(1.0, draw(st.integers(1, 5))) for _ in range(n)]
        found.append(Record(tokens, scores, [0.75 * x for x in scores]))
    return found


@pytest.mark.parametrize("name", LOSSES)
@given(many=records())
@settings(deadline=None, max_examples=60)
def test_against_the_formula_in_loops(name: str, many: list[Record]) -> None:
    """Losses over records of different size in one grid; gradients by finite differences; metrics of the best."""
    logp, scores, length, extra = on_grid(many, absent=50.0)
    loss, metrics = LOSSES[name](ranked(logp, scores, length), extra)
    assert loss.item() == pytest.approx(np.mean([SLOW[name](r) for r in many]), rel=1e-9, abs=1e-12)
    mean = lambda metric: (metrics[metric][0] / metrics[metric][1]).item()
    assert mean("nll") == pytest.approx(-np.mean([r.of_best(r.mean) for r in many]))
    assert mean("logp_chosen") == pytest.approx(np.mean([r.of_best(r.sums) for r in many]))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_by_finite_differences(name: str, seed: int) -> None:
    """KnowPAT's weights carry no gradient, so they are held still while the rest is moved."""
    rng = np.random.default_rng(seed)
    many = [
        Record([-rng.exponential(1.0, s) for s in sizes], scores, scores)
        for sizes, scores in ([(3, 1, 2, 5), [2, 0, 2, 1]], [(4, 2), [0, 1]])
    ]  # type: ignore[arg-type]
    logp, scores, length, extra = on_grid(many)
    logp.requires_grad_()
    (slope,) = torch.autograd.grad(LOSSES[name](ranked(logp, scores, length), extra)[0], logp)
    step = 1e-6
    for g, n in itertools.product(range(2), range(4)):
        moved = [logp.detach().clone() for _ in range(2)]
        moved[0][g, n] += step
        moved[1][g, n] -= step
        if name == "knowpat":
            high, low = (
                fixed_knowpat(ranked(x, scores, length), mu((logp / length.clamp(min=1)).detach(), length > 0), 0.8) for x in moved
            )
        else:
            high, low = (LOSSES[name](ranked(x, scores, length), extra)[0].item() for x in moved)
        assert slope[g, n].item() == pytest.approx((high - low) / (2 * step), abs=1e-7)
    assert slope[1, 2:].tolist() == [0, 0]


def fixed_knowpat(r: Ranked, weights: Tensor, strength: float) -> float:
    """KnowPAT with these weights, in loops."""
    s, total = r.mean, 0.0
    for g in range(len(s)):
        stages = [(k, [i for i in range(s.shape[1]) if r.order[g, k, i]]) for k in range(s.shape[1])]
        terms = [
            weights[g, k].item() * (math.log1p(math.exp(-s[g, k])) + sum(math.log1p(math.exp(s[g, i])) for i in worse) / len(worse))
            for k, worse in stages
            if worse
        ]
        total += r.weight[g].item() * (strength * sum(terms) / len(terms) - (r.best[g] * s[g]).sum().item())
    return total


@every_loss
@given(many=records(), data=st.data())
@settings(deadline=None, max_examples=30)
def test_the_order_in_which_responses_stand_does_not_matter_with_ties(loss: Loss, many: list[Record], data) -> None:
    shuffled = []
    for r in many:
        at = data.draw(st.permutations(range(len(r.scores))))
        shuffled.append(Record(*([values[i] for i in at] for values in (r.tokens, r.scores, r.extra))))
    ours, theirs = (loss(ranked(logp, scores, length), extra)[0].item() for logp, scores, length, extra in map(on_grid, (many, shuffled)))
    assert ours == pytest.approx(theirs, rel=1e-9)


# ---------------------------------------------------------------- beside the methods' own code, where its padding does no harm


def as_rrhf_trains(p: Tensor, scores: Tensor, best_tokens: Tensor) -> Tensor:
    """One prompt at a time, [N] mean log-probabilities: the differences that have the wrong sign where scores differ, minus the best."""
    apart, better = p[None, :] - p[:, None], scores[None, :] > scores[:, None]
    return -apart[better & (apart < 0)].sum() - best_tokens.mean()


def as_pro_trains(s: Tensor, ratings: Tensor, best_sum: Tensor, sft_weight: float) -> Tensor:
    """[G, N] with the best first: at each time the first of what is left against the rest, temperatures from the ratings' gaps."""
    total, many = torch.zeros((), dtype=s.dtype), s.shape[1]
    for time in range(many - 1):
        gap = ratings[:, time : time + 1] - ratings[:, time + 1 :]
        first = torch.exp(s[:, time] * gap.max(1).values)
        rest = torch.exp(s[:, time + 1 :] * gap).sum(1)
        total = total - torch.log(first / (first + rest)).mean()
    return total - sft_weight * (many - 1) ** 2 * best_sum.mean()


def as_knowpat_trains(s: Tensor) -> Tensor:
    """[4] mean log-probabilities, the best first: the released form, whose 3 is n - 1 here."""
    weights = ((s - s.min()) / (s.max() - s.min())).detach()
    total = torch.zeros((), dtype=s.dtype)
    for i in range(3):
        total = total - weights[i] * (torch.sigmoid(s[i]).log() + torch.sigmoid(-s[i + 1 :]).log().mean())
    return total / 3


def test_equal_lengths_give_what_the_papers_own_code_gives() -> None:
    """Four responses of five tokens, none padded, best first: loss and gradient."""
    torch.manual_seed(0)
    tokens = (-torch.rand(3, 4, 5, dtype=torch.float64) * 3).requires_grad_()
    ratings = t([4.0, 2.5, 1.0, 0.5], [3.0, 1.0, 0.0, -1.0], [9.0, 8.0, 7.5, 6.0])
    r = ranked(tokens.sum(2), ratings, torch.full((3, 4), 5.0))
    s = tokens.mean(2)
    pairs = [
        (rrhf(r)[0], torch.stack([as_rrhf_trains(s[g], ratings[g], tokens[g, 0]) for g in range(3)]).mean()),
        (pro(r, 0.05, ratings)[0], as_pro_trains(s, ratings, tokens[:, 0].sum(1), 0.05)),
        (knowpat(r, 0.01)[0], torch.stack([0.01 * as_knowpat_trains(s[g]) - s[g, 0] for g in range(3)]).mean()),
    ]
    for ours, theirs in pairs:
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
        found, wanted = (torch.autograd.grad(x, tokens, retain_graph=True)[0] for x in (ours, theirs))
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


# ---------------------------------------------------------------- peers' bugs


@pytest.mark.parametrize("k", [2, 3, 4, 5, 9])
def test_regression_40_knowpat_takes_any_number_of_responses(k: int) -> None:
    """A hard-coded 3 instead of n - 1; and 0/0 where all mean log-probabilities are equal: there every weight is 1."""
    logp = torch.full((1, k), -0.7, dtype=torch.float64, requires_grad=True)
    loss, _ = knowpat(ranked(logp, torch.arange(k, 0, -1.0).unsqueeze(0)), 1.0)
    (slope,) = torch.autograd.grad(loss, logp)
    each = math.log1p(math.exp(0.7)) + math.log1p(math.exp(-0.7))
    assert loss.item() == pytest.approx(each + 0.7) and slope.isfinite().all() and (slope != 0).all()


def test_regression_40_equal_scores_beside_others_that_differ() -> None:
    """The weights of each prompt are its own, and an absent response's 0 is not the largest of them."""
    weights = mu(t([-1.0, -1.0, 0.0], [-1.0, -3.0, -2.0]), t([1, 1, 0], [1, 1, 1]) > 0)
    assert weights[0, :2].tolist() == [1, 1] and weights[1].tolist() == [1, 0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [89.0, 1e3, 1e30])
def test_regression_41_pro_is_a_logsumexp_at_any_size(size: float, dtype: torch.dtype) -> None:
    """Exponentials with an epsilon overflow at 89 in fp32, and below -700 the epsilon is all that is left."""
    scores = torch.tensor([[3.0, 2.0, 1.0]], dtype=dtype)
    for ratings, (one, two) in ((None, (1, 1)), (scores, (1, 2))):  # what a gap of 1 and of 2 multiplies with
        for values in ([0.0, size, -size], [size, 0.0, -size], [-size, -size, -size]):
            logp = torch.tensor([values], dtype=dtype, requires_grad=True)
            loss, _ = pro(ranked(logp, scores), 0.0, ratings)
            (slope,) = torch.autograd.grad(loss, logp)
            first, second = [two * values[0], one * values[1], two * values[2]], values[1:]
            expected = sum(np.logaddexp.reduce(stage) - stage[0] for stage in (first, second))
            assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6 * size if dtype is torch.float32 else 1e-9)
            assert slope.isfinite().all()


def test_regression_41_gap_contrast_drops_negatives_without_a_gap() -> None:
    """Tied ratings are no negatives: (3, 3, 1) contrasts the first and second with the third alone, by a gap of 2."""
    values = t([-0.5, -0.2, -1.0])
    expected = sum(math.log1p(math.exp(2 * (-1.0 - v))) for v in (-0.5, -0.2))
    ratings = t([3.0, 3.0, 1.0])
    order = ratings.unsqueeze(2) > ratings.unsqueeze(1)
    assert gap_contrast(values, order, ratings).item() == pytest.approx(expected)
    everything = torch.ones(1, 3, 3).triu(1).bool()  # a ranking that says more than the ratings do
    assert gap_contrast(values, everything, ratings).item() == pytest.approx(expected)
    assert gap_contrast(values, everything, t([1.0, 1.0, 1.0])).item() == 0


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_numbers_and_what_is_absent_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    logp = torch.tensor([[-1e5, -1e-5, -3e4], [-1e5, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    scores = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.0, NAN]], dtype=dtype)
    extra = torch.tensor([[1e3, 10.0, -1e3], [10.0, 0.0, NAN]], dtype=dtype).nan_to_num(1e4)
    value, metrics = loss(ranked(logp, scores, torch.tensor([[2.0, 1.0, 3.0], [2.0, 1.0, 0.0]], dtype=dtype)), extra)
    (slope,) = torch.autograd.grad(value, logp)
    assert value.isfinite() and slope.isfinite().all() and slope[1, 2] == 0 and (slope != 0).any()
    assert all(part.isfinite() for ratio in metrics.values() for part in ratio)


def test_ratings_that_are_not_known_change_nothing() -> None:
    """NaN where there is no response: neither in the value nor, as 0 * NaN, in the gradient."""
    logp = t([-1.0, -2.0, 0.0]).requires_grad_()
    two = ranked(logp, t([1.0, 0.0, NAN]), t([1.0, 1.0, 0.0]))
    loss, _ = pro(two, 0.0, t([1.0, 0.0, NAN]))
    (slope,) = torch.autograd.grad(loss, logp)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1))) and slope.isfinite().all() and slope[0, 2] == 0
