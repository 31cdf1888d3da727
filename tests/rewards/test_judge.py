"""Judges: the score of a response is its own, combinations are what they say, answers that are no scores are named, and nothing is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from preftune import formats
from preftune.cli.main import run
from preftune.errors import UserError
from preftune.records import Example, Response
from preftune.rewards.config import JudgeConfig, parse
from preftune.rewards.judge import ask, open_judge
from tests import tiny

CPU = {"compute": torch.float32, "device": torch.device("cpu")}
WORDS = ("one", "two two", "three three three", "", "five " * 9)
RECORDS = [Example(f"Say {i}.", tuple(Response(f"{w} {i}") for w in WORDS[: 2 + i % 3]), where=f"f.jsonl:{i + 1}") for i in range(9)]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tool's reward model whose pad token is its end of text: what a reader that looks for pads gets wrong."""
    path = tmp_path_factory.mktemp("judge") / "tiny"
    config = tiny.model().config
    config.num_labels, config.pad_token_id = 1, tiny.tokenizer().eos_token_id
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("budget", [64, 4096])
def test_regression_17_and_43_a_score_is_the_same_alone_in_company_and_in_any_order(classifier: Path, budget: int) -> None:
    judge = open_judge(JudgeConfig(use=str(classifier)), tokens_per_microbatch=budget, **CPU).judge
    together = ask(judge, RECORDS)
    alone = [ask(judge, [one])[0] for one in RECORDS]
    backwards = ask(judge, RECORDS[::-1])[::-1]
    for a, b, c in zip(together, alone, backwards, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(a, c, atol=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = tiny.tokenizer()
    for example, scores in zip(RECORDS, together, strict=True):
        for response, score in zip(example.responses, scores, strict=True):
            ids = tokenizer(example.prompt + response.text, add_special_tokens=False).input_ids
            with torch.no_grad():  # one row without any padding, read at its last token by hand
                states = model.base_model(torch.tensor([[*ids, tokenizer.eos_token_id]])).last_hidden_state[0, -1]
            assert score == pytest.approx((states @ model.score.weight[0]).item(), abs=1e-5)


def test_regression_27_scores_stay_with_their_prompt_after_a_shuffle() -> None:
    judge = open_judge(JudgeConfig(use="length"), **CPU).judge
    order = np.random.default_rng(0).permutation(len(RECORDS))
    shuffled = ask(judge, [RECORDS[i] for i in order])
    for at, i in enumerate(order):
        assert shuffled[at].tolist() == [len(r.text.split()) for r in RECORDS[i].responses]


def test_several_judges_add_up_or_one_guards() -> None:
    parts = {"long": {"use": "length"}, "shout": {"use": "matches", "options": {"pattern": "three"}}}
    added = open_judge(JudgeConfig.model_validate({"parts": parts, "weights": {"shout": -10}}), **CPU).judge
    plain = open_judge(JudgeConfig.model_validate({"parts": parts}), **CPU).judge
    one = [Example("q", (Response("three words here"), Response("two words")))]
    assert ask(added, one)[0].tolist() == [3 - 10, 2] and ask(plain, one)[0].tolist() == [4, 2]
    logits = {"safe": {"use": "tests.rewards.test_judge:safety"}, "good": {"use": "length"}}
    guarded = open_judge(JudgeConfig.model_validate({"parts": logits, "safety": "safe"}), **CPU).judge
    texts = tuple(Response(t) for t in ("-1.74 is below", "-1.73 is above", "5 is safe"))
    assert ask(guarded, [Example("q", texts)])[0].tolist() == [-1.74, 3, 3], "sigma(-1.7346) is 0.15"


def safety(example: Example, response: Response) -> float:
    return float(response.text.split()[0])


def in_doubt(example: Example, response: Response) -> float | None:
    """A number where the text begins with one."""
    first = response.text.partition(" ")[0]
    return None if first == "?" else float(first)


def test_none_is_a_response_that_cannot_be_scored() -> None:
    """Of parts those that gave a number add up, and where none did there is no score; the safety rule needs both."""
    texts = tuple(Response(text) for text in ("2 words", "? it is", "? none of it"))
    one = [Example("q", texts, where="f:1")]
    doubt = {"use": "tests.rewards.test_judge:in_doubt"}
    say = lambda **judge: ask(open_judge(JudgeConfig.model_validate(judge), **CPU).judge, one)[0].tolist()
    same = lambda found, expected: np.testing.assert_array_equal(found, [np.nan if x is None else x for x in expected])
    same(say(**doubt), [2, None, None])
    same(say(parts={"a": doubt, "b": {"use": "length"}}, weights={"a": 10}), [22, 3, 4])
    same(say(parts={"a": doubt, "b": doubt}), [4, None, None])
    same(say(parts={"a": doubt, "b": {"use": "length"}}, weights={"b": 0}), [2, None, None])
    same(say(parts={"a": doubt, "b": {"use": "length"}}, safety="a"), [2, None, None])
    same(say(parts={"a": doubt, "b": {"use": "length"}}, safety="b"), [2, None, None])
    with pytest.raises(UserError, match="f:1: the judge gives response 2 the score nan"):
        ask(lambda examples: [[None, math.nan, 1.0]], one)


@pytest.mark.parametrize(
    ("judge", "says"),
    [
        (lambda records: [[1.0]] * len(records), "f.jsonl:1: the judge gives 1 scores for 2 responses"),
        (lambda records: [[1.0, 2.0]], "scores of 1 records for 2"),
        (lambda records: [[math.nan, 1.0], [0, 0, 0]], "f.jsonl:1: the judge gives response 1 the score nan"),
        (lambda records: [[0.0, 1.0], [0, -math.inf, 0]], "f.jsonl:2: the judge gives response 2 the score -inf"),
        (lambda records: [["a", "b"], [0, 0, 0]], "something else than numbers"),
        (lambda records: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_is_no_score_is_one_line(judge: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        ask(judge, RECORDS[:2])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_rule_that_raises_names_the_record() -> None:
    judge = open_judge(JudgeConfig(use="final_answer"), **CPU).judge
    with pytest.raises(UserError, match=r"f.jsonl:1: the rule final_answer fails on response 1: ValueError"):
        ask(judge, RECORDS)


def test_a_judge_by_one_word_or_a_file(tmp_path: Path) -> None:
    assert parse("length") == JudgeConfig(use="length")
    file = tmp_path / "judge.yaml"
    file.write_text("parts:\n  a: length\n  b: {use: matches, options: {pattern: x}}\nweights: {a: 0.5}\n")
    assert parse(str(file)).parts["a"].use == "length" and parse(str(file)).weights == {"a": 0.5}
    for text, says in (
        ("use: length\nendpoint: {url: http://x, model: m}\n", "exactly one"),
        ("parts: {a: length}\nweights: {b: 1}\n", "none of the `parts`"),
        ("endpoint: {url: x, model: m}\n", "http"),
        ("endpoint: {url: http://x, model: m, instruction: Hi}\n", "response"),
        ("us: length\n", "use"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says):
            parse(str(file))
    with pytest.raises(UserError, match="no such file"):
        parse("gone.yaml")


# --- preftune score ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    rows = [{"prompt": f"Say {i}.", "responses": [{"text": f"{w} {i}"} for w in WORDS[:3]]} for i in range(70)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_rule_and_parts_score_a_file(samples: Path, tmp_path: Path) -> None:
    out, both = tmp_path / "out.jsonl", tmp_path / "both.jsonl"
    assert run(["score", str(samples), "--judge", "length", "--output", str(out)]) == 0
    assert [r.score for r in formats.read(out).examples[0].responses] == [2, 3, 4]
    file = tmp_path / "judge.yaml"
    file.write_text("parts: {a: length, b: {use: matches, options: {pattern: two}}}\n")
    assert run(["score", str(samples), "--judge", str(file), "--output", str(both)]) == 0
    responses = formats.read(both).examples[5].responses
    assert [r.score for r in responses] == [2, 4, 4]
    assert [r.meta["scores"] for r in responses] == [{"a": 2, "b": 0}, {"a": 3, "b": 1}, {"a": 4, "b": 0}]


@pytest.mark.parametrize("attribute", [None, "kind"])
def test_what_cannot_be_scored_has_no_score_in_the_file_and_is_counted(
    attribute: str | None, samples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a null in what is under way, a score that was there before is not taken for the new one, and another is left."""
    (tmp_path / "doubt.py").write_text("def rule(example, response):\n    return None if 'two' in response.text else 1\n")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    old = {"kind": 5.0, "sure": 7.0} if attribute else 5.0
    rows = [{**row, "responses": [{**r, "score": old} for r in row["responses"]]} for row in rows]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, name = tmp_path / "out.jsonl", ["--attribute", attribute] if attribute else []
    monkeypatch.setattr(Path, "unlink", lambda path, **how: None)  # the journal stays
    assert run(["score", str(samples), "--judge", f"{tmp_path}/doubt.py:rule", "--output", str(out), *name]) == 0
    assert "140 responses scored, 70 could not be scored" in capfd.readouterr().err
    line = json.loads((tmp_path / "out.jsonl.partial").read_text().splitlines()[1])
    assert line["scores"] == [1.0, None, 1.0]
    expected = [{"sure": 7, "kind": 1}, {"sure": 7}, {"sure": 7, "kind": 1}] if attribute else [1, None, 1]
    assert [r.score for r in formats.read(out).examples[3].responses] == expected


def test_a_judge_that_fails_loses_nothing_and_is_not_asked_twice(
    samples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moody.py").write_text(
        "import pathlib\n"
        "def rule(example, response):\n"
        "    with open('asked', 'a') as f: f.write('.')\n"
        "    if pathlib.Path('broken').exists() and example.prompt.endswith(' 41.'): return float('nan')\n"
        "    return len(response.text)\n"
    )
    (tmp_path / "broken").touch()
    words = ["score", str(samples), "--judge", "moody.py:rule", "--output", str(tmp_path / "out.jsonl")]
    assert run(words) == 2
    assert "samples.jsonl:42: the judge gives response 1 the score nan" in capfd.readouterr().err
    kept = (tmp_path / "out.jsonl.partial").read_text().count("\n") - 1
    assert kept == 41, "all records before the one that fails are kept"
    (tmp_path / "broken").unlink()
    (tmp_path / "asked").write_text("")
    assert run(words) == 0
    assert "going on: 41 of 70" in capfd.readouterr().err
    assert len((tmp_path / "asked").read_text()) == (70 - 41) * 3
    assert len(formats.read(tmp_path / "out.jsonl").examples) == 70 and not list(tmp_path.glob("*.partial"))


def test_scores_under_way_of_another_judge_are_refused(samples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.jsonl.partial").write_text('{"scores":1,"records":"x","judge":{}}\n')
    assert run(["score", str(samples), "--judge", "length", "--output", str(tmp_path / "out.jsonl")]) == 2
    assert "made in another way" in capfd.readouterr().err


def test_killed_while_it_scores_it_goes_on(samples: Path, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef rule(example, response):\n    time.sleep(0.004)\n    return len(response.text)\n")
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    words = ["score", str(samples), "--judge", f"{tmp_path}/slow.py:rule", "--output", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "preftune", *words], stderr=subprocess.DEVNULL)
    while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 20):
        time.sleep(0.002)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert run(words) == 0
    examples = formats.read(out).examples
    assert [len(r.text) for e in examples for r in e.responses] == [r.score for e in examples for r in e.responses]
