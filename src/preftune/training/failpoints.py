"""Named places where a test makes the process die or its disk fail: `PREFTUNE_FAILPOINT=name:action[:nth]`.

`action` is a signal sent to the process itself (`kill`, `term`, `int`) or `raise-` and an errno name (`raise-enospc`, `raise-eio`);
`nth` counts from 1. Without the variable a failpoint costs one look into the environment.
"""

import errno
import os
import signal
from collections import Counter

VARIABLE = "PREFTUNE_FAILPOINT"

_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Do nothing, unless the environment says that this very place fails now."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    target, action, nth = [*wanted.split(":"), "1"][:3]
    if target != name:
        return
    _passed[wanted] += 1
    if _passed[wanted] != int(nth):
        return
    if action.startswith("raise-"):
        number = getattr(errno, action.removeprefix("raise-").upper())
        raise OSError(number, os.strerror(number), name)
    os.kill(os.getpid(), signal.Signals[f"SIG{action.upper()}"])
