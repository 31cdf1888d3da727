"""A decoding step over keys and values in blocks, beside plain attention in float64, and who has which block."""

from __future__ import annotations

import pytest
import torch

from preftune import kernels
from preftune.rollout.blocks import Blocks
from preftune.rollout.cache import Cache, Decode

found = kernels.find("blocks")
pytestmark = pytest.mark.skipif(found is None, reason="no compiled kernels on this machine (numba)")
BOTH = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                found is None or not found.takes(torch.empty(1, 0, 16, dtype=torch.bfloat16)), reason="no AVX512-BF16"
            ),
        ),
    ],
)
PROMPTS, GROUP, OWN = (37, 5, 128, 65), (0, 2, 1, 0, 2, 2, 0, 3), (3, 0, 64, 1, 127, 2, 63, 70)
"""Prompts that end within a block and at its end; rows out of order, at the first and the last place of a block."""

ALL = tuple(range(len(GROUP)))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def turned(x, angles):
    """[.., B, d] heads turned by [B, 2, d] angles, in their own type."""
    low, high = x.float().chunk(2, -1)
    return (x.float() * angles[:, 0] + torch.cat([-high, low], -1) * angles[:, 1]).to(x.dtype)


class Text:
    """Keys and values of prompts and of tokens of responses as they come, and a cache that is filled with them step by step."""

    def __init__(self, heads, kv, width, dtype, *, spoil=float("nan")):
        self.heads, self.kv, self.width, self.dtype = heads, kv, width, dtype
        self.cache = Cache(1, Blocks.of(1, torch.empty(kv, 0, width, dtype=dtype)))
        blocks = self.cache.blocks
        self.of_prompts = [normal(2, kv, n, width, seed=n).to(dtype) for n in PROMPTS]
        self.of_rows = [normal(2, kv, n + 1, width, seed=100 + b).to(dtype) for b, n in enumerate(OWN)]
        jobs = blocks.add_prompts(PROMPTS, [GROUP.count(g) for g in range(len(PROMPTS))])
        taken = blocks._taken(40)  # so that what follows is not in order
        blocks.free += reversed(taken)
        blocks.where(0, kv, width)
        for memory in blocks.memory[0]:
            memory.view(dtype).fill_(spoil)  # what nobody wrote may be anything
        packed = torch.cat(self.of_prompts, 2)
        blocks.kernels.store(packed[0], packed[1], blocks.where(0, kv, width), jobs)

    def fill(self):
        """All but the last token of each row, by steps of the kernel."""
        for at in range(max(OWN)):
            some = [b for b in ALL if at < OWN[b]]
            mine = self.cache.blocks.rows
            self.cache.blocks.rows = [mine[b] for b in some]
            k, v = (torch.stack([self.of_rows[b][part, :, at] for b in some], 1) for part in (0, 1))
            self.attend(self.queries()[:, some], k, v, [GROUP[b] for b in some], [at] * len(some))
            self.cache.blocks.rows = mine

    def queries(self):
        return normal(self.heads, len(GROUP), self.width, seed=5).to(self.dtype)

    def attend(self, q, k, v, group, own, *, window=None):
        step = Decode(self.cache, torch.tensor(group), torch.tensor(own), torch.tensor(PROMPTS))
        return step.attend(q, k, v, window=window, scaling=self.width**-0.5, softcap=None, sinks=None)

    def last(self, rows=ALL, **options):
        """The step of everybody's last token."""
        k, v = (torch.stack([self.of_rows[b][part, :, OWN[b]] for b in rows], 1) for part in (0, 1))
        return self.attend(self.queries()[:, list(rows)], k, v, [GROUP[b] for b in rows], [OWN[b] for b in rows], **options)

    def expected(self, window):
        rows = []
        for b, group in enumerate(GROUP):
            k, v = torch.cat([self.of_prompts[group], self.of_rows[b]], 2).double().repeat_interleave(self.heads // self.kv, 1)
            scores = torch.einsum("hd,hkd->hk", self.queries()[:, b].double(), k) * self.width**-0.5
            if window is not None:
                scores[:, : max(0, scores.shape[1] - window)] = -torch.inf
            rows.append(torch.einsum("hk,hkd->hd", scores.softmax(-1), v))
        return torch.stack(rows, 1)


@pytest.mark.parametrize("heads, kv, width", [(9, 3, 64), (4, 4, 32), (14, 2, 64), (8, 1, 80), (6, 2, 128), (4, 1, 16), (64, 1, 16)])
@pytest.mark.parametrize("window", [None, 1, 20, 50, 64, 130])
@BOTH
def test_a_step_is_that_of_plain_attention(dtype, heads, kv, width, window):
    text = Text(heads, kv, width, dtype)
    text.fill()
    found = text.last(window=window)
    assert found.dtype == dtype
    expected, near = text.expected(window), 1e-6 if dtype == torch.float32 else 5e-3
    found = found.double()
    assert (found - expected).norm() < near * expected.norm() and (found - expected).abs().max() < 4 * near


@BOTH
def test_a_row_does_not_depend_on_the_others(dtype):
    text = Text(9, 3, 64, dtype)
    text.fill()
    whole, some = text.last(), [1, 2, 6, 3]
    mine = text.cache.blocks.rows
    text.cache.blocks.rows = [mine[b] for b in some]
    assert torch.equal(text.last(some), whole[:, some])


@BOTH
def test_queries_and_keys_are_turned_by_their_angles(dtype):
    text, other = Text(6, 2, 32, dtype), Text(6, 2, 32, dtype)
    q = text.queries()
    k, v = normal(2, 2, len(GROUP), 32, seed=9).to(dtype)
    angles = normal(len(GROUP), 2, 32, seed=10)
    step = lambda cache: Decode(cache, torch.tensor(GROUP), torch.zeros(len(GROUP), dtype=torch.long), torch.tensor(PROMPTS))
    blocks = text.cache.blocks
    told = step(text.cache).told(blocks, 3)
    found = blocks.kernels.step(*(x.transpose(0, 1).contiguous() for x in (q, k, v)), angles, blocks.where(0, 2, 32), *told, None, 0.2)
    plain = step(other.cache).attend(turned(q, angles), turned(k, angles), v, window=None, scaling=0.2, softcap=None, sinks=None)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.transpose(0, 1), plain, atol=near, rtol=near)


def test_what_has_ended_leaves_its_blocks_and_nobody_shares_one():
    blocks = Blocks.of(1, torch.empty(1, 0, 16))

    def owned():
        found = [block for part in (blocks.prompts, blocks.rows) for one in part for block in one]
        assert not set(found) & set(blocks.free) and sorted([*found, *blocks.free]) == list(range(blocks.count))
        return found

    jobs = blocks.add_prompts([130, 64], [2, 1])
    assert jobs[:, 1:].tolist() == [[0, 64], [64, 64], [128, 2], [130, 64]] and jobs[:, 0].tolist() == owned()
    blocks.step([0, 0, 1], [63, 64, 0], [130, 64], 1)
    assert [len(one) for one in blocks.rows] == [1, 2, 1]
    second, last = blocks.rows[1], blocks.rows[2]
    blocks.keep("rows", [2, 1])
    assert blocks.rows == [last, second] and len(owned()) == 7
    blocks.keep("rows", [0])
    blocks.keep("prompts", [1])
    assert len(owned()) == 2 and blocks.count == 16
    addresses = blocks.where(0, 1, 16)
    blocks.add_prompts([64 * 20], [0])
    assert blocks.count > 16 and len(owned()) == 22
    assert torch.equal(blocks.where(0, 1, 16)[:16], addresses) and len(set(blocks.where(0, 1, 16).tolist())) == blocks.count


@pytest.mark.parametrize("shared, counts, most", [(3, [8, 1, 40], 16), (48, [3], 1), (100, [2], 1)])
def test_parts_hold_every_row_once(shared, counts, most):
    found = torch.tensor(kernels.find("blocks").pieces(counts, shared)).view(-1, 3)
    rows = [(group, first + n) for group, first, count in found.tolist() for n in range(count)]
    assert rows == [(g, sum(counts[:g]) + n) for g, count in enumerate(counts) for n in range(count)]
    assert found[:, 2].max() <= most


@pytest.mark.parametrize("window", [None, 1, 20, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stores_that_grow_by_row_give_it_too(dtype, window):
    """What takes the place of blocks where there are no kernels."""
    text = Text(9, 3, 64, torch.float32)  # for its numbers
    text.dtype, text.cache = dtype, Cache(1)
    text.of_prompts, text.of_rows = ([x.to(dtype) for x in part] for part in (text.of_prompts, text.of_rows))
    for part, store in enumerate(text.cache.prompt[0]):
        data = store.reserve(len(PROMPTS), max(PROMPTS), text.of_prompts[0][part])
        for g, numbers in enumerate(text.of_prompts):
            data[g, :, : PROMPTS[g]] = numbers[part]
    for part, store in enumerate(text.cache.own[0]):
        data = store.reserve(len(OWN), max(OWN) + 1, text.of_rows[0][part])
        for b, numbers in enumerate(text.of_rows):
            data[b, :, : OWN[b]] = numbers[part, :, :-1]
    found, expected, near = text.last(window=window).double(), text.expected(window), 1e-5 if dtype == torch.float32 else 1e-2
    assert (found - expected).norm() < near * expected.norm()
