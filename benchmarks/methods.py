"""All methods on one page: each row of the table trained alike on the same pairs, from the same SFT model, then measured alike.

    python -m benchmarks.methods                      train and measure what is not there yet, into runs/methods
    python -m benchmarks.methods --only sft,dpo       these rows alone
    python -m benchmarks.methods --write              write docs/methods-compared.md and its chart from the results that are there

Every row is `preftune train` with the method's default knobs and the learning rate of RATES, then `preftune evaluate` on held-out prompts;
what the policy writes itself is generated here. One result is one file, written whole; killed at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import HH, ROOT
from preftune import formats
from preftune.cli.console import progress_console
from preftune.errors import UserError
from preftune.evaluation.generate import generate
from preftune.evaluation.measure import sequence_kl, token_logps
from preftune.evaluation.statistics import Estimate, clustered_ci, clustered_mean_ci
from preftune.methods import METHODS, Method
from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.records import Example, Response
from preftune.training.durable import replace_file
from preftune.training.metrics import METRICS_FILE
from preftune.training.progress import Meter, meter
from preftune.training.setup import require

START = "sft"
"""The method that makes the model from which every row starts."""
RATES = {"policy": 5e-6, "reward": 2e-5, START: 2e-5}
"""Learning rates by method, else by kind of model: those of a 135M model and a few dozen steps, the same for all of a kind."""

UNITS, TRAINING = 100, 0.8
"""The meter counts hundredths of a method; training is about so much of one, measuring the rest."""

Note = Callable[..., None]
"""How it goes: a text, and the share of the method that is done."""
Change = Callable[[Response, bool], Response]
VARIANTS: dict[str, Change] = {
    "pairs": lambda response, preferred: response,
    "scores 1 and 0 in place of the pair": lambda response, preferred: replace(response, rank=None, score=float(preferred)),
    "labels good and bad in place of the pair": lambda response, preferred: replace(response, rank=None, label=preferred),
}
"""What the pairs are made into for a method that cannot use them as they are: the first that it takes."""


def rate(method: Method) -> float:
    """The row's learning rate."""
    return RATES.get(method.name, RATES[method.model])


def pairs(data: str, train: int, held: int) -> tuple[list[Example], list[Example]]:
    """The first pairs of the data that ask something, cut by prompt: at most `train` to train on and the pairs of `held` prompts."""
    usable: list[Example] = []
    for example in formats.read(data, on_error="skip", limit=3 * (train + held) + 100).examples:
        asks = not isinstance(example.prompt, str) and example.prompt[-1].role == "user"
        if asks and len(example.responses) == 2 and formats.strict_pairs(example):
            usable.append(example)
        if len(usable) == train + held:
            break
    if len(usable) < 2 * held:
        raise SystemExit(f"{data} has only {len(usable)} such pairs, too few to hold {held} out")
    kept, out = formats.split_by_prompt(usable, held / len(usable), 0)
    return kept[:train], out


def varied(examples: Sequence[Example], change: Change) -> list[Example]:
    """The pairs with each response changed, given whether it is the preferred one."""
    made = []
    for example in examples:
        best = formats.strict_pairs(example)[0][0]
        responses = tuple(change(response, n == best) for n, response in enumerate(example.responses))
        made.append(replace(example, responses=responses, comparisons=() if responses != example.responses else example.comparisons))
    return made


def variant_for(method: Method, examples: Sequence[Example]) -> str | None:
    """The first variant of which the method keeps something; None where pairs cannot give what it needs."""
    for name, change in VARIANTS.items():
        try:
            require(method, method.knobs(), varied(examples[:50], change), name)
        except UserError:
            continue
        return name
    return None


# --- one row --------------------------------------------------------------------------------------------------------------------


class Bench:
    """The folder of results, and how everything in it was made."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output
        self.examples, self.held = pairs(str(options.data), options.records, options.held_out)
        names = ("model", "steps", "prompts_per_step", "max_length", "records", "held_out", "new_tokens", "written", "precision")
        self.setup = {"data": Path(str(options.data)).name, **{name: getattr(options, name) for name in names}}
        self.setup["threads"] = torch.get_num_threads()

    def prepare(self) -> None:
        """Write the records; refuse a folder whose results were made in another way."""
        (self.folder / "results").mkdir(parents=True, exist_ok=True)
        file = self.folder / "setup.json"
        if file.exists() and json.loads(file.read_text()) != self.setup:
            raise SystemExit(f"{self.folder} holds results of other settings ({file}): choose another --output")
        for number, change in enumerate(VARIANTS.values()):
            self._write(varied(self.examples, change), self.folder / f"train-{number}.jsonl")
        self._write(self.held, self.folder / "held-out.jsonl")
        replace_file(file, json.dumps(self.setup, indent=1).encode())

    @staticmethod
    def _write(examples: Sequence[Example], path: Path) -> None:
        if not path.exists():
            formats.write(examples, path)

    def result(self, name: str) -> Path:
        """The file of a finished row."""
        return self.folder / "results" / f"{name}.json"

    def left(self, names: Sequence[str]) -> list[str]:
        """The rows that are not finished."""
        return [name for name in names if not self.result(name).exists()]

    def train(self, method: Method, model: str, output: Path, variant: str, note: Note) -> dict[str, Any]:
        """`preftune train` to the end, from where it was stopped; its time and last loss."""
        options = self.options
        settings = {
            "model": model,
            "data": self.folder / f"train-{list(VARIANTS).index(variant)}.jsonl",
            "output": output,
            "lr": rate(method),
            "max_steps": options.steps,
            "epochs": options.steps,  # more than enough: max_steps ends it
            "prompts_per_step": options.prompts_per_step,
            "max_length": options.max_length,
            "tokens_per_microbatch": max(options.tokens_per_microbatch, options.max_length),
            "save_every": options.save_every,
            "keep_checkpoints": 1,
            "precision": options.precision,
        }
        log = output / METRICS_FILE
        steps = lambda: sum(1 for _ in log.open()) if log.exists() else 0
        words = ["train", method.name, *(f"{key}={value}" for key, value in settings.items())]
        told = lambda: note(f"{method.name}: step {steps()} of {options.steps}", TRAINING * steps() / options.steps)
        preftune(words, output.with_suffix(".log"), told)
        rows = [row for line in log.read_text().splitlines() if (row := json.loads(line))["kind"] == "train"]
        return {"seconds": sum(row["seconds"] for row in rows), "final_loss": rows[-1]["loss"], "steps": len(rows), "lr": rate(method)}

    def judge(self, method: Method, model: Path, start: Path, note: Note) -> dict[str, Any]:
        """`preftune evaluate` on the held-out pairs: accuracy of the head, or of the implicit reward against the start."""
        file = model.parent / "evaluation.json"
        words = ["evaluate", str(model), str(self.folder / "held-out.jsonl"), "--output", str(file), "--precision", self.options.precision]
        words += ["--max-length", str(self.options.max_length)]
        words += ["--reference", str(start)] if method.model == "policy" else []
        preftune(words, model.parent.with_suffix(".log"), lambda: note(f"{method.name}: held-out pairs", TRAINING))
        found = {one["key"]: one for one in json.loads(file.read_text())["figures"]}
        return {"accuracy": found["accuracy"], "length_accuracy": found["length_accuracy"]}

    def write_and_compare(self, model: Path, start: Path) -> dict[str, Any]:
        """What the policy writes to held-out prompts: length of greedy responses, and KL to the start over sampled ones."""
        options = self.options
        unique = list({formats.prompt_key(e): e.prompt for e in self.held}.values())[: options.written]
        source = load.locate(str(model))
        tokenizer, policy = load.load_tokenizer(source), LanguageModel(load.load_causal_lm(source))
        tokenizer.turn_ends |= frozenset(load.eos_ids(policy.hf))
        greedy = generate(policy, tokenizer, unique, max_new_tokens=options.new_tokens)
        drawn = [g.tree() for g in generate(policy, tokenizer, unique, max_new_tokens=options.new_tokens, temperature=1.0, seed=0)]
        own = token_logps(policy, drawn)
        del policy
        reference = LanguageModel(load.load_causal_lm(load.locate(str(start))))
        kl, tokens = sequence_kl(own, token_logps(reference, drawn)), np.array([len(v) for v in own], dtype=float)
        per_token = clustered_ci(lambda i: float(kl[i].sum() / tokens[i].sum()), len(kl))
        found = {"kl": clustered_mean_ci(kl), "kl_per_token": per_token, "length": clustered_mean_ci([float(len(g.ids)) for g in greedy])}
        return {key: plain(one) for key, one in found.items()}

    def row(self, method: Method, start: Path, note: Note) -> None:
        """Train, measure, and leave the result; weights go unless they are to be kept."""
        variant = variant_for(method, self.examples)
        facts = {"name": method.name, "title": method.title, "model": method.model, "data": variant}
        if variant is not None:
            run = self.folder / method.name
            facts |= self.train(method, str(start), run, variant, note)
            facts |= self.judge(method, run / "final", start, note)
            note(f"{method.name}: its own responses", (1 + TRAINING) / 2)
            facts |= self.write_and_compare(run / "final", start) if method.model == "policy" else {}
        replace_file(self.result(method.name), json.dumps(facts, indent=1).encode())
        if not self.options.keep:
            for part in ("checkpoints", "final", "cache"):
                shutil.rmtree(self.folder / method.name / part, ignore_errors=True)


def plain(estimate: Estimate) -> dict[str, Any]:
    """As JSON data; what is not finite is null."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in asdict(estimate).items()}


def preftune(words: Sequence[str], log: Path, look: Callable[[], None]) -> None:
    """Run a command as a user would, allocator and all, its words kept in `log`; `look` is called now and then.

    A signal that ends this program is handed on, so that the command saves what it has.
    """
    with log.open("a") as file:
        command = subprocess.Popen([sys.executable, "-m", "preftune", *words], stdout=file, stderr=file, cwd=ROOT, env=environment())
        before = signal.signal(signal.SIGTERM, lambda number, frame: command.send_signal(number))
        try:
            while command.poll() is None:
                look()
                time.sleep(0.5)
        except KeyboardInterrupt:
            command.wait()  # the terminal has told it, too
            raise SystemExit("stopped; the same command goes on from here") from None
        finally:
            signal.signal(signal.SIGTERM, before)
    if command.returncode:
        last = (log.read_text().strip().splitlines() or [""])[-1]
        raise SystemExit(
            f"preftune {' '.join(words)}\nended with {command.returncode}: {last}\nall it said is in {log}; the same command goes on"
        )


def environment() -> dict[str, str]:
    """That of a command of its own, offline."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


# --- the table ------------------------------------------------------------------------------------------------------------------


def measure(bench: Bench, names: Sequence[str], shown: Meter) -> None:
    """Every row that is not there yet, from one start."""
    start, done = bench.folder / "start" / "final", len(names) - len(bench.left(names))
    note = lambda text, share=0.0: shown.at(round(UNITS * (done + share)), text)
    if bench.left(names) and not start.is_dir():
        told = lambda text, share=0.0: note(f"the start, {text}")
        bench.train(METHODS[START], bench.options.model, start.parent, next(iter(VARIANTS)), told)
        shutil.rmtree(start.parent / "checkpoints", ignore_errors=True)
    for name in bench.left(names):
        bench.row(METHODS[name], start, note)
        done += 1
        note(f"{name}: done")


def main() -> None:
    """Train and measure, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="methods, separated by commas; all without it")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default=str(HH) if HH.exists() else "sample:hh_pairs", help="pairs of conversations")
    parser.add_argument("--records", type=int, default=192, help="pairs to train on, at most")
    parser.add_argument("--held-out", type=int, default=128, help="pairs held out, with other prompts")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--prompts-per-step", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--tokens-per-microbatch", type=int, default=1024)
    parser.add_argument("--save-every", type=int, default=8)
    parser.add_argument("--written", type=int, default=16, help="held-out prompts that each policy answers")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "methods")
    parser.add_argument("--keep", action="store_true", help="keep weights and checkpoints of finished rows")
    parser.add_argument("--write", action="store_true", help="write the page from the results that are there, and train nothing")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    options = parser.parse_args()
    options.output = options.output.resolve()
    names = options.only.split(",") if options.only else list(METHODS)
    if unknown := [name for name in names if name not in METHODS]:
        raise SystemExit(f"no such method: {', '.join(unknown)}")
    if options.write:
        from benchmarks.methods_page import write

        print(write(options.output, options.docs))
        return
    bench = Bench(options)
    bench.prepare()
    finished = len(names) - len(bench.left(names))
    with meter(progress_console(), f"{len(names)} methods, in hundredths", UNITS * len(names), UNITS * finished) as shown:
        measure(bench, names, shown)


if __name__ == "__main__":
    main()
