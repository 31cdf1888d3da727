"""The policy and its critic as one model, and the learner that trains both in one step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from preftune.methods import Outputs
from preftune.models.lora import Adapter
from preftune.models.policy import LanguageModel, RewardModel, token_logprobs_and_entropy
from preftune.models.scoring import Scoring
from preftune.objectives.metrics import Metrics
from preftune.packing.batch import Batch, Totals, by_token, collate, microbatches
from preftune.packing.chat import Tree
from preftune.packing.order import Cursor, steps, steps_per_epoch
from preftune.training.learner import Interrupted, Learner

Learns = Literal["all", "critic"]


class ActorCritic(LanguageModel):
    """A policy with a critic of its own, with a value head on its trunk, or with none."""

    def __init__(self, policy: LanguageModel, critic: RewardModel | None = None, *, shared: bool = False) -> None:
        nn.Module.__init__(self)
        self.backbone, self.critic = policy.backbone, critic
        width = policy.hf.config.get_text_config().hidden_size
        self.value_head = _no_value(width).to(policy.backbone.device) if shared else None

    @property
    def has_values(self) -> bool:
        """Whether there is a critic."""
        return self.critic is not None or self.value_head is not None

    def as_classifier(self) -> RewardModel | None:
        """The critic as a model of its own; of a shared trunk that trunk as it stands, with the value head on it."""
        if self.value_head is None:
            return self.critic
        return RewardModel(self.hf, head=self.value_head, scoring=Scoring(), compute=self.backbone.compute, packed=self.backbone.packed)

    def look(self, batch: Batch, learns: Learns = "all") -> Outputs:
        """[M] log-probabilities, entropies and, with a critic, values; the policy has no gradient where only the critic learns."""
        batch = batch.predicting
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns == "all"):
            states = self.backbone(batch, batch.predict)
            logp, entropy = token_logprobs_and_entropy(self.backbone, states, batch)
        return Outputs(token_logp=logp, entropy=entropy, values=self.values(batch, states))

    def values(self, batch: Batch, states: Tensor | None = None) -> Tensor | None:
        """[M] values, read where the token is predicted; `states` are the policy's for this batch, where they are known already."""
        batch = batch.predicting
        if self.critic is not None:
            read = self.critic.backbone(batch, batch.predict).index_select(0, batch.predict)
            return self.critic.scoring.scale(self.critic.head(read.float()).squeeze(-1))
        if self.value_head is None:
            return None
        states = self.backbone(batch, batch.predict) if states is None else states
        found: Tensor = self.value_head(states.index_select(0, batch.predict).float()).squeeze(-1)
        return found


def _no_value(width: int) -> nn.Linear:
    """A head that gives every state the value 0; without a bias, as the heads of sequence classifiers, which a critic is saved as."""
    head = nn.Linear(width, 1, bias=False)
    nn.init.zeros_(head.weight)
    return head


def critic_of(model: Any, compute: torch.dtype) -> RewardModel:
    """A critic on a causal language model, whose values begin at 0."""
    width = model.config.get_text_config().hidden_size
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        output.requires_grad_(False)  # no use for it
    return RewardModel(model, head=_no_value(width), compute=compute)


@dataclass
class Pretraining:
    """Trees whose loss goes along with every step (ptx, 2203.02155)."""

    trees: Sequence[Tree]
    weight: float
    per_step: int
    seed: int

    def of(self, step: int) -> list[Tree]:
        """The trees of step `step`, counted from 0: a function of the step alone."""
        count = len(self.trees)
        epoch, at = divmod(step, steps_per_epoch(count, self.per_step))
        start = Cursor(epoch, at * self.per_step)
        chosen, _ = next(steps(count, self.per_step, epoch + 1, self.seed, start))
        return [self.trees[i] for i in chosen]


@dataclass
class OnlineLearner(Learner):
    """A learner whose model is an actor with a critic, and whose log-probabilities are taken at the sampling temperature."""

    temperature: float = 1.0
    critic_warmup: int = 0
    critic_lr_scale: float = 1.0
    critic_adapter: Adapter | None = None
    pretraining: Pretraining | None = None
    coefficients: dict[str, float] = field(default_factory=dict)
    learns: Learns = field(default="all", init=False)

    @property
    def actor(self) -> ActorCritic:
        """The model that trains."""
        assert isinstance(self.model, ActorCritic)
        return self.model

    def lr_scale(self, name: str) -> float:
        """The critic's learning rate over the policy's."""
        return self.critic_lr_scale if name.startswith("critic.") else 1.0

    def clipped_apart(self) -> list[dict[str, Tensor]]:
        """Policy and critic each have a gradient norm of their own; a shared trunk has one."""
        critic = {name: p for name, p in self.parameters.items() if name.startswith("critic.")}
        policy = {name: p for name, p in self.parameters.items() if name not in critic}
        return [part for part in (policy, critic) if part]

    def outputs(self, batch: Batch) -> Outputs:
        """What actor and critic say of one micro-batch."""
        found = self.actor.look(replace(batch, temperature=self.temperature), self.learns)
        return replace(found, coefficients=self.coefficients)

    def losses(self, trees: Sequence[Tree], index: int, give_up: Callable[[], bool]) -> Iterator[tuple[Tensor, Metrics]]:
        """Those of the rollout's trees, then those of the pretraining text."""
        self.learns = "critic" if index < self.critic_warmup else "all"
        yield from super().losses(trees, index, give_up)
        if self.pretraining is None or self.learns == "critic":
            return
        beside = self.pretraining.of(index)
        totals = Totals.of(beside)
        for part in microbatches(beside, self.tokens_per_microbatch, self.world.size, self.world.rank):
            if give_up():
                raise Interrupted
            batch = collate([beside[i] for i in part], totals, by_token).to(self.world.device)
            nll = -(batch.token_weight * self.actor(batch)).sum()
            yield self.pretraining.weight * nll, {"pretraining_nll": (nll.detach(), batch.token_weight.sum())}
