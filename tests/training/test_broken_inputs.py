"""Ten ways to get it wrong, through the real command: one clear line, exit 2, no traceback, and nothing lost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from preftune.cli.main import run
from preftune.training.checkpoint import load_latest, saved_steps
from preftune.training.manifest import read_manifest
from tests.training import runs
from tests.training.runs import command

GOOD = {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "Five."}


def pairs(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def a_file(folder: Path) -> Path:
    path = folder / "a-file"
    path.write_text("")
    return path


# name -> (words over the sound ones, given a folder; what the line must say)
Case = tuple[Callable[[Path], list[str]], tuple[str, ...]]
BROKEN: dict[str, Case] = {
    "wrong key": (lambda f: ["learning_rate=1e-4"], ("learning_rate", "Did you mean", "lr")),
    "wrong type": (lambda f: ["epochs=many"], ("epochs", "whole number", "'many'")),
    "missing file": (lambda f: [f"data.path={f}/none.jsonl"], ("none.jsonl",)),
    "missing model": (lambda f: [f"model={f}/none"], ("none", "no such model")),
    "truncated JSON": (lambda f: [f"data.path={pairs(f / 'd.jsonl', GOOD, json.dumps(GOOD)[:30])}"], ("d.jsonl:2",)),
    "empty response": (lambda f: [f"data.path={pairs(f / 'd.jsonl', GOOD, {**GOOD, 'chosen': ''})}"], ("d.jsonl:2", "empty")),
    "prompt longer than the window": (
        lambda f: [f"data.path={pairs(f / 'd.jsonl', {**GOOD, 'prompt': 'x' * 999})}"],
        ("prompt_too_long", "d.jsonl:1", "max_length"),
    ),
    "all-masked record": (
        lambda f: [f"data.path={pairs(f / 'd.jsonl', {'prompt': 'hi', 'responses': [{'text': '', 'finished': False}]})}"],
        ("d.jsonl:1",),
    ),
    "unknown format": (lambda f: [f"data.path={pairs(f / 'd.jsonl', {'a': 1, 'b': 2})}"], ("d.jsonl", "format")),
    "output under a file": (lambda f: [f"output={a_file(f)}/run"], ("a-file/run", "output")),
    "output that cannot be written": (lambda f: ["output=/proc/preftune"], ("/proc/preftune", "output")),
    "not enough for the method": (
        lambda f: [f"data.path={pairs(f / 'd.jsonl', {'prompt': 'hi', 'completion': 'there'})}"],
        ("no record has what", "d.jsonl:1"),
    ),
}


def one_line(text: str) -> str:
    lines = [line for line in text.strip().split("\n") if line]
    assert len(lines) == 1, text
    assert lines[0].startswith("preftune: ") and "Traceback" not in text
    return lines[0]


@pytest.mark.parametrize("name", BROKEN)
def test_one_clear_line_and_exit_code_2(name: str, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words, expected = BROKEN[name]
    changed = words(tmp_path)
    keys = {word.split("=")[0] for word in changed}
    sound = [w for w in command("dpo", tiny_llama, tmp_path / "run", "eval_fraction=0", "eval_every=null") if w.split("=")[0] not in keys]
    assert run(["train", *sound, *changed]) == 2
    captured = capfd.readouterr()
    line = one_line(captured.err)
    assert all(word in line for word in expected), line
    assert captured.out == ""
    assert not (tmp_path / "run" / "run.json").exists()  # nothing that a corrected command would stumble over
    corrected = pairs(tmp_path / "good.jsonl", GOOD, GOOD)
    assert runs.train(command("dpo", tiny_llama, tmp_path / "run", f"data.path={corrected}", "eval_fraction=0", "eval_every=null")) == 0


def test_one_real_process(tiny_llama: Path, tmp_path: Path) -> None:
    words = command("dpo", tiny_llama, tmp_path / "run", "data.path=" + str(pairs(tmp_path / "d.jsonl", GOOD, '{"prompt": "hi", "cho')))
    done = subprocess.run([sys.executable, "-m", "preftune", "train", *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert "d.jsonl:2" in one_line(done.stderr)


# ---- a disk that is full


def limited(words: list[str], log: str, limit: int, failpoint: str) -> None:
    """Train where no file may grow beyond `limit` bytes."""
    os.environ["PREFTUNE_FAILPOINT"] = failpoint
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    runs._child(words, log, "")


def run_limited(words: list[str], log: Path, limit: int) -> int:
    process = runs.processes.start(limited, words, str(log), limit, "")
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("disk") / "whole"
    assert runs.train(command("sft", tiny_llama, output)) == 0
    return output


def sizes(whole: Path) -> tuple[int, int]:
    """Bytes of the model's and of the optimizer's part of a checkpoint."""
    newest = sorted((whole / "checkpoints").iterdir())[-1]
    return (newest / "model.safetensors").stat().st_size, (newest / "optimizer.safetensors").stat().st_size


@pytest.mark.parametrize("where", ["checkpoint", "first checkpoint's model"])
def test_a_full_disk_loses_nothing_and_the_run_goes_on_when_there_is_room(
    where: str, whole: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    words, log = command("sft", tiny_llama, tmp_path / "run"), tmp_path / "log"
    model, optimizer = sizes(whole)
    assert optimizer > model > 50_000
    if where == "checkpoint":
        assert runs.run(words, tmp_path / "before", failpoint="step:kill:3") == -9
        assert saved_steps(tmp_path / "run" / "checkpoints") == [2]
    limit = (model + optimizer) // 2 if where == "checkpoint" else model // 2
    assert run_limited(words, log, limit) == 2
    last = log.read_text().strip().split("\n")[-1]
    step = 4 if where == "checkpoint" else 2
    assert f"step-{step:08d}: saving the checkpoint of step {step} failed: File too large. Raise the file size limit" in last
    assert "Traceback" not in log.read_text()
    assert read_manifest(tmp_path / "run").status == "failed"  # type: ignore[union-attr]
    found = load_latest(tmp_path / "run" / "checkpoints")
    assert (found.step if found else None) == (2 if where == "checkpoint" else None)
    assert not any(path.name.startswith(".tmp") for path in (tmp_path / "run").rglob("*"))
    assert runs.run(words, log) == 0, log.read_text()
    runs.assert_same(tmp_path / "run", whole)


def test_a_disk_that_is_full_at_the_final_save(whole: Path, tiny_llama: Path, tmp_path: Path) -> None:
    words, log = command("sft", tiny_llama, tmp_path / "run"), tmp_path / "log"
    assert runs.run(words, log, failpoint="final.before:kill") == -9
    assert run_limited(words, log, sizes(whole)[0] // 2) == 2
    last = log.read_text().strip().split("\n")[-1]
    assert "run/final: writing the final model failed: File too large. Raise the file size limit" in last
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "run" / "final").exists() and not (tmp_path / "run" / ".tmp-final").exists()
    assert runs.run(words, log) == 0, log.read_text()
    runs.assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "point", ["metrics.before:raise-enospc:4", "checkpoint.optimizer.safetensors:raise-enospc:2", "run.json.written:raise-enospc"]
)
def test_no_space_left_anywhere_is_one_line_and_can_be_mended(point: str, whole: Path, tiny_llama: Path, tmp_path: Path) -> None:
    words, log = command("sft", tiny_llama, tmp_path / "run"), tmp_path / "log"
    assert runs.run(words, log, failpoint=point) == 2
    assert "failed: No space left on device. Free some space on this disk, then run the same command again." in log.read_text()
    assert "Traceback" not in log.read_text()
    assert runs.run(words, log) == 0, log.read_text()
    runs.assert_same(tmp_path / "run", whole)
