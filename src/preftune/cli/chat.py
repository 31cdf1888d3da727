"""`preftune chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.packing.chat import ChatTokenizer
from preftune.records import Message
from preftune.rollout.engine import Engine
from preftune.rollout.sampling import Sampling
from preftune.training.setup import compute_dtype


def chat(model: str, sampling: Sampling, seed: int = 0) -> int:
    """Read a line, answer it as the words come, remember the conversation. Works through a pipe, too.

    An empty line starts afresh, end of input leaves.
    """
    console = Console()
    source = load.locate(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with console.status(f"loading {source.name}"):
        tokenizer = load.load_tokenizer(source)
        policy = LanguageModel(load.load_causal_lm(source), compute=compute_dtype("auto", device)).to(device)
        tokenizer.turn_ends |= frozenset(load.eos_ids(policy.hf))
    if sys.stdin.isatty():
        console.print("Write a message. An empty line starts a new conversation; Ctrl-D leaves.", style="dim")
    turns: list[Message] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not text.strip():
            turns = []
            continue
        turns.append(Message("user", text))
        turns.append(Message("assistant", answer(policy, tokenizer, turns, sampling, seed, _write)))
        _write("\n")


def answer(
    policy: LanguageModel, tokenizer: ChatTokenizer, turns: Sequence[Message], sampling: Sampling, seed: int, write: Callable[[str], None]
) -> str:
    """One response to a conversation, handed to `write` piece by piece as it is drawn; returns all of it."""
    ids: list[int] = []
    shown = ""

    def show(prompt: int, number: int, token: int) -> None:
        nonlocal shown
        ids.append(token)
        text = tokenizer.decode(ids).lstrip()
        whole = text.rstrip("\N{REPLACEMENT CHARACTER} \n")  # a letter may be several tokens; space at the end may be cut
        if whole.startswith(shown):
            write(whole[len(shown) :])
            shown = whole

    engine = Engine(policy, tokenizer.turn_ends, tokenizer.decode, on_token=show)
    (one,) = engine.generate([tokenizer.encode_prompt(tuple(turns))], 1, sampling, seed)
    text = tokenizer.decode(one.ids)[: one.text_end].strip()
    if text.startswith(shown):
        write(text[len(shown) :])
    return text


def _write(text: str) -> None:
    """To the terminal at once, as it stands."""
    sys.stdout.write(text)
    sys.stdout.flush()
