"""Judges and policies that misbehave: one clear line, nothing of what was done before lost."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.cli.main import run
from tests.online import small
from tests.training import runs


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with exit code 2."""
    assert run(["train", *words]) == 2
    captured = capfd.readouterr().err.strip()
    assert "Traceback" not in captured
    return captured.splitlines()[-1]


BAD = {
    "return 1 / 0 * len(response.text)": "the rule {rule} fails on response",
    "return float('nan')": "the score nan",
    "return 'good'": "could not convert",
}


@pytest.mark.parametrize("body", BAD)
def test_a_rule_that_fails_is_one_line_and_what_was_done_is_kept(
    body: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It fails as long as a file is there, from the third rollout on; the rollout drawn before is not drawn again."""
    rule, broken = tmp_path / "rule.py", tmp_path / "broken"
    rule.write_text(
        f"from pathlib import Path\ncalls = []\n{small.RULE}\ndef moody(example, response):\n    calls.append(1)\n"
        f"    if Path({str(broken)!r}).exists() and len(calls) > 19:\n        {body}\n    return rule(example, response)\n"
    )
    broken.touch()
    words = small.words(place, tmp_path / "run", "grpo", f"judge={rule}:moody", "eval_fraction=0", "max_steps=5", "save_every=50")
    error = refused(words, capfd)
    assert BAD[body].format(rule=f"{rule}:moody") in error and "prompts.jsonl" in error, error
    assert len(small.steps(tmp_path / "run")) == 3
    drawn = (tmp_path / "run" / "rollouts" / "4" / "samples.jsonl").read_bytes()
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir(), "what was learned before is saved"
    broken.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("preftune.online.collect.Collector.tidy", lambda *a: None)
        assert runs.train(words) == 0
    assert (tmp_path / "run" / "rollouts" / "4" / "samples.jsonl").read_bytes() == drawn
    assert runs.train(small.words(place, tmp_path / "whole", "grpo", "eval_fraction=0", "max_steps=5", "save_every=50")) == 0
    ours, theirs = (small.steps(tmp_path / name) for name in ("run", "whole"))
    strip = lambda rows: [{k: v for k, v in row.items() if not runs.is_timing(k)} for row in rows]
    assert strip(ours) == strip(theirs)


def test_a_judge_that_gives_the_wrong_count_is_one_line(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from preftune.online import ready as module
    from preftune.rewards.judge import Opened

    def wrong(*args: Any, **kwargs: Any) -> Opened:
        return Opened(lambda examples: [[0.5] * max(1, len(e.responses) - 1) for e in examples], {})

    monkeypatch.setattr(module, "open_judge", wrong)
    error = refused(small.words(place, tmp_path / "run", "grpo"), capfd)
    assert "gives 2 scores for 3 responses" in error


class _Judge(BaseHTTPRequestHandler):
    """Answers with a 7, late once so many have been answered."""

    server: _Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        with self.server.lock:
            self.server.answered += 1
            late = self.server.hangs and self.server.answered > 8
        if late:
            self.server.over.wait(30)
        data = json.dumps({"choices": [{"message": {"content": "7"}}]}).encode()
        try:
            self.send_response(200)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # whoever asked is gone

    def log_message(self, *words: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Judge)
        self.lock, self.answered, self.hangs, self.over = threading.Lock(), 0, True, threading.Event()


@pytest.fixture
def server() -> Iterator[_Server]:
    with _Server() as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        yield one
        one.over.set()
        one.shutdown()


def test_an_endpoint_that_hangs_is_one_line_and_goes_on_once_it_answers(
    server: _Server, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    endpoint = f"judge={{endpoint: {{url: '{url}', model: m, timeout: 2, attempts: 1, parallel: 2}}}}"
    words = small.words(place, tmp_path / "run", "grpo", endpoint, "eval_fraction=0", "max_steps=2")
    error = refused(words, capfd)
    assert url in error and "does not answer" in error, error
    assert len(small.steps(tmp_path / "run")) == 1 and small.lines(tmp_path / "run", 2)
    server.hangs = False
    assert runs.train(words) == 0
    assert len(small.steps(tmp_path / "run")) == 2


# ---- scores and responses that teach nothing


@pytest.mark.parametrize("method", ["grpo", "gspo", "cispo", "rloo", "reinforce++_baseline", "remax"])
def test_regression_10_equal_scores_teach_nothing(method: str, place: Path, tmp_path: Path) -> None:
    """Advantages are exactly 0, and so is the gradient; 0.1 has no exact mean in binary."""
    rule = tmp_path / "rule.py"
    rule.write_text("def rule(example, response):\n    return 0.1\n")
    n = "1" if method == "remax" else "3"
    more = (f"judge={rule}:rule", f"rollout.n={n}", "eval_fraction=0", "max_steps=2", "method.missing_eos=keep")
    off = () if method in ("grpo", "gspo", "cispo") else ("method.kl=0",)
    rows = small.trained(place, tmp_path / "run", method, *more, *off)
    for tree in small.kept(tmp_path / "run").trees:
        assert all((one == 0).all() for one in tree.told["advantage"])
    assert all(row["grad_norm"] == 0.0 and row["loss"] == 0.0 and row["taken"] for row in rows)
    if n != "1":
        assert rows[0]["equal_scores"] == 1.0
    started, ended = _weights(place / "model"), _weights(tmp_path / "run" / "final")
    assert all(torch.equal(started[name], ended[name]) for name in ended)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", ["grpo", "ppo", "rloo", "reinforce++"])
@pytest.mark.parametrize("mode", ["keep", "subtract", "replace", "mask"])
def test_where_every_response_is_cut_each_rule_does_as_it_says(method: str, mode: str, tmp_path: Path) -> None:
    """The policy never ends a turn."""
    here = small.place(tmp_path / "place", ends=-12.0)
    n = ("rollout.n=1",) if method in ("ppo", "reinforce++") else ()
    more = (f"method.missing_eos={mode}", "eval_fraction=0", "max_steps=2", *n)
    rows = small.trained(here, tmp_path / "run", method, *more)
    found, scored = small.kept(tmp_path / "run"), small.lines(tmp_path / "run", 1, "scores")
    assert rows[0]["finished"] == 0
    raw = [score for line in scored for score in line["scores"]]
    counted = [float(score) for tree in found.trees for score in tree.scores]
    expected = {"keep": raw, "subtract": [s - 1 for s in raw], "replace": [-1.0] * len(raw), "mask": raw}[mode]
    assert counted == pytest.approx(expected)
    weights = [float(w) for tree in found.trees for w in tree.weights]
    assert weights == [0.0 if mode == "mask" else 1.0] * len(raw)
    if mode == "mask":
        assert all(row["loss"] == 0.0 and row["grad_norm"] == 0.0 for row in rows)
    assert all(math.isfinite(row["loss"]) and row["taken"] for row in rows)


@pytest.mark.parametrize("method", ["grpo", "ppo", "remax"])
def test_a_policy_that_ends_at_once_still_trains(method: str, tmp_path: Path) -> None:
    """Every response is the token that ends a turn: one token, text that is empty."""
    here = small.place(tmp_path / "place", ends=12.0)
    n = ("rollout.n=1",) if method != "grpo" else ()
    rows = small.trained(here, tmp_path / "run", method, "max_steps=2", *n)
    assert rows[0]["response_tokens"] < 2 and rows[0]["finished"] > 0.9
    assert any(line["text"] == "" for line in small.lines(tmp_path / "run"))
    assert all(math.isfinite(row["loss"]) and row["taken"] for row in rows)


# ---- mistakes, told before a model is loaded


MISTAKES = [
    ("grpo", ("rollout.n=1",), "rollout.n"),
    ("rloo", ("rollout.n=1",), "rollout.n"),
    ("grpo", ("max_length=10",), "max_length"),
    ("grpo", ("method.kl_target=1",), "must not start at 0"),
    ("grpo", ("method.kl_loss=k2",), "`kl_loss` has no effect"),
    ("grpo", ("method.kl_horizon=5",), "`kl_horizon` has no effect"),
    ("grpo", ("method.missing_eos=keep", "method.missing_eos_penalty=2"), "`missing_eos_penalty` has no effect"),
    ("grpo", ("method.target_kl=0.1",), "`target_kl` has no effect"),
    ("grpo", ("method.overlong=99",), "`overlong`"),
    ("grpo", ("method.old_logp=rollout", "rollout.top_p=0.9"), "elsewhere than at 1"),
    ("grpo", ("method.old_logp=rollout", "method.importance_cap=2"), "`importance_cap` has no effect"),
    ("grpo", ("dense.s=x.py:f", "method.scale=none"), "`scale` has no effect"),
    ("grpo", ("watch_reference=false", "reference=gone"), "`reference` has no effect"),
    ("grpo", ("watch_reference=false", "reference_sync.every=1"), "`reference_sync` has no effect"),
    ("grpo", ("watch_reference=false", "alarms.kl=3"), "`alarms.kl` has no effect"),
    ("rloo", ("watch_reference=false",), "`watch_reference: false` has no effect"),
    ("grpo", ("gold_every=2",), "`gold_every` has no effect"),
    ("grpo", ("normalise_parts=true",), "`normalise_parts` needs"),
    ("grpo", ("rollout.prompts=1",), "must be at least `prompts_per_step`"),
    ("grpo", ("rollout.repetition_penalty=1.2",), "another distribution"),
    ("grpo", ("cache_reference=true",), "`cache_reference` has no effect"),
    ("grpo", ("alarms.action=rollback", "keep_checkpoints=1"), "needs an older checkpoint"),
    ("grpo", ("lora.rank=2", "lora.dropout=0.1"), "lora.dropout"),
    ("ppo", ("method.objective=penalty", "rollout.prompts=2"), "`objective: penalty` has no effect"),
    ("ppo", ("method.penalty=2",), "`penalty` has no effect"),
    ("ppo", ("method.k_step=2", "method.lam=0.5"), "`lam` has no effect"),
    ("ppo", ("method.critic=shared", "method.critic_lr=1e-3"), "`critic_lr` has no effect"),
    ("ppo", ("method.critic=gone",), "gone"),
    ("remax", ("normalise_parts=true", "judge={parts: {a: length, b: finished}}"), "another scale"),
]


@pytest.mark.parametrize(("method", "more", "says"), MISTAKES, ids=[" ".join((m, *more)) for m, more, _ in MISTAKES])
def test_mistakes_are_one_line_before_any_model_is_loaded(
    method: str,
    more: tuple[str, ...],
    says: str,
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from preftune.models import load

    monkeypatch.setattr(load, "load_causal_lm", lambda *a, **k: pytest.fail("a model is loaded"))
    base = ("rollout.prompts=4", "rollout.n=1") if method == "ppo" else ()
    error = refused(small.words(place, tmp_path / "run", method, *base, *more), capfd)
    assert says in error, error


def test_a_reference_that_would_never_move_is_refused(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = small.words(place, tmp_path / "run", "grpo", "reference_sync.every=9", "max_steps=3")
    assert "the reference would never move: the run has 3 steps" in refused(words, capfd)
