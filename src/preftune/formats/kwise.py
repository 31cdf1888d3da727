"""Formats of K responses to one prompt, scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preftune.formats.fields import Row, example, need, need_list, score
from preftune.formats.reasons import RowError
from preftune.formats.turns import Prompt, prompt_of, response_of, text_of, transcripts
from preftune.records import Example, Message, Response


def kwise(row: Row) -> Example:
    """RRHF, KnowPAT and ours: `query` (or `prompt`), `responses`, and `scores` where higher is better; order is free."""
    asked = "query" if "query" in row else "prompt"
    query, texts = need(row, asked, "responses")
    replies = [response_of(text, query) for text in need_list(texts, "responses")]
    scores = _scores(row["scores"], len(replies)) if row.get("scores") is not None else [None] * len(replies)
    responses = [Response(text, score=value) for text, value in zip(replies, scores)]
    prompt = prompt_of(query)
    return example(row, _asked(prompt) if asked == "query" else prompt, responses, (asked, "responses", "scores"))


def dsp_domains(row: Row) -> Example:
    """DSP: `query`, and `responses` by name of a domain, unscored; the name goes to the response's meta as `domain`."""
    query, named = need(row, "query", "responses")
    if not isinstance(named, Mapping):
        raise RowError("wrong_type", f"responses is a {type(named).__name__}, not an object")
    responses = [Response(response_of(text, query), meta={"domain": domain}) for domain, text in named.items()]
    return example(row, _asked(prompt_of(query)), responses, ("query", "responses"))


def pro(row: Row) -> Example:
    """PRO: `prefix`, `suffix` and `reward`, one entry a response; a prefix is a string or a list of its pieces."""
    prefixes, suffixes, rewards = (need_list(value, name) for value, name in zip(need(row, "prefix", "suffix", "reward"), _PRO))
    if len(prefixes) != len(suffixes):
        raise RowError("wrong_response_count", f"{len(prefixes)} prefixes and {len(suffixes)} suffixes")
    prompts = [prompt_of("".join(prefix) if _strings(prefix) else prefix) for prefix in prefixes]
    if any(prompt != prompts[0] for prompt in prompts):
        raise RowError("prompts_differ")
    if not prompts:
        raise RowError("no_response")
    responses = [Response(text_of(text), score=value) for text, value in zip(suffixes, _scores(rewards, len(suffixes)))]
    return example(row, prompts[0], responses, _PRO)


_PRO = ("prefix", "suffix", "reward")


def text_score(row: Row) -> Example:
    """DSP, APO and WebGPT: whole transcripts in `text`, the score of each in `score`; equal scores are a tie."""
    texts, scores = (need_list(value, name) for value, name in zip(need(row, "text", "score"), ("text", "score")))
    if len(texts) < 2:
        raise RowError("wrong_response_count", f"{len(texts)} texts")
    prompt, replies = transcripts([text_of(text) for text in texts])
    responses = [Response(text, score=value) for text, value in zip(replies, _scores(scores, len(texts)))]
    return example(row, prompt, responses, ("text", "score"))


def ultrafeedback(row: Row) -> Example:
    """UltraFeedback: `instruction` and `completions`, each with `overall_score` and a rating per aspect; "N/A" is no rating.

    A response's score is a mapping: `overall`, `fine_grained`, and the aspects by their names.
    """
    instruction, completions = need(row, "instruction", "completions")
    responses = [_completion(one) for one in need_list(completions, "completions")]
    return example(row, (Message("user", text_of(instruction)),), responses, ("instruction", "completions"))


def _completion(one: Any) -> Response:
    if not isinstance(one, Mapping) or "response" not in one:
        raise RowError("missing_field", "a completion without response")
    annotations = one.get("annotations") or {}
    found = {"overall": score(one.get("overall_score")), "fine_grained": score(one.get("fine-grained_score"))}
    for aspect, judged in annotations.items():
        found[aspect] = score(judged.get("Rating") if isinstance(judged, Mapping) else judged)
    scores = {name: value for name, value in found.items() if value is not None}
    meta = {name: value for name, value in one.items() if name not in ("response", "overall_score", "fine-grained_score") and value}
    return Response(text_of(one["response"]), score=scores or None, meta=meta)


def _asked(prompt: Prompt) -> tuple[Message, ...]:
    """A bare `query` is a question put to an assistant: one user turn."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def _scores(values: Any, count: int) -> list[float | None]:
    scores = [score(value) for value in need_list(values, "scores")]
    if len(scores) != count:
        raise RowError("scores_mismatch", f"{count} responses and {len(scores)} scores")
    return scores


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(piece, str) for piece in value)
