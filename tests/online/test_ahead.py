"""Rollouts drawn ahead: one rollout old and no more, corrected for it, and the same after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.training import runs

RULE = "def rule(example, response):\n    return sum(c in 'aeiou' for c in response.text) / (1 + len(response.text))\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    tiny.save(folder / "model", scale=2.0)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}!"}]} for i in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    return folder


def words(place: Path, output: Path, *more: str) -> list[str]:
    settings = {
        "model": place / "model",
        "data": place / "prompts.jsonl",
        "output": output,
        "judge": f"{place}/rule.py:rule",
        "rollout.n": 3,
        "rollout.prompts": 4,
        "rollout.max_new_tokens": 8,
        "rollout.ahead": "true",
        "method.importance_cap": 2,
        "prompts_per_step": 2,
        "max_length": 64,
        "tokens_per_microbatch": 128,
        "lr": 3e-3,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "save_every": 1,
        "keep_checkpoints": 9,
    }
    settings |= dict(word.split("=", 1) for word in more)
    return ["grpo", *(f"{key}={value}" for key, value in settings.items())]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert runs.train(words(place, output)) == 0
    return output


def test_each_rollout_is_drawn_by_the_weights_that_the_one_before_it_began_with(whole: Path) -> None:
    drawn = [json.loads((whole / f"rollouts/{r}/samples.jsonl").read_text().split("\n")[0])["step"] for r in (1, 2, 3)]
    assert drawn == [0, 0, 2]  # two steps a rollout


def test_what_that_costs_is_measured_and_weighed(whole: Path) -> None:
    rows = [row for row in runs.rows(whole) if "score" in row and row["kind"] == "train"]
    assert rows[0]["sampler_gap"] < 1e-5 and rows[0]["importance"] == pytest.approx(1, abs=1e-5)
    assert all(row["sampler_gap"] > 1e-3 for row in rows[1:])
    assert all(row["importance"] <= 2 and row["importance"] != 1 for row in rows[1:])
    assert all(row["ratio"] == 1 and row["step_kl"] == 0 for row in rows)  # ratios start from the trainer's own log-probabilities


@pytest.mark.parametrize("where", ["rollout.sample:kill:16", "rollout.sample:kill:29", "step:kill:1", "step:kill:3", "rollout.left:kill:2"])
def test_killed_and_resumed_every_byte_is_the_same(where: str, place: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert runs.run(words(place, output), tmp_path / "log", failpoint=where) < 0
    assert runs.run(words(place, output), tmp_path / "log") == 0
    runs.assert_same(output, whole)


def test_what_fails_in_the_background_is_told_in_front(place: Path) -> None:
    import torch

    from preftune.models.policy import LanguageModel
    from preftune.online.ahead import Ahead

    policy = LanguageModel(tiny.model())
    ahead = Ahead(policy)

    def fails(copy: LanguageModel) -> None:
        assert copy is not policy and all(torch.equal(a, b) for a, b in zip(copy.parameters(), policy.parameters(), strict=True))
        raise ValueError("no room")

    ahead.start(fails)
    with pytest.raises(ValueError, match="no room"):
        ahead.settle()
    ahead.settle()  # told once
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    ahead.start(lambda copy: None)
    ahead.settle()
    assert ahead.copy is not None and all(torch.equal(a, b) for a, b in zip(ahead.copy.parameters(), policy.parameters(), strict=True))
