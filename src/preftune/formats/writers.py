"""Records to rows of other tools. What a target cannot carry is counted and named, never silently lost.

Every row is read back before it is written: a record whose prompt or responses would come back changed is left out by name, and
every other field that does not come back is counted.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preftune.errors import UserError
from preftune.formats import targets
from preftune.formats.dataset import Dropped, parse, record_id
from preftune.formats.order import strict_pairs
from preftune.formats.own import own_row
from preftune.formats.table import FORMATS, recognise
from preftune.records import Comparison, Example, Message, Response

_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_FIELDS = ("id", "comparisons", "annotator", "source", "reference_answer", "meta")
_RESPONSE_FIELDS = ("score", "rank", "label", "steps", "spans", "finished", "meta")
_BARE = Response("")


@dataclass(frozen=True, slots=True)
class Written:
    """`rows` rows from `examples` records; `left_out` records by why; `lost` fields by the number of rows that lack them now."""

    path: str
    format: str
    rows: int
    examples: int
    left_out: dict[str, int]
    lost: dict[str, int]


@dataclass(frozen=True, slots=True)
class Target:
    """A format to write: a row for a pair, a row for one response, or a row for a whole record, whichever it has.

    `plain` says whether it knows prompts that are plain strings; where it does not, they become one user turn, which is counted.
    """

    pair: Callable[[Example], dict[str, Any]] | None = None
    single: Callable[[Example], dict[str, Any]] | None = None
    record: Callable[[Example], dict[str, Any]] | None = None
    plain: bool = False


TARGETS = {
    "preftune": Target(record=own_row, plain=True),
    "trl": Target(pair=targets.trl_pair, single=targets.trl_single, plain=True),
    "trl-messages": Target(pair=targets.trl_pair, single=targets.trl_single),
    "paddlenlp": Target(pair=targets.paddlenlp_pair, single=targets.paddlenlp_single),
    "sharegpt": Target(pair=targets.sharegpt_pair, single=targets.sharegpt_single),
    "alpaca": Target(pair=targets.alpaca_pair, single=targets.alpaca_single),
    "hh": Target(pair=targets.hh_pair),
    "kwise": Target(record=targets.kwise_row),
}


def write(examples: Iterable[Example], path: str | Path, format: str = "preftune") -> Written:
    """Write records to `path` (.jsonl, .json, either with .gz) as rows of `format`, a key of TARGETS.

    A target of pairs takes every strict pair of a record (K ranked responses: K(K-1)/2 rows); when no record has one, the target's
    rows of single responses are written, with labels where the responses have them. The file appears whole or not at all.
    Raises UserError for an unknown target or ending, when nothing can be written, and when the disk refuses.
    """
    if format not in TARGETS:
        raise UserError(f"unknown target {format!r}", fix=f"Known: {', '.join(TARGETS)}")
    out = writable(path)
    # an id that follows from the text need not be carried: every reader derives it again
    records = [replace(one, id="") if one.id == record_id(one) else one for one in examples]
    job = _Job(format, TARGETS[format], records)
    rows = [row for record in records for row in job.rows(record)]
    if not rows:
        why = "; ".join(f"{count} {reason}" for reason, count in job.left_out.items()) or "there are no records"
        raise UserError(f"nothing can be written as {format}: {why}", where=str(path), fix="Choose another format")
    _save(rows if format == "preftune" else _same_columns(rows), out)
    return Written(str(path), format, len(rows), job.examples, dict(job.left_out), dict(+job.lost))


def writable(path: str | Path) -> Path:
    """The path, if `write` knows its ending. Raises UserError."""
    out = Path(path)
    if not out.name.lower().endswith(_ENDINGS):
        raise UserError("unknown kind of file", where=str(path), fix=f"Known endings: {', '.join(_ENDINGS)}")
    return out


_Make = Callable[[Example], dict[str, Any]]


class _Job:
    """One file in the making: which kind of row it has, and what was left out or lost on the way."""

    def __init__(self, format: str, target: Target, records: Sequence[Example]) -> None:
        self.format, self.target = format, target
        self.left_out: Counter[str] = Counter()
        self.lost: Counter[str] = Counter()
        self.examples = 0
        self.conversations = any(not isinstance(record.prompt, str) for record in records)
        self.pairs = target.pair is not None and any(strict_pairs(record) for record in records)
        self.labelled = any(response.label is not None for record in records for response in record.responses)

    def rows(self, record: Example) -> list[dict[str, Any]]:
        """The rows of one record; none when the target has no place for it."""
        found = [row for part, make in self._parts(record) if (row := self._row(part, make)) is not None]
        self.examples += bool(found)
        return found

    def _parts(self, record: Example) -> list[tuple[Example, _Make]]:
        target = self.target
        if target.record:
            return [(record, target.record)]
        make = target.pair if self.pairs else target.single
        parts = _pairs(record) if self.pairs else _singles(record, self.labelled)
        if not parts or make is None:
            self.left_out["without a strict pair" if self.pairs or make is None else "without one response or labels"] += 1
            return []
        if self.pairs:
            self.lost["tied or unjudged pair"] += len(record.responses) * (len(record.responses) - 1) // 2 - len(parts)
        if isinstance(record.prompt, str) and not target.plain:
            self.lost["plain prompt (now a user turn)"] += len(parts)
            parts = [replace(part, prompt=(Message("user", record.prompt),)) for part in parts]
        elif isinstance(record.prompt, str) and self.conversations:
            self.left_out[f"with a plain prompt among conversations ({self.format}-messages makes it a user turn)"] += 1
            return []
        return [(part, make) for part in parts]

    def _row(self, part: Example, make: _Make) -> dict[str, Any] | None:
        """The row, if it reads back as the same prompt and responses."""
        try:
            row = make(part)
            json.dumps(row, allow_nan=False)
        except targets.Inexpressible as error:
            self.left_out[str(error)] += 1
            return None
        except (TypeError, ValueError) as error:
            raise UserError(f"the record holds what JSON cannot: {error}", where=part.where, fix="Remove it") from None
        form = FORMATS["preftune"] if self.format == "preftune" else recognise([row], "a written row")
        back = parse(row, form, part.where)
        if isinstance(back, Dropped):
            self.left_out[f"which no reader would take back ({back.reason})"] += 1
            return None
        if back.prompt != part.prompt or [one.text for one in back.responses] != [one.text for one in part.responses]:
            self.left_out["whose text would come back changed"] += 1
            return None
        self.lost.update(_differences(part, back))
        return row


def _pairs(record: Example) -> list[Example]:
    parts = []
    for better, worse in strict_pairs(record):
        judged = [one for one in record.comparisons if {one.first, one.second} == {better, worse}]
        flat = [replace(one, first=0, second=1, outcome=one.outcome if one.first == better else 1 - one.outcome) for one in judged]
        responses = replace(record.responses[better], rank=1), replace(record.responses[worse], rank=2)
        # that the first is better is what a pair says; only more than that needs a comparison
        parts.append(replace(record, responses=responses, comparisons=tuple(one for one in flat if one != Comparison(0, 1))))
    return parts


def _singles(record: Example, labelled: bool) -> list[Example]:
    if labelled:
        return [replace(record, responses=(response,)) for response in record.responses if response.label is not None]
    return [record] if len(record.responses) == 1 else []


def _differences(part: Example, back: Example) -> set[str]:
    """The names of the fields that hold something and do not come back."""
    lost = {name for name in _FIELDS if (value := getattr(part, name)) and getattr(back, name) != value}
    for before, after in zip(part.responses, back.responses):
        lost |= {name for name in _RESPONSE_FIELDS if getattr(before, name) not in (getattr(_BARE, name), getattr(after, name))}
    return lost


def _same_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with every column, null where it has none: column-wise readers such as `datasets` want one schema."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in columns} for row in rows]


def _save(rows: Sequence[dict[str, Any]], out: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows]
    array = out.name.lower().removesuffix(".gz").endswith(".json")
    text = "[\n" + ",\n".join(lines) + "\n]\n" if array else "\n".join(lines) + "\n"
    data = text.encode("utf-8")
    if out.name.lower().endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, out)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(out), fix="Check the place and its space") from error
