"""Prompts to be answered: rows without a response, and the prompts of rows that have some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.formats import read_prompts
from preftune.records import Message

USER = (Message("user", "Hi"),)


def rows(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "name"),
    [
        ({"prompt": "Hi"}, "Hi", "prompts"),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, USER, "prompts"),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:"}, USER, "prompts"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, USER, "prompts-messages"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}, USER, "messages"),
        ({"instruction": "Hi"}, USER, "prompts-alpaca"),
        ({"question": "Hi"}, USER, "prompts-question"),
        ({"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}, USER, "hh"),
        ({"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2]}, "Hi", "kwise-prompt"),
    ],
)
def test_the_prompt_of_a_row(tmp_path: Path, row: dict, prompt: object, name: str) -> None:
    found = read_prompts(rows(tmp_path / "p.jsonl", row))
    assert found.format == name
    (one,) = found.examples
    assert one.prompt == prompt and one.responses == () and one.where.endswith("p.jsonl:1")


def test_a_known_answer_is_kept_and_a_prompt_is_there_once(tmp_path: Path) -> None:
    answers = rows(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "2"}, {"question": "1+1?", "answer": "two"})
    (one,) = read_prompts(answers).examples
    assert one.reference_answer == "2"
    own = read_prompts(rows(tmp_path / "b.jsonl", {"prompt": "Hi", "reference_answer": "Yo", "level": 3})).examples[0]
    assert own.reference_answer == "Yo" and own.meta == {"level": 3}
    disliked = read_prompts(rows(tmp_path / "c.jsonl", {"prompt": "Hi", "completion": "bad", "label": False})).examples[0]
    assert disliked.reference_answer is None


def test_an_empty_reply_is_no_fault_of_a_prompt_but_an_empty_prompt_is(tmp_path: Path) -> None:
    pair = {"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: b"}
    assert len(read_prompts(rows(tmp_path / "p.jsonl", pair)).examples) == 1
    with pytest.raises(UserError, match=r"q.jsonl:2 empty_prompt"):
        read_prompts(rows(tmp_path / "q.jsonl", {"prompt": "Hi"}, {"prompt": " "}))
    assert len(read_prompts(tmp_path / "q.jsonl", on_error="skip").examples) == 1
    with pytest.raises(UserError, match=r"unknown format 'propmts'.*Did you mean prompts"):
        read_prompts(tmp_path / "q.jsonl", format="propmts")


def test_ids_of_prompts_do_not_hang_on_responses(tmp_path: Path) -> None:
    bare = read_prompts(rows(tmp_path / "a.jsonl", {"prompt": "Hi"})).examples[0]
    with_responses = read_prompts(rows(tmp_path / "b.jsonl", {"prompt": "Hi", "responses": ["a", "b"], "scores": [1, 2]})).examples[0]
    assert bare.id == with_responses.id
