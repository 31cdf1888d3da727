"""How far a sampler's log-probabilities are from the trainer's: on what was drawn, and on a text that shows which weights it serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from preftune.errors import UserError
from preftune.models.policy import LanguageModel
from preftune.packing.batch import collate, microbatches
from preftune.packing.chat import Tree
from preftune.rollout.samples import Sample

PROBE = (
    "Late in the autumn the ferry stopped at seven small harbours, and at each of them the captain handed over letters, flour and news. "
    "How many days did the whole journey take, if every stop lasted four hours and the sea between two of them took a night?"
)
"""A text that both sides read."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Mean difference of a token's log-probability (nats) that two right ways to compute it stay well below, by the type of their products."""


@dataclass(frozen=True)
class Agreement:
    """Two sides' log-probabilities of the same tokens."""

    tokens: int
    mean: float
    """Mean absolute difference of a token's log-probability, in nats."""
    most: float
    """The largest one."""
    k3: float
    """Estimate of KL(sampler || trainer) for a token: the mean of exp(d) - 1 - d, d = trainer - sampler. Never negative, and unbiased for
    tokens drawn from the sampler's whole distribution at temperature 1 (Schulman, Approximating KL Divergence, 2020)."""

    @classmethod
    def of(cls, sampler: Sequence[float] | np.ndarray, trainer: Sequence[float] | np.ndarray) -> Self:
        """From two sequences of log-probabilities of the same tokens."""
        d = np.asarray(trainer, dtype=float) - np.asarray(sampler, dtype=float)
        if not d.size:
            raise ValueError("no token to compare")
        return cls(len(d), float(np.abs(d).mean()), float(np.abs(d).max()), float((np.expm1(d) - d).mean()))

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats a token on average, {self.most:.2g} at most, KL {self.k3:.2g} ({self.tokens} tokens)"


@torch.no_grad()
def token_logps(model: LanguageModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """[T] log-probability at temperature 1 of each token of each response to its prompt (token ids)."""
    trees = [
        Tree("", "", np.asarray(p, dtype=np.int64), (np.asarray(r, dtype=np.int64),), (False,), np.zeros(1), np.zeros((1, 1)))
        for p, r in zip(prompts, responses, strict=True)
    ]
    training = model.training
    model.eval()
    found: dict[int, np.ndarray] = {}
    for part in microbatches(trees, max(4096, *(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)))):
        logp = model(collate([trees[i] for i in part]).to(model.backbone.device)).double().cpu()
        found |= {i: one.numpy() for i, one in zip(part, logp.split([len(responses[i]) for i in part]), strict=True)}
    model.train(training)
    return [found[i] for i in range(len(trees))]


def agreement(model: LanguageModel, drawn: Sequence[tuple[Sequence[int], Sample]]) -> Agreement:
    """Of samples, each with its prompt, and the model that they should come from: log-probabilities at temperature 1."""
    ours = token_logps(model, [prompt for prompt, _ in drawn], [one.ids for _, one in drawn])
    return Agreement.of(np.concatenate([one.logp for _, one in drawn]), np.concatenate(ours))


def said(found: Agreement, compute: torch.dtype) -> str:
    """One line about sampler and trainer; it warns where they are no longer the same model."""
    line = f"log-probabilities of vLLM and of this model differ by {found}"
    return line if found.mean <= TOLERANCE[compute] else f"[yellow]{line}: is it the same model that is served?[/yellow]"


class Arrivals:
    """Whether weights that were pushed are those that are served, by a text's log-probabilities [T] on both sides.

    A tolerance alone lets a step pass that moves the text by less than it. So what is served is also compared with where the trainer stood
    at the first push and at the one before: served - old = c (new - old) + noise must have a c of 1, and noise as at the first push.
    """

    def __init__(self, compute: torch.dtype) -> None:
        self.tolerance = TOLERANCE[compute]
        self.noise = 0.0
        self.before: list[np.ndarray] = []

    def check(self, served: np.ndarray, new: np.ndarray) -> Agreement:
        """How both agree; `new` is then where the trainer stood last. Raises UserError where other weights are served."""
        found = Agreement.of(served, new)
        what = f"the sampler does not serve the new weights: log-probabilities differ by {found}"
        if not found.mean <= self.tolerance:
            raise UserError(what, where="rollout.engine")
        for old in self.before:
            step, moved = new - old, served - old
            size = float(np.linalg.norm(step))
            share = float(step @ moved) / size**2 if size else 1.0
            error = float(np.linalg.norm(moved - share * step)) / max(1, len(new) - 1) ** 0.5 / size if size else 0.0
            if abs(1 - share) > 0.1 + 3 * error:
                what += f"; they moved by {share:.0%} (standard error {error:.0%}) of what the trainer's did"
                raise UserError(what, where="rollout.engine")
            if _rms(served - new) > 4 * self.noise + 0.1 * _rms(step):
                raise UserError(what, where="rollout.engine")
        if not self.before:
            self.noise = _rms(served - new)
        self.before = [*self.before[:1], new]
        return found


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
