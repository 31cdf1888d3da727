"""Progress with rate and time left: a bar in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
PLAIN_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Meter:
    """How far something has come; `at` says so, with a word on how it goes."""

    def __init__(self, console: Console, title: str, total: int, progress: Progress | None) -> None:
        self._console, self._title, self._total, self._progress = console, title, total, progress
        self._task = progress.add_task(title, total=total, note="") if progress else None
        self._start = self._last = time.monotonic()
        self._first: int | None = None

    def at(self, done: int, note: str = "") -> None:
        """`done` of the total are done."""
        if self._first is None:
            self._first = done - 1 if done else 0
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY or done == self._total:
            self._last = now
            rate = (now - self._start) / max(1, done - self._first)
            left = f", {_clock(rate * (self._total - done))} left" if done < self._total else f", took {_clock(now - self._start)}"
            self._console.print(f"{self._title}: {done}/{self._total}{left}{', ' + note if note else ''}", soft_wrap=True, markup=False)


@contextmanager
def meter(console: Console, title: str, total: int, done: int = 0) -> Iterator[Meter]:
    """A meter for `total` things of which `done` are done already."""
    if not console.is_terminal:
        yield Meter(console, title, total, None)
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        one = Meter(console, title, total, progress)
        if done:
            one.at(done)
        yield one


def tracked(items: Iterable[T], console: Console, title: str, total: int) -> Iterator[T]:
    """Yield the items with a meter over them."""
    with meter(console, title, total) as shown:
        for index, item in enumerate(items, start=1):
            yield item
            shown.at(index)


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes; on a GPU, of its allocations."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
