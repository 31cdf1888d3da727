"""The quickstart on a tiny random model: every stage runs, every figure can be traced to a file, and a second call does nothing twice."""

from __future__ import annotations

import json

import numpy as np
import pytest

from preftune import quickstart
from preftune.cli.console import progress_console
from preftune.formats import prompt_key, read
from preftune.online.config import OnlineConfig
from preftune.quickstart import plan
from preftune.rounds.ready import read_prompts
from preftune.training.metrics import read_metrics
from preftune.training.setup import read_sides
from tests import tiny


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("quickstart")
    model = tiny.save(root / "model", max_position_embeddings=1024)
    changed = {**plan.SHARED, "max_steps": 2, "prompts_per_step": 4, "max_length": 1024, "save_every": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "MODEL", str(model))
        patch.setattr(plan, "SHARED", changed)
        patch.setattr(plan, "NEW_TOKENS", 8)
        patch.setattr(plan, "WRITTEN", 4)
        assert quickstart.quickstart(root / "out", progress_console()) == 0
        before = {p: p.stat().st_mtime_ns for p in (root / "out").rglob("metrics.jsonl")}
        assert quickstart.quickstart(root / "out", progress_console()) == 0
        assert {p: p.stat().st_mtime_ns for p in (root / "out").rglob("metrics.jsonl")} == before and len(before) == 4
    return root / "out"


def test_every_figure_is_the_one_in_the_file_it_names(done):
    results = json.loads((done / "evaluation.json").read_text())
    figures = [m for s in results["sections"] for m in s["metrics"]]
    assert len(figures) == 14
    for figure in figures:
        name, _, pointer = figure["source"].partition("#/")
        found = json.loads((done / name).read_text())
        for part in pointer.split("/"):
            found = found[part]
        assert found == figure["value"], figure["name"]


def test_figures_follow_from_their_records(done):
    measured = json.loads((done / "measurements.json").read_text())
    for key in ("reward_accuracy", "implicit_accuracy", "length_accuracy"):
        margins = np.array(list(measured[key]["values"].values()))
        assert measured[key]["value"] == pytest.approx(float((0.5 + 0.5 * np.sign(margins)).mean()))
    for key in ("kl", "length_before", "length_sft", "sft_gain", "reward_gain", "reinforced_gain"):
        assert measured[key]["value"] == pytest.approx(np.mean(list(measured[key]["values"].values())), abs=1e-5)
    assert measured["kl"]["value"] >= 0


def test_dpo_and_reinforcement_learning_are_compared_with_where_they_began(done):
    """Compared with the model before all stages, what SFT changed would be laid at their door."""
    assert json.loads((done / "rloo/run.json").read_text())["config"]["model"].endswith("sft/final")
    results = json.loads((done / "evaluation.json").read_text())
    shown = {m["source"].split("/")[1]: m for s in results["sections"] for m in s["metrics"]}
    measured = {key: json.loads((done / "measurements.json").read_text())[key]["values"] for key in ("sft_gain", "reward_gain")}
    for row, both in zip(results["generations"], zip(*(v.values() for v in measured.values()), strict=True), strict=True):
        assert row["scores"]["after"] - row["scores"]["before"] == pytest.approx(sum(both), abs=2e-3)
    assert "SFT" in shown["reward_gain"]["name"] and "SFT" in shown["reinforced_gain"]["name"]


def test_no_held_out_prompt_was_trained_on(done):
    held = {p.partition(" (")[0] for p in json.loads((done / "measurements.json").read_text())["reward_accuracy"]["values"]}
    prompts = {e.where: prompt_key(e) for e in read(plan.SHARED["data"]).examples}
    for stage in plan.PLAN:
        config = plan.config(stage, done)
        if isinstance(config, OnlineConfig):
            train, side, _ = read_prompts(config)
            assert {prompts[place] for place in held} == {prompt_key(e) for e in side}
        else:
            train, side = (one.examples for one in read_sides(config))
            assert held <= {e.where for e in side}
        assert not {prompts[place] for place in held} & {prompt_key(e) for e in train}


def test_the_first_dpo_loss_is_ln_2(done):
    first = read_metrics(done / "dpo" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_report_stands_alone(done):
    page = (done / "report.html").read_text()
    assert "From human feedback" in page and 'src="http' not in page and "<script" not in page
