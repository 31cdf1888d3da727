"""KTO's row: where labels come from, mismatched pairs that really are, and a baseline that is exact for the whole step."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from preftune.cli.main import resolve, run
from preftune.errors import UserError
from preftune.methods import KEEP_REASONS, METHODS
from preftune.methods.unpaired import KTOKnobs, balance, keep_labelled, labels_of, mismatched
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel
from preftune.packing.chat import ChatTokenizer, Tree, judgements
from preftune.records import Comparison, Example, Response
from preftune.training.config import DataConfig
from preftune.training.distributed import World
from preftune.training.reference import live_reference
from preftune.training.setup import Setup, prepare, read, require, tokenise
from tests import tiny
from tests.training.runs import command
from tests.training.test_learner import SHAPES, learner_of, one_step

NAN = float("nan")
KTO = METHODS["kto"]


def record(*responses: Response, comparisons: tuple[Comparison, ...] = ()) -> Tree:
    shape = tiny.tree(3, tuple(2 for _ in responses))
    return dataclasses.replace(shape, **judgements(Example("p", responses, comparisons=comparisons)))


def labels(tree: Tree, **knobs: Any) -> list[float]:
    return labels_of(tree, KTOKnobs(**knobs)).tolist()


# ---------------------------------------------------------------- labels


def test_peoples_own_labels_come_first() -> None:
    said = (Response("a", label=False, rank=1, score=9.0), Response("b", label=True, rank=2, score=1.0), Response("c", rank=3, score=5.0))
    for knobs in ({}, {"threshold": 4.0}):
        assert labels(record(*said), **knobs) == pytest.approx([0, 1, NAN], nan_ok=True)
    kept = keep_labelled(record(*said), KTOKnobs())
    assert isinstance(kept, Tree) and len(kept.responses) == 2 and kept.labels is not None and kept.labels.tolist() == [0, 1]


def test_a_pair_makes_its_winner_desirable_and_its_loser_undesirable() -> None:
    assert labels(record(Response("a", rank=2), Response("b", rank=1))) == [0, 1]
    assert labels(record(Response("a"), Response("b"), comparisons=(Comparison(0, 1, 0.25),))) == [0, 1]


def test_of_a_ranking_the_unbeaten_and_those_that_beat_nobody_are_labelled() -> None:
    ranked = record(*(Response("r", rank=rank) for rank in (3, 1, 2, 1, 3)))
    assert labels(ranked) == pytest.approx([0, 1, NAN, 1, 0], nan_ok=True)
    kept = keep_labelled(ranked, KTOKnobs())
    assert isinstance(kept, Tree) and len(kept.responses) == 4
    compared = record(*(Response("r"),) * 4, comparisons=(Comparison(0, 1), Comparison(1, 2)))  # nothing is known of the fourth
    assert labels(compared) == pytest.approx([1, NAN, 0, NAN], nan_ok=True)
    circle = record(*(Response("r"),) * 3, comparisons=(Comparison(0, 1), Comparison(1, 2), Comparison(2, 0)))
    assert keep_labelled(circle, KTOKnobs()) == "no_label"


def test_scores_give_labels_by_a_threshold_with_a_dead_band() -> None:
    rated = record(*(Response("r", score=score) for score in (0.9, 0.6, 0.5, 0.4, 0.1)))
    assert labels(rated, threshold=0.5) == [1, 1, 0, 0, 0]
    assert labels(rated, threshold=0.5, dead_band=0.2) == pytest.approx([1, NAN, NAN, NAN, 0], nan_ok=True)
    overall = record(Response("r", score={"overall": 3.0, "style": 0.0}), Response("r", score={"style": 9.0}))
    assert labels(overall, threshold=1.0) == pytest.approx([1, NAN], nan_ok=True)
    assert keep_labelled(record(Response("a", rank=1), Response("b", rank=2)), KTOKnobs(threshold=0.5)) == "no_label"


def test_what_gives_no_label_is_dropped_under_a_reason_that_says_what_would() -> None:
    for tree in (record(Response("r")), record(Response("r", score=1.0)), record(Response("a", rank=1), Response("b", rank=1))):
        assert keep_labelled(tree, KTOKnobs()) == "no_label"
    assert "`label`" in KEEP_REASONS["no_label"] and "`method.threshold`" in KEEP_REASONS["no_label"]


# ---------------------------------------------------------------- mismatched pairs


def of(prompt: str, *responses: str) -> Tree:
    """A labelled record whose tokens are the characters' codes."""
    ids = [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in (prompt, *responses)]
    n = len(responses)
    return Tree(prompt, "", ids[0], tuple(ids[1:]), (True,) * n, np.full(n, NAN), np.zeros((n, n)), labels=np.ones(n))


def texts(trees: list[Tree]) -> list[tuple[str, ...]]:
    return [tuple(bytes(ids.astype(np.uint8)).decode() for ids in (tree.prompt, *tree.responses)) for tree in trees]


words = lambda size: st.text("ab", min_size=1, max_size=size)
steps = st.lists(st.tuples(words(3), st.lists(words(4), min_size=1, max_size=3)), min_size=1, max_size=7)


@given(steps)
@settings(deadline=None, max_examples=300)
def test_regression_28_mismatched_pairs_are_really_mismatched_in_any_step(step: list[tuple[str, list[str]]]) -> None:
    """Few letters, so that prompts and responses meet again and again: no pair of the survey is a pair of the step, none is too long."""
    trees = [of(prompt, *responses) for prompt, responses in step]
    pairs = {(prompt, response) for prompt, responses in step for response in responses}
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    found = texts(mismatched(trees))
    whole = {prompt: {tuple(responses) for other, responses in step if other != prompt} for prompt, _ in step}
    for prompt, *responses in found:
        assert all((prompt, response) not in pairs and len(prompt) + len(response) <= longest for response in responses)
        room = longest - len(prompt)
        assert tuple(responses) in {tuple(one[:room] for one in other) for other in whole[prompt]}
    for prompt, _ in step:  # a record is left out only where no other one serves
        own = {response for other, response in pairs if other == prompt}
        room = longest - len(prompt)
        serves = any(own.isdisjoint(one[:room] for one in other) for other in whole[prompt])
        assert sum(one[0] == prompt for one in found) == (sum(one[0] == prompt for one in step) if serves else 0)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_regression_28_each_prompt_meets_the_responses_of_the_next_record(size: int) -> None:
    """In even and odd steps alike: the responses are those of the step, each once, turned by one."""
    trees = [of(f"prompt {i}", f"yes {i}", f"no {i}") for i in range(size)]
    assert texts(mismatched(trees)) == [(f"prompt {i}", f"yes {(i + 1) % size}", f"no {(i + 1) % size}") for i in range(size)]


def test_regression_28_a_step_of_one_record_has_no_mismatched_pair() -> None:
    assert mismatched([of("p", "yes", "no")]) == [] and mismatched([]) == []
    learner = learner_of("kto")
    assert learner.survey([KTO.keep(tiny.tree(5, (4, 3)), KTO.knobs())]) == 0.0


def test_regression_28_duplicated_prompts_meet_other_prompts_and_use_every_response() -> None:
    """Records of one response each, two for a prompt, as in converted pairs: not the desirable ones alone make the baseline."""
    trees = [of("p", "p yes"), of("p", "p no"), of("q", "q yes"), of("q", "q no"), of("r", "r yes"), of("r", "r no")]
    found = texts(mismatched(trees))
    assert found == [("p", "q yes"), ("p", "q no"), ("q", "r yes"), ("q", "r no"), ("r", "p yes"), ("r", "p no")]
    assert mismatched([of("p", "yes"), of("p", "no"), of("p", "well")]) == []


def test_regression_28_a_response_that_the_prompt_has_too_is_no_mismatch() -> None:
    found = texts(mismatched([of("p", "no idea"), of("q", "no idea"), of("r", "yes")]))
    assert found == [("p", "yes"), ("q", "yes"), ("r", "no idea")]
    assert texts(mismatched([of("p", "no"), of("q", "no")])) == []


def test_a_mismatched_response_is_cut_so_that_max_length_holds() -> None:
    found = texts(mismatched([of("a long prompt", "yes"), of("q", "an answer")]))
    assert found == [("a long prompt", "an "), ("q", "yes")]


def test_a_survey_over_thousands_of_records_is_quick() -> None:
    """A held-out set is one step; also where nearly all records share a prompt or a response."""
    many = [
        [of(f"p {i}", f"yes {i}") for i in range(2000)],
        [of("p" if i else "q", f"yes {i}") for i in range(2000)],
        [of(f"p {i}", "yes" if i else "no") for i in range(2000)],
    ]
    for trees, size in zip(many, (2000, 2000, 2000), strict=True):
        start = time.monotonic()
        assert len(mismatched(trees)) == size
        assert time.monotonic() - start < 5


# ---------------------------------------------------------------- the baseline of a whole step


def labelled() -> list[Tree]:
    """Ragged records of desirable and undesirable responses, in pairs and alone."""
    trees = [KTO.keep(tiny.tree(p, r, seed=i), KTO.knobs()) for i, (p, r) in enumerate(SHAPES)]
    return [tree if i % 3 else tree.keep([i // 3]) for i, tree in enumerate(trees) if isinstance(tree, Tree)]


def plain_ratio(tree: Tree, models: list[Any]) -> list[torch.Tensor]:
    """Log-ratio of each response: one unpadded forward of plain transformers for each."""
    ratios = []
    for response in tree.responses:
        ids = torch.tensor([[*tree.prompt, *response]])
        each = [torch.log_softmax(m(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1], -1) for m in models]
        policy, reference = (one.gather(1, torch.tensor(response)[:, None]).sum() for one in each)
        ratios.append(policy - reference.detach())
    return ratios


def swapped(budget: int = 4096, **options: Any) -> Any:
    """The learner whose policy and reference have changed places, so that the sign of the mean log-ratio differs."""
    learner = learner_of("kto", budget=budget, **options)
    learner.model.hf.load_state_dict(tiny.model(seed=5).state_dict())
    other = tiny.model()
    other.set_attn_implementation(NAME)
    learner.reference = live_reference(LanguageModel(other).eval().requires_grad_(False))
    return learner


@pytest.mark.parametrize(("make", "seeds"), [(learner_of, (0, 5)), (swapped, (5, 0))], ids=["as it is", "swapped"])
def test_the_baseline_is_that_of_plain_forwards_under_any_cut_and_so_are_loss_and_gradient(make: Any, seeds: tuple[int, int]) -> None:
    trees = labelled()
    models = [tiny.model(seed=seed) for seed in seeds]
    for model in models:
        model.set_attn_implementation("eager")
    with torch.no_grad():
        mean = torch.stack([ratio for tree in mismatched(trees) for ratio in plain_ratio(tree, models)]).mean().item()
    assert abs(mean) > 0.2
    z0, losses = max(0.0, mean), []
    for tree in trees:
        assert tree.labels is not None
        for ratio, label in zip(plain_ratio(tree, models), tree.labels, strict=True):
            gain = 0.1 * (ratio - z0) if label else 0.1 * (z0 - ratio)
            losses.append(1 - torch.sigmoid(gain))
    torch.stack(losses).mean().backward()
    for budget in (4096, 60, 1):
        learner = make("kto", budget=budget) if make is learner_of else make(budget=budget)
        assert learner.survey(trees) == pytest.approx(mean, rel=1e-5)
        step, gradients = one_step(learner, trees)
        assert step.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
        assert step.metrics["kl"] == pytest.approx(z0, rel=1e-5)
        for name, p in models[0].named_parameters():
            scale = max(1.0, float(p.grad.abs().max()))
            torch.testing.assert_close(gradients[f"backbone.hf.{name}"], p.grad, atol=2e-5 * scale, rtol=1e-4)


def test_one_of_the_two_has_a_positive_baseline_and_the_other_none() -> None:
    assert sorted(learner.survey(labelled()) > 0 for learner in (learner_of("kto"), swapped())) == [False, True]


def test_an_evaluation_is_one_step_over_all_records_and_leaves_no_gradient() -> None:
    learner = swapped(budget=60)
    found = learner.evaluate(labelled())
    assert all(p.grad is None for p in learner.parameters.values())
    step = swapped().step(labelled(), 0)
    assert found == pytest.approx({"loss": step.loss, **step.metrics}, rel=1e-5)


def test_a_step_is_not_taken_where_only_the_baseline_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of("kto")
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    monkeypatch.setattr(type(learner), "survey", lambda self, trees, give_up=None: NAN)
    step = learner.step(labelled(), 0)
    assert not step.taken and all(torch.equal(before[name], p) for name, p in learner.parameters.items())


# ---------------------------------------------------------------- what is said before a run


def setup_of(model: Path, *words: str) -> Setup:
    name, config = resolve(command("kto", model, Path("unused"), *words))
    return prepare(name, config, World(torch.device("cpu")), Console(quiet=True))


def test_a_step_of_one_prompt_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts_per_step: .*compares the prompts of a step with each other, and 1 is too few"):
        setup_of(tmp_path / "no model", "prompts_per_step=1", "data.path=no data")


def test_a_cached_reference_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cache_reference: .*put together anew in each step, so it cannot be cached"):
        setup_of(tmp_path / "no model", "cache_reference=true", "data.path=no data")


def test_a_knob_without_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`dead_band` has no effect without `threshold`"):
        setup_of(tmp_path, "method.dead_band=0.1")
    with pytest.raises(UserError, match="`threshold` has no effect: every record has labels"):
        require(KTO, KTOKnobs(threshold=0.5), [Example("p", (Response("r", label=True),))], "data")


def test_theory_gives_the_first_loss_with_any_weights(tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = ("method.desirable_weight=1.2", "method.undesirable_weight=0.9")
    assert run(["check", *command("kto", tiny_llama, tmp_path / "run", *weights)]) == 0
    assert "theory says 0.5250000: policy and reference agree" in capfd.readouterr().err


counts = st.integers(1, 5000)


def balanced(good: int, bad: int, **knobs: float) -> str | None:
    one = np.concatenate([np.ones(good), np.zeros(bad)])
    tree = dataclasses.replace(tiny.tree(1, (1,)), labels=one)
    return balance([tree], KTOKnobs(**knobs))


@given(counts, counts, st.sampled_from([0.2, 1.0, 1.3]), st.sampled_from([1.0, 7.0]))
@settings(deadline=None, max_examples=200)
def test_the_advice_on_balance_is_silent_once_it_is_taken(good: int, bad: int, desirable: float, undesirable: float) -> None:
    told = balanced(good, bad, desirable_weight=desirable, undesirable_weight=undesirable)
    inside = 1 <= desirable * good / (undesirable * bad) <= 1.5
    assert (told is None) == inside
    if told:
        name, value = told.partition("`method.")[2].rpartition("`method.")[2].partition("`")[0].split("=")
        assert balanced(good, bad, **{"desirable_weight": desirable, "undesirable_weight": undesirable, name: float(value)}) is None


def test_the_advice_on_balance_names_counts_and_a_value() -> None:
    assert balanced(20, 20) is None and balanced(30, 20) is None
    assert balanced(10, 40) == (
        "10 desirable and 40 undesirable responses: weighed by `method.desirable_weight` and `method.undesirable_weight` they stand as "
        "0.25 to 1, outside 1 to 1.5; `method.desirable_weight=4.8` would balance them."
    )
    assert "as 2 to 1" in str(balanced(40, 20)) and "`method.undesirable_weight=1.7` would" in str(balanced(40, 20))
    assert "10 desirable and 0 undesirable responses: with one kind alone" in str(balanced(10, 0))


@pytest.mark.parametrize("what", ["check", "train"])
def test_the_advice_is_one_line_at_the_start(what: str, tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Say {i}", "completion": f"Yes, {i}", "label": i % 4 > 0} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = command("kto", tiny_llama, tmp_path / "run", f"data.path={data}", "data.limit=12", "eval_fraction=0", "eval_every=null")
    assert run([what, *words, *(("max_steps=1",) if what == "train" else ())]) == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "would balance them" in line]
    assert len(lines) == 1 and lines[0].startswith("9 desirable and 3 undesirable responses")


def test_every_response_of_real_labelled_records_has_its_own_label(shared_data: Path) -> None:
    file = str(shared_data / "llamafactory/kto_en_demo.json")
    records = tokenise(read(DataConfig(path=(file,), limit=60)), ChatTokenizer(tiny.tokenizer()), KTO, KTO.knobs(), 100_000)
    assert len(records.trees) == 60
    kinds = Counter(float(label) for tree in records.trees for label in tree.labels)  # type: ignore[union-attr]
    assert set(kinds) == {0.0, 1.0} and sum(kinds.values()) == 60
    assert len(mismatched(records.trees)) == 60
