"""Responses of a model to prompts, for evaluation and chat, by transformers' own generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from preftune.models.policy import LanguageModel
from preftune.packing.chat import ChatTokenizer, Tree
from preftune.records import Message


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


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: ChatTokenizer,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """One response to each prompt: greedy at temperature 0, else sampled from the whole distribution at that temperature."""
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    found: dict[int, Generated] = {}
    packed = model.backbone.packed
    model.eval()
    model.backbone.use_packed(False)
    torch.manual_seed(seed)
    choice = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0} if temperature else {"do_sample": False}
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            longest = max(len(encoded[i]) for i in part)
            ids = torch.full((len(part), longest), tokenizer.turn_end)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
                mask[row, longest - len(encoded[i]) :] = 1
            device = model.backbone.device
            with model.backbone.precision():
                out = model.hf.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=sorted(tokenizer.turn_ends),
                    pad_token_id=tokenizer.turn_end,
                    repetition_penalty=1.0,
                    **choice,
                )
            for row, i in enumerate(part):
                found[i] = _cut(tokenizer, encoded[i], out[row, longest:].tolist())
            on_done(len(found))
    finally:
        model.backbone.use_packed(packed)
    return [found[i] for i in range(len(prompts))]


def _cut(tokenizer: ChatTokenizer, prompt: list[int], ids: list[int]) -> Generated:
    """Everything up to and including the first end-of-turn token."""
    end = next((i for i, token in enumerate(ids) if token in tokenizer.turn_ends), None)
    kept = ids if end is None else ids[: end + 1]
    return Generated(tuple(prompt), tuple(kept), tokenizer.decode(kept).strip(), end is not None)
