"""Methods that train a policy on a whole ranking of responses."""

from __future__ import annotations

from preftune.methods.base import Method

ROWS: tuple[Method, ...] = ()
