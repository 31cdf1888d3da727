"""One optimizer step of any method: the only place where a loss meets an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from preftune.methods import Method, Outputs
from preftune.models.policy import LanguageModel, RewardModel
from preftune.objectives.metrics import Metrics
from preftune.packing.batch import Batch, Totals, collate, microbatches
from preftune.packing.chat import Tree
from preftune.training.distributed import World
from preftune.training.reference import MovingReference, Reference, RunningAverage


class Interrupted(Exception):
    """A step or an evaluation was given up between micro-batches, before anything was changed."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. `taken` is False where a non-finite loss or gradient kept the weights as they were."""

    loss: float
    grad_norm: float
    lr: float
    tokens: int
    metrics: dict[str, float]
    taken: bool
    ids: tuple[str, ...]
    where: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a closed form of the step: warmup from 0, then constant, linear or cosine to a share of the peak."""

    peak: float
    total: int
    warmup: float = 0.03
    shape: str = "cosine"
    floor: float = 0.1

    def __call__(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        warm = math.ceil(self.warmup * self.total)
        if step < warm:
            return self.peak * (step + 1) / warm
        if self.shape == "constant":
            return self.peak
        progress = min(1.0, (step - warm) / max(1, self.total - warm))
        fall = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * (self.floor + (1 - self.floor) * fall)


def make_optimizer(
    parameters: dict[str, Tensor],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices only, as is usual. `lr_scale` of a parameter's name multiplies the schedule's learning rate."""
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        decay, scale = weight_decay if parameter.ndim >= 2 else 0.0, lr_scale(name)
        matrix = float(parameter.ndim >= 2)
        groups.setdefault((scale, -matrix), {"params": [], "weight_decay": decay, "lr_scale": scale})["params"].append(parameter)
    return torch.optim.AdamW([groups[key] for key in sorted(groups)], lr=0.0, betas=betas, eps=eps, fused=True)


@dataclass
class Learner:
    """A model under training, blind to which method trains it."""

    method: Method
    knobs: Any
    model: LanguageModel | RewardModel
    world: World
    tokens_per_microbatch: int
    reference: Reference | None = None
    optimizer: torch.optim.AdamW | None = None
    schedule: Schedule | None = None
    clip_norm: float = 1.0
    average: RunningAverage | None = None
    parameters: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def outputs(self, batch: Batch) -> Outputs:
        """What the models say of one micro-batch."""
        reference = batch.reference_logp
        if self.method.compares(self.knobs) and reference is None:
            assert self.reference is not None
            reference = batch.per_response(self.reference(batch))
        if isinstance(self.model, RewardModel):
            if not self.method.language_head(self.knobs):
                return Outputs(rewards=self.model(batch))
            rewards, token_logp = self.model.with_logprobs(batch)
            return Outputs(rewards=rewards, token_logp=token_logp)
        return Outputs(token_logp=self.model(batch), reference_logp=reference)

    def loss(self, batch: Batch, survey: float | None = None) -> tuple[Tensor, Metrics]:
        """The method's loss and metrics on one micro-batch; `survey` is what its survey found for the whole step."""
        return self.method.loss(replace(self.outputs(batch), survey=survey), batch, self.knobs)

    @torch.no_grad()
    def survey(self, trees: Sequence[Tree], give_up: Callable[[], bool] = lambda: False) -> float | None:
        """What the method must know of the whole step of `trees` before its loss, None where it needs nothing."""
        if self.method.survey is None:
            return None
        above = below = 0.0
        for batch in self._batches(self.method.survey.trees(trees)):
            if give_up():
                raise Interrupted
            numerator, denominator = self.method.survey.measure(self.outputs(batch), batch)
            above, below = above + numerator.item(), below + denominator.item()
        sums = self.world.sum_numbers({"above": above, "below": below})
        return sums["above"] / sums["below"] if sums["below"] else 0.0

    def step(self, trees: Sequence[Tree], index: int, give_up: Callable[[], bool] = lambda: False) -> Step:
        """Optimizer step `index` on the records of `trees`; with several processes each computes its share.

        `give_up` is asked between micro-batches; when it says so, gradients are dropped and Interrupted is raised.
        """
        assert self.optimizer is not None and self.schedule is not None
        self.model.train()  # for gradient checkpointing and an adapter's dropout: the model's own dropout is 0
        sums: dict[str, float] = {}
        try:
            for loss, metrics in self.losses(trees, index, give_up):
                if loss.isfinite():
                    loss.backward()
                _add(sums, loss, metrics)
        except Interrupted:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        sums = self.world.sum_numbers(sums)
        self.world.sum_gradients(self.parameters.values())
        norms = [torch.nn.utils.clip_grad_norm_(part.values(), self.clip_norm) for part in self.clipped_apart()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        lr = self.schedule(index)
        taken = bool(norm.isfinite()) and math.isfinite(sums["loss"])
        if taken:
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            self.optimizer.step()
            for moving in self.moving().values():
                moving.follow(index + 1)
        self.optimizer.zero_grad(set_to_none=True)
        ids, where = tuple(t.id for t in trees), tuple(t.where for t in trees)
        return Step(sums["loss"], float(norm), lr, sum(t.tokens for t in trees), _means(sums), taken, ids, where)

    def losses(self, trees: Sequence[Tree], index: int, give_up: Callable[[], bool]) -> Iterator[tuple[Tensor, Metrics]]:
        """The micro-batches' losses and metrics, whose sums are those of the whole step."""
        survey = self.survey(trees, give_up)
        for batch in self._batches(trees):
            if give_up():
                raise Interrupted
            yield self.loss(batch, survey)

    def clipped_apart(self) -> list[dict[str, Tensor]]:
        """Parameters whose gradients are clipped together, part by part."""
        return [self.parameters]

    @torch.no_grad()
    def evaluate(
        self, trees: Sequence[Tree], on_batch: Callable[[int], None] = lambda done: None, give_up: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Loss and metrics over all of `trees`, without gradient, weighted exactly as in one large step.

        `give_up` is asked between micro-batches; when it says so, Interrupted is raised.
        """
        self.model.eval()
        sums: dict[str, float] = {}
        done = 0
        survey = self.survey(trees, give_up)
        for batch in self._batches(trees):
            if give_up():
                raise Interrupted
            _add(sums, *self.loss(batch, survey))
            done += len(batch.ids)
            on_batch(done)
        sums = self.world.sum_numbers(sums)
        return {"loss": sums["loss"], **_means(sums)}

    def _batches(self, trees: Sequence[Tree]) -> Iterator[Batch]:
        totals = Totals.of(trees)
        for part in microbatches(trees, self.tokens_per_microbatch, self.world.size, self.world.rank):
            yield collate([trees[i] for i in part], totals, self.method.reduction).to(self.world.device)

    def moving(self) -> dict[str, MovingReference | RunningAverage]:
        """What follows the weights from step to step, by the name it has in a checkpoint."""
        both = {"reference": self.reference, "average": self.average}
        return {name: one for name, one in both.items() if isinstance(one, MovingReference | RunningAverage)}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything a checkpoint must hold of the model, the optimizer and what follows the weights, by name."""
        assert self.optimizer is not None
        state = {
            f"{name}/{key}": value for name, p in self.parameters.items() for key, value in sorted(self.optimizer.state.get(p, {}).items())
        }
        moving = {name: dict(one.tensors) for name, one in self.moving().items()}
        return {"model": dict(self.parameters), "optimizer": state, **moving}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `tensors` gave."""
        assert self.optimizer is not None
        _copy(tensors["model"], self.parameters)
        for name, one in self.moving().items():
            _copy(tensors[name], one.tensors)
        self.optimizer.state.clear()
        for name, value in tensors["optimizer"].items():
            owner, _, key = name.rpartition("/")
            parameter = self.parameters[owner]
            self.optimizer.state[parameter][key] = value.to(parameter.device)


def _copy(saved: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    if saved.keys() != into.keys():
        odd = sorted(saved.keys() ^ into.keys())[:3]
        raise ValueError(f"the checkpoint's tensors are not this model's: {', '.join(odd)}")
    for name, tensor in into.items():
        tensor.copy_(saved[name])


def _add(sums: dict[str, float], loss: Tensor, metrics: Metrics) -> None:
    sums["loss"] = sums.get("loss", 0.0) + loss.item()
    for name, (numerator, denominator) in metrics.items():
        sums[f"{name}/above"] = sums.get(f"{name}/above", 0.0) + numerator.item()
        sums[f"{name}/below"] = sums.get(f"{name}/below", 0.0) + denominator.item()


def _means(sums: dict[str, float]) -> dict[str, float]:
    names = [key.removesuffix("/above") for key in sums if key.endswith("/above")]
    return {name: sums[f"{name}/above"] / sums[f"{name}/below"] if sums[f"{name}/below"] else float("nan") for name in names}
