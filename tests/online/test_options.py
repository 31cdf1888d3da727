"""What may be switched on does what it says, and nothing beside it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from preftune.errors import UserError
from preftune.objectives.advantages import process_relative
from preftune.objectives.kl import reference_coefficient
from preftune.online import monitor
from preftune.online.config import AlarmConfig, DenseConfig
from preftune.online.segments import asked, ends, laid, offsets
from preftune.packing.order import permutation
from preftune.records import Example, Response
from preftune.training import checkpoint
from tests import tiny
from tests.online import small
from tests.training import runs

ALONE = ("eval_fraction=0", "max_steps=3")


def weights(output: Path, step: int) -> dict[str, Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


def rule(path: Path, body: str) -> str:
    path.write_text(f"def rule(example, response):\n    {body}\n")
    return f"judge={path}:rule"


# ---- the reference


def test_the_reference_follows_the_policy_when_it_is_told_to(place: Path, tmp_path: Path) -> None:
    """A full update after every second step: the KL to it is 0 again at the third."""
    still = small.trained(place, tmp_path / "still", "grpo", *ALONE)
    moved = small.trained(place, tmp_path / "moved", "grpo", *ALONE, "max_steps=4", "reference_sync.every=2", "reference_sync.mix=1.0")
    assert [row["kl"] == 0 for row in still] == [True, False, False]
    assert [row["kl"] == 0 for row in moved] == [True, False, True, False]


def test_another_model_may_be_the_reference(place: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", seed=5)
    row = small.trained(place, tmp_path / "run", "rloo", *ALONE, f"reference={other}")[0]
    assert abs(row["kl"]) > 0.01 and row["ratio"] == 1.0


def test_without_a_reference_there_is_no_figure_of_it(place: Path, tmp_path: Path) -> None:
    row = small.trained(place, tmp_path / "run", "grpo", *ALONE, "watch_reference=false")[0]
    assert not [key for key in row if key.startswith("kl") or "reference" in key] and "policy_perplexity" in row


# ---- actor and critic


def test_while_the_critic_warms_up_the_policy_stays_as_it_is(place: Path, tmp_path: Path) -> None:
    more = ("rollout.n=1", "rollout.prompts=4", "method.critic_warmup=2", "keep_checkpoints=9", "method.entropy=0.1")
    small.trained(place, tmp_path / "run", "ppo", *ALONE, *more)
    start, second, third = (weights(tmp_path / "run", step) for step in (1, 2, 3))
    plain = load_file(place / "model" / "model.safetensors")
    for name in start:
        if name.startswith("backbone."):
            assert torch.equal(second[name], plain[name.removeprefix("backbone.hf.")]), name
    moved = lambda a, b, part: [name for name in a if name.startswith(part) and not torch.equal(a[name], b[name])]
    assert moved(start, second, "critic.") and moved(second, third, "backbone.") and not moved(start, second, "backbone.")


def test_the_critic_starts_as_the_reward_model_that_judges(place: Path, tmp_path: Path) -> None:
    judge = tmp_path / "reward"
    words = ("lr=1e-3", "data.limit=8", "epochs=1", "eval_fraction=0", "eval_every=null", "max_length=512", "tokens_per_microbatch=512")
    assert runs.train(runs.command("reward", place / "model", judge, *words)) == 0
    more = ("rollout.n=1", "rollout.prompts=4", f"judge={judge}/final", "max_length=48", "tokens_per_microbatch=80")
    with small.opened(place, tmp_path / "run", "ppo", *more) as run:
        state = run.learner.actor.state_dict()
        found = small.rollout(run)
        values = np.array([v[-1] for tree in found.trees for v in tree.told["value"]])
    saved = load_file(judge / "final" / "model.safetensors")
    assert torch.equal(state["critic.backbone.hf.model.layers.0.mlp.up_proj.weight"], saved["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(state["critic.head.weight"], saved["score.weight"])
    assert np.abs(values).max() > 1e-3, "it has something to say from the start"
    with small.opened(place, tmp_path / "other", "ppo", *more, "method.critic=policy") as run:
        state = run.learner.actor.state_dict()
        assert not state["critic.head.weight"].any()
        assert torch.equal(
            state["critic.backbone.hf.model.layers.0.mlp.up_proj.weight"], state["backbone.hf.model.layers.0.mlp.up_proj.weight"]
        )


def test_a_critic_with_other_tokens_is_refused_and_a_judge_with_other_tokens_is_not_its_start(place: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    more = ("rollout.n=1", "rollout.prompts=4")
    with pytest.raises(UserError, match="another tokenizer"), small.opened(place, tmp_path / "run", "ppo", *more, f"method.critic={other}"):
        pass


def test_a_shared_trunk_learns_values_beside_the_policy(place: Path, tmp_path: Path) -> None:
    more = ("rollout.n=1", "rollout.prompts=4", "method.critic=shared", "keep_checkpoints=9")
    rows = small.trained(place, tmp_path / "run", "ppo", *ALONE, *more)
    first, last = weights(tmp_path / "run", 1), weights(tmp_path / "run", 3)
    assert not [name for name in first if name.startswith("critic.")]
    assert not torch.equal(first["value_head.weight"], last["value_head.weight"])
    assert rows[-1]["value_loss"] > 0 and rows[0]["ratio"] == 1.0
    assert not any("value" in name for name in load_file(tmp_path / "run" / "final" / "model.safetensors"))


def test_the_critic_has_its_own_rate_and_its_own_gradient_norm(place: Path, tmp_path: Path) -> None:
    """A critic's learning rate changes nothing of the policy in the first step, and a huge value loss does not shrink the policy's step."""
    judge = rule(tmp_path / "rule.py", "return 1.0 + len(response.text)")
    base = ("rollout.n=1", "rollout.prompts=4", "eval_fraction=0", "max_steps=1", judge)
    small.trained(place, tmp_path / "slow", "ppo", *base, "method.critic_lr=1e-7")
    small.trained(place, tmp_path / "fast", "ppo", *base, "method.critic_lr=1e-2")
    small.trained(place, tmp_path / "heavy", "ppo", *base, "method.critic_lr=1e-2", "method.value_weight=1000")
    slow, fast, heavy = (weights(tmp_path / name, 1) for name in ("slow", "fast", "heavy"))
    plain = load_file(place / "model" / "model.safetensors")
    trunk = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(slow[f"backbone.hf.{trunk}"], fast[f"backbone.hf.{trunk}"])
    torch.testing.assert_close(fast[f"backbone.hf.{trunk}"], heavy[f"backbone.hf.{trunk}"])
    head = "critic.head.weight"
    assert slow[head].abs().max() <= 2e-7 and fast[head].abs().max() > 5e-3
    assert not torch.equal(plain[trunk], fast[f"backbone.hf.{trunk}"])


def test_gradient_checkpointing_changes_nothing(place: Path, tmp_path: Path) -> None:
    more = ("rollout.n=1", "rollout.prompts=4", *ALONE)
    plain = small.trained(place, tmp_path / "plain", "ppo", *more)
    again = small.trained(place, tmp_path / "again", "ppo", *more, "gradient_checkpointing=true")
    assert [row["loss"] for row in plain] == pytest.approx([row["loss"] for row in again], abs=1e-5)


# ---- beside the reward


def grads(run: Any, trees: Sequence[Any]) -> dict[str, Tensor]:
    run.learner.model.train()
    for loss, _ in run.learner.losses(trees, 0, lambda: False):
        loss.backward()
    found = {name: p.grad.clone() for name, p in run.learner.parameters.items() if p.grad is not None}
    run.learner.optimizer.zero_grad(set_to_none=True)
    return found


def test_pretraining_adds_its_gradient_times_its_weight_and_nothing_else(place: Path, tmp_path: Path) -> None:
    more = ("pretraining.data=sample:hh_pairs", "max_length=512", "tokens_per_microbatch=512", "pretraining.prompts_per_step=3")
    with small.opened(place, tmp_path / "run", "grpo", *more) as run:
        trees = small.rollout(run).trees[:2]
        beside, found = run.learner.pretraining, {}
        assert beside is not None
        for weight in (0.0, 1.0, 27.8):
            beside.weight = weight
            found[weight] = grads(run, trees)
        assert len(beside.of(0)) == 3 and {t.id for t in beside.of(0)} != {t.id for t in beside.of(1)}
        count = len(beside.trees)
        seen = [t.id for step in range(-(-count // 3)) for t in beside.of(step)]
        assert sorted(seen) == sorted(t.id for t in beside.trees), "an epoch is every record once"
        run.learner.pretraining = None
        without = grads(run, trees)
    for name, base in without.items():
        torch.testing.assert_close(found[0.0][name], base, atol=1e-7, rtol=0)
        unit = found[1.0][name] - base
        torch.testing.assert_close(found[27.8][name] - base, 27.8 * unit, atol=2e-4, rtol=1e-3)
    assert max(float((found[1.0][name] - base).abs().max()) for name, base in without.items()) > 1e-3


def test_a_run_with_pretraining_logs_its_loss(place: Path, tmp_path: Path) -> None:
    more = ("pretraining.data=sample:hh_pairs", "max_length=512", "tokens_per_microbatch=512", "pretraining.prompts_per_step=2")
    rows = small.trained(place, tmp_path / "run", "grpo", *ALONE, *more)
    assert all(3 < row["pretraining_nll"] < 9 for row in rows)


# ---- steps and prompts


def test_target_kl_leaves_later_steps_out(place: Path, tmp_path: Path) -> None:
    more = ("rollout.prompts=4", "method.passes=3", "lr=2e-2", "eval_fraction=0", "keep_checkpoints=99")
    every = small.trained(place, tmp_path / "every", "grpo", *more)
    bound = small.trained(place, tmp_path / "bound", "grpo", *more, "method.target_kl=0.01", "save_every=5")
    assert [row["step"] for row in every] == list(range(1, 16))  # rollouts of 4, 4 and 1 prompts
    taken = [row["step"] for row in bound]
    assert len(taken) < 15 and taken[-1] == 15
    for before, row in itertools.pairwise(bound):
        assert ("score" in row) == (before["step_kl"] > 0.01 or before["step"] in (6, 12)), "a rollout ends with the step that went too far"
    assert [row["lr"] for row in bound] == [every[step - 1]["lr"] for step in taken]
    due = {next(step for step in taken if step >= n) for n in (5, 10, 15)}
    assert due != {5, 10, 15}, "else this shows nothing"
    saved = set(checkpoint.saved_steps(tmp_path / "bound" / "checkpoints"))
    assert saved == due, "a checkpoint whose step was left out is made at the next"


def test_redraw_replaces_prompts_that_teach_nothing_and_counts_them(place: Path, tmp_path: Path) -> None:
    """Prompts without the word `again` score the same always; the others differ by length."""
    judge = rule(tmp_path / "rule.py", "return float(len(response.text)) if 'again' in example.prompt[-1].content else 1.0")
    base = (
        judge,
        "eval_fraction=0",
        "method.missing_eos=keep",
        "rollout.n=4",
        "rollout.prompts=3",
        "prompts_per_step=3",
        "keep_checkpoints=99",
    )
    rows = small.trained(place, tmp_path / "run", "grpo", *base, "method.redraw=3", "epochs=2")
    assert rows[0]["equal_scores"] == 0.0 and any(row["prompts_drawn"] > 3 for row in rows)
    assert sum(row["prompts_drawn"] for row in rows) == 18, "no prompt is skipped or doubled"
    heads = []
    for number in range(1, len(rows) + 1):
        folder = tmp_path / "run" / "rollouts" / str(number)
        for part in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
            heads += json.loads((part / "samples.jsonl").open().readline())["prompts"]
    assert heads == [int(i) for epoch in (0, 1) for i in permutation(9, 0, epoch)]
    plain = small.trained(place, tmp_path / "plain", "grpo", *base)
    assert any(row["equal_scores"] > 0 for row in plain) and all(row["prompts_drawn"] == 3 for row in plain)


def test_where_no_prompt_teaches_anything_the_run_goes_on_and_says_so(place: Path, tmp_path: Path) -> None:
    rows = small.trained(place, tmp_path / "run", "grpo", rule(tmp_path / "rule.py", "return 1.0"), "method.redraw=1", *ALONE)
    assert all(row["equal_scores"] == 1.0 and row["grad_norm"] >= 0 for row in rows)


# ---- rewards


def test_importance_weighs_tokens_by_trainer_over_sampler_up_to_the_cap(place: Path, tmp_path: Path) -> None:
    with small.opened(place, tmp_path / "run", "reinforce", "method.importance_cap=1.5", "method.kl=0", "rollout.n=2") as run:
        tree = small.rollout(run).trees[0]
        drawn = tuple(np.asarray(d) - np.linspace(-1, 1, len(d)) for d in tree.told["drawn"])
        from dataclasses import replace

        step = run.learner.step([replace(tree, told={**tree.told, "drawn": drawn})], 0)
    gaps = np.concatenate([np.linspace(-1, 1, len(d)) for d in drawn])
    held = np.minimum(np.exp(gaps), 1.5)
    assert step.metrics["importance"] == pytest.approx(held.mean(), abs=1e-4)
    flat = np.concatenate([np.asarray(d) for d in tree.told["drawn"]])
    advantage = np.concatenate([np.asarray(a) for a in tree.told["advantage"]])
    assert step.loss == pytest.approx(float((-held * advantage * flat).mean()), abs=1e-4)


def test_overlong_and_clipped_scores(place: Path, tmp_path: Path) -> None:
    judge = rule(tmp_path / "rule.py", "return 5.0")
    more = (judge, "method.missing_eos=keep", "method.reward_clip=2", "method.overlong=4", "rollout.n=6", "rollout.prompts=4")
    with small.opened(place, tmp_path / "run", "grpo", *more) as run:
        found = small.rollout(run)
    lengths = [len(r) for t in found.trees for r in t.responses]
    scores = [float(s) for t in found.trees for s in t.scores]
    assert scores == pytest.approx([2 + min(0.0, (8 - 4 - length) / 4) for length in lengths]) and len(set(lengths)) > 2


def test_parts_on_one_scale_within_a_rollout(place: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(
        "def large(example, response):\n    return 1000.0 * len(response.text)\n\n\ndef little(example, response):\n"
        "    return 0.001 * sum(map(ord, response.text)) % 0.01\n"
    )
    judge = f"judge={{parts: {{large: '{tmp_path}/rules.py:large', little: '{tmp_path}/rules.py:little'}}, weights: {{little: 2.0}}}}"
    more = (judge, "normalise_parts=true", "method.missing_eos=keep", "rollout.prompts=4", "rollout.n=4")
    with small.opened(place, tmp_path / "run", "grpo", *more) as run:
        found = small.rollout(run)
    parts = [line["parts"] for line in small.lines(tmp_path / "run", 1, "scores")]
    each = {name: np.array([one[name] for one in parts]) for name in ("large", "little")}
    scaled = {name: (v - v.mean()) / (v.std(ddof=1) + 1e-4) for name, v in each.items()}
    assert np.array([t.scores for t in found.trees]) == pytest.approx(scaled["large"] + 2 * scaled["little"], abs=1e-9)
    assert {"score_large", "score_little"} <= found.figures.keys()


def test_kl_target_moves_the_coefficient_from_rollout_to_rollout(place: Path, tmp_path: Path) -> None:
    more = ("method.kl=0.5", "method.kl_target=0.001", "method.kl_horizon=10", "lr=5e-3", "rollout.n=4")
    rows = small.trained(place, tmp_path / "run", "rloo", *ALONE, *more)
    expected = 0.5
    for row in rows:
        expected = reference_coefficient(expected, row["kl_response"], 0.001, 8, 10)
        assert row["coefficient_kl"] == pytest.approx(expected)
    assert len({row["coefficient_kl"] for row in rows}) == 3
    used = [small.kept(tmp_path / "run", number) for number in (1, 2)]
    assert used[0].figures["kl_response"] == 0.0


# ---- rewards of segments


def test_segments_end_where_text_does() -> None:
    assert ends("One. Two! Three", "sentence") == [4, 9, 15]
    assert ends("One.\n\nTwo, yes.  ", "sentence") == [4, 17]
    assert ends("a, b; c", "clause") == [2, 5, 7] and ends("a\nb\n", "line") == [2, 4]
    assert ends("3.14 is pi.", "sentence") == [11] and ends("", "sentence") == [] and ends(" \n ", "line") == []


def test_what_is_asked_and_where_it_lands() -> None:
    text, ids = "Ab. Cd.", tuple("Ab. Cd.")
    decode = lambda part: "".join(part)
    found, places = offsets(ids, decode)
    assert found == text and places == [(i, i + 1) for i in range(7)]
    record = Example("q", (Response(text), Response("")))
    for of, texts, rewards in (
        ("segment", ["Ab.", "Cd."], {2: 2.0, 6: 3.0}),
        ("so_far", ["Ab.", "Ab. Cd."], {2: 2.0, 6: 3.0}),
        ("gain", ["Ab.", "Ab. Cd."], {2: 2.0, 6: 1.0}),
    ):
        config = DenseConfig(use="r", of=of, weight=0.5)
        example, at = asked(record, [text, ""], config)
        assert [r.text for r in example.responses] == texts and at == [[3, 7], []]
        one, other = laid(np.array([2.0, 3.0]), at, [places, [(0, 0)]], config)
        assert {t: float(v) for t, v in enumerate(one) if not np.isnan(v)} == {t: 0.5 * v for t, v in rewards.items()}
        assert np.isnan(other).all() and len(other) == 1


@pytest.mark.parametrize("of", ["segment", "so_far", "gain"])
def test_rewards_of_segments_reach_the_tokens_that_end_them(of: str, place: Path, tmp_path: Path) -> None:
    """Every reward to go is the sum of what stands at the token and behind it; a part that scores 0 still ends a segment."""
    (tmp_path / "rules.py").write_text(
        "def whole(example, response):\n    return 10.0\n\n\ndef part(example, response):\n    return float(len(response.text) % 3)\n"
    )
    dense = f"dense={{part: {{use: '{tmp_path}/rules.py:part', per: clause, of: {of}, weight: 0.5}}}}"
    more = (
        f"judge={tmp_path}/rules.py:whole",
        dense,
        "method.missing_eos=keep",
        "rollout.n=12",
        "prompts_per_step=4",
        "rollout.max_new_tokens=12",
    )
    with small.opened(place, tmp_path / "run", "reinforce", *more, "method.kl=0") as run:
        found, decode = small.rollout(run), run.found.tokenizer.decode
        config = run.online.dense["part"]
    several = 0
    for tree in found.trees:
        for response, advantage in zip(tree.responses, tree.told["advantage"], strict=True):
            text, places = offsets(response.tolist(), decode)
            rewards, before, start = np.zeros(len(response)), 0.0, 0
            for end in ends(text, "clause"):
                part = text[start:end] if of == "segment" else text[:end]
                value = float(len(part.strip()) % 3)
                token = max(t for t, (a, b) in enumerate(places) if a < end and b > a)
                rewards[token] += 0.5 * (value - before if of == "gain" else value)
                before, start = value, end
            several += len(ends(text, "clause")) > 1
            rewards[-1] += 10.0
            assert np.asarray(advantage) == pytest.approx(np.cumsum(rewards[::-1])[::-1], abs=1e-9)
    assert several and config.weight == 0.5
    assert found.figures["dense_reward"] > 0


def test_groups_compare_segments_and_one_that_scores_0_counts(place: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(
        "def whole(example, response):\n    return float(len(response.text) % 2)\n\n\n"
        "def part(example, response):\n    return float(len(response.text) % 2)\n"
    )
    dense = f"dense={{part: {{use: '{tmp_path}/rules.py:part', per: clause, of: segment}}}}"
    more = (
        f"judge={tmp_path}/rules.py:whole",
        dense,
        "method.missing_eos=keep",
        "rollout.n=12",
        "prompts_per_step=4",
        "rollout.max_new_tokens=12",
    )
    with small.opened(place, tmp_path / "run", "grpo", *more) as run:
        found, decode = small.rollout(run), run.found.tokenizer.decode
    zeros = 0
    for tree, line in zip(found.trees, small.lines(tmp_path / "run", 1, "scores"), strict=True):
        width = max(map(len, tree.responses))
        rewards, at, mask = torch.zeros(1, 12, width), torch.zeros(1, 12, width).bool(), torch.zeros(1, 12, width).bool()
        for n, response in enumerate(tree.responses):
            text, places = offsets(response.tolist(), decode)
            mask[0, n, : len(response)] = True
            start = 0
            for end in ends(text, "clause"):
                token = max(t for t, (a, b) in enumerate(places) if a < end and b > a)
                value = float(len(text[start:end].strip()) % 2)
                rewards[0, n, token] += value
                at[0, n, token] = True
                zeros += value == 0 and token < len(response) - 1
                start = end
            rewards[0, n, len(response) - 1] += line["scores"][n]
            at[0, n, len(response) - 1] = True
        expected = process_relative(rewards.double(), at, mask)[0]
        for n, advantage in enumerate(tree.told["advantage"]):
            assert np.asarray(advantage) == pytest.approx(expected[n, : len(advantage)].numpy(), abs=1e-6)
    assert zeros


# ---- alarms


def history(count: int, **of: Any) -> list[dict[str, float]]:
    """Rows of `count` rollouts; each keyword gives a value by rollout."""
    return [{key: float(value(i)) for key, value in of.items()} for i in range(count)]


QUIET: dict[str, Any] = {"reference_perplexity": lambda i: 10, "response_tokens": lambda i: 50}


def test_alarms_of_the_pure_function() -> None:
    config = AlarmConfig(window=2)
    rising, flat = (lambda i: i), (lambda i: 1.0)
    said = lambda **of: monitor.alarm(history(8, **{**QUIET, **of}), config)
    assert said(score=rising) is None
    assert "perplexity" in (said(score=rising, reference_perplexity=lambda i: 10 * 1.3**i) or "")
    assert "perplexity" in (said(score=rising, reference_perplexity=lambda i: 10 / 1.3**i) or ""), "lower is suspicious too"
    assert "length" in (said(score=rising, response_tokens=lambda i: 50 + 10 * i) or "")
    assert said(score=flat, reference_perplexity=lambda i: 10 * 2**i) is None, "only while the score rises"
    assert said(score=lambda i: -i, response_tokens=lambda i: 50 + 10 * i) is None
    assert monitor.alarm(history(3, score=rising, response_tokens=lambda i: 50 * 3**i), config) is None, "two windows are needed"
    falls = said(score=rising, gold=lambda i: 5 - abs(i - 3))
    assert falls is not None and "gold score fell" in falls and "the score rose from" in falls
    assert said(score=rising, gold=rising) is None
    assert said(score=rising, gold=lambda i: (i % 2) * 0.1) is None, "noise is no fall"
    bound = AlarmConfig(window=2, kl=5.0)
    assert "KL" in (monitor.alarm(history(4, score=flat, kl_response_k3=lambda i: 3 * i), bound) or ""), "whatever the score"
    assert monitor.alarm(history(4, score=flat, kl_response_k3=lambda i: 4), bound) is None


ALARMED = ("alarms.window=1", "alarms.kl=0.05", "lr=2e-2", "eval_fraction=0.2", "keep_checkpoints=9", "rollout.n=4", "epochs=3")


@pytest.mark.parametrize("action", ["tell", "stop", "rollback"])
def test_an_alarm_tells_stops_or_rolls_back(action: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = small.words(
        place, tmp_path / "run", "grpo", *ALARMED, f"alarms.action={action}", "best_metric=score", "best_mode=max", "eval_every=1"
    )
    assert runs.train(words) == 0
    shown, rows = capfd.readouterr().err, small.steps(tmp_path / "run")
    at = next(row["step"] for row in rows if row.get("alarm"))
    assert "Alarm after rollout" in shown and "KL to the reference is" in shown
    last = rows[-1]["step"]
    assert (last == at) == (action != "tell"), "also where an evaluation follows the alarm at once"
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    chosen = at - 1 if action == "rollback" else last
    kept = weights(tmp_path / "run", chosen)
    assert all(torch.equal(final[name], kept[f"backbone.hf.{name}"]) for name in final)
    if action == "rollback":
        assert f"The final model is that of step {chosen}" in shown
    if action != "tell":
        assert f"Stopped early at step {at}: alarm, KL to the reference" in shown
    before = runs.digests(tmp_path / "run")
    assert runs.train(words) == 0 and runs.digests(tmp_path / "run") == before, "and stays so when it is started again"


def test_rollback_without_an_older_checkpoint_says_so(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = small.words(place, tmp_path / "run", "grpo", *ALARMED, "alarms.action=rollback", "save_every=50")
    assert runs.train(words) == 0
    assert "No checkpoint is older than the alarm" in capfd.readouterr().err


# ---- what is there for people to read, and on disk


def test_some_responses_are_kept_for_people_to_read(place: Path, tmp_path: Path) -> None:
    words = small.words(place, tmp_path / "run", "grpo", "keep_responses=2", "eval_fraction=0", "rollout.n=4", "keep_checkpoints=1")
    assert runs.train(words) == 0
    folders = sorted((tmp_path / "run" / "rollouts").iterdir(), key=lambda folder: int(folder.name))
    assert [folder.name for folder in folders][:3] == ["1", "3", "5"]
    assert [path.name for path in folders[0].iterdir()] == ["shown.json"], "what no checkpoint needs is gone"
    shown = json.loads((folders[0] / "shown.json").read_text())
    assert [one["which"] for one in shown] == ["worst", "best", "random", "random", "random"]
    assert shown[0]["score"] <= min(one["score"] for one in shown) and shown[1]["score"] >= max(one["score"] for one in shown)


def test_rollouts_that_a_kept_checkpoint_needs_stay_and_those_between_go(place: Path, tmp_path: Path) -> None:
    with small.opened(place, tmp_path / "run", "grpo") as run:
        for number in range(1, 7):
            (run.collector.folder / str(number) / "1").mkdir(parents=True)
            (run.collector.folder / str(number) / "samples.jsonl").touch()
        run.collector.tidy({2, 5})
        assert sorted(int(path.name) for path in run.collector.folder.iterdir()) == [2, 5, 6]
