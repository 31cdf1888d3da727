"""Run a command, and end it with all its children when stdin closes: a server then never outlives whoever started it, killed or not.

Run as a file, as the leader of a process group of its own, with a folder and the command. Who ends it in good order writes `KEEP` before
closing; a pipe that closes without a word has lost its owner, and the folder is removed for it. Imports nothing but the standard library.
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
KEEP = b"k"
"""What an owner that lives on says of the folder."""


def main(folder: str, command: list[str]) -> int:
    """Exit code of the command."""
    orphaned = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None)  # of the group's own ending; the command gets the default handler back
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_until_closed, args=(folder, orphaned), daemon=True).start()
    code = child.wait()
    if orphaned.is_set():
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _until_closed(folder: str, orphaned: threading.Event) -> None:
    kept = False
    while said := os.read(0, 1):  # not sys.stdin: its lock would be held while Python ends
        kept |= said == KEEP
    if not kept:
        orphaned.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
