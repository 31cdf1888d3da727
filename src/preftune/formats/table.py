"""The table of formats: a format is a name, the fields that tell it, and a pure function row -> Example."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.errors import UserError
from preftune.formats import kwise, preference, single
from preftune.formats.fields import Row
from preftune.formats.own import own
from preftune.records import Example


@dataclass(frozen=True, slots=True)
class Format:
    """One row of the table. `fields` must all be there; `unlike` must not; `shape` looks at their values where names do not tell."""

    name: str
    about: str
    fields: tuple[str, ...]
    parse: Callable[[Row], Example]
    unlike: tuple[str, ...] = ()
    shape: Callable[[Row], bool] = lambda row: True

    def recognise(self, row: Any) -> bool:
        """Whether the row looks like this format, sound or not: a null response is still a row of its format."""
        if not isinstance(row, Mapping):
            return False
        return all(name in row for name in self.fields) and not any(name in row for name in self.unlike) and self.shape(row)


def _list_of(kind: type, *names: str) -> Callable[[Row], bool]:
    """Every named field that is there is a list whose items are of this kind (an empty list or null could be anything)."""

    def shape(row: Row) -> bool:
        found = [row[name] for name in names if row.get(name) is not None]
        items = [item for value in found if isinstance(value, list) for item in value if item is not None]
        return bool(found) and all(isinstance(value, list) for value in found) and all(isinstance(item, kind) for item in items)

    return shape


def _strings(*names: str) -> Callable[[Row], bool]:
    return lambda row: all(row[name] is None or isinstance(row[name], str) for name in names)


_PROMPTS = ("prompt", "query", "instruction", "src", "conversations")
_PAIR = ("chosen", "rejected")

# From the most to the least specific: the first that recognises a row has it.
FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("preftune", "Preftune's own record", ("prompt", "responses"), own, shape=_list_of(dict, "responses")),
        Format("ultrafeedback", "UltraFeedback: K completions rated by aspect", ("instruction", "completions"), kwise.ultrafeedback),
        Format("pro", "PRO: prefix, suffix and reward of K responses", ("prefix", "suffix", "reward"), kwise.pro),
        Format("kwise", "K responses with scores (RRHF, KnowPAT)", ("query", "responses"), kwise.kwise, shape=_list_of(str, "responses")),
        Format("kwise-prompt", "the same with `prompt`", ("prompt", "responses"), kwise.kwise, shape=_list_of(str, "responses")),
        Format("dsp-domains", "DSP: one response for each domain", ("query", "responses"), kwise.dsp_domains),
        Format("text-score", "K transcripts with scores (DSP, WebGPT)", ("text", "score"), kwise.text_score, shape=_list_of(str, "text")),
        Format("paddlenlp-preference", "PaddleNLP pairs", ("src", "tgt", "response", "sort"), preference.paddlenlp_preference),
        Format("sharegpt-preference", "ShareGPT pairs", ("conversations", *_PAIR), preference.sharegpt_preference),
        Format("alpaca-preference", "Alpaca pairs", ("instruction", *_PAIR), preference.alpaca_preference),
        Format("trl-preference", "TRL pairs, explicit prompt", ("prompt", *_PAIR), preference.trl_preference),
        Format(
            "trl-preference-implicit",
            "TRL pairs of whole conversations",
            _PAIR,
            preference.trl_preference,
            unlike=_PROMPTS,
            shape=_list_of(dict, *_PAIR),
        ),
        Format("hh", "Anthropic HH transcripts", _PAIR, preference.hh, unlike=_PROMPTS, shape=_strings(*_PAIR)),
        Format("trl-unpaired", "TRL unpaired preference (KTO)", ("prompt", "completion", "label"), single.trl_completion),
        Format("trl-completion", "TRL prompt-completion", ("prompt", "completion"), single.trl_completion),
        Format("sharegpt", "ShareGPT conversations", ("conversations",), single.sharegpt),
        Format("messages", "chat messages", ("messages",), single.chat_messages),
        Format("alpaca", "Alpaca instructions", ("instruction", "output"), single.alpaca),
        Format("paddlenlp", "PaddleNLP SFT data", ("src", "tgt"), single.src_tgt),
        Format("advertisegen", "AdvertiseGen", ("content", "summary"), single.advertise_gen),
        Format("question-answer", "worked answers (GSM8K)", ("question", "answer"), single.question_answer, shape=_strings("question")),
    )
}

_RESPONSES = ("response", "responses", "completion", "completions", "output", "answer", *_PAIR)

PROMPT_FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("prompts", "prompts alone", ("prompt",), single.prompt_alone, unlike=_RESPONSES),
        Format("prompts-messages", "messages that end with the user", ("messages",), single.messages_alone, shape=single.ends_with_user),
        Format("prompts-alpaca", "instructions alone", ("instruction",), single.instruction_alone, unlike=_RESPONSES),
        Format("prompts-question", "questions alone", ("question",), single.question_alone, unlike=_RESPONSES),
    )
}
"""Formats without a response, where prompts are all that is asked for; they go before the others, whose prompts serve as well."""


def formats(*, prompts: bool) -> dict[str, Format]:
    """The table in the order in which rows are recognised."""
    return {**PROMPT_FORMATS, **FORMATS} if prompts else FORMATS


def named(name: str, *, prompts: bool = False) -> Format:
    """The format of this name, or a UserError with the nearest names."""
    known = formats(prompts=prompts)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    guess = f"Did you mean {' or '.join(near)}? " if near else ""
    raise UserError(f"unknown format {name!r}", fix=f"{guess}Known: auto, {', '.join(known)}")


def recognise(rows: Sequence[Any], where: str, *, prompts: bool = False) -> Format:
    """The format that more than half of these rows have. Raises UserError when there is none, with the fields found."""
    known = formats(prompts=prompts)
    votes = Counter(next((name for name, one in known.items() if one.recognise(row)), "") for row in rows)
    name, count = votes.most_common(1)[0]
    if name and 2 * count > len(rows):
        return known[name]
    found = {name: count for name, count in votes.items() if name}
    if found:
        seen = ", ".join(f"{name} ({count})" for name, count in found.items())
        raise UserError(
            f"the first {len(rows)} rows have no common format: {seen}, unknown ({votes['']})",
            where=where,
            fix="Split the file, or name the format with data.format",
        )
    names = list(dict.fromkeys(name for row in rows if isinstance(row, Mapping) for name in row))
    if not names:
        raise UserError("no row is a JSON object with fields", where=where, fix='Write each row as {"field": value, ...}')
    near = "; ".join(f"{one.name} ({', '.join(one.fields)})" for one in _nearest(names))
    raise UserError(f"unknown format with fields {', '.join(names)}", where=where, fix=f"Nearest formats: {near}. Rename the fields to one")


def _nearest(names: Sequence[str]) -> list[Format]:
    def likeness(one: Format) -> float:
        hits = sum(max((difflib.SequenceMatcher(None, want, name.lower()).ratio() for name in names), default=0.0) for want in one.fields)
        return hits / len(one.fields)

    return sorted(FORMATS.values(), key=likeness, reverse=True)[:3]
