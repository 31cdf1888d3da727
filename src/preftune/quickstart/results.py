"""What the quickstart's report says, each figure with its interval and the file it can be traced to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from preftune.evaluation.generate import Generated
from preftune.evaluation.measure import pair_margins
from preftune.evaluation.statistics import Estimate, accuracy_ci, clustered_mean_ci, paired_difference_ci
from preftune.models.values import Values
from preftune.packing.chat import Tree
from preftune.quickstart import plan
from preftune.records import Example
from preftune.training.durable import replace_file
from preftune.training.metrics import read_metrics


@dataclass(frozen=True)
class HeldOut:
    """The records that no stage trained on."""

    trees: list[Tree]
    examples: list[Example]
    prompts: list[str]
    """A key of each tree's prompt: what belongs together when intervals are made."""


def results(
    output: Path,
    held: HeldOut,
    unique: list[int],
    logps: Mapping[str, Values],
    chosen: Sequence[Tree],
    chosen_logps: Mapping[str, Values],
    written: Mapping[str, list[Generated]],
    kl: np.ndarray,
    rewards: list[np.ndarray],
    scores: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    margins, owners = pair_margins(rewards, held.trees)
    clusters = [held.prompts[i] for i in owners]
    lengths, owners = pair_margins([np.array([len(r) for r in t.responses], dtype=float) for t in held.trees], held.trees)
    implicit = [a - b for a, b in zip(logps["after"], logps["sft"], strict=True)]
    own_margins, _ = pair_margins(implicit, held.trees)
    pairs = [held.examples[i].where for i in owners]
    section = lambda title, text, *metrics: {"title": title, "text": text, "metrics": list(metrics)}

    def figure(key: str, name: str, estimate: Estimate, values: Any, records: Sequence[str], unit: str, explain: str) -> dict[str, Any]:
        plain = [round(float(v), 6) for v in values]
        measured[key] = {"name": name, "value": estimate.value, "values": dict(zip(_unique(records), plain, strict=True))}
        low, high = (None if not np.isfinite(x) else x for x in (estimate.low, estimate.high))
        return {
            "name": name,
            "value": estimate.value,
            "low": low,
            "high": high,
            "n": estimate.n,
            "unit": unit,
            "explain": explain,
            "source": f"measurements.json#/{key}/value",
        }

    places = [held.examples[i].where for i in unique]
    size = {name: np.array([len(g.ids) for g in written[name]], dtype=float) for name in written}
    nll = {name: -np.concatenate(chosen_logps[name]) for name in chosen_logps}
    tokens = np.array([len(t.responses[0]) for t in chosen], dtype=float)
    rows = [e.where for e in held.examples]

    def perplexity_figure(name: str, title: str) -> dict[str, Any]:
        ratio = _ratio_ci(nll[name], tokens, held.prompts)
        explain = "how surprised the model is by people's preferred responses, per token: lower is better"
        return figure(f"perplexity_{name}", title, ratio, np.exp(nll[name] / tokens), rows, "", explain)

    def gain_figure(key: str, name: str, start: str, title: str) -> dict[str, Any]:
        explain = "of the model's own responses (greedy), by the reward model of stage 2: a proxy for people, not people"
        gained = scores[name] - scores[start]
        return figure(key, title, paired_difference_ci(scores[name], scores[start]), gained, places, "", explain)

    def length_figure(name: str, words: str) -> dict[str, Any]:
        title, explain = f"Response length {words}", f"of its own responses (greedy), cut at {plan.NEW_TOKENS}"
        return figure(f"length_{name}", title, clustered_mean_ci(size[name]), size[name], places, "tokens", explain)

    sections = [
        section(
            "Does it agree with people?",
            "Pairs on prompts that were never trained on: how often the preferred response of a pair comes out on top.",
            figure(
                "reward_accuracy",
                "Reward model",
                accuracy_ci(margins, clusters),
                margins,
                pairs,
                "accuracy",
                "the preferred response gets the higher score",
            ),
            figure(
                "implicit_accuracy",
                "DPO model, implicit reward",
                accuracy_ci(own_margins, clusters),
                own_margins,
                pairs,
                "accuracy",
                "DPO raised the preferred response more than the other, relative to its start",
            ),
            figure(
                "length_accuracy",
                "Always the longer one (baseline)",
                accuracy_ci(lengths, clusters),
                lengths,
                pairs,
                "accuracy",
                "what a judge that only counts tokens would reach",
            ),
        ),
        section(
            "What changed in the model?",
            "Perplexity of held-out preferred responses, and what the model writes itself.",
            perplexity_figure("before", "Perplexity before"),
            perplexity_figure("sft", "Perplexity after SFT"),
            perplexity_figure("after", "Perplexity after DPO"),
            length_figure("before", "before"),
            length_figure("sft", "after SFT"),
            length_figure("after", "after DPO"),
            length_figure("rl", "after reinforcement learning"),
            figure(
                "kl",
                "KL to the reference",
                clustered_mean_ci(kl),
                kl,
                places,
                "nats",
                "how far DPO moved from the SFT model, per response of its own drawn at temperature 1",
            ),
            gain_figure("sft_gain", "sft", "before", "Reward-model score, after SFT minus before"),
            gain_figure("reward_gain", "after", "sft", "Reward-model score, DPO minus its start, SFT"),
            gain_figure("reinforced_gain", "rl", "sft", "Reward-model score, reinforcement learning minus its start, SFT"),
        ),
    ]
    replace_file(output / "measurements.json", json.dumps(measured, indent=1, ensure_ascii=False).encode())
    generations = []
    for place, i in enumerate(unique):
        prompt = held.examples[i].prompt
        turns = prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
        pair = {name: round(float(scores[name][place]), 3) for name in ("before", "after")}
        texts = {name: written[name][place].text + ("" if written[name][place].finished else " …") for name in ("before", "after")}
        generations.append({"prompt": turns, **texts, "scores": pair})
    return {
        "headline": _headline(sections[0]["metrics"]),
        "sections": sections,
        "generations": generations,
        "stages": [_stage(output, stage) for stage in plan.PLAN],
        "next": _next(output),
        "meta": {
            "model": "SmolLM2-135M-Instruct",
            "data": f"{plan.DATA}: {len(held.trees)} of its pairs, on {len(unique)} prompts, held out",
            "versions": {name: version(name) for name in ("preftune", "torch", "transformers")},
        },
    }


def _headline(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The result in one or two plain sentences."""
    said = [f"{m['name']} {m['value']:.0%} (95% interval {m['low']:.0%} to {m['high']:.0%})" for m in metrics]
    sure = [m for m in metrics[:2] if m["low"] > 0.5]
    verdict = ("For neither", "For one of the two", "For both")[len(sure)]
    return (
        f"On prompts that no stage saw, how often the models agree with people on a pair: {said[0][0].lower() + said[0][1:]}, {said[1]}. "
        f"{verdict} the interval lies wholly above the 50% of guessing; always taking the longer response gives {metrics[2]['value']:.0%}."
    )


def _ratio_ci(nll: np.ndarray, tokens: np.ndarray, clusters: Sequence[str]) -> Estimate:
    """Perplexity exp(sum nll / sum tokens) with the interval of its logarithm, linearised per response and clustered by prompt."""
    mean = nll.sum() / tokens.sum()
    linear = mean + (nll - mean * tokens) / tokens.mean()
    estimate = clustered_mean_ci(linear, clusters)
    return replace(estimate, value=float(np.exp(mean)), low=float(np.exp(estimate.low)), high=float(np.exp(estimate.high)))


def _unique(names: Sequence[str]) -> list[str]:
    """The names, numbered where one recurs."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return out


def _stage(output: Path, stage: plan.StagePlan) -> dict[str, Any]:
    rows = read_metrics(output / stage.method / "metrics.jsonl")
    trained = sum(1 for row in rows if row["kind"] == "train")
    held = next((row["records"] for row in rows if row["kind"] == "eval"), 0)
    prompts = stage.settings.get("prompts_per_step", plan.SHARED["prompts_per_step"])
    return {
        "name": plan.row(stage).title,
        "run": stage.method,
        "what": f"{stage.what} {trained} steps of {prompts} prompts; {held} records held out.",
        "why": stage.why,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "peak_memory": max(row["peak_memory"] for row in rows),
    }


def _next(output: Path) -> list[str]:
    return [
        f"preftune chat {output}/dpo/final",
        "preftune data show YOUR_PAIRS.jsonl",
        "preftune check dpo model=YOUR_MODEL data=YOUR_PAIRS.jsonl output=runs/mine",
        "preftune train dpo model=YOUR_MODEL data=YOUR_PAIRS.jsonl eval_fraction=0.1 output=runs/mine",
    ]
