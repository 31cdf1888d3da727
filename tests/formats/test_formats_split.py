"""Held-out data by prompt: no leak, no dependence on the order of rows, the right size."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.formats import prompt_key, read, split_by_prompt
from preftune.records import Example, Message, Response


def example(prompt: str, response: str = "r") -> Example:
    return Example((Message("user", prompt),), (Response(response),))


def test_no_prompt_is_on_both_sides_of_real_data() -> None:
    """The sample's 200 pairs have 102 different prompts (NOTICE.md), so a split by row would leak."""
    examples = read("sample:hh_pairs").examples
    train, held = split_by_prompt(examples, 0.2, seed=0)
    prompts = [{one.prompt for one in side} for side in (train, held)]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 102
    assert len(prompts[1]) == round(0.2 * 102) and len(train) + len(held) == 200


def test_the_split_depends_on_prompts_and_seed_alone() -> None:
    examples = list(read("sample:hh_pairs").examples)
    held = {prompt_key(one) for one in split_by_prompt(examples, 0.3, seed=1)[1]}
    random.Random(7).shuffle(examples)
    assert {prompt_key(one) for one in split_by_prompt(examples + examples[:50], 0.3, seed=1)[1]} == held
    assert {prompt_key(one) for one in split_by_prompt(examples, 0.3, seed=2)[1]} != held


def test_both_sides_keep_the_order_and_none_is_empty() -> None:
    examples = [example(f"p{n % 10}", str(n)) for n in range(40)]
    train, held = split_by_prompt(examples, 0.01, seed=0)
    assert len(held) == 4 and [one for one in examples if one in held] == held and [one for one in examples if one in train] == train
    assert len(split_by_prompt(examples, 0.99, seed=0)[0]) == 4


def test_every_prompt_can_be_held_out() -> None:
    """Over many seeds each of 5 prompts is held out about equally often: 1 of 5, 500 seeds, so 100 +- 9 each."""
    examples = [example(f"p{n}") for n in range(5)]
    counts = [0] * 5
    for seed in range(500):
        counts[examples.index(split_by_prompt(examples, 0.2, seed)[1][0])] += 1
    assert min(counts) > 100 - 4 * 9 and max(counts) < 100 + 4 * 9


def test_prompt_key_is_of_the_prompt_alone() -> None:
    base = prompt_key(example("q"))
    assert base == prompt_key(example("q", "other")) == prompt_key(example(" q\n")) == prompt_key(Example("q", ()))
    different = [example("Q"), Example((Message("system", "q"),), ()), Example((Message("user", "q"), Message("user", "q")), ())]
    assert len({base, *(prompt_key(one) for one in different)}) == 4


@pytest.mark.parametrize(("fraction", "prompts"), [(0.0, 5), (1.0, 5), (-1, 5), (0.5, 1)])
def test_impossible_splits_are_refused(fraction: float, prompts: int) -> None:
    with pytest.raises(UserError):
        split_by_prompt([example(f"p{n}") for n in range(prompts)], fraction, seed=0)


def test_official_cut_of_hh_stays_on_one_side(shared_data: Path) -> None:
    """The published train and test files of the data were cut by prompt; keys of ours do not join them."""
    keys = [
        {prompt_key(one) for one in read(shared_data / f"hh/helpful_base_{part}.jsonl.gz", on_error="skip").examples}
        for part in ("train", "test")
    ]
    assert not keys[0] & keys[1]
