"""Rules: the built-in ones on cases worked by hand, and a user's own function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preftune import formats
from preftune.errors import UserError
from preftune.records import Example, Response
from preftune.rewards import rules

QUESTION = Example("How many?", (), reference_answer="1007")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("1000 + 7 = 1,007\n#### 1007", True),
        ("#### 1,007", True),
        ("The answer is $1007.00.", True),
        ("So we get \\boxed{1007} in the end, not 5.", True),
        ("First 1007, then 3 more makes 1010", False),
        ("It is 1007", True),
        ("-1007", False),
        ("1007.5", False),
        ("", False),
        ("none", False),
        ("The answer is 3. No: the answer is 1007, of 2 people", True),
    ],
)
def test_final_answer(text: str, right: bool) -> None:
    assert rules.final_answer(QUESTION, Response(text)) == right


def test_final_answer_in_words() -> None:
    paris = Example("Capital of France?", (), reference_answer="Paris")
    assert [rules.final_answer(paris, Response(t)) for t in ("It is paris.", "Parisian", "London")] == [1, 0, 0]
    with pytest.raises(ValueError, match="reference_answer"):
        rules.final_answer(Example("q", ()), Response("1"))


def test_final_answer_takes_every_worked_solution_of_a_real_test_set_and_no_other(shared_data: Path) -> None:
    """GSM8K's own solutions all end right; with the answers of their neighbours hardly any does."""
    path = shared_data / "gsm8k" / "test.jsonl"
    solutions = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    examples = formats.read_prompts(path).examples
    assert len(examples) == len(solutions) > 1000
    assert all(rules.final_answer(e, Response(s)) == 1 for e, s in zip(examples, solutions, strict=True))
    others = [rules.final_answer(e, Response(s)) for e, s in zip(examples, solutions[1:] + solutions[:1], strict=True)]
    assert sum(others) < 0.03 * len(others)


def test_the_other_rules() -> None:
    one = Response("three short words", finished=False)
    assert rules.length(QUESTION, one) == 3
    assert [rules.length(QUESTION, one, least=a, most=b) for a, b in ((3, 3), (4, None), (0, 2))] == [1, 0, 0]
    assert rules.matches(QUESTION, one, pattern="sh.rt") == 1 and rules.matches(QUESTION, one, pattern="^short") == 0
    assert rules.finished(QUESTION, one) == 0 and rules.finished(QUESTION, Response("x")) == 1
    for text, right in (('{"a": 1}', 1), ('```json\n{"a": 1}\n```', 1), ("[1]", 0), ('{"a": 1} thanks', 0), ("", 0)):
        assert rules.json_object(QUESTION, Response(text)) == right


def test_a_users_function_by_file_and_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rule.py").write_text("def shout(example, response, times=1):\n    return times * response.text.count('!')\n")
    monkeypatch.chdir(tmp_path)
    for word in ("own_rule.py:shout", "own_rule:shout", f"{tmp_path}/own_rule.py:shout"):
        assert rules.is_rule(word)
        assert rules.find(word, {"times": 2}).score(QUESTION, Response("Hi!!")) == 4
    code = rules.find("own_rule.py:shout", {}).code
    (tmp_path / "own_rule.py").write_text("def shout(example, response):\n    return 0\n")
    assert rules.find("own_rule.py:shout", {}).code != code, "another version of the file is another judge"


def test_what_is_a_rule_and_what_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rules.is_rule("length") and not any(map(rules.is_rule, ("runs/reward/final", "owner/model", "smollm2", "http://x/y")))
    (tmp_path / "length").mkdir()
    assert not rules.is_rule("length"), "a folder of that name is a model"


@pytest.mark.parametrize(
    ("word", "options", "says"),
    [
        ("no_such_module:f", {}, "No module named"),
        ("none.py:f", {}, "no such file"),
        ("bad.py:f", {}, "ZeroDivisionError"),
        ("good.py:g", {}, "no function 'g'"),
        ("good.py:f", {"odd": 1}, "odd"),
        ("matches", {}, "pattern"),
    ],
)
def test_a_rule_that_cannot_be_used_is_one_line(
    word: str, options: dict[str, object], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    (tmp_path / "good.py").write_text("def f(example, response):\n    return 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        rules.find(word, options)
