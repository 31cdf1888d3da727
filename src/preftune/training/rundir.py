"""A run directory and its one owner: `run.json`, `metrics.jsonl`, `checkpoints/`, `final/`. No torch."""

import fcntl
import os
import socket
import weakref
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

from preftune.errors import NonFiniteError, UserError
from preftune.training.durable import explained, replace_file
from preftune.training.manifest import RUN_FILE, RunManifest, Status, changes, read_manifest
from preftune.training.metrics import METRICS_FILE, MetricsLog

Decision = Literal["fresh", "resume", "finished"]
ResumeMode = Literal["auto", "never", "require"]

LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
FINAL = "final"


class RunDirectory:
    """`with RunDirectory(path) as run:` creates the directory and holds it for this process alone, until the process ends, however it ends.

    Raises UserError on entry when the directory cannot be written or another process holds it. A run that an exception ends is marked
    `interrupted` (KeyboardInterrupt), `stopped` (NonFiniteError) or `failed` in `run.json`, unless its end was written before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.final = path / FINAL
        self.metrics = MetricsLog(path / METRICS_FILE)
        self._lock: BinaryIO | None = None
        self._written: RunManifest | None = None

    def __enter__(self) -> Self:
        with explained("opening the output directory", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path / LOCK_FILE)
            try:
                replace_file(self.path / ".writable", b"")  # an old lock file may be writable where the directory no longer is
                (self.path / ".writable").unlink()
            except BaseException:
                self._lock.close()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None and self._written and self._written.status == "running":
                with suppress(UserError):  # the first error is the one to show
                    ends: dict[type[BaseException], Status] = {KeyboardInterrupt: "interrupted", NonFiniteError: "stopped"}
                    status: Status = next((end for kind, end in ends.items() if isinstance(error, kind)), "failed")
                    self.write_manifest(self._written.ended(status))
        finally:
            self.metrics.close()
            if self._lock:
                self._lock.close()

    def manifest(self) -> RunManifest | None:
        """`run.json`, or None when there is none."""
        return read_manifest(self.path)

    def write_manifest(self, manifest: RunManifest) -> None:
        """Replace `run.json` atomically."""
        path = self.path / RUN_FILE
        self._written = manifest  # before it is, so that a signal in the midst of writing still finds a run to mark
        with explained("writing the run's manifest", path):
            replace_file(path, manifest.model_dump_json(indent=2).encode() + b"\n")

    def decide_resume(self, current: RunManifest, mode: ResumeMode, *, may_change: Collection[str] = ()) -> Decision:
        """Whether `current` starts here, goes on with the run that is here, or is already done.

        `may_change` are the dotted config keys (or whole sections) to which a resumed run may give another value. Raises UserError when
        the directory holds a run and `mode` is "never", when it holds none and `mode` is "require", or when the config, the data or the
        model changed, naming each change. Nothing is ever deleted here.
        """
        here = [name for name in (RUN_FILE, METRICS_FILE, CHECKPOINTS, FINAL) if (self.path / name).exists()]
        if not here:
            if mode == "require":
                raise self._refusal("resume=require, but this directory holds no run", "Correct the output, or leave resume out.")
            return "fresh"
        move_away = f"Choose another output, or move this one away first: mv {self.path} {_free_name(self.path)}"
        if mode == "never":
            raise self._refusal("resume=never, but this directory holds a run", move_away)
        previous = self.manifest()
        if previous is None:
            raise self._refusal(f"it holds {', '.join(here)} but no {RUN_FILE}, so what was trained here is unknown", move_away)
        if changed := "; ".join(changes(previous, current, may_change)):
            raise self._refusal(
                f"it holds a run that began otherwise: {changed}", f"Undo these changes to go on with that run. {move_away}"
            )
        return "finished" if previous.status == "finished" else "resume"

    def _refusal(self, what: str, fix: str) -> UserError:
        return UserError(what, where=str(self.path), fix=fix)


_held: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _lock(path: Path) -> BinaryIO:
    file = open(path, "a+b", buffering=0)  # noqa: SIM115  (the lock lives as long as the file is open)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        if isinstance(error, BlockingIOError):
            what = f"this output is in use by {holder}"
            raise UserError(what, where=str(path.parent), fix="Wait for it to end, or choose another output.") from None
        raise
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(file)
    return file


def _close_in_child() -> None:
    """A forked worker that outlives its parent must not go on holding the parent's lock."""
    for file in list(_held):
        file.close()


os.register_at_fork(after_in_child=_close_in_child)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return candidate
