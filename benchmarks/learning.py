"""Online methods seen learning: sums from a model that knows nothing, over several seeds, what they do without one of their parts, and a
reward that is exploited. docs/online-learning.md is written from the results.

    python -m benchmarks.learning                train what is not there yet, into runs/learning: some ten minutes on one core
    python -m benchmarks.learning --write        write docs/online-learning.md and its figure from the results

Every run is `preftune train`. One result is one file, written whole; killed at any moment, the same command goes on inside the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import learning_page
from benchmarks.common import ROOT
from preftune.cli.console import progress_console
from preftune.cli.main import resolve, start
from preftune.training.durable import replace_file
from preftune.training.metrics import METRICS_FILE, read_metrics
from recipes import arithmetic

SEEDS = (0, 1, 2)
SHARED: Mapping[str, Any] = {"max_length": 32, "tokens_per_microbatch": 4096, "precision": "fp32", "device": "cpu", "threads": 1}
SFT: Mapping[str, Any] = {"prompts_per_step": 64, "lr": 2e-3, "max_steps": 700, "epochs": 9}
ONLINE: Mapping[str, Any] = {
    "epochs": 9, "judge": "final_answer", "rollout.max_new_tokens": 6, "prompts_per_step": 32, "lr": 2e-4, "save_every": 20,
    "keep_checkpoints": 1, "keep_responses": "null", "gold": "final_answer",
}  # fmt: skip
GROUP: Mapping[str, Any] = {"rollout.n": 8, "max_steps": 60, "eval_every": 20}
CRITIC: Mapping[str, Any] = {
    "rollout.n": 4, "rollout.prompts": 64, "max_steps": 120, "eval_every": 40, "method.critic_lr": 1e-3
}  # fmt: skip
"""Twice the prompts and half the responses to each: as many responses as with groups."""
CUT: Mapping[str, Any] = {"rollout.max_new_tokens": 2}


@dataclass(frozen=True)
class Line:
    """One row of the table: a method, what is different of it, and what to expect."""

    name: str
    method: str
    what: str
    settings: Mapping[str, Any] = field(default_factory=dict)


LINES = (
    Line("grpo", "grpo", "GRPO", GROUP),
    Line("ppo", "ppo", "PPO", CRITIC),
    Line("ppo-plain", "ppo", "PPO, advantages not whitened", {**CRITIC, "method.whiten": "false"}),
    Line("ppo-free", "ppo", "PPO, no KL to the reference", {**CRITIC, "method.kl": 0}),
    Line("grpo-keep", "grpo", "GRPO, no penalty for a response that is cut", {**GROUP, "method.missing_eos": "keep"}),
    Line("cut", "grpo", "GRPO, cut at two tokens, with the penalty", {**GROUP, **CUT}),
    Line("cut-keep", "grpo", "GRPO, cut at two tokens, without it", {**GROUP, **CUT, "method.missing_eos": "keep"}),
)
WATCHED = ("score", "gold", "kl_response", "response_tokens", "reference_perplexity", "finished", "alarm", "gold_agreement")


class Bench:
    """The folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def prepare(self) -> None:
        """The model that knows nothing, and its questions."""
        (self.folder / "results").mkdir(parents=True, exist_ok=True)
        if not (self.folder / "held-out.jsonl").exists():
            arithmetic.write(self.folder)

    def result(self, name: str) -> Path:
        """The file of a finished run."""
        return self.folder / "results" / f"{name}.json"

    def train(self, method: str, name: str, settings: Mapping[str, Any]) -> Path:
        """`preftune train` to the end, from where it was stopped; its folder."""
        output = self.folder / name
        words = [method, *(f"{key}={value}" for key, value in {**SHARED, **settings, "output": output}.items())]
        found, config = resolve(words)
        code = start(found, config, progress_console())
        if code:
            raise SystemExit(code)
        return output

    def start(self) -> Path:
        """The imitator from which every run starts."""
        final = self.folder / "sft" / "final"
        if not final.is_dir():
            self.train("sft", "sft", {**SFT, "model": self.folder / "model", "data": self.folder / "shown.jsonl"})
        return final

    def run(self, line: Line, seed: int) -> None:
        """One run, measured as it goes."""
        data = {"data": self.folder / "questions.jsonl", "eval_data": self.folder / "held-out.jsonl"}
        name = f"{line.name}-{seed}"
        output = self.train(line.method, name, {**ONLINE, **data, "model": self.start(), "seed": seed, **line.settings})
        self.keep(name, output, {"name": line.name, "seed": seed})

    def exploited(self) -> None:
        """The policy of the tests' toy, with a proxy that may be exploited."""
        from tests.online import toy

        place = self.folder / "toy"
        if not (place / "judges.py").exists():
            place.mkdir(exist_ok=True)
            toy.place(place)
        output = self.folder / "exploited"
        toy.exploit(place, output)
        self.keep("exploited", output, {"name": "exploited", "seed": 0})

    def keep(self, name: str, output: Path, facts: Mapping[str, Any]) -> None:
        """The run's curves in one file; weights go."""
        rows = read_metrics(output / METRICS_FILE)
        evaluations = [
            {key: row[key] for key in ("step", "score", "score_low", "score_high", "finished")} for row in rows if "score_low" in row
        ]
        rollouts = [{key: row[key] for key in WATCHED if key in row} for row in rows if row["kind"] == "train" and "score" in row]
        found = {
            **facts,
            "evaluations": evaluations,
            "rollouts": rollouts,
            "alarm": any(row.get("alarm") for row in rows),
            "seconds": sum(row["seconds"] for row in rows),
        }
        replace_file(self.result(name), json.dumps(found, indent=1).encode())
        for part in ("checkpoints", "final", "rollouts"):
            shutil.rmtree(output / part, ignore_errors=True)

    def everything(self) -> None:
        """Every run that is not there yet."""
        self.prepare()
        wanted = [(line, seed) for seed in SEEDS for line in LINES if not self.result(f"{line.name}-{seed}").exists()]
        began = time.monotonic()
        for done, (line, seed) in enumerate(wanted):
            left = (time.monotonic() - began) / done * (len(wanted) - done) if done else None
            print(f"{line.what}, seed {seed}: {len(wanted) - done} runs left{f', {left / 60:.0f} min' if left else ''}", flush=True)
            self.run(line, seed)
        if not self.result("exploited").exists():
            self.exploited()
        found = [json.loads(path.read_text()) for path in sorted((self.folder / "results").glob("*.json"))]
        replace_file(self.folder / "learning.json", json.dumps(found).encode())


def main() -> None:
    """Train, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--write", action="store_true", help="write docs/online-learning.md and its figure from the results that are there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        print(learning_page.write(options.output, ROOT / "docs", {line.name: line.what for line in LINES}))
        return
    Bench(options.output).everything()


if __name__ == "__main__":
    main()
