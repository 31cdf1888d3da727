"""`preftune sample` as a person runs it: records out, killed and resumed, mistakes in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from preftune import formats
from preftune.cli.main import run
from tests import tiny

COUNT = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model") / "tiny", scale=2.0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Say {i}!"}], "reference_answer": str(i)} for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(model: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    return ["sample", str(model), "--prompts", str(prompts), "--output", str(output), "-n", "3", "--max-new-tokens", "12", *more]


def test_records_with_responses_in_their_order(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(words(model, prompts, out)) == 0
    examples = formats.read(out).examples
    assert len(examples) == COUNT and all(len(e.responses) == 3 for e in examples)
    assert [e.reference_answer for e in examples] == [str(i) for i in range(COUNT)]
    for response in (r for e in examples for r in e.responses):
        assert response.finished == (response.meta["finish"] == "stop") and 1 <= response.meta["tokens"] <= 12
        assert response.meta["logp"] == pytest.approx(response.meta["drawn_logp"], abs=1e-4)
    assert not list(tmp_path.glob("*.partial"))


def test_a_kill_at_any_moment_loses_and_doubles_nothing(model: Path, prompts: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.jsonl"
    more = ("--max-new-tokens", "40", "--cache-gb", "0.001")
    assert run(words(model, prompts, expected, *more)) == 0
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    for lines in (2, 7, 12):
        process = subprocess.Popen([sys.executable, "-m", "preftune", *words(model, prompts, out, *more)], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
    if not out.exists():
        assert run(words(model, prompts, out, *more)) == 0
    assert out.read_bytes() == expected.read_bytes()


def test_mistakes_are_one_line_and_nothing_is_left_behind(
    model: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 400}) + "\n")
    cases = [
        (words(model, blank, out), "blank.jsonl:2"),
        (words(model, tmp_path / "none.jsonl", out), "none.jsonl"),
        (words(model, prompts, out, "--top-p", "0"), "top_p is 0.0"),
        (words(model, prompts, tmp_path / "out.txt"), "unknown kind of file"),
        (words(model, long, out), "window of 256"),
        (words(model, prompts, prompts), "there already"),
    ]
    for line, told in cases:
        assert run(line) == 2, line
        said = [one for one in capfd.readouterr().err.strip().splitlines() if one.startswith("preftune:") or "rror" in one]
        assert len(said) == 1 and told in said[0], (line, said)
    assert not list(tmp_path.glob("*.txt*")), "the ending is judged before anything is drawn"
    assert prompts.read_text().count("\n") == COUNT and not out.exists()
