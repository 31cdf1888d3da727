"""A reward that is exploited: the score goes on rising, what it stands for falls, and the alarm is there before much is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from preftune.online.config import AlarmConfig
from preftune.online.monitor import agreement, alarm
from tests.online import toy

LOST = 0.1
"""Share of its peak that the gold score may lose before the alarm."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.place(tmp_path_factory.mktemp("toy"))


def smooth(values: list[float], window: int = 4) -> np.ndarray:
    return np.convolve(values, np.ones(window) / window, "valid")


def test_the_alarm_comes_before_the_gold_score_has_lost_a_tenth(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = toy.exploit(place, tmp_path / "run")
    score, gold = ([row[key] for row in rows] for key in ("score", "gold"))
    assert score[-1] > 2 * score[0], "the proxy is learned"
    level = smooth(gold)
    peak = int(level.argmax())
    assert level[-1] < level[peak] / 2 and level[peak] > level[0] + 0.2, "and what it stands for rises at first, then falls"
    fired = next(i for i, row in enumerate(rows) if row.get("alarm"))
    after = next((i for i in range(peak, len(level)) if level[i] < (1 - LOST) * level[peak]), len(level))
    assert fired < after + 3, (fired, after)
    assert "the score rose from" in capfd.readouterr().err
    agreed = [row["gold_agreement"] for row in rows]
    crossed = next(i for i, value in enumerate(agreed) if value < 0)
    assert abs(crossed - peak) <= 8, "where raising the one no longer raises the other, the other is at its peak"


def first_alarm(history: list[dict[str, float]], config: AlarmConfig) -> int | None:
    """After how many rollouts it is first heard."""
    return next((n for n in range(1, len(history) + 1) if alarm(history[:n], config)), None)


def curve(gold: np.ndarray, noise: float, seed: int) -> list[dict[str, float]]:
    """A score that rises all along, with noise on both."""
    rng, count = np.random.default_rng(seed), len(gold)
    score = 0.3 + 0.5 * (1 - np.exp(-np.arange(count) / 25))
    noisy = lambda values: values + rng.normal(0, noise, count)
    return [{"score": float(a), "gold": float(b)} for a, b in zip(noisy(score), noisy(gold), strict=True)]


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.04])
def test_no_alarm_where_the_gold_score_only_stops_rising(noise: float) -> None:
    """The best of many noisy means is above the newest one, which is no fall."""
    plateau = 0.3 + 0.5 * (1 - np.exp(-np.arange(100) / 25))
    heard = [first_alarm(curve(plateau, noise, seed), AlarmConfig.model_validate({})) for seed in range(25)]
    assert heard == [None] * 25


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_a_fall_is_heard_before_a_tenth_is_lost(noise: float) -> None:
    at = np.arange(100)
    gold = 0.3 + 0.5 * (1 - np.exp(-at / 10)) * np.exp(-((at / 80) ** 2))
    for seed in range(10):
        heard = first_alarm(curve(gold, noise, seed), AlarmConfig.model_validate({}))
        assert heard is not None and heard > gold.argmax() and gold[heard - 1] > (1 - LOST) * gold.max()


@pytest.mark.parametrize("level, expected", [(-0.2, True), (0.0, False), (0.5, False)])
def test_a_gold_score_that_runs_against_the_score_is_heard(level: float, expected: bool) -> None:
    rng, plateau = np.random.default_rng(0), np.full(60, 0.5)
    agreed = np.concatenate([np.linspace(0.8, level, 20), np.full(40, level)]) + rng.normal(0, 0.05, 60)
    history = [{**row, "gold_agreement": float(a)} for row, a in zip(curve(plateau, 0.02, 0), agreed, strict=True)]
    assert (first_alarm(history, AlarmConfig.model_validate({})) is not None) is expected


def test_agreement_is_a_correlation_within_prompts() -> None:
    scores = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    assert agreement(scores, 2 * scores + 1)["gold_agreement"] == pytest.approx(1.0)
    assert agreement(scores, np.array([[3.0, 2.0, 1.0], [103.0, 102.0, 101.0]]))["gold_agreement"] < 0, "not what prompts differ by"
    centred = [row - row.mean() for row in (scores[0], scores[1])]
    gold = np.random.default_rng(0).normal(size=(2, 3))
    expected = np.corrcoef(np.concatenate(centred), np.concatenate([row - row.mean() for row in gold]))[0, 1]
    assert agreement(scores, gold)["gold_agreement"] == pytest.approx(expected)
    holes = np.where(np.arange(3) == 1, np.nan, scores)
    assert agreement(holes, scores)["gold_agreement"] == pytest.approx(1.0), "unscored responses are left out"
    assert agreement(np.ones((2, 3)), scores) == {} and agreement(np.full((2, 3), np.nan), scores) == {}
