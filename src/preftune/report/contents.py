"""What a report shows, as data: the figures of the quickstart's `evaluation.json`. Written by the quickstart, read by the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from preftune.errors import UserError
from preftune.training.durable import explained

EVALUATION_FILE = "evaluation.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Metric(_Part):
    """One figure. `unit` is words ("nats", "tokens") or one of accuracy (a share of 1, chance one half), proportion, seconds, bytes.

    `source` is the file and the place in it that the figure comes from, relative to the report: `dpo/evaluation.json#/accuracy`.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    explain: str = ""
    source: str = ""


class Section(_Part):
    """Figures that belong together."""

    title: str
    text: str = ""
    metrics: tuple[Metric, ...] = ()


class Turn(_Part):
    """One turn of a prompt."""

    role: str
    content: str


class Scores(_Part):
    """What the reward model gave the two responses."""

    before: float | None = None
    after: float | None = None


class Generation(_Part):
    """A held-out prompt with the response before and after training."""

    prompt: str | tuple[Turn, ...]
    before: str
    after: str
    reference_answer: str | None = None
    scores: Scores | None = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(role="user", content=self.prompt),) if isinstance(self.prompt, str) else self.prompt


class Records(_Part):
    """How many records a stage read: rows in = kept + dropped."""

    kept: int
    dropped: dict[str, int] = Field(default_factory=dict)


class Stage(_Part):
    """One step of the quickstart; `run` is its run directory beside the report, if it has one."""

    name: str
    what: str
    why: str = ""
    run: str | None = None
    seconds: float | None = None
    peak_memory: float | None = None
    records: Records | None = None


class Meta(_Part):
    """The whole quickstart in short. Keys beyond these are listed as they are."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str
    data: str = ""
    seconds: float | None = None
    peak_memory_bytes: float | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def others(self) -> dict[str, Any]:
        return self.model_extra or {}


class Quickstart(_Part):
    """All of `evaluation.json`. `headline`, when given, replaces the sentence the page makes of the accuracies."""

    sections: tuple[Section, ...]
    generations: tuple[Generation, ...] = ()
    stages: tuple[Stage, ...] = ()
    next: tuple[str, ...] = ()
    meta: Meta
    headline: str | None = None

    @property
    def accuracies(self) -> tuple[Metric, ...]:
        return tuple(metric for section in self.sections for metric in section.metrics if metric.unit == "accuracy")


def read_quickstart(root: Path) -> Quickstart:
    """`root/evaluation.json`. Raises UserError, naming the file and the key, when it is missing or not of this shape."""
    file = root / EVALUATION_FILE
    with explained("reading the evaluation", file):
        content = file.read_bytes()
    try:
        return Quickstart.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise UserError(f"not the evaluation of a quickstart ({why})", where=str(file), fix="Run `preftune quickstart` again.") from None
