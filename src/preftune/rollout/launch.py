"""Run a command, and end it with all its children when stdin closes: a server then never outlives whoever started it, killed or not.

Run as a file, as the leader of a process group of its own, with a folder and the command; the folder is removed when nobody is left to
remove it. Imports nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time

GRACE = 10.0
"""Seconds between asking to end and ending."""


def main(folder: str, command: list[str]) -> int:
    """Exit code of the command."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: None)  # of the group's own ending; the command gets the default handler back
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_until_closed, args=(folder, parent), daemon=True).start()
    code = child.wait()
    _clear(folder, parent)
    return code


def _until_closed(folder: str, parent: int) -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held while Python ends
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    _clear(folder, parent)
    os.killpg(0, signal.SIGKILL)


def _clear(folder: str, parent: int) -> None:
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
