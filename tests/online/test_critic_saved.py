"""The critic that a run leaves beside its policy: a plain classifier, and where another run's critic may start with the same values."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from preftune.models import save
from preftune.online.actor import ActorCritic
from preftune.packing.batch import collate
from preftune.packing.chat import Tree
from tests.online import small
from tests.training import runs

PPO = ("rollout.n=1", "rollout.prompts=4", "max_steps=2", "lr=1e-3", "keep_checkpoints=9")
LORA = ("lora.rank=2", "lora.alpha=4")
KINDS = {
    "a copy of the policy": (),
    "with an adapter": LORA,
    "the judge": ("judge={judge}",),
    "the judge with an adapter": ("judge={judge}", *LORA),
    "shared": ("method.critic=shared",),
    "shared with an adapter": ("method.critic=shared", *LORA),
}


@pytest.fixture(scope="module")
def judge(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose scores are on a scale."""
    words = ("lr=1e-3", "data.limit=8", "epochs=1", "eval_fraction=0", "eval_every=null", "max_length=512", "tokens_per_microbatch=512")
    output = tmp_path_factory.mktemp("judge") / "run"
    assert runs.train(runs.command("reward", place / "model", output, *words, "method.normalise=all")) == 0
    assert json.loads((output / "final" / "config.json").read_text())["preftune_scoring"]["std"] != 1
    return output / "final"


def trees(place: Path, scratch: Path) -> list[Tree]:
    """Some responses to look at."""
    with small.opened(place, scratch / "looked", "ppo", "rollout.n=1", "rollout.prompts=4") as run:
        return small.rollout(run).trees


@torch.no_grad()
def values(actor: ActorCritic, of: list[Tree]) -> np.ndarray:
    found = actor.eval().values(replace(collate(of)))
    assert found is not None
    return found.double().numpy()


def plain(folder: Path, of: list[Tree]) -> np.ndarray:
    """The value of each token by plain transformers: the label at the end of all before it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    scale = getattr(model.config, "preftune_scoring", {"mean": 0.0, "std": 1.0})
    out = []
    with torch.no_grad():
        for tree in of:
            for response in tree.responses:
                ids = torch.from_numpy(np.concatenate([tree.prompt, response]))
                rows = [ids[: len(tree.prompt) + t] for t in range(len(response))]
                out += [float(model(row[None], attention_mask=torch.ones_like(row)[None]).logits) for row in rows]
    return (np.array(out) - scale["mean"]) / scale["std"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_plain_classifier_and_another_run_begins_with_its_values(kind: str, place: Path, judge: Path, tmp_path: Path) -> None:
    more = (*PPO, *(word.format(judge=judge) for word in KINDS[kind]))
    small.trained(place, tmp_path / "run", "ppo", *more)
    looked = trees(place, tmp_path)
    with small.opened(place, tmp_path / "run", "ppo", *more) as run:
        run.restore()
        ended = values(run.learner.actor, looked)
    assert np.abs(ended).max() > 1e-3, "it learned something"
    folder = tmp_path / "run" / "critic"
    np.testing.assert_allclose(plain(folder, looked), ended, atol=2e-6, rtol=2e-6)
    assert folder.joinpath("adapter").is_dir() == (kind.endswith("with an adapter") and "shared" not in kind)
    with small.opened(place, tmp_path / "next", "ppo", *PPO, f"method.critic={folder}") as run:
        begun = values(run.learner.actor, looked)
        head = run.learner.actor.critic
        assert head is not None and head.head.weight.requires_grad
    np.testing.assert_allclose(begun, ended, atol=2e-6, rtol=2e-6)
    if not kind.endswith("adapter"):
        assert np.array_equal(begun, ended), "to the bit"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    rows = small.trained(place, tmp_path / "next", "ppo", *PPO, f"method.critic={folder}")
    assert len(rows) == 2


def test_it_is_of_the_same_step_as_the_policy(place: Path, tmp_path: Path) -> None:
    """Here of the first, which nothing after it was better than by a million."""
    more = (*PPO, "max_steps=4", "epochs=3", "eval_every=1", "early_stopping.metric=response_tokens", "early_stopping.patience=2")
    small.trained(place, tmp_path / "run", "ppo", *more, "early_stopping.min_delta=1e6")
    first, *_, last = (load_file(path / "model.safetensors") for path in sorted((tmp_path / "run" / "checkpoints").glob("step-*")))
    head = load_file(tmp_path / "run" / "critic" / "model.safetensors")["score.weight"]
    assert torch.equal(head, first["critic.head.weight"]) and not torch.equal(head, last["critic.head.weight"])


def test_a_method_without_a_critic_leaves_none(place: Path, tmp_path: Path) -> None:
    small.trained(place, tmp_path / "run", "grpo", "max_steps=1")
    assert not (tmp_path / "run" / "critic").exists()


def test_where_there_is_no_such_classifier_the_policy_is_there_and_the_run_says_so(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class None_:
        @staticmethod
        def from_config(config: Any) -> Any:
            raise ValueError("Unrecognized configuration class")

    monkeypatch.setattr(save, "AutoModelForSequenceClassification", None_)
    small.trained(place, tmp_path / "run", "ppo", *PPO)
    said = " ".join(capfd.readouterr().err.split())
    assert "The critic is not saved: transformers has no sequence classifier for LlamaConfig." in said
    assert (tmp_path / "run" / "final").is_dir() and not (tmp_path / "run" / "critic").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
