"""Formats of one response a row: demonstrations (SFT) and responses judged alone (KTO)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preftune.formats.fields import Row, example, label, need
from preftune.formats.preference import ALPACA_PROMPT, alpaca_prompt, as_turns, interleaved, with_system
from preftune.formats.reasons import RowError
from preftune.formats.turns import Prompt, conversation, messages, prompt_of, response_of, text_of, turn_extras
from preftune.records import Example, Message, Response


def _single(row: Row, prompt: Prompt, response: str, used: Sequence[str], labels: Sequence[str] = (), **fields: Any) -> Example:
    given = [label(row[name]) for name in labels if row.get(name) is not None]
    return example(row, prompt, [Response(response, label=given[0] if given else None)], (*used, *labels), **fields)


def trl_completion(row: Row) -> Example:
    """TRL prompt-completion, and with a `label` its unpaired preference (KTO)."""
    prompt, completion = need(row, "prompt", "completion")
    return _single(row, prompt_of(prompt), response_of(completion, prompt, field="completion"), ("prompt", "completion"), ("label",))


def chat_messages(row: Row) -> Example:
    """`messages`: the last assistant turn is the response, everything before it the prompt."""
    return _conversation(row, "messages")


def sharegpt(row: Row) -> Example:
    """ShareGPT `conversations`: the last turn is the response, everything before it the prompt."""
    return _conversation(row, "conversations")


def _conversation(row: Row, field: str) -> Example:
    (turns,) = need(row, field)
    prompt, response = conversation(turns)
    extras = turn_extras(turns)
    meta = {"turn_fields": extras} if extras else {}
    return _single(row, with_system(row, prompt), response, (field, "system"), ("label", "kto_tag"), meta=meta)


def alpaca(row: Row) -> Example:
    """Alpaca `instruction`, `input`, `output`, with optional `system` and `history`; with `kto_tag` LLaMA-Factory's KTO."""
    (output,) = need(row, "output")
    return _single(row, alpaca_prompt(row), response_of(output, field="output"), (*ALPACA_PROMPT, "output"), ("kto_tag",))


def src_tgt(row: Row) -> Example:
    """PaddleNLP `src`, `tgt`: strings, or lists of as many turns; the last of `tgt` is the response."""
    src, tgt = need(row, "src", "tgt")
    users, replies = as_turns(src), as_turns(tgt)
    if not users:
        raise RowError("empty_prompt")
    if not replies:
        raise RowError("empty_response")
    if len(users) != len(replies):
        raise RowError("turns_mismatch", f"{len(users)} src turns and {len(replies)} tgt turns")
    return _single(row, with_system(row, interleaved(users, replies[:-1])), replies[-1], ("src", "tgt", "system"))


def advertise_gen(row: Row) -> Example:
    """AdvertiseGen: the attribute string `content` asks for the text `summary`."""
    content, summary = (text_of(value) for value in need(row, "content", "summary"))
    return _single(row, (Message("user", content),), summary, ("content", "summary"))


def question_answer(row: Row) -> Example:
    """GSM8K: `question` and a worked `answer`; what follows its last `####` is the reference answer."""
    question, answer = (text_of(value) for value in need(row, "question", "answer"))
    _, marker, final = answer.rpartition("####")
    reference = final.strip() if marker else None
    return _single(row, (Message("user", question),), answer, ("question", "answer"), reference_answer=reference or None)


def prompt_alone(row: Row) -> Example:
    """`prompt`, with an optional `reference_answer`."""
    (prompt,) = need(row, "prompt")
    return _alone(row, prompt_of(prompt), ("prompt",))


def messages_alone(row: Row) -> Example:
    """`messages` that end with a turn of the user."""
    (turns,) = need(row, "messages")
    return _alone(row, with_system(row, messages(turns)), ("messages", "system"))


def instruction_alone(row: Row) -> Example:
    """Alpaca `instruction` and `input` without an output."""
    return _alone(row, alpaca_prompt(row), ALPACA_PROMPT)


def question_alone(row: Row) -> Example:
    """`question` without an answer, as one turn of the user."""
    (question,) = need(row, "question")
    return _alone(row, (Message("user", text_of(question, field="question")),), ("question",))


def ends_with_user(row: Row) -> bool:
    """Whether the last of `messages` is not the assistant's."""
    turns = row.get("messages")
    last = turns[-1] if isinstance(turns, list) and turns else None
    return isinstance(last, Mapping) and last.get("role", last.get("from")) not in ("assistant", "gpt")


def _alone(row: Row, prompt: Prompt, used: Sequence[str]) -> Example:
    answer = row.get("reference_answer")
    known = None if answer is None else str(answer)
    return example(row, prompt, (), (*used, "reference_answer"), reference_answer=known)
