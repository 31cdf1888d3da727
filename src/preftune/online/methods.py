"""The table of online methods: one objective's terms, with its own advantages, weights and knobs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from preftune.configfile import Section
from preftune.methods import METHODS, Method, find
from preftune.online import advantages
from preftune.online.config import OnlineRollout, online_config
from preftune.online.knobs import (
    BaselineKnobs,
    CISPOKnobs,
    GroupKnobs,
    GSPOKnobs,
    OnlineKnobs,
    PPOKnobs,
    ReinforceKnobs,
    ReMaxKnobs,
    RLOOKnobs,
    WhitenedKnobs,
)
from preftune.online.losses import Terms, cispo_terms, clip_terms, plain_terms, policy_loss, ppo_terms, sequence_terms
from preftune.packing.batch import Reduction, Totals, by_response, by_token
from preftune.packing.chat import Tree
from preftune.rounds.methods import ITERATED
from preftune.rounds.methods import config_kind as other_kind
from preftune.training.config import RunConfig


def by_budget(budget: int) -> Reduction:
    """Every token of the step counts as a share of `budget` tokens for each response (Dr. GRPO, 2503.20783)."""

    def weights(trees: Sequence[Tree], totals: Totals) -> np.ndarray:
        shares = by_token(trees, totals)
        return shares * (totals.tokens / (totals.responses * budget))

    return weights


@dataclass(frozen=True)
class Online:
    """One row."""

    name: str
    title: str
    paper: str
    summary: str
    when: str
    knobs: type[OnlineKnobs]
    advantages: advantages.Advantages
    terms: Terms
    weigh: Callable[[Any], str] = lambda knobs: "token"
    """How tokens weigh: by token, response or budget."""
    critic: bool = False
    greedy: bool = False
    """Whether the likeliest response of each prompt is the baseline."""
    group: bool = False
    """Whether it compares the responses to a prompt, and so needs two or more."""
    kl_in_reward: Callable[[Any], bool] = lambda knobs: True
    defaults: dict[str, Any] = field(default_factory=dict)
    needs: str = "a prompt; a judge scores what the policy answers"
    also_known_as: tuple[str, ...] = ()

    def method(self, knobs: OnlineKnobs, budget: int) -> Method:
        """The row as the learner takes it, for responses of at most `budget` tokens."""
        reductions: dict[str, Reduction] = {"token": by_token, "response": by_response, "budget": by_budget(budget)}
        return Method(
            name=self.name,
            title=self.title,
            paper=self.paper,
            summary=self.summary,
            when=self.when,
            needs=self.needs,
            model="policy",
            knobs=self.knobs,
            loss=partial(policy_loss, terms=self.terms),
            keep=lambda tree, knobs: tree,
            reduction=reductions[self.weigh(knobs)],
        )


def _shared(n: int, **more: Any) -> dict[str, Any]:
    rollout = {"n": n, **{key: more.pop(key) for key in ("prompts",) if key in more}}
    return {"lr": 1e-6, "schedule": "constant", "warmup": 0.0, "rollout": OnlineRollout.model_validate(rollout), **more}


_in_loss = lambda knobs: False

ROWS = (
    Online(
        "ppo",
        "PPO",
        "1707.06347",
        "learns from its own responses by clipped steps, with a critic that says what was to be expected",
        "Use it where a reward model or judge is at hand and credit should go to tokens. The most moving parts of all; see `grpo` and "
        "`rloo` for less.",
        PPOKnobs,
        advantages.with_critic,
        ppo_terms,
        critic=True,
        defaults=_shared(1, prompts=64),
        also_known_as=("rlhf", "actor_critic"),
    ),
    Online(
        "reinforce",
        "REINFORCE",
        "",
        "raises the log-probability of each token by the reward that follows it",
        "Use it as the plainest baseline, or to teach; its gradient is noisy.",
        ReinforceKnobs,
        advantages.to_go,
        plain_terms,
        defaults=_shared(1),
        also_known_as=("policy_gradient", "vpg"),
    ),
    Online(
        "reinforce++",
        "REINFORCE++",
        "2501.03262",
        "rewards to go, whitened over the whole rollout, with PPO's clip and no critic",
        "Use it where one response a prompt is drawn and a critic is too much.",
        WhitenedKnobs,
        advantages.to_go,
        clip_terms,
        defaults=_shared(1, prompts_per_step=64),
        also_known_as=("reinforce_plus_plus", "reinforcepp"),
    ),
    Online(
        "reinforce++_baseline",
        "REINFORCE++ with baseline",
        "2501.03262",
        "scores less their group's mean, whitened over the whole rollout, with PPO's clip and the KL in the loss",
        "Use it like `grpo`; dividing by the rollout's deviation instead of each group's own does not blow up easy and hard prompts.",
        BaselineKnobs,
        advantages.group_baseline,
        clip_terms,
        group=True,
        kl_in_reward=lambda knobs: knobs.kl_loss == "reward",
        defaults=_shared(4),
        also_known_as=("reinforce_plus_plus_baseline", "reinforce_baseline"),
    ),
    Online(
        "grpo",
        "GRPO",
        "2402.03300",
        "compares several responses to a prompt with each other instead of with a critic",
        "Use it with rules that can be checked (mathematics, formats): simple, no critic. Defaults are DAPO's weights (2503.14476); "
        "`method.weigh` gives the published (response) and Dr. GRPO's (budget, with `scale: none`) too.",
        GroupKnobs,
        advantages.group,
        clip_terms,
        weigh=lambda knobs: str(knobs.weigh),
        group=True,
        kl_in_reward=_in_loss,
        defaults=_shared(8),
        also_known_as=("dapo", "dr_grpo", "group_relative"),
    ),
    Online(
        "gspo",
        "GSPO",
        "2507.18071",
        "GRPO with the ratio of whole responses instead of tokens",
        "Use it for mixture-of-experts policies and long responses, where ratios of single tokens are noise.",
        GSPOKnobs,
        advantages.group,
        sequence_terms(mean=True),
        weigh=lambda knobs: str(knobs.weigh),
        group=True,
        kl_in_reward=_in_loss,
        defaults=_shared(8),
    ),
    Online(
        "cispo",
        "CISPO",
        "2506.13585",
        "GRPO with clipped importance weights: no token's gradient is ever dropped",
        "Use it where several steps are made of a rollout and rare, decisive tokens would be clipped away.",
        CISPOKnobs,
        advantages.group,
        cispo_terms,
        weigh=lambda knobs: str(knobs.weigh),
        group=True,
        kl_in_reward=_in_loss,
        defaults=_shared(8),
    ),
    Online(
        "rloo",
        "RLOO",
        "2402.14740",
        "REINFORCE on whole responses, each compared with the mean of the others",
        "Use it where a reward model judges whole responses: unbiased, no critic, and few knobs.",
        RLOOKnobs,
        advantages.left_out,
        sequence_terms(mean=False),
        weigh=lambda knobs: "response",
        group=True,
        defaults=_shared(4),
        also_known_as=("leave_one_out",),
    ),
    Online(
        "remax",
        "ReMax",
        "2310.10505",
        "REINFORCE with the score of the likeliest response as baseline",
        "Use it where only one response a prompt can be scored beside a baseline.",
        ReMaxKnobs,
        advantages.over_greedy,
        plain_terms,
        greedy=True,
        defaults=_shared(1),
    ),
)

IMITATION = METHODS["sft"]
"""What learns pretraining text beside the reward."""

ONLINE: dict[str, Online] = {row.name: row for row in ROWS}


def config_kind(name: str) -> type[RunConfig]:
    """The config of a method of any table. Raises UserError for an unknown name, with the nearest one."""
    if name not in ONLINE:
        if name not in ITERATED:
            find(name, (*ITERATED.values(), *ROWS))
        return other_kind(name)
    row = ONLINE[name]
    compares: Callable[[Section], bool] = lambda knobs: True  # the reference is watched also where no loss reads it
    return online_config(row.knobs, {**row.defaults, "use": name}, compares)
