"""Strict config files: YAML and `key=value` overrides become a frozen pydantic model, or one line that names the place and the right key.

A file holds JSON's types only (mappings, lists, text, numbers, true/false, null): no tags, no dates, no code. Types are strict: the text
"16" is not a number and 1.0 is not a whole number. An override changes only the keys it names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from preftune.configschema import as_yaml, closest, keys, nearest_key, optional, section_of, walk
from preftune.errors import UserError

Key = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    """Base of every section of a config: frozen, finite numbers, unknown keys refused.

    Where `shorthand` names a field, a section may be written as that field's value alone (`data: train.jsonl`).
    `known_as` holds the names that other tools give a key, in words apart by spaces, so that a newcomer's habit is answered with ours.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)
    shorthand: ClassVar[str | None] = None
    known_as: ClassVar[dict[str, str]] = {}


def problem(message: str, key: str) -> PydanticCustomError:
    """The error a validator raises when options contradict each other; `key` is the dotted key to point at."""
    return PydanticCustomError("config", "{message}", {"message": message, "key": key})


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a key and its value stand, in words and in reading order."""

    key: str
    value: str
    order: tuple[int, int, int]


class _Source:
    """One source of settings (a file, or one override) as plain data, and the place of every key in it."""

    def __init__(self, text: str, name: str, number: int, locate: Callable[[int, int], str]) -> None:
        self.name, self.number, self.locate = name, number, locate
        self.places: dict[Key, _Place] = {}
        yaml = YAML(typ="safe", pure=True)
        self._construct = yaml.constructor.construct_object
        try:
            node = yaml.compose(text)
            self.value: Any = None if node is None else self._plain(node, (), ())
        except MarkedYAMLError as error:
            where = self._at(error.problem_mark) if error.problem_mark else name
            raise UserError(f"not valid YAML: {error.problem or error.context}", where=where, fix=_yaml_hint(error.problem)) from None
        except YAMLError as error:
            raise UserError(f"not valid YAML: {str(error).splitlines()[0]}", where=name) from None
        except RecursionError:
            raise UserError("not a config: nested too deeply", where=name) from None

    def _at(self, mark: Any) -> str:
        return self.locate(mark.line + 1, mark.column + 1)

    def _plain(self, node: Node, key: Key, inside: tuple[Node, ...]) -> Any:
        if any(node is outer for outer in inside):
            raise UserError("an alias refers to the part that holds it", where=self._at(node.start_mark))
        if isinstance(node, MappingNode) and _tag(node) == "map":
            return self._mapping(node, key, (*inside, node))
        if isinstance(node, SequenceNode) and _tag(node) == "seq":
            return [self._item(item, (*key, i), (*inside, node)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: MappingNode, key: Key, inside: tuple[Node, ...]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in node.value:
            if not isinstance(name, ScalarNode):
                raise UserError("a key must be a word", where=self._at(name.start_mark))
            here = (*key, name.value)
            if name.value in result:
                raise UserError(f"`{_dotted(here)}` is given twice, first at {self.places[here].key}", where=self._at(name.start_mark))
            empty = isinstance(value, ScalarNode) and not value.value and value.style is None
            self._remember(here, name, name if empty else value)
            result[name.value] = self._plain(value, here, inside)
        return result

    def _item(self, node: Node, key: Key, inside: tuple[Node, ...]) -> Any:
        self._remember(key, node, node)
        return self._plain(node, key, inside)

    def _remember(self, key: Key, name: Node, value: Node) -> None:
        order = (self.number, name.start_mark.line, name.start_mark.column)
        self.places[key] = _Place(self._at(name.start_mark), self._at(value.start_mark), order)

    def _scalar(self, node: Node) -> Any:
        kind = _tag(node)
        if not isinstance(node, ScalarNode) or kind not in ("str", "timestamp", "value", "null", "bool", "int", "float"):
            raise UserError(f"the tag {node.tag} is not allowed in a config", where=self._at(node.start_mark), fix="Write the plain value.")
        if kind in ("str", "timestamp", "value"):
            return node.value
        try:
            return self._construct(node)
        except (ValueError, KeyError):
            raise UserError(f"{node.value[:40]!r} cannot be read as {kind}", where=self._at(node.start_mark)) from None

    def under(self, key: Key, place: _Place) -> None:
        """Move everything under `key`: what `a.b=value` means."""
        for name in reversed(key):
            self.value = {name: self.value}
        self.places = {(*key, *inner): place for inner in self.places}
        self.places |= {key[: i + 1]: place for i in range(len(key))}

    def expand(self, kind: type[BaseModel], key: Key = ()) -> None:
        """Write every section that is given in its short form out in full."""
        holder = self.value
        for name in key:
            holder = holder[name]
        for name, value in list(holder.items()) if isinstance(holder, dict) else []:
            section, here = section_of(kind, name), (*key, name)
            short = getattr(section, "shorthand", None)
            if section is not None and short and isinstance(value, str | list):
                holder[name] = {short: value}
                moved = {old: place for old, place in self.places.items() if old[: len(here)] == here}
                self.places |= {(*here, short, *old[len(here) :]): place for old, place in moved.items()}
            elif section is not None:
                self.expand(section, here)


def load(kind: type[Model], path: Path | None, overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None) -> Model:
    """The config `kind` from `base`, over it the YAML file `path`, over it the `key=value` words.

    Raises UserError for anything wrong, naming `file:line:column` or the override, what was expected, and the nearest right key.
    """
    values: dict[str, Any] = {}
    places: dict[Key, _Place] = {}
    for source in _sources(kind, path, overrides, base or {}):
        source.expand(kind)
        _merge(values, source.value, places, ())
        places |= source.places
    try:
        return kind.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise _explain(kind, error, values, places, str(path or "")) from None


def peek(path: Path, key: str) -> Any:
    """The value of one top-level key of a YAML file, or None: for a caller that needs it to know which config to load."""
    return _file(path).value.get(key)


def to_yaml(model: BaseModel) -> str:
    """The resolved config as YAML that `load` reads back to an equal model."""
    return "".join(f"{line}\n" for line in _lines(model.model_dump(mode="json"), ""))


def json_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of a config, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


def _lines(values: Mapping[str, Any], indent: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{name}: {as_yaml(value)}"


def _sources(kind: type[BaseModel], path: Path | None, overrides: Sequence[str], base: Mapping[str, Any]) -> Iterator[_Source]:
    yield _Source(json.dumps(dict(base)), "defaults", 0, partial(_always, "defaults"))
    if path is not None:
        yield _file(path)
    given: dict[str, str] = {}
    for number, word in enumerate(overrides):
        name, equals, text = word.partition("=")
        where = f"override '{word}'"
        if not equals or not name or not all(name.split(".")):
            raise UserError("not a setting", where=where, fix="Write key=value, for instance lr=1e-5 or data.limit=100.")
        if name in given:
            raise UserError(f"`{name}` is given twice, first as '{given[name]}'", where=where)
        given[name] = word
        source = _Source(text, where, 2 + number, partial(_always, where))
        source.under(tuple(name.split(".")), _Place(where, where, (2 + number, 0, 0)))
        yield source


def _file(path: Path) -> _Source:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = {other.stem: other for other in path.parent.glob("*.y*ml")}
        near = closest(path.stem, beside)
        raise UserError("there is no such file", where=str(path), fix=f"Did you mean {beside[near]}?" if near else "") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}", where=str(path)) from None
    source = _Source(text, str(path), 1, lambda line, column: f"{path}:{line}:{column}")
    if source.value is None:
        source.value = {}
    if not isinstance(source.value, dict):
        raise UserError(f"a config is a mapping of `key: value` lines, not {_given(source.value)}", where=f"{path}:1:1")
    return source


def _merge(old: dict[str, Any], new: Mapping[str, Any], places: dict[Key, _Place], key: Key) -> None:
    for name, value in new.items():
        here = (*key, name)
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            _merge(old[name], value, places, here)
            continue
        old[name] = value
        for stale in [k for k in places if k[: len(here)] == here]:
            del places[stale]


@dataclass(frozen=True, slots=True)
class _Problem:
    order: tuple[int, int, int]
    where: str
    what: str
    fix: str = ""
    key: str = ""  # the key that is missing, or the one proposed for an unknown key


_LAST = (10**9, 0, 0)


def _explain(kind: type[BaseModel], error: ValidationError, values: Any, places: Mapping[Key, _Place], source: str) -> UserError:
    grouped: dict[Key, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(walk(kind, detail["loc"]), []).append(detail)
    inner = [
        key for key in grouped if not any(other[: len(key)] == key for other in grouped if other != key)
    ]  # a list is not short of a bad item
    problems = [_describe(kind, key, grouped[key], places, source) for key in inner or grouped]
    proposed = {p.key for p in problems if p.order != _LAST and p.key}
    problems = sorted((p for p in problems if p.order != _LAST or p.key not in proposed), key=lambda p: p.order)
    first, more = problems[0], len(problems) - 1
    fix = f"{first.fix} (and {more} more)".strip() if more else first.fix
    return UserError(first.what, where=first.where, fix=fix)


def _describe(kind: type[BaseModel], key: Key, details: Sequence[ErrorDetails], places: Mapping[Key, _Place], source: str) -> _Problem:
    error, name = details[0], _dotted(key)
    context = error.get("ctx", {})
    if error["type"] == "config":
        name = str(context["key"])
        key = tuple(name.split("."))
    place = next((places[key[:n]] for n in range(len(key), 0, -1) if key[:n] in places), _Place(source, source, _LAST))
    if error["type"] == "config":
        return _Problem(place.order, place.key, str(context["message"]))
    if error["type"] == "extra_forbidden":
        return _unknown(kind, key, place)
    if error["type"] == "missing" and isinstance(key[-1], str):
        fix = f"Give it in the config file, or as {name}=VALUE." if place.order == _LAST else "Add it there."
        return _Problem(_LAST, place.key, f"`{name}` is missing", fix, name)
    what, fix = _complaint(kind, key, details)
    return _Problem(place.order, place.value, what, fix)


def _unknown(kind: type[BaseModel], key: Key, place: _Place) -> _Problem:
    name = _dotted(key)
    everything = [row.key for row in keys(kind)]
    leaf = str(key[-1])
    if "." in leaf and name in everything:
        section, _, inner = name.rpartition(".")
        return _Problem(place.order, place.key, f"unknown key `{leaf}`", f"In a file, write `{section}:` and under it `{inner}:`.", name)
    best = nearest_key(kind, key)
    siblings = [k.rpartition(".")[2] for k in everything if k.rpartition(".")[0] == _dotted(key[:-1])]
    if best:
        fix = f"Did you mean `{best}`?"
    elif len(siblings) <= 12:
        fix = f"The keys of `{_dotted(key[:-1])}` are {', '.join(siblings) or 'none'}."
    else:
        fix = "`preftune config METHOD` prints all keys."
    return _Problem(place.order, place.key, f"unknown key `{name}`", fix, best or "")


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping of `key: value`",
    "dict_type": "a mapping of `key: value`",
    "tuple_type": "a list",
    "list_type": "a list",
}
_BOUND = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _complaint(kind: type[BaseModel], key: Key, details: Sequence[ErrorDetails]) -> tuple[str, str]:
    """What a wrong value should have been, and what it was."""
    error, name = details[0], _dotted(key)
    context, given = error.get("ctx", {}), error["input"]
    if error["type"] in _BOUND:
        words, bound = _BOUND[error["type"]]
        return f"`{name}` must be {words} {context[bound]:g}, not {_given(given)}", ""
    choices = [c for d in details if d["type"] == "literal_error" for c in _choices(d)]
    expected = [_EXPECTED[d["type"]] for d in details if d["type"] in _EXPECTED]
    section = section_of(kind, key[0]) if len(key) == 1 else None
    if error["type"] == "model_type" and section is not None and getattr(section, "shorthand", None):
        expected = ["text", "a list", *expected]
    if error["type"] == "string_too_short":
        return f"`{name}` must not be empty", ""
    if not choices and not expected:
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] in ("missing", "too_short", "too_long"):
            whole = _dotted(key[:-1]) if isinstance(key[-1], int) else name
            return f"`{whole}` has too {'many' if error['type'] == 'too_long' else 'few'} values", ""
        return f"`{name}`: {message}", ""
    if choices:
        expected.insert(0, f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0])
    if optional(kind, key):
        expected.append("null")
    near = closest(given, choices) if isinstance(given, str) else None
    return f"`{name}` must be {' or '.join(dict.fromkeys(expected))}, not {_given(given)}", f"Did you mean {near}?" if near else ""


def _choices(detail: ErrorDetails) -> list[str]:
    return [part.strip("'") for part in str(detail.get("ctx", {})["expected"]).replace(" or ", ", ").split(", ")]


def _given(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, str):
        return f"the text '{value if len(value) <= 40 else value[:37] + '...'}'"
    return "nothing (null)" if value is None else json.dumps(value)


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _always(where: str, line: int, column: int) -> str:
    return where


def _tag(node: Node) -> str:
    return str(node.tag).removeprefix("tag:yaml.org,2002:")


def _yaml_hint(trouble: str | None) -> str:
    trouble = trouble or ""
    if "\\t" in trouble:
        return "Indent with spaces, not tabs."
    if "another document" in trouble:
        return "A config is one document: remove the `---`."
    if "cannot start any token" in trouble or "mapping values are not allowed" in trouble:
        return "Put text that holds such characters in quotes."
    return ""
