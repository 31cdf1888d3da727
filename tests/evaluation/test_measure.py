"""Measurements of models on records, against sums by hand and enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preftune.evaluation.generate import generate
from preftune.evaluation.measure import pair_margins, sequence_kl, token_logps
from preftune.models.attention import NAME
from preftune.models.policy import LanguageModel
from preftune.models.values import response_values
from preftune.packing.chat import ChatTokenizer
from preftune.records import Message
from tests import tiny

TREES = [tiny.tree(6, (4, 7), seed=1), tiny.tree(3, (5, 2, 3), seed=2)]


def policy(seed=0, scale=4.0):
    inner = tiny.model(seed=seed, scale=scale)
    inner.set_attn_implementation(NAME)
    return LanguageModel(inner)


def test_values_are_sums_of_token_logps_whatever_the_budget():
    model = policy()
    sums = response_values(model, TREES, budget=10)
    for tokens, values, tree in zip(token_logps(model, TREES, budget=1000), sums, TREES, strict=True):
        parts = np.split(tokens, np.cumsum([len(r) for r in tree.responses])[:-1])
        np.testing.assert_allclose([p.sum() for p in parts], values, rtol=1e-5)


def test_margins_follow_the_preference():
    margins, owners = pair_margins([np.array([1.0, 3.0]), np.array([5.0, 1.0, 2.0])], TREES)
    assert margins.tolist() == [-2.0, 4.0, 3.0, -1.0] and owners == [0, 1, 1, 1]


def test_sequence_kl_is_unbiased_by_enumeration():
    """methods.md 0.5: pi = (.5, .5), ref = (.8, .2): the mean of k3 under pi is KL = 0.223144."""
    pi, ref = np.log([0.5, 0.5]), np.log([0.8, 0.2])
    estimates = sequence_kl([pi[:1], pi[1:]], [ref[:1], ref[1:]])
    assert estimates == pytest.approx([0.129996, 0.316291], abs=1e-6)
    assert estimates.mean() == pytest.approx(0.223144, abs=1e-6)
    assert sequence_kl([pi], [pi]) == pytest.approx([0.0])


def test_generation_is_greedy_stops_at_the_end_of_a_turn_and_ignores_batch_mates():
    model, tokenizer = policy(), ChatTokenizer(tiny.tokenizer())
    prompts = [(Message("user", "hello there"),), (Message("user", "a"),), "plain text, as it stands"]
    together = generate(model, tokenizer, prompts, max_new_tokens=12)
    alone = [generate(model, tokenizer, [p], max_new_tokens=12)[0] for p in prompts]
    assert [g.ids for g in together] == [g.ids for g in alone]
    for found in together:
        assert tokenizer.turn_end not in found.ids[:-1] and found.finished == (found.ids[-1] in tokenizer.turn_ends)
        ids = torch.tensor([[*found.prompt_ids, *found.ids]])
        model.backbone.use_packed(False)
        best = model.hf(input_ids=ids).logits[0, len(found.prompt_ids) - 1 : -1].argmax(-1)
        model.backbone.use_packed(True)
        assert best.tolist() == list(found.ids)


def test_sampling_is_seeded():
    model, tokenizer = policy(scale=1.0), ChatTokenizer(tiny.tokenizer())
    draw = lambda seed: generate(model, tokenizer, ["abc"], max_new_tokens=10, temperature=1.0, seed=seed)[0].ids
    assert draw(1) == draw(1) and draw(1) != draw(2)
