"""Laws that hold for every row of the table of methods, so that a new row is tested before its author writes a test.

Most are checked exactly, in float64, on tables of log-probabilities and rewards that stand for a model; two on a tiny real one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.methods import KEEP_REASONS, METHODS, Method, Outputs
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel, RewardModel
from preftune.objectives.metrics import Metrics
from preftune.packing.batch import Batch, Totals, collate
from preftune.packing.chat import SCORE, Tree, judgements
from preftune.records import Comparison, Example, Response
from tests import tiny
from tests.oracles import losses as oracle

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def knobs_of(method: Method) -> Any:
    """Knobs off their defaults, so that a term which is off by default is under the law too."""
    numbers = {name: field.default + 0.3 for name, field in method.knobs.model_fields.items() if isinstance(field.default, float)}
    return method.knobs(**numbers)


# ---------------------------------------------------------------- a table that stands for a model


@dataclasses.dataclass
class Table:
    """What a model would say of each record's responses: leaves of the loss, by record id, in the order of the record's responses."""

    token_logp: dict[str, list[Tensor]]
    reward: dict[str, Tensor]
    reference: dict[str, Tensor]

    @staticmethod
    def of(trees: Sequence[Tree], seed: int = 0) -> Table:
        random = torch.Generator().manual_seed(seed)
        draw = lambda n: torch.randn(n, generator=random, dtype=torch.float64)
        return Table(
            {t.id: [(-draw(len(r)).abs()).requires_grad_() for r in t.responses] for t in trees},
            {t.id: draw(len(t.responses)).requires_grad_() for t in trees},
            {t.id: 3 * draw(len(t.responses)) for t in trees},
        )

    def leaves(self) -> list[Tensor]:
        return [*(one for many in self.token_logp.values() for one in many), *self.reward.values()]

    def outputs(self, batch: Batch, trees: Sequence[Tree], rows: dict[str, list[int]] | None = None, absent: float = 0.0) -> Outputs:
        """As the models would give it; `rows[id]` names each response's place in the table, `absent` fills what is not there."""
        rows = rows or {t.id: list(range(len(t.responses))) for t in trees}

        def grid(values: dict[str, Tensor]) -> Tensor:
            heads = next(iter(values.values())).shape[1:]
            full = torch.full((*batch.present.shape, *heads), absent, dtype=torch.float64)
            return torch.stack([torch.cat([values[t.id][rows[t.id]], full[g, len(t.responses) :]]) for g, t in enumerate(trees)])

        tokens = torch.cat([self.token_logp[t.id][n] for t in trees for n in rows[t.id]])
        return Outputs(token_logp=tokens, rewards=grid(self.reward), reference_logp=grid(self.reference))


SURVEYED = oracle.SURVEYED
"""What a survey found, where a method makes one: the laws hold for any number."""


def only_needed(method: Method, out: Outputs, knobs: Any = None) -> Outputs:
    """What the row says it needs; the rest is not there to be read."""
    knobs = knobs or method.knobs()
    return Outputs(
        token_logp=out.token_logp if method.model == "policy" or method.language_head(knobs) else None,
        rewards=out.rewards if method.model == "reward" else None,
        reference_logp=out.reference_logp if method.compares(knobs) else None,
        survey=SURVEYED if method.survey else None,
    )


Result = tuple[float, list[Tensor], dict[str, float]]


def step(
    method: Method,
    table: Table,
    parts: Sequence[Sequence[Tree]],
    *,
    orders: dict[str, list[int]] | None = None,
    absent: float = 0.0,
    knobs: Any = None,
) -> Result:
    """Loss, gradients of the table and metrics of one step on records cut into micro-batches.

    `orders[id]` says in which order a record lists its responses; the table stays as it was.
    """
    knobs = knobs or knobs_of(method)
    kept, rows = [], {}
    for part in parts:
        kept.append([])
        for tree in part:
            order = (orders or {}).get(tree.id, list(range(len(tree.responses))))
            told = method.keep(named(tree).keep(order), knobs)
            assert isinstance(told, Tree)
            rows[tree.id] = [int(r[0]) for r in told.responses]
            kept[-1].append(dataclasses.replace(told, responses=tuple(r[1:] for r in told.responses)))
    totals = Totals.of([t for part in kept for t in part])
    loss, sums = torch.zeros((), dtype=torch.float64), {}
    for part in (part for part in kept if part):
        batch = collate(part, totals, method.reduction)
        one, metrics = method.loss(only_needed(method, table.outputs(batch, part, rows, absent), knobs), batch, knobs)
        loss = loss + one
        for name, ratio in metrics.items():
            for end, value in zip(("above", "below"), ratio, strict=True):
                sums[f"{name} {end}"] = sums.get(f"{name} {end}", 0.0) + value.item()
    leaves = table.leaves()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return loss.item(), [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)], sums


def named(tree: Tree) -> Tree:
    """The tree with each response's place in the table as its first token, to be followed through `keep`."""
    return dataclasses.replace(tree, responses=tuple(np.concatenate([[n], r]) for n, r in enumerate(tree.responses)))


def assert_same(ours: Result, theirs: Result) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-9, abs=1e-12)
    assert sum(float(g.abs().sum()) for g in theirs[1]) > 0
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-9, rtol=1e-7)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-6, abs=1e-9)


@st.composite
def forests(draw) -> list[Tree]:
    """Two to five records of two to four responses, ranked with ties or compared by people; each has something that is preferred."""
    trees = []
    for i in range(draw(st.integers(2, 5))):
        sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
        n = len(sizes)
        ranks = [1, 2, *draw(st.lists(st.integers(1, 3), min_size=n - 2, max_size=n - 2))]
        said = (Comparison(0, 1, 0.75), Comparison(n - 1, 0, 0.25)) if draw(st.booleans()) else ()
        responses = tuple(Response("r", rank=rank, score=2.0 - rank, label=rank == 1) for rank in ranks)
        shape = tiny.tree(draw(st.integers(1, 4)), tuple(sizes), seed=i, name=f"record {i}")
        trees.append(dataclasses.replace(shape, **judgements(Example("p", responses, comparisons=said))))
    return trees


# ---------------------------------------------------------------- laws on tables


@every_method
@given(forests(), st.data())
@settings(deadline=None, max_examples=40)
def test_regression_01_any_cut_into_micro_batches_gives_the_same_gradient(method: Method, trees: list[Tree], data) -> None:
    table = Table.of(trees)
    at = data.draw(st.lists(st.integers(0, 4), min_size=len(trees), max_size=len(trees)))
    parts = [[t for t, part in zip(trees, at, strict=True) if part == p] for p in range(5)]
    assert_same(step(method, table, parts), step(method, table, [trees]))


@every_method
@given(forests(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_the_order_of_responses_and_of_prompts_does_not_matter(method: Method, trees: list[Tree], random) -> None:
    """Where two responses are equally good, either may be the one that is kept: such records are given one that is best."""
    trees = [only_one_best(tree) for tree in trees]
    table = Table.of(trees)
    orders = {t.id: random.sample(range(len(t.responses)), len(t.responses)) for t in trees}
    shuffled = random.sample(trees, len(trees))
    assert_same(step(method, table, [shuffled], orders=orders), step(method, table, [trees]))


def only_one_best(tree: Tree) -> Tree:
    """A ranking with one best response, the rest as it was."""
    scores, preference = tree.scores.copy(), tree.preference.copy()
    scores[0] = np.nanmax(scores) + 1
    preference[0, 1:], preference[1:, 0] = 1, 0
    return dataclasses.replace(tree, scores=scores, preference=preference)


@every_method
@pytest.mark.parametrize("absent", [-1e3, 7.0, 1e3])
def test_an_absent_response_changes_nothing(method: Method, absent: float) -> None:
    """Whatever stands in the grid where a prompt has no response; nor does it matter that another prompt has more of them."""
    trees = [tiny.tree(3, (2, 4), seed=1), tiny.tree(2, (1, 3, 2, 5), seed=2), tiny.tree(4, (3, 1), seed=3)]
    table = Table.of(trees)
    alone = step(method, table, [[tree] for tree in trees], absent=0.0)
    assert_same(step(method, table, [trees], absent=absent), alone)


@every_method
def test_a_row_needs_what_it_says(method: Method) -> None:
    """Without any one of the things it names it cannot compute; all laws here run without the others."""
    trees = [t for t in (method.keep(tiny.tree(3, (2, 4), seed=s), method.knobs()) for s in range(2)) if isinstance(t, Tree)]
    batch = collate(trees, reduction=method.reduction)
    out = only_needed(method, Table.of(trees).outputs(batch, trees))
    named_needs = [name for name, value in vars(out).items() if value is not None]
    assert named_needs
    method.loss(out, batch, method.knobs())
    for name in named_needs:
        with pytest.raises((AssertionError, TypeError)):
            method.loss(dataclasses.replace(out, **{name: None}), batch, method.knobs())


@every_method
def test_a_record_that_lacks_what_the_row_needs_is_named_not_trained_on(method: Method) -> None:
    """One response, ties and unknown order either serve the method or are refused under a reason that is explained."""
    bare = dataclasses.replace(tiny.tree(3, (2, 4)), scores=np.full(2, np.nan), preference=np.zeros((2, 2)))
    for tree in (bare, bare.keep([0]), dataclasses.replace(bare, scores=np.zeros(2))):
        told = method.keep(tree, method.knobs())
        if isinstance(told, str):
            assert told in KEEP_REASONS
            continue
        batch = collate([told], reduction=method.reduction)
        table = Table.of([told])
        loss, _ = method.loss(only_needed(method, table.outputs(batch, [told])), batch, method.knobs())
        found = torch.autograd.grad(loss, table.leaves(), allow_unused=True)
        assert loss.isfinite() and any(g is not None and g.abs().sum() > 0 for g in found)


@every_method
def test_metrics_have_no_gradient_and_the_one_that_judges_is_there(method: Method) -> None:
    trees = [t for t in (method.keep(tiny.tree(3, (2, 4), seed=s), method.knobs()) for s in range(2)) if isinstance(t, Tree)]
    batch = collate(trees, reduction=method.reduction)
    out = only_needed(method, Table.of(trees).outputs(batch, trees))
    loss, metrics = method.loss(out, batch, method.knobs())
    assert loss.requires_grad and not any(part.requires_grad for ratio in metrics.values() for part in ratio)
    assert method.better[0] in {"loss", *metrics}


# ---------------------------------------------------------------- golden losses


GOLDEN = json.loads(oracle.FILE.read_text(encoding="utf-8"))


def test_every_method_has_a_golden_loss_and_the_oracle_still_gives_it() -> None:
    assert {case["method"] for case in GOLDEN["losses"]} == set(METHODS)
    assert all(any(case["method"] == name and not case["knobs"] for case in GOLDEN["losses"]) for name in METHODS)
    assert oracle.golden() == GOLDEN, "run python -m tests.oracles.losses"


@pytest.mark.parametrize("case", GOLDEN["losses"], ids=lambda case: f"{case['method']} {case['knobs'] or ''}")
def test_golden_loss(case: dict[str, Any]) -> None:
    method = METHODS[case["method"]]
    trees, table = [], Table({}, {}, {})
    for i, row in enumerate(GOLDEN["records"]):
        sizes = tuple(len(tokens) for tokens in row["logps"])
        said = zip(row["ranks"], row["scores"], row["labels"], strict=True)
        example = Example("p", tuple(Response("r", rank=rank, score=score, label=label) for rank, score, label in said))
        trees.append(dataclasses.replace(tiny.tree(2, sizes, name=str(i)), **judgements(example)))
        table.token_logp[str(i)] = [torch.tensor(tokens, dtype=torch.float64) for tokens in row["logps"]]
        table.reward[str(i)] = torch.tensor(row["rewards"], dtype=torch.float64)
        table.reference[str(i)] = torch.tensor(row["reference"], dtype=torch.float64)
    knobs = method.knobs(**case["knobs"])
    kept = [method.keep(named(t), knobs) for t in trees]
    rows = {t.id: [int(r[0]) for r in t.responses] for t in kept if isinstance(t, Tree)}
    bare = [dataclasses.replace(t, responses=tuple(r[1:] for r in t.responses)) for t in kept if isinstance(t, Tree)]
    batch = collate(bare, reduction=method.reduction)
    loss, _ = method.loss(only_needed(method, table.outputs(batch, bare, rows), knobs), batch, knobs)
    assert len(bare) == len(trees) and loss.item() == pytest.approx(case["loss"], rel=1e-6)


# ---------------------------------------------------------------- laws on a real model


def models(method: Method) -> tuple[LanguageModel | RewardModel, LanguageModel]:
    """A model for this row and a frozen copy of its policy, as training starts."""
    pair = [tiny.model(seed=3, scale=2.0) for _ in range(2)]
    for inner in pair:
        inner.set_attn_implementation(NAME)
    torch.manual_seed(0)
    return (RewardModel(pair[0]) if method.model == "reward" else LanguageModel(pair[0])), LanguageModel(pair[1]).requires_grad_(False)


def loss_of(method: Method, model: LanguageModel | RewardModel, reference: LanguageModel, batch: Batch) -> tuple[Tensor, Metrics]:
    said = model(batch)
    out = Outputs(
        token_logp=said if method.model == "policy" else None,
        rewards=said if method.model == "reward" else None,
        reference_logp=batch.per_response(reference(batch)).detach() if method.compares(method.knobs()) else None,
        survey=0.0 if method.survey else None,
    )
    return method.loss(out, batch, method.knobs())


@every_method
def test_regression_01_a_real_model_gets_one_gradient_however_it_accumulates(method: Method) -> None:
    """(4, 1), (2, 2) and (1, 4) micro-batches of ragged records, after a step away from the reference."""
    model, reference = models(method)
    kept = [
        method.keep(tiny.tree(p, rs, seed=i), method.knobs())
        for i, (p, rs) in enumerate([(3, (9, 2)), (7, (1, 4, 6)), (12, (3, 3)), (2, (14, 5))])
    ]
    trees = [t for t in kept if isinstance(t, Tree)]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    found = []
    for size in (4, 2, 1):
        model.zero_grad()
        for at in range(0, len(trees), size):
            loss_of(method, model, reference, collate(trees[at : at + size], Totals.of(trees), method.reduction))[0].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 10
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, grad in found[0].items():
            size = grad.abs().max().clamp(min=1e-6)
            torch.testing.assert_close(other[name] / size, grad / size, atol=1e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@every_method
def test_training_makes_the_preferred_response_likelier(method: Method) -> None:
    """Best against worst, in reward or in log-probability, in each record; and the method's own loss falls from where theory has it.

    Ratings lie further apart than the rewards of an untrained model, so that learning them is raising the better one too.
    """
    model, reference = models(method)
    raw = [tiny.tree(5, (4, 6), seed=1), tiny.tree(8, (7, 3, 5), seed=2), tiny.tree(3, (5, 5), seed=3)]
    raw = [dataclasses.replace(tree, ratings={SCORE: 3 * tree.scores}) for tree in raw]
    trees = [t for t in (method.keep(r, method.knobs()) for r in raw) if isinstance(t, Tree)]
    batch, everything = collate(trees, reduction=method.reduction), collate(raw)

    @torch.no_grad()
    def lead() -> Tensor:
        said = model(everything)
        values = said if method.model == "reward" else everything.per_response(said)
        return torch.stack([values[g, 0] - values[g, len(t.responses) - 1] for g, t in enumerate(raw)])

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before, losses, judged = lead(), [], []
    for _ in range(30):
        loss, metrics = loss_of(method, model, reference, batch)
        losses.append(loss.item())
        name = method.better[0]
        judged.append(loss.item() if name == "loss" else (metrics[name][0] / metrics[name][1]).item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (lead() > before).all()
    assert losses[-1] < 0.5 * losses[0]
    assert judged[-1] < judged[0] if method.better[1] == "min" else judged[-1] == max(judged) > 0.99
    expected = method.first_loss(trees, method.knobs())
    if expected is not None:
        assert losses[0] == pytest.approx(expected, abs=1e-6)
