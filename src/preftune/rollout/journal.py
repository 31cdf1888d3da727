"""Samples on disk as they are drawn: one JSON line each, so that a killed run goes on without losing or doubling one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from preftune.errors import UserError

SYNC_EVERY = 2.0
"""Seconds between calls that put what was written on the disk itself."""


class Journal:
    """An append-only file of samples: a header line that says what they are samples of, then one line each.

    `done[id]` are the response numbers that are there for the prompt of that id.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.done: dict[str, set[int]] = {}
        self._synced = 0.0

    def __enter__(self) -> Self:
        """Open the file, drop a line that was torn off, and refuse samples drawn in another way."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.seek(0)
        whole = self._file.read()
        end = whole.rfind(b"\n") + 1
        self._file.truncate(end)
        lines = whole[:end].splitlines()
        if not lines:
            self._append(self.header)
            return self
        self._refuse_others(lines[0])
        for line in lines[1:]:
            one = json.loads(line)
            self.done.setdefault(one["prompt"], set()).add(one["number"])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def add(self, sample: dict[str, Any]) -> None:
        """Append one sample; it has at least `prompt` (the prompt's id) and `number`."""
        self._append(sample)
        self.done.setdefault(sample["prompt"], set()).add(sample["number"])

    def samples(self) -> Iterator[dict[str, Any]]:
        """All samples, in the order in which they were drawn."""
        self._file.flush()
        with self.path.open("rb") as lines:
            next(lines)
            yield from map(json.loads, lines)

    def _append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        now = time.monotonic()
        if now - self._synced > SYNC_EVERY:
            self._synced = now
            os.fsync(self._file.fileno())

    def _refuse_others(self, line: bytes) -> None:
        try:
            found = json.loads(line)
        except ValueError:
            raise UserError("this is no file of work under way", where=str(self.path), fix="Give another --output.") from None
        changed = [name for name in self.header.keys() | found.keys() if self.header.get(name) != found.get(name)]
        if changed:
            told = "; ".join(f"{name} was {found.get(name)!r} and is now {self.header.get(name)!r}" for name in sorted(changed))
            fix = f"Use the same settings, give another --output, or remove {self.path.name}."
            raise UserError(f"what is under way was made in another way: {told}", where=str(self.path), fix=fix)
