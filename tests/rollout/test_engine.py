"""The local engine beside a fresh forward pass, transformers' own generation and the enumerated law of a small model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from preftune.errors import UserError
from preftune.models.attention import NAME
from preftune.models.lean import Joined, LeanLinear
from preftune.models.lora import Adapter
from preftune.models.policy import LanguageModel
from preftune.packing.batch import collate
from preftune.rollout.cache import Rows
from preftune.rollout.decoder import Decoder
from preftune.rollout.engine import Engine
from preftune.rollout.samples import Sample, as_tree
from preftune.rollout.sampling import Sampling
from preftune.rollout.weights import Together, prepared
from tests import tiny

ENDS = frozenset({2, 5, 9, 11, *range(40, 47)})
"""So many tokens end a turn that responses differ in length."""
PROMPTS = [np.random.default_rng(i).integers(7, 320, size).tolist() for i, size in enumerate((5, 19, 3, 12, 7, 5))]

ALIKE = [[*range(20, 32), *prompt] for prompt in PROMPTS]
"""The same behind what a template might put before all of them."""


def policy(kind: str = "llama", *, packed: bool = True, compute: torch.dtype = torch.float32, **changes: Any) -> LanguageModel:
    inner = tiny.model(kind, scale=2.0, **changes)
    inner.set_attn_implementation(NAME)
    return LanguageModel(inner, packed=packed, compute=compute)


def drawn(
    model: LanguageModel, sampling: Sampling, *, prompts: Sequence[Sequence[int]] = PROMPTS, n: int = 4, seed: int = 0, **options: Any
):
    """All samples by (prompt, number)."""
    engine = Engine(model, ENDS, **options)
    found = list(engine.generate(prompts, n, sampling, seed))
    assert len({(s.prompt, s.number) for s in found}) == len(found) == n * len(prompts)
    return {(s.prompt, s.number): s for s in found}


def fresh_logp(model: LanguageModel, prompts: Sequence[Sequence[int]], samples: dict[tuple[int, int], Sample]) -> float:
    """Largest difference between reported log-probabilities and those of a forward pass over the whole text."""
    worst = 0.0
    for i, prompt in enumerate(prompts):
        mine = [samples[key] for key in sorted(samples) if key[0] == i]
        with torch.no_grad():
            fresh = model(collate([as_tree(prompt, mine)])).numpy()
        worst = max(worst, float(np.abs(fresh - np.concatenate([s.logp for s in mine])).max()))
    return worst


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE], ids=["different prompts", "prompts that begin alike"])
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_reported_log_probabilities_are_those_of_a_fresh_forward_pass(kind: str, prompts: list[list[int]]) -> None:
    """Every family: sliding windows shorter than the text, soft caps, learned positions; groups that end at different times."""
    model = policy(kind)
    found = drawn(model, Sampling(max_new_tokens=40), prompts=prompts)
    assert len({len(s.ids) for s in found.values()}) > 4
    assert fresh_logp(model, prompts, found) < 1e-5
    assert all(np.allclose(s.logp, s.drawn_logp, atol=1e-5) for s in found.values())


@pytest.mark.parametrize(
    "changes", [{"cache_bytes": 1}, {"cache_bytes": 110_000}, {"order": [3, 1, 5, 0, 4, 2]}, {"packed": False}], ids=str
)
@pytest.mark.parametrize(
    "sampling",
    [Sampling(max_new_tokens=30), Sampling(30, 0.7, 0.9), Sampling(20, top_k=20, repetition_penalty=1.3), Sampling(30, 0.0)],
    ids=["whole", "nucleus", "penalty", "greedy"],
)
def test_a_response_is_the_same_whatever_its_batch_mates(sampling: Sampling, changes: dict) -> None:
    """Room for one prompt at a time, for three (shorter ones come while longer ones stay), other orders, and padded rows."""
    expected = drawn(policy(), sampling)
    order = changes.get("order", range(len(PROMPTS)))
    model = policy(packed=changes.get("packed", True))
    found = drawn(model, sampling, prompts=[PROMPTS[i] for i in order], cache_bytes=changes.get("cache_bytes", 2**30))
    for at, i in enumerate(order):
        for number in range(4):
            one, other = found[at, number], expected[i, number]
            assert (one.ids, one.finish) == (other.ids, other.finish)
            np.testing.assert_allclose(one.logp, other.logp, atol=1e-5)
            np.testing.assert_allclose(one.drawn_logp, other.drawn_logp, atol=1e-5)


def test_what_all_prompts_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    call = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, ids, *more: read.append(len(ids)) or call(self, ids, *more))
    together = drawn(policy(), Sampling(max_new_tokens=30), prompts=ALIKE)
    assert read[0] == 12 + sum(map(len, PROMPTS))
    alone = drawn(policy(), Sampling(max_new_tokens=30), prompts=ALIKE, cache_bytes=1)
    for key, one in together.items():
        assert (one.ids, one.finish) == (alone[key].ids, alone[key].finish)
        np.testing.assert_allclose(one.logp, alone[key].logp, atol=1e-5)


def test_in_bf16_too() -> None:
    model = policy(compute=torch.bfloat16, hidden_size=64, head_dim=16)
    found = drawn(model, Sampling(max_new_tokens=30), prompts=ALIKE)
    assert fresh_logp(model, ALIKE, found) < 0.2
    assert np.mean([np.abs(s.logp - t.logp).mean() for s, t in _same_texts(model, found)]) < 0.02


def _same_texts(model: LanguageModel, found: dict[tuple[int, int], Sample]) -> list[tuple[Sample, Sample]]:
    """Each response drawn together with all, beside itself drawn with one prompt at a time, where the texts are the same."""
    alone = drawn(model, Sampling(max_new_tokens=30), prompts=ALIKE, cache_bytes=1)
    pairs = [(found[key], alone[key]) for key in found if found[key].ids == alone[key].ids]
    assert len(pairs) > len(found) // 2
    return pairs


def test_seeds_and_numbers_give_other_responses_and_asked_numbers_the_same_ones() -> None:
    model = policy()
    all_of = drawn(model, Sampling(max_new_tokens=12))
    assert len({s.ids for key, s in all_of.items() if key[0] == 0}) > 1
    assert any(s.ids != all_of[key].ids for key, s in drawn(model, Sampling(max_new_tokens=12), seed=1).items())
    some = list(Engine(model, ENDS).generate(PROMPTS, 4, Sampling(max_new_tokens=12), numbers=[[3, 1], [], [0], [], [], [2]]))
    assert {(s.prompt, s.number) for s in some} == {(0, 3), (0, 1), (2, 0), (5, 2)}
    assert all(s.ids == all_of[s.prompt, s.number].ids for s in some)


def enumerated(
    model: LanguageModel, prompt: list[int], depth: int, ends: frozenset[int], temperature: float
) -> dict[tuple[int, ...], float]:
    """The probability of every response of at most `depth` tokens, by plain forward passes of the whole text."""
    model.backbone.use_packed(False)
    law: dict[tuple[int, ...], float] = {}
    open_: dict[tuple[int, ...], float] = {(): 1.0}
    for length in range(1, depth + 1):
        grown: dict[tuple[int, ...], float] = {}
        for ids, mass in open_.items():
            with torch.no_grad():
                share = (model.hf(torch.tensor([prompt + list(ids)])).logits[0, -1].double() / temperature).softmax(-1)
            for token, p in enumerate(share.tolist()):
                target = law if token in ends or length == depth else grown
                target[(*ids, token)] = mass * p
        open_ = grown
    model.backbone.use_packed(True)
    return law


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_responses_follow_the_enumerated_law_of_the_model(temperature: float) -> None:
    """All responses of up to three tokens over six tokens: chi-square of 12,000 draws."""
    model = policy(vocab_size=6)
    ends = frozenset({2})
    law = enumerated(model, [3, 4, 5], 3, ends, temperature)
    assert sum(law.values()) == pytest.approx(1)
    engine = Engine(model, ends)
    samples = engine.generate([[3, 4, 5]], 12_000, Sampling(max_new_tokens=3, temperature=temperature))
    counts = Counter(s.ids for s in samples)
    assert set(counts) <= set(law)
    common = [ids for ids in law if law[ids] * 12_000 >= 5]
    found = np.array([counts[ids] for ids in common] + [sum(counts.values()) - sum(counts[ids] for ids in common)], dtype=float)
    wanted = np.array([law[ids] for ids in common] + [1 - sum(law[ids] for ids in common)]) * 12_000
    keep = wanted > 0.5
    assert len(common) > 20 and chisquare(found[keep], wanted[keep] * found[keep].sum() / wanted[keep].sum()).pvalue > 1e-3


def test_greedy_is_transformers_greedy() -> None:
    model = policy()
    found = drawn(model, Sampling(40, 0.0), n=1)
    model.backbone.use_packed(False)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        told = model.hf.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, eos_token_id=sorted(ENDS), pad_token_id=0
        )
        assert found[i, 0].ids == tuple(told[0, len(prompt) :].tolist())


def test_a_response_ends_at_any_of_the_end_tokens_at_the_limit_or_at_a_stop_text() -> None:
    model = policy()
    found = drawn(model, Sampling(max_new_tokens=15))
    for sample in found.values():
        assert not ENDS & set(sample.ids[:-1])
        assert (sample.finish == "stop") == (sample.ids[-1] in ENDS)
        assert sample.finish == "stop" or len(sample.ids) == 15
    decode = lambda ids: "".join(chr(65 + t % 26) for t in ids)
    stops = Sampling(max_new_tokens=15, stop=("Q", "AB"))
    cut = drawn(model, stops, decode=decode)
    assert any(s.text_end is not None for s in cut.values())
    for key, sample in cut.items():
        text, whole = decode(sample.ids), decode(found[key].ids)
        at = [whole.find(stop) for stop in stops.stop if stop in whole]
        if sample.text_end is None:
            assert sample.ids == found[key].ids and not any(stop in text[:-1] for stop in stops.stop)
        else:
            assert sample.finish == "stop" and sample.text_end == min(at) and whole.startswith(text)


def test_the_window_cuts_and_a_prompt_that_fills_it_is_refused_before_anything_is_drawn() -> None:
    model = policy(max_position_embeddings=16)
    found = list(Engine(model, frozenset()).generate([[7, 8, 9], list(range(20, 34))], 2, Sampling(max_new_tokens=40)))
    assert sorted(len(s.ids) for s in found) == [2, 2, 13, 13] and {s.finish for s in found} == {"length"}
    for prompts, words in (([[7], list(range(20, 36))], "prompt 2: .*window of 16"), ([[]], "prompt 1: .*no token")):
        with pytest.raises(UserError, match=words):
            list(Engine(model, ENDS).generate(prompts, 1, Sampling()))


def test_tokens_are_told_as_they_come_and_giving_up_keeps_what_has_ended() -> None:
    told: dict[tuple[int, int], list[int]] = {}
    model = policy()
    found = drawn(model, Sampling(max_new_tokens=20), on_token=lambda i, n, token: told.setdefault((i, n), []).append(token))
    assert {key: tuple(ids) for key, ids in told.items()} == {key: s.ids for key, s in found.items()}
    steps = itertools.count()
    some = list(Engine(model, ENDS).generate(PROMPTS, 4, Sampling(max_new_tokens=20), give_up=lambda: next(steps) == 6))
    assert 0 < len(some) < len(found) and all(s.ids == found[s.prompt, s.number].ids for s in some)


def test_regression_16_an_adapter_speaks_in_the_rollout() -> None:
    """After a large change of the adapter sampler and trainer agree, and both say something else than before."""
    model = policy()
    adapter = Adapter(model.hf, rank=4, alpha=8.0, dropout=0.0, targets="all-linear")
    before = drawn(model, Sampling(max_new_tokens=10))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    after = drawn(model, Sampling(max_new_tokens=10))
    assert fresh_logp(model, PROMPTS, after) < 1e-5 and any(after[key].ids != before[key].ids for key in after)
    with adapter.off():
        assert all(s.ids == before[key].ids for key, s in drawn(model, Sampling(max_new_tokens=10)).items())


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_regression_14_the_drawing_distribution_is_reported_beside_temperature_1(temperature: float) -> None:
    model = policy()
    found = drawn(model, Sampling(max_new_tokens=12, temperature=temperature, top_p=0.9), n=2)
    model.backbone.use_packed(False)
    for (i, _), sample in found.items():
        with torch.no_grad():
            z = model.hf(torch.tensor([PROMPTS[i] + list(sample.ids)])).logits[0, len(PROMPTS[i]) - 1 : -1]
        at = torch.tensor(sample.ids).unsqueeze(1)
        np.testing.assert_allclose(sample.logp, z.log_softmax(-1).gather(1, at).squeeze(1), atol=1e-5)
        share, order = (z / temperature).softmax(-1).sort(descending=True)
        kept = torch.zeros_like(share).scatter(1, order, share * (share.cumsum(1) - share < 0.9))
        np.testing.assert_allclose(sample.drawn_logp, (kept / kept.sum(1, keepdim=True)).gather(1, at).squeeze(1).log(), atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_prepared_weights_give_the_products_of_plain_ones(bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 40, bias=bias)
    x = torch.randn(3, 48)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = layer(x)
    with torch.no_grad(), prepared(torch.nn.Sequential(layer), torch.bfloat16):
        fast = layer(x)
    assert fast.dtype == plain.dtype == torch.bfloat16 and (fast.float() - plain.float()).abs().max() < 0.02
    assert (layer(x) - plain.float()).abs().max() < 0.02 and layer(x).dtype == torch.float32


def test_layers_that_read_the_same_states_share_a_product_and_others_do_not_get_it() -> None:
    """Biases on some only, layers asked in another order, twice, and with other states; nothing is kept once all were asked."""
    torch.manual_seed(0)
    block = torch.nn.ModuleDict(
        {f"{name}_proj": torch.nn.Linear(16, size, bias=name != "k") for name, size in zip("qkv", (24, 8, 8), strict=True)}
    )
    x, other = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    asked = [("q", x), ("k", x), ("v", x), ("v", other), ("q", other), ("q", x), ("k", other), ("k", x), ("v", x), ("q", other)]
    with torch.no_grad(), prepared(block, torch.bfloat16):
        found = [block[f"{name}_proj"](states) for name, states in asked]
    for (name, states), got in zip(asked, found, strict=True):
        layer = block[f"{name}_proj"]
        assert got.shape == (2, 5, layer.out_features) and (got.float() - layer(states)).abs().max() < 0.03
    together = Together(list(block.values()), torch.bfloat16)
    assert all(together.of(at, x).dtype == torch.bfloat16 for at in (2, 0, 1)) and together.states is None and not together.waiting


def test_a_store_keeps_what_is_in_use_when_it_grows_and_shrinks() -> None:
    like, store = torch.zeros(2, 1, 4), Rows(8)
    first = store.reserve(2, 20, like)
    assert first.shape == (2, 2, 24, 4)
    first[:] = torch.arange(first.numel()).view(first.shape)
    kept = first.clone()
    assert store.reserve(1, 3, like) is first and store.fit(1, 20, like) is first
    grown = store.reserve(5, 25, like)
    assert grown.shape == (5, 2, 32, 4) and torch.equal(grown[:2, :, :24], kept) and not grown[2:].any() and not grown[:, :, 24:].any()
    small = store.fit(5, 9, like)
    assert small.shape == (5, 2, 16, 4) and torch.equal(small[:2], kept[:, :, :16])


def test_bf16_uses_the_trainer_s_numbers_and_leaves_the_weights_as_they_were() -> None:
    model = policy(compute=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = drawn(model, Sampling(max_new_tokens=20))
    assert fresh_logp(model, PROMPTS, found) < 0.15
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) and after[name].requires_grad for name, value in before.items())
    with pytest.raises(RuntimeError), prepared(model.hf, torch.bfloat16):
        assert shared(model) == {Together}
        raise RuntimeError
    assert shared(model) == {Joined}


def shared(model: Any) -> set[type]:
    """What makes the products of the model's linear layers."""
    return {type(layer.joined) for layer in model.modules() if isinstance(layer, LeanLinear)}
