"""At a run's first step nothing has moved: ratios are 1, and every distance is exactly 0."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.online import small

LORA = ("lora.rank=2", "lora.alpha=4")
METHODS = {
    "ppo": ("rollout.n=1", "rollout.prompts=4", "method.passes=2"),
    "ppo, one step": ("rollout.n=1", "rollout.prompts=2"),
    "ppo, shared": ("rollout.n=1", "rollout.prompts=4", "method.critic=shared"),
    "grpo": (),
    "grpo, passes": ("method.passes=2", "rollout.prompts=4", "method.kl=0.1"),
    "gspo": ("method.passes=2",),
    "rloo": ("method.passes=2",),
}


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place whose model's config asks for dropout."""
    folder = small.place(tmp_path_factory.mktemp("dropout"))
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    return folder


def first(place: Path, output: Path, name: str, *more: str) -> dict[str, float]:
    return small.trained(place, output, name.split(",")[0], *METHODS[name], "max_steps=2", "eval_fraction=0", *more)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", METHODS)
def test_regression_07_the_first_ratio_is_1_and_the_first_kl_is_0(
    name: str, lora: tuple[str, ...], precision: str, with_dropout: Path, tmp_path: Path
) -> None:
    row = first(with_dropout, tmp_path / "run", name, *lora, f"precision={precision}")
    assert row["ratio"] == 1.0 and row["step_kl"] == 0.0 and row["clip_fraction"] == 0.0
    assert row["kl"] == 0.0 and row.get("kl_loss", 0.0) == 0.0
    if name.startswith("ppo") or "passes" in name or name == "rloo":  # those that look at the policy before the first step
        assert row["kl_response"] == 0.0 and row["kl_response_k3"] == 0.0 and row["kl_token"] == 0.0
        assert row["policy_perplexity"] == row["reference_perplexity"]
    assert row["grad_norm"] > 0


@pytest.mark.parametrize("cut", [(), ("rollout.top_p=0.7",), ("rollout.top_k=5",), ("rollout.min_p=0.1",)], ids=["all", "p", "k", "min"])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("name", ["ppo", "grpo", "grpo, passes"])
def test_regression_14_the_first_ratio_is_1_at_any_temperature_and_in_any_nucleus(
    name: str, temperature: float, cut: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    row = first(place, tmp_path / "run", name, f"rollout.temperature={temperature}", *cut)
    assert row["ratio"] == 1.0 and row["step_kl"] == 0.0 and row["kl"] == 0.0
    if cut or name != "grpo":
        assert row["kl_response"] == 0.0, "also where the sampler's own log-probabilities are of a part of the vocabulary"
    if cut:
        assert "sampler_gap" not in row
    else:
        assert row["sampler_gap"] < 2e-6


def test_regression_14_a_wrong_temperature_would_be_seen(place: Path, tmp_path: Path) -> None:
    """The sampler's log-probabilities are those of the run's temperature and no other."""
    with small.opened(place, tmp_path / "run", "ppo", "rollout.temperature=0.5", "rollout.prompts=4") as run:
        run.learner.temperature = 1.0
        run.online.rollout.__dict__["temperature"] = 1.0  # the trainer's, after the sampler was made with 0.5
        assert small.rollout(run).figures["sampler_gap"] > 0.05


@pytest.mark.parametrize("old", ["recomputed", "rollout"])
def test_where_ratios_start_is_as_asked(old: str, place: Path, tmp_path: Path) -> None:
    """One step a rollout: the trainer's own numbers give 1 exactly, the sampler's give it up to rounding, and both are used."""
    row = small.trained(place, tmp_path / "run", "grpo", "max_steps=1", f"method.old_logp={old}")[0]
    assert row["ratio"] == (1.0 if old == "recomputed" else pytest.approx(1.0, abs=1e-5))
    told = small.kept(tmp_path / "run").trees[0].told
    assert "old" in told
    same = all((a == b).all() for a, b in zip(told["old"], told["drawn"], strict=True))
    assert same == (old == "rollout")
