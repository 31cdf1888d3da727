"""The engine on the real small model and real prompts: minutes, so `pytest -m slow tests/rollout` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from preftune import formats
from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.rollout.engine import Engine
from preftune.rollout.sampling import Sampling

COUNT, TOKENS = 200, 24


@pytest.mark.slow
def test_greedy_is_transformers_greedy_on_real_prompts(shared_data: Path) -> None:
    """Where they part, it is at two tokens whose logits rounding cannot tell apart (1e-4)."""
    source = load.locate("smollm2")
    tokenizer, model = load.load_tokenizer(source), LanguageModel(load.load_causal_lm(source))
    found = formats.read_prompts([shared_data / "hh" / "helpful_base_test.jsonl.gz"], on_error="skip", limit=COUNT + 50)
    prompts = [ids for e in found.examples if len(ids := tokenizer.encode_prompt(e.prompt)) <= 400][:COUNT]
    assert len(prompts) == COUNT
    ours = {s.prompt: s.ids for s in Engine(model, tokenizer.turn_ends).generate(prompts, 1, Sampling(TOKENS, 0.0))}
    model.backbone.use_packed(False)
    differ = []
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        told = model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, eos_token_id=sorted(tokenizer.turn_ends),
            pad_token_id=0, repetition_penalty=1.0,
        )[0, len(prompt) :].tolist()  # fmt: skip
        if told != list(ours[i]):
            at = next(k for k, (a, b) in enumerate(zip(told, ours[i], strict=False)) if a != b)
            with torch.no_grad():
                logits = model.hf(torch.tensor([prompt + told[:at]])).logits[0, -1]
            differ.append((i, abs(logits[told[at]] - logits[ours[i][at]]).item()))
    assert len(differ) <= 2 and all(gap < 1e-4 for _, gap in differ), differ
