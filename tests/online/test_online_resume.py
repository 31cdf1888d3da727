"""Killed, interrupted or failing anywhere, an online run that is started again ends with the same bytes as one that never stopped."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from preftune.cli.main import run
from preftune.packing.order import permutation
from tests.online import small
from tests.training import runs

KILLED = -signal.SIGKILL
CASES = {
    "ppo": ("rollout.n=1", "rollout.prompts=4", "method.passes=2", "method.kl_target=0.5", "epochs=3"),
    "grpo": ("rollout.prompts=3", "method.kl=0.1", "method.redraw=1", "reference_sync.every=2", "epochs=4"),
}
EVALUATED = ("eval_every=3",)
PLACES = {
    "ppo": (
        "rollout.sample:kill:2",
        "rollout.scored:kill",
        "step.microbatch:kill:2",
        "rollout.known:kill:2",
        "checkpoint.after_rename:kill",
        "rollout.left:kill",
        "rollout.kept:kill",
        "step:kill:2",
        "final.before:kill",
        "final.between:kill",
    ),
    "grpo": (
        "rollout.sampled:kill",
        "evaluation.microbatch:kill:2",
        "rollout.kept:kill:2",
        "metrics.written:kill:2",
        "rollout.sample:kill:5",
        "checkpoint.before_manifest:kill:2",
        "rollout.scored:kill:2",
        "final.after:kill",
    ),
}


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing stopped."""
    root = tmp_path_factory.mktemp("whole")
    for name, more in CASES.items():
        log = root / f"{name}.log"
        assert runs.run(small.words(place, root / name, name, *more, *EVALUATED), log) == 0, log.read_text()
    return {name: root / name for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_regression_30_killed_in_every_phase_every_byte_is_the_same(name: str, place: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    words, log = small.words(place, tmp_path / "run", name, *CASES[name], *EVALUATED), tmp_path / "log"
    for at in PLACES[name]:
        code = runs.run(words, log, failpoint=at)
        if code == 0:  # too little was left of the run to come there: kill another one
            runs.assert_same(tmp_path / "run", whole[name], last_only=True)
            shutil.rmtree(tmp_path / "run")
            code = runs.run(words, log, failpoint=at)
        assert code == KILLED, f"{at}: {log.read_text()}"
    assert runs.run(words, log) == 0, log.read_text()
    runs.assert_same(tmp_path / "run", whole[name], last_only=True)  # killed before every rotation, older checkpoints are left


def test_what_the_cases_promise_to_exercise_happens(whole: dict[str, Path]) -> None:
    """Several steps a rollout, a smaller last one, prompts replaced, a coefficient that moves, evaluations in between."""
    ppo, grpo = ([row for row in runs.rows(whole[name]) if row["kind"] == "train"] for name in ("ppo", "grpo"))
    assert sum("score" in row for row in ppo) < len(ppo) and len({row["tokens"] for row in ppo}) > 2
    assert len({row["coefficient_kl"] for row in ppo if "coefficient_kl" in row}) > 2
    assert any(row["step_kl"] > 0 for row in ppo) and any(row["kl"] > 0 for row in grpo)
    assert all(len([row for row in runs.rows(path) if row["kind"] == "eval"]) > 2 for path in whole.values())


def test_regression_30_killed_after_every_step_the_order_of_prompts_is_the_same(place: Path, tmp_path: Path) -> None:
    """Every checkpoint is loaded once, epoch edges and rollouts of an odd size among them; no prompt is skipped or doubled."""
    more = ("rollout.prompts=3", "rollout.n=2", "epochs=2", "eval_fraction=0.2", "keep_checkpoints=99")
    words, log = small.words(place, tmp_path / "run", "grpo", *more), tmp_path / "log"
    assert runs.run(small.words(place, tmp_path / "whole", "grpo", *more), log) == 0, log.read_text()
    count = len(small.steps(tmp_path / "whole"))
    for _ in range(count - 1):
        assert runs.run(words, log, failpoint="checkpoint.after_rename:kill:1") == KILLED, log.read_text()
    assert runs.run(words, log) == 0, log.read_text()
    assert log.read_text().count("Resuming after step") >= count - 1
    runs.assert_same(tmp_path / "run", tmp_path / "whole")
    for output in (tmp_path / "run", tmp_path / "whole"):
        folders = sorted((output / "rollouts").iterdir(), key=lambda folder: int(folder.name))
        heads = [json.loads((folder / "samples.jsonl").open().readline())["prompts"] for folder in folders]
        assert [len(one) for one in heads] == [3, 3, 3, 3, 2]
        order = [int(i) for epoch in (0, 1) for i in permutation(7, 0, epoch)]
        assert [i for one in heads for i in one] == order


SIGNALS = {
    "sampling": "rollout.sample:term:2",
    "judging": "rollout.scored:term:2",
    "after judging": "rollout.known:term:2",
    "a step": "step.microbatch:term:3",
    "evaluation": "evaluation.microbatch:term:3",
}


@pytest.mark.parametrize("where", SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(where: str, place: Path, whole: dict[str, Path], tmp_path: Path) -> None:
    words, log = small.words(place, tmp_path / "run", "grpo", *CASES["grpo"], *EVALUATED), tmp_path / "log"
    assert runs.run(words, log, failpoint=SIGNALS[where]) == 143, log.read_text()
    assert "Traceback" not in log.read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert runs.run(words, log) == 0, log.read_text()
    runs.assert_same(tmp_path / "run", whole["grpo"], last_only=True)


# ---- another run


def test_a_run_of_another_judge_prompts_or_critic_is_refused(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    here = small.place(tmp_path / "place")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    more = ("rollout.n=1", "max_steps=1", f"pretraining.data={text}", f"reference={place}/model", f"method.critic={place}/model")
    words = small.words(here, tmp_path / "run", "ppo", *more)
    assert runs.train(words) == 0
    assert run(["train", *words]) == 0
    assert "is finished" in capfd.readouterr().err
    changes = {
        here / "rule.py": small.RULE.replace("aeiou", "xyz"),
        here / "prompts.jsonl": (here / "prompts.jsonl").read_text().replace("Say", "Tell"),
        text: json.dumps({"prompt": "a", "completion": "c"}) + "\n",
    }
    for path, changed in changes.items():
        before = path.read_text()
        path.write_text(changed)
        assert run(["train", *words]) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert "began otherwise" in error and ("judges" if path.suffix == ".py" else path.name) in error, error
        path.write_text(before)
    told = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert {str(place / "model"), f"critic {(place / 'model').name}"} & told.keys()
