"""Log-probabilities under the reference: from a second model, the policy without its adapter, a cache, or weights that follow it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from preftune.errors import UserError
from preftune.models import load
from preftune.models.lean import freeze
from preftune.models.policy import LanguageModel
from preftune.packing.batch import Batch, collate, microbatches
from preftune.packing.chat import Tree
from preftune.training.config import ReferenceSync
from preftune.training.durable import explained, replace_file

Reference = Callable[[Batch], Tensor]
"""A batch to the [M] log-probabilities of its tokens, without gradient."""


def live_reference(model: LanguageModel, without: Callable[[], AbstractContextManager[None]] = nullcontext) -> Reference:
    """The reference computed as training goes; `without` switches the policy's adapter off where policy and reference are one model."""

    def logp(batch: Batch) -> Tensor:
        with torch.no_grad(), without():
            return model(batch)

    return logp


def frozen_reference(source: load.Source, compute: torch.dtype, device: torch.device, *, packed: bool = True) -> Reference:
    """The model of `source` as it is, computed as training goes."""
    model = LanguageModel(load.load_causal_lm(source), compute=compute, packed=packed).to(device)
    freeze(model.hf, compute)
    return live_reference(model)


class MovingReference:
    """A reference that follows the policy: TR-DPO's updates (2404.09656), or an average of the policy's weights.

    It shares the policy's module and holds only its own values of what trains, all weights or an adapter's.
    """

    def __init__(self, model: LanguageModel, parameters: Mapping[str, Tensor], every: int, mix: float) -> None:
        self.model, self.policy, self.every, self.mix = model, parameters, every, mix
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """[M] log-probabilities under the reference as it stands, dropout off."""
        training = self.model.training
        self.model.eval()
        try:
            found: Tensor = torch.func.functional_call(self.model, self.tensors, (batch,))
            return found
        finally:
            self.model.train(training)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """reference <- mix * policy + (1 - mix) * reference when `step`, counted from 1, is a multiple of `every`."""
        if step % self.every == 0:
            for name, tensor in self.tensors.items():
                tensor.lerp_(self.policy[name], self.mix)


class RunningAverage:
    """A running average of weights: average <- decay * average + (1 - decay) * weights after every step (InstructGPT's EMA, 2203.02155)."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the weights after a step."""
        for name, tensor in self.tensors.items():
            tensor.lerp_(self.parameters[name], 1 - self.decay)

    @torch.no_grad()
    def install(self) -> None:
        """Put the average in the weights' place."""
        for name, tensor in self.tensors.items():
            self.parameters[name].copy_(tensor)


def refuse_still(sync: ReferenceSync | None, steps: int) -> None:
    """Raise UserError where the reference is to follow the policy, and a run of so many steps ends before it does."""
    if sync is not None and sync.every >= steps:
        raise UserError(
            f"the reference would never move: the run has {steps} steps",
            where="reference_sync.every",
            fix=f"Set it below {steps}, or set reference_sync to null." if steps > 1 else "Set reference_sync to null.",
        )


def cached(trees: Sequence[Tree], reference: Reference, file: Path, budget: int, device: torch.device) -> Iterator[int]:
    """Compute the reference once for all trees and keep it in `file`; yields how many trees are done, and ends when the file is there.

    Log-probabilities are computed in other packings than in training, so they agree with a live reference up to rounding only.
    """
    if file.exists():
        yield len(trees)
        return
    values = [np.zeros(len(t.responses)) for t in trees]
    done = 0
    for part in microbatches(trees, budget):
        batch = collate([trees[i] for i in part]).to(device)
        grid = batch.per_response(reference(batch)).cpu().numpy()
        for row, index in enumerate(part):
            values[index] = grid[row, : len(values[index])]
        done += len(part)
        yield done
    with explained("keeping the reference's log-probs", file):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, save({"logp": torch.from_numpy(np.concatenate(values))}))


def attach(trees: Sequence[Tree], file: Path) -> list[Tree]:
    """The trees with their cached reference log-probabilities."""
    flat = load_file(file)["logp"].numpy()
    ends = np.cumsum([len(t.responses) for t in trees])
    if len(flat) != (ends[-1] if len(ends) else 0):
        raise ValueError(f"{file} holds {len(flat)} log-probabilities for {ends[-1]} responses")
    return [replace(t, reference=flat[end - len(t.responses) : end]) for t, end in zip(trees, ends, strict=True)]


def cache_key(trees: Sequence[Tree], model: str, precision: torch.dtype) -> str:
    """A name for these tokens under this model in this precision: another model, token or format gives another name."""
    digest = hashlib.sha256(f"{model} {precision}".encode())
    for tree in trees:
        for ids in (tree.prompt, *tree.responses):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    return digest.hexdigest()[:24]
