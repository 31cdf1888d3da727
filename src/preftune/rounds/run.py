"""A run in rounds: sample, score, select, train, again; every phase leaves a file, so that it goes on from wherever it was stopped.

`rounds/R/` holds round R: its samples, their scores, what was selected, and the training run; `evaluation/R/` what the model after R rounds
(0: the starting model) answers to the held-out prompts. A phase whose file is there is not done again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from preftune import formats
from preftune.errors import UserError
from preftune.models import load
from preftune.models.policy import LanguageModel, settle_layout
from preftune.packing.chat import ChatTokenizer
from preftune.records import Example
from preftune.report.page import CHANGE_FILE
from preftune.rewards.judge import Opened, header, score, without_score
from preftune.rollout.config import EngineName
from preftune.rollout.draw import Sampler, draw, lacking, records
from preftune.rollout.engine import Engine
from preftune.rollout.journal import Journal
from preftune.rollout.sampling import Sampling
from preftune.rounds.config import RoundsConfig
from preftune.rounds.figures import change, evaluated, merged, score_words, sentence
from preftune.rounds.methods import ITERATED, Iterated
from preftune.rounds.penalty import PENALISED, divergence, judged, penalised, scores_of
from preftune.rounds.ready import ready, template, training_config
from preftune.rounds.served import Served
from preftune.selection.best_of_n import best_of_n_curve
from preftune.selection.select import with_scores
from preftune.training.durable import replace_file
from preftune.training.failpoints import failpoint
from preftune.training.manifest import RunManifest, Session
from preftune.training.progress import meter, peak_memory
from preftune.training.run import MAY_CHANGE
from preftune.training.run import train as train_once
from preftune.training.rundir import FINAL, RunDirectory
from preftune.training.signals import GracefulStop, Stopped

HERE = {"rollout.cache_gb", "keep_models", *(f"rollout.vllm.{name}" for name in ("python", "url", "parallel", "timeout", "patience"))}
"""Settings that may change where a run goes on."""
FACTS = "facts.json"
"""What a finished round or evaluation says of itself."""


class _Interrupted(Exception):
    """A phase was given up on a signal; its exit code is the argument."""


@dataclass
class Rounds:
    """A run in rounds under way."""

    row: Iterated
    config: RoundsConfig
    directory: RunDirectory
    console: Console
    prompts: list[Example]
    held_out: list[Example]
    judge: Opened
    device: torch.device
    compute: torch.dtype
    stop: GracefulStop
    _policy: tuple[str, LanguageModel, ChatTokenizer] | None = field(default=None, repr=False)
    _served: Served | None = field(default=None, repr=False)
    _agreed: dict[str, float] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        return self.directory.path

    def folder(self, kind: str, number: int) -> Path:
        """The folder of round `number`, or of the evaluation after it."""
        return self.path / kind / str(number)

    def model(self, number: int) -> str:
        """The model after `number` rounds."""
        if number == 0:
            return self.config.model
        own = self.folder("rounds", number) / "train" / FINAL
        return str(own if own.is_dir() else self.directory.final)

    # --- phases -----------------------------------------------------------------------------------------------------------------

    def evaluate(self, number: int) -> dict[str, Any]:
        """The judge's scores of what the model after `number` rounds answers to the held-out prompts."""
        folder, rollout = self.folder("evaluation", number), self.config.rollout
        if (folder / FACTS).exists():
            return _read(folder / FACTS)
        start = time.monotonic()
        sampling = replace(self.sampling(number), temperature=rollout.eval_temperature)
        sampled = self.sample(folder / "samples.jsonl", number, self.held_out, rollout.eval_n, sampling, self.config.seed)
        scored = self.score(folder / "scored.jsonl", sampled)
        facts = evaluated(scored) | {"seconds": round(time.monotonic() - start, 3), "peak_memory": peak_memory()}
        _write(folder / FACTS, facts)
        return facts

    def round(self, number: int) -> dict[str, Any]:
        """Round `number`, counted from 1: from the model before it to the model after it."""
        folder = self.folder("rounds", number)
        if (folder / FACTS).exists():
            return _read(folder / FACTS)
        start = time.monotonic()
        said = f"Round {number} of {self.config.rounds}"
        self.console.print(f"{said}: {self.config.rollout.n} responses to each of {len(self.prompts_of(number))} prompts.", soft_wrap=True)
        seed = int(np.random.SeedSequence([self.config.seed, number]).generate_state(1)[0])
        sampled = self.sample(
            folder / "samples.jsonl", number - 1, self.prompts_of(number), self.config.rollout.n, self.sampling(number), seed
        )
        scored = self.score(folder / "scored.jsonl", sampled)
        facts = self.select(folder / "selected.jsonl", penalised(self, folder / PENALISED, scored, number), number)
        self.console.print(f"{said}: {sentence(facts)}", soft_wrap=True)
        facts |= self.train(folder, number)
        facts |= {"seconds": round(time.monotonic() - start, 3), "peak_memory": peak_memory()}
        failpoint("round.trained")
        _write(folder / FACTS, facts)
        failpoint("round.written")
        shutil.rmtree(folder / "train" / "checkpoints", ignore_errors=True)
        if not self.config.keep_models:
            for old in range(1, number):
                shutil.rmtree(self.folder("rounds", old) / "train" / FINAL, ignore_errors=True)
        return facts

    def sample(self, output: Path, model: int, examples: Sequence[Example], n: int, sampling: Sampling, seed: int) -> list[Example]:
        """Responses of the model after `model` rounds, as records."""
        if output.exists():
            return list(formats.read(output).examples)
        source = load.locate(self.model(model))
        facts = {"samples": 1, "model": load.fingerprint(source), "seed": seed, "precision": str(self.compute), **vars(sampling)}
        facts |= {"engine": "vllm"} if self.config.rollout.engine is EngineName.vllm else {}
        with Journal(output.with_name(f"{output.name}.partial"), json.loads(json.dumps(facts))) as journal:
            total = n * len(examples)
            done = total - sum(map(len, lacking(examples, n, journal)))
            if done < total:
                engine, tokenizer = self.sampler(self.model(model))
                with meter(self.console, f"responses of {source.name}", total, done) as shown:
                    whole = draw(
                        engine, tokenizer, examples, n, sampling, seed, journal,
                        on_done=shown.at, give_up=self.asked_to_stop,
                    )  # fmt: skip
                if not whole:
                    raise _Interrupted(self.stop.exit_code)
            found = records(examples, journal, n, source.name)
            formats.write(found, output)
            journal.path.unlink()
        failpoint("round.sampled")
        self.pause()
        return found

    def score(self, output: Path, examples: Sequence[Example]) -> list[Example]:
        """The judge's scores of the records."""
        if output.exists():
            return list(formats.read(output).examples)
        with Journal(output.with_name(f"{output.name}.partial"), header(examples, self.judge)) as journal:
            with meter(self.console, "records scored", len(examples), len(journal.done)) as shown:
                found = score(examples, self.judge.judge, journal, on_done=shown.at, give_up=self.asked_to_stop)
            if found is None:
                raise _Interrupted(self.stop.exit_code)
        formats.write(found, output)
        journal.path.unlink()
        failpoint("round.scored")
        self.pause()
        return found

    def select(self, output: Path, scored: Sequence[Example], number: int) -> dict[str, Any]:
        """Write what is learned of the round's responses, or of all rounds', and say what that did to the scores."""
        pool = list(scored)
        if self.config.pool == "all":
            name = PENALISED if self.row.penalty(self.config.method) else "scored.jsonl"
            pool = merged([*(e for r in range(1, number) for e in _records(self.folder("rounds", r) / name)), *scored])
        known, unscored = [scores for e in scored if (scores := scores_of(e))], without_score(scored)
        if not known:
            raise UserError(
                f"the judge could score none of the {unscored} responses of round {number}",
                where=str(output.with_name("scored.jsonl")),
                fix="Take a judge that can, or other prompts.",
            )
        total = sum(len(e.responses) for e in pool)
        found = self.row.select(with_scores(pool)[0], self.config.method, self.config.seed + number)
        if not found.examples:
            raise UserError(
                f"round {number} leaves nothing to learn: none of {total} responses is kept",
                where=str(output.with_name("scored.jsonl")),
                fix="Draw more or longer responses, lower method.at_least, or start from a model that can do some of the task.",
            )
        if not output.exists():
            formats.write(found.examples, output)
        failpoint("round.selected")
        chosen = [judged(r) for e in found.examples for r in e.responses]
        return {
            "responses": total,
            "selected": len(found.after),
            "records": len(found.examples),
            "prompts_without": found.prompts_without,
            "score_sampled": float(np.concatenate(known).mean()),
            "score_selected": float(np.mean(chosen)),
            **divergence(scored),
            "unscorable": unscored / sum(len(e.responses) for e in scored),
            "best_of_n": best_of_n_curve(known),
        }

    def train(self, folder: Path, number: int) -> dict[str, Any]:
        """Train on the selected records, by an ordinary run in the round's folder."""
        self.settle()
        self._policy = None
        gc.collect()
        base = self.model(number - 1) if self.config.start == "last" else self.config.model
        name, config = training_config(self.row, self.config, base, folder / "selected.jsonl", folder / "train")
        code = train_once(name, config, self.console)
        if code:
            raise _Interrupted(code)
        rows = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if row["kind"] == "train"]
        return {"steps": len(steps), "loss": steps[-1]["loss"], "tokens": sum(row["tokens"] for row in steps), **self._agreed}

    def asked_to_stop(self) -> bool:
        """Whether a signal came."""
        return self.stop.requested is not None

    def pause(self) -> None:
        """Leave between two phases where a signal came."""
        if self.asked_to_stop():
            raise _Interrupted(self.stop.exit_code)

    # --- what the phases need ---------------------------------------------------------------------------------------------------

    def sampler(self, model: str) -> tuple[Sampler, ChatTokenizer]:
        """What draws from the model, and its tokenizer."""
        rollout = self.config.rollout
        if rollout.engine is EngineName.local:
            policy, tokenizer = self.policy(model)
            return Engine(policy, tokenizer.turn_ends, tokenizer.decode, int(rollout.cache_gb * 1e9)), tokenizer
        if self._served is None or self._served.model != model:
            self.settle()
            self._served = Served(self, model)
        return self._served.server, self._served.tokenizer

    def settle(self) -> None:
        """End the sampling server, where there is one, and say how its log-probabilities agreed with the model's own."""
        served, self._served = self._served, None
        if served is not None:
            self._agreed = served.settle()

    def close(self) -> None:
        """End the sampling server, whatever happened."""
        if self._served is not None:
            self._served.close()

    def policy(self, model: str) -> tuple[LanguageModel, ChatTokenizer]:
        """The model to sample from, loaded once for as long as it is the same."""
        if self._policy is None or self._policy[0] != model:
            self._policy = None
            gc.collect()
            source = load.locate(model)
            with self.console.status(f"loading {source.name}"):
                policy = LanguageModel(load.load_causal_lm(source), compute=self.compute).to(self.device)
            notice = settle_layout(policy)
            if notice:
                self.console.print(f"[yellow]{notice}[/yellow]", soft_wrap=True)
            tokenizer = load.load_tokenizer(source, template=template(self.config))
            tokenizer.turn_ends |= frozenset(load.eos_ids(policy.hf))
            self._policy = model, policy, tokenizer
        return self._policy[1], self._policy[2]

    def prompts_of(self, number: int) -> list[Example]:
        """The prompts of round `number`: all, or the next so many of passes in shuffled orders."""
        count = self.config.rollout.prompts
        if count is None or count >= len(self.prompts):
            return self.prompts
        order: list[int] = []
        while len(order) < number * count:
            order += np.random.default_rng([self.config.seed, len(order)]).permutation(len(self.prompts)).tolist()
        chosen = dict.fromkeys(order[(number - 1) * count : number * count])
        return [self.prompts[i] for i in chosen]

    def sampling(self, number: int) -> Sampling:
        """How round `number` draws."""
        r = self.config.rollout
        temperature = r.temperature_of(max(1, min(number, self.config.rounds)))
        return Sampling(r.max_new_tokens, temperature, r.top_p, r.top_k, r.min_p, r.repetition_penalty, r.stop)

    def log(self, step: int, kind: Any, facts: dict[str, Any]) -> None:
        """One row of the metrics: a round is a step."""
        self.directory.metrics.append(step, kind, {key: value for key, value in facts.items() if isinstance(value, int | float)})

    def all(self) -> dict[str, Any]:
        """Every round, with an evaluation before the first and after each; returns what changed from first to last."""
        self.directory.metrics.truncate(-1)  # its rows are those of the facts, written again
        evaluated = []
        for number in range(self.config.rounds + 1):
            if number:
                facts = self.round(number)
                self.log(number, "train", {key: value for key, value in facts.items() if key != "best_of_n"})
            if self.held_out:
                facts = self.evaluate(number)
                evaluated.append(facts)
                self.log(number, "eval", {key: value for key, value in facts.items() if key != "scores"})
                self.console.print(f"Held out, after {number} rounds: {score_words(facts)}", soft_wrap=True)
        return change(evaluated[0]["scores"], evaluated[-1]["scores"]) if evaluated else {}


def train(name: str, config: RoundsConfig, console: Console) -> int:
    """`preftune train` of an iterated method: to the end, or to a signal. Returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("an iterated method runs in one process", fix="Start it without torchrun.")
    row = ITERATED[name]
    if config.threads:
        torch.set_num_threads(config.threads)
    with RunDirectory(Path(config.output)) as directory, GracefulStop() as stop:
        stop.patient = False  # until there is something to save
        try:
            run, manifest = prepare(row, config, directory, console, stop)
            stop.patient = True
            if run is None:
                console.print(f"This run is finished: its model is in {config.output}/{FINAL}.")
                return 0
            try:
                found = run.all()
                run.settle()
            finally:
                run.close()
        except Stopped:
            console.print("Stopped before the first round; the same command goes on from here.")
            return stop.exit_code
        except _Interrupted as stopped:
            directory.write_manifest(manifest.ended("interrupted"))
            console.print("Stopped; the same command goes on from here.")
            return int(stopped.args[0])
        last = run.folder("rounds", config.rounds) / "train" / FINAL
        if last.is_dir():
            shutil.rmtree(directory.final, ignore_errors=True)
            shutil.copytree(last, directory.final) if config.keep_models else last.replace(directory.final)
        if found:
            _write(run.path / CHANGE_FILE, found)
            words = f"{found['change']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"
            console.print(f"Held-out score from start to end: {words}, {found['prompts']} prompts, 95% interval.", soft_wrap=True)
        console.print(f"Done: {config.output}/{FINAL} is a plain Hugging Face model.", soft_wrap=True)
        directory.write_manifest(manifest.ended("finished"))
    return 0


def prepare(
    row: Iterated, config: RoundsConfig, directory: RunDirectory, console: Console, stop: GracefulStop
) -> tuple[Rounds | None, RunManifest]:
    """Everything before the first round; no run where it is finished already."""
    found = ready(row, config)
    for notice in found.judge.notices:
        console.print(f"[yellow]{notice}[/yellow]", soft_wrap=True)
    facts = json.dumps(found.judge.facts, sort_keys=True, default=str)
    current = RunManifest.begin(
        row.name,
        config.model_dump(mode="json"),
        data=found.hashes | {"judge": hashlib.sha256(facts.encode()).hexdigest()},
        session=Session.begin([sys.executable, *sys.argv], torch.get_num_threads()),
        model_hash=load.fingerprint(found.source),
    )
    decision = directory.decide_resume(current, config.resume, may_change=MAY_CHANGE | HERE)
    previous = directory.manifest()
    manifest = previous.resumed(current) if previous else current
    if decision == "finished" and directory.final.is_dir():
        return None, manifest
    directory.write_manifest(manifest)
    console.print(
        f"{row.title} of {found.source.name}: {config.rounds} rounds on {len(found.prompts)} prompts, {len(found.held_out)} held out, "
        f"{str(found.compute).removeprefix('torch.')} on {found.device.type}.",
        soft_wrap=True,
    )
    run = Rounds(row, config, directory, console, found.prompts, found.held_out, found.judge, found.device, found.compute, stop)
    return run, manifest


def _records(path: Path) -> Sequence[Example]:
    return formats.read(path).examples


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(facts, indent=1).encode())
