"""A running average of the weights: its formula, where it goes, and that it disturbs nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from preftune.training.reference import RunningAverage
from tests import tiny
from tests.training import runs
from tests.training.runs import command


def test_it_is_the_formula_written_out() -> None:
    weights = {"w": torch.tensor([1.0, 2.0]).requires_grad_()}
    average = RunningAverage(weights, 0.75)
    for value in (5.0, 9.0):
        with torch.no_grad():
            weights["w"].fill_(value)
        average.follow(1)
    assert torch.allclose(
        average.tensors["w"], torch.tensor([0.75 * (0.75 * 1 + 0.25 * 5) + 0.25 * 9, 0.75 * (0.75 * 2 + 0.25 * 5) + 0.25 * 9])
    )
    average.install()
    assert torch.equal(weights["w"], average.tensors["w"]) and weights["w"].requires_grad


def test_the_final_model_is_the_average_and_training_is_as_without_it(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model")
    plain, averaged, soon = (tmp_path / name for name in ("plain", "averaged", "soon"))
    assert runs.train(command("sft", model, plain)) == 0
    assert runs.train(command("sft", model, averaged, "average=0.9")) == 0
    assert runs.train(command("sft", model, soon, "average=1e-9")) == 0
    assert runs.rows(plain) == runs.rows(averaged)
    newest = max((averaged / "checkpoints").glob("step-*"))
    kept, final = load_file(newest / "average.safetensors"), load_file(averaged / "final/model.safetensors")
    assert all(torch.equal(tensor, final[name.removeprefix("backbone.hf.")]) for name, tensor in kept.items())
    last, near = load_file(plain / "final/model.safetensors"), load_file(soon / "final/model.safetensors")
    assert any(not torch.allclose(final[name], last[name], atol=1e-5) for name in last)
    assert all(torch.allclose(near[name], last[name], atol=1e-6) for name in last)


def test_a_run_that_is_stopped_goes_on_with_its_average(tmp_path: Path) -> None:
    model = tiny.save(tmp_path / "model")
    words = lambda name: command("sft", model, tmp_path / name, "average=0.9")
    assert runs.train(words("whole")) == 0
    assert runs.run(words("killed"), tmp_path / "log", failpoint="step:kill:4") < 0
    assert runs.run(words("killed"), tmp_path / "log") == 0
    runs.assert_same(tmp_path / "killed", tmp_path / "whole")
