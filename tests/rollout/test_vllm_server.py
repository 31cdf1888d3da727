"""A server that is started here: it dies and nothing is lost, it hangs, it never comes up, and it never outlives who started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune.errors import UserError
from preftune.rollout import launch
from preftune.rollout.config import VllmConfig
from preftune.rollout.samples import Sample
from preftune.rollout.sampling import Sampling
from preftune.rollout.vllm import VllmServer
from tests.rollout import fake_vllm

ENDS = frozenset({0, 1, 2})
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [3, 4]]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A "Python" that runs the stand-in in place of vLLM."""
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake_vllm.__file__}" "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def server(python: str, model: Path, said: list[str] | None = None, plan: Any = None, **changes: Any) -> VllmServer:
    (model / "fake.json").write_text(json.dumps(plan or {}))
    config = VllmConfig(python=python, **changes)
    say = [].append if said is None else said.append
    return VllmServer(config, str(model), ENDS, fake_vllm.text, compute=torch.float32, cache_bytes=3 * 2**30, say=say)


def drawn(one: VllmServer) -> dict[tuple[int, int], Sample]:
    found = list(one.generate(PROMPTS, 4, Sampling(12), 5))
    assert len(found) == len({(s.prompt, s.number) for s in found})
    return {(s.prompt, s.number): s for s in found}


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()


def wait_gone(pid: int) -> bool:
    deadline = time.monotonic() + 15
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return gone(pid)


@pytest.fixture(scope="module")
def whole(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[int, ...]]:
    """What a server that lives draws."""
    with server(python, tmp_path_factory.mktemp("whole")) as one:
        return {key: s.ids for key, s in drawn(one).items()}


def test_how_it_is_started_and_that_nothing_is_left_of_it(python: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    with server(python, model, plan={"child": True}, arguments=("--max-model-len", "99")) as one:
        assert len(drawn(one)) == 16
        assert one.service.child is not None
        folder = one.service.child.folder
        assert folder.stat().st_mode & 0o777 == 0o700, "nobody else opens its socket"
        pids = [int((model / name).read_text()) for name in ("pid", "child")]
        assert not any(map(gone, pids))
    assert all(map(wait_gone, pids)) and not folder.exists()
    words, environment = (json.loads((model / name).read_text()) for name in ("words", "environment"))
    assert words[-2:] == ["--max-model-len", "99"] and "--host" not in words and "--trust-remote-code" not in words
    assert words[words.index("--dtype") + 1] == "float32" and words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert words[words.index("--load-format") + 1] == "safetensors"
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1" and environment["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert environment["PYTHONPATH"] == str(folder / "python")


def test_it_dies_and_nothing_is_lost_or_doubled(python: str, model: Path, whole: Any) -> None:
    said: list[str] = []
    with server(python, model, said, {"dies": 2, "after": 5}) as one:
        assert {key: s.ids for key, s in drawn(one).items()} == whole
    assert (model / "starts").read_text() == "3" and len(said) == 2
    assert said[0] == "the vLLM server ended (ValueError: out of the world); it is started again"


def test_it_hangs_and_is_started_again(python: str, model: Path, whole: Any) -> None:
    said: list[str] = []
    with server(python, model, said, {"hangs": 1, "after": 5}, timeout=1.0) as one:
        assert {key: s.ids for key, s in drawn(one).items()} == whole
    assert (model / "starts").read_text() == "2" and len(said) == 1


def test_one_that_dies_again_and_again_is_given_up(python: str, model: Path) -> None:
    with server(python, model, plan={"dies": 99, "after": 1, "later": 0}) as one, pytest.raises(UserError) as caught:
        drawn(one)
    assert "the vLLM server ended: ValueError: out of the world. What was drawn is kept" in str(caught.value)
    assert int((model / "starts").read_text()) >= 4 and wait_gone(int((model / "pid").read_text()))


def test_one_that_never_comes_up_says_why(python: str, model: Path) -> None:
    with server(python, model, plan={"never": True}) as one, pytest.raises(UserError, match="RuntimeError: the engine has no room"):
        drawn(one)
    assert (model / "starts").read_text() == "1"


def test_a_python_without_vllm_is_said_at_once(model: Path) -> None:
    with pytest.raises(UserError, match="this Python does not start"), server("/no/such/python", model):
        pass
    bare = model / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"has no vLLM. Run `pip install 'preftune\[vllm\]'`"), server(str(bare), model):
        pass


def test_leaving_while_it_starts(python: str, model: Path) -> None:
    start = time.monotonic()
    with server(python, model) as one:
        assert list(one.generate(PROMPTS, 4, Sampling(12), 5, give_up=lambda: True)) == []
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("said", [b"", launch.KEEP])
def test_the_folder_goes_with_an_owner_that_left_without_a_word(tmp_path: Path, said: bytes) -> None:
    """However soon after the pipe closes the command ends: of a killed owner the pipe closes before the system calls it dead."""
    folder = tmp_path / "folder"
    folder.mkdir()
    one = subprocess.Popen([sys.executable, launch.__file__, str(folder), "sleep", "60"], stdin=subprocess.PIPE, start_new_session=True)
    assert one.stdin is not None
    time.sleep(0.5)
    one.stdin.write(said)
    one.stdin.close()
    one.wait(60)
    assert folder.exists() == bool(said)


def test_it_does_not_outlive_a_preftune_that_is_killed(python: str, model: Path) -> None:
    (model / "fake.json").write_text(json.dumps({"child": True, "delay": 5.0}))
    code = (
        "import torch\nfrom preftune.rollout.vllm import *\n"
        f"one = VllmServer(VllmConfig(python={python!r}), {str(model)!r}, frozenset(), compute=torch.float32)\n"
        "one.start()\nprint(one.service.child.folder, flush=True)\nlist(one.generate([[3]], 1, Sampling(5)))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (model / "child").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        pids = [int((model / name).read_text()) for name in ("pid", "child")]
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert all(map(wait_gone, pids))
    assert parent.stdout is not None
    folder = Path(parent.stdout.read().strip())
    deadline = time.monotonic() + 60
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert folder.name.startswith("preftune-vllm-") and not folder.exists()
