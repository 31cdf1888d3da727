"""A policy whose responses can all be written down: a vocabulary of ten tokens, responses of at most two, and a score for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from preftune.training.metrics import read_metrics
from tests import tiny
from tests.training import runs

END = 2
VOCABULARY = ("<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>", "a", "b", "c", "p", "q")
PROMPTS = ("p", "q")
TEMPLATE = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"

RULE = '''import hashlib


def rule(example, response, less=0.0):
    """A number in [0, 1] that the prompt and the text decide, and nothing smooth about it; less a constant."""
    text = example.prompt[-1].content + response.text
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32 - less
'''

JUDGES = '''def proxy(example, response):
    """How often the letter is there."""
    return response.text.count("a")


def gold(example, response):
    """The letter is welcome, but not beside itself."""
    pairs = sum(x == y == "a" for x, y in zip(response.text, response.text[1:]))
    return response.text.count("a") - 1.5 * pairs
'''
"""A proxy that is right at first: while the letter is rare, more of it is better."""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter."""
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="<|end|>", pad_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def place(folder: Path, scale: float = 1.0) -> Path:
    """The model, its prompts and the rule in a folder."""
    tiny.model(vocab_size=len(VOCABULARY), num_hidden_layers=1, scale=scale, tie_word_embeddings=False).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    (folder / "judges.py").write_text(JUDGES)
    return folder


def responses(length: int) -> list[tuple[int, ...]]:
    """All there are of at most so many tokens: those that end, and those that are cut."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(length):
        found = [(*one, token) if END not in one else one for one in found for token in range(len(VOCABULARY))]
        found = list(dict.fromkeys(found))
    return found


@dataclass
class Exact:
    """Log-probabilities of all tokens in all states, in float64: [P, V] of first tokens, and [P, V, V] of second ones."""

    first: Tensor
    second: Tensor

    def of(self, length: int) -> Tensor:
        """[P, R] probabilities of `responses(length)`."""
        found = []
        for one in responses(length):
            logp = self.first[:, one[0]] + (self.second[:, one[0], one[1]] if len(one) > 1 else 0.0)
            found.append(logp.exp())
        return torch.stack(found, 1)


@torch.no_grad()
def exact(model: Path, temperature: float = 1.0) -> Exact:
    """What plain transformers says of the model, at this temperature."""
    words, causal = tokenizer(), AutoModelForCausalLM.from_pretrained(model).double().eval()
    first, second = [], []
    for prompt in PROMPTS:
        text = words.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        ids = words(text, add_special_tokens=False).input_ids
        rows = torch.tensor([[*ids, token] for token in range(len(VOCABULARY))])
        logp = (causal(rows).logits / temperature).log_softmax(-1)
        first.append(logp[0, -2])
        second.append(logp[:, -1])
    return Exact(torch.stack(first), torch.stack(second))


def rewards(folder: Path, length: int) -> Tensor:
    """[P, R] what the rule gives to each of `responses(length)`."""
    from preftune.records import Example, Message, Response
    from preftune.rewards.rules import find

    rule, words = find(f"{folder}/rule.py:rule", {}).score, tokenizer()
    texts = [words.decode(one, skip_special_tokens=True) for one in responses(length)]
    asked = [Example((Message("user", prompt),), ()) for prompt in PROMPTS]
    return torch.tensor([[rule(example, Response(text)) for text in texts] for example in asked], dtype=torch.float64)


def total_variation(one: Tensor, other: Tensor) -> float:
    """The larger of the prompts' distances."""
    return float((one - other).abs().sum(1).max() / 2)


def train(folder: Path, output: Path, method: str, **settings: object) -> Path:
    """`preftune train` of an online method on the toy; the final model's folder."""
    words: dict[str, object] = {
        "model": folder / "model", "data": folder / "prompts.jsonl", "output": output, "judge": f"{folder}/rule.py:rule",
        "rollout.max_new_tokens": 1, "rollout.prompts": len(PROMPTS), "prompts_per_step": len(PROMPTS), "max_length": 16,
        "tokens_per_microbatch": 4096, "schedule": "cosine", "min_lr_ratio": 0.02, "precision": "fp32", "device": "cpu", "threads": 1,
        "save_every": "null", "keep_responses": "null", "method.missing_eos": "keep",
    }  # fmt: skip
    assert runs.train([method, *(f"{key}={value}" for key, value in (words | settings).items())]) == 0
    return output / "final"


def exploit(folder: Path, output: Path, **more: object) -> list[dict[str, Any]]:
    """The rows, a rollout each, of a run that learns the proxy while the gold score is watched."""
    settings: dict[str, object] = {
        "judge": f"{folder}/judges.py:proxy", "gold": f"{folder}/judges.py:gold", "rollout.max_new_tokens": 8, "rollout.n": 256,
        "epochs": 54, "lr": 8e-4, "schedule": "constant", "min_lr_ratio": 0.1, "method.kl": 0,
    }  # fmt: skip
    train(folder, output, "grpo", **settings | more)
    return [row for row in read_metrics(output / "metrics.jsonl") if row["kind"] == "train"]
