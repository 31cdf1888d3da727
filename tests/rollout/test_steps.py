"""A decoding step whose layers are one kernel: the same responses as by single kernels, and as a fresh forward pass says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from preftune import kernels
from preftune.models.lora import Adapter
from preftune.packing.batch import collate
from preftune.rollout.blocks import Blocks
from preftune.rollout.decoder import Decoder
from preftune.rollout.engine import Engine
from preftune.rollout.samples import as_tree
from preftune.rollout.sampling import Sampling
from preftune.rollout.weights import prepared
from tests.rollout.test_engine import policy

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_hidden_layers": 3}
"""What kernels take: whole panels, heads of whole vectors."""
PROMPTS = [np.random.default_rng(i).integers(7, 320, size).tolist() for i, size in enumerate((5, 70, 3, 64))]
SAMPLING = Sampling(max_new_tokens=100)

known = kernels.find("products")
pytestmark = pytest.mark.skipif(known is None or not known.takes(torch.empty(32, 32)), reason="no compiled kernels on this machine")
pairs = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(known is None or not known.takes(torch.empty(32, 32).bfloat16()), reason="no AVX512-BF16")
)
BOTH = pytest.mark.parametrize("compute", [torch.float32, pairs])


def model(kind, compute=torch.float32, **changes):
    made = policy(kind, compute=compute, **SHAPE, **changes)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return made


def one_call(made):
    """What takes all layers of a step at once; None where there is nothing."""
    config, compute = made.hf.config, made.backbone.compute
    blocks = Blocks.of(config.num_hidden_layers, torch.empty((config.num_key_value_heads, 0, config.head_dim), dtype=compute))
    with torch.no_grad(), prepared(made.hf, compute), made.backbone.precision():
        return Decoder(made.backbone, blocks).step


def drawn(made, *, prompts=PROMPTS, sampling=SAMPLING, ends=frozenset(range(30, 36))):
    return {(s.prompt, s.number): s for s in Engine(made, ends).generate(prompts, 5, sampling)}


KINDS = [("llama", {}), ("mistral", {"sliding_window": 40}), ("qwen2", {}), ("llama", {"attention_bias": True, "num_key_value_heads": 4})]


@pytest.mark.parametrize(("kind", "changes"), KINDS)
@BOTH
def test_responses_are_those_of_single_kernels_and_of_a_fresh_forward_pass(compute, kind, changes, monkeypatch):
    made, exact = model(kind, compute, **changes), compute == torch.float32
    assert one_call(made) is not None
    ours = drawn(made)
    assert len({len(s.ids) for s in ours.values()}) > 5 and max(len(s.ids) for s in ours.values()) > 64
    for i, prompt in enumerate(PROMPTS):
        mine = [ours[key] for key in sorted(ours) if key[0] == i]
        with torch.no_grad():
            fresh = made(collate([as_tree(prompt, mine)])).numpy()
        assert np.abs(fresh - np.concatenate([s.logp for s in mine])).max() < (2e-5 if exact else 0.3)
    monkeypatch.setattr("preftune.rollout.decoder._in_one_call", lambda *_: None)
    singly = drawn(made)
    assert not exact or {key: s.ids for key, s in ours.items()} == {key: s.ids for key, s in singly.items()}


@BOTH
def test_a_response_does_not_depend_on_batch_mates_or_threads(compute):
    made = model("qwen2", compute)
    whole, threads = drawn(made), torch.get_num_threads()
    try:
        for count, some in ((1, [1]), (2, [0, 2]), (3, [3, 1])):
            torch.set_num_threads(count)
            for (i, number), sample in drawn(made, prompts=[PROMPTS[i] for i in some]).items():
                other = whole[some[i], number]
                assert sample.ids == other.ids and np.array_equal(sample.logp, other.logp)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("qwen3", {}), ("gemma2", {}), ("gpt2", {}), ("llama", {"hidden_act": "gelu"}), ("llama", {"intermediate_size": 72})],
)
def test_what_it_does_not_know_is_done_by_single_kernels(kind, changes):
    made = policy(kind, **{**SHAPE, **changes})
    assert one_call(made) is None and drawn(made)


def test_an_adapter_is_left_to_its_library():
    made = model("llama")
    Adapter(made.hf, rank=2, alpha=4, dropout=0.0, targets=("q_proj", "down_proj"))
    assert one_call(made) is None


def test_more_rows_than_before(monkeypatch):
    """Room between the kernels is made for the most rows so far, and more of them may come once those before have ended."""
    made, whole = model("llama"), drawn(model("llama"))
    layers, rooms = kernels.find("layers").Layers, []
    plain = layers.__call__
    monkeypatch.setattr(layers, "__call__", lambda self, *given: (plain(self, *given), rooms.append((len(given[0]), self.room)))[0])
    one_group = Engine(made, frozenset(range(30, 36)), cache_bytes=1)
    numbers = [[0, 2], [3], [0, 1, 2, 3, 4], [1, 4]]  # the prompts come by their length: one row, two, two, five
    some = {(s.prompt, s.number): s for s in one_group.generate(PROMPTS, 5, SAMPLING, numbers=numbers)}
    assert sorted(some) == [(i, n) for i, mine in enumerate(numbers) for n in mine]
    assert all(s.ids == whole[key].ids and np.array_equal(s.logp, whole[key].logp) for key, s in some.items())
    rows = [count for count, _ in rooms]
    assert max(rows) > rows[0] and all(count <= room for count, room in rooms)


def test_weights_that_are_much_of_the_memory_are_read_where_they_lie(monkeypatch):
    made, known = model("llama"), drawn(model("llama"))
    size = sum(p.nbytes for p in made.parameters())
    monkeypatch.setattr("preftune.rollout.weights._memory", lambda: 4 * size)
    assert one_call(made) is not None
    monkeypatch.setattr("preftune.rollout.weights._memory", lambda: 4 * size - 4)
    copies = []
    monkeypatch.setattr(kernels.find("products"), "lay_out", copies.append)
    assert one_call(made) is None
    found = drawn(made)
    assert not copies and {key: s.ids for key, s in found.items()} == {key: s.ids for key, s in known.items()}
