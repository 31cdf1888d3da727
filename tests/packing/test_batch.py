"""Trees to micro-batches, against brute force: positions, what predicts what, weights that no cut changes, bins that lose no tree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preftune.packing.batch import LEAST_SHARED, Totals, by_prompt, by_response, by_token, collate, common_prefix, microbatches
from tests import tiny

REDUCTIONS = (by_token, by_response, by_prompt)
SHAPES = st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=6)


def forest(shapes):
    return [tiny.tree(p, tuple(rs), seed=i) for i, (p, rs) in enumerate(shapes)]


def brute(trees):
    """Every packed token as (tree, response or None, place), and the packed index of each."""
    tokens = []
    for g, tree in enumerate(trees):
        tokens += [(g, None, i) for i in range(len(tree.prompt))]
        tokens += [(g, n, i) for n, response in enumerate(tree.responses) for i in range(len(response))]
    return tokens, {token: index for index, token in enumerate(tokens)}


@given(SHAPES)
def test_every_token_stands_once_and_positions_restart(shapes) -> None:
    trees = forest(shapes)
    batch = collate(trees)
    tokens, _ = brute(trees)
    assert batch.tokens == len(tokens) == sum(t.tokens for t in trees)
    for index, (g, n, i) in enumerate(tokens):
        prompt = trees[g].prompt
        assert batch.input_ids[index] == (prompt[i] if n is None else trees[g].responses[n][i])
        assert batch.position_ids[index] == (i if n is None else len(prompt) + i)


@given(SHAPES)
def test_each_response_token_is_predicted_by_the_one_before_it(shapes) -> None:
    trees = forest(shapes)
    batch = collate(trees)
    _, at = brute(trees)
    width = max(len(t.responses) for t in trees)
    m = 0
    for g, tree in enumerate(trees):
        for n, response in enumerate(tree.responses):
            for i, token in enumerate(response):
                before = (g, n, i - 1) if i else (g, None, len(tree.prompt) - 1)
                assert (batch.predict[m], batch.targets[m], batch.response[m]) == (at[before], token, g * width + n)
                m += 1
    assert m == len(batch.predict) == len(batch.targets) == len(batch.response)
    ends = [(g, n, len(r) - 1) for g, t in enumerate(trees) for n, r in enumerate(t.responses)]
    assert batch.last.tolist() == [at[end] for end in ends]
    assert batch.cell.tolist() == [g * width + n for g, n, _ in ends]


@given(SHAPES)
def test_the_layout_names_every_response(shapes) -> None:
    trees = forest(shapes)
    layout = collate(trees).layout
    _, at = brute(trees)
    expected = [
        (at[g, None, 0], len(tree.prompt), at[g, n, 0], len(response))
        for g, tree in enumerate(trees)
        for n, response in enumerate(tree.responses)
    ]
    assert layout.rows() == expected and layout.lengths == tuple(t.tokens for t in trees)


@given(SHAPES)
def test_grids_hold_the_records_and_nothing_where_there_is_no_response(shapes) -> None:
    trees = forest(shapes)
    batch = collate(trees)
    for g, tree in enumerate(trees):
        n = len(tree.responses)
        assert batch.present[g].tolist() == [i < n for i in range(batch.present.shape[1])]
        assert batch.length[g, :n].tolist() == [len(r) for r in tree.responses] and not batch.length[g, n:].any()
        assert batch.scores[g, :n].tolist() == tree.scores.tolist() and batch.scores[g, n:].isnan().all()
        assert batch.preference[g, :n, :n].tolist() == tree.preference.tolist()
        assert batch.preference[g].sum() == tree.preference.sum()
    assert batch.ids == tuple(t.id for t in trees) and batch.reference_logp is None


@given(SHAPES)
def test_sums_and_places_on_the_grid(shapes) -> None:
    trees = forest(shapes)
    batch = collate(trees)
    tokens = torch.arange(1.0, len(batch.targets) + 1, dtype=torch.float64)
    sums, places = batch.per_response(tokens), batch.on_grid(torch.arange(1.0, len(batch.last) + 1))
    expected, seen = torch.zeros_like(sums), torch.zeros_like(places)
    m = r = 0
    for g, tree in enumerate(trees):
        for n, response in enumerate(tree.responses):
            expected[g, n], seen[g, n] = tokens[m : m + len(response)].sum(), r + 1
            m, r = m + len(response), r + 1
    assert torch.equal(sums, expected) and torch.equal(places, seen)


def test_regression_29_sums_of_fp32_log_probabilities_are_float64() -> None:
    batch = collate([tiny.tree(2, (4096, 3))])
    tokens = -torch.rand(4099, generator=torch.Generator().manual_seed(0)) * 20
    exact = [part.sum().item() for part in tokens.double().split([4096, 3])]
    assert batch.per_response(tokens)[0].tolist() == pytest.approx(exact, rel=1e-14)


def test_reference_logps_travel_only_when_all_are_known() -> None:
    import dataclasses

    a, b = tiny.tree(3, (2, 4), seed=1), tiny.tree(2, (3,), seed=2)
    known = [dataclasses.replace(a, reference=np.array([-1.5, -2.5])), dataclasses.replace(b, reference=np.array([-3.0]))]
    assert collate(known).reference_logp.tolist() == [[-1.5, -2.5], [-3.0, 0.0]]
    assert collate([known[0], b]).reference_logp is None
    assert collate([known[0].keep([1])]).reference_logp.tolist() == [[-2.5]]


def test_keep_takes_everything_of_a_response_along() -> None:
    tree = tiny.tree(3, (2, 4, 5), seed=1)
    kept = tree.keep([2, 0])
    assert [r.tolist() for r in kept.responses] == [tree.responses[2].tolist(), tree.responses[0].tolist()]
    assert kept.scores.tolist() == [-2, 0] and kept.preference.tolist() == [[0, 0], [1, 0]] and kept.tokens == 3 + 5 + 2


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="record t0 has an empty prompt"):
        collate([tiny.tree(0, (3,))])


def test_moving_a_batch_moves_all_its_tensors() -> None:
    batch = collate([tiny.tree(3, (2, 4))])
    moved = batch.to("meta")
    tensors = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 15 and all(getattr(moved, name).is_meta for name in tensors) and moved.layout == batch.layout


# ---------------------------------------------------------------- weights


@given(SHAPES, st.sampled_from(REDUCTIONS), st.integers(1, 60), st.integers(1, 3))
def test_weights_sum_to_1_over_the_step_under_any_cut(shapes, reduction, budget: int, processes: int) -> None:
    """Whatever the micro-batches and processes, each token and prompt weighs what it weighs in the whole step."""
    trees = forest(shapes)
    totals = Totals.of(trees)
    whole = collate(trees, totals, reduction)
    assert whole.token_weight.double().sum() == pytest.approx(1, abs=1e-6)
    assert whole.prompt_weight.double().sum() == pytest.approx(1, abs=1e-6)
    of_tree = dict(zip((t.id for t in trees), whole.token_weight.split([t.response_tokens for t in trees]), strict=True))
    seen = 0
    for rank in range(processes):
        for part in microbatches(trees, budget, processes, rank):
            chosen = [trees[i] for i in part]
            batch = collate(chosen, totals, reduction)
            assert torch.equal(batch.token_weight, torch.cat([of_tree[t.id] for t in chosen]))
            assert torch.equal(batch.prompt_weight, torch.full((len(part),), 1 / len(trees)))
            seen += len(part)
    assert seen == len(trees)


def test_what_each_reduction_weighs_the_same() -> None:
    """Two prompts: one response of 3 tokens; responses of 1 and 2 tokens."""
    trees = [tiny.tree(2, (3,)), tiny.tree(4, (1, 2))]
    weights = {reduction.__name__: collate(trees, reduction=reduction).token_weight.double() for reduction in REDUCTIONS}
    expected = {
        "by_token": [1 / 6] * 6,
        "by_response": [1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 6, 1 / 6],
        "by_prompt": [1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 8, 1 / 8],
    }
    for name, weight in weights.items():
        torch.testing.assert_close(weight, torch.tensor(expected[name], dtype=torch.float64), atol=1e-7, rtol=0)
    assert Totals.of(trees) == Totals(tokens=6, responses=3, prompts=2)


def test_the_token_mean_of_a_step_is_no_mean_of_means() -> None:
    """Oracle of methods 0.3: micro-batches of (sum 6, 3 tokens) and (sum 4, 1 token) give 10 / 4."""
    trees = [tiny.tree(1, (3,)), tiny.tree(1, (1,))]
    losses = [torch.full((3,), 2.0), torch.tensor([4.0])]
    totals = Totals.of(trees)
    assert sum(float(collate([t], totals).token_weight @ loss) for t, loss in zip(trees, losses, strict=True)) == 2.5


def test_tokens_that_carry_no_loss_are_read_but_not_predicted() -> None:
    """Turns of the user inside a conversation, and what a tool said: the rest keeps its place and its weight."""
    tree = tiny.tree(3, (5, 2))
    mask = (np.array([True, True, False, False, True]), np.array([True, True]))
    part = dataclasses.replace(tree, carries=mask)
    whole, batch = collate([tree]), collate([part])
    carried = np.concatenate(mask)
    assert torch.equal(batch.input_ids, whole.input_ids) and torch.equal(batch.last, whole.last)
    for name in ("predict", "targets", "response"):
        assert torch.equal(getattr(batch, name), getattr(whole, name)[carried])
    assert batch.length.tolist() == [[3, 2]] and part.response_tokens == 5 and part.tokens == 10
    assert batch.token_weight.tolist() == pytest.approx([1 / 5] * 5)
    assert collate([part], reduction=by_response).token_weight.tolist() == pytest.approx([1 / 6] * 3 + [1 / 4] * 2)
    assert [c.tolist() for c in part.keep([1]).carries] == [[True, True]]


def test_a_response_s_own_weight_scales_its_tokens_and_the_step_s_total() -> None:
    light, heavy = tiny.tree(2, (3,), seed=1), dataclasses.replace(tiny.tree(2, (2,), seed=2), weights=np.array([3.0]))
    totals = Totals.of([light, heavy])
    assert totals.tokens == 9
    assert collate([light, heavy]).token_weight.tolist() == pytest.approx([1 / 9] * 3 + [3 / 9] * 2)
    assert collate([heavy], totals).token_weight.tolist() == pytest.approx([3 / 9] * 2)


def test_what_is_said_of_responses_lies_on_the_grid() -> None:
    rich = dataclasses.replace(tiny.tree(2, (1, 2, 1)), rated=np.array([[1.0, 2.0], [3.0, np.nan], [5.0, 6.0]]), margin=np.eye(3))
    bare = dataclasses.replace(tiny.tree(2, (1,)), labels=None)
    batch = collate([rich, bare])
    nan = float("nan")
    torch.testing.assert_close(batch.rated[0], torch.tensor([[1, 2], [3, nan], [5, 6]]), equal_nan=True)
    assert batch.rated[1].isnan().all() and batch.margin[0].equal(torch.eye(3)) and not batch.margin[1].any()
    torch.testing.assert_close(batch.labels, torch.tensor([[1.0, 0, 0], [nan, nan, nan]]), equal_nan=True)
    assert batch.response_weight.tolist() == [[0.25] * 3, [0.25, 0, 0]]
    assert collate([bare]).labels is None and collate([bare]).rated is None and collate([bare]).margin is None


def test_the_best_responses_share_a_weight_of_1() -> None:
    scores = [[0.0, 2, 2], [np.nan, -3, -4], [np.nan, np.nan, np.nan]]
    trees = [dataclasses.replace(tiny.tree(2, (1, 2, 1), seed=i), scores=np.array(row)) for i, row in enumerate(scores)]
    trees.append(dataclasses.replace(tiny.tree(2, (1,)), scores=np.array([-7.0])))
    expected = [[0, 0.5, 0.5], [0, 1, 0], [1 / 3] * 3, [1, 0, 0]]
    torch.testing.assert_close(collate(trees).best, torch.tensor(expected))


@given(SHAPES)
def test_what_predicts_nothing_need_not_be_read(shapes) -> None:
    batch = collate(forest(shapes))
    less = batch.predicting
    assert less.tokens == batch.tokens - sum(len(rs) for _, rs in shapes) == sum(less.layout.lengths)
    for name in ("input_ids", "position_ids"):
        whole, left = getattr(batch, name), getattr(less, name)
        assert torch.equal(left[less.predict], whole[batch.predict])
    assert less.layout.trees == tuple((p, tuple(r - 1 for r in rs)) for p, rs in shapes)
    assert torch.equal(less.targets, batch.targets) and less.predicting is less


# ---------------------------------------------------------------- what all prompts begin with

ALIKE = st.tuples(st.integers(0, 20), SHAPES)


def alike(length, shapes):
    """Trees whose prompts begin with the same `length` tokens and differ in the next."""
    trees = []
    for i, (p, rs) in enumerate(shapes):
        tree = tiny.tree(length + p, tuple(rs), seed=i)
        tree.prompt[:length] = np.arange(length) + 20
        tree.prompt[length] = i
        trees.append(tree)
    return trees


@given(ALIKE)
def test_what_all_prompts_begin_with_stands_once_and_the_rest_as_without_it(made) -> None:
    length, shapes = made
    trees = alike(length, shapes)
    batch, shared = collate(trees), common_prefix([t.prompt for t in trees])
    assert shared == (0 if len(trees) == 1 or length // 2 * 2 < LEAST_SHARED else length // 2 * 2)
    assert batch.layout.shared == shared and batch.tokens == sum(t.tokens for t in trees) - shared * (len(trees) - 1)
    tokens, at = brute(trees)
    assert batch.layout.spread(batch.input_ids).tolist() == [
        int((trees[g].prompt if n is None else trees[g].responses[n])[i]) for g, n, i in tokens
    ]
    for name in ("input_ids", "position_ids"):
        values = getattr(batch, name)
        assert torch.equal(batch.layout.gathered(batch.layout.spread(values)), values)
    assert batch.layout.spread(batch.position_ids).tolist() == [i if n is None else len(trees[g].prompt) + i for g, n, i in tokens]
    places = batch.layout.gathered(torch.arange(len(tokens)))  # where a token of the row stands in the row that shares nothing
    assert (places[batch.predict] < len(tokens)).all()
    ends = [at[g, n, len(r) - 1] for g, t in enumerate(trees) for n, r in enumerate(t.responses)]
    before = [
        at[(g, n, i - 1) if i else (g, None, len(t.prompt) - 1)]
        for g, t in enumerate(trees)
        for n, r in enumerate(t.responses)
        for i in range(len(r))
    ]
    assert places[batch.last].tolist() == ends and places[batch.predict].tolist() == before


def test_equal_prompts_keep_a_token_of_their_own() -> None:
    trees = [tiny.tree(12, (2,), seed=1), tiny.tree(12, (2,), seed=1)]
    batch = collate(trees)
    assert batch.layout.shared == 10 and batch.input_ids[batch.predict[0]] == trees[0].prompt[-1]
    assert batch.predict[0] != batch.predict[2]


def test_a_micro_batch_counts_it_once() -> None:
    trees = alike(90, [(5, [5])] * 6)
    assert common_prefix([t.prompt for t in trees]) == 90
    assert [len(part) for part in microbatches(trees, 90 + 3 * 10)] == [3, 3]
    assert [len(part) for rank in range(2) for part in microbatches(trees, 10_000, 2, rank)] == [3, 3]


# ---------------------------------------------------------------- micro-batches


@given(SHAPES, st.integers(1, 40))
def test_micro_batches_hold_every_tree_once_longest_first_within_the_budget(shapes, budget: int) -> None:
    trees = forest(shapes)
    parts = microbatches(trees, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(trees)))
    for part in parts:
        sizes = [trees[i].tokens for i in part]
        assert sum(sizes) <= budget or len(part) == 1
        assert sizes == sorted(sizes, reverse=True)
    firsts = [trees[part[0]].tokens for part in parts]
    assert firsts == sorted(firsts, reverse=True) and firsts[0] == max(t.tokens for t in trees)
    loads = [sum(trees[i].tokens for i in part) for part in parts]
    for a in range(len(parts)):  # first fit: what opens a bin did not fit in any bin before it
        assert all(loads[a] + firsts[b] > budget for b in range(a + 1, len(parts)))


@given(SHAPES, st.integers(1, 40), st.integers(1, 5))
def test_processes_share_the_trees(shapes, budget: int, processes: int) -> None:
    trees = forest(shapes)
    shares = [microbatches(trees, budget, processes, rank) for rank in range(processes)]
    assert sorted(i for share in shares for part in share for i in part) == list(range(len(trees)))
    for part in (part for share in shares for part in share):
        assert sum(trees[i].tokens for i in part) <= budget or len(part) == 1


def test_processes_get_like_shares() -> None:
    """Eight equal trees that fit in one micro-batch are still dealt out, four to each of two processes."""
    trees = forest([(4, [4])] * 8)
    shares = [microbatches(trees, 10_000, 2, rank) for rank in range(2)]
    assert [sum(len(part) for part in share) for share in shares] == [4, 4]
    assert microbatches(trees, 10_000, 1, 0) == [list(range(8))]


def test_a_process_may_get_nothing() -> None:
    assert [microbatches(forest([(4, [4])]), 100, 3, rank) for rank in range(3)] == [[[0]], [], []]
