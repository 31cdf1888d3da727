"""Draws from known distributions: frequencies by chi-square, truncation beside transformers' own processors, edges of the inverse CDF."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from preftune.errors import UserError
from preftune.rollout.sampling import BLOCK, Sampling, draw, penalise, uniforms

ROWS = 40_000


def law(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None) -> torch.Tensor:
    """[V] the distribution that transformers' processors make of [V] logits."""
    from transformers import LogitsProcessorList
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    ids = torch.zeros((1, 0), dtype=torch.long) if seen is None else seen.nonzero().T
    return steps(ids, logits[None].clone())[0].softmax(-1)


KINDS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.6),
    Sampling(top_k=5),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=0.7, top_k=9, top_p=0.6),
    Sampling(temperature=1.3, top_p=0.95, min_p=0.05),
    Sampling(repetition_penalty=1.5),
    Sampling(temperature=0.8, top_p=0.9, repetition_penalty=0.7),
]


@pytest.mark.parametrize("vocabulary", [17, BLOCK, 200])
@pytest.mark.parametrize("sampling", KINDS, ids=str)
def test_frequencies_follow_the_law_of_transformers_processors(sampling: Sampling, vocabulary: int) -> None:
    logits = 2 * torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    seen = torch.arange(vocabulary) % 3 == 0 if sampling.repetition_penalty != 1 else None
    expected = law(logits, sampling, seen).double()
    uniform = torch.from_numpy(np.random.default_rng(0).random(ROWS))
    marks = None if seen is None else seen.expand(ROWS, -1)
    tokens, logp, drawn = draw(logits.expand(ROWS, -1).contiguous(), uniform, sampling, marks)
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert counts[expected == 0].sum() == 0
    often = expected * ROWS > 5
    rest = ~often & (expected > 0)
    found, wanted = counts[often], expected[often] * ROWS
    if rest.any():
        found, wanted = torch.cat([found, counts[rest].sum()[None]]), torch.cat([wanted, expected[rest].sum()[None] * ROWS])
    if len(found) > 1:
        assert chisquare(found.numpy(), (wanted * found.sum() / wanted.sum()).numpy()).pvalue > 1e-3
    torch.testing.assert_close(drawn.double(), expected.log()[tokens], atol=2e-5, rtol=0)
    torch.testing.assert_close(logp, logits.log_softmax(-1)[tokens], atol=2e-6, rtol=1e-6)


def test_the_inverse_cdf_is_that_of_the_definition() -> None:
    """Token k where the cumulative probability up to k first exceeds u."""
    logits = torch.randn(300, 130, generator=torch.Generator().manual_seed(1))
    uniform = torch.from_numpy(np.random.default_rng(1).random(300))
    tokens, _, _ = draw(logits, uniform, Sampling())
    expected = (logits.double().softmax(-1).cumsum(-1) <= uniform.unsqueeze(1)).sum(1)
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("sampling", KINDS, ids=str)
def test_logits_in_bf16_are_the_numbers_they_stand_for(sampling: Sampling) -> None:
    logits = 3 * torch.randn(300, 130, generator=torch.Generator().manual_seed(3)).bfloat16()
    uniform = torch.from_numpy(np.random.default_rng(3).random(300))
    seen = torch.arange(130).expand(300, -1) % 3 == 0 if sampling.repetition_penalty != 1 else None
    found, expected = (draw(values, uniform, sampling, seen) for values in (logits, logits.float()))
    assert torch.equal(found[0], expected[0]) and found[1].dtype == found[2].dtype == torch.float32
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_a_uniform_at_either_end_never_draws_what_cannot_be_drawn() -> None:
    logits = torch.full((2, 3 * BLOCK), -torch.inf)
    logits[:, [BLOCK + 3, BLOCK + 9]] = 0.0
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for sampling in (Sampling(), Sampling(top_p=0.99), Sampling(top_k=2)):
        tokens, logp, drawn = draw(logits.clone(), edges, sampling)
        assert set(tokens.tolist()) <= {BLOCK + 3, BLOCK + 9}
        assert logp.exp().tolist() == pytest.approx([0.5, 0.5]) and drawn.exp().tolist() == pytest.approx([0.5, 0.5])


def test_a_nucleus_wider_than_the_candidates_is_sorted_whole() -> None:
    flat = torch.zeros(1, 5000)
    tokens = {int(draw(flat, torch.tensor([u], dtype=torch.float64), Sampling(top_p=0.9))[0]) for u in np.linspace(0, 0.999, 40)}
    assert len(tokens) == 40
    _, _, drawn = draw(flat, torch.tensor([0.5], dtype=torch.float64), Sampling(top_p=0.9))
    assert drawn.exp().item() == pytest.approx(1 / 4500, rel=1e-3)
    _, _, drawn = draw(flat, torch.tensor([0.5], dtype=torch.float64), Sampling(min_p=0.5))
    assert drawn.exp().item() == pytest.approx(1 / 5000, rel=1e-3)


def test_greedy_takes_the_likeliest_and_its_draw_is_certain() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(2))
    tokens, logp, drawn = draw(logits, torch.zeros(5, dtype=torch.float64), Sampling(temperature=0))
    assert torch.equal(tokens, logits.argmax(1)) and not drawn.any()
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(1))
    seen = torch.nn.functional.one_hot(tokens, 40).bool()
    other, _, _ = draw(logits, torch.zeros(5, dtype=torch.float64), Sampling(temperature=0, repetition_penalty=9.0), seen)
    assert torch.equal(other, penalise(logits, seen, 9.0).argmax(1)) and (other != tokens).any()


def test_uniform_numbers_depend_on_seed_prompt_and_number_alone() -> None:
    one = uniforms(3, [5, 6, 7], 2, 10)
    assert np.array_equal(one, uniforms(3, [5, 6, 7], 2, 10)) and np.array_equal(one[:4], uniforms(3, [5, 6, 7], 2, 4))
    for other in (uniforms(4, [5, 6, 7], 2, 10), uniforms(3, [5, 6], 2, 10), uniforms(3, [5, 6, 7], 1, 10)):
        assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_a_setting_out_of_range_is_one_line(wrong: dict, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is .* it must be"):
        Sampling(**wrong)
