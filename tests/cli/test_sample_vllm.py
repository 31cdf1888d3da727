"""`preftune sample --engine vllm` and rounds with it, beside a stand-in server that computes with the model's own weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from preftune import formats
from preftune.cli.main import run
from tests import tiny
from tests.rollout.fake_vllm import Fake
from tests.rounds.test_rounds import RULE, words
from tests.training import runs


class Server(Fake):
    """Serves a small model's weights, and those of another folder when it is told to."""

    def __init__(self, model: Path) -> None:
        super().__init__()
        self.inner = AutoModelForCausalLM.from_pretrained(model).float().eval()
        self.window, self.rows, self.logits, self.reload = 512, self.computed, lambda ids: self.computed(ids)[-1], self.told
        self.folders: list[str] = []
        self.deaf = False

    @torch.no_grad()
    def computed(self, ids: Any) -> np.ndarray:
        found: np.ndarray = self.inner(torch.tensor([list(ids)])).logits[0].double().numpy()
        return found

    def told(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.folders.append(body["kwargs"]["weights_path"])
        if not self.deaf:
            self.inner.load_state_dict(load_file(Path(self.folders[-1]) / "model.safetensors"), strict=False)
        return 200, {"results": [None]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    tiny.save(folder / "model", scale=2.0, max_position_embeddings=512)
    tiny.save(folder / "other", scale=2.0, seed=1, max_position_embeddings=512)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}!"}]} for i in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    return folder


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    with Server(place / "model") as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield one
        one.shutdown()


def sample(place: Path, output: Path, *more: str, model: str = "model") -> list[str]:
    told = ["sample", str(place / model), "--prompts", str(place / "prompts.jsonl"), "--output", str(output), "-n", "3"]
    return [*told, "--max-new-tokens", "8", "--precision", "fp32", *more]


def test_records_of_a_server_killed_and_gone_on_with(
    place: Path, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    asked = ("--engine", "vllm", "--vllm-url", server.url, "--temperature", "0.8")
    assert run(sample(place, whole, *asked)) == 0
    said = capfd.readouterr().err
    assert "log-probabilities of vLLM and of this model differ by" in said and "same model" not in said
    for example in formats.read(whole).examples:
        assert len(example.responses) == 3 and all(r.meta["logp"] != r.meta["drawn_logp"] for r in example.responses)
    server.delay, partial = 0.3, tmp_path / "out.jsonl.partial"
    server.reply = lambda body, count: time.sleep(0.1 * (count % 7))
    process = subprocess.Popen([sys.executable, "-m", "preftune", *sample(place, out, *asked)], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 4):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.delay = 0.0
    assert not out.exists() and run(sample(place, out)) == 2, "the local engine does not go on with what vLLM drew"
    assert run(sample(place, out, *asked)) == 0
    assert "going on" in capfd.readouterr().err
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--vllm-url", "http://127.0.0.1:1"), "--vllm-url has no effect without --engine vllm"),
        (("--vllm-argument=--port",), "--vllm-argument has no effect"),
        (("--engine", "vllm", "--vllm-url", "http://10.0.0.1:1"), "an address of this machine"),
        (("--engine", "vllm", "--vllm-argument=--trust-remote-code"), "cannot have --trust-remote-code"),
        (("--engine", "vllm"), "has no vLLM. Run `pip install 'preftune[vllm]'`"),
    ],
)
def test_mistakes_are_one_line(place: Path, tmp_path: Path, more: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(sample(place, tmp_path / "out.jsonl", *more)) == 2
    assert says in capfd.readouterr().err.strip().splitlines()[-1]


def test_a_server_of_another_model_is_refused(place: Path, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(sample(place, tmp_path / "out.jsonl", "--engine", "vllm", "--vllm-url", server.url, model="other")) == 2
    assert "does not serve the new weights" in capfd.readouterr().err


def rounds(place: Path, output: Path, server: Server, *more: str) -> list[str]:
    return words(place, output, "raft", "rollout.engine=vllm", f"rollout.vllm.url={server.url}", "eval_fraction=0.2", *more)


def test_each_round_s_weights_are_served(place: Path, server: Server, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert runs.train(rounds(place, output, server, "keep_models=true")) == 0
    served = [Path(one) for one in dict.fromkeys(server.folders)]
    assert served == [(place / "model").resolve(), output / "rounds/1/train/final", output / "rounds/2/train/final"]
    for number in (1, 2):
        facts = json.loads((output / f"rounds/{number}/facts.json").read_text())
        assert facts["sampler_mismatch"] < 1e-4 and facts["sampler_kl"] < 1e-6


def test_a_round_whose_weights_do_not_arrive_ends_in_one_line(
    place: Path, server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.deaf = True
    assert run(["train", *rounds(place, tmp_path / "run", server, "lr=0.02")]) == 2
    assert "does not serve the new weights" in capfd.readouterr().err.strip().splitlines()[-1]
    assert run(["train", *rounds(place, tmp_path / "more", server, "rollout.engine=local")]) == 2
    assert "`vllm` has no effect with `engine: local`" in capfd.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("command", ["sample", "score", "select best"])
def test_under_torchrun_it_is_refused(
    place: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    files = {
        "sample": [str(place / "model"), "--prompts", str(place / "prompts.jsonl")],
        "score": [str(place / "prompts.jsonl"), "--judge", "length"],
    }
    told = files.get(command, [str(place / "prompts.jsonl")])
    assert run([*command.split(), *told, "--output", str(tmp_path / "out.jsonl")]) == 2
    name = command.split()[0]
    assert f"preftune {name} runs in one process. Start it without torchrun." in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
