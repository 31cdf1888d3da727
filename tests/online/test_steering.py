"""What moves from rollout to rollout: the leash to the reference, the penalty of a step, a cost's multiplier."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from preftune.errors import UserError
from preftune.online import steering
from preftune.online.judging import Judged, Judges, Judging
from preftune.online.methods import config_kind

BASE = {"model": "m", "data": "d", "output": "o"}


def config(name: str = "ppo", **more):
    return config_kind(name).model_validate({**BASE, "judge": {"parts": {"help": "length", "harm": "finished"}}, **more})


def test_the_leash_moves_by_the_paper_s_rule_and_stays_where_it_was_on_target() -> None:
    one = config(method={"kl": 1.0, "kl_target": 6.0})
    start = steering.start(one, False)
    assert steering.after_rollout(start, one, {"kl_response": 12.0}, 256)["kl"] == pytest.approx(1.00512)  # its error is held at 0.2
    assert steering.after_rollout(start, one, {"kl_response": 6.0}, 256)["kl"] == 1.0
    assert steering.after_rollout(start, config(method={"kl": 1.0}), {"kl_response": 12.0}, 256)["kl"] == 1.0


def test_the_penalty_of_a_step_halves_doubles_or_stays() -> None:
    one = config(method={"objective": "penalty", "penalty_target": 0.01})
    start = steering.start(one, False)
    found = [steering.after_step(start, one.knobs, kl)["penalty"] for kl in (0.0, 0.01, 0.016)]
    assert found == [0.5, 1.0, 2.0]
    assert "penalty" not in steering.start(config(), False)


def test_a_cost_s_multiplier_rises_while_the_cost_is_too_high_and_falls_while_it_is_low() -> None:
    one = config(constraint={"part": "harm", "at_most": 0.25, "start": 2.0, "lr": 0.5})
    start = steering.start(one, False)
    assert steering.after_rollout(start, one, {"score_harm": 0.65}, 8)["cost"] == pytest.approx(2 * math.exp(0.5 * 0.4))
    assert steering.after_rollout(start, one, {"score_harm": 0.05}, 8)["cost"] == pytest.approx(2 * math.exp(-0.5 * 0.2))


def test_the_combined_score_takes_the_cost_off_and_keeps_its_size() -> None:
    one = config(constraint={"part": "harm"})
    parts = {"help": np.array([[4.0, 1.0]]), "harm": np.array([[1.0, 0.0]])}
    judging = Judging(one, None, Judges(None, {}, None), lambda: False)  # type: ignore[arg-type]
    found = judging.combined(Judged([], [], parts["help"], parts, []), 3.0)
    assert torch.allclose(found, torch.tensor([[(4 - 3 * 1) / 4, 1 / 4]], dtype=torch.float64))


def test_parts_on_one_scale_weigh_as_they_are_told_whatever_their_size() -> None:
    one = config(normalise_parts=True, judge={"parts": {"help": "length", "harm": "finished"}, "weights": {"harm": -2.0}})
    judging = Judging(one, None, Judges(None, {}, None), lambda: False)  # type: ignore[arg-type]
    score = lambda factor: judging.combined(
        Judged([], [], np.zeros((1, 3)), {"help": np.array([[1.0, 2.0, 3.0]]) * factor, "harm": np.array([[0.0, 0.0, 1.0]])}, [])
    )
    assert torch.allclose(score(1.0), score(1000.0), atol=1e-3)
    z = np.array([0.0, 0.0, 1.0])
    wanted = np.array([-1.0, 0.0, 1.0]) - 2 * (z - z.mean()) / z.std(ddof=1)
    assert np.allclose(score(1000.0).numpy()[0], wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"constraint": {"part": "nobody"}}, "constraint.part"),
        ({"judge": "length", "normalise_parts": True}, "normalise_parts"),
        ({"cache_reference": True}, "cache_reference"),
        ({"rollout": {"prompts": 4}, "prompts_per_step": 8}, "rollout.prompts"),
        ({"method": {"kl": 0.0, "kl_target": 1.0}}, "kl_target"),
        ({"method": {"penalty": 2.0}}, "penalty"),
        ({"method": {"critic": "shared", "critic_lr": 1e-5}}, "critic_lr"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(more: dict, told: str, tmp_path: Path) -> None:
    from preftune import configfile

    with pytest.raises(UserError) as error:
        configfile.load(config_kind("ppo"), None, base={**BASE, "judge": {"parts": {"help": "length", "harm": "finished"}}, **more})
    assert told in str(error.value)


def test_running_normalisation_is_that_of_all_scores_together_whatever_the_parts() -> None:
    scores = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5 + 3
    seen = (0.0, 0.0, 0.0)
    for part in (scores[:, :2], scores[:, 2:3], scores[:, 3:]):
        seen = steering.taken_in(seen, part)
    wanted = (scores - scores.mean()) / scores.std()
    assert torch.allclose(steering.normalised(scores, seen), wanted, atol=1e-6)
    assert steering.taken_in(seen, torch.full((2, 2), torch.nan)) == seen
    assert torch.equal(
        steering.normalised(torch.full((1, 2), 7.0), steering.taken_in((0.0, 0.0, 0.0), torch.full((1, 2), 7.0))), torch.zeros(1, 2)
    )
