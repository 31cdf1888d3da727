"""`metrics.jsonl`: one line a row, the truth about a run; only its last line can ever be torn. No torch."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from preftune.errors import UserError
from preftune.training.durable import explained, replace_file
from preftune.training.failpoints import failpoint

METRICS_FILE = "metrics.jsonl"

Kind = Literal["train", "eval"]


class MetricsLog:
    """The metrics of a run that this process owns.

    Order at a checkpoint: append every row of the step (evaluation included), `sync()`, then save the checkpoint. On resuming from
    step k, `truncate(k)`: then no row is missing and none is there twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, step: int, kind: Kind, values: Mapping[str, Any]) -> None:
        """Add one row and hand it to the operating system: it survives the death of this process.

        A NaN or infinity is written as null, and the row's `nonfinite` maps its key to "nan", "inf" or "-inf".
        """
        row = {"step": step, "kind": kind, **values}
        nonfinite = {key: str(float(value)) for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
        if nonfinite:
            row |= {**dict.fromkeys(nonfinite), "nonfinite": nonfinite}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with explained("writing the metrics", self.path):
            file = self._open()
            start = file.seek(0, os.SEEK_END)
            try:
                _write_all(file, line)
            except OSError:
                file.truncate(start)
                raise

    def sync(self) -> None:
        """Force all rows to the disk."""
        with explained("writing the metrics", self.path):
            os.fsync(self._open().fileno())

    def truncate(self, step: int, *, evaluated: bool = True) -> None:
        """Keep only the rows up to `step`, atomically and byte for byte; -1 keeps none, for a run that has no checkpoint yet.

        Without `evaluated` the evaluation after `step` is still to come, so its rows go too.
        """
        self.close()
        if not self.path.exists():
            return
        with explained("writing the metrics", self.path):
            last = {"train": step, "eval": step if evaluated else step - 1}
            replace_file(self.path, b"".join(line for line, row in _rows(self.path) if row["step"] <= last[row["kind"]]))

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file:
            self._file.close()
            self._file = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  (kept open from step to step)
            self._file.seek(0)
            self._file.truncate(self._file.read().rfind(b"\n") + 1)  # a line that a crash tore must not run into the next one
        return self._file


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, each with at least `step` and `kind`. A torn last line (one without its newline) is left out.

    Raises UserError naming the line for any other line that is not a row.
    """
    with explained("reading the metrics", path):
        return [row for _, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    *lines, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            valid = isinstance(row["step"], int) and row["kind"] in ("train", "eval")
        except (ValueError, TypeError, KeyError):
            valid = False
        if not valid:
            raise UserError(
                "this line is not a row of metrics",
                where=f"{path}:{number}",
                fix="Restore the file, or remove the line if you can spare it.",
            )
        yield line + b"\n", row


def _write_all(file: BinaryIO, line: bytes) -> None:
    failpoint("metrics.before")
    rest = memoryview(line)
    while rest:
        written = file.write(rest)
        failpoint("metrics.written")
        rest = rest[written:]
