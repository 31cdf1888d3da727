"""Preftune's own format: one JSON object a line that carries every field of the record; the others are ways in and out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from preftune.formats.fields import Row
from preftune.formats.reasons import RowError
from preftune.formats.turns import is_transcript
from preftune.records import Comparison, Example, Message, Response, SpanLabel, StepLabel

_NESTED: dict[str, type] = {"responses": Response, "comparisons": Comparison, "steps": StepLabel, "spans": SpanLabel, "prompt": Message}


def own(row: Row) -> Example:
    """Read a record as `own_row` writes it. Raises RowError on unknown fields, wrong types and broken references."""
    _refuse_unknown(row, Example)
    try:
        found = _adapter().validate_python(dict(row))
    except ValidationError as error:
        deepest = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union, the branch that came nearest
        place = ".".join(str(step) for step in deepest["loc"])
        raise RowError("missing_field" if deepest["type"] == "missing" else "wrong_type", f"{place}: {deepest['msg']}") from None
    _check_references(found)
    return found


def own_row(example: Example) -> dict[str, Any]:
    """The record as plain JSON data; fields at their default are left out. `where` belongs to one reading and is not written."""
    row = _plain(example)
    row.pop("where", None)
    return row


@cache
def _adapter() -> TypeAdapter[Example]:
    return TypeAdapter(Example)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        named = [(field, getattr(value, field.name)) for field in fields(value)]
        return {field.name: _plain(item) for field, item in named if not _is_default(field, item)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _is_default(field: Any, item: Any) -> bool:
    if field.default_factory is not MISSING:
        return item == field.default_factory()
    return field.default is not MISSING and item == field.default and type(item) is type(field.default)


def _refuse_unknown(row: Any, kind: type) -> None:
    if not isinstance(row, Mapping):
        return
    names = {field.name for field in fields(kind)}
    for name, value in row.items():
        if name not in names:
            raise RowError("unknown_field", f"{name} in a {kind.__name__.lower()}; known are {', '.join(sorted(names))}")
        for item in value if name in _NESTED and isinstance(value, (list, tuple)) else ():
            _refuse_unknown(item, _NESTED[name])


def _check_references(found: Example) -> None:
    if isinstance(found.prompt, str) and is_transcript(found.prompt):
        raise RowError("wrong_type", "a prompt with role markers must be a list of turns in a Preftune record")
    for response in found.responses:
        _check_response(response)
    for one in found.comparisons:
        if not (0 <= one.first < len(found.responses) and 0 <= one.second < len(found.responses) and one.first != one.second):
            raise RowError("bad_comparison", f"of {one.first} and {one.second} among {len(found.responses)} responses")
        if not 0 <= one.outcome <= 1:
            raise RowError("bad_comparison", f"outcome {one.outcome}")


def _check_response(response: Response) -> None:
    scores = response.score.values() if isinstance(response.score, Mapping) else [response.score]
    for value in scores:
        if value is not None and not math.isfinite(value):
            raise RowError("bad_score", repr(value))
    if response.rank is not None and response.rank < 1:
        raise RowError("bad_rank", str(response.rank))
    for span in response.spans:
        if not 0 <= span.start <= span.end <= len(response.text):
            raise RowError("bad_span", f"[{span.start}, {span.end}) in {len(response.text)} characters")
