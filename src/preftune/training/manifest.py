"""`run.json`: what a run trains, on what, with which versions, and what became of it. No torch."""

import hashlib
import json
import os
import platform
import re
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from preftune.errors import UserError
from preftune.training.durable import explained

RUN_FILE = "run.json"

Status = Literal["running", "finished", "interrupted", "stopped", "failed"]

_SECRET_NAME = re.compile(
    r"((hf|hub|auth|access|api|bearer|wandb|secret)_?)?token|secret|password|passwd|(\w+_)?(api|access|private|secret)_?key"
)
_SECRET_VALUE = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[\w-]{8,}|(?<=://)[^/@\s]+(?=@)")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Session(_Frozen):
    """One process that worked on a run: when, how it ended, and all that could make its numbers differ from another's."""

    started: str
    ended: str | None = None
    status: Status = "running"
    command: tuple[str, ...] = ()
    versions: dict[str, str]
    platform: str
    host: str
    pid: int
    threads: int

    @classmethod
    def begin(cls, command: Sequence[str], threads: int) -> Self:
        """This process, now. `command` is kept without its secrets, `threads` is torch's."""
        return cls(
            started=_now(),
            command=tuple(redact(command)),
            versions={"python": platform.python_version(), **{name: _version(name) for name in ("preftune", "torch", "transformers")}},
            platform=platform.platform(),
            host=socket.gethostname(),
            pid=os.getpid(),
            threads=threads,
        )


class RunManifest(_Frozen):
    """`run.json`: what was trained on what. `data` maps a file to its SHA-256; `sessions` are the processes, oldest first."""

    format: Literal[1] = 1
    method: str
    config: dict[str, Any]
    config_hash: str
    data: dict[str, str]
    model_hash: str | None = None
    parents: tuple[str, ...] = ()
    status: Status = "running"
    sessions: tuple[Session, ...]

    @classmethod
    def begin(
        cls,
        method: str,
        config: Mapping[str, Any],
        *,
        data: Mapping[str, str],
        session: Session,
        model_hash: str | None = None,
        parents: Sequence[str] = (),
    ) -> Self:
        """The manifest of a run that starts now; `config` is the resolved one (what JSON cannot hold becomes a string)."""
        plain = json.loads(json.dumps(config, default=str), parse_constant=str)
        return cls(
            method=method,
            config=plain,
            config_hash=config_hash(plain),
            data=dict(data),
            model_hash=model_hash,
            parents=tuple(parents),
            sessions=(session,),
        )

    def resumed(self, current: "RunManifest") -> "RunManifest":
        """`current`, with the sessions of this earlier manifest before its own."""
        return current.model_copy(update={"sessions": (*self.sessions, *current.sessions)})

    def ended(self, status: Status) -> "RunManifest":
        """This manifest with its last session ended now."""
        last = self.sessions[-1].model_copy(update={"status": status, "ended": _now()})
        return self.model_copy(update={"status": status, "sessions": (*self.sessions[:-1], last)})


def read_manifest(path: Path) -> RunManifest | None:
    """The `run.json` of the run directory `path`, None when there is none. Raises UserError when it is not ours."""
    file = path / RUN_FILE
    with explained("reading the run's manifest", file):
        if not file.exists():
            return None
        content = file.read_bytes()
    try:
        return RunManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        why = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise UserError(f"not a run manifest of this version ({why})", where=str(file), fix="Choose another output.") from None


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def redact(command: Sequence[str]) -> list[str]:
    """A command line with the values of secret-looking options, well-known key formats and passwords in URLs blotted out."""
    shown: list[str] = []
    hide_next = False
    for word in command:
        name, equals, _ = word.partition("=")
        secret = _SECRET_NAME.fullmatch(name.lstrip("-").rpartition(".")[2].replace("-", "_").lower()) is not None
        if hide_next:
            shown.append("***")
        elif secret and equals:
            shown.append(f"{name}=***")
        else:
            shown.append(_SECRET_VALUE.sub("***", word))
        hide_next = secret and not equals and word.startswith("-")
    return shown


def changes(previous: RunManifest, current: RunManifest, may_change: Collection[str]) -> Iterator[str]:
    """What a resumed run may not change, as `config lr: 0.1 -> 0.2`; `may_change` are dotted keys or whole sections."""
    if previous.method != current.method:
        yield f"method: {previous.method} -> {current.method}"
    before, now = (
        {key: value for key, value in _flat(one.config) if not any(key == free or key.startswith(f"{free}.") for free in may_change)}
        for one in (previous, current)
    )
    for key in sorted(before.keys() | now.keys()):
        if before.get(key, _ABSENT) != now.get(key, _ABSENT):
            yield f"config {key}: {_shown(before.get(key, _ABSENT))} -> {_shown(now.get(key, _ABSENT))}"
    for file in sorted(previous.data.keys() | current.data.keys()):
        if previous.data.get(file) != current.data.get(file):
            yield f"data {file}: {_short(previous.data.get(file))} -> {_short(current.data.get(file))}"
    if previous.model_hash != current.model_hash:
        yield f"model weights: {_short(previous.model_hash)} -> {_short(current.model_hash)}"


_ABSENT = object()


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _shown(value: object) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)


def _short(digest: str | None) -> str:
    return f"sha256 {digest[:12]}" if digest else "(absent)"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
