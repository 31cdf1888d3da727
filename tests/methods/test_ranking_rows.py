"""The rows that learn rankings: what they keep of a record, whose order they follow, and losses by hand on packed batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from pydantic import ValidationError
from torch import Tensor

from preftune.errors import UserError
from preftune.methods import KEEP_REASONS, METHODS, Knobs, Method, Outputs
from preftune.methods.base import keep_ranked
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel
from preftune.packing.batch import Totals, collate
from preftune.packing.chat import SCORE, Tree, judgements
from preftune.records import Comparison, Example, Response
from preftune.training.setup import require
from tests import tiny
from tests.methods.test_laws import Table, assert_same, forests, step

NAN = float("nan")
PRO = METHODS["pro"]
GAPS = PRO.knobs(temperatures="score_gaps")
ROWS = [METHODS[name] for name in ("rrhf", "pro", "knowpat", "dpo_listwise")]
every_row = pytest.mark.parametrize("method", ROWS, ids=lambda method: method.name)
WITH_GAPS = dataclasses.replace(  # the laws know no choices among knobs
    PRO,
    name="pro with gaps",
    keep=lambda tree, knobs: PRO.keep(tree, GAPS),
    loss=lambda out, batch, knobs: PRO.loss(out, batch, GAPS.model_copy(update={"sft_weight": knobs.sft_weight})),
)


def judged(*responses: Response, comparisons: tuple[Comparison, ...] = (), sizes: Sequence[int] = ()) -> Tree:
    """A tree of which people said this."""
    shape = tiny.tree(3, tuple(sizes) or tuple(range(1, len(responses) + 1)), name="record")
    return dataclasses.replace(shape, **{"ratings": {}, **judgements(Example("p", responses, comparisons=comparisons))})


def kept(method: Method, tree: Tree, knobs: Knobs | None = None) -> Tree:
    told = method.keep(tree, knobs or method.knobs())
    assert isinstance(told, Tree), told
    return told


def loss_of(method: Method, trees: Sequence[Tree], tokens: Tensor, knobs: Knobs | None = None, reference: Tensor | None = None) -> Tensor:
    """The loss of one step on trees that were kept, from [M] log-probabilities."""
    batch = collate(trees, reduction=method.reduction)
    reference = torch.zeros(batch.present.shape, dtype=torch.float64) if reference is None else reference
    out = Outputs(token_logp=tokens, reference_logp=reference if method.reference else None)
    return method.loss(out, batch, knobs or method.knobs())[0]


def some_tokens(trees: Sequence[Tree], seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return -torch.rand(sum(t.response_tokens for t in trees), generator=random, dtype=torch.float64) * 3


# ---------------------------------------------------------------- what is kept


def test_a_ranking_keeps_what_has_a_place_in_it_and_scores_become_levels() -> None:
    tree = dataclasses.replace(tiny.tree(3, (2, 4, 5, 6)), scores=np.array([0.5, NAN, 7.0, 0.5]))
    told = keep_ranked(tree, None)
    assert isinstance(told, Tree) and told.scores.tolist() == [0, 1, 0]
    assert [len(r) for r in told.responses] == [2, 5, 6]


def test_scores_that_single_precision_cannot_tell_apart_are_still_a_ranking() -> None:
    tree = dataclasses.replace(tiny.tree(3, (2, 4)), scores=np.array([1e9, 1e9 + 1]))
    assert collate([kept(METHODS["rrhf"], tree)]).better.any()


@every_row
@pytest.mark.parametrize(
    "tree",
    [
        judged(Response("r", score=1.0)),
        judged(Response("r", rank=1), Response("r", rank=1), Response("r", rank=1)),
        judged(Response("r", score=2.0), Response("r", score=2.0), Response("r")),
        judged(Response("r"), Response("r")),
        judged(*[Response("r")] * 3, comparisons=(Comparison(0, 1, 0.5),)),
        judged(*[Response("r")] * 3, comparisons=(Comparison(0, 1), Comparison(1, 2), Comparison(2, 0))),
    ],
    ids=["one response", "ties", "ties and one unknown", "nothing said", "a tie of people", "people in a circle"],
)
def test_a_record_without_a_ranking_is_refused_by_that_name(method: Method, tree: Tree) -> None:
    assert method.keep(tree, method.knobs()) == "no_ranking" and "ranks, scores or comparisons" in KEEP_REASONS["no_ranking"]


def test_score_gaps_take_numeric_scores_as_they_are_and_as_the_order() -> None:
    """Whatever the ranks say; `overall` where scores have names; a response without a score is left out."""
    plain = judged(Response("r", rank=1, score=1.5), Response("r", rank=2, score=4.0), Response("r", rank=3))
    told = kept(PRO, plain, GAPS)
    assert told.scores.tolist() == [0, 1] and told.rated is not None and told.rated.tolist() == [[-2.5], [0]]
    assert kept(PRO, plain).scores.tolist() == [2, 1, 0] and kept(PRO, plain).rated is None
    by_name = judged(Response("r", score={"overall": 3.0, "harm": 9.0}), Response("r", score={"overall": 5.0}))
    assert kept(PRO, by_name, GAPS).rated.tolist() == [[-2], [0]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "tree",
    [
        judged(Response("r", rank=1), Response("r", rank=2)),
        judged(Response("r", rank=1, score=3.0), Response("r", rank=2, score=3.0)),
        judged(Response("r", rank=1, score=3.0), Response("r", rank=2)),
        judged(Response("r", score={"harm": 1.0}), Response("r", score={"harm": 2.0})),
    ],
    ids=["ranks", "equal scores", "one score", "no overall score"],
)
def test_score_gaps_need_scores_that_differ(tree: Tree) -> None:
    assert PRO.keep(tree, GAPS) == "no_score_gaps"


def test_missing_scores_are_said_before_a_model_is_loaded() -> None:
    ranks = Example("p", (Response("a", rank=1), Response("b", rank=2)), where="pairs.jsonl:1")
    require(PRO, PRO.knobs(), [ranks], "pairs.jsonl")
    with pytest.raises(UserError, match=r"^pairs.jsonl:1: .* no numeric scores .* set `method.temperatures` to none") as told:
        require(PRO, GAPS, [ranks], "pairs.jsonl")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("rrhf", {"weight": 0.0}), ("rrhf", {"sft_reduction": "max"}), ("pro", {"temperatures": "scores"}), ("knowpat", {"weight": -1.0})],
)
def test_knobs_out_of_their_range_are_refused(name: str, wrong: dict) -> None:
    with pytest.raises(ValidationError):
        METHODS[name].knobs(**wrong)


# ---------------------------------------------------------------- whose order


SAYINGS = {
    "ranks": judged(Response("r", rank=2), Response("r", rank=1), Response("r", rank=3)),
    "scores": judged(Response("r", score=-0.5), Response("r", score=7.0), Response("r", score=-8.0)),
    "named scores": judged(*(Response("r", score={"overall": s, "harm": -s}) for s in (2.0, 3.0, 1.0))),
    "comparisons": judged(*[Response("r")] * 3, comparisons=(Comparison(1, 0), Comparison(0, 2), Comparison(2, 1, 0.0))),
}


@every_row
def test_ranks_scores_and_all_comparisons_say_the_same(method: Method) -> None:
    tokens = some_tokens([SAYINGS["ranks"]])
    found = {said: loss_of(method, [kept(method, tree)], tokens).item() for said, tree in SAYINGS.items()}
    assert len(set(found.values())) == 1, found


def test_rrhf_compares_only_what_people_compared() -> None:
    """0 beats 1 and 2 beats 3, nothing else: 3 is likelier than 0 and that costs nothing. Both winners are best."""
    tree = judged(*[Response("r")] * 4, comparisons=(Comparison(0, 1), Comparison(2, 3)), sizes=(1, 1, 1, 1))
    tokens = torch.tensor([-2.0, -3.0, -4.0, -1.0], dtype=torch.float64)
    assert loss_of(METHODS["rrhf"], [kept(METHODS["rrhf"], tree)], tokens).item() == pytest.approx((4 - 1) + (2 + 4) / 2)


def test_rrhf_follows_the_majority_of_a_pair() -> None:
    """Two of three people prefer the first: the pair counts whole; one of two would be a tie."""
    votes = (Comparison(0, 1), Comparison(0, 1), Comparison(0, 1, 0.0))
    tree = judged(*[Response("r")] * 2, comparisons=votes, sizes=(1, 1))
    for p, expected in (((-3.0, -1.0), 2 + 3), ((-1.0, -3.0), 0 + 1)):
        tokens = torch.tensor(p, dtype=torch.float64)
        assert loss_of(METHODS["rrhf"], [kept(METHODS["rrhf"], tree)], tokens).item() == pytest.approx(expected)


@pytest.mark.parametrize("method", ROWS[1:], ids=lambda method: method.name)
def test_the_others_follow_the_ranking_that_comparisons_make(method: Method) -> None:
    """0 beats 1 and 2 beats 3: two are best and two are worst, and each of the best meets both of the worst."""
    said = judged(*[Response("r")] * 4, comparisons=(Comparison(0, 1), Comparison(2, 3)))
    ranks = judged(*(Response("r", rank=rank) for rank in (1, 2, 1, 2)))
    tokens = some_tokens([said])
    assert loss_of(method, [kept(method, said)], tokens).item() == loss_of(method, [kept(method, ranks)], tokens).item()


@pytest.mark.parametrize("method", [*ROWS, WITH_GAPS], ids=lambda method: method.name)
@given(trees=forests())
@settings(deadline=None, max_examples=25)
def test_the_order_of_responses_does_not_matter_where_several_are_best(method: Method, trees: list[Tree]) -> None:
    """The law over all rows gives each record one best response; these rows need none."""
    table = Table.of(trees)
    reversed_ = {t.id: list(range(len(t.responses)))[::-1] for t in trees}
    assert_same(step(method, table, [trees], orders=reversed_), step(method, table, [trees]))


@given(trees=forests())
@settings(deadline=None, max_examples=25)
def test_regression_01_with_score_gaps_too_any_cut_gives_the_same_gradient(trees: list[Tree]) -> None:
    table = Table.of(trees)
    assert_same(step(WITH_GAPS, table, [[tree] for tree in trees]), step(WITH_GAPS, table, [trees]))


# ---------------------------------------------------------------- by hand


def test_regression_39_rrhf_by_hand_on_two_records_of_three() -> None:
    """Every record's pairs count, also where the best stands first, and fine-tuning is a mean over the response's own tokens.

    Record 1, best first: means (-1, -.5, -2), so .5 for the second that is likelier than the first; its best: 1 a token, 2 in all.
    Record 2, in the order 2, 3, 1: means (-.25, -2, -1), so 1.75 + 1 + .75; its best: 2 a token, 4 in all.
    """
    first = judged(Response("r", score=3.0), Response("r", score=2.0), Response("r", score=1.0), sizes=(2, 4, 1))
    second = judged(Response("r", score=1.0), Response("r", score=3.0), Response("r", score=2.0), sizes=(1, 2, 3))
    tokens = torch.tensor([-0.5, -1.5, -0.25, -0.75, -0.5, -0.5, -2, -0.25, -3, -1, -0.5, -1, -1.5], dtype=torch.float64)
    row = METHODS["rrhf"]
    trees = [kept(row, first), kept(row, second)]
    assert loss_of(row, trees, tokens).item() == pytest.approx(((0.5 + 1) + (3.5 + 2)) / 2, rel=1e-7)
    assert loss_of(row, trees, tokens, row.knobs(sft_reduction="sum")).item() == pytest.approx(((0.5 + 2) + (3.5 + 4)) / 2, rel=1e-7)
    assert loss_of(row, trees, tokens, row.knobs(weight=2.0)).item() == pytest.approx(((1 + 1) + (7 + 2)) / 2, rel=1e-7)


@pytest.mark.parametrize("method", ROWS[:3], ids=lambda method: method.name)
def test_regression_41_every_token_of_a_response_counts_alike_to_the_last(method: Method) -> None:
    """A shifted mask drops the last token, which ends the turn, of the longest response alone."""
    tree = kept(method, judged(*(Response("r", rank=r) for r in (2, 1, 3)), sizes=(3, 6, 4)))
    tokens = torch.tensor([-0.5] * 3 + [-2.0] * 6 + [-1.0] * 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss_of(method, [tree], tokens), tokens)
    for part in slope.split([3, 6, 4]):
        assert part.unique().numel() == 1
    assert (slope[:9] != 0).all()


def test_the_first_loss_of_listwise_dpo_counts_who_competes() -> None:
    """ln 4! without ties; of (1, 2, 2, 3) the first competes with 4 and each of the two with the last; the mean of both records."""
    row = METHODS["dpo_listwise"]
    strict = judged(*(Response("r", rank=r) for r in (3, 1, 2, 4)))
    tied = judged(*(Response("r", rank=r) for r in (1, 2, 2, 3)))
    assert row.first_loss([kept(row, strict)], row.knobs()) == pytest.approx(math.log(24))
    assert row.first_loss([kept(row, tied)], row.knobs()) == pytest.approx(math.log(4 * 2 * 2))
    trees = [kept(row, strict), kept(row, tied)]
    tokens = some_tokens(trees)
    reference = collate(trees).per_response(tokens)
    expected = (math.log(24) + math.log(16)) / 2
    assert row.first_loss(trees, row.knobs()) == pytest.approx(expected)
    assert loss_of(row, trees, tokens, reference=reference).item() == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- on a real model


@pytest.mark.parametrize("method", [*ROWS[:3], WITH_GAPS], ids=lambda method: method.name)
def test_regression_38_neither_padding_nor_batch_mates_change_a_record_s_loss(method: Method) -> None:
    """A length that counts padding changes with the longest of the batch: alone, beside a long mate, packed and as padded rows."""
    inner = tiny.model(seed=5, scale=2.0)
    inner.set_attn_implementation(NAME)
    trees = [kept(method, tiny.tree(p, sizes, seed=i)) for i, (p, sizes) in enumerate([(4, (3, 5, 2)), (9, (31, 2, 17, 24)), (2, (1, 8))])]
    losses = []
    with torch.no_grad():
        for packed in (True, False):
            model = LanguageModel(inner, packed=packed)
            for count in (1, 2, 3):
                for mates in itertools.permutations(trees[1:], count - 1):
                    batch = collate([trees[0], *mates], Totals.of(trees[:1]), method.reduction)
                    alone = dataclasses.replace(batch, prompt_weight=torch.tensor([1.0] + [0.0] * (count - 1)))
                    losses.append(method.loss(Outputs(token_logp=model(alone)), alone, method.knobs())[0].item())
    assert len(losses) == 10 and losses == pytest.approx([losses[0]] * 10, rel=1e-5)


def test_the_bundled_rankings_serve_every_row() -> None:
    """Each of the hundred records is kept by each of the rows, with gaps too."""
    from preftune.formats import read

    for example in read("sample:kwise").examples:
        tree = judged(*example.responses)
        assert SCORE in tree.ratings
        for method in [*ROWS, WITH_GAPS]:
            assert isinstance(method.keep(tree, method.knobs()), Tree)
