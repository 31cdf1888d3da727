"""Scored records to training records."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from preftune.errors import UserError
from preftune.records import Example, Response
from preftune.selection import select
from preftune.selection.pairing import PAIRINGS


def record(*scores, name="a", texts=None) -> Example:
    texts = texts or [f"{name}{i}" for i in range(len(scores))]
    return Example("p", tuple(Response(t, score=s, rank=9) for t, s in zip(texts, scores, strict=True)), id=name, where=f"f:{name}")


FILE = [record(0.1, 0.9, 0.9, name="a"), record(3.0, 2.0, 1.0, name="b"), record(-1.0, -2.0, -3.0, name="c")]


def texts(found: select.Selected) -> list[list[str]]:
    return [[response.text for response in example.responses] for example in found.examples]


def test_best_top_threshold_and_the_global_share() -> None:
    assert texts(select.choose(FILE, select.best)) == [["a1"], ["b0"], ["c0"]]
    assert texts(select.choose(FILE, select.top(2))) == [["a1", "a2"], ["b0", "b1"], ["c0", "c1"]]
    found = select.choose(FILE, select.threshold(0.9))
    assert texts(found) == [["a1", "a2"], ["b0", "b1", "b2"]] and found.prompts_without == 1
    assert found.before.mean() == pytest.approx(np.mean([0.1, 0.9, 0.9, 3, 2, 1, -1, -2, -3])) and len(found.after) == 5
    assert texts(select.raft(FILE, 1 / 3)) == [["b0", "b1", "b2"]]
    assert all(r.rank is None for e in found.examples for r in e.responses), "a rank among responses that are gone says nothing"


def test_rejection_takes_equal_texts_once_and_hangs_on_seed_and_record_alone() -> None:
    doubled = record(1.0, 1.0, 0.0, name="d", texts=["x", "x", "y"])
    assert sorted(texts(select.choose([doubled], select.rso(3, 1.0, 0)))[0]) == ["x", "y"]
    many = [record(*np.linspace(0, 1, 9).tolist(), name=str(i)) for i in range(6)]
    there, back = (texts(select.choose(order, select.rso(4, 0.5, 3))) for order in (many, many[::-1]))
    assert there == back[::-1] and there != texts(select.choose(many, select.rso(4, 0.5, 4)))


@pytest.mark.parametrize(("how", "meetings"), [("first_round", 4), ("tournament", 7), ("all", 28), ("best_worst", 1)])
def test_pairs_of_eight(how: str, meetings: int) -> None:
    """Methods G.5."""
    found = select.pairs([record(*map(float, range(8)))], how)
    assert len(found.examples) == meetings and len({e.id for e in found.examples}) == meetings
    assert all(e.responses[0].score > e.responses[1].score and [r.rank for r in e.responses] == [1, 2] for e in found.examples)
    assert not select.pairs([record(1.0, 1.0, 1.0)], how).examples and select.pairs([record(1.0)], how).prompts_without == 1


def test_the_winner_of_a_tournament_is_the_best_and_meets_all_comers() -> None:
    for seed in range(20):
        scores = np.random.default_rng(seed).permutation(11).astype(float).tolist()
        played = PAIRINGS["tournament"](scores, np.random.default_rng(seed))
        losers = {worse for _, worse in played}
        assert len(played) == 10 and set(range(11)) - losers == {int(np.argmax(scores))}


CHOICES = {
    "best": lambda file: select.choose(file, select.best),
    "top": lambda file: select.choose(file, select.top(2)),
    "threshold": lambda file: select.choose(file, select.threshold(-9.0)),
    "raft": lambda file: select.raft(file, 0.5),
    "rso": lambda file: select.choose(file, select.rso(3, 1.0, 0)),
    **{how: lambda file, how=how: select.pairs(file, how) for how in PAIRINGS},
}


@pytest.mark.parametrize("how", CHOICES)
def test_a_response_without_a_score_is_never_chosen_and_is_counted(how: str) -> None:
    """What is chosen is what would be without it; a prompt that has no other response is left with nothing."""
    some = [record(0.1, None, 0.9, name="a"), record(None, 2.0, 1.0, 3.0, name="b"), record(None, name="c")]
    kept = [replace(e, responses=tuple(r for r in e.responses if r.score is not None)) for e in some]
    found, alone = CHOICES[how](some), CHOICES[how](kept)
    assert texts(found) == texts(alone) and found.after.tolist() == alone.after.tolist() and len(found.before) == 5
    assert (found.unscored, alone.unscored) == (3, 0) and found.prompts_without == alone.prompts_without >= 1
    assert "c0" not in {text for one in texts(found) for text in one}


def test_a_file_without_scores_is_named_and_so_is_a_score_that_is_no_number() -> None:
    with pytest.raises(UserError, match=r"no response has a score.*preftune score") as told:
        select.choose([record(None, None)], select.best)
    assert told.value.where == "f:a"
    with pytest.raises(UserError, match="response 2 has the score nan"):
        select.choose([record(1.0, float("nan"))], select.best)
    with pytest.raises(UserError, match="Name one with --by: helpful"):
        select.choose([record({"helpful": 1.0})], select.best)
    with pytest.raises(UserError, match="no response has a score of 'safe'"):
        select.choose([record({"helpful": 1.0})], select.best, by="safe")
    assert texts(select.choose([record({"helpful": 1.0}, {"helpful": 2.0})], select.best, by="helpful")) == [["a1"]]
