"""Two processes under torchrun give what one gives."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from preftune.methods import METHODS
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel
from preftune.training.distributed import World
from preftune.training.learner import Learner, Schedule, make_optimizer
from preftune.training.manifest import read_manifest
from preftune.training.reference import live_reference
from tests import tiny
from tests.training import processes, runs
from tests.training.runs import LORA, command

# Odd numbers everywhere: 7 records in steps of 3, so that the last step of an epoch has one record and the second process nothing to do.
CASES = {
    "dpo": ("dpo", "eval_every=3"),
    "reward": ("reward", *LORA),
    "sft": ("sft", "gradient_checkpointing=true"),
    "dpo, moving reference": ("dpo", "reference_sync.every=2", "reference_sync.mix=0.5"),
    "kto": ("kto", "eval_every=3"),
}


def torchrun(words: list[str], port: int) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PREFTUNE_ALLOCATOR": "system"}
    program = [sys.executable, *launcher, "-m", "preftune", "train", *words]
    return subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, float):
            assert ours[key] == pytest.approx(value, rel=2e-4, abs=2e-5), (key, ours, theirs)
        else:
            assert ours[key] == value, key


def assert_as_one(case: str, model: Path, folder: Path) -> None:
    method, *words = CASES[case]
    assert runs.train(command(method, model, folder / "one", *words)) == 0
    one, two = runs.rows(folder / "one"), runs.rows(folder / "two")
    assert len(two) == len(one) >= 8
    for ours, theirs in zip(two, one, strict=True):
        close(ours, theirs)
    expected = load_file(folder / "one" / "final" / "model.safetensors")
    found = load_file(folder / "two" / "final" / "model.safetensors")
    start = load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    moved = 0.0
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4, rtol=1e-3)
        if name in start:
            moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 2e-3  # the tolerance is small beside what training did


def test_regression_35_torchrun_logs_and_ends_as_one_process(tiny_llama: Path, tmp_path: Path) -> None:
    method, *words = CASES["dpo"]
    both = torchrun(command(method, tiny_llama, tmp_path / "two", *words), free_port())
    output, _ = both.communicate(timeout=120)
    assert both.returncode == 0, output
    assert "over 2 processes" in output and output.count("Done:") == 1
    assert_as_one("dpo", tiny_llama, tmp_path)


def as_rank(rank: int, port: int, target: Any, args: tuple[Any, ...]) -> None:
    """`target(*args)` in the place that torchrun would give it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    target(*args)


def run_two(target: Any, *args: Any, failpoint: str = "") -> list[int | None]:
    """Two processes of one world; their exit codes."""
    port = free_port()
    both = [processes.start(as_rank, rank, port, target, args, failpoint=failpoint) for rank in range(2)]
    for one in both:
        one.join(60)
    return [one.exitcode for one in both]


@pytest.mark.parametrize("case", [case for case in CASES if case != "dpo"])
def test_regression_35_two_processes_log_and_end_as_one(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    method, *words = CASES[case]
    both = run_two(runs._child, command(method, tiny_llama, tmp_path / "two", *words), str(tmp_path / "log"), "")
    assert both == [0, 0], (tmp_path / "log").read_text()
    assert_as_one(case, tiny_llama, tmp_path)


def test_two_processes_stop_together_and_go_on_together(tiny_llama: Path, tmp_path: Path) -> None:
    """Both get the signal, as from a scheduler; two processes save after the step, and one process may go on with their run."""
    words = command("sft", tiny_llama, tmp_path / "two", *CASES["sft"][1:])
    assert run_two(runs._child, words, str(tmp_path / "log"), "", failpoint="step:term:3") == [143, 143], (tmp_path / "log").read_text()
    assert read_manifest(tmp_path / "two").status == "interrupted"  # type: ignore[union-attr]
    assert run_two(runs._child, words, str(tmp_path / "log"), "") == [0, 0], (tmp_path / "log").read_text()
    assert "Resuming after step 3" in (tmp_path / "log").read_text()
    assert_as_one("sft", tiny_llama, tmp_path)


def two_worlds() -> None:
    """What a world of two must do; an assertion that fails is a non-zero exit."""
    from preftune.models.policy import RewardModel

    world = World.join("cpu")
    assert world.size == 2 and world.share(world.rank) == 0 and world.any(world.rank == 1) and not world.any(False)
    assert world.sum_numbers({"loss": 1.0} if world.rank else {}) == {"loss": 1.0}
    for bad in (float("nan"), float("inf")):
        method = METHODS["reward"]
        if world.rank == 1:
            method = dataclasses.replace(method, loss=lambda out, batch, knobs, bad=bad: (out.rewards.sum() * bad, {}))
        torch.manual_seed(0)
        learner = Learner(method, method.knobs(), RewardModel(tiny.model()), world, 64)
        learner.optimizer = make_optimizer(learner.parameters, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
        learner.schedule = Schedule(1e-2, 10)
        before = {name: p.detach().clone() for name, p in learner.parameters.items()}
        step = learner.step([tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7, 9), seed=2)], 0)
        assert not step.taken and not math.isfinite(step.loss), step
        assert all(torch.equal(before[name], p) for name, p in learner.parameters.items())
        alone = learner.step([tiny.tree(9, (5, 8), seed=1)], 0)  # only the first process has something to do
        assert alone.taken and math.isfinite(alone.grad_norm) and alone.grad_norm > 0
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, [p.detach() for p in learner.parameters.values()])
        assert all(torch.equal(a, b) for a, b in zip(*everyone, strict=True))
    world.leave()


def test_a_process_without_micro_batch_counts_as_zeros_and_a_bad_loss_anywhere_stops_all() -> None:
    assert run_two(two_worlds) == [0, 0]


def surveyed() -> None:
    """Every process finds what one alone finds, also where there is too little for all of them to look at."""
    world, alone = World.join("cpu"), World(torch.device("cpu"))
    trees = [METHODS["kto"].keep(tiny.tree(3 + i, (4, 2 + i), seed=i), METHODS["kto"].knobs()) for i in range(5)]
    for step in (trees, trees[:2], trees[:1]):
        found = [survey_of(one, budget).survey(step) for one, budget in ((world, 16), (world, 4096), (alone, 4096))]
        everyone: list[Any] = [None, None]
        torch.distributed.all_gather_object(everyone, found)
        assert everyone[0][:2] == everyone[1][:2] and everyone[0] == pytest.approx([everyone[0][2]] * 3, rel=1e-5)
        assert abs(found[0]) > 0.1 if len(step) > 1 else found[0] == 0
    world.leave()


def survey_of(world: World, budget: int) -> Learner:
    method, models = METHODS["kto"], [tiny.model(seed=seed) for seed in (0, 5)]
    for one in models:
        one.set_attn_implementation(NAME)
    reference = live_reference(LanguageModel(models[1]).eval().requires_grad_(False))
    return Learner(method, method.knobs(), LanguageModel(models[0]), world, budget, reference)


def test_a_survey_of_two_processes_is_that_of_one() -> None:
    assert run_two(surveyed) == [0, 0]


def test_alone_nothing_is_shared() -> None:
    world = World(torch.device("cpu"))
    assert world.first and world.share("x") == "x" and world.any(True) and world.sum_numbers({"a": 1.0}) == {"a": 1.0}
