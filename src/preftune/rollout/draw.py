"""From prompts to records with responses: the engine's samples, journalled as they end, so that a killed run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from preftune.packing.chat import ChatTokenizer
from preftune.records import Example, Response
from preftune.rollout.journal import Journal
from preftune.rollout.samples import Sample
from preftune.rollout.sampling import Sampling


class Sampler(Protocol):
    """What draws responses: the local engine, or a vLLM server."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        sampling: Sampling,
        seed: int = 0,
        *,
        numbers: Sequence[Sequence[int]] | None = None,
        give_up: Callable[[], bool] = lambda: False,
    ) -> Iterator[Sample]:
        """The responses 0 .. n-1 to each prompt (token ids), or those in `numbers`, as they end; none more once `give_up` says so."""
        ...


def draw(
    engine: Sampler,
    tokenizer: ChatTokenizer,
    examples: Sequence[Example],
    n: int,
    sampling: Sampling,
    seed: int,
    journal: Journal,
    *,
    on_done: Callable[[int, str], None] = lambda done, note: None,
    give_up: Callable[[], bool] = lambda: False,
) -> bool:
    """Draw into the journal the responses 0 .. n-1 of every prompt that are not in it yet; whether all are there now.

    `on_done` is told how many there are, and the rate.
    """
    encoded = [tokenizer.encode_prompt(example.prompt) for example in examples]
    missing = lacking(examples, n, journal)
    done = n * len(examples) - sum(map(len, missing))
    tokens, start = 0, time.monotonic()
    for one in engine.generate(encoded, n, sampling, seed, numbers=missing, give_up=give_up):
        journal.add(_line(examples[one.prompt], one, tokenizer))
        tokens, done = tokens + len(one.ids), done + 1
        on_done(done, f"{tokens / max(time.monotonic() - start, 1e-9):.0f} tokens/s")
    return done == n * len(examples)


def lacking(examples: Sequence[Example], n: int, journal: Journal) -> list[list[int]]:
    """Numbers of the responses that the journal does not hold yet, by prompt."""
    return [[k for k in range(n) if k not in journal.done.get(example.id, ())] for example in examples]


def records(examples: Sequence[Example], journal: Journal, n: int, source: str) -> list[Example]:
    """The prompts as records with their responses, by number; a response's `meta` says how it ended and its log-probabilities."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for one in journal.samples():
        found.setdefault(one["prompt"], {})[one["number"]] = one
    told = lambda one: {name: one[name] for name in ("finish", "tokens", "logp", "drawn_logp")}
    out = []
    for example in examples:
        mine = [found[example.id][number] for number in range(n)]
        responses = tuple(Response(one["text"], finished=one["finish"] == "stop", meta=told(one)) for one in mine)
        out.append(replace(example, responses=responses, source=example.source or source))
    return out


def _line(example: Example, one: Sample, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """One sample as it stands in the journal."""
    text = tokenizer.decode(one.ids)[: one.text_end].strip()
    sums = {"logp": float(one.logp.sum()), "drawn_logp": float(one.drawn_logp.sum())}
    return {"prompt": example.id, "number": one.number, "text": text, "finish": one.finish, "tokens": len(one.ids), **sums}
