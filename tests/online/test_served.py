"""An online run whose responses a vLLM server draws: it always has the policy's weights, and what it says is what the trainer would."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preftune.errors import UserError
from tests import tiny
from tests.online.test_ahead import RULE, words
from tests.rollout.fake_vllm import Fake
from tests.training import runs


class Served:
    """A stand-in for vLLM with the run's own small model behind it, which reads new weights when it is told to."""

    def __init__(self, fake: Fake, folder: Path) -> None:
        self.inner = tiny.model(scale=2.0)
        self.read(folder)
        self.pushed: list[str] = []
        self.deaf = False
        fake.window, fake.rows, fake.logits, fake.reload = 256, self.rows, lambda ids: self.rows(ids)[-1], self.reload

    def read(self, folder: Path) -> None:
        self.inner.load_state_dict(load_file(folder / "model.safetensors"), strict=False)

    @torch.no_grad()
    def rows(self, ids: Any) -> np.ndarray:
        found: np.ndarray = self.inner(torch.tensor([list(ids)])).logits[0].double().numpy()
        return found

    def reload(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.pushed.append(body["kwargs"]["weights_path"])
        if not self.deaf:
            self.read(Path(self.pushed[-1]))
        return 200, {"results": [None]}


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as one:
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield one
        one.shutdown()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.save(tmp_path / "model", scale=2.0)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}!"}]} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rule.py").write_text(RULE)
    return tmp_path


def served(place: Path, fake: Fake, *more: str) -> list[str]:
    plain = (
        "rollout.ahead=false",
        "method.importance_cap=null",
        "rollout.prompts=2",
        "rollout.engine=vllm",
        f"rollout.vllm.url={fake.url}",
    )
    return words(place, place / "run", *plain, *more)


def test_every_rollout_is_drawn_by_the_policy_as_it_stands(place: Path, fake: Fake) -> None:
    side = Served(fake, place / "model")
    assert runs.train(served(place, fake, "lr=3e-2")) == 0
    rows = [row for row in runs.rows(place / "run") if row["kind"] == "train"]
    assert len(side.pushed) == len(rows) == 3
    assert all(row["sampler_gap"] < 1e-4 for row in rows)  # the server's own log-probabilities against the trainer's
    assert rows[-1]["kl_response_k3"] > 1e-3  # and the policy did move
    assert not Path(side.pushed[-1]).exists()  # what was written for the server is gone


def test_drawn_ahead_the_weights_are_one_rollout_old(place: Path, fake: Fake) -> None:
    side = Served(fake, place / "model")
    assert runs.train(served(place, fake, "rollout.ahead=true", "method.importance_cap=2", "lr=3e-2")) == 0
    gaps = [row["sampler_gap"] for row in runs.rows(place / "run") if row["kind"] == "train"]
    assert gaps[0] < 1e-4 and all(gap > 1e-3 for gap in gaps[1:]) and side.pushed


def test_a_server_that_keeps_its_old_weights_is_noticed(place: Path, fake: Fake) -> None:
    side = Served(fake, place / "model")
    side.deaf = True
    with pytest.raises(UserError, match="does not serve the new weights"):
        runs.train(served(place, fake, "lr=3e-2"))
    side.deaf = False
    assert runs.train(served(place, fake, "lr=3e-2")) == 0  # nothing was lost


@pytest.mark.parametrize("ahead", [False, True], ids=["as it stands", "ahead"])
def test_an_adapter_is_served_in_the_weights(ahead: bool, place: Path, fake: Fake) -> None:
    """What is served is the policy with its adapter, what is trained stays frozen below it, and the run is that of the engine here."""
    side = Served(fake, place / "model")
    seen: list[dict[str, torch.Tensor]] = []
    own = side.read
    side.read = lambda folder: (seen.append(load_file(folder / "model.safetensors")), own(folder))[1]  # type: ignore[method-assign]
    more = ("lora.rank=2", "lora.alpha=8", "lr=5e-2", *(("rollout.ahead=true", "method.importance_cap=2") if ahead else ()))
    assert runs.train(served(place, fake, *more)) == 0
    rows = [row for row in runs.rows(place / "run") if row["kind"] == "train"]
    assert rows[0]["sampler_gap"] < 1e-4 and all((row["sampler_gap"] > 1e-3) if ahead else (row["sampler_gap"] < 1e-4) for row in rows[1:])
    assert rows[-1]["kl_response_k3"] > 1e-3 and all(row["kl_response_k3"] >= 0 for row in rows)
    plain, last = load_file(place / "model" / "model.safetensors"), load_file(place / "run" / "final" / "model.safetensors")
    for pushed in seen:
        assert pushed.keys() == plain.keys()
        assert torch.equal(pushed["model.embed_tokens.weight"], plain["model.embed_tokens.weight"])
    changed = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(seen[0][changed], plain[changed]) and not torch.equal(seen[-1][changed], plain[changed])
    assert not torch.equal(last[changed], seen[-1][changed])  # it learned on
    state = load_file(sorted((place / "run" / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    assert all("lora_" in name for name in state) and last.keys() == plain.keys()


def test_a_server_that_drops_the_adapter_is_noticed(place: Path, fake: Fake) -> None:
    side = Served(fake, place / "model")
    side.deaf = True
    with pytest.raises(UserError, match="does not serve the new weights"):
        runs.train(served(place, fake, "lora.rank=2", "lora.alpha=8", "lr=5e-2"))
