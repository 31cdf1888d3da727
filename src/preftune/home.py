"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home() -> Path:
    """`$PREFTUNE_CACHE`, else `preftune` in the user's cache folder. It may be removed at any time."""
    chosen = os.environ.get("PREFTUNE_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "preftune"
