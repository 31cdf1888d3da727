"""Responses of a model to prompts, for evaluation: one to each, by the local engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from preftune.models.policy import LanguageModel
from preftune.packing.chat import ChatTokenizer, Tree
from preftune.records import Message
from preftune.rollout.engine import Engine
from preftune.rollout.sampling import Sampling


@dataclass(frozen=True)
class Generated:
    """One response: its tokens (the end-of-turn token included where it was reached), and its text without special tokens."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str
    finished: bool

    def tree(self, name: str = "") -> Tree:
        """As a record's tree, to be scored by a model."""
        prompt, response = np.asarray(self.prompt_ids, dtype=np.int64), np.asarray(self.ids, dtype=np.int64)
        return Tree(name, "", prompt, (response,), (self.finished,), np.zeros(1), np.zeros((1, 1)))


def generate(
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """One response to each prompt: greedy at temperature 0, else sampled from the whole distribution at that temperature."""
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    found: dict[int, Generated] = {}
    for one in Engine(model, tokenizer.turn_ends).generate(encoded, 1, sampling, seed):
        text = tokenizer.decode(one.ids).strip()
        found[one.prompt] = Generated(tuple(encoded[one.prompt]), one.ids, text, one.finish == "stop")
        on_done(len(found))
    return [found[i] for i in range(len(prompts))]
