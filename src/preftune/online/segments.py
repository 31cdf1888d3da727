"""Responses cut into segments, and where in the tokens each of them ends (2306.01693)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from preftune.objectives.token_rewards import segment_end
from preftune.online.config import DenseConfig
from preftune.records import Example

_ENDS = {"sentence": r"[.!?]+(?=\s|$)|\n+", "clause": r"[,;:.!?]+(?=\s|$)|\n+", "line": r"\n+"}


def ends(text: str, per: str) -> list[int]:
    """Where the segments of `text` end, in characters, exclusive: each holds something besides white space; the last ends with the text."""
    places = [match.end() for match in re.finditer(_ENDS[per], text)]
    if not places or places[-1] < len(text):
        places.append(len(text))
    found, start = [], 0
    for place in places:
        if text[start:place].strip():
            found.append(place)
            start = place
    if found and not text[start:].strip():
        found[-1] = len(text)
    return found


def offsets(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> tuple[str, list[tuple[int, int]]]:
    """The decoded text and where in it each token stands; a token that shows nothing stands at an empty place."""
    places, before = [], 0
    for count in range(1, len(ids) + 1):
        after = max(before, len(decode(ids[:count])))
        places.append((before, after))
        before = after
    return decode(ids), places


def asked(example: Example, texts: Sequence[str], config: DenseConfig) -> tuple[Example, list[list[int]]]:
    """The record with a response for every segment of each of its own, as the judge is to see it, and the segments' ends by response."""
    found = [ends(text, config.per) for text in texts]
    responses = []
    for response, text, places in zip(example.responses, texts, found, strict=True):
        starts = [0, *places][: len(places)] if config.of == "segment" else [0] * len(places)
        responses += [replace(response, text=text[a:b].strip(), finished=True, score=None) for a, b in zip(starts, places, strict=True)]
    return replace(example, responses=tuple(responses)), found


def laid(
    scores: np.ndarray, places: Sequence[Sequence[int]], tokens: Sequence[Sequence[tuple[int, int]]], config: DenseConfig
) -> list[np.ndarray]:
    """Rewards by token, an array a response, of the flat `scores` of all segments; NaN on tokens that end none.

    A segment whose score is NaN has no reward, and what the next one adds is told from the last score before it.
    """
    out, at = [], 0
    for ends_of, offsets_of in zip(places, tokens, strict=True):
        mine = scores[at : at + len(ends_of)]
        at += len(ends_of)
        known = ~np.isnan(mine)
        mine, ends_of = mine[known], [place for place, is_known in zip(ends_of, known, strict=True) if is_known]
        if config.of == "gain":
            mine = np.diff(mine, prepend=0.0)
        rewards = np.full(len(offsets_of), np.nan)
        for place, value in zip(segment_end(ends_of, offsets_of), mine, strict=True):
            rewards[place] = np.nan_to_num(rewards[place]) + config.weight * value
        out.append(rewards)
    return out
