"""Methods that train a policy on single responses marked good or bad."""

from __future__ import annotations

from preftune.methods.base import Method

ROWS: tuple[Method, ...] = ()
