"""Single fields of a row: scores, labels, and the building of a checked Example from what a format found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from preftune.formats.reasons import RowError
from preftune.formats.turns import Prompt
from preftune.records import Comparison, Example, Response

Row = Mapping[str, Any]

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def need(row: Row, *names: str) -> list[Any]:
    """The values of these fields; RowError when one is not there at all (null is there)."""
    missing = [name for name in names if name not in row]
    if missing:
        raise RowError("missing_field", ", ".join(missing))
    return [row[name] for name in names]


def need_list(value: Any, field: str) -> list[Any]:
    """A field that must be a list."""
    if not isinstance(value, list):
        raise RowError("wrong_type", f"{field} is a {type(value).__name__}, not a list")
    return value


def score(value: Any) -> float | None:
    """A number, a number as text, or None for null and "N/A" (not annotated)."""
    if value is None or (isinstance(value, str) and value.strip().upper() in ("N/A", "NA", "")):
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RowError("bad_score", repr(value)) from None
    if not math.isfinite(number):
        raise RowError("bad_score", repr(value))
    return number


def label(value: Any) -> bool:
    """True or false, also written 1 and 0, or as text."""
    try:
        return _LABELS[str(value).strip().lower()]
    except KeyError:
        raise RowError("bad_label", repr(value)) from None


def example(row: Row, prompt: Prompt, responses: Sequence[Response], used: Sequence[str], **fields: Any) -> Example:
    """An Example with whatever the format did not use in `meta`; `source` and `annotator` have fields of their own."""
    meta = {name: value for name, value in row.items() if name not in used and value is not None} | dict(fields.pop("meta", {}))
    for name in ("source", "annotator"):
        if isinstance(meta.get(name), str):
            fields.setdefault(name, meta.pop(name))
    return Example(prompt=prompt, responses=tuple(responses), meta=meta, **fields)


def pair(row: Row, prompt: Prompt, chosen: str, rejected: str, used: Sequence[str], *, meta: Mapping[str, Any] | None = None) -> Example:
    """A pair as (chosen, rejected) with ranks 1 and 2; `score_chosen`/`score_rejected` and TRL's `margin` are kept."""
    if chosen == rejected and chosen.strip():
        raise RowError("identical_responses")
    responses = (
        Response(chosen, score=score(row.get("score_chosen")), rank=1),
        Response(rejected, score=score(row.get("score_rejected")), rank=2),
    )
    strength = score(row.get("margin"))
    comparisons = () if strength is None else (Comparison(0, 1, 1.0, strength=strength),)
    names = (*used, "score_chosen", "score_rejected", "margin")
    return example(row, prompt, responses, names, comparisons=comparisons, meta=meta or {})


def checked(found: Example, *, responses: bool = True) -> Example:
    """The rules that hold for every record, whatever its format; of its prompt alone without `responses`. Raises RowError."""
    prompt = found.prompt
    blank = not prompt.strip() if isinstance(prompt, str) else not any(turn.content.strip() for turn in prompt)
    if blank:
        raise RowError("empty_prompt")
    if not responses:
        return found
    if not found.responses:
        raise RowError("no_response")
    for index, response in enumerate(found.responses):
        if not response.text.strip() and "finish" not in response.meta:  # a model may end its turn at once: that is a response
            raise RowError("empty_response", f"response {index + 1} of {len(found.responses)}")
    return found
