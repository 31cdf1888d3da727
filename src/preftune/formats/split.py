"""Held-out data, cut by prompt: rows that share a prompt are dependent and must stay on one side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from preftune.errors import UserError
from preftune.formats.dataset import digest
from preftune.records import Example


def prompt_key(example: Example) -> str:
    """16 hexadecimal digits that stand for the prompt alone.

    Blanks around a turn do not count, and a plain string counts as one user turn: the same question is the same prompt.
    """
    prompt = example.prompt
    turns = [("user", prompt)] if isinstance(prompt, str) else [(turn.role, turn.content) for turn in prompt]
    return digest([[role, text.strip()] for role, text in turns])


def split_by_prompt(examples: Iterable[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(train, held out): `fraction` of the *prompts*, rounded, at least one on either side, with all their rows held out.

    Which prompts depends on the seed and the prompts alone, not on the order or number of rows; both sides keep their order.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}", fix="Give a number between 0 and 1")
    kept = [(prompt_key(example), example) for example in examples]
    prompts = {key for key, _ in kept}
    if len(prompts) < 2:
        raise UserError(f"there are {len(prompts)} different prompts, too few to hold some out", fix="Give eval_data, or more prompts")
    count = min(max(round(fraction * len(prompts)), 1), len(prompts) - 1)
    held = set(sorted(prompts, key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).digest())[:count])
    return [example for key, example in kept if key not in held], [example for key, example in kept if key in held]
