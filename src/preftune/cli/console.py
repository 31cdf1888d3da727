"""Where the commands write: results to stdout, progress and errors to stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def progress_console() -> Console:
    """The console of progress and notices: stderr, so that stdout can be piped."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a result, as it stands, to stdout."""
    sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()  # a reader that has left (`| head`) is noticed here and not at exit


def complain(message: str) -> None:
    """Print one red line `preftune: message` to stderr, never folded."""
    from rich.console import Console

    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"preftune: {line}", style="red", markup=False)
