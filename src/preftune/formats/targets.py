"""Pure functions record -> row for the formats we write; each raises Inexpressible where its format has no place for a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from preftune.records import Example, Message, Response


class Inexpressible(Exception):
    """The format has no place for this record; the message completes "3 records ..."."""


def _dicts(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


def _common(example: Example) -> dict[str, Any]:
    """The fields that every reader understands beside the format's own."""
    found = {"source": example.source, "annotator": example.annotator}
    return {name: value for name, value in found.items() if value is not None}


def _pair_columns(example: Example) -> dict[str, Any]:
    """`score_chosen`, `score_rejected` and TRL's `margin`, where the record has plain numbers for them."""
    scores = {"score_chosen": example.responses[0].score, "score_rejected": example.responses[1].score}
    columns: dict[str, Any] = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
    if len(example.comparisons) == 1 and example.comparisons[0].strength is not None:
        columns["margin"] = example.comparisons[0].strength
    return columns | _common(example)


def _turns(example: Example) -> tuple[Message, ...]:
    if isinstance(example.prompt, str):
        raise TypeError("a plain prompt where the target knows only turns")
    return example.prompt


def _trl_text(example: Example, response: Response) -> Any:
    return response.text if isinstance(example.prompt, str) else [{"role": "assistant", "content": response.text}]


def _trl_prompt(example: Example) -> dict[str, Any]:
    tools = {"tools": example.meta["tools"]} if "tools" in example.meta else {}
    return {"prompt": example.prompt if isinstance(example.prompt, str) else _dicts(example.prompt)} | tools


def trl_pair(example: Example) -> dict[str, Any]:
    """TRL's preference with explicit prompt, of strings where the prompt is a string and of messages where it is turns."""
    chosen, rejected = (_trl_text(example, response) for response in example.responses)
    return _trl_prompt(example) | {"chosen": chosen, "rejected": rejected} | _pair_columns(example)


def trl_single(example: Example) -> dict[str, Any]:
    """TRL's prompt-completion; with a label its unpaired preference."""
    (response,) = example.responses
    label = {} if response.label is None else {"label": response.label}
    return _trl_prompt(example) | {"completion": _trl_text(example, response)} | label | _common(example)


def _exchanges(example: Example, name: str, *, system: bool) -> tuple[str, list[str], list[str]]:
    """(system text, user turns, assistant turns between them) of a prompt that takes strict turns and ends with the user's."""
    turns = _turns(example)
    opening = turns[0].content if turns and turns[0].role == "system" else ""
    if opening and not system:
        raise Inexpressible(f"with a system turn, which {name} has no place for")
    rest = turns[1:] if turns and turns[0].role == "system" else turns
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(rest))]
    if [turn.role for turn in rest] != expected or len(rest) % 2 == 0:
        raise Inexpressible(f"whose turns are not user, assistant, ..., user, the only order that {name} has")
    return opening, [turn.content for turn in rest[::2]], [turn.content for turn in rest[1::2]]


def paddlenlp_pair(example: Example) -> dict[str, Any]:
    """PaddleNLP's reward and DPO data: src, tgt, response, and sort [1, 0] for the chosen first."""
    _, src, tgt = _exchanges(example, "PaddleNLP", system=False)
    return {"src": src, "tgt": tgt, "response": [one.text for one in example.responses], "sort": [1, 0]} | _pair_columns(example)


def paddlenlp_single(example: Example) -> dict[str, Any]:
    """PaddleNLP's SFT data: as many src as tgt, the last of tgt the response."""
    _, src, tgt = _exchanges(example, "PaddleNLP", system=False)
    return {"src": src, "tgt": [*tgt, example.responses[0].text]} | _common(example)


_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def _said(turn: Message) -> dict[str, str]:
    return {"from": _SHAREGPT[turn.role], "value": turn.content}


def sharegpt_pair(example: Example) -> dict[str, Any]:
    """ShareGPT's pairs as LLaMA-Factory has them: chosen and rejected as turns."""
    chosen, rejected = (_said(Message("assistant", response.text)) for response in example.responses)
    turns = [_said(turn) for turn in _turns(example)]
    return {"conversations": turns, "chosen": chosen, "rejected": rejected} | _pair_columns(example)


def sharegpt_single(example: Example) -> dict[str, Any]:
    """ShareGPT's conversations; a label as LLaMA-Factory's kto_tag."""
    (response,) = example.responses
    label = {} if response.label is None else {"kto_tag": response.label}
    turns = (*_turns(example), Message("assistant", response.text))
    return {"conversations": [_said(turn) for turn in turns]} | label | _common(example)


def _alpaca_prompt(example: Example) -> dict[str, Any]:
    system, users, replies = _exchanges(example, "Alpaca", system=True)
    history = [list(turns) for turns in zip(users, replies)]
    return {"instruction": users[-1], "input": ""} | ({"system": system} if system else {}) | ({"history": history} if history else {})


def alpaca_pair(example: Example) -> dict[str, Any]:
    """Alpaca with chosen and rejected; the whole last user turn is the instruction."""
    chosen, rejected = (response.text for response in example.responses)
    return _alpaca_prompt(example) | {"chosen": chosen, "rejected": rejected} | _pair_columns(example)


def alpaca_single(example: Example) -> dict[str, Any]:
    """Alpaca with output; a label as LLaMA-Factory's kto_tag."""
    (response,) = example.responses
    label = {} if response.label is None else {"kto_tag": response.label}
    return _alpaca_prompt(example) | {"output": response.text} | label | _common(example)


_HH = {"user": "Human", "assistant": "Assistant"}


def _transcript(turns: Sequence[Message]) -> str:
    if any(turn.role not in _HH for turn in turns):
        raise Inexpressible("with a system or tool turn, which HH transcripts have no marker for")
    return "".join(f"\n\n{_HH[turn.role]}: {turn.content}" for turn in turns)


def hh_pair(example: Example) -> dict[str, Any]:
    """Anthropic HH: whole transcripts."""
    chosen, rejected = (_transcript((*_turns(example), Message("assistant", response.text))) for response in example.responses)
    return {"chosen": chosen, "rejected": rejected} | _pair_columns(example)


def kwise_row(example: Example) -> dict[str, Any]:
    """RRHF's and KnowPAT's K responses with scores; the prompt as an HH transcript, or as a string where it is one."""
    scores = [response.score for response in example.responses]
    if not all(isinstance(score, (int, float)) for score in scores):
        raise Inexpressible("without one number as the score of every response")
    texts = [response.text for response in example.responses]
    if isinstance(example.prompt, str):
        return {"prompt": example.prompt, "responses": texts, "scores": scores} | _common(example)
    # after the transcript's marker a reader takes one blank off, so a response that opens with one gets another
    texts = [f" {text}" if text.startswith(" ") else text for text in texts]
    return {"query": _transcript(example.prompt) + "\n\nAssistant:", "responses": texts, "scores": scores} | _common(example)
