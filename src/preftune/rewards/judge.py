"""A judge is a function from records to scores: how one is opened, asked, and put to a whole file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from preftune.errors import UserError
from preftune.models.scoring import Scoring
from preftune.models.values import Values
from preftune.records import Example, Response
from preftune.rewards.classifier import Classifier
from preftune.rewards.config import JudgeConfig, PartConfig
from preftune.rewards.endpoint import Endpoint
from preftune.rewards.rules import find, is_rule
from preftune.rollout.journal import Journal

Judge = Callable[[Sequence[Example]], Sequence[Sequence[float | None] | np.ndarray]]
"""Records to one sequence of N scores a record; None is a response that cannot be scored, which is NaN from `ask` on."""

CHUNK = 32
"""Records that a file's judge sees at once: what a kill can cost."""


@dataclass(frozen=True)
class Parts:
    """Scores of several judges by name, and the one score they make."""

    judges: Mapping[str, Judge]
    scoring: Scoring

    def each(self, examples: Sequence[Example]) -> list[dict[str, np.ndarray]]:
        """What each part says of each record."""
        said = {name: ask(judge, examples, name) for name, judge in self.judges.items()}
        return [{name: said[name][i] for name in said} for i in range(len(examples))]

    def combine(self, said: Mapping[str, np.ndarray]) -> np.ndarray:
        """One score a response: the sum over the parts that could score it, or NaN (see `unscorable`)."""
        stacked = torch.from_numpy(np.stack([said[name] for name in self.scoring.attributes], axis=-1))
        known = stacked.nan_to_num()
        found: np.ndarray = self.scoring.combine(known if self.scoring.heads > 1 else known[..., 0]).numpy()
        both = () if self.scoring.safety is None else self.scoring.attributes
        weights = dict(zip(self.scoring.attributes, self.scoring.weights, strict=False))
        return np.where(unscorable(said, weights, both), np.nan, found)

    def __call__(self, examples: Sequence[Example]) -> list[list[float | None]]:
        """The one score of every response."""
        return [_told(self.combine(one)) for one in self.each(examples)]


def unscorable(said: Mapping[str, np.ndarray], weights: Mapping[str, float], needed: Collection[str] = ()) -> np.ndarray:
    """Which responses have no score in all: those of which no part that weighs anything gives one, or a `needed` part gives none.

    `said` are arrays of one shape by part, NaN where a part could not score; `weights` those that are not 1.
    """
    unknown = {name: np.isnan(values) for name, values in said.items()}
    added = [one for name, one in unknown.items() if name not in needed and weights.get(name, 1.0) != 0]
    lacking = [unknown[name] for name in needed] + ([np.all(added, axis=0)] if added else [])
    return np.any(lacking, axis=0)


def _told(scores: np.ndarray) -> list[float | None]:
    """Scores as JSON has them: null for a response that could not be scored."""
    return [None if math.isnan(score) else score for score in scores.tolist()]


@dataclass
class Opened:
    """A judge ready to score: `facts` say all that its scores depend on, for a file of scores under way."""

    judge: Judge
    facts: dict[str, Any]
    notices: list[str] = field(default_factory=list)


def open_judge(
    config: JudgeConfig, *, compute: torch.dtype, device: torch.device, max_length: int = 2048, tokens_per_microbatch: int = 4096
) -> Opened:
    """Load what the config names. Raises UserError for a rule, model or section that cannot be used."""
    open_part = partial(_part, compute=compute, device=device, max_length=max_length, tokens_per_microbatch=tokens_per_microbatch)
    if not config.parts:
        return open_part(config)
    found = {name: open_part(part) for name, part in config.parts.items()}
    weights = () if config.safety else tuple(config.weights.get(name, 1.0) for name in found)
    scoring = Scoring(tuple(found), weights, safety=config.safety, threshold=config.safety_threshold)
    facts = {name: one.facts for name, one in found.items()} | {"scoring": scoring.to_config()}
    return Opened(
        Parts({name: one.judge for name, one in found.items()}, scoring), facts, [n for one in found.values() for n in one.notices]
    )


def _part(part: PartConfig, *, compute: torch.dtype, device: torch.device, max_length: int, tokens_per_microbatch: int) -> Opened:
    if part.endpoint is not None:
        return Opened(Endpoint(part.endpoint), part.endpoint.model_dump(exclude={"timeout", "attempts", "parallel", "key_from"}))
    assert part.use is not None
    if is_rule(part.use):
        rule = find(part.use, part.options)
        return Opened(partial(_by_rule, rule.score, part.use), {"rule": part.use, "options": part.options, "code": rule.code})
    if part.options:
        raise UserError("`options` are those of a rule, and this is a model", where=part.use, fix="Remove them.")
    model = Classifier(part.use, compute=compute, device=device, max_length=max_length, tokens_per_microbatch=tokens_per_microbatch)
    facts = {"model": model.fingerprint, "max_length": max_length, "precision": str(compute)}
    return Opened(model, facts, [model.notice] if model.notice else [])


def _by_rule(rule: Callable[[Example, Response], float | None], name: str, examples: Sequence[Example]) -> list[list[float | None]]:
    found = []
    for example in examples:
        mine = []
        for number, response in enumerate(example.responses, start=1):
            try:
                said = rule(example, response)
                mine.append(None if said is None else float(said))
            except Exception as error:  # whatever a user's function raises
                what = f"the rule {name} fails on response {number}: {type(error).__name__}: {error}"
                raise UserError(what, where=example.where) from error
        found.append(mine)
    return found


def ask(judge: Judge, examples: Sequence[Example], name: str = "the judge") -> Values:
    """The judge's scores, one [N] array a record: finite numbers, and NaN for each None, a response that cannot be scored.

    Raises UserError where the judge gives anything else, a NaN of its own too, naming the record.
    """
    try:
        found = list(judge(examples))
    except UserError:
        raise
    except Exception as error:  # whatever a user's function raises
        where = examples[0].where if examples else ""
        raise UserError(f"{name} fails: {type(error).__name__}: {error}", where=where) from error
    if len(found) != len(examples):
        raise UserError(f"{name} gives scores of {len(found)} records for {len(examples)}", where=examples[0].where if examples else "")
    scores = []
    for example, given in zip(examples, found, strict=True):
        try:
            array = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError):
            raise UserError(f"{name} gives something else than numbers: {given!r:.80}", where=example.where) from None
        if array.shape != (len(example.responses),):
            what = f"{name} gives {array.size} scores for {len(example.responses)} responses"
            raise UserError(what, where=example.where, fix="It must give one number a response, in their order.")
        wrong = np.flatnonzero(~np.isfinite(array) & [value is not None for value in given])
        if len(wrong):
            at = int(wrong[0])
            raise UserError(f"{name} gives response {at + 1} the score {array[at]}", where=example.where)
        scores.append(array)
    return scores


def score(
    examples: Sequence[Example],
    judge: Judge,
    journal: Journal,
    attribute: str | None = None,
    *,
    on_done: Callable[[int], None] = lambda done: None,
    give_up: Callable[[], bool] = lambda: False,
) -> list[Example] | None:
    """The records with the judge's scores; what the journal holds is not asked for again. None where `give_up` said so on the way.

    A score replaces the one that is there, or stands beside it under the name `attribute`; a response that cannot be scored then has none.
    Several judges leave what each of them said in the response's meta, under `scores`.
    """
    missing = [i for i in range(len(examples)) if str(i) not in journal.done]
    on_done(len(examples) - len(missing))
    for start in range(0, len(missing), CHUNK):
        if give_up():
            return None
        part = missing[start : start + CHUNK]
        _score_part(part, [examples[i] for i in part], judge, journal)
        on_done(len(journal.done))
    found = {int(one["prompt"]): one for one in journal.samples()}
    return [_with(example, found[i], attribute) for i, example in enumerate(examples)]


def _score_part(indices: Sequence[int], examples: Sequence[Example], judge: Judge, journal: Journal) -> None:
    """Score some records and put them into the journal; where one of them fails, those before it are kept all the same."""
    try:
        each = judge.each(examples) if isinstance(judge, Parts) else None
        scores = [judge.combine(one) for one in each] if each and isinstance(judge, Parts) else ask(judge, examples)
    except UserError as error:
        if len(examples) == 1 or error.where not in {example.where for example in examples}:
            raise  # where the judge itself is gone, asking again for less would only take longer
        half = len(examples) // 2
        _score_part(indices[:half], examples[:half], judge, journal)
        _score_part(indices[half:], examples[half:], judge, journal)
        return
    for at, index in enumerate(indices):
        parts = {"parts": {name: _told(values) for name, values in each[at].items()}} if each else {}
        journal.add({"prompt": str(index), "number": 0, "scores": _told(scores[at]), **parts})


def _with(example: Example, found: Mapping[str, Any], attribute: str | None) -> Example:
    """The record with its new scores."""
    responses = []
    for n, (response, value) in enumerate(zip(example.responses, found["scores"], strict=True)):
        said = {"scores": {name: values[n] for name, values in found["parts"].items()}} if "parts" in found else {}
        responses.append(replace(response, score=_beside(response.score, attribute, value), meta={**response.meta, **said}))
    return replace(example, responses=tuple(responses))


def _beside(score: object, attribute: str | None, value: float | None) -> float | dict[str, float] | None:
    """The new score, under its name beside the others where it has one; None where there is no score at all."""
    if attribute is None:
        return value
    others: dict[str, Any] = dict(score) if isinstance(score, Mapping) else {} if score is None else {"overall": score}
    others.pop(attribute, None)
    return {**others, **({} if value is None else {attribute: value})} or None


def without_score(examples: Sequence[Example], attribute: str | None = None) -> int:
    """Responses that have no score, or none of this name."""
    own = lambda score: score.get(attribute) if isinstance(score, Mapping) and attribute is not None else score
    return sum(own(response.score) is None for example in examples for response in example.responses)


def header(examples: Sequence[Example], opened: Opened) -> dict[str, Any]:
    """What scores under way are scores of."""
    texts = [[_prompt(example), [response.text for response in example.responses]] for example in examples]
    digest = hashlib.sha256(json.dumps(texts, ensure_ascii=True).encode()).hexdigest()
    return {"scores": 1, "records": digest, "judge": json.loads(json.dumps(opened.facts))}


def _prompt(example: Example) -> Any:
    return example.prompt if isinstance(example.prompt, str) else [[turn.role, turn.content] for turn in example.prompt]
