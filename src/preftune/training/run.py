"""A training run from config to final model: resumable at any moment, never losing what was done."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from preftune.errors import NonFiniteError, UserError
from preftune.models.load import fingerprint, locate
from preftune.models.policy import RewardModel
from preftune.models.save import save_model
from preftune.models.scoring import Normalise, fit_normaliser
from preftune.packing.order import Cursor, steps_per_epoch
from preftune.training import checkpoint
from preftune.training.check import fast_check
from preftune.training.config import RunConfig
from preftune.training.distributed import World
from preftune.training.durable import explained
from preftune.training.failpoints import failpoint
from preftune.training.learner import Interrupted, Schedule, Step, make_optimizer
from preftune.training.loop import Position, fit
from preftune.training.manifest import RunManifest, Session
from preftune.training.progress import Meter, meter, peak_memory
from preftune.training.reference import refuse_still
from preftune.training.rundir import RunDirectory
from preftune.training.setup import Setup, cache_reference, prepare
from preftune.training.signals import GracefulStop, Stopped

MAY_CHANGE = frozenset({"output", "resume", "save_every", "keep_checkpoints", "threads", "device", "tokens_per_microbatch"})
"""Config keys that a resumed run may give another value: they change no result beyond rounding."""


@dataclass
class Progress:
    """What a run must remember besides weights, optimizer, random states and data position."""

    bad_steps: int = 0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    tokens: int = 0
    evaluation_due: bool = False


@dataclass
class Run:
    """A run under way, in the process that may write (or in another one of the same world, which writes nothing)."""

    setup: Setup
    directory: RunDirectory | None
    console: Console
    stop: GracefulStop
    position: Position = field(default_factory=Position)
    progress: Progress = field(default_factory=Progress)
    saved_step: int = -1
    rng: dict[str, Any] = field(default_factory=checkpoint.rng_state)

    @property
    def config(self) -> RunConfig:
        return self.setup.config

    def plan(self) -> int:
        """Optimizer steps of the whole run; makes the optimizer and its schedule."""
        config, learner = self.config, self.setup.learner
        total = steps_per_epoch(len(self.setup.train.trees), config.prompts_per_step) * config.epochs
        total = min(total, config.max_steps or total)
        refuse_still(config.reference_sync, total)
        learner.optimizer = make_optimizer(learner.parameters, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps)
        learner.schedule = Schedule(config.lr, total, config.warmup, config.schedule, config.min_lr_ratio)
        return total

    def restore(self) -> None:
        """Go back to the newest whole checkpoint, or to the start where there is none."""
        assert self.directory is not None or not self.setup.world.first
        world = self.setup.world
        path = Path(self.config.output) / "checkpoints"
        found = checkpoint.recover(path) if world.first else None
        step = world.share(found.step if found else None)
        if step is None:
            if self.directory is not None:
                self.directory.metrics.truncate(-1)
            return
        found = found or checkpoint.load(checkpoint.step_path(path, step))
        for problem in found.problems:
            self.console.print(f"[yellow]{problem}; the checkpoint before it is used[/yellow]", soft_wrap=True)
        self.setup.learner.restore(found.everything())
        self.position = Position(step, Cursor(**found.state["cursor"]))
        self.progress = Progress(**found.state["progress"])
        self.saved_step = step
        self.rng = found.state["rng"]
        self.recall(found.state)
        if self.directory is not None:
            self.directory.metrics.truncate(step, evaluated=not self.progress.evaluation_due)
        self.console.print(f"Resuming after step {step}.")

    def save(self) -> None:
        """Write a checkpoint of the last completed step and what followed it, if there is none yet."""
        if self.saved_step == self.position.step:
            return
        if self.directory is not None:
            self.directory.metrics.sync()
            state = {"cursor": asdict(self.position.cursor), "progress": asdict(self.progress), "rng": self.rng, **self.memory()}
            best = self.progress.best_step
            checkpoint.save(
                self.directory.checkpoints,
                self.position.step,
                self.setup.learner.tensors(),
                state,
                keep=self.config.keep_checkpoints,
                protect=() if best is None else (best,),
            )
        self.saved_step = self.position.step

    def memory(self) -> dict[str, Any]:
        """What else a checkpoint must remember, as JSON."""
        return {}

    def recall(self, state: dict[str, Any]) -> None:
        """Take back what `memory` gave."""

    def steps(self, total: int) -> Iterator[tuple[Position, Step]]:
        """The steps up to number `total` that are left, each taken when it is asked for."""
        return fit(
            self.setup.learner,
            self.setup.train.trees,
            prompts_per_step=self.config.prompts_per_step,
            epochs=self.config.epochs,
            max_steps=total,
            seed=self.config.seed,
            start=self.position,
            give_up=lambda: self.give_up("step"),
        )

    def log_step(self, step: Step, seconds: float) -> None:
        """Add the step's row to the metrics."""
        self.progress.tokens += step.tokens
        if self.directory is None:
            return
        row = {
            "loss": step.loss,
            **step.metrics,
            "lr": step.lr,
            "grad_norm": step.grad_norm,
            "tokens": step.tokens,
            "tokens_seen": self.progress.tokens,
            "taken": step.taken,
            **({} if step.taken else {"records": list(step.ids), "where": list(step.where)}),
            "seconds": round(seconds, 4),
            "peak_memory": peak_memory(),
        }
        self.directory.metrics.append(self.position.step, "train", row)

    def give_up(self, during: str) -> bool:
        """Whether a signal asks to stop between two micro-batches: several processes must agree, and do so after the step only."""
        failpoint(f"{during}.microbatch")
        return self.setup.world.size == 1 and self.stop.requested is not None

    def evaluate(self) -> None:
        """Evaluate, log, and remember the best; `stopped_early` then tells whether early stopping says to stop."""
        held, progress = self.setup.held_out, self.progress
        if held is not None:
            start = time.monotonic()
            with meter(self.console, f"evaluation at step {self.position.step}", len(held.trees)) as shown:
                found = self.setup.learner.evaluate(held.trees, shown.at, lambda: self.give_up("evaluation"))
            if self.directory is not None:
                seconds = {"seconds": round(time.monotonic() - start, 4), "peak_memory": peak_memory()}
                self.directory.metrics.append(self.position.step, "eval", {**found, "records": len(held.trees), **seconds})
            self._judge(found)
        progress.evaluation_due = False
        self.saved_step = -1  # a checkpoint from before this evaluation does not know its outcome

    def _judge(self, found: dict[str, float]) -> None:
        config, progress = self.config, self.progress
        stopping = config.early_stopping
        name = stopping.metric if stopping else config.best_metric
        if name is None:
            return
        if name not in found:
            where = "early_stopping.metric" if stopping else "best_metric"
            raise UserError(f"evaluation gives no metric {name!r}", where=where, fix=f"It gives {', '.join(found)}.")
        mode, least = (stopping.mode, stopping.min_delta) if stopping else (config.best_mode, 0.0)
        gain = math.inf if progress.best_value is None else (found[name] - progress.best_value) * (1 if mode == "max" else -1)
        if gain > least and math.isfinite(found[name]):
            progress.best_value, progress.best_step, progress.evaluations_without_gain = found[name], self.position.step, 0
        else:
            progress.evaluations_without_gain += 1
        progress.stopped_early |= stopping is not None and progress.evaluations_without_gain >= stopping.patience

    def train(self, total: int, shown: Meter) -> bool:
        """All steps that are left; False when a signal asked to stop before the end."""
        config, world = self.config, self.setup.world
        checkpoint.restore_rng(self.rng)  # whatever checks came before must not have drawn from the run's numbers
        try:
            if self.position.step == 0 and self.saved_step < 0:
                self.progress.evaluation_due = bool(config.eval_every)
            self._settle(total, self.position.step - 1)
            start = time.monotonic()
            for position, step in self.steps(0 if self.progress.stopped_early else total):
                before, self.position, self.rng = self.position.step, position, checkpoint.rng_state()
                failpoint("step")
                self.log_step(step, time.monotonic() - start)
                self.progress.evaluation_due = self.position.step == total or _passed(config.eval_every, before, self.position.step)
                self._guard(step)
                shown.at(self.position.step, f"loss {step.loss:z.4f}, {step.tokens / max(1e-9, time.monotonic() - start):.0f} tok/s")
                self._settle(total, before)
                if world.any(self.stop.requested is not None):
                    self.save()
                    return False
                if self.progress.stopped_early:
                    break
                start = time.monotonic()
        except Interrupted:
            checkpoint.restore_rng(self.rng)
            self.save()
            return False
        if self.progress.stopped_early:
            self.console.print(f"Stopped early at step {self.position.step}: {self.why_stopped()}.", soft_wrap=True)
        return True

    def why_stopped(self) -> str:
        """Why the run ended before its last step."""
        assert self.config.early_stopping is not None
        return f"no gain in {self.config.early_stopping.metric} for {self.config.early_stopping.patience} evaluations"

    def _settle(self, total: int, before: int) -> None:
        """What is due after a step, of which the last was `before`, or before the first: the evaluation, then the checkpoint."""
        step, progress = self.position.step, self.progress
        if progress.evaluation_due:
            self.evaluate()
        if step == total or progress.best_step == step or progress.stopped_early or _passed(self.config.save_every, before, step):
            self.save()

    def _guard(self, step: Step) -> None:
        if step.taken:
            return
        self.progress.bad_steps += 1
        self.console.print(
            f"[yellow]step {self.position.step}: loss {step.loss}, gradient norm {step.grad_norm}: not taken; "
            f"records {', '.join(step.where[:8])}{' ...' if len(step.where) > 8 else ''}[/yellow]",
            soft_wrap=True,
        )
        if self.progress.bad_steps > self.config.max_bad_steps:
            self.save()
            raise NonFiniteError(
                f"{self.progress.bad_steps} steps gave a non-finite loss or gradient (max_bad_steps={self.config.max_bad_steps}); "
                f"weights are those of the last good step; the records are in {self.config.output}/metrics.jsonl. Try a lower lr."
            )

    def finish(self) -> None:
        """Write the final model: the best one where early stopping chose it, else the last."""
        if self.directory is None:
            return
        best = self.progress.best_step
        if self.config.early_stopping and best is not None and best != self.position.step:
            found = checkpoint.load(checkpoint.step_path(self.directory.checkpoints, best))
            self.setup.learner.restore(found.everything())
        self.setup.learner.model.eval()
        if self.setup.learner.average is not None:
            self.setup.learner.average.install()
        self._normalise()
        failpoint("final.before")
        with explained("writing the final model", self.directory.final):
            save_model(self.setup.learner.model, self.setup.tokenizer, self.directory.final, adapter=self.setup.adapter)
        failpoint("final.after")

    def _normalise(self) -> None:
        """Put the scores of a reward model on a scale where its knobs ask for it."""
        model, which = self.setup.learner.model, cast(Normalise, getattr(self.config.method, "normalise", "none"))
        if not isinstance(model, RewardModel) or which == "none":
            return
        held = self.setup.held_out
        trees, name = (held.trees, "held-out records") if held else (self.setup.train.trees, "training records")
        fit_normaliser(model, trees, which, budget=self.config.tokens_per_microbatch, name=name)
        found = model.scoring
        self.console.print(
            f"Scores of {found.fitted_on} had mean {found.mean:.4f} and deviation {found.std:.4f}: they now have 0 and 1.", soft_wrap=True
        )


def _passed(interval: int | None, before: int, step: int) -> bool:
    """Whether a multiple of `interval` lies behind `before`, up to `step`: a method may leave steps out."""
    return interval is not None and step // interval > max(before, 0) // interval


def opening(setup: Setup, total: int) -> str:
    """What is about to happen, as a sentence or two."""
    config, trees = setup.config, setup.train.trees
    processes = f" over {setup.world.size} processes" if setup.world.size > 1 else ""
    weights = sum(p.numel() for p in setup.learner.parameters.values())
    return (
        f"{setup.method.title} of {setup.source.name}: {total} steps of {config.prompts_per_step} prompts{processes}, "
        f"at most {config.tokens_per_microbatch} tokens through the model at once, on {len(trees)} records "
        f"({sum(t.tokens for t in trees):,} tokens, {sum(t.response_tokens for t in trees):,} of them in responses); "
        f"{weights / 1e6:.1f}M weights train, {str(setup.compute).removeprefix('torch.')} on {setup.world.device.type}."
    )


def train(method_name: str, config: RunConfig, console: Console) -> int:
    """`preftune train`: run to the end, or to a signal. Returns the exit code; the run directory holds everything else."""
    return until_stopped(lambda stop: _train(method_name, config, console, stop), console)


def until_stopped(work: Callable[[GracefulStop], int], console: Console) -> int:
    """The exit code of `work`, which makes the stop patient once there is something to save; before that a signal ends it at once."""
    with GracefulStop() as stop:
        stop.patient = False
        try:
            return work(stop)
        except Stopped:
            console.print("Stopped before training; the same command goes on from here.")
            return stop.exit_code


def _train(method_name: str, config: RunConfig, console: Console, stop: GracefulStop) -> int:
    world = World.join(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    if not world.first:
        console = Console(quiet=True)
    with ExitStack() as stack:
        stack.callback(world.leave)
        directory = stack.enter_context(RunDirectory(Path(config.output))) if world.first else None
        setup = prepare(method_name, config, world, console)
        for notice in setup.notices:
            console.print(f"[yellow]{notice}[/yellow]", soft_wrap=True)
        console.print(setup.train.sentence(), soft_wrap=True)
        if setup.held_out:
            console.print(f"Held out: {setup.held_out.sentence()}", soft_wrap=True)
        manifest, decision = _manifest(setup, directory)
        if world.share(decision) == "finished":
            console.print(f"This run is finished: its model is in {config.output}/final.")
            return 0
        if directory is not None and manifest is not None:
            directory.write_manifest(manifest)
        if config.cache_reference:
            cache_reference(setup, Path(config.output) / "cache", console)
        run = Run(setup, directory, console, stop)
        total = run.plan()
        run.restore()
        if run.saved_step < 0:
            fast_check(setup, console)
        console.print(opening(setup, total), soft_wrap=True)
        stop.patient = True
        with meter(console, method_name, total, run.position.step) as shown:
            done = run.train(total, shown)
        if done:
            run.finish()
            console.print(f"Done: {config.output}/final is a plain Hugging Face model.", soft_wrap=True)
        else:
            console.print(f"Saved step {run.position.step}; the same command goes on from there.")
        if directory is not None and manifest is not None:
            directory.write_manifest(manifest.ended("finished" if done else "interrupted"))
        return 0 if done else stop.exit_code


def _manifest(setup: Setup, directory: RunDirectory | None) -> tuple[RunManifest | None, str]:
    """The run's manifest and whether it starts, goes on or is finished. Raises UserError where an earlier run was another."""
    if directory is None:
        return None, ""
    config = setup.config
    hashes = dict(setup.train.hashes)
    if setup.held_out and config.eval_data is not None:
        hashes |= setup.held_out.hashes
    if config.reference:
        hashes[config.reference] = fingerprint(locate(config.reference))
    if config.chat_template:
        hashes[config.chat_template] = hashlib.sha256(Path(config.chat_template).read_bytes()).hexdigest()
    session = Session.begin([sys.executable, *sys.argv], torch.get_num_threads())
    current = RunManifest.begin(
        setup.method.name,
        config.model_dump(mode="json"),
        data=hashes,
        session=session,
        model_hash=setup.model_hash,
        parents=_parents(config),
    )
    decision = directory.decide_resume(current, config.resume, may_change=MAY_CHANGE)
    if decision == "finished" and not directory.final.is_dir():
        decision = "resume"
    previous = directory.manifest()
    return (previous.resumed(current) if previous else current), decision


def _parents(config: RunConfig) -> list[str]:
    """Run directories that this run's models came from."""
    models = [m for m in (config.model, config.reference) if m]
    return [str(Path(m).parent) for m in models if (Path(m).parent / "run.json").is_file()]
