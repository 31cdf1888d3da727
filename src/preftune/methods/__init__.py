"""The table of methods.

To add a method, write its objective as a pure function and one row in the file of its kind; the loop never learns its name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from preftune.configschema import closest
from preftune.errors import UserError
from preftune.methods import preference, ranking, reward, supervised, unpaired
from preftune.methods.base import KEEP_REASONS, Knobs, Method, Outputs

__all__ = ["KEEP_REASONS", "METHODS", "Knobs", "Method", "Outputs", "find"]

_KINDS = (supervised, reward, preference, unpaired, ranking)

METHODS: dict[str, Method] = {row.name: row for kind in _KINDS for row in kind.ROWS}


def find(name: str, others: Iterable[Any] = ()) -> Method:
    """The row of this name. Raises UserError for an unknown one, with the row that others call so, or else the nearest.

    `others` are rows of another table that may be meant.
    """
    if name in METHODS:
        return METHODS[name]
    rows = {row.name: row for row in (*METHODS.values(), *others)}
    word = name.lower().replace("-", "_")
    known = [f"{row.name} ({row.title})" for row in rows.values() if word == row.name or word in row.also_known_as]
    near = " or ".join(known) or closest(name, rows)
    raise UserError(f"there is no method '{name}'", fix=f"Did you mean {near}?" if near else f"The methods are {', '.join(rows)}.")
