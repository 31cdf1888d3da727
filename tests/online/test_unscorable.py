"""A response that the judge cannot score is nowhere: with it a rollout teaches what it would teach without, whatever the method."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preftune.online.experience import Experience
from preftune.online.judging import Judged
from preftune.online.methods import ONLINE
from preftune.online.run import OnlineRun
from preftune.records import Example
from preftune.rewards.judge import Opened
from tests import tiny
from tests.online import small
from tests.online.test_options import rule
from tests.online.test_whole import gradient
from tests.training import runs

CASES = {
    **{name: (name, ()) for name in ONLINE},
    "ppo, k steps, plain": ("ppo", ("method.k_step=2", "method.whiten=false", "method.whiten_rewards=true")),
    "ppo, shared": ("ppo", ("method.critic=shared",)),
    "ppo, masked": ("ppo", ("method.missing_eos=mask", "method.normalise=running")),
    "reinforce++, plain": ("reinforce++", ("method.whiten=false", "method.entropy=0.1")),
    "reinforce++_baseline, reward": ("reinforce++_baseline", ("method.kl_loss=reward",)),
    "grpo, responses": ("grpo", ("method.weigh=response", "method.kl=0.2")),
    "grpo, budget": ("grpo", ("method.weigh=budget", "method.scale=none", "method.overlong=4")),
    "grpo, batch": ("grpo", ("method.scale=batch", "method.entropy=0.1")),
    "grpo, dense": ("grpo", ("dense.words.use={place}/rule.py:rule", "dense.words.per=clause")),
    "ppo, dense": ("ppo", ("dense.words.use={place}/rule.py:rule", "dense.words.per=clause")),
}


def judge(unknown: Callable[[int, Example], Sequence[int]]) -> Opened:
    """The rule of `small`, and None for those responses of a record that `unknown` names."""
    own: dict[str, Any] = {}
    exec(small.RULE, own)  # as the run would import it

    def said(examples: Sequence[Example]) -> list[list[float | None]]:
        found = []
        for at, example in enumerate(examples):
            left = set(unknown(at, example)) if len(example.responses) > 1 else set()
            found.append([None if n in left else own["rule"](example, r) for n, r in enumerate(example.responses)])
        return found

    return Opened(said, {})


def collect(run: OnlineRun, unknown: Callable[[int, Example], Sequence[int]]) -> Experience:
    run.collector.judging.judges.judge = judge(unknown)
    return small.rollout(run)


@pytest.mark.parametrize("case", CASES)
def test_with_a_response_that_cannot_be_scored_a_rollout_teaches_what_it_would_without(case: str, place: Path, tmp_path: Path) -> None:
    """Of four responses one has no score, of each prompt another one: advantages, returns and gradient are those of three."""
    name, more = CASES[case]
    other = tiny.save(tmp_path / "other", seed=9, scale=3.0)
    base = [word.format(place=place) for word in ("rollout.prompts=4", "prompts_per_step=4", f"reference={other}", *more)]
    start: dict[str, Any] = {}

    def moved(run: OnlineRun) -> None:
        """The critic has something to say, the same on both sides."""
        torch.manual_seed(0)
        for key, p in run.learner.parameters.items():
            if "critic.head" in key or "value_head" in key:
                torch.nn.init.normal_(p, std=0.3)

    with small.opened(place, tmp_path / "four", name, *base, "rollout.n=4") as run:
        moved(run)
        drawn = run.collector.drawing.sample
        kept: dict[str, Any] = {}

        def remember(*words: Any, **how: Any) -> Any:
            found = drawn(*words, **how)
            kept.setdefault("samples", found)
            return found

        with mock.patch.object(run.collector.drawing, "sample", remember):
            four = collect(run, lambda at, example: [at % 4])
        start = gradient(run, four.trees, 10_000)
    with small.opened(place, tmp_path / "three", name, *base, "rollout.n=3") as run:
        moved(run)
        own, asked = run.collector.drawing.sample, []

        def three_of_them(*words: Any, **how: Any) -> Any:
            asked.append(words)
            if len(asked) > 1:
                return own(*words, **how)
            return [[s for n, s in enumerate(mine) if n != g % 4] for g, mine in enumerate(kept["samples"])]

        with mock.patch.object(run.collector.drawing, "sample", three_of_them):
            three = collect(run, lambda at, example: [])
        expected = gradient(run, three.trees, 10_000)
    moving = 0.0
    for g, (a, b) in enumerate(zip(four.trees, three.trees, strict=True)):
        left = [n for n in range(4) if n != g % 4]
        assert math.isnan(a.scores[g % 4]) and a.weights[g % 4] == 0 and not np.any(a.told["advantage"][g % 4])
        assert [a.responses[n].tolist() for n in left] == [r.tolist() for r in b.responses]
        assert a.scores[left] == pytest.approx(b.scores, abs=1e-9) and a.weights[left].tolist() == b.weights.tolist()
        assert set(a.told) == set(b.told)
        for key, values in a.told.items():
            assert all(np.isfinite(one).all() for one in values), key
            for n, theirs in zip(left, b.told[key], strict=True):
                assert values[n] == pytest.approx(theirs, abs=2e-5), key
        moving = max(moving, *(float(np.abs(one).max()) for one in b.told["advantage"]))
    assert moving > 1e-3
    start.pop("cuts"), expected.pop("cuts")
    assert start.keys() == expected.keys() and any(one.abs().max() > 1e-5 for one in expected.values())
    for key, one in expected.items():
        size = one.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(start[key] / size, one / size, atol=5e-4, rtol=0, msg=lambda said, key=key: f"{key}: {said}")
    figures = ("score", "score_std", "score_min", "score_max", "equal_scores", "explained_variance", "dense_reward", "scores_mean")
    for key in figures:
        assert four.figures.get(key) == (pytest.approx(three.figures[key], abs=1e-5) if key in three.figures else None), key
    assert (four.figures["unscorable"], three.figures["unscorable"]) == (0.25, 0.0)


@pytest.mark.parametrize("name", ONLINE)
def test_a_prompt_of_which_one_or_none_can_be_scored_is_like_any_that_teaches_nothing(name: str, place: Path, tmp_path: Path) -> None:
    """Whatever is known of one prompt, nothing is NaN; where responses are compared, one alone has an advantage of 0."""
    off = () if name in ("grpo", "gspo", "cispo") else ("method.kl=0",)
    more = ("rollout.prompts=4", "prompts_per_step=4", "rollout.n=3", "method.missing_eos=keep", *off)
    with small.opened(place, tmp_path / "run", name, *more) as run:
        found = collect(run, lambda at, example: [[0, 1, 2], [0, 2], [1], []][at])
        step = run.learner.step(found.trees, 0)
    assert step.taken and math.isfinite(step.loss) and all(map(math.isfinite, step.metrics.values()))
    assert [t.weights.tolist() for t in found.trees] == [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1]]
    for tree in found.trees:
        for n, advantage in enumerate(tree.told["advantage"]):
            assert np.isfinite(advantage).all() and (tree.weights[n] > 0 or not advantage.any())
    if ONLINE[name].group and name != "reinforce++_baseline":
        assert not found.trees[1].told["advantage"][1].any()
    if name == "reinforce++_baseline":  # 0 before it is whitened: the mean of the rollout is 0
        assert np.abs(found.trees[1].told["advantage"][1]).max() < 1e-9 + max(np.abs(a).max() for a in found.trees[3].told["advantage"]) / 2
    assert found.figures["unscorable"] == pytest.approx(6 / 12)


@pytest.mark.parametrize("name", ONLINE)
def test_where_nothing_can_be_scored_nothing_moves(name: str, place: Path, tmp_path: Path) -> None:
    """Neither policy nor critic, KL and entropy or not; the run says so and ends."""
    said = rule(tmp_path / "rule.py", "return None")
    more = (said, "max_steps=2", "eval_every=1", "method.entropy=0.1", "rollout.n=3", "best_metric=score", "best_mode=max")
    rows = small.trained(place, tmp_path / "run", name, *more, *(("method.kl=0.2",) if name != "ppo" else ()))
    assert all(row["loss"] == 0.0 and row["grad_norm"] == 0.0 and row["taken"] and row["unscorable"] == 1.0 for row in rows)
    assert not any("score" in row for row in rows)
    held = [row for row in small.read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "eval"]
    assert held and all(row["unscorable"] == 1.0 and "score" not in row for row in held)
    started, ended = load_file(place / "model" / "model.safetensors"), load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(torch.equal(started[key], ended[key]) for key in ended)
    one, two = (load_file(tmp_path / "run" / "checkpoints" / f"step-0000000{n}" / "model.safetensors") for n in (1, 2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_without_a_score_of_the_likeliest_response_there_is_nothing_to_compare_with(place: Path, tmp_path: Path) -> None:
    with small.opened(place, tmp_path / "run", "remax", "rollout.prompts=4", "prompts_per_step=4", "rollout.n=2", "method.kl=0") as run:
        own = judge(lambda at, example: []).judge
        scores = lambda e: [score + n for n, score in enumerate(own([e])[0])]  # no two responses alike
        said = lambda examples: [[None] if len(e.responses) == 1 and at < 2 else scores(e) for at, e in enumerate(examples)]
        run.collector.judging.judges.judge = Opened(said, {})
        found = small.rollout(run)
    moved = [any(a.any() for a in tree.told["advantage"]) for tree in found.trees]
    assert moved[:2] == [False, False] and any(moved[2:]) and all(tree.weights.all() for tree in found.trees)


def test_prompts_are_replaced_where_the_known_scores_are_all_the_same(place: Path, tmp_path: Path) -> None:
    """Also where only one or none is known; one without a score beside two that differ stays."""
    body = "n = len(response.text)\n    last = example.prompt[-1].content\n    return None if n % 2 else 1.0 if 'again' not in last else n"
    more = (rule(tmp_path / "rule.py", body), "method.redraw=9", "rollout.n=4", "rollout.prompts=2", "method.missing_eos=keep")
    with small.opened(place, tmp_path / "run", "grpo", *more, "eval_fraction=0") as run:
        found = small.rollout(run)
    asked = {example.id: example.prompt[-1].content for example in run.found.prompts}
    assert found.taken > 2 and any(np.isnan(tree.scores).any() for tree in found.trees)
    for tree in found.trees:
        known = tree.scores[~np.isnan(tree.scores)]
        assert len(known) > 1 and known.max() > known.min() and "again" in asked[tree.id]


def test_a_prompt_is_uneven_where_two_known_scores_differ() -> None:
    nan = math.nan
    scores = np.array([[1.0, nan, 2.0], [nan, nan, 2.0], [1.0, nan, 1.0], [nan, nan, nan], [1.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert Judged([], [], scores, {}, []).uneven == [0, 4]


PARTS = "def a(example, response):\n    n = len(response.text)\n    return None if n % 2 else n\n\n\n"
PARTS += "def b(example, response):\n    n = len(response.text)\n    return None if n % 3 == 0 else 10.0 * n\n"


@pytest.mark.parametrize("how", ["plain", "normalised", "constraint"])
def test_parts_that_know_add_up_and_a_cost_must_be_known(how: str, place: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(PARTS)
    judge_of = f"judge={{parts: {{a: '{tmp_path}/rules.py:a', b: '{tmp_path}/rules.py:b'}}}}"
    kind = {"plain": (), "normalised": ("normalise_parts=true",), "constraint": ("constraint.part=b",)}[how]
    more = (judge_of, *kind, "rollout.n=6", "rollout.prompts=4", "method.missing_eos=keep", "max_steps=2")
    rows = small.trained(place, tmp_path / "run", "grpo", *more)
    lines = [line["parts"] for line in small.lines(tmp_path / "run", 1, "scores")]
    a, b = (np.array([one[name] for one in lines], dtype=float) for name in "ab")
    scale = lambda x: (x - np.nanmean(x)) / (np.nanstd(x, ddof=1) + 1e-4)
    if how == "constraint":
        expected = (a - b) / 2
    else:
        expected = np.nansum([scale(a), scale(b)] if how == "normalised" else [a, b], axis=0)
        expected[np.isnan(a) & np.isnan(b)] = np.nan
    found = np.array([tree.scores for tree in small.kept(tmp_path / "run").trees])
    order = [next(i for i in range(4) if np.array_equal(expected[i], row, equal_nan=True) or np.allclose(expected[i], row, equal_nan=True))
             for row in found]  # fmt: skip
    assert sorted(order) == [0, 1, 2, 3] and np.isnan(a).any() and np.isnan(b).any() and not np.isnan(b).all()
    assert rows[0]["score_b"] == pytest.approx(np.nanmean(b)) and rows[0]["score_a"] == pytest.approx(np.nanmean(a))


def test_a_segment_without_a_score_has_no_reward_and_the_next_gains_from_the_last_known(tmp_path: Path) -> None:
    from preftune.online.config import DenseConfig
    from preftune.online.segments import laid

    tokens = [[(i, i + 1) for i in range(6)]]
    config = lambda of: DenseConfig.model_validate({"use": "length", "of": of, "weight": 2.0})
    say = lambda of: laid(np.array([1.0, np.nan, 4.0]), [[2, 4, 6]], tokens, config(of))[0]
    np.testing.assert_array_equal(say("so_far"), [np.nan, 2, np.nan, np.nan, np.nan, 8])
    np.testing.assert_array_equal(say("gain"), [np.nan, 2, np.nan, np.nan, np.nan, 6])


NONE = "return None if len(response.text) % 3 == 0 else len(response.text) / 9"


@pytest.mark.parametrize(
    ("name", "places"),
    [("ppo", ("rollout.scored:kill", "rollout.known:kill", "rollout.left:kill")), ("grpo", ("rollout.kept:kill", "rollout.scored:kill:2"))],
)
def test_regression_30_killed_with_nulls_under_way_every_byte_is_the_same(
    name: str, places: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    more = ("rollout.prompts=3", "method.redraw=1") if name == "grpo" else ("rollout.prompts=4", "rollout.n=2", "method.normalise=running")
    words = lambda run: small.words(place, tmp_path / run, name, rule(tmp_path / "rule.py", NONE), *more, "eval_every=2", "epochs=2")
    log = tmp_path / "log"
    assert runs.run(words("whole"), log) == 0, log.read_text()
    for at in places:
        assert runs.run(words("run"), log, failpoint=at) == -signal.SIGKILL, log.read_text()
    assert runs.run(words("run"), log) == 0, log.read_text()
    runs.assert_same(tmp_path / "run", tmp_path / "whole", last_only=True)
    rows = small.steps(tmp_path / "whole")
    assert any(0 < row.get("unscorable", 0) < 1 for row in rows)
    if name == "grpo":
        journals = [file.read_text().splitlines()[1:] for file in (tmp_path / "run").rglob("scores.jsonl")]
        assert any(None in json.loads(line)["scores"] for lines in journals for line in lines)
