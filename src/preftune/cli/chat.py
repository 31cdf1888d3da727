"""`preftune chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys

import torch
from rich.console import Console

from preftune.evaluation.generate import generate
from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.records import Message
from preftune.training.setup import compute_dtype

MAX_NEW_TOKENS = 256


def chat(model: str) -> int:
    """Read a line, answer it, remember the conversation; an empty line starts afresh, end of input leaves. Works through a pipe, too."""
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
        with console.status("..."):
            response = generate(policy, tokenizer, [tuple(turns)], max_new_tokens=MAX_NEW_TOKENS)[0]
        turns.append(Message("assistant", response.text))
        console.print(response.text, markup=False, highlight=False)
