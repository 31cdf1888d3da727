"""What a report shows of online reinforcement learning beside its curves: the alarm in words, and responses of its rollouts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from preftune.errors import UserError
from preftune.report.contents import Turn
from preftune.report.curves import Row
from preftune.training.durable import explained

ALARM_FILE = "alarm.json"
ROLLOUTS, SHOWN = "rollouts", "shown.json"


class Shown(BaseModel):
    """A response of a rollout, and why it is shown."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    which: str
    prompt: str | tuple[Turn, ...]
    response: str
    score: float | None
    tokens: int
    finish: str

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (Turn(role="user", content=self.prompt),) if isinstance(self.prompt, str) else self.prompt


@dataclass(frozen=True, slots=True)
class Rollout:
    """The responses that a rollout left for people to read."""

    number: int
    file: str
    shown: tuple[Shown, ...]


def responses(run_dir: Path) -> list[Rollout]:
    """Those of the newest rollout that left some, then those of the first; none where it is no online run.

    Raises UserError naming a file that is not what a rollout leaves.
    """
    numbers = sorted(int(file.parent.name) for file in (run_dir / ROLLOUTS).glob(f"*/{SHOWN}") if file.parent.name.isdigit())
    return [_rollout(run_dir, number) for number in dict.fromkeys([*numbers[-1:], *numbers[:1]])]


def _rollout(run_dir: Path, number: int) -> Rollout:
    name = f"{ROLLOUTS}/{number}/{SHOWN}"
    with explained("reading the responses of a rollout", run_dir / name):
        content = (run_dir / name).read_bytes()
    try:
        return Rollout(number, name, TypeAdapter(tuple[Shown, ...]).validate_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise UserError(f"not the responses of a rollout ({why})", where=str(run_dir / name), fix="Remove the file.") from None


def alarm(run_dir: Path, rows: Sequence[Row]) -> str:
    """The alarm as a sentence; nothing where the log knows of none, as after a resume from before it."""
    if not any(row.get("alarm") for row in rows) or not (run_dir / ALARM_FILE).exists():
        return ""
    with explained("reading the alarm", run_dir / ALARM_FILE):
        found = json.loads((run_dir / ALARM_FILE).read_text())
    said = str(found["said"])
    return f"Alarm after rollout {found['rollout']} (step {found['step']}): {said}. Read the responses below before you trust the score."
