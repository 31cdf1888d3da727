"""Reward models with several heads: combined into one score, put on a scale, saved, loaded again, and read by plain transformers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from preftune.errors import UserError
from preftune.methods import METHODS
from preftune.models import load
from preftune.models.policy import RewardModel
from preftune.models.save import save_model
from preftune.models.scoring import KEY, Scoring, fit_normaliser, safety_first
from preftune.models.values import response_values
from preftune.packing.batch import collate
from preftune.packing.chat import Tree
from tests import tiny
from tests.training import runs

TREES = [tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7,), seed=2), tiny.tree(14, (3, 3, 10), seed=3)]
NAMES = ("helpfulness", "safety", "brevity")
WEIGHTED = Scoring(NAMES, (1.0, 0.5, -2.0), mean=0.3, std=1.7, fitted_on="all responses of 3 records")
RULE = Scoring(("safety", "helpfulness"), safety="safety", threshold=0.4, mean=-0.2, std=0.6)


def model_of(scoring: Scoring, folder: Path | None = None) -> RewardModel:
    inner = tiny.model() if folder is None else load.load_causal_lm(load.locate(str(folder)))
    torch.manual_seed(3)
    model = RewardModel(inner, heads=scoring.heads, scoring=scoring)
    with torch.no_grad():
        model.head.weight.mul_(5)
    return model.eval()


def again(path: Path) -> RewardModel:
    """The saved model as every command loads it."""
    classifier = load.load_classifier(load.locate(str(path)))
    return RewardModel(classifier, head=load.score_head(classifier)[1]).eval()


# ---- combination


def test_a_weighted_sum_by_attribute() -> None:
    heads = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    assert Scoring(NAMES, (1.0, 0.5, -2.0)).combine(heads).tolist() == [-4.0, -1.5]
    assert Scoring(NAMES).combine(heads).tolist() == [6.0, -0.5]
    assert Scoring().combine(heads[0]).tolist() == [1.0, 2.0, 3.0]  # one head: it is the score
    assert Scoring(("toxicity",), (-1.0,)).combine(heads[0]).tolist() == [-1.0, -2.0, -3.0]


def test_the_safety_rule_on_hand_worked_numbers() -> None:
    """Probabilities (.1, .5, .9) have logits (-2.197225, 0, 2.197225); the logit of the chosen probability is the chosen reward."""
    probabilities = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    logits = probabilities.logit()
    assert logits.tolist() == pytest.approx([-2.197225, 0.0, 2.197225], abs=1e-6)
    high = torch.tensor(0.9, dtype=torch.float64).logit()
    assert safety_first(logits[0], high).item() == pytest.approx(logits[0].item())  # R_s = .1, unflagged: safety
    safe = torch.tensor(0.2, dtype=torch.float64).logit()
    assert safety_first(safe, high).item() == pytest.approx(high.item())  # R_s = .2, unflagged: helpfulness
    assert safety_first(safe, high, torch.tensor(True)).item() == pytest.approx(safe.item())  # flagged: safety


def test_the_threshold_is_on_the_probability() -> None:
    """0.15 is the reward -1.7346: a reward of 0.1 is safe, though below 0.15."""
    safety, other = torch.tensor([-1.7347, -1.7345, 0.1]), torch.full((3,), 7.0)
    assert safety_first(safety, other).tolist() == pytest.approx([-1.7347, 7.0, 7.0])


@pytest.mark.parametrize("first", [True, False])
def test_the_rule_finds_its_attribute_by_name(first: bool) -> None:
    heads = torch.tensor([[[-3.0, 5.0], [3.0, 5.0]]])  # safety, helpfulness
    scoring = Scoring(("safety", "helpfulness") if first else ("helpfulness", "safety"), safety="safety")
    ordered = heads if first else heads.flip(-1)
    assert scoring.combine(ordered).tolist() == [[-3.0, 5.0]]
    assert scoring.combine(ordered, torch.tensor([[True]])).tolist() == [[-3.0, 3.0]]


@pytest.mark.parametrize("scoring", [WEIGHTED, RULE, Scoring(mean=2.0, std=0.5)], ids=["weighted", "rule", "one head"])
def test_the_score_of_a_batch_is_written_out_and_absent_responses_are_0(scoring: Scoring) -> None:
    model, batch = model_of(scoring), collate(TREES)
    flagged = torch.tensor([False, True, False])
    with torch.no_grad():
        heads, found = model(batch), model.score(batch, flagged)
    assert found.shape == batch.present.shape and (found[~batch.present] == 0).all()
    for g, n in batch.present.nonzero().tolist():
        r = heads[g, n].tolist()
        if scoring is WEIGHTED:
            combined = r[0] + 0.5 * r[1] - 2 * r[2]
        elif scoring is RULE:
            combined = r[0] if flagged[g] or 1 / (1 + math.exp(-r[0])) < 0.4 else r[1]
        else:
            combined = r
        assert found[g, n].item() == pytest.approx((combined - scoring.mean) / scoring.std, abs=1e-5)
    values = response_values(model, TREES, budget=30)  # what evaluations read
    with torch.no_grad():
        plain = model.score(batch)
    for g, value in enumerate(values):
        assert value == pytest.approx(plain[g, : len(value)].numpy(), abs=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attributes": ("a", "a")},
        {"attributes": ("a", "b"), "weights": (1.0,)},
        {"attributes": ("a", "b"), "safety": "c"},
        {"attributes": ("a", "b", "c"), "safety": "a"},
        {"attributes": ("a", "b"), "safety": "a", "weights": (1.0, 1.0)},
        {"attributes": ("a", "b"), "safety": "a", "threshold": 1.0},
        {"std": 0.0},
        {"std": math.nan},
        {"mean": math.inf},
        {"attributes": ("a", "b"), "weights": (1.0, math.nan)},
    ],
)
def test_what_makes_no_sense_is_no_scoring(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Scoring(**wrong)


# ---- the scale


@pytest.mark.parametrize("scoring", [WEIGHTED, RULE, Scoring()], ids=["weighted", "rule", "one head"])
@pytest.mark.parametrize("budget", [30, 4096])
def test_after_fitting_all_responses_have_mean_0_and_deviation_1(scoring: Scoring, budget: int) -> None:
    model = model_of(scoring)
    fit_normaliser(model, TREES, "all", budget=budget, name="held-out records")
    flat = np.concatenate(response_values(model, TREES))
    assert flat.mean() == pytest.approx(0, abs=1e-5) and flat.std(ddof=1) == pytest.approx(1, abs=1e-5)
    assert model.scoring.fitted_on == "all responses of 3 held-out records"
    before = model.scoring
    fit_normaliser(model, TREES, "all", budget=budget, name="held-out records")  # what was there before does not enter
    assert model.scoring == before


def test_the_best_responses_are_the_reference_where_they_are_asked_for() -> None:
    """Their mean is 0, tied best ones count each, and the others are on the same scale."""
    tied = replace(TREES[2], scores=np.array([0.0, 0.0, -1.0]))
    trees, model = [TREES[0], TREES[1], tied], model_of(Scoring())
    raw = response_values(model, trees)
    best = np.array([raw[0][0], raw[1][0], raw[2][0], raw[2][1]])
    fit_normaliser(model, trees, "best")
    assert model.scoring.mean == pytest.approx(best.mean(), abs=1e-6)
    assert model.scoring.std == pytest.approx(math.sqrt(best.var(ddof=1) + 1e-8), abs=1e-6)
    for value, before in zip(response_values(model, trees), raw, strict=True):
        assert value == pytest.approx((before - best.mean()) / best.std(ddof=1), abs=1e-5)


def test_one_response_becomes_0_and_keeps_its_scale() -> None:
    model = model_of(Scoring())
    before = response_values(model, TREES)
    fit_normaliser(model, [TREES[1]], "all")
    assert model.scoring.std == 1.0
    after = response_values(model, TREES)
    assert after[1] == pytest.approx([0.0], abs=1e-5) and after[0] == pytest.approx(before[0] - before[1][0], abs=1e-5)


# ---- saved and loaded


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("scoring", [WEIGHTED, RULE, Scoring(mean=2.0, std=1 / 3)], ids=["weighted", "rule", "one head"])
def test_regression_18_heads_and_scores_survive_saving_bit_for_bit(scoring: Scoring, kind: str, tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start", kind)
    model, tokenizer = model_of(scoring, start), load.load_tokenizer(load.locate(str(start)))
    save_model(model, tokenizer, tmp_path / "final")
    loaded = again(tmp_path / "final")
    assert loaded.scoring == scoring
    batch = collate(TREES)
    with torch.no_grad():
        assert torch.equal(loaded(batch), model(batch)) and torch.equal(loaded.score(batch), model.score(batch))
    save_model(loaded, tokenizer, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "final" / file).read_bytes()


def test_plain_transformers_gives_the_raw_output_of_every_head_by_name(tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start")
    model = model_of(WEIGHTED, start)
    save_model(model, load.load_tokenizer(load.locate(str(start))), tmp_path / "final")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert plain.config.num_labels == 3 and plain.config.id2label == dict(enumerate(NAMES))
    for tree in TREES:
        with torch.no_grad():
            ours = model(collate([tree]))[0]
            theirs = [plain(input_ids=torch.tensor([[*tree.prompt, *response]])).logits[0] for response in tree.responses]
        torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-5)
    saved = json.loads((tmp_path / "final" / "config.json").read_text())[KEY]
    assert saved["attributes"] == list(NAMES) and (saved["mean"], saved["std"]) == (0.3, 1.7)


def test_a_model_with_one_head_and_no_scale_is_saved_as_ever(tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start")
    tokenizer = load.load_tokenizer(load.locate(str(start)))
    save_model(model_of(Scoring(mean=1.0), start), tokenizer, tmp_path / "scaled")
    continued = again(tmp_path / "scaled")
    continued.scoring = Scoring()  # what training on without `normalise` gives: the old scale is not kept
    save_model(continued, tokenizer, tmp_path / "final")
    saved = json.loads((tmp_path / "final" / "config.json").read_text())
    assert KEY not in saved and saved["id2label"] == {"0": "reward"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (None, "3 labels, a reward model has one"),
        ({"attributes": ["a", "b"]}, "is of 2 heads, the model has 3"),
        ({"attributes": [*NAMES], "weights": [1.0]}, "cannot be read"),
        ({"colour": "red"}, "cannot be read"),
        ({"attributes": [*NAMES], "std": 0}, "cannot be read"),
        ({"attributes": [*NAMES], "mean": "0"}, "cannot be read"),
        ("high", "cannot be read"),
    ],
)
def test_a_config_that_does_not_say_how_heads_make_a_score_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    start = tiny.save(tmp_path / "start")
    save_model(model_of(WEIGHTED, start), load.load_tokenizer(load.locate(str(start))), tmp_path / "final")
    file = tmp_path / "final" / "config.json"
    config = json.loads(file.read_text())
    config.pop(KEY)
    file.write_text(json.dumps(config if change is None else {**config, KEY: change}))
    with pytest.raises(UserError, match=said) as caught:
        load.load_classifier(load.locate(str(tmp_path / "final")))
    assert "\n" not in str(caught.value) and str(tmp_path / "final") in str(caught.value)


# ---- whole runs


def test_where_less_is_better_the_best_response_is_the_one_with_less() -> None:
    """Nothing else orders them; the one that is imitated and that `normalise: best` counts must be the one that scores best."""
    row, unrated = METHODS["reward"], np.full(3, np.nan)
    ratings = {"toxicity": np.array([0.0, 3.0, np.nan]), "length": np.array([np.nan, np.nan, 1.0])}
    tree = replace(TREES[2], scores=unrated, ratings=ratings)
    knobs = {"attributes": ("toxicity", "length")}
    kept = row.keep(tree, row.knobs(**knobs, score_weights={"toxicity": -1.0, "length": 0.0}))
    assert isinstance(kept, Tree) and kept.scores[0] > kept.scores[1] and np.isnan(kept.scores[2])
    plain = row.keep(tree, row.knobs(**knobs))
    assert isinstance(plain, Tree) and plain.scores.tolist() == [0.0, 3.0, 1.0]


def rated(folder: Path) -> Path:
    """Records whose responses are rated on two attributes."""
    rng = np.random.default_rng(0)
    file = folder / "rated.jsonl"
    lines = []
    for n in range(12):
        said = [{"text": f"answer {n} {k} " + "x" * k, "score": {"safety": int(rng.integers(5)), "help": k + n % 2}} for k in range(3)]
        lines.append(json.dumps({"prompt": f"question {n}", "responses": said}))
    file.write_text("\n".join(lines))
    return file


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "final" / "config.json").read_text())


@pytest.mark.parametrize(("fraction", "side"), [("0.25", "held-out"), ("0", "training")])
def test_a_run_names_its_heads_and_puts_its_scores_on_a_scale(
    fraction: str, side: str, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["method.attributes=[safety,help]", "method.score_weights={safety: 2.0}", "method.normalise=all", f"eval_fraction={fraction}"]
    words += ["eval_every=null", "max_steps=2", f"data.path={rated(tmp_path)}"]
    assert runs.train(runs.command("reward", tiny_llama, tmp_path / "run", *words)) == 0
    config = config_of(tmp_path / "run")
    assert config["id2label"] == {"0": "safety", "1": "help"}
    saved = config[KEY]
    assert saved["weights"] == [2.0, 1.0] and f"{side} records" in saved["fitted_on"] and saved["std"] > 0
    assert f"Scores of {saved['fitted_on']} had mean" in capfd.readouterr().err
    assert again(tmp_path / "run" / "final").scoring.attributes == ("safety", "help")


def test_training_goes_on_from_saved_heads_and_only_from_those_that_are_meant(tiny_llama: Path, tmp_path: Path) -> None:
    data = [f"data.path={rated(tmp_path)}", "max_steps=1", "eval_fraction=0", "eval_every=null"]
    rule = ["method.attributes=[safety,help]", "method.safety=safety", "method.safety_threshold=0.3"]
    assert runs.train(runs.command("reward", tiny_llama, tmp_path / "one", *data, *rule, "method.normalise=best")) == 0
    start = tmp_path / "one" / "final"
    assert (config_of(tmp_path / "one")[KEY]["safety"], config_of(tmp_path / "one")[KEY]["threshold"]) == ("safety", 0.3)
    assert runs.train(runs.command("reward", start, tmp_path / "two", *data, *rule)) == 0
    assert (config_of(tmp_path / "two")[KEY]["mean"], config_of(tmp_path / "two")[KEY]["std"]) == (0.0, 1.0)  # the old scale is stale
    for words in (["method.attributes=[help,safety]"], ["method.attributes=[help]"]):
        with pytest.raises(UserError, match="has heads for safety, help") as caught:
            runs.train(runs.command("reward", start, tmp_path / "three", *data, *words))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.score_weights={safety: 1.0}"], "`score_weights` has `safety`, which `attributes` does not name"),
        (["method.attributes=[a]", "method.score_weights={a: 0.0}"], "`score_weights` are all 0"),
        (["method.safety_threshold=0.2"], "`safety_threshold` has no effect without `safety`"),
        (["method.attributes=[a,b,c]", "method.safety=a"], "`safety` must name one of two `attributes`"),
        (["method.attributes=[a,b]", "method.safety=c"], "`safety` must name one of two `attributes`"),
        (["method.attributes=[a,b]", "method.safety=a", "method.score_weights={a: 2.0}"], "`score_weights` has no effect beside `safety`"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused_in_one_line(words: list[str], said: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        runs.train(runs.command("reward", tiny_llama, tmp_path / "run", *words))
    assert said in str(caught.value) and "\n" not in str(caught.value)
