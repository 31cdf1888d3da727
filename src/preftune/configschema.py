"""What a config may hold, read from its pydantic model: every key with type, default and doc, and the nearest right key to a wrong one."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
_BARE = re.compile(r"[a-z][a-z0-9_./-]*")
_NOT_TEXT = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
_ESCAPED = re.compile("[\\x7f-\\x9f\\u2028\\u2029\\ufeff\\ufffe\\uffff]")
_CLOSE_ENOUGH = 0.65


@dataclass(frozen=True, slots=True)
class Row:
    """One key of a config: its dotted name, what it may be, its default as YAML ("" where it must be given), and its doc."""

    key: str
    holds: str
    default: str
    doc: str
    required: bool
    section: type[BaseModel] | None
    known_as: tuple[str, ...]


def keys(kind: type[BaseModel], prefix: str = "", given: BaseModel | None = None) -> Iterator[Row]:
    """Every key in order, a section before its own keys; `given` holds the values to show as defaults."""
    for name, field in kind.model_fields.items():
        required = field.is_required() and given is None
        value = None if required else getattr(given, name) if given is not None else field.get_default(call_default_factory=True)
        section = section_of(kind, name)
        shown = "" if required else "" if isinstance(value, BaseModel) else as_yaml(value)
        aliases = tuple(getattr(kind, "known_as", {}).get(name, "").split())
        yield Row(prefix + name, type_words(field.annotation), shown, field.description or "", required, section, aliases)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.", value if isinstance(value, BaseModel) else None)


def template(kind: type[BaseModel]) -> str:
    """Commented YAML with every key, its doc and its default; optional sections stand there commented out."""
    lines: list[str] = []
    off: tuple[str, ...] = ()  # dotted prefixes of the sections that are null by default
    for row in keys(kind):
        depth = row.key.count(".")
        mark = "# " if row.key.startswith(off) and off else ""
        pad = mark + "  " * depth
        name = row.key.rpartition(".")[2]
        lines += ([""] if depth == 0 and lines else []) + [f"{pad}# {row.doc} ({row.holds})"]
        if row.section is None or (row.default and not mark):
            lines.append(f"{pad}{name}: {row.default}".rstrip() + ("  # required" if row.required else ""))
        if row.section is not None and row.default == "null" and not mark:
            off = (*off, row.key + ".")
            lines.append(f"# {name}:")
        elif row.section is not None:
            lines.append(f"{pad}{name}:" + ("  # required" if row.required else ""))
    return "\n".join(lines) + "\n"


def section_of(kind: type[BaseModel], name: str | int) -> type[BaseModel] | None:
    """The model of a field that is a section (possibly optional), or None."""
    field = kind.model_fields.get(str(name))
    return None if field is None else _section(field.annotation)


def walk(kind: type[BaseModel], location: Sequence[str | int]) -> tuple[str | int, ...]:
    """A pydantic error location without the names of union members: only keys and list positions."""
    key: list[str | int] = []
    current: type[BaseModel] | None = kind
    for part in location:
        if current is None and isinstance(part, str):
            continue
        key.append(part)
        current = section_of(current, part) if current is not None else None
    return tuple(key)


def optional(kind: type[BaseModel], key: Sequence[str | int]) -> bool:
    """Whether null is allowed at a key."""
    field = _field(kind, key)
    return field is not None and type(None) in get_args(field.annotation)


def nearest_key(kind: type[BaseModel], key: Sequence[str | int]) -> str | None:
    """The dotted key that a wrong one most likely meant, in its own section or another, or None."""
    wrong, parent = str(key[-1]), ".".join(str(part) for part in key[:-1])
    best, best_score = None, _CLOSE_ENOUGH
    for row in keys(kind):
        section, _, leaf = row.key.rpartition(".")
        score = max(_similarity(wrong.rpartition(".")[2], word) for word in (leaf, *row.known_as))
        score += 0.05 * (section == parent) - 0.01 * row.key.count(".")
        if score > best_score:
            best, best_score = row.key, score
    return best


def closest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` most likely meant, or None."""
    scored = max(((_similarity(word, other), other) for other in words), default=(0.0, ""), key=lambda pair: pair[0])
    return scored[1] if scored[0] > _CLOSE_ENOUGH else None


def as_yaml(value: Any) -> str:
    """A value as one line of YAML: JSON with plain words left bare and everything that YAML would fold or refuse escaped."""
    if isinstance(value, str) and _BARE.fullmatch(value) and value not in _NOT_TEXT:
        return value
    return _ESCAPED.sub(lambda match: f"\\u{ord(match.group()):04x}", json.dumps(value, ensure_ascii=False))


def type_words(annotation: Any) -> str:
    """A type in a user's words: `int | None` is "whole number or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(type_words(argument) for argument in arguments)
    if origin in (tuple, list):
        inner = {type_words(argument) for argument in arguments if argument is not Ellipsis}
        return f"list of {inner.pop()}" if len(inner) == 1 else "list"
    if origin is dict:
        return f"mapping of {type_words(arguments[0])} to {type_words(arguments[1])}"
    if hasattr(annotation, "__metadata__"):
        return type_words(arguments[0])
    return "section" if _section(annotation) else _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _field(kind: type[BaseModel], key: Sequence[str | int]) -> FieldInfo | None:
    current: type[BaseModel] | None = kind
    field: FieldInfo | None = None
    for part in key:
        field = None if current is None else current.model_fields.get(str(part))
        current = None if current is None else section_of(current, part)
    return field


def _section(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for found in map(_section, get_args(annotation)) if found), None)
    return None


def _similarity(wrong: str, right: str) -> float:
    a, b = (word.lower().replace("-", "_") for word in (wrong, right))
    if a == b:
        return 1.0
    if sorted(a.replace("_", "")) == sorted(b.replace("_", "")):
        return 0.95
    ratio = SequenceMatcher(None, a, b, autojunk=False).ratio()
    shares_words = set(a.split("_")) < set(b.split("_")) or set(b.split("_")) < set(a.split("_"))
    starts = min(len(a), len(b)) >= 3 and (a.startswith(b) or b.startswith(a))
    return max(ratio, 0.8 * (shares_words or starts))
