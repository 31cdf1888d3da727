"""What peers got wrong, on whole runs: normalisers, whitening, signs, places of rewards, groups, weights that sampler and trainer share."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from preftune.online.experience import Experience
from preftune.online.run import OnlineRun
from preftune.packing.chat import Tree
from tests import tiny
from tests.online import small

LORA = ("lora.rank=4", "lora.alpha=8")


# ---- independent numbers: loops over responses, and plain transformers


def plain_logps(model: Any, tree: Tree, temperature: float = 1.0) -> list[Tensor]:
    """Log-probability of each token of each response, by the model as it is, one row at a time."""
    out = []
    for response in tree.responses:
        ids = torch.from_numpy(np.concatenate([tree.prompt, response]))
        logits = model(ids[None]).logits[0, len(tree.prompt) - 1 : -1].double() / temperature
        out.append(logits.log_softmax(-1).gather(1, torch.from_numpy(response)[:, None]).squeeze(1))
    return out


def gae_by_loops(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Every advantage as its own sum of discounted errors."""
    count = len(rewards)
    errors = [rewards[t] + gamma * (values[t + 1] if t + 1 < count else 0.0) - values[t] for t in range(count)]
    return [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, count)) for t in range(count)]


def responses(found: Experience) -> list[dict[str, Any]]:
    """A row for each response: its score as it counts, its weight and all that is told of its tokens."""
    rows = []
    for tree in found.trees:
        for n in range(len(tree.responses)):
            told = {name: [float(x) for x in values[n]] for name, values in tree.told.items()}
            rows.append({"prompt": tree.id, "score": float(tree.scores[n]), "weight": float(tree.weights[n]), **told})
    return rows


def gradient(run: OnlineRun, trees: list[Tree], budget: int) -> dict[str, Tensor]:
    """The summed gradient of one step on these trees, cut into micro-batches of at most so many tokens."""
    learner = run.learner
    learner.tokens_per_microbatch = budget
    learner.model.train()
    cuts = 0
    for loss, _ in learner.losses(trees, 0, lambda: False):
        loss.backward()
        cuts += 1
    found = {name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None}
    learner.optimizer.zero_grad(set_to_none=True)
    return found | {"cuts": torch.tensor(float(cuts))}


def steps_of(run: OnlineRun, found: Experience) -> list[list[Tree]]:
    return [[found.trees[i] for i in group] for group in run.collector.step_groups(len(found.trees), 1)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer, far from the policy."""
    return tiny.save(tmp_path_factory.mktemp("other") / "model", seed=9, scale=3.0)


# ---- regressions


@pytest.mark.parametrize("weigh", ["token", "response", "budget"])
@pytest.mark.parametrize("cut", ["subtract", "mask"])
def test_regression_02_no_cut_of_a_step_changes_the_gradient(weigh: str, cut: str, place: Path, other: Path, tmp_path: Path) -> None:
    """Ragged lengths, cut responses, several steps a rollout; and the normaliser is the formula's, by loops."""
    more = ("rollout.prompts=5", f"method.weigh={weigh}", f"method.missing_eos={cut}", "method.kl=0.2", f"reference={other}")
    with small.opened(place, tmp_path / "run", "grpo", *more, "prompts_per_step=3", "rollout.n=4") as run:
        found = small.rollout(run)
        lengths = {len(r) for t in found.trees for r in t.responses}
        finished = [f for t in found.trees for f in t.finished]
        assert len(lengths) > 2 and any(finished) and not all(finished)
        first, second = steps_of(run, found)
        assert len(first) == 3 and len(second) == 2
        run.learner.step(first, 0)  # so that ratios are not 1
        ours = float(sum(loss.detach() for loss, _ in run.learner.losses(found.trees, 1, lambda: False)))
        whole, *parts = [gradient(run, found.trees, budget) for budget in (10_000, 120, 40)]
        assert [one.pop("cuts") > number for number, one in enumerate((whole, *parts))] == [True] * 3
        for part in parts:
            for name, expected in whole.items():
                size = expected.abs().max().clamp(min=1e-8)
                torch.testing.assert_close(part[name] / size, expected / size, atol=2e-5, rtol=0)
        expected_loss = _grpo_by_loops(run, found.trees, weigh, cut, AutoModelForCausalLM.from_pretrained(other))
        assert ours == pytest.approx(expected_loss, abs=2e-6)


def _grpo_by_loops(run: OnlineRun, trees: list[Tree], weigh: str, cut: str, reference: Any) -> float:
    """Clipped loss and 0.2 k3 of every token, put together as the papers do."""
    plain = tiny.model()
    plain.load_state_dict({name.removeprefix("backbone.hf."): p for name, p in run.learner.model.state_dict().items()}, strict=False)
    sums, counts, total = [], [], 0
    with torch.no_grad():
        for tree in trees:
            pairs = zip(plain_logps(plain, tree), plain_logps(reference, tree), strict=True)
            for n, (logp, ref) in enumerate(pairs):
                ratio = (logp - torch.from_numpy(tree.told["old"][n])).exp()
                advantage = torch.from_numpy(tree.told["advantage"][n])
                term = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                term += 0.2 * ((ref - logp).exp() - 1 - (ref - logp))
                weight = float(tree.finished[n] or cut != "mask")
                sums.append(weight * float(term.sum()))
                counts.append(len(term))
                total += weight * len(term)
    if weigh == "token":
        return sum(sums) / total if total else 0.0
    if weigh == "response":
        return sum(s / c for s, c in zip(sums, counts, strict=True)) / len(sums)
    return sum(sums) / len(sums) / 8


@pytest.mark.parametrize("method", ["ppo", "reinforce++", "reinforce++_baseline"])
@pytest.mark.parametrize("cut", ["subtract", "mask"])
def test_regression_09_whitening_counts_the_tokens_that_are_learned_and_no_other(
    method: str, cut: str, place: Path, tmp_path: Path
) -> None:
    more = ("rollout.prompts=6", "rollout.n=3", f"method.missing_eos={cut}")
    with small.opened(place, tmp_path / "run", method, *more) as run:
        rows = responses(small.rollout(run))
    kept = np.concatenate([row["advantage"] for row in rows if row["weight"] > 0])
    assert kept.mean() == pytest.approx(0, abs=1e-9) and kept.std(ddof=1) == pytest.approx(1, abs=1e-6)
    left = [x for row in rows if row["weight"] == 0 for x in row["advantage"]]
    assert bool(left) == (cut == "mask") and not any(left)


@pytest.mark.parametrize("more", [(), ("method.k_step=2",), ("method.whiten=false", "method.gamma=1.0")], ids=["gae", "k-step", "plain"])
def test_ppo_s_advantages_and_returns_are_those_of_loops(more: tuple[str, ...], place: Path, other: Path, tmp_path: Path) -> None:
    """A whole rollout, from the scores in the journal to what each token is told."""
    base = ("rollout.prompts=4", "rollout.n=2", "method.kl=0.3", f"reference={other}", "method.gamma=0.9", "method.lam=0.8")
    base = base[:5] if any("k_step" in word for word in more) else base
    with small.opened(place, tmp_path / "run", "ppo", *base, *more) as run:
        _scale_head(run)
        rows, gamma = responses(small.rollout(run)), run.online.knobs.gamma
    scored = [s for line in small.lines(tmp_path / "run", 1, "scores") for s in line["scores"]]
    drawn = sorted(small.lines(tmp_path / "run"), key=lambda line: (int(line["prompt"]), line["number"]))
    assert {line["finish"] for line in drawn} == {"stop", "length"}
    advantages = []
    for row, raw, line in zip(rows, scored, drawn, strict=True):
        assert row["score"] == pytest.approx(raw - (line["finish"] == "length"))
        rewards = [-0.3 * (old - ref) for old, ref in zip(row["old"], row["reference"], strict=True)]
        rewards[-1] += row["score"]
        if "k_step" in str(more):
            at = lambda values, t: values[t] if t < len(values) else 0.0
            value = row["value"]
            mine = [
                at(rewards, t) + gamma * at(rewards, t + 1) + gamma**2 * at(value, t + 2) - value[t] for t in range(len(value))
            ]  # fmt: skip
        else:
            mine = gae_by_loops(rewards, row["value"], gamma, 0.8)
        advantages.append(mine)
        assert row["return"] == pytest.approx([a + v for a, v in zip(mine, row["value"], strict=True)], abs=1e-9)
    flat = np.concatenate(advantages)
    if "method.whiten=false" not in more:
        flat = (flat - flat.mean()) / flat.std(ddof=1)
    assert np.concatenate([row["advantage"] for row in rows]) == pytest.approx(flat, abs=1e-6)
    assert np.concatenate([row["value"] for row in rows]).std() > 0.01


def _scale_head(run: OnlineRun) -> None:
    """Give the critic something to say: its values begin at 0."""
    critic = run.learner.actor.critic
    assert critic is not None
    with torch.no_grad():
        critic.head.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))


def test_ppo_s_losses_are_those_of_loops_and_plain_transformers(place: Path, tmp_path: Path) -> None:
    """The second step of a rollout, whose ratios are not 1 and whose values have moved, at a temperature."""
    more = ("rollout.prompts=4", "rollout.n=2", "rollout.temperature=1.3", "lr=3e-3", "method.value_weight=0.7", "method.entropy=0.01")
    with small.opened(place, tmp_path / "run", "ppo", *more) as run:
        _scale_head(run)
        learner, actor = run.learner, run.learner.actor
        first, second = steps_of(run, small.rollout(run))
        learner.step(first, 0)
        ours = float(sum(loss.detach() for loss, _ in learner.losses(second, 1, lambda: False)))
        plain, trunk = tiny.model(), tiny.model()
        for into, start in ((plain, "backbone.hf."), (trunk, "critic.backbone.hf.")):
            into.load_state_dict({k.removeprefix(start): v for k, v in actor.state_dict().items() if k.startswith(start)})
        policy, value, bonus, clipped, moved = [], [], [], 0, 0.0
        with torch.no_grad():
            for tree in second:
                for n, logp in enumerate(plain_logps(plain, tree, 1.3)):
                    ids = torch.from_numpy(np.concatenate([tree.prompt, tree.responses[n]]))
                    states = trunk.model(ids[None]).last_hidden_state[0, len(tree.prompt) - 1 : -1]
                    values = (states @ actor.critic.head.weight.T).squeeze(1)
                    full = (plain(ids[None]).logits[0, len(tree.prompt) - 1 : -1].double() / 1.3).log_softmax(-1)
                    told = {name: tree.told[name][n] for name in tree.told}
                    for t in range(len(logp)):
                        ratio, a = math.exp(float(logp[t]) - told["old"][t]), told["advantage"][t]
                        policy.append(-min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
                        v, before, target = float(values[t]), told["value"][t], told["return"][t]
                        held = min(max(v, before - 0.2), before + 0.2)
                        value.append(0.5 * max((v - target) ** 2, (held - target) ** 2))
                        bonus.append(-float((full[t].exp() * full[t]).sum()))
                        clipped += held != v
                        moved = max(moved, abs(ratio - 1))
    assert clipped and moved > 0.05, "the comparison must mean something"
    expected = np.mean(policy) + 0.7 * np.mean(value) - 0.01 * np.mean(bonus)
    assert ours == pytest.approx(expected, abs=3e-6)


PULLS = {
    "reinforce": ("method.kl=1.0", "method.gamma=1.0", "method.whiten=true"),
    "rloo": ("method.kl=1.0",),
    "grpo, k2": ("method.kl=1.0", "method.kl_loss=k2"),
    "grpo, k3": ("method.kl=1.0",),
    "grpo, k3_is": ("method.kl=1.0", "method.kl_loss=k3_is"),
    "reinforce++_baseline": ("method.kl=1.0",),
    "ppo": ("method.kl=1.0",),
}


@pytest.mark.parametrize("name", PULLS)
def test_regression_11_the_penalty_alone_moves_the_policy_to_the_reference(name: str, place: Path, other: Path, tmp_path: Path) -> None:
    """In the reward and in the loss; every response scores the same, so nothing else moves it."""
    rule = tmp_path / "rule.py"
    rule.write_text("def rule(example, response):\n    return 0.0\n")
    prompts = "4" if name == "ppo" else "2"
    more = (f"judge={rule}:rule", f"reference={other}", "rollout.n=16", "method.missing_eos=keep", "max_steps=14", "lr=1e-2")
    rows = small.trained(
        place, tmp_path / "run", name.split(",")[0], *more, *PULLS[name], f"rollout.prompts={prompts}", "epochs=9", "eval_fraction=0"
    )
    far = [row["kl_response_k3"] for row in rows if "kl_response_k3" in row]
    assert np.mean(far[-3:]) < 0.8 * far[0], far


def test_regression_11_the_penalty_s_gradient_is_that_of_finite_differences(place: Path, other: Path, tmp_path: Path) -> None:
    """k2 in the loss: one step down its gradient brings the policy nearer, over the whole vocabulary at every state."""
    rule = tmp_path / "rule.py"
    rule.write_text("def rule(example, response):\n    return 0.0\n")
    more = (f"judge={rule}:rule", f"reference={other}", "method.kl=1.0", "method.kl_loss=k2", "rollout.n=24", "method.missing_eos=keep")
    with small.opened(place, tmp_path / "run", "grpo", *more, "prompts_per_step=4") as run:
        found = small.rollout(run)
        learner = run.learner
        value = lambda: float(sum(loss.detach().double() for loss, _ in learner.losses(found.trees, 0, lambda: False)))
        grads = gradient(run, found.trees, 10_000)
        name = "backbone.hf.model.layers.1.mlp.down_proj.weight"
        parameter, grad = learner.parameters[name], grads[name]
        direction = grad / grad.norm()
        with torch.no_grad():
            parameter += 1e-2 * direction
            above = value()
            parameter -= 2e-2 * direction
            below = value()
            parameter += 1e-2 * direction
        assert (above - below) / 2e-2 == pytest.approx(float(grad.norm()), rel=0.02)


def test_regression_12_the_kl_that_is_logged_is_the_one_that_is_used(place: Path, other: Path, tmp_path: Path) -> None:
    """In the reward: what is missing of a response's score is the coefficient times its logged KL. In the loss: the same, of the loss."""
    more = ("rollout.prompts=4", "rollout.n=2", "method.kl=0.7", f"reference={other}", "method.missing_eos=keep")
    with small.opened(place, tmp_path / "run", "reinforce", *more) as run:
        found = small.rollout(run)
    rows = responses(found)
    taken = np.mean([row["score"] - row["advantage"][0] for row in rows])
    assert taken == pytest.approx(0.7 * found.figures["kl_response"], abs=1e-9) and abs(taken) > 0.1
    with small.opened(place, tmp_path / "other", "grpo", "method.kl=0.7", f"reference={other}", "prompts_per_step=4") as run:
        found = small.rollout(run)
        flat = [_without_advantage(tree) for tree in found.trees]
        step = run.learner.step(flat, 0)
        gaps = np.concatenate(
            [np.concatenate([old - ref for old, ref in zip(t.told["drawn"], t.told["reference"], strict=True)]) for t in flat]
        )
    assert step.loss == pytest.approx(0.7 * step.metrics["kl_loss"], rel=1e-5)
    assert step.metrics["kl"] == pytest.approx(gaps.mean(), abs=1e-5)
    assert step.metrics["kl_loss"] == pytest.approx((np.exp(-gaps) - 1 + gaps).mean(), rel=1e-4)


def _without_advantage(tree: Tree) -> Tree:
    from dataclasses import replace

    return replace(tree, told={**tree.told, "advantage": tuple(0 * one for one in tree.told["advantage"])})


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_regression_16_after_a_large_step_sampler_and_trainer_agree(
    method: str, lora: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    more = ("max_steps=3", "lr=0.05", "rollout.top_p=1.0", "eval_fraction=0", "method.old_logp=recomputed", *lora)
    n = ("rollout.n=1", "rollout.prompts=2") if method == "ppo" else ()
    rows = small.trained(place, tmp_path / "run", method, *more, *n)
    assert all(row["sampler_gap"] < 1e-4 for row in rows)
    assert rows[1]["kl_response_k3"] > 0.5, "the step was a large one, and the sampler is of the new weights"


@pytest.mark.parametrize("mode", ["keep", "subtract"])
def test_regression_20_the_reward_stands_on_the_last_token_and_0_is_a_reward(mode: str, place: Path, tmp_path: Path) -> None:
    """Half the weight a token further away from the last: the place shows in every advantage, of responses that ended and were cut."""
    rule = tmp_path / "rule.py"
    rule.write_text("def rule(example, response):\n    return float(len(response.text) % 3)\n")
    more = (f"judge={rule}:rule", "method.kl=0", "method.gamma=0.5", f"method.missing_eos={mode}", "rollout.n=6", "rollout.prompts=6")
    with small.opened(place, tmp_path / "run", "reinforce", *more) as run:
        found = small.rollout(run)
    raw = [s for line in small.lines(tmp_path / "run", 1, "scores") for s in line["scores"]]
    finished = [f for tree in found.trees for f in tree.finished]
    assert {(s == 0, f) for s, f in zip(raw, finished, strict=True)} == {(a, b) for a in (True, False) for b in (True, False)}
    for row, score, ended in zip(responses(found), raw, finished, strict=True):
        counted = score - (0.0 if ended or mode == "keep" else 1.0)
        length = len(row["advantage"])
        assert row["advantage"] == pytest.approx([counted * 0.5 ** (length - 1 - t) for t in range(length)], abs=1e-12)
    for tree in found.trees:
        assert [len(r) < 8 for r in tree.responses] == [f and len(r) < 8 for f, r in zip(tree.finished, tree.responses, strict=True)]
        assert all((r[-1] == 2) == f for f, r in zip(tree.finished, tree.responses, strict=True)), "its own end, and none that was cut"


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_regression_20_a_score_of_0_counts_in_its_group(method: str, place: Path, tmp_path: Path) -> None:
    rule = tmp_path / "rule.py"
    rule.write_text("def rule(example, response):\n    return float(len(response.text) % 2)\n")
    off = ("method.kl=0",) if method == "rloo" else ()
    more = (f"judge={rule}:rule", "method.missing_eos=keep", "rollout.n=4", "rollout.prompts=4", *off)
    with small.opened(place, tmp_path / "run", method, *more) as run:
        found = small.rollout(run)
    seen = False
    for tree, line in zip(found.trees, small.lines(tmp_path / "run", 1, "scores"), strict=True):
        scores = np.array(line["scores"])
        if method == "grpo":
            expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-4)
        else:
            expected = scores - (scores.sum() - scores) / 3
        assert [float(a[0]) for a in tree.told["advantage"]] == pytest.approx(expected, abs=1e-9)
        seen |= 0 in scores and 1 in scores
    assert seen


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("more", [(), ("method.redraw=2",)], ids=["plain", "redrawn"])
def test_regression_27_a_group_is_one_prompt_s_whatever_the_shuffle(seed: int, more: tuple[str, ...], place: Path, tmp_path: Path) -> None:
    """The score tells of prompt and response; it is computed again here from each tree's own tokens."""
    rule = tmp_path / "rule.py"
    rule.write_text(
        "def rule(example, response):\n    asked = example.prompt[-1].content\n"
        "    return (hash((len(asked), asked[-2])) * 0 + ord(asked[-2]) * 31 + len(response.text) * 7) % 5 // 2 * 1.0\n"
    )
    base = (f"judge={rule}:rule", f"seed={seed}", "rollout.n=3", "rollout.prompts=5", "method.missing_eos=keep", *more)
    with small.opened(place, tmp_path / "run", "grpo", *base) as run:
        found = small.rollout(run)
        by_id = {example.id: example for example in run.found.prompts}
        encoded = {example.id: list(run.found.tokenizer.encode_prompt(example.prompt)) for example in run.found.prompts}
        decode = run.found.tokenizer.decode
        for tree in found.trees:
            assert list(tree.prompt) == encoded[tree.id]
            last = by_id[tree.id].prompt[-1].content[-2]
            scores = np.array([(ord(last) * 31 + len(decode(r).strip()) * 7) % 5 // 2 * 1.0 for r in tree.responses])
            assert [float(s) for s in tree.scores] == scores.tolist()
            expected = (scores - scores.mean()) / (scores.std(ddof=1) + 1e-4)
            assert [float(a[0]) for a in tree.told["advantage"]] == pytest.approx(expected, abs=1e-9)
        groups = run.collector.step_groups(len(found.trees), 1)
        assert sorted(i for group in groups for i in group) == list(range(len(found.trees)))
        if more and len(found.trees) == 5:
            assert all(tree.scores.max() > tree.scores.min() for tree in found.trees)


def test_a_prompt_that_comes_twice_in_a_rollout_is_answered_twice(place: Path, tmp_path: Path) -> None:
    """Nine prompts, of which a rollout takes twelve: the second answers are other ones."""
    with small.opened(place, tmp_path / "run", "grpo", "rollout.prompts=12", "epochs=2", "eval_fraction=0") as run:
        found = small.rollout(run)
    names = [tree.id for tree in found.trees]
    twice = [name for name in set(names) if names.count(name) == 2]
    assert len(twice) == 3
    for name in twice:
        a, b = ([r.tolist() for r in tree.responses] for tree in found.trees if tree.id == name)
        assert not any(one in b for one in a)


def test_a_stop_text_is_left_out_of_what_is_judged_and_stays_so_after_a_kill(place: Path, tmp_path: Path) -> None:
    """The judge reads the text before the stop; the tokens that made it are learned all the same."""
    with small.opened(place, tmp_path / "run", "grpo", "rollout.stop=[a,e,n]", "rollout.n=12", "prompts_per_step=4") as run:
        small.rollout(run)
    lines = sorted(small.lines(tmp_path / "run"), key=lambda one: (int(one["prompt"]), one["number"]))
    scores = [s for line in small.lines(tmp_path / "run", 1, "scores") for s in line["scores"]]
    for line, score in zip(lines, scores, strict=True):
        assert score == pytest.approx(sum(c in "aeiou" for c in line["text"]) / (1 + len(line["text"])))
        assert line["text_end"] is None or not any(stop in line["text"] for stop in "aen")
    assert any(line["text_end"] is not None for line in lines)


def test_what_is_saved_is_a_plain_model_of_the_policy_alone(place: Path, tmp_path: Path) -> None:
    small.trained(place, tmp_path / "run", "ppo", "max_steps=2", "rollout.n=1", "rollout.prompts=4")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")
    assert {name for name in load_file(tmp_path / "run" / "final" / "model.safetensors") if "critic" in name or "value" in name} == set()
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors")
    for name, value in plain.state_dict().items():
        if f"backbone.hf.{name}" in state:
            assert torch.equal(value, state[f"backbone.hf.{name}"])
