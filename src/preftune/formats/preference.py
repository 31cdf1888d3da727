"""Formats of pairs: a prompt with a chosen and a rejected response."""

from __future__ import annotations

from typing import Any

from preftune.formats.fields import Row, need, need_list, pair, score
from preftune.formats.reasons import RowError
from preftune.formats.turns import messages, prompt_of, response_of, shared_turns, text_of, transcripts, turn_extras
from preftune.records import Example, Message


def hh(row: Row) -> Example:
    """Anthropic HH: `chosen` and `rejected` are whole transcripts."""
    chosen, rejected = (text_of(value, field="a transcript") for value in need(row, "chosen", "rejected"))
    if not chosen.strip() or not rejected.strip():
        raise RowError("empty_response", "a whole transcript is blank")
    if chosen == rejected:
        raise RowError("identical_responses")
    prompt, (better, worse) = transcripts((chosen, rejected))
    return pair(row, prompt, better, worse, used=("chosen", "rejected"))


def trl_preference(row: Row) -> Example:
    """TRL: `prompt`, `chosen`, `rejected`, each a string or a list of messages; with messages the prompt may be left out."""
    chosen, rejected = need(row, "chosen", "rejected")
    used = ("prompt", "chosen", "rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        prompt = prompt_of(*need(row, "prompt"))
        return pair(row, prompt, response_of(chosen, row["prompt"]), response_of(rejected, row["prompt"]), used=used)
    if not chosen or not rejected:
        raise RowError("empty_response", "a list of turns is empty")
    if chosen == rejected:
        raise RowError("identical_responses")
    conversations = messages(chosen), messages(rejected)
    given = _given_turns(row)
    alone = all(len(turns) == 1 for turns in conversations)
    if alone and not given:
        raise RowError("empty_prompt")
    shared = 0 if alone else shared_turns(conversations)
    if any(len(turns) != shared + 1 for turns in conversations):
        raise RowError("diverges_before_response", f"only the first {shared} turns are shared")
    if any(turns[-1].role != "assistant" for turns in conversations):
        raise RowError("no_response")
    opening = conversations[0][:shared]
    repeated = all(turn in opening for turn in given)  # ultrafeedback_binarized gives the prompt beside whole conversations
    extras = turn_extras(chosen)
    meta = {"turn_fields": extras} if extras else {}
    better, worse = (turns[-1].content for turns in conversations)
    return pair(row, opening if repeated else given + opening, better, worse, used=used, meta=meta)


def _given_turns(row: Row) -> tuple[Message, ...]:
    if row.get("prompt") is None:
        if "prompt" in row:
            raise RowError("empty_prompt", "it is null")
        return ()
    prompt = prompt_of(row["prompt"])
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def sharegpt_preference(row: Row) -> Example:
    """ShareGPT: `conversations` as the prompt; `chosen` and `rejected` as turns or as strings."""
    turns, chosen, rejected = need(row, "conversations", "chosen", "rejected")
    prompt = with_system(row, messages(turns))
    return pair(row, prompt, response_of(chosen), response_of(rejected), used=("conversations", "system", "chosen", "rejected"))


def alpaca_preference(row: Row) -> Example:
    """Alpaca with `chosen` and `rejected` in the place of `output`."""
    chosen, rejected = need(row, "chosen", "rejected")
    return pair(row, alpaca_prompt(row), response_of(chosen), response_of(rejected), used=(*ALPACA_PROMPT, "chosen", "rejected"))


ALPACA_PROMPT = ("instruction", "input", "system", "history")


def alpaca_prompt(row: Row) -> tuple[Message, ...]:
    """Alpaca's prompt: system, earlier [user, assistant] turns, then instruction, newline and input when there is one."""
    instruction = text_of(*need(row, "instruction"), field="instruction")
    more = text_of(row.get("input"), field="input")
    user = f"{instruction}\n{more}" if instruction and more else instruction or more
    if not user.strip():
        raise RowError("empty_prompt")
    history = []
    for turn in need_list(row.get("history") or [], "history"):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("turns_mismatch", "an entry of history is not a pair of user and assistant text")
        history += [Message("user", text_of(turn[0], field="history")), Message("assistant", text_of(turn[1], field="history"))]
    return with_system(row, (*history, Message("user", user)))


def with_system(row: Row, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns after the system turn of a row that keeps it in a field `system`."""
    system = text_of(row.get("system"), field="system")
    return (Message("system", system), *turns) if system else turns


def paddlenlp_preference(row: Row) -> Example:
    """PaddleNLP: `src` and `tgt` turns interleave; of the two in `response` the one with the higher `sort` wins."""
    src, tgt, response, sort = need(row, "src", "tgt", "response", "sort")
    users, replies = as_turns(src), as_turns(tgt)
    if len(users) != len(replies) + 1:
        raise RowError("turns_mismatch", f"{len(users)} src turns and {len(replies)} tgt turns")
    texts, sorts = need_list(response, "response"), [score(value) for value in need_list(sort, "sort")]
    if len(texts) != 2:
        raise RowError("wrong_response_count", f"{len(texts)} responses")
    if len(sorts) != 2 or None in sorts:
        raise RowError("scores_mismatch", "sort must give each response a number")
    if sorts[0] == sorts[1]:
        raise RowError("no_winner", f"sort is {sort}")
    first, second = (text_of(text) for text in texts)
    chosen, rejected = (first, second) if sorts > sorts[::-1] else (second, first)
    prompt = with_system(row, interleaved(users, replies))
    return pair(row, prompt, chosen, rejected, used=("src", "tgt", "response", "sort", "system"))


def as_turns(value: Any) -> list[str]:
    """PaddleNLP's turns of one side: a list of strings, or one string; null and "" are no turn."""
    if value is None or value == "":
        return []
    return [text_of(text, field="a turn") for text in (value if isinstance(value, list) else [value])]


def interleaved(users: list[str], replies: list[str]) -> tuple[Message, ...]:
    """user 1, assistant 1, user 2, ...; the last user turn has no reply when there is one reply fewer."""
    turns = []
    for index, user in enumerate(users):
        turns.append(Message("user", user))
        if index < len(replies):
            turns.append(Message("assistant", replies[index]))
    return tuple(turns)
