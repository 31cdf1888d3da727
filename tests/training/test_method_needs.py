"""What a method or its knobs ask of the records is looked at before any model is loaded, through the real command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from preftune.cli.main import resolve, run
from preftune.errors import UserError
from preftune.methods import METHODS
from preftune.records import Example, Response
from preftune.training import setup
from preftune.training.distributed import World
from tests.training import runs
from tests.training.runs import command
from tests.training.test_broken_inputs import GOOD, one_line, pairs

BARE = {"prompt": "hi", "completion": "there"}


def own(*scores: Any, prompt: str = "hi", **fields: Any) -> dict[str, Any]:
    """A record in Preftune's own format."""
    return {"prompt": prompt, "responses": [{"text": f"r{n}", "score": s} for n, s in enumerate(scores)], **fields}


# name -> (method, rows, words, what the line must say)
LACKING: dict[str, tuple[str, list[dict[str, Any]], list[str], tuple[str, ...]]] = {
    "no pair": ("reward", [BARE], [], ("no record has what", "two or more responses", "takes these: sft")),
    "no strength": ("reward", [GOOD], ["method.margin=given"], ("strength", "`margin`", "method.margin to none")),
    "no score": ("reward_pointwise", [GOOD], [], ("a response with a score", "give at least one a `score`", "reward")),
    "another attribute": (
        "reward_pointwise",
        [own({"helpful": 1.0})],
        ["method.attributes=[helpfull]"],
        ("`helpfull`", "Did you mean helpful?"),
    ),
    "no such attribute": ("reward", [own({"a": 1.0}, {"a": 2.0})], ["method.attributes=[a, honest]"], ("`honest`", "are scored: a")),
    "nobody named": ("reward_pointwise", [own(1.0)], ["method.annotators=zscore"], ("annotator", "method.annotators to none")),
    "nothing in common": (
        "reward_pointwise",
        [own(1.0, annotator="A"), own(1.0, prompt="ho", annotator="B")],
        ["method.annotators=additive"],
        ("two annotators", "Take zscore"),
    ),
    "all tied": ("reward_listwise", [own(1.0, 1.0)], [], ("no record has what", "put one above another", "reward_pointwise")),
}


@pytest.mark.parametrize("name", LACKING)
def test_one_clear_line_before_a_model_is_looked_for(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    method, rows, words, expected = LACKING[name]
    data = pairs(tmp_path / "d.jsonl", *rows)
    sound = command(method, tmp_path / "no model", tmp_path / "run", "eval_fraction=0", "eval_every=null", f"data.path={data}")
    assert run(["train", *sound, *words]) == 2
    captured = capfd.readouterr()
    line = one_line(captured.err)
    assert line.startswith(f"preftune: {data}:1: ") and all(word in line for word in expected), line
    assert captured.out == "" and not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("method.margin_scale=2.0", "method.margin_scale"),
        ("method.shrinkage=1.0", "method.shrinkage"),
        ("method.weights={a: 1.0}", "method.weights"),
    ],
)
def test_a_knob_without_effect_is_named_with_its_word(word: str, key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    method = "reward_pointwise" if "shrinkage" in word else "reward"
    assert run(["train", *command(method, tmp_path, tmp_path / "run"), word]) == 2
    line = one_line(capfd.readouterr().err)
    assert f"override '{word}'" in line and key.rpartition(".")[2] in line


def test_a_record_that_serves_may_stand_anywhere() -> None:
    """Also behind a thousand that do not."""
    bare = Example("p", (Response("a"),), where="d:1")
    method = METHODS["reward"]
    pair = Example("p", (Response("a", rank=1), Response("b", rank=2)))
    setup.require(method, method.knobs(), [*[bare] * 1500, pair], "d")
    with pytest.raises(UserError, match="d:1: no record has what"):
        setup.require(method, method.knobs(), [bare] * 1500, "d")


def test_annotators_are_measured_on_training_records_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """A is .3 more lenient; what B says of held-out records, far off, changes neither, and is put on the same scale."""
    train = [own(0.9, 0.7, annotator="A"), own(0.6, 0.4, annotator="B")]
    held = [own(9.0, 5.0, prompt="held out", annotator="B"), own(1.0, 2.0, prompt="held out", annotator="A")]
    files = [pairs(tmp_path / name, *rows) for name, rows in (("train.jsonl", train), ("held.jsonl", held))]
    words = ["eval_fraction=0", f"data.path={files[0]}", f"eval_data={files[1]}", "method.annotators=additive"]
    _, config = resolve(command("reward_pointwise", tiny_llama, tmp_path / "run", *words))
    ready = setup.prepare("reward_pointwise", config, World.join("cpu"), Console(quiet=True))
    found = [tree.rated[:, 0].tolist() for side in (ready.train, ready.held_out) for tree in side.trees]
    assert found[0] == pytest.approx([0.75, 0.55]) and found[1] == pytest.approx([0.75, 0.55])
    assert found[2] == pytest.approx([9.15, 5.15])


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("reward", ["method.margin=given", "method.margin_scale=0.5", "method.label_smoothing=0.1", "method.imitation=0.5"]),
        ("reward_pointwise", ["method.annotators=zscore", "method.imitation=0.5"]),
        ("reward_listwise", ["method.mean_over_stages=true", "method.imitation=0.5"]),
    ],
)
def test_a_run_with_everything_on(method: str, words: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    said = [{"first": 0, "second": 1, "outcome": 1.0, "strength": 2.0}]
    rows = [own(3.0, 2.0, 0.5, prompt=f"question {i}", annotator="AB"[i % 2], **({"comparisons": said} if i % 3 else {})) for i in range(8)]
    data = pairs(tmp_path / "d.jsonl", *rows)
    words = ["eval_fraction=0", "eval_every=null", "epochs=1", f"data.path={data}", *words]
    assert runs.train(command(method, tiny_llama, tmp_path / "run", *words)) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    assert trained and all({"loss", "nll", "accuracy"} <= set(line) for line in trained)
