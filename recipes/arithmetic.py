"""Sums of two numbers, and a model that knows nothing: all that `preftune train sft` and then `grpo` or `ppo` need to be seen learning.

    python recipes/arithmetic.py runs/arithmetic
    cd runs/arithmetic
    preftune train sft model=model data=shown.jsonl output=sft prompts_per_step=64 max_steps=700 epochs=9 lr=2e-3
    preftune train grpo model=sft/final data=questions.jsonl judge=final_answer output=grpo rollout.max_new_tokens=6 lr=2e-4

The model is a Llama of half a million weights, drawn at random, and its tokenizer has a token for each character: minutes on one core.
`shown.jsonl` holds ten answers to each question: right, but that the one is mostly not carried. Imitation learns that mistake with the
rest; a rule that knows the right answer unteaches it. `questions.jsonl` holds the same questions, `held-out.jsonl` others of their kind.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<|end|>", "<|user|>", "<|assistant|>")
CHARACTERS = "0123456789+="
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, and those that mark turns."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="<|end|>", pad_token="<|end|>", additional_special_tokens=list(SPECIAL[2:])
    )
    made.chat_template = TEMPLATE
    return made


def model(seed: int, width: int = 128, layers: int = 2) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def questions(largest: int, seed: int) -> list[tuple[int, int]]:
    """All pairs of numbers up to `largest`, shuffled."""
    pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1)]
    random.Random(seed).shuffle(pairs)
    return pairs


def shown(a: int, b: int, forgets: float, chance: random.Random) -> int:
    """What a demonstrator answers, who forgets to carry the one in this share of the sums that ask for it."""
    carries = a % 10 + b % 10 >= 10
    return a + b - 10 * (carries and chance.random() < forgets)


def record(a: int, b: int, answer: int) -> dict[str, object]:
    """A question, the answer that is shown, and the right one, which a rule compares with."""
    said = [{"role": "user", "content": f"{a}+{b}="}, {"role": "assistant", "content": str(answer)}]
    return {"messages": said, "reference_answer": str(a + b)}


def write(folder: Path, *, largest: int = 49, held_out: int = 300, forgets: float = 0.75, seed: int = 0) -> Path:
    """Model, tokenizer, questions to learn from and questions held out."""
    folder.mkdir(parents=True, exist_ok=True)
    model(seed).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    pairs, chance = questions(largest, seed), random.Random(seed)
    _lines(folder / "held-out.jsonl", [record(a, b, a + b) for a, b in pairs[:held_out]])
    _lines(folder / "questions.jsonl", [record(a, b, a + b) for a, b in pairs[held_out:]])
    _lines(folder / "shown.jsonl", [record(a, b, shown(a, b, forgets, chance)) for _ in range(10) for a, b in pairs[held_out:]])
    return folder


def _lines(path: Path, rows: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--largest", type=int, default=49, help="largest number in a question")
    parser.add_argument("--forgets", type=float, default=0.75, help="share of the sums with a carry that are shown without it")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the questions' order")
    options = parser.parse_args()
    print(write(options.folder, largest=options.largest, forgets=options.forgets, seed=options.seed))
