"""Turns in the wild: transcripts with role markers, lists of messages; both become `Message`s, no text inside them changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from preftune.formats.reasons import RowError
from preftune.records import Message

Prompt = str | tuple[Message, ...]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bing": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}

# What begins a turn. The blank before an HH turn's text belongs to the marker; a blank beyond that one is text.
_MARKERS = {
    "\n\nHuman:": re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):[ ]?"),
    "## Human:": re.compile(r"(?:\A\s*|\n\n)## (Human|Assistant):\n?"),
    "<|prompter|>": re.compile(r"<\|(prompter|assistant)\|>"),
}


class Turn(NamedTuple):
    """A message of a transcript, and where its text starts in that transcript."""

    message: Message
    start: int


def is_transcript(text: str) -> bool:
    """Whether the text opens with a role marker, so that it is a conversation and not a plain string."""
    return text.startswith(tuple(_MARKERS))


def transcript(text: str) -> list[Turn]:
    """Cut a transcript at its role markers. Raises RowError when it does not open with one."""
    for opening, marker in _MARKERS.items():
        if text.lstrip().startswith(opening.lstrip()):
            found = list(marker.finditer(text))
            ends = [m.start() for m in found[1:]] + [len(text)]
            return [Turn(Message(ROLES[m[1].lower()], text[m.end() : end]), m.end()) for m, end in zip(found, ends)]
    raise RowError("not_a_transcript", f"text begins {text[:40]!r}")


def transcripts(texts: Sequence[str]) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Split whole conversations into the prompt they share and the response of each.

    The prompt is the longest common run of *turns* (never of characters: two responses may begin alike). A response is all that
    follows, as it stands: where a model went on to write a role marker of its own, that marker is part of what it wrote.
    """
    turns = [transcript(text) for text in texts]
    shared = shared_turns([[turn.message for turn in one] for one in turns])
    for one in turns:
        if any(turn.message.role == "user" for turn in one[shared:]):
            raise RowError("diverges_before_response", f"only the first {shared} turns are shared")
    prompt = tuple(turn.message for turn in turns[0][:shared])
    return prompt, tuple(text[one[shared].start :] for text, one in zip(texts, turns))


def shared_turns(conversations: Sequence[Sequence[Message]]) -> int:
    """How many opening turns the conversations share, each keeping at least one turn of its own."""
    limit = min(len(turns) for turns in conversations) - 1
    shared = 0
    while shared < limit and all(turns[shared] == conversations[0][shared] for turns in conversations):
        shared += 1
    if shared == 0:
        raise RowError("prompts_differ")
    return shared


def message(turn: Any) -> Message:
    """One message of any dialect: role/content or from/value; content a string or a list of text parts."""
    if not isinstance(turn, Mapping):
        raise RowError("wrong_type", f"a turn is a {type(turn).__name__}, not an object with role and content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowError("unknown_role", repr(role))
    if turn.get("tool_calls") or turn.get("function_call"):
        raise RowError("not_text", "a turn holds a tool call")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise RowError("not_text", "a turn has parts that are not text")
        content = "".join(part["text"] for part in content)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise RowError("wrong_type", f"the content of a turn is a {type(content).__name__}, not text")
    return Message(ROLES[role.lower()], content)


def turn_extras(turns: Any) -> list[dict[str, Any]]:
    """What the turns carry beside role and text (a name, a weight), each with the index of its turn; for `meta`."""
    extras = []
    for index, turn in enumerate(turns if isinstance(turns, list) else ()):
        more = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value") and value not in (None, [])}
        if more:
            extras.append({"turn": index, **more})
    return extras


def messages(turns: Any) -> tuple[Message, ...]:
    """A list of messages in any dialect."""
    if not isinstance(turns, list):
        raise RowError("wrong_type", f"a conversation is a {type(turns).__name__}, not a list of turns")
    return tuple(message(turn) for turn in turns)


def conversation(turns: Any) -> tuple[tuple[Message, ...], str]:
    """A whole conversation as its prompt and the response, which is its last turn."""
    whole = messages(turns)
    if not whole or whole[-1].role != "assistant":
        raise RowError("no_response", f"it ends with a turn of {whole[-1].role}" if whole else "it has no turn")
    return whole[:-1], whole[-1].content


def prompt_of(value: Any) -> Prompt:
    """A prompt field: messages; a string with role markers, as turns; any other string as it stands, without a chat template.

    The cue that ends a transcript ("\\n\\nAssistant:" with nothing after it) is left out: the chat template gives its own.
    """
    if value is None:
        raise RowError("empty_prompt", "it is null")
    if isinstance(value, list):
        return messages(value)
    if not isinstance(value, str):
        raise RowError("wrong_type", f"the prompt is a {type(value).__name__}, not text")
    if not is_transcript(value):
        return value
    turns = tuple(turn.message for turn in transcript(value))
    cue = turns[-1].role == "assistant" and not turns[-1].content.strip()
    return turns[:-1] if cue else turns


def text_of(value: Any, *, field: str = "response") -> str:
    """A field that must be text; null counts as empty, which `checked` refuses by name."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{field} is a {type(value).__name__}, not text")
    return value


def response_of(value: Any, prompt_field: Any = None, *, field: str = "response") -> str:
    """The text of a response given as a string, a message, or a list of one message.

    After an HH transcript prompt ("...\\n\\nAssistant:") the single blank that opens the response belongs to the marker.
    """
    if isinstance(value, list):
        if len(value) != 1:
            raise RowError("wrong_response_count" if value else "empty_response", f"{field} has {len(value)} turns, not one")
        value = value[0]
    if isinstance(value, Mapping):
        turn = message(value)
        if turn.role != "assistant":
            raise RowError("no_response", f"{field} is a turn of {turn.role}")
        return turn.content
    text = text_of(value, field=field)
    after_marker = isinstance(prompt_field, str) and prompt_field.startswith("\n\nHuman:")
    return text.removeprefix(" ") if after_marker else text
