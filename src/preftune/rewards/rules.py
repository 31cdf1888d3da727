"""Rules: Python functions that score a response, ours and the user's own. No torch here."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.errors import UserError
from preftune.records import Example, Response

Rule = Callable[..., float | None]
"""rule(example, response, **options) -> score, or None where the response cannot be scored."""

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+")
_MARKS = (re.compile(r"####"), re.compile(r"\\boxed\{"), re.compile(r"(?i)\banswer(?:\s+is)?\b"))


def answer_in(text: str) -> float | None:
    """The number that a solution ends with: behind ####, in \\boxed{}, behind "answer is", or else the last one; None where it has none."""
    for mark in _MARKS:
        places = list(mark.finditer(text))
        if places and (found := _NUMBER.search(text, places[-1].end())):
            return _number(found[0])
    numbers = _NUMBER.findall(text)
    return _number(numbers[-1]) if numbers else None


def final_answer(example: Example, response: Response) -> float:
    """1 where the response ends with the record's `reference_answer`, as a number or else as the same words; 0 elsewhere."""
    if example.reference_answer is None:
        raise ValueError("the record has no reference_answer to compare with")
    wanted = example.reference_answer.strip()
    numbers = _NUMBER.findall(wanted)
    if len(numbers) == 1 and re.fullmatch(r"[\s$€£%]*" + re.escape(numbers[0]) + r"[\s$€£%.]*", wanted):
        found = answer_in(response.text)
        return float(found is not None and abs(found - _number(numbers[0])) <= 1e-6 * max(1.0, abs(_number(numbers[0]))))
    return float(re.search(rf"(?<!\w){re.escape(wanted.casefold())}(?!\w)", response.text.casefold()) is not None)


def length(example: Example, response: Response, *, least: int = 0, most: int | None = None) -> float:
    """Number of words; where bounds are given, 1 within them and 0 outside."""
    words = len(response.text.split())
    return float(words) if not least and most is None else float(least <= words and (most is None or words <= most))


def matches(example: Example, response: Response, *, pattern: str) -> float:
    """1 where the regular expression is found in the response, 0 elsewhere."""
    return float(re.search(pattern, response.text) is not None)


def finished(example: Example, response: Response) -> float:
    """1 where the response came to its end, 0 where it was cut."""
    return float(response.finished)


def json_object(example: Example, response: Response) -> float:
    """1 where the response is one JSON object, alone or in a code fence; 0 elsewhere."""
    fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n```\s*", response.text, re.DOTALL)
    try:
        return float(isinstance(json.loads(fenced[1] if fenced else response.text), dict))
    except ValueError:
        return 0.0


RULES: Mapping[str, Rule] = {rule.__name__: rule for rule in (final_answer, length, matches, finished, json_object)}
"""The built-in rules by name."""


def is_rule(word: str) -> bool:
    """Whether the word names a rule and no model: a folder of that name, or a Hub id, is a model."""
    return (word in RULES and not Path(word).exists()) or re.fullmatch(r"[\w./\\-]+(?<!/):[A-Za-z_]\w*", word) is not None


@dataclass(frozen=True)
class Found:
    """A rule with its options filled in, and a hash of the code it stands in."""

    score: Callable[[Example, Response], float | None]
    code: str


def find(word: str, options: Mapping[str, Any]) -> Found:
    """The rule that the word names. Raises UserError where there is none, or the options are not its own."""
    rule = RULES[word] if word in RULES else _own(word)
    try:
        inspect.signature(rule).bind(None, None, **options)
    except TypeError as error:
        raise UserError(
            f"the rule cannot be called with (example, response{''.join(f', {name}' for name in options)}): {error}",
            where=word,
            fix="A rule takes a record and one of its responses, then the judge's `options` by name.",
        ) from None
    file = inspect.getsourcefile(rule)
    code = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else ""
    return Found(lambda example, response: rule(example, response, **options), code)


def _own(word: str) -> Rule:
    """A user's function: module:function, or file.py:function."""
    place, _, name = word.rpartition(":")
    try:
        if place.endswith(".py"):
            if not Path(place).is_file():
                raise UserError("no such file", where=place)
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if "" not in sys.path and str(Path.cwd()) not in sys.path:
                sys.path.insert(0, str(Path.cwd()))  # as `python -m` would: a rule lies beside the config that names it
            module = importlib.import_module(place)
    except UserError:
        raise
    except Exception as error:  # whatever the user's file does
        raise UserError(f"the rule's module cannot be imported: {type(error).__name__}: {error}", where=place) from error
    rule = getattr(module, name, None)
    if not callable(rule):
        raise UserError(f"it has no function {name!r}", where=place, fix="Write the judge as module:function.")
    return rule


def _number(text: str) -> float:
    return float(text.replace(",", ""))
