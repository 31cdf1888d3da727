"""Run a command, and end it with all its children when stdin closes: a server then never outlives whoever started it, killed or not.

Run as a file, as the leader of a process group of its own. Imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0
"""Seconds between asking to end and ending."""


def main(command: list[str]) -> int:
    """Exit code of the command."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # of the group's own ending; the command gets the default handler back
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_until_closed, daemon=True).start()
    return child.wait()


def _until_closed() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held while Python ends
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
