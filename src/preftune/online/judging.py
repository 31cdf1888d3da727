"""The judges of a run and what they said of a rollout: scores of responses, of segments, and those that are only watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from preftune.objectives.token_rewards import missing_end, overlong_penalty
from preftune.online.config import DenseConfig, OnlineConfig
from preftune.online.drawing import text_of
from preftune.online.segments import asked, laid, offsets
from preftune.packing.chat import ChatTokenizer
from preftune.records import Example, Response
from preftune.rewards.judge import Opened, header, score, unscorable
from preftune.rollout.journal import Journal
from preftune.rollout.samples import Sample
from preftune.training.failpoints import failpoint
from preftune.training.learner import Interrupted


@dataclass
class Judges:
    """Who scores: the judge, those of segments by name, and the one that is only watched."""

    judge: Opened
    dense: dict[str, Opened]
    gold: Opened | None

    @property
    def everyone(self) -> list[Opened]:
        """All of them."""
        return [self.judge, *self.dense.values(), *([self.gold] if self.gold else [])]


@dataclass
class Judged:
    """Records, samples and what judges said of them, prompt by prompt."""

    examples: list[Example]
    samples: list[list[Sample]]
    scores: np.ndarray
    """[G, N], NaN where a response could not be scored."""
    parts: dict[str, np.ndarray]
    """[G, N] by name, where the judge has several parts; NaN where a part could not score."""
    dense: list[list[np.ndarray]]
    """Rewards of segments, a number for each token of each response; NaN where no segment ends."""

    @property
    def uneven(self) -> list[int]:
        """Prompts whose responses do not all score the same, as far as they have a score."""
        return [g for g, row in enumerate(self.scores) if len(known := row[~np.isnan(row)]) and known.max() > known.min()]

    def only(self, kept: Sequence[int]) -> Judged:
        """These prompts alone."""
        pick = lambda values: [values[g] for g in kept]
        parts = {name: values[list(kept)] for name, values in self.parts.items()}
        return Judged(pick(self.examples), pick(self.samples), self.scores[list(kept)], parts, pick(self.dense))

    def joined(self, other: Judged) -> Judged:
        """These prompts and the others."""
        parts = {name: np.concatenate([values, other.parts[name]]) for name, values in self.parts.items()}
        scores = np.concatenate([self.scores, other.scores])
        return Judged(self.examples + other.examples, self.samples + other.samples, scores, parts, self.dense + other.dense)


@dataclass
class Judging:
    """Puts samples to the judges; what they say is kept on disk as it comes."""

    config: OnlineConfig
    tokenizer: ChatTokenizer
    judges: Judges
    give_up: Callable[[], bool]

    def text(self, one: Sample) -> str:
        """What a judge reads of a sample."""
        return text_of(self.tokenizer, one)

    def record(self, example: Example, samples: Sequence[Sample]) -> Example:
        """A prompt with its samples as the judge reads them. A cut response without a letter counts as an empty one that ended."""
        texts = [self.text(s) for s in samples]
        responses = tuple(Response(text, finished=s.finish == "stop" or not text) for s, text in zip(samples, texts, strict=True))
        return replace(example, responses=responses)

    def ask(self, path: Path, examples: Sequence[Example], judge: Opened) -> list[Example]:
        """The records with the judge's scores. Raises Interrupted."""
        with Journal(path, header(examples, judge)) as journal:
            found = score(examples, judge.judge, journal, give_up=self.give_up)
        if found is None:
            raise Interrupted
        failpoint("rollout.scored")
        return found

    def judged(self, folder: Path, prompts: Sequence[Example], samples: list[list[Sample]]) -> Judged:
        """The judge's scores of the samples, and the rewards of their segments."""
        examples = [self.record(example, mine) for example, mine in zip(prompts, samples, strict=True)]
        scored = self.ask(folder / "scores.jsonl", examples, self.judges.judge)
        said = lambda name: np.array([[r.meta["scores"][name] for r in e.responses] for e in scored], dtype=np.float64)  # null is NaN
        parts = {name: said(name) for name in self.config.judge.parts}
        dense = [[np.full(len(s.ids), np.nan) for s in mine] for mine in samples]
        for name, opened in self.judges.dense.items():
            self._segments(folder / f"scores-{name}.jsonl", opened, self.config.dense[name], examples, samples, dense)
        return Judged(examples, samples, scores_in(scored), parts, dense)

    def _segments(
        self,
        path: Path,
        opened: Opened,
        config: DenseConfig,
        examples: Sequence[Example],
        samples: list[list[Sample]],
        into: list[list[np.ndarray]],
    ) -> None:
        """Add the rewards of segments to `into`."""
        placed = [[offsets(s.ids, self.tokenizer.decode) for s in mine] for mine in samples]
        asking = [asked(e, [text for text, _ in mine], config) for e, mine in zip(examples, placed, strict=True)]
        some = [g for g, (e, _) in enumerate(asking) if e.responses]
        said = self.ask(path, [asking[g][0] for g in some], opened)
        for g, scores in zip(some, map(_row, said), strict=True):
            for n, rewards in enumerate(laid(np.array(scores), asking[g][1], [where for _, where in placed[g]], config)):
                into[g][n] = np.where(np.isnan(rewards), into[g][n], np.nan_to_num(into[g][n]) + rewards)

    def counted(self, scores: Tensor, finished: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """[G, N] scores and weights in the loss, after the rules for cut and long responses (D.8); without a score a response weighs 0."""
        knobs = self.config.knobs
        if knobs.reward_clip is not None:
            scores = scores.clamp(-knobs.reward_clip, knobs.reward_clip)
        weights = torch.ones_like(scores)
        if knobs.missing_eos != "keep":
            scores, weights = missing_end(scores, finished, knobs.missing_eos, knobs.missing_eos_penalty)
        if knobs.overlong is not None:
            scores = scores + overlong_penalty(lengths, self.config.rollout.max_new_tokens, knobs.overlong)
        return scores, weights.masked_fill(scores.isnan(), 0.0)

    def combined(self, found: Judged, cost_weight: float = 0.0) -> Tensor:
        """[G, N] the judge's scores; of parts on one scale where that is asked; with a constraint (reward - c * cost) / (1 + c).

        NaN where no part that is added could score the response, or a constraint's cost is not known.
        """
        constraint = self.config.constraint
        if not self.config.normalise_parts and constraint is None:
            return torch.from_numpy(found.scores)
        weights = {name: self.config.judge.weights.get(name, 1.0) for name in found.parts}
        if constraint is not None:
            weights[constraint.part] = -cost_weight
        each = {name: _scaled(values) if self.config.normalise_parts else values for name, values in found.parts.items()}
        total = np.sum([weights[name] * np.nan_to_num(values) for name, values in each.items()], axis=0) / (1 + cost_weight)
        lacking = unscorable(found.parts, self.config.judge.weights, () if constraint is None else (constraint.part,))
        return torch.from_numpy(np.where(lacking, np.nan, total))


def _scaled(values: np.ndarray) -> np.ndarray:
    """Mean 0 and deviation 1 of those that are known."""
    known = values[~np.isnan(values)]
    return (values - known.mean()) / (known.std(ddof=1) + 1e-4) if len(known) > 1 else values * 0


def scores_in(scored: Sequence[Example]) -> np.ndarray:
    """[G, N] the scores of records, NaN of responses without one."""
    return np.array([_row(example) for example in scored])


def _row(example: Example) -> list[float]:
    return [np.nan if r.score is None else float(r.score) for r in example.responses]  # type: ignore[arg-type]


def shape_of(samples: Sequence[Sequence[Sample]]) -> tuple[Tensor, Tensor]:
    """[G, N] whether samples came to their end, and their tokens."""
    finished = torch.tensor([[s.finish == "stop" for s in mine] for mine in samples])
    return finished, torch.tensor([[len(s.ids) for s in mine] for mine in samples])
