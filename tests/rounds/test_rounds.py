"""Iterated methods on a tiny model: every phase does what it says, and a run killed in any of them ends as one that was not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from preftune import formats
from preftune.cli.main import resolve, run
from preftune.errors import UserError
from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.records import Example, Response
from preftune.report.page import write as write_report
from preftune.rollout.engine import Engine
from preftune.rollout.sampling import Sampling
from preftune.rounds.figures import change, merged
from preftune.rounds.methods import ITERATED
from preftune.selection.best_of_n import best_of_n_curve
from preftune.training.metrics import read_metrics
from tests import tiny
from tests.training import runs

RULE = "def rule(example, response):\n    return sum(c in 'aeiou' for c in response.text) / (1 + len(response.text))\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and a rule."""
    folder = tmp_path_factory.mktemp("rounds")
    tiny.save(folder / "model", scale=2.0)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}!"}]} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    return folder


def words(place: Path, output: Path, method: str = "raft", *more: str) -> list[str]:
    settings = {
        "model": place / "model",
        "data": place / "prompts.jsonl",
        "output": output,
        "judge": f"{place}/rule.py:rule",
        "rounds": 2,
        "eval_fraction": 0.3,
        "rollout.n": 4,
        "rollout.max_new_tokens": 10,
        "method.only_finished": "false",
        "prompts_per_step": 4,
        "max_length": 64,
        "tokens_per_microbatch": 128,
        "lr": 3e-3,
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "save_every": 1,
    }
    settings |= dict(word.split("=", 1) for word in more)
    return [method, *(f"{key}={value}" for key, value in settings.items())]


def texts(path: Path) -> list[list[tuple[str, float]]]:
    return [[(r.text, r.score) for r in e.responses] for e in formats.read(path).examples]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert runs.train(words(place, output)) == 0
    return output


def test_each_round_learns_the_best_of_what_the_model_before_it_wrote(whole: Path) -> None:
    for number in (1, 2):
        scored, selected = texts(whole / f"rounds/{number}/scored.jsonl"), texts(whole / f"rounds/{number}/selected.jsonl")
        assert len(scored) == len(selected) == 7 and all(len(one) == 4 for one in scored)
        for all_of, kept in zip(scored, selected, strict=True):
            assert kept == [max(all_of, key=lambda one: one[1])]
        manifest = json.loads((whole / f"rounds/{number}/train/run.json").read_text())
        assert manifest["method"] == "sft" and manifest["status"] == "finished"
    models = [json.loads((whole / f"rounds/{n}/train/run.json").read_text())["config"]["model"] for n in (1, 2)]
    assert models[0].endswith("/model") and models[1].endswith("rounds/1/train/final")
    prompts = {formats.prompt_key(e) for e in formats.read(whole / "rounds/1/scored.jsonl").examples}
    held = {formats.prompt_key(e) for e in formats.read(whole / "evaluation/0/scored.jsonl").examples}
    assert len(held) == 3 and not prompts & held


NONE = "def rule(example, response):\n    n = len(response.text)\n    return None if n % 3 == 0 or {more} else n\n"


@pytest.mark.parametrize("method", ["raft", "bon", "rso"])
def test_a_response_that_cannot_be_scored_is_never_learned(method: str, place: Path, tmp_path: Path) -> None:
    """Nor is it compared, nor does a held-out prompt count of which no response has a score."""
    (tmp_path / "none.py").write_text(NONE.format(more="example.prompt[-1].content.endswith(('1!', '2!', '3!'))"))
    more = (f"judge={tmp_path}/none.py:rule", "rounds=1", *(("method.kl=0.1", "reference=null") if method == "raft" else ()))
    run_of = tmp_path / "run"
    assert runs.train(words(place, run_of, method, *more)) == 0
    scored = [r for e in formats.read(run_of / "rounds/1/scored.jsonl").examples for r in e.responses]
    without = {r.text for r in scored if r.score is None}
    chosen = [r for e in formats.read(run_of / "rounds/1/selected.jsonl").examples for r in e.responses]
    assert without and chosen and not {r.text for r in chosen} & without
    row = next(row for row in read_metrics(run_of / "metrics.jsonl") if row["kind"] == "train")
    assert row["unscorable"] == pytest.approx(np.mean([r.score is None for r in scored])) and row["responses"] == len(scored)
    assert row["score_sampled"] == pytest.approx(np.mean([r.score for r in scored if r.score is not None]))
    for number in (0, 1):
        held = formats.read(run_of / f"evaluation/{number}/scored.jsonl").examples
        means = [np.mean(known) for e in held if (known := [r.score for r in e.responses if r.score is not None])]
        facts = json.loads((run_of / f"evaluation/{number}/facts.json").read_text())
        assert facts.get("score") == (pytest.approx(np.mean(means)) if means else None) and len(facts["scores"]) == len(held)


def test_a_round_of_which_nothing_can_be_scored_is_one_line(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.py").write_text(NONE.format(more="True"))
    assert run(["train", *words(place, tmp_path / "run", "raft", f"judge={tmp_path}/none.py:rule")]) == 2
    assert "could score none of the 28 responses of round 1" in capfd.readouterr().err
    assert "score" not in json.loads((tmp_path / "run/evaluation/0/facts.json").read_text())


def test_what_is_left_behind(whole: Path) -> None:
    AutoModelForCausalLM.from_pretrained(whole / "final")
    assert not (whole / "rounds/1/train/final").exists() and not list(whole.rglob("checkpoints/step*")), "no old weights"
    assert not list(whole.rglob("*.partial"))
    rows = read_metrics(whole / "metrics.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [(0, "eval"), (1, "train"), (1, "eval"), (2, "train"), (2, "eval")]
    for row in rows:
        if row["kind"] == "train":
            assert row["score_selected"] > row["score_sampled"] and row["selected"] == 7 and row["responses"] == 28
        else:
            assert row["score_low"] <= row["score"] <= row["score_high"]
    found = json.loads((whole / "change.json").read_text())
    assert found["change"] == pytest.approx(rows[-1]["score"] - rows[0]["score"])
    page = write_report(whole).read_text()
    assert f"Change of the held-out score: {found['change']:+.3f}" in page and "held-out score" in page
    assert "Held-out score" in page and "Scores of a round" in page and "score_low" not in page


def test_a_finished_run_is_not_done_again(place: Path, whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (whole / "final" / "model.safetensors").stat().st_mtime_ns
    assert runs.train(words(place, whole)) == 0
    assert "is finished" in capfd.readouterr().err
    assert (whole / "final" / "model.safetensors").stat().st_mtime_ns == before


def same(output: Path, whole: Path) -> None:
    drop = (*runs.TIMINGS,)
    strip = lambda path: [{k: v for k, v in row.items() if k not in drop} for row in read_metrics(path / "metrics.jsonl")]
    assert strip(output) == strip(whole)
    for name in ("rounds/1/scored.jsonl", "rounds/2/selected.jsonl", "evaluation/2/scored.jsonl"):
        assert texts(output / name) == texts(whole / name), name
    weights = "final/model.safetensors"
    assert (output / weights).read_bytes() == (whole / weights).read_bytes()


@pytest.mark.parametrize(
    "failpoint",
    ["round.sampled:kill:2", "round.scored:kill:4", "round.selected:kill:1", "step:kill:3", "final.before:kill:2", "round.trained:kill:1",
     "round.written:kill:2"],
)  # fmt: skip
def test_killed_in_any_phase_it_ends_as_if_it_had_not_been(place: Path, whole: Path, tmp_path: Path, failpoint: str) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    assert runs.run(words(place, output), log, failpoint=failpoint) == -9, log.read_text()
    assert runs.run(words(place, output), log) == 0, log.read_text()
    same(output, whole)


@pytest.mark.parametrize("failpoint", ["round.sampled:term:1", "step:int:2"])
def test_a_signal_stops_it_cleanly_and_it_goes_on(place: Path, whole: Path, tmp_path: Path, failpoint: str) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    code = runs.run(words(place, output), log, failpoint=failpoint)
    assert code == (143 if ":term:" in failpoint else 130), log.read_text()
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert runs.run(words(place, output), log) == 0, log.read_text()
    same(output, whole)


def test_one_response_of_one_prompt_is_training_on_own_samples(place: Path, tmp_path: Path) -> None:
    """K = 1: RAFT's selection keeps everything (methods.md, G.2)."""
    output = tmp_path / "run"
    assert runs.train(words(place, output, "raft", "rollout.n=1", "rounds=1")) == 0
    assert texts(output / "rounds/1/scored.jsonl") == texts(output / "rounds/1/selected.jsonl")


def test_the_pool_of_all_rounds_never_loses_its_best_response(place: Path, tmp_path: Path) -> None:
    """Llama 2's iterations: the best reward of each prompt never falls from round to round (methods.md, G.3)."""
    output = tmp_path / "run"
    assert runs.train(words(place, output, "bon", "rounds=3", "rollout.temperature=[1.0,0.8,1.2]")) == 0
    best = [np.array([kept[0][1] for kept in texts(output / f"rounds/{n}/selected.jsonl")]) for n in (1, 2, 3)]
    assert (best[1] >= best[0]).all() and (best[2] >= best[1]).all()
    last = zip(texts(output / "rounds/3/selected.jsonl"), texts(output / "rounds/3/scored.jsonl"), strict=True)
    assert any(kept[0] not in scored for kept, scored in last), "some of them are from earlier rounds"
    configs = [json.loads((output / f"rounds/{n}/train/run.json").read_text())["config"]["model"] for n in (1, 2, 3)]
    assert all(model.endswith("/model") for model in configs), "each round starts from the first model"


def test_rso_learns_pairs_of_accepted_responses(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = ("rollout.n=6", "method.count=4", "method.beta=0.05", "method.objective={gamma: 0.1}", "rounds=1", "keep_models=true")
    assert runs.train(words(place, output, "rso", *more)) == 0
    manifest = json.loads((output / "rounds/1/train/run.json").read_text())
    assert manifest["method"] == "rso_hinge_norm" and manifest["config"]["method"]["gamma"] == 0.1
    scored = {formats.prompt_key(e): {r.text for r in e.responses} for e in formats.read(output / "rounds/1/scored.jsonl").examples}
    pairs = formats.read(output / "rounds/1/selected.jsonl").examples
    assert pairs and all(len(e.responses) == 2 and {r.text for r in e.responses} <= scored[formats.prompt_key(e)] for e in pairs)
    assert all(e.responses[0].score > e.responses[1].score for e in pairs)
    assert (output / "rounds/1/train/final").is_dir() and (output / "final").is_dir()


def test_prompts_of_a_round_are_the_next_ones_of_a_shuffled_order(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert runs.train(words(place, output, "raft", "rollout.prompts=3", "eval_fraction=0", "rounds=3")) == 0
    seen = [[formats.prompt_key(e) for e in formats.read(output / f"rounds/{n}/scored.jsonl").examples] for n in (1, 2, 3)]
    assert [len(one) for one in seen] == [3, 3, 3] and len({key for one in seen for key in one}) == 9
    assert not (output / "evaluation").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("rollout.temperature=[1.0]",), "1 values for 2 rounds"),
        (("eval_every=2",), "judged after each round"),
        (("method.share=0.5",), "no effect with `ranking: local`"),
        (("judge=gone.py:rule",), "no such file"),
        (("judge=final_answer",), "reference_answer"),
        (("method.objective={turn: all}",), "turns"),
        (("method.at_least=5",), "leaves nothing to learn"),
        (("rollout.num_generations=5",), "rollout.n"),
        (("max_length=8",), "fills max_length"),
    ],
)
def test_mistakes_are_one_line(place: Path, tmp_path: Path, more: tuple[str, ...], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", *words(place, tmp_path / "run", "raft", *more)]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert says in error, error


def test_another_judge_is_another_run(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text(RULE)
    command = words(place, tmp_path / "run", "raft", f"judge={rule}:rule", "rounds=1")
    assert runs.train(command) == 0
    rule.write_text(RULE.replace("aeiou", "xyz"))
    assert run(["train", *command]) == 2
    assert "judge" in capfd.readouterr().err


def test_check_and_config_know_them(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["check", *words(place, tmp_path / "run")]) == 0
    shown = capfd.readouterr().err
    assert "7 to train on, 3 held out" in shown and "FAIL" not in shown and not (tmp_path / "run").exists()
    for name in ITERATED:
        assert run(["config", name]) == 0
        assert "rollout:" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"bon \(Best-of-N"):
        resolve(["best-of-n", "model=a"])


# --- parts ------------------------------------------------------------------------------------------------------------------------


def test_the_curve_of_best_of_n_is_the_mean_over_all_subsets() -> None:
    """methods.md, G.1: values 1..4, n = 2 gives 10/3; KL bounds 0, .193147, .636294."""
    curve = best_of_n_curve([[1, 2, 3, 4], [4, 3, 2, 1]])
    assert [one["n"] for one in curve] == [1, 2, 4]
    assert [one["score"] for one in curve] == pytest.approx([2.5, 10 / 3, 4])
    assert [one["kl_bound"] for one in curve] == pytest.approx([0, 0.193147, 0.636294], abs=1e-6)
    assert [one["n"] for one in best_of_n_curve([[1, 2, 3]])] == [1, 2, 3]


def test_the_change_compares_each_prompt_with_itself() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=200) * 10
    found = change(before, before + 0.5 + 0.1 * rng.normal(size=200))
    assert 0.47 < found["low"] < found["change"] < found["high"] < 0.53


def test_records_of_one_prompt_are_one_record() -> None:
    made = merged([Example("a", (Response("1"),)), Example("b", (Response("2"),)), Example("a", (Response("3"),))])
    assert [(e.prompt, [r.text for r in e.responses]) for e in made] == [("a", ["1", "3"]), ("b", ["2"])]


def written_by(model: Path, samples: Path, seed: int) -> bool:
    """Whether this model, asked for the same with this seed, writes just these responses."""
    examples = formats.read(samples).examples
    tokenizer, policy = load.load_tokenizer(load.locate(str(model))), LanguageModel(load.load_causal_lm(load.locate(str(model))))
    prompts = [tokenizer.encode_prompt(e.prompt) for e in examples]
    drawn = Engine(policy, tokenizer.turn_ends).generate(prompts, len(examples[0].responses), Sampling(max_new_tokens=10), seed)
    texts = {(s.prompt, s.number): tokenizer.decode(s.ids).strip() for s in drawn}
    return texts == {(i, k): r.text for i, e in enumerate(examples) for k, r in enumerate(e.responses)}


def test_regression_16_every_round_is_written_by_the_model_of_the_round_before(place: Path, tmp_path: Path) -> None:
    """Round 2 draws from the model after round 1, not from the start."""
    output = tmp_path / "run"
    assert runs.train(words(place, output, "raft", "keep_models=true")) == 0
    after = output / "rounds/1/train/final"
    seeds = [int(np.random.SeedSequence([0, number]).generate_state(1)[0]) for number in (1, 2)]
    assert written_by(place / "model", output / "rounds/1/samples.jsonl", seeds[0])
    assert written_by(after, output / "rounds/2/samples.jsonl", seeds[1])
    assert not written_by(place / "model", output / "rounds/2/samples.jsonl", seeds[1])
