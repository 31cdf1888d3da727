"""Reward models: what is kept of a record, several attributes, margins, imitation and annotators, under the laws of every method."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from preftune.errors import UserError
from preftune.methods import METHODS, Method, Outputs
from preftune.models.policy import RewardModel
from preftune.packing.batch import Batch, collate
from preftune.packing.chat import SCORE, Tree, judgements
from preftune.records import Comparison, Example, Response
from tests import tiny
from tests.methods.test_laws import Table, assert_same, knobs_of, only_one_best, step

PAIRWISE, POINTWISE, LISTWISE = METHODS["reward"], METHODS["reward_pointwise"], METHODS["reward_listwise"]
NAN = float("nan")
NAMES = ("helpful", "honest", "harmless")

VARIANTS: dict[str, tuple[Method, dict[str, Any]]] = {
    "margin": (PAIRWISE, {"margin": "given", "margin_scale": 0.5}),
    "margin, smoothing, imitation": (PAIRWISE, {"margin": "given", "label_smoothing": 0.2, "imitation": 0.7, "pairs": "best_vs_rest"}),
    "attributes of pairs": (PAIRWISE, {"attributes": NAMES, "weights": {"honest": 2.5}, "centering": 0.1, "imitation": 0.7}),
    "attributes of ratings": (POINTWISE, {"attributes": NAMES, "weights": {"honest": 2.5}, "imitation": 0.7}),
    "one attribute": (POINTWISE, {"attributes": ("honest",)}),
    "mean over stages": (LISTWISE, {"mean_over_stages": True, "imitation": 0.7}),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


@st.composite
def judged(draw) -> list[Tree]:
    """Two to five records of two to four responses; comparisons of some strength or none, attributes rated, unrated and tied."""
    trees = []
    for i in range(draw(st.integers(2, 5))):
        sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
        n = len(sizes)
        strength = st.sampled_from([None, 0.0, 1 / 3, 3.0])
        said = tuple(Comparison(j, j + 1, draw(st.sampled_from([1.0, 0.75, 0.25])), draw(strength)) for j in range(n - 1))
        rating = st.sampled_from([None, 0.0, 1.0, 2.5])
        scores = [{"honest": float(j)} | {a: v for a in NAMES[::2] if (v := draw(rating)) is not None} for j in range(n)]
        if draw(st.booleans()):
            scores[0] = {}
        scores = scores if n > 2 or scores[0] else [{"honest": 5.0}, scores[1]]
        example = Example("p", tuple(Response("r", score=s or None) for s in scores), comparisons=said)
        shape = tiny.tree(draw(st.integers(1, 4)), tuple(sizes), seed=i, name=f"record {i}")
        trees.append(dataclasses.replace(shape, **judgements(example)))
    return trees


def table_of(trees: list[Tree], heads: int) -> Table:
    table = Table.of(trees)
    if heads > 1:
        random = torch.Generator().manual_seed(1)
        draw = lambda n: torch.randn(n, heads, generator=random, dtype=torch.float64)
        table.reward = {t.id: draw(len(t.responses)).requires_grad_() for t in trees}
    return table


def variant(name: str) -> tuple[Method, Any]:
    method, knobs = VARIANTS[name]
    return method, method.knobs(**knobs)


@every_variant
@given(judged(), st.data())
@settings(deadline=None, max_examples=30)
def test_regression_01_any_cut_into_micro_batches_gives_the_same_gradient(name: str, trees: list[Tree], data) -> None:
    method, knobs = variant(name)
    trees = [only_one_best(tree) for tree in trees]
    table = table_of(trees, method.heads(knobs))
    at = data.draw(st.lists(st.integers(0, 4), min_size=len(trees), max_size=len(trees)))
    parts = [[t for t, part in zip(trees, at, strict=True) if part == p] for p in range(5)]
    assert_same(step(method, table, parts, knobs=knobs), step(method, table, [trees], knobs=knobs))


@every_variant
@given(judged(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_order_and_what_is_absent_do_not_matter(name: str, trees: list[Tree], random) -> None:
    method, knobs = variant(name)
    trees = [only_one_best(tree) for tree in trees]
    table = table_of(trees, method.heads(knobs))
    orders = {t.id: random.sample(range(len(t.responses)), len(t.responses)) for t in trees}
    plain = step(method, table, [trees], knobs=knobs)
    assert_same(step(method, table, [random.sample(trees, len(trees))], orders=orders, knobs=knobs), plain)
    assert_same(step(method, table, [trees], absent=1e3, knobs=knobs), plain)


# ---------------------------------------------------------------- several attributes


def rated(rows: list[list[dict[str, float] | float | None]], sizes: tuple[int, ...] = ()) -> list[Tree]:
    trees = []
    for i, row in enumerate(rows):
        shape = tiny.tree(3, sizes or (2,) * len(row), seed=i, name=str(i))
        trees.append(dataclasses.replace(shape, **judgements(Example("p", tuple(Response("r", score=s) for s in row)))))
    return trees


def kept(method: Method, trees: list[Tree], knobs: Any) -> Batch:
    found = [method.keep(tree, knobs) for tree in trees]
    return collate([t for t in found if isinstance(t, Tree)], reduction=method.reduction)


ROWS = [
    [{"helpful": 3.0, "honest": 1.0}, {"helpful": 1.0}, None],
    [{"honest": 2.0}, {"helpful": 2.0, "honest": 2.0}, {"helpful": 4.0, "honest": 0.0}],
]
REWARDS = [[[0.5, -1.0], [2.0, 9.0]], [[7.0, 0.25], [1.0, 0.5], [3.0, -0.5]]]
"""Of what is rated alone: two responses of the first record, three of the second."""


def rewards(batch: Batch) -> torch.Tensor:
    grid = torch.zeros(*batch.present.shape, 2, dtype=torch.float64)
    for g, row in enumerate(REWARDS):
        grid[g, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return grid.requires_grad_()


def test_pointwise_attributes_by_loops() -> None:
    """sum_a w_a (r - s)^2 over what is rated, by the five responses that have any rating; unrated cells have no gradient."""
    knobs = POINTWISE.knobs(attributes=("helpful", "honest"), weights={"honest": 0.5})
    batch = kept(POINTWISE, rated(ROWS), knobs)
    assert batch.present.sum() == 5
    values = rewards(batch)
    loss, metrics = POINTWISE.loss(Outputs(rewards=values), batch, knobs)
    helpful = [(0.5 - 3) ** 2, (2 - 1) ** 2, (1 - 2) ** 2, (3 - 4) ** 2]
    honest = [(-1 - 1) ** 2, (0.25 - 2) ** 2, (0.5 - 2) ** 2, (-0.5 - 0) ** 2]
    assert loss.item() == pytest.approx((sum(helpful) + 0.5 * sum(honest)) / 5)
    (slope,) = torch.autograd.grad(loss, values)
    assert slope[0, 1, 1] == 0 and slope[1, 0, 0] == 0 and (slope[0, 2] == 0).all()
    assert {n: (a / b).item() for n, (a, b) in metrics.items() if n.startswith(("mse", "acc"))} == pytest.approx(
        {"mse": (sum(helpful) + sum(honest)) / 8, "accuracy": (0 + 1 + 1) / 3, "accuracy_helpful": 0.5, "accuracy_honest": 1.0}
    )


def test_pairwise_attributes_by_loops() -> None:
    """sum_a w_a L_a, L_a the mean over the two prompts of each one's mean over the pairs that attribute a orders; ties are none."""
    knobs = PAIRWISE.knobs(attributes=("helpful", "honest"), weights={"honest": 0.5})
    batch = kept(PAIRWISE, rated(ROWS), knobs)
    loss, metrics = PAIRWISE.loss(Outputs(rewards=rewards(batch)), batch, knobs)
    lose = lambda d: math.log1p(math.exp(-d))
    helpful = (lose(0.5 - 2) + lose(3 - 1)) / 2
    honest = (0 + (lose(0.25 + 0.5) + lose(0.5 + 0.5)) / 2) / 2
    assert loss.item() == pytest.approx(helpful + 0.5 * honest)
    assert (metrics["accuracy_helpful"][0] / metrics["accuracy_helpful"][1]).item() == 0.5
    assert (metrics["accuracy"][0] / metrics["accuracy"][1]).item() == pytest.approx(2 / 3)


def test_a_record_that_no_attribute_orders_is_named() -> None:
    knobs = PAIRWISE.knobs(attributes=("helpful", "honest"))
    tied, other = rated([[{"helpful": 1.0}, {"helpful": 1.0, "honest": 3.0}], [{"fluent": 1.0}, {"fluent": 2.0}]])
    assert PAIRWISE.keep(tied, knobs) == "no_preference" and PAIRWISE.keep(other, knobs) == "no_score"
    assert METHODS["reward_pointwise"].keep(other, POINTWISE.knobs()) == "no_score"


# ---------------------------------------------------------------- what is kept


def test_pointwise_keeps_rated_responses_alone_so_that_each_weighs_the_same() -> None:
    """Three of five responses are scored: each has a third, whatever record it stands in."""
    batch = kept(POINTWISE, rated([[0.5, None, 0.25], [None, 1.0]]), POINTWISE.knobs())
    assert batch.response_weight.tolist() == [[pytest.approx(1 / 3)] * 2, [pytest.approx(1 / 3), 0]]
    assert batch.rated is not None and batch.rated[0, :, 0].tolist() == [0.5, 0.25]
    assert POINTWISE.keep(rated([[None, None]])[0], POINTWISE.knobs()) == "no_score"


def test_the_plain_score_or_else_the_overall_one() -> None:
    for scores in ([1.0, 2.0], [{"overall": 1.0, "x": 9.0}, {"overall": 2.0}]):
        (tree,) = rated([scores])
        told = POINTWISE.keep(tree, POINTWISE.knobs())
        assert isinstance(told, Tree) and told.rated is not None and told.rated.tolist() == [[1.0], [2.0]]


def test_without_another_order_the_best_is_that_of_the_weighted_mean_of_its_ratings() -> None:
    knobs = POINTWISE.knobs(attributes=("helpful", "honest"), weights={"honest": 3.0})
    (tree,) = rated([[{"helpful": 5.0, "honest": 1.0}, {"helpful": 1.0, "honest": 3.0}, {"honest": 2.0}]])
    told = POINTWISE.keep(tree, knobs)
    assert np.isnan(tree.scores).all() and isinstance(told, Tree)
    assert told.scores.tolist() == pytest.approx([2.0, 2.5, 2.0])
    ranked = dataclasses.replace(tree, scores=np.array([3.0, 2.0, 1.0]))
    assert POINTWISE.keep(ranked, knobs).scores.tolist() == [3, 2, 1]  # type: ignore[union-attr]


def test_listwise_ranks_what_has_a_place_and_needs_two_levels() -> None:
    tree = dataclasses.replace(tiny.tree(3, (2, 4, 5)), scores=np.array([NAN, 1.0, 2.0]))
    told = LISTWISE.keep(tree, LISTWISE.knobs())
    assert isinstance(told, Tree) and [len(r) for r in told.responses] == [4, 5]
    assert LISTWISE.keep(dataclasses.replace(tree, scores=np.array([NAN, 1.0, 1.0])), LISTWISE.knobs()) == "no_ranking"


# ---------------------------------------------------------------- margins


def test_the_margin_is_the_strength_of_the_comparison_times_the_scale() -> None:
    said = Example("p", (Response("a"), Response("b"), Response("c")), comparisons=(Comparison(1, 0, 1.0, 3.0), Comparison(1, 2, 1.0)))
    tree = dataclasses.replace(tiny.tree(3, (2, 2, 2)), **judgements(said))
    values = torch.tensor([[0.5, 1.0, 0.0]], dtype=torch.float64)
    lose = lambda d: math.log1p(math.exp(-d))
    for knobs, margin in (({}, 0.0), ({"margin": "given"}, 3.0), ({"margin": "given", "margin_scale": 0.5}, 1.5)):
        given_knobs = PAIRWISE.knobs(**knobs)
        loss, _ = PAIRWISE.loss(Outputs(rewards=values), kept(PAIRWISE, [tree], given_knobs), given_knobs)
        assert loss.item() == pytest.approx((lose(0.5 - margin) + lose(1.0)) / 2)


# ---------------------------------------------------------------- imitation, C.5


def test_without_imitation_it_is_the_plain_loss_and_reads_no_language_head() -> None:
    for method in (PAIRWISE, POINTWISE, LISTWISE):
        assert not method.language_head(method.knobs()) and method.language_head(method.knobs(imitation=0.1))


@pytest.mark.parametrize("method", [PAIRWISE, POINTWISE, LISTWISE], ids=lambda m: m.name)
def test_imitation_is_the_mean_over_the_best_response_s_tokens_and_leaves_the_reward_head_alone(method: Method) -> None:
    """On a real model: with imitation the gradient of the reward head is that without; the language head and the backbone learn."""
    inner = tiny.model(seed=3, scale=2.0)
    model = RewardModel(inner)
    trees = [tiny.tree(3, (2, 6), seed=1), tiny.tree(4, (3, 1, 2), seed=2)]
    heads, losses = [], []
    for imitation in (0.0, 0.5):
        knobs = method.knobs(imitation=imitation)
        batch = kept(method, trees, knobs)
        model.zero_grad()
        said, token_logp = model.with_logprobs(batch)
        loss, metrics = method.loss(Outputs(rewards=said, token_logp=token_logp if imitation else None), batch, knobs)
        loss.backward()
        heads.append(model.head.weight.grad.clone())  # type: ignore[union-attr]
        losses.append(loss.item())
    torch.testing.assert_close(heads[1], heads[0], atol=0, rtol=0)
    assert inner.get_output_embeddings().weight.grad.abs().sum() > 0
    per_response = batch.per_response(token_logp.detach())
    nll = -(per_response[0, 0] / 2 + per_response[1, 0] / 3) / 2
    assert losses[1] - losses[0] == pytest.approx(0.5 * nll.item(), rel=1e-5)
    assert (metrics["nll"][0] / metrics["nll"][1]).item() == pytest.approx(nll.item())


# ---------------------------------------------------------------- annotators


def scored(annotator: str | None, *scores: float, prompt: str = "p") -> Example:
    return Example(prompt, tuple(Response(f"r{n}", score=s) for n, s in enumerate(scores)), annotator=annotator, where="d.jsonl:1")


BOTH = [scored("A", 0.9, 0.7, 0.8), scored("B", 0.6, 0.4, 0.5)]


@pytest.mark.parametrize(
    ("knobs", "a"),
    [
        ({}, [0.9, 0.7, 0.8]),
        ({"annotators": "zscore", "shrinkage": 0.0}, [1.224745, -1.224745, 0]),
        ({"annotators": "additive"}, [0.75, 0.55, 0.65]),
    ],
    ids=["none", "zscore", "additive"],
)
def test_lenient_and_strict_annotators_become_one(knobs: dict[str, Any], a: list[float]) -> None:
    assert POINTWISE.fit is not None
    change = POINTWISE.fit(BOTH, POINTWISE.knobs(**knobs))
    found = [[r.score for r in change(example).responses] for example in BOTH]
    assert found[0] == pytest.approx(a, abs=1e-6)
    assert found[1] == pytest.approx(a if knobs else [s - 0.3 for s in a], abs=1e-6)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("method", "knobs", "message"),
    [
        (PAIRWISE, {"margin_scale": 2.0}, "margin_scale` has no effect"),
        (PAIRWISE, {"margin": "given", "attributes": ("a",)}, "margin: given` and `attributes"),
        (PAIRWISE, {"pairs": "adjacent", "attributes": ("a",)}, "pairs` and `attributes"),
        (PAIRWISE, {"weights": {"b": 2.0}}, "weights` has `b`"),
        (POINTWISE, {"attributes": ("a", "a")}, "names one twice"),
        (POINTWISE, {"shrinkage": 2.0, "annotators": "additive"}, "shrinkage` has no effect"),
        (PAIRWISE, {"label_smoothing": 0.5}, "less than 0.5"),
        (POINTWISE, {"attributes": ("a",), "weights": {"a": 0.0}}, "greater than 0"),
    ],
)
def test_knobs_without_effect_are_refused(method: Method, knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method.knobs(**knobs)


PLAIN = [Example("p", (Response("a", rank=1), Response("b", rank=2)), where="d.jsonl:1")]


@pytest.mark.parametrize(
    ("method", "knobs", "examples", "words"),
    [
        (PAIRWISE, {"margin": "given"}, PLAIN, ("strength", "method.margin to none")),
        (
            POINTWISE,
            {"attributes": ("helpfull",)},
            [scored(None)] + [e for t in [{"helpful": 1.0}] for e in [scored(None, t)]],
            ("helpful?",),
        ),
        (PAIRWISE, {"attributes": ("x",)}, BOTH, ("`x`", "none")),
        (POINTWISE, {"annotators": "zscore"}, [scored(None, 1.0, 2.0)], ("annotator",)),
        (POINTWISE, {"annotators": "additive"}, [BOTH[0], scored("B", 1.0, prompt="another")], ("two annotators", "zscore")),
    ],
    ids=["margin", "attribute's name", "no attributes", "no annotator", "nothing shared"],
)
def test_what_the_records_lack_is_said(method: Method, knobs: dict[str, Any], examples: list[Example], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as raised:
        method.demands(examples, method.knobs(**knobs))
    assert all(word in str(raised.value) for word in words), raised.value
    assert str(raised.value).startswith("d.jsonl:1")


def test_what_is_there_is_not_refused() -> None:
    strong = [dataclasses.replace(PLAIN[0], comparisons=(Comparison(0, 1, 1.0, 2.0),))]
    PAIRWISE.demands(strong, PAIRWISE.knobs(margin="given"))
    for annotators in ("none", "zscore", "additive"):
        POINTWISE.demands(BOTH, POINTWISE.knobs(annotators=annotators))


def test_the_laws_reach_every_number_of_the_reward_rows() -> None:
    """The laws over the whole table move these off their defaults; what they cannot move is in VARIANTS."""
    moved = {name for method in (PAIRWISE, POINTWISE, LISTWISE) for name, value in knobs_of(method) if value not in (None, 0.0, ())}
    assert {"centering", "label_smoothing", "imitation"} <= moved
    asked = set(itertools.chain.from_iterable(knobs for _, knobs in VARIANTS.values()))
    assert {"margin", "margin_scale", "attributes", "weights", "mean_over_stages", "pairs"} <= asked


def test_the_score_s_attribute_is_the_packing_s() -> None:
    (tree,) = rated([[1.0, None]])
    assert set(tree.ratings) == {SCORE}
