"""The one record: a prompt with N >= 1 responses. Everything the toolkit reads becomes this; no torch here.

Ranks and scores run in opposite directions: rank 1 is the best, a higher score is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class StepLabel:
    """One step of a solution: `label` is +1 good, 0 neutral, -1 bad, or a probability; None is unlabelled."""

    text: str
    label: float | None = None


@dataclass(frozen=True, slots=True)
class SpanLabel:
    """Characters [start, end) of a response, what they were judged on, and the value given."""

    start: int
    end: int
    attribute: str
    value: float


@dataclass(frozen=True, slots=True)
class Response:
    """One response to the prompt, with whatever people or models said of it.

    `finished` is False for a response that was cut by a length limit: it must never be given an end-of-turn token.
    """

    text: str
    score: float | Mapping[str, float] | None = None
    rank: int | None = None
    label: bool | None = None
    steps: tuple[StepLabel, ...] = ()
    spans: tuple[SpanLabel, ...] = ()
    finished: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Response `first` against `second`: outcome 1 first is better, 0 second is better, 0.5 tie, or a probability between.

    `strength` is the margin label where people gave one (for instance "significantly better" as a number).
    """

    first: int
    second: int
    outcome: float = 1.0
    strength: float | None = None
    annotator: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its responses.

    `prompt` is a list of turns, or a plain string that is used as it stands, without a chat template.
    `where` is the file:line (or file:row) the record came from, for messages to the user.
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[Response, ...]
    id: str = ""
    comparisons: tuple[Comparison, ...] = ()
    annotator: str | None = None
    source: str | None = None
    reference_answer: str | None = None
    where: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
