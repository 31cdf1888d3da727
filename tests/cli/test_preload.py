"""The allocator under heavy commands: loaded once, with every word of the command kept, and never where it was not asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from preftune.cli import preload

PROBE = """
import json, os, sys
with open(os.environ["STARTS"], "a") as starts:
    starts.write("x")
from preftune.cli.preload import preload_allocator
preload_allocator()
print(json.dumps({
    "argv": sys.argv[1:], "warn": sys.warnoptions, "utf8": sys.flags.utf8_mode, "prefix": sys.prefix, "pid": os.getpid(),
    "mapped": "libmimalloc" in open("/proc/self/maps").read(), "torch": "torch" in sys.modules,
    "env": {k: v for k, v in os.environ.items() if k.startswith(("MIMALLOC", "LD_PRELOAD", "PREFTUNE"))},
}))
"""
installed = pytest.mark.skipif(
    sys.platform != "linux" or preload.allocator() is None or preload.cuda(os.environ), reason="needs Linux, cmeel-mimalloc and no GPU"
)


def start(tmp_path: Path, *words: str, **env: str) -> tuple[dict, int, int]:
    """What the probe saw, its process id at the start, and how often Python started."""
    script, starts = tmp_path / "probe.py", tmp_path / "starts"
    script.write_text(PROBE)
    clean = {k: v for k, v in os.environ.items() if k not in (preload.SWITCH, "LD_PRELOAD")}
    child = subprocess.Popen(
        [sys.executable, "-W", "error::UserWarning", "-X", "utf8=1", str(script), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean, "STARTS": str(starts), **env},
    )
    out, err = child.communicate(timeout=60)
    assert err == ""
    return json.loads(out), child.pid, len(starts.read_text())


@installed
def test_a_heavy_command_runs_on_the_allocator_with_every_word_kept(tmp_path: Path) -> None:
    words = ["train", "dpo", "data=[a b, 'c']", "output=$HOME/*", "", "--x"]
    seen, pid, starts = start(tmp_path, *words)
    assert seen["mapped"] and starts == 2
    assert (seen["argv"], seen["warn"], seen["utf8"]) == (words, ["error::UserWarning"], 1)
    assert (seen["pid"], seen["prefix"]) == (pid, sys.prefix)  # the same process, as torchrun and a shell's kill expect
    assert seen["env"]["MIMALLOC_PURGE_DELAY"] == "-1" and seen["env"]["MIMALLOC_ALLOW_LARGE_OS_PAGES"] == "1"


@installed
def test_the_user_s_own_settings_are_kept(tmp_path: Path) -> None:
    library = preload.allocator()
    seen, _, _ = start(tmp_path, "train", MIMALLOC_PURGE_DELAY="10", LD_PRELOAD="libm.so.6")
    assert seen["env"]["MIMALLOC_PURGE_DELAY"] == "10"
    assert seen["env"]["LD_PRELOAD"] == f"{library}:libm.so.6"


@installed
@pytest.mark.parametrize(
    ("words", "env"),
    [
        (["train"], {"PREFTUNE_ALLOCATOR": "system"}),
        (["train"], {"PREFTUNE_ALLOCATOR": "mimalloc"}),
        (["config", "train"], {}),
        (["train", "--help"], {}),
        (["--version"], {}),
    ],
)
def test_no_second_start_where_it_is_not_wanted(tmp_path: Path, words: list[str], env: dict[str, str]) -> None:
    seen, _, starts = start(tmp_path, *words, **env)
    assert starts == 1 and not seen["mapped"]


def test_another_allocator_or_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "preftune", "train"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(preload, "cuda", lambda env: False)
    models_are_read = ("train", "quickstart", "check", "chat", "evaluate", "sample", "score")
    assert all(preload.wanted([command], {}) for command in models_are_read)
    assert not preload.wanted(["select", "best"], {})
    assert not preload.wanted(["train"], {"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"})
    assert not preload.wanted(["train"], {"LD_PRELOAD": "libtcmalloc_minimal.so.4"})
    monkeypatch.setattr(preload, "cuda", lambda env: True)
    assert not preload.wanted(["train"], {})


def test_not_after_torch_and_not_for_a_program_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(preload, "cuda", lambda env: False)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-", "train"])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert not preload.wanted(["train"], {})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "preftune", "train"])
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not preload.wanted(["train"], {})


def test_a_hidden_gpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert preload.cuda({})
    assert not preload.cuda({"CUDA_VISIBLE_DEVICES": ""})
    assert not preload.cuda({"CUDA_VISIBLE_DEVICES": "-1"})
