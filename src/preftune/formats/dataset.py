"""Reading: any source, any format, one `Dataset`; every row is kept or dropped by a named reason."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from preftune.errors import UserError
from preftune.formats.fields import checked
from preftune.formats.files import Found, Source, sha256, sources
from preftune.formats.reasons import REASONS, RowError
from preftune.formats.table import Format, named, recognise
from preftune.records import Example, Message

_ROWS_TO_RECOGNISE = 20
_ROWS_TO_NAME = 5


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that was left out: its file:line, the reason (a key of REASONS) and what was seen there."""

    where: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """What was read. `rows` in = examples kept + rows dropped; `sha256` covers the raw bytes of all files in their order."""

    examples: tuple[Example, ...]
    format: str
    rows: int
    dropped: tuple[Dropped, ...]
    sha256: str

    def __post_init__(self) -> None:
        if self.rows != len(self.examples) + len(self.dropped):
            raise ValueError(f"{self.rows} rows in, but {len(self.examples)} kept and {len(self.dropped)} dropped")

    def dropped_by_reason(self) -> dict[str, int]:
        """How many rows were dropped for each reason, the most frequent first."""
        return dict(Counter(one.reason for one in self.dropped).most_common())


def read(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    on_error: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
) -> Dataset:
    """Read preference, demonstration or scored data into records.

    `source` is a file, a directory, several of them, a Hub data set ("owner/name", "owner/name:split") or "sample:hh_pairs".
    `format` names a row of `preftune.formats.FORMATS`, or is recognised for each file. At most `limit` rows are read.
    Raises UserError: always for a source that cannot be read; for bad rows when `on_error` is "stop", naming the first of them.
    With "skip" they are listed in `Dataset.dropped`, and it is an error only when no row is left.
    """
    return _read(source, format=format, on_error=on_error, limit=limit, prompts=False)


def read_prompts(
    source: str | Path | Sequence[str | Path],
    *,
    format: str = "auto",
    on_error: Literal["stop", "skip"] = "stop",
    limit: int | None = None,
) -> Dataset:
    """Read prompts to be answered: rows without a response, or those of any other format, whose responses are left out.

    A record's `reference_answer` stays; where there is none, the response of a row that has just one, not called undesirable, takes its
    place. The same prompt is there once. Sources, errors and `limit` as in `read`.
    """
    found = _read(source, format=format, on_error=on_error, limit=limit, prompts=True)
    unique: dict[str, Example] = {}
    for example in found.examples:
        answer = example.reference_answer
        if answer is None and len(example.responses) == 1 and example.responses[0].label is not False:
            answer = example.responses[0].text
        bare = replace(example, responses=(), comparisons=(), annotator=None, reference_answer=answer)
        unique.setdefault(digest(canonical(example.prompt)), replace(bare, id=record_id(bare)))
    return replace(found, examples=tuple(unique.values()), rows=len(unique) + len(found.dropped))


def _read(
    source: str | Path | Sequence[str | Path], *, format: str, on_error: Literal["stop", "skip"], limit: int | None, prompts: bool
) -> Dataset:
    if on_error not in ("stop", "skip"):
        raise UserError(f"on_error is {on_error!r}", fix="Use stop or skip")
    chosen = None if format == "auto" else named(format, prompts=prompts)
    examples: list[Example] = []
    dropped: list[Dropped] = []
    formats: list[str] = []
    found = sources(source)
    for one in found:
        left = None if limit is None else limit - len(examples) - len(dropped)
        if left == 0:
            break
        form, rows = _recognised(one, chosen, left, prompts)
        if form is None:
            continue
        formats.append(form.name)
        for at, row in rows:
            outcome = parse(row, form, at, responses=not prompts)
            (examples if isinstance(outcome, Example) else dropped).append(outcome)  # type: ignore[arg-type]
    name = ", ".join(dict.fromkeys(formats))
    place = ", ".join(one.name for one in found[:3])
    result = Dataset(tuple(examples), name, len(examples) + len(dropped), tuple(dropped), sha256(found))
    if result.rows == 0:
        raise UserError("there are no rows", where=place, fix="Check the file")
    if dropped and (on_error == "stop" or not examples):
        raise _bad_rows(result, place)
    return result


def parse(row: Any, form: Format, where: str, *, responses: bool = True) -> Example | Dropped:
    """One row as a record with its id and place, or the reason why it cannot be one; without `responses` its prompt is enough."""
    try:
        if isinstance(row, RowError):
            raise row
        example = checked(form.parse(row), responses=responses)
    except RowError as error:
        return Dropped(where, error.reason, error.detail)
    return replace(example, id=example.id or record_id(example), where=where)


def record_id(example: Example) -> str:
    """16 hexadecimal digits that depend on the prompt and the responses, in their order, alone."""
    return digest([canonical(example.prompt), [response.text for response in example.responses]])


def canonical(prompt: str | Sequence[Message]) -> Any:
    """A prompt as JSON data."""
    return prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]


def digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the value's canonical JSON."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _recognised(source: Source, chosen: Format | None, limit: int | None, prompts: bool) -> tuple[Format | None, Iterator[Found]]:
    rows = islice(source.rows(), limit)
    first = list(islice(rows, _ROWS_TO_RECOGNISE))
    if not first:
        return None, iter(())
    sound = [one.row for one in first if not isinstance(one.row, RowError)]
    if not sound and chosen is None:
        fault = first[0].row
        raise UserError(f"none of the first rows can be read: {fault}", where=first[0].where, fix=_fix(fault.reason))
    form = chosen or recognise(sound, source.name, prompts=prompts)
    return form, chain(first, rows)


def _fix(reason: str) -> str:
    fix = REASONS[reason].fix
    return fix[0].upper() + fix[1:]


def _bad_rows(result: Dataset, place: str) -> UserError:
    """One line: how many rows, by reason; the first of them by file:line; what to do."""
    counts = result.dropped_by_reason()
    first = result.dropped[:_ROWS_TO_NAME]
    named_rows = "; ".join(f"{one.where} {one.reason}{f' ({one.detail})' if one.detail else ''}" for one in first)
    more = f"; and {len(result.dropped) - len(first)} more" if len(result.dropped) > len(first) else ""
    by_reason = ", ".join(f"{count} {reason} ({REASONS[reason].meaning})" for reason, count in counts.items())
    fix = f"To mend: {'; '.join(REASONS[reason].fix for reason in counts)}"
    skip = ", or set data.on_error=skip to leave them out" if result.examples else ""
    return UserError(
        f"{len(result.dropped)} of {result.rows} rows read as {result.format} cannot be used: {by_reason}: {named_rows}{more}",
        where=place,
        fix=fix + skip,
    )
