"""A tokenizer and small random models, made in-process: no download anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from preftune.packing.chat import SCORE, Tree

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ("<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")

_SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {},
}
"""Every family that is promised, with what makes it special switched on."""


def tokenizer(*, template: str | None = TEMPLATE, bos: bool = False, pad: str = "<|end|>") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 320 tokens; pad is the end-of-turn token unless another is named, as many models have it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("i", "n"), ("a", "n"), ("Ġ", "a"), (".", "Ċ"), ("Ċ", "Ċ"), (":", "Ġ")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        from tokenizers.processors import TemplateProcessing

        inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token=pad,
        additional_special_tokens=list(SPECIAL[3:]),
    )
    fast.chat_template = template
    return fast


def model(kind: str = "llama", *, seed: int = 0, scale: float = 4.0, **changes: Any) -> Any:
    """A random causal LM with weights large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**_SMALL, **ARCHITECTURES.get(kind, {}), **changes})
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, changes.get("pad_token_id", 2)
    from preftune.models.load import without_dropout

    without_dropout(config)
    made = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(scale)
    return made


def save(path: Path, kind: str = "llama", **options: Any) -> Path:
    """A model directory that every loader takes."""
    model(kind, **options).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def tree(prompt: int, responses: tuple[int, ...], *, seed: int = 0, vocab: int = 320, name: str = "") -> Tree:
    """A tree of random tokens; the first response is the best, rated 1 and labelled desirable, each next one is rated a quarter less."""
    rng = np.random.default_rng(seed)
    n = len(responses)
    scores = -np.arange(n, dtype=float)
    draw = lambda size: rng.integers(7, vocab, size)
    ids = tuple(draw(r) for r in responses)
    order = np.triu(np.ones((n, n)), 1)
    said: dict[str, Any] = {"labels": (scores == 0).astype(float), "ratings": {SCORE: scores / 4 + 1.0}}
    return Tree(name or f"t{seed}", "", draw(prompt), ids, (True,) * n, scores, order, **said)
