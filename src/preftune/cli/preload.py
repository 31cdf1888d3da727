"""A caching allocator under the heavy commands: on Linux CPUs the command replaces itself once with mimalloc preloaded.

glibc gives every large block back to the system, and the page faults cost a third of a training step. An allocator must be there before
Python starts, hence the exec. `PREFTUNE_ALLOCATOR=system` switches this off; the exec sets it to `mimalloc`, which also ends the loop.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

SWITCH = "PREFTUNE_ALLOCATOR"
HEAVY = frozenset({"train", "quickstart", "check", "chat", "evaluate", "sample", "score"})


def preload_allocator() -> None:
    """Replace this process by itself with mimalloc preloaded, where that helps; else return."""
    library = allocator() if wanted(sys.argv[1:], os.environ) else None
    if library is not None:
        # The original words of the interpreter: its flags, `-m preftune` or the script, and the arguments, each as it was given.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment(os.environ, library))


def wanted(words: list[str], env: Mapping[str, str]) -> bool:
    """Whether the command `words` in the environment `env` gains from the allocator and may still be replaced."""
    command = next((word for word in words if not word.startswith("-")), "")
    return (
        sys.platform == "linux"
        and command in HEAVY
        and not {"--help", "-h"} & set(words)
        and SWITCH not in env
        and not re.search("malloc|asan", env.get("LD_PRELOAD", ""))
        and "torch" not in sys.modules
        and "-" not in sys.orig_argv  # a program read from stdin cannot be read twice
        and not cuda(env)
    )


def environment(env: Mapping[str, str], library: Path) -> dict[str, str]:
    """`env` with the allocator preloaded before whatever else is, keeping memory and using large pages unless told otherwise."""
    settings = {"MIMALLOC_PURGE_DELAY": "-1", "MIMALLOC_ALLOW_LARGE_OS_PAGES": "1"}
    preloaded = ":".join(filter(None, (str(library), env.get("LD_PRELOAD"))))
    return {**settings, **env, "LD_PRELOAD": preloaded, SWITCH: "mimalloc"}


def allocator() -> Path | None:
    """The shared library of the `cmeel-mimalloc` wheel, or None where it is not installed."""
    from importlib import metadata

    try:
        files = metadata.files("cmeel-mimalloc") or []
    except metadata.PackageNotFoundError:
        return None
    found = sorted(Path(file.locate()) for file in files if re.fullmatch(r"libmimalloc\.so[.\d]*", file.name))
    # LD_PRELOAD is split at colons and spaces, so a path with one cannot be named in it.
    return next((path for path in found if path.is_file() and not re.search(r"[:\s]", str(path))), None)


def cuda(env: Mapping[str, str]) -> bool:
    """Whether an NVIDIA or AMD device is there and not hidden: asked of the system, because torch must not be imported yet."""
    hidden = any(env.get(name) in ("", "-1") for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
    return not hidden and any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
