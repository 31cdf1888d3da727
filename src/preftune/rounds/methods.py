"""The table of iterated methods: what each keeps of a round's scored responses, and which row of the methods learns it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, model_validator

from preftune.configfile import Section, problem
from preftune.methods import find
from preftune.records import Example
from preftune.rounds.config import RoundsRollout, rounds_config
from preftune.rounds.penalty import judged
from preftune.selection.select import Chooser, Selected, choose, finished, pairs, raft, rso, top
from preftune.training.config import Positive, RunConfig, run_config


class BestKnobs(Section):
    """What Best-of-N keeps."""

    k: Positive = Field(1, description="how many of the best responses to each prompt are learned")
    at_least: float | None = Field(None, description="a response that scores less is not learned; null is no bar")
    only_finished: bool = Field(True, description="a response that was cut at max_new_tokens is not learned")
    objective: dict[str, Any] = Field({}, description="knobs of the method that trains, by name")


class RaftKnobs(BestKnobs):
    """What RAFT keeps."""

    ranking: Literal["local", "global"] = Field(
        "local", description="the k best responses to each prompt (local), or the best share of a round's responses whatever their prompt"
    )
    share: float = Field(0.2, gt=0, le=1, description="for ranking global: the share of a round's responses that is learned")
    kl: float = Field(
        0.0, ge=0, description="rank by score - kl * (log-probability - the reference's), so that what strays far from it counts less"
    )

    @model_validator(mode="after")
    def _used(self) -> RaftKnobs:
        if self.ranking == "local" and self.share != type(self).model_fields["share"].default:
            raise problem("`share` has no effect with `ranking: local`", "method.share")
        if self.ranking == "global" and self.k != type(self).model_fields["k"].default:
            raise problem("`k` has no effect with `ranking: global`", "method.k")
        return self


class RsoKnobs(Section):
    """What statistical rejection sampling keeps, and how pairs are made of it."""

    count: Positive = Field(8, description="responses to accept of each prompt")
    beta: float = Field(0.5, ge=0, description="draws follow policy * exp(score / beta): 0 takes the highest scores, a large one any")
    how: Literal["first_round", "tournament", "all", "best_worst"] = Field("first_round", description="which accepted ones meet")
    loss: Literal["rso_hinge_norm", "rso_sigmoid_norm", "dpo", "ipo"] = Field("rso_hinge_norm", description="what learns the pairs")
    only_finished: bool = Field(True, description="a response that was cut at max_new_tokens is no candidate")
    objective: dict[str, Any] = Field({}, description="knobs of `loss`, by name")


@dataclass(frozen=True)
class Iterated:
    """One row: `select` makes training records of scored ones, given the knobs and a seed."""

    name: str
    title: str
    paper: str
    summary: str
    when: str
    knobs: type[Section]
    select: Callable[[Sequence[Example], Any, int], Selected]
    trains: Callable[[Any], tuple[str, dict[str, Any]]]
    """The method that learns what was selected, and its knobs."""
    defaults: dict[str, Any] = field(default_factory=dict)
    needs: str = "a prompt; a judge scores what the model answers"
    also_known_as: tuple[str, ...] = ()
    penalty: Callable[[Any], float] = lambda knobs: 0.0
    """How much of its divergence from the reference a response's score is less, given the knobs."""


def _bar(least: float | None) -> Chooser:
    """Responses that the judge itself gave at least this; all without a bar."""
    return lambda example, scores: [i for i, response in enumerate(example.responses) if least is None or judged(response) >= least]


def _best(examples: Sequence[Example], knobs: BestKnobs, seed: int) -> Selected:
    usable = finished(examples) if knobs.only_finished else list(examples)
    found = choose(usable, _bar(knobs.at_least))
    return found.among(choose(found.examples, top(knobs.k)))


def _raft(examples: Sequence[Example], knobs: RaftKnobs, seed: int) -> Selected:
    if knobs.ranking == "local":
        return _best(examples, knobs, seed)
    usable = finished(examples) if knobs.only_finished else list(examples)
    found = raft(usable, knobs.share)
    return found.among(choose(found.examples, _bar(knobs.at_least)))


def _rso(examples: Sequence[Example], knobs: RsoKnobs, seed: int) -> Selected:
    usable = finished(examples) if knobs.only_finished else list(examples)
    accepted = choose(usable, rso(knobs.count, knobs.beta, seed))
    return accepted.among(pairs(accepted.examples, knobs.how, seed))


def _supervised(knobs: BestKnobs) -> tuple[str, dict[str, Any]]:
    return "sft", {"responses": "all", **knobs.objective}


ROWS = (
    Iterated(
        "bon",
        "Best-of-N, distilled",
        "2009.01325",
        "draws N responses to each prompt, and learns the best by supervised fine-tuning",
        "Use it to put Best-of-N's gain into the weights. With several rounds, `pool: all` and `start: first` it is Llama 2's rejection "
        "sampling (2307.09288). A judge that selects is over-optimised like one that trains.",
        BestKnobs,
        _best,
        _supervised,
        {"rounds": 1, "pool": "all", "start": "first", "lr": 2e-5},
        also_known_as=("best_of_n", "rejection_sampling", "rejection"),
    ),
    Iterated(
        "raft",
        "RAFT",
        "2304.06767",
        "rounds of drawing K responses to each prompt and learning the best ones, each round from the last round's model",
        "Use it where a judge is at hand and RL's machinery is too much: stable, and nothing to tune but the rounds. It cannot learn what "
        "the model never draws.",
        RaftKnobs,
        _raft,
        _supervised,
        {"lr": 2e-5},
        also_known_as=("reward_ranked_finetuning",),
        penalty=lambda knobs: knobs.kl,
    ),
    Iterated(
        "rso",
        "RSO",
        "2309.06657",
        "draws candidates, accepts some by statistical rejection sampling, and learns pairs of them",
        "Use it for preference learning on pairs that come close to the best policy's own distribution, instead of pairs from elsewhere.",
        RsoKnobs,
        _rso,
        lambda knobs: (knobs.loss, knobs.objective),
        {"rounds": 1, "start": "first", "lr": 1e-6, "rollout": RoundsRollout.model_validate({"n": 64, "temperature": 0.7, "top_k": 40})},
        also_known_as=("statistical_rejection_sampling", "statistical_rejection"),
    ),
)

ITERATED: dict[str, Iterated] = {row.name: row for row in ROWS}


def config_kind(name: str) -> type[RunConfig]:
    """The config of a method of either table. Raises UserError for an unknown name, with the nearest one."""
    if name in ITERATED:
        row = ITERATED[name]
        return rounds_config(row.knobs, {**row.defaults, "use": name})
    method = find(name, ROWS)
    return run_config(method.knobs, {**method.defaults, "use": name}, compares=method.compares)
