"""The benchmark of whole steps: both sides run, read the same prompts, draw responses that never end, and say where the time went."""

from __future__ import annotations

import json
from argparse import Namespace
from itertools import pairwise

import pytest

from benchmarks import grpo
from preftune.models.policy import LanguageModel
from preftune.models.save import save_model
from preftune.packing.chat import ChatTokenizer
from preftune.rollout.engine import Engine
from tests import tiny

PROMPTS = ("What is it?", "Who was there, and why?", "Say so.", "And then what happened to them all?")


@pytest.fixture
def options(tmp_path):
    """A tiny policy and the prompts of two steps."""
    save_model(LanguageModel(tiny.model(scale=1.0)), ChatTokenizer(tiny.tokenizer()), tmp_path / "model")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Namespace(
        folder=tmp_path, method="grpo", model="tiny", precision="fp32", prompts=2, responses=4, tokens=6, steps=2, rounds=1, rows=4,
        tokens_per_microbatch=256, max_length=128, checkpointing=False, trl="4",
        trl_ppo=None, allocators="mimalloc",
    )  # fmt: skip


def sound(side, options):
    assert len(side["seconds"]) == len(side["phases"]) == len(side["losses"]) == len(side["scores"]) == options.steps
    for seconds, phases in zip(side["seconds"], side["phases"], strict=True):
        assert sum(phases.values()) == pytest.approx(seconds) and min(phases.values()) >= 0 and phases["sampling"] > 0


def test_both_sides_read_the_same_prompts(options):
    sides = {grpo.PREFTUNE: grpo.ours(options), grpo.TRL: grpo.trl(options)}
    for side in sides.values():
        sound(side, options)
        assert all(phases["looking"] > 0 for phases in side["phases"])
    ours, theirs = sides.values()
    assert ours["prompt_tokens"] == theirs["prompt_tokens"] and sum(ours["prompt_tokens"]) > 40


def test_each_round_draws_its_own_responses(options, monkeypatch):
    """A round that found the run of the one before would only read what that had drawn."""
    drawn, whole = [0], Engine.generate

    def spied(self, *args, **kwargs):
        for sample in whole(self, *args, **kwargs):
            drawn[-1] += 1
            yield sample

    monkeypatch.setattr(Engine, "generate", spied)
    first = grpo.ours(options)
    drawn.append(0)
    second = grpo.ours(options)
    assert drawn[0] == drawn[1] > 0 and first["scores"] == second["scores"]


def test_no_response_of_trl_ends_early(options, monkeypatch):
    from trl import GRPOTrainer

    file, seen, whole = options.folder / "model" / "generation_config.json", [], GRPOTrainer._generate_single_turn
    told = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(told | {"eos_token_id": list(range(0, 320, 2))}))  # every second token would end a response

    def spied(self, *args, **kwargs):
        found = whole(self, *args, **kwargs)
        seen.extend(found[0])
        return found

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", spied)
    grpo.trl(options)
    assert len(seen) == 16 and {len(ids) for ids in seen} == {options.tokens}
    behind = [later for ids in seen for token, later in pairwise(ids) if token % 2 == 0]
    assert len(behind) > 10 and any(later % 2 for later in behind) and len(set(behind)) > 5


def test_ppo_is_judged_by_a_reward_model_and_timed_alone_unless_an_older_trl_is_named(options):
    options.method = "ppo"
    grpo.judge_of(options.folder, ChatTokenizer(tiny.tokenizer()))
    side = grpo.ours(options)
    sound(side, options)
    assert all(phases["judging"] > 0 for phases in side["phases"])
    assert list(grpo.sides_of(options)) == [grpo.PREFTUNE]
    options.trl_ppo = options.folder
    assert list(grpo.sides_of(options))[1:] == ["trl, batches of 4, fp32 weights", "trl, batches of 4, bf16 weights"]


def test_the_table_says_what_was_measured(options, capsys, monkeypatch):
    one = lambda seconds: {
        "seconds": [9.0, seconds], "phases": [dict.fromkeys(grpo.PHASES, 2.0), dict.fromkeys(grpo.PHASES, seconds / 4)],
        "losses": [0.0, 0.0], "scores": [0.5, 0.5], "prompt_tokens": [20, 20], "peak_memory": 10**9 * int(seconds),
    }  # fmt: skip
    monkeypatch.setattr(grpo, "matmul_rate", lambda precision: 1e9)
    config = tiny.model().config
    grpo.show({grpo.PREFTUNE: [one(2.0)], "trl, batches of 4": [one(8.0)]}, options, config)
    said = capsys.readouterr().out
    assert "| preftune | 2.00 | 0.50 | 0.50 | 0.50 | 0.50 | 2.00 | 0.500 |" in said
    assert "trl, batches of 4, takes 4.00x our time" in said
    sides = {"preftune": 2.0, "preftune, system allocator": 3.0, "trl, batches of 4, system allocator": 12.0}
    grpo.show({side: [one(seconds)] for side, seconds in sides.items()}, options, config)
    told = capsys.readouterr().out
    assert "trl, batches of 4, system allocator, the same allocator: 4.00x our time" in told
    assert "trl, batches of 4, system allocator, each as installed: 6.00x our time" in told
    work = grpo.operations(config, 20, 48, critic=False)
    assert f"our step is {2.0 / (sum(work.values()) / 1e9):.2f}x that" in said


def test_operations_count_each_pass():
    config = tiny.model().config
    plain, critic = (grpo.operations(config, 30, 40, critic=flag) for flag in (False, True))
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) * 70
    head = 320 * 32 * 40
    assert plain == {"sampling": 2 * (body + head), "looking": 2 * (body + head), "training": 6 * (body + head)}
    assert sum(critic.values()) - sum(plain.values()) == 2 * (body + head) + 2 * body + 6 * body


def test_sides_that_read_other_prompts_are_seen(options, monkeypatch):
    found = iter(({"prompt_tokens": [20]}, {"prompt_tokens": [21]}))
    shared = {"seconds": [1.0], "phases": [dict.fromkeys(grpo.PHASES, 0.2)]}
    monkeypatch.setattr(grpo, "own_process", lambda *args, **kwargs: shared | next(found))
    with pytest.raises(SystemExit, match="other prompts"):
        grpo.measure(options)
