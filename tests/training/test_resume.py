"""Killed, damaged or interrupted anywhere, a run that is started again ends with the same bytes as one that never stopped."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.training.manifest import read_manifest
from tests.training import runs
from tests.training.runs import LORA, command

KILLED = -signal.SIGKILL
CODES = {"int": 130, "term": 143}

STOPPING = ("early_stopping.metric=loss", "early_stopping.patience=1")
CASES = {
    "sft": ("sft",),
    "sft, LoRA with dropout": ("sft", *LORA, "lora.dropout=0.3", "best_metric=loss"),
    "sft, gradient checkpointing": ("sft", "gradient_checkpointing=true", "epochs=1"),
    "reward, best kept": ("reward", "best_metric=accuracy", "best_mode=max", "keep_checkpoints=1"),
    "reward, LoRA": ("reward", *LORA),
    "dpo": ("dpo",),
    "dpo, LoRA, checkpointing": ("dpo", *LORA, "gradient_checkpointing=true"),
    "dpo, cached reference, early stopping": ("dpo", "cache_reference=true", *STOPPING, "eval_every=1", "lr=0.1"),
    "dpo, moving reference, early stopping": ("dpo", "reference_sync.every=1", "reference_sync.mix=0.3", *STOPPING, "eval_every=2"),
    "dpo, LoRA, moving reference": ("dpo", *LORA, "reference_sync.every=3", "reference_sync.mix=1.0"),
    "kto, LoRA": ("kto", *LORA),
}


@dataclass
class Chain:
    """A run that was killed again and again, and its uninterrupted twin."""

    whole: Path
    output: Path
    kills: list[str]
    log: Path
    trace: Path


def killed_everywhere(folder: Path, model: Path, case: tuple[str, ...], seed: int) -> Chain:
    """Kill at failpoints that the uninterrupted run passed (each of them for the first case, a few for the others) and at two moments."""
    folder.mkdir()
    chain = Chain(folder / "whole", folder / "run", [], folder / "log", folder / "trace")
    method, *words = case
    assert runs.run(command(method, model, chain.whole, *words), chain.log, chain.trace) == 0, chain.log.read_text()
    names = list(dict.fromkeys(runs.passed(chain.trace)))
    chance = random.Random(seed)
    chosen = names if seed == 0 else sorted(chance.sample(names, 4), key=names.index)
    resumed = command(method, model, chain.output, *words)
    for name in chosen:
        nth = chance.randint(1, 3) if "microbatch" in name or name.startswith("metrics") else 1
        code = runs.run(resumed, chain.log, failpoint=f"{name}:kill:{nth}")
        if code == 0:  # too little was left of the run to pass there: kill another one
            runs.assert_same(chain.output, chain.whole)
            shutil.rmtree(chain.output)
            code = runs.run(resumed, chain.log, failpoint=f"{name}:kill")
        assert code == KILLED, chain.log.read_text()
        chain.kills.append(name)
    for _ in range(2):
        process = runs.start(resumed, chain.log)
        process.join(chance.uniform(0.2, 0.7))
        process.kill()
        process.join()
    assert runs.run(resumed, chain.log) == 0, chain.log.read_text()
    return chain


@pytest.fixture(scope="module")
def chains(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Chain]]]:
    """All cases, two at a time."""
    root = tmp_path_factory.mktemp("chains")
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: (root / str(seed), tiny_llama, case, seed) for seed, (name, case) in enumerate(CASES.items())}
        yield {name: pool.submit(killed_everywhere, *job) for name, job in jobs.items()}


@pytest.mark.parametrize("case", CASES)
def test_regression_30_killed_anywhere_and_resumed_every_byte_is_the_same(case: str, chains: dict[str, Future[Chain]]) -> None:
    chain = chains[case].result()
    assert len(chain.kills) >= 4
    runs.assert_same(chain.output, chain.whole)


def test_the_first_case_was_killed_at_every_failpoint_of_its_run(chains: dict[str, Future[Chain]]) -> None:
    chain = chains[next(iter(CASES))].result()
    names = set(runs.passed(chain.trace))
    assert set(chain.kills) == names
    kinds = {name.split(".")[0] for name in names}
    assert {"step", "evaluation", "checkpoint", "metrics", "run", "final"} <= kinds and len(names) >= 20


def test_what_the_cases_promise_to_exercise_happens(chains: dict[str, Future[Chain]]) -> None:
    """Odd steps, several micro-batches a step, a best checkpoint that is kept, and a stop before the end."""
    rows = {name: [row for row in runs.rows(chains[name].result().whole) if row["kind"] == "train"] for name in CASES}
    trace = runs.passed(chains["sft"].result().trace)
    assert trace.count("step.microbatch") > 2 * trace.count("step")
    assert len({row["tokens"] for row in rows["sft"]}) > 1 and len(rows["sft"]) == 2 * len(rows["sft, gradient checkpointing"])
    assert len(rows["dpo, cached reference, early stopping"]) < len(rows["dpo"])
    best = chains["reward, best kept"].result().whole / "checkpoints"
    state = json.loads((sorted(best.glob("step-*"))[-1] / "state.json").read_text())["progress"]
    assert state["best_step"] < len(rows["reward, best kept"])
    kept = [state["best_step"], len(rows["reward, best kept"])]
    assert [path.name for path in sorted(best.iterdir())] == [f"step-{step:08d}" for step in kept]


def test_regression_30_killed_at_every_step_and_in_the_middle_of_every_step(tiny_llama: Path, tmp_path: Path) -> None:
    """Every checkpoint is loaded once, those at an epoch's edge too; the second kill of each step falls between its micro-batches."""
    words = ("save_every=1", "eval_every=4", "prompts_per_step=5", "epochs=3")
    log = tmp_path / "log"
    assert runs.run(command("dpo", tiny_llama, tmp_path / "whole", *words), log) == 0
    steps = sum(row["kind"] == "train" for row in runs.rows(tmp_path / "whole"))
    resumed = command("dpo", tiny_llama, tmp_path / "run", *words)
    for _ in range(steps):
        assert runs.run(resumed, log, failpoint="step.microbatch:kill:2") == KILLED
        assert runs.run(resumed, log, failpoint="checkpoint.after_rename:kill") == KILLED
    assert runs.run(resumed, log) == 0
    assert log.read_text().count("Resuming after step") == 2 * (steps - 1) + 1
    runs.assert_same(tmp_path / "run", tmp_path / "whole", last_only=True)  # killed before every rotation, older ones are left


# ---- signals


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with everything on that a signal can fall into."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert runs.train(command("sft", tiny_llama, output, *DROPOUT)) == 0
    return output


DROPOUT = (*LORA, "lora.dropout=0.3", "best_metric=loss")
POINTS = {
    "load": ".writable.replaced:{}",
    "after load": "run.json.replaced:{}",
    "evaluation at step 0": "evaluation.microbatch:{}:2",
    "evaluation": "evaluation.microbatch:{}:4",
    "step": "step.microbatch:{}:4",
    "end of a step": "step:{}:3",
    "metrics": "metrics.written:{}:3",
    "save": "checkpoint.model.safetensors:{}:2",
}


@pytest.mark.parametrize("action", CODES)
@pytest.mark.parametrize("where", POINTS)
def test_a_signal_saves_and_the_run_goes_on_as_if_nothing_had_been(
    where: str, action: str, tiny_llama: Path, whole: Path, tmp_path: Path
) -> None:
    words, log = command("sft", tiny_llama, tmp_path / "run", *DROPOUT), tmp_path / "log"
    assert runs.run(words, log, failpoint=POINTS[where].format(action)) == CODES[action], log.read_text()
    assert "Traceback" not in log.read_text()
    manifest = read_manifest(tmp_path / "run")
    assert manifest is None if where == "load" else manifest and manifest.status == "interrupted"
    assert runs.run(words, log) == 0, log.read_text()
    runs.assert_same(tmp_path / "run", whole, last_only=True)
    done = read_manifest(tmp_path / "run")
    assert done and [s.status for s in done.sessions] == (["finished"] if where == "load" else ["interrupted", "finished"])


def test_signals_again_and_again_inside_one_evaluation(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    words, log = command("sft", tiny_llama, tmp_path / "run", *DROPOUT), tmp_path / "log"
    for point in ("evaluation.microbatch:term:3", "evaluation.microbatch:int:1", "metrics.written:kill:1", "evaluation.microbatch:term:2"):
        assert runs.run(words, log, failpoint=point) in (130, 143, KILLED), log.read_text()
    assert runs.run(words, log) == 0
    runs.assert_same(tmp_path / "run", whole, last_only=True)


def test_a_signal_during_the_final_save_lets_it_end(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    words, log = command("sft", tiny_llama, tmp_path / "run", *DROPOUT), tmp_path / "log"
    assert runs.run(words, log, failpoint="final.before:term") == 0
    assert read_manifest(tmp_path / "run").status == "finished"  # type: ignore[union-attr]
    runs.assert_same(tmp_path / "run", whole)


# ---- damage, changes, other owners


def test_a_flipped_byte_in_the_newest_checkpoint_is_noticed_and_the_one_before_used(tiny_llama: Path, whole: Path, tmp_path: Path) -> None:
    words, log = command("sft", tiny_llama, tmp_path / "run", *DROPOUT), tmp_path / "log"
    assert runs.run(words, log, failpoint="step:kill:5") == KILLED
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))[-1] / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 4
    newest.write_bytes(content)
    assert runs.run(words, log) == 0
    text = log.read_text()
    assert f"{newest.parent}: broken checkpoint: optimizer.safetensors was altered" in text and "the checkpoint before it is used" in text
    assert (newest.parent.parent / f"broken-{newest.parent.name}").is_dir()
    runs.assert_same(tmp_path / "run", whole)


@pytest.fixture
def stopped(tiny_llama: Path, tmp_path: Path) -> list[str]:
    """The words of a run on a data file of its own that was killed after its first checkpoint."""
    source = Path(runs.__file__).parents[2] / "src" / "preftune" / "data" / "sample" / "hh_pairs.jsonl"
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(source.read_text(encoding="utf-8").splitlines(keepends=True)[:14]), encoding="utf-8")
    words = command("sft", tiny_llama, tmp_path / "run", f"data.path={data}")
    assert runs.run(words, tmp_path / "log", failpoint="checkpoint.after_rename:kill") == KILLED
    return words


@pytest.mark.parametrize(
    ("word", "named"), [("lr=2e-3", "config lr: 0.001 -> 0.002"), ("seed=7", "config seed: 0 -> 7"), ("lora.rank=4", "config lora.rank")]
)
def test_a_changed_config_is_refused_by_key(stopped: list[str], word: str, named: str, tmp_path: Path) -> None:
    before = runs.digests_of_tree(tmp_path / "run")
    key = word.split("=")[0]
    with pytest.raises(UserError, match="began otherwise") as caught:
        runs.train([*(w for w in stopped if not w.startswith(f"{key}=")), word])
    assert named in str(caught.value)
    assert runs.digests_of_tree(tmp_path / "run") == before


def test_a_changed_data_file_is_refused_by_name(stopped: list[str], tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text(data.read_text(encoding="utf-8").replace("weather", "whether"), encoding="utf-8")
    with pytest.raises(UserError, match=r"data .*pairs\.jsonl: sha256 \w+ -> sha256 \w+"):
        runs.train(stopped)


def test_changed_model_weights_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    words = command("sft", model, tmp_path / "run")
    assert runs.run(words, tmp_path / "log", failpoint="step:kill") == KILLED
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="model weights"):
        runs.train(words)


def test_a_changed_reference_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    reference = shutil.copytree(tiny_llama, tmp_path / "reference")
    words = command("dpo", tiny_llama, tmp_path / "run", f"reference={reference}")
    assert runs.run(words, tmp_path / "log", failpoint="step:kill") == KILLED
    weights = bytearray((reference / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (reference / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=f"data {reference}"):
        runs.train(words)


def test_a_finished_run_says_so_and_trains_nothing(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = command("sft", tiny_llama, tmp_path / "run")
    assert runs.train(words) == 0
    before = runs.digests_of_tree(tmp_path / "run")
    capfd.readouterr()
    assert runs.train(words) == 0
    assert "This run is finished: its model is in" in capfd.readouterr().err
    assert runs.digests_of_tree(tmp_path / "run") == before


def test_a_finished_run_whose_model_was_removed_writes_it_again(tiny_llama: Path, tmp_path: Path) -> None:
    words = command("sft", tiny_llama, tmp_path / "run")
    assert runs.train(words) == 0
    before = runs.digests(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    assert runs.train(words) == 0
    assert runs.digests(tmp_path / "run") == before


def test_resume_never_and_require(stopped: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resume=never, but this directory holds a run"):
        runs.train([*stopped, "resume=never"])
    with pytest.raises(UserError, match="resume=require, but this directory holds no run"):
        runs.train(command("sft", tiny_llama, tmp_path / "empty", "resume=require"))
    assert runs.train([*stopped, "resume=require"]) == 0


def test_a_second_process_on_the_same_output_is_refused_while_the_first_lives(tiny_llama: Path, tmp_path: Path) -> None:
    words = command("sft", tiny_llama, tmp_path / "run")
    first: Any = runs.processes.start(runs._child, words, str(tmp_path / "first"), "", failpoint="step:stop:2")
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.is_alive()
            time.sleep(0.01)
        assert runs.run(words, tmp_path / "second") == 2
        assert f"in use by process {first.pid}" in (tmp_path / "second").read_text()
    finally:
        first.kill()
        first.join()
    assert runs.run(words, tmp_path / "second") == 0


def test_a_failed_check_is_not_passed_over_by_trying_again(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.training import check

    monkeypatch.setattr(check, "_loss_carried", lambda trees: check.Line("every record carries loss", False, "planted"))
    words = command("sft", tiny_llama, tmp_path / "run")
    for _ in range(2):
        with pytest.raises(UserError, match="check failed: every record carries loss: planted"):
            runs.train(words)
