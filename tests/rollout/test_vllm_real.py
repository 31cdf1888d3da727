"""vLLM itself: minutes, so `PREFTUNE_VLLM_PYTHON=.../bin/python pytest -m slow tests/rollout/test_vllm_real.py` runs it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preftune import formats
from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.models.save import save_model
from preftune.rollout.agreement import agreement
from preftune.rollout.config import VllmConfig
from preftune.rollout.engine import Engine
from preftune.rollout.sampling import Sampling, penalise
from preftune.rollout.vllm import VllmServer

PYTHON = os.environ.get("PREFTUNE_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.skipif(not PYTHON, reason="PREFTUNE_VLLM_PYTHON names no Python with vLLM"),
]
NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Mean difference of log-probabilities that is rounding."""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server, the model and tokenizer that it serves, prompts, and what was said."""
    source = load.locate("smollm2")
    tokenizer, model = load.load_tokenizer(source), LanguageModel(load.load_causal_lm(source), compute=request.param)
    folder = tmp_path_factory.mktemp("model") / "smollm2"
    save_model(model, tokenizer, folder)
    found = formats.read_prompts(["sample:hh_pairs"], limit=40).examples
    prompts = [ids for e in found if len(ids := tokenizer.encode_prompt(e.prompt)) <= 200][:6]
    said: list[str] = []
    config = VllmConfig(python=PYTHON, arguments=("--enforce-eager", "--max-model-len", "1024"))
    with VllmServer(config, str(folder), tokenizer.turn_ends, tokenizer.decode, compute=request.param, say=said.append) as server:
        yield server, model, tokenizer, prompts, said


def paired(prompts: Any, samples: Any) -> Any:
    return [(prompts[one.prompt], one) for one in samples]


def test_log_probabilities_are_the_trainer_s(sides: Any) -> None:
    server, model, tokenizer, prompts, _ = sides
    noise = NOISE[model.backbone.compute]
    for sampling in (Sampling(24), Sampling(24, 0.7, 0.9, 50, 0.0, 1.1), Sampling(24, 0.0), Sampling(48, 0.6, stop=("the", "\n"))):
        found = list(server.generate(prompts, 2, sampling, 3))
        assert len(found) == 12
        agreed = agreement(model, paired(prompts, found))
        print(f"\n{sampling}: {agreed}")
        assert agreed.mean < noise and agreed.k3 < noise
        for one in found:
            ended = one.ids[-1] in tokenizer.turn_ends
            assert (one.finish == "stop") == (ended or one.text_end is not None) and not tokenizer.turn_ends & set(one.ids[:-1])
            if one.text_end is not None:
                assert tokenizer.decode(one.ids)[one.text_end :].startswith(("the", "\n"))
        again = {(s.prompt, s.number): s.ids for s in server.generate(prompts, 2, sampling, 3)}
        assert sum(again[s.prompt, s.number] == s.ids for s in found) >= 10, "the same seed draws the same but for rounding"


def test_the_shaped_distribution_is_ours(sides: Any) -> None:
    server, model, _, prompts, _ = sides
    sampling = Sampling(24, 0.7, 0.9, 50, 0.0, 1.1)
    (one,) = server.generate(prompts[:1], 1, sampling, 3)
    model.backbone.use_packed(False)
    with torch.no_grad(), model.backbone.precision():
        logits = model.hf(torch.tensor([[*prompts[0], *one.ids]])).logits[0].float()
    model.backbone.use_packed(True)
    worst = 0.0
    for k, token in enumerate(one.ids):
        before, row = [*prompts[0], *one.ids[:k]], logits[len(prompts[0]) + k - 1][None]
        seen = torch.zeros_like(row, dtype=torch.bool)
        seen[0, torch.tensor(before)] = True
        values, ids = (penalise(row, seen, 1.1) / 0.7).topk(50)
        share = values.softmax(1)
        told = values.masked_fill(share.cumsum(1) - share >= 0.9, -torch.inf).log_softmax(1)[ids == token]
        worst = max(worst, abs(float(told[0]) - float(one.drawn_logp[k])) if len(told) else np.inf)
    if model.backbone.compute == torch.float32:
        assert worst < 1e-3


def test_greedy_is_ours(sides: Any) -> None:
    server, model, tokenizer, prompts, _ = sides
    if model.backbone.compute != torch.float32:
        pytest.skip("in bf16 rounding decides between likely tokens")
    theirs = {s.prompt: s.ids for s in server.generate(prompts, 1, Sampling(24, 0.0))}
    assert theirs == {s.prompt: s.ids for s in Engine(model, tokenizer.turn_ends).generate(prompts, 1, Sampling(24, 0.0))}


def test_a_server_that_is_killed_loses_nothing(sides: Any) -> None:
    server, model, _, prompts, said = sides
    found = []
    for one in server.generate(prompts, 4, Sampling(24), 5):
        found.append(one)
        if len(found) == 5:
            os.killpg(server.service.child._process.pid, signal.SIGKILL)
    assert len({(s.prompt, s.number) for s in found}) == len(found) == 24 and "it is started again" in said[-1]
    assert agreement(model, paired(prompts, found)).mean < NOISE[model.backbone.compute]


def test_new_weights_arrive_and_old_ones_would_be_noticed(sides: Any, tmp_path: Path) -> None:
    server, model, tokenizer, prompts, said = sides
    noise = NOISE[model.backbone.compute]
    said.clear()
    assert server.push(model, tokenizer, tmp_path).mean < noise
    generator = torch.Generator().manual_seed(0)
    for size in (0.003, 0.1):
        with torch.no_grad():
            for parameter in model.hf.parameters():
                parameter += size * parameter.std() * torch.randn(parameter.shape, generator=generator)
        if size == 0.1:
            from preftune.errors import UserError

            with pytest.raises(UserError, match="does not serve the new weights"):
                server.prove(model, tokenizer)
        agreed = server.push(model, tokenizer, tmp_path)
        print(f"\nafter a step of {size}: {agreed}")
        assert agreed.mean < noise
        assert agreement(model, paired(prompts, server.generate(prompts, 1, Sampling(12), 3))).mean < noise, "no old key or value is left"
    assert said == [], "none of it needed a new start"
    os.killpg(server.service.child._process.pid, signal.SIGKILL)
    found = list(server.generate(prompts, 1, Sampling(12), 9))
    assert agreement(model, paired(prompts, found)).mean < noise, "started again, it has the newest weights"
