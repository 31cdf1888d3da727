"""Drawing a rollout's responses: by the local engine or a vLLM server, now or ahead, and into a journal as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from preftune.models.policy import LanguageModel
from preftune.online.actor import OnlineLearner
from preftune.online.ahead import Ahead
from preftune.online.config import OnlineConfig
from preftune.online.experience import sample_line, sample_of
from preftune.online.served import Served
from preftune.packing.chat import ChatTokenizer
from preftune.rollout.config import EngineName
from preftune.rollout.draw import Sampler
from preftune.rollout.engine import Engine
from preftune.rollout.journal import Journal
from preftune.rollout.samples import Sample
from preftune.rollout.sampling import Sampling
from preftune.training.failpoints import failpoint
from preftune.training.learner import Interrupted
from preftune.training.progress import meter

AT_ONCE = 256
"""Responses that are drawn together, and kept together: what a kill can cost."""
Shown = Callable[[int], None]


@dataclass
class Drawing:
    """Draws responses to the run's prompts, which are `encoded`."""

    config: OnlineConfig
    learner: OnlineLearner
    tokenizer: ChatTokenizer
    encoded: Sequence[Sequence[int]]
    console: Console
    give_up: Callable[[], bool]

    def __post_init__(self) -> None:
        self.sampling = sampling(self.config)
        self.ahead = Ahead(self.learner.actor)
        vllm = self.config.rollout.engine is EngineName.vllm
        self.served = Served(self.config, self.tokenizer, self.learner.actor.backbone.compute, self.console) if vllm else None

    def sample(
        self,
        folder: Path,
        rollout: int,
        step: int,
        chosen: Sequence[int],
        n: int,
        how: Sampling,
        name: str = "samples",
        policy: LanguageModel | None = None,
        first: int = 0,
    ) -> list[list[Sample]]:
        """`n` responses to each of the chosen prompts, by number; what the journal holds is not drawn again. Raises Interrupted.

        They go to the journal AT_ONCE at a time: with other responses beside it, a response's log-probabilities round differently, and a
        run that goes on must end with the same bytes. `policy` is a copy that draws in the background, which nothing gives up.
        `first` prompts of the rollout come before: a prompt that comes twice in one gets other responses each time.
        """
        seed = int(np.random.SeedSequence([self.config.seed, rollout]).generate_state(1)[0])
        facts = json.loads(json.dumps({"rollout": rollout, "step": step, "seed": seed, "prompts": list(chosen), "n": n, **vars(how)}))
        with Journal(folder / f"{name}.jsonl", facts) as journal:
            at_once = max(1, AT_ONCE // n)
            whole = lambda g: len(journal.done.get(str(g), ())) == n
            with self._shown(f"rollout {rollout}", n * len(chosen), 0, policy is None) as shown:
                for start in range(0, len(chosen), at_once):
                    part = range(start, min(start + at_once, len(chosen)))
                    if not all(map(whole, part)):
                        prompts = [self.encoded[chosen[g]] for g in part]
                        numbers = [range(n * (first + g), n * (first + g + 1)) for g in part]
                        done = lambda count, before=n * start: shown(before + count)
                        for one in self._draw(prompts, numbers, how, seed, policy, step, done):
                            journal.add(sample_line(start + one.prompt, one, text_of(self.tokenizer, one)))
            lines = {(int(line["prompt"]), line["number"]): line for line in journal.samples()}
        failpoint("rollout.sampled")
        return [[sample_of(lines[g, k]) for k in range(n)] for g in range(len(chosen))]

    def _draw(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[range],
        how: Sampling,
        seed: int,
        policy: LanguageModel | None,
        step: int,
        shown: Shown,
    ) -> list[Sample]:
        """The responses of these numbers to each of the prompts, then counted from 0. Raises Interrupted."""
        n = len(numbers[0])
        drawn: list[Sample] = []
        give_up = self.give_up if policy is None else lambda: False
        for one in self.engine(step, policy).generate(prompts, n, how, seed, numbers=numbers, give_up=give_up):
            drawn.append(replace(one, number=one.number % n))
            failpoint("rollout.sample")
            shown(len(drawn))
        if len(drawn) < n * len(prompts):
            raise Interrupted
        return drawn

    def engine(self, step: int, policy: LanguageModel | None = None) -> Sampler:
        """What draws from the policy as it stands after `step` steps, or from a copy of it."""
        if self.served is not None:
            return self.served.engine(policy or self.learner.actor, step)
        return Engine(
            policy or self.learner.actor, self.tokenizer.turn_ends, self.tokenizer.decode, int(self.config.rollout.cache_gb * 1e9)
        )

    @contextmanager
    def _shown(self, title: str, total: int, done: int, in_front: bool) -> Iterator[Callable[[int], None]]:
        """A second bar where there is a terminal; elsewhere the rollout's line at its end says enough."""
        if not self.console.is_terminal or not in_front:
            yield lambda done: None
            return
        with meter(self.console, title, total, done) as bar:
            yield bar.at

    def close(self) -> None:
        """End what draws elsewhere."""
        if self.served is not None:
            self.served.close()


def text_of(tokenizer: ChatTokenizer, one: Sample) -> str:
    """What a judge reads of a sample."""
    return tokenizer.decode(one.ids)[: one.text_end].strip()


def sampling(config: OnlineConfig) -> Sampling:
    """How responses are drawn."""
    r = config.rollout
    return Sampling(r.max_new_tokens, r.temperature, r.top_p, r.top_k, r.min_p, r.repetition_penalty, r.stop)
