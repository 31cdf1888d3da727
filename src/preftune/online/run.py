"""An online run from config to final model: the one loop, whose steps come from rollouts of the policy itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from preftune.errors import UserError
from preftune.models.policy import RewardModel
from preftune.models.save import NoClassifier, save_model
from preftune.online import monitor, steering
from preftune.online.actor import OnlineLearner
from preftune.online.collect import Collector
from preftune.online.config import OnlineConfig
from preftune.online.evaluate import evaluate
from preftune.online.judging import Judging
from preftune.online.ready import Ready, prepare, ready
from preftune.report.online import ALARM_FILE
from preftune.rounds.run import HERE
from preftune.training import checkpoint
from preftune.training.distributed import World
from preftune.training.durable import explained, replace_file
from preftune.training.failpoints import failpoint
from preftune.training.learner import Schedule, Step, make_optimizer
from preftune.training.loop import Position
from preftune.training.manifest import RunManifest, Session
from preftune.training.progress import Meter, meter, peak_memory
from preftune.training.reference import refuse_still
from preftune.training.run import MAY_CHANGE, Run, until_stopped
from preftune.training.rundir import RunDirectory
from preftune.training.signals import GracefulStop

MAY_CHANGE_ONLINE = MAY_CHANGE | HERE | {"keep_responses"}
CRITIC = "critic"
"""The folder beside `final` that holds the critic, a classifier of one label."""


@dataclass
class Phase:
    """Where a run stands between two steps: the rollout under way, its steps that are made, and what moves from rollout to rollout."""

    rollout: int = 1
    made: int = 0
    began: int = 0
    """The step after which the rollout's first step comes."""
    drawn: int = 0
    """The step whose weights drew the rollout."""
    seen: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Number, mean and squared deviations of all scores so far."""
    coefficients: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    alarm: str | None = None
    alarm_step: int | None = None


@dataclass
class OnlineRun(Run):
    """A run under way whose steps come from rollouts."""

    found: Ready = field(kw_only=True)
    phase: Phase = field(default_factory=Phase)
    collector: Collector = field(init=False)

    def __post_init__(self) -> None:
        learner = self.learner
        self.phase.coefficients = dict(learner.coefficients)
        give_up = lambda: self.give_up("rollout")
        judging = Judging(self.online, self.found.tokenizer, self.found.judges, give_up)
        self.collector = Collector(
            self.found.row, self.online, learner, self.found.tokenizer, judging, self.found.prompts,
            Path(self.online.output) / "rollouts", self.console, give_up,
        )  # fmt: skip

    @property
    def online(self) -> OnlineConfig:
        """The config."""
        assert isinstance(self.setup.config, OnlineConfig)
        return self.setup.config

    @property
    def learner(self) -> OnlineLearner:
        """The learner."""
        assert isinstance(self.setup.learner, OnlineLearner)
        return self.setup.learner

    def plan(self) -> int:
        """Optimizer steps of the whole run, where no rollout ends early; makes the optimizer and its schedule."""
        config, learner, count = self.online, self.learner, len(self.found.prompts)
        whole, rest = divmod(count * config.epochs, config.prompts_per_rollout)
        total = whole * self.collector.steps_of(config.prompts_per_rollout) + (self.collector.steps_of(rest) if rest else 0)
        total = min(total, config.max_steps or total)
        refuse_still(config.reference_sync, total)
        learner.optimizer = make_optimizer(
            learner.parameters, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps, lr_scale=learner.lr_scale
        )
        learner.schedule = Schedule(config.lr, total, config.warmup, config.schedule, config.min_lr_ratio)
        return total

    def memory(self) -> dict[str, Any]:
        """The phase."""
        return {"online": asdict(self.phase)}

    def recall(self, state: dict[str, Any]) -> None:
        """Take the phase back."""
        self.phase = Phase(**{**state["online"], "seen": tuple(state["online"]["seen"])})
        self.learner.coefficients = dict(self.phase.coefficients)

    def restore(self) -> None:
        """Go back to the newest whole checkpoint; rollouts drawn after it are dropped."""
        super().restore()
        self.collector.drop_after(self.phase.rollout + self.online.rollout.ahead)

    def save(self) -> None:
        """A checkpoint; then what older rollouts were made of goes, as far as no checkpoint needs it.

        A rollout that is drawn ahead is finished first: after the next step the weights that draw it are in no checkpoint.
        """
        self.collector.drawing.ahead.settle()
        super().save()
        if self.directory is not None:
            needed = [
                json.loads((checkpoint.step_path(self.directory.checkpoints, step) / checkpoint.STATE).read_text())["online"]["rollout"]
                for step in checkpoint.saved_steps(self.directory.checkpoints)
            ]
            self.collector.tidy({*needed, self.phase.rollout})

    def train(self, total: int, shown: Meter) -> bool:
        """All steps that are left; where a judge fails on the way, what was learned, drawn and scored before is kept."""
        try:
            return super().train(total, shown)
        except UserError:
            self.save()
            raise

    def steps(self, total: int) -> Iterator[tuple[Position, Step]]:
        """Rollouts, and the steps made of each, up to step `total`."""
        while self.position.step < total and self.position.cursor.epoch < self.online.epochs:
            yield from self._rollout(total)

    def _rollout(self, total: int) -> Iterator[tuple[Position, Step]]:
        """The steps of the rollout under way that are left. The position moves on to the next prompts with its last step."""
        phase, learner, start = self.phase, self.learner, self.position.cursor
        found, behind = self.collector.experience(phase.rollout, phase.drawn, start, phase.coefficients, phase.seen)
        groups = self.collector.step_groups(len(found.trees), phase.rollout)
        end = phase.began + len(groups)
        last_of_all = behind.epoch >= self.online.epochs
        if self.online.rollout.ahead and not last_of_all and end < total:
            self.collector.look_ahead(phase.rollout + 1, phase.began, behind)
        while phase.made < len(groups) and phase.began + phase.made < total:
            trees = [found.trees[i] for i in groups[phase.made]]
            step = learner.step(trees, phase.began + phase.made, lambda: self.give_up("step"))
            if phase.made == 0:
                step.metrics.update(found.figures)
                self._tell(step.metrics)
            phase.made += 1
            over = self._too_far(step)
            number = phase.began + phase.made
            if over or phase.made == len(groups):
                number = min(end, total)
                self._leave(found.figures, step, sum(len(t.responses) for t in found.trees), number)
                yield Position(total if last_of_all else number, behind), step
                return
            yield Position(number, start), step

    def _too_far(self, step: Step) -> bool:
        """Whether the rest of the rollout's steps are left out."""
        bound = self.online.knobs.target_kl
        return bound is not None and step.metrics.get("step_kl", 0.0) > bound

    def _tell(self, figures: dict[str, float]) -> None:
        """After a rollout's first step: say how it went."""
        words = [f"score {figures['score']:.3f}"] if "score" in figures else []
        words += [f"{figures['unscorable']:.0%} could not be scored"] if figures["unscorable"] else []
        words += [
            f"{key} {figures[name]:.3f}"
            for key, name in (("gold", "gold"), ("KL", "kl_response"))
            if math.isfinite(figures.get(name, math.nan))
        ]
        words += [f"{figures['response_tokens']:.0f} tokens", f"{figures['finished']:.0%} finished"]
        words += [f"{figures['sampled_tokens_per_second']:.0f} tokens/s"]
        if not self.console.is_terminal:
            self.console.print(f"rollout {self.phase.rollout}: {', '.join(words)}", soft_wrap=True, highlight=False)

    def _leave(self, figures: dict[str, float], step: Step, responses: int, number: int) -> None:
        """After a rollout's last step: what moves from rollout to rollout moves, and the next one begins."""
        phase, knobs = self.phase, self.online.knobs
        figures = {name: value for name, value in {**step.metrics, **figures}.items() if math.isfinite(value)}
        keys = ("score", "gold", "gold_agreement", "reference_perplexity", "response_tokens", "kl_response_k3")
        phase.history.append({key: figures[key] for key in keys if key in figures})
        if "scores_seen" in figures:
            phase.seen = (figures["scores_seen"], figures["scores_mean"], figures["scores_squares"])
        phase.coefficients = steering.after_rollout(phase.coefficients, self.online, figures, responses)
        phase.coefficients = steering.after_step(phase.coefficients, knobs, step.metrics.get("step_kl", 0.0))
        self.learner.coefficients = dict(phase.coefficients)
        if self.online.alarms is not None and phase.alarm is None and (said := monitor.alarm(phase.history, self.online.alarms)):
            phase.alarm, phase.alarm_step = said, number
            if self.directory is not None:
                found = {"rollout": phase.rollout, "step": number, "said": said}
                replace_file(self.directory.path / ALARM_FILE, json.dumps(found).encode())
            self.console.print(f"[bold yellow]Alarm after rollout {phase.rollout}: {said}.[/bold yellow]", soft_wrap=True)
            if self.online.alarms.action != "tell":
                self.progress.stopped_early = True
        if phase.alarm is not None:
            step.metrics["alarm"] = 1.0
        step.metrics.update({f"coefficient_{name}": value for name, value in phase.coefficients.items() if name != "value"})
        phase.drawn = phase.began if self.online.rollout.ahead else number
        phase.rollout, phase.made, phase.began = phase.rollout + 1, 0, number
        failpoint("rollout.left")

    def why_stopped(self) -> str:
        """An alarm, or what early stopping says."""
        return f"alarm, {self.phase.alarm}" if self.phase.alarm is not None else super().why_stopped()

    def evaluate(self) -> None:
        """Sample and score the held-out prompts, log, and remember the best."""
        if self.found.held_out:
            start = time.monotonic()
            facts = evaluate(self.collector, self.found.held_out, self.position.step, lambda: self.give_up("evaluation"))
            if self.directory is not None:
                seconds = {"seconds": round(time.monotonic() - start, 4), "peak_memory": peak_memory()}
                self.directory.metrics.append(self.position.step, "eval", {**facts, "records": len(self.found.held_out), **seconds})
            said = "no response could be scored"
            if "score" in facts:
                said = f"score {facts['score']:.3f} ({facts['score_low']:.3f} to {facts['score_high']:.3f})"
            self.console.print(f"Held out, after {self.position.step} steps: {said}", soft_wrap=True, highlight=False)
            self._judge({"score": math.nan, **facts})
        self.progress.evaluation_due = False
        self.saved_step = -1

    def finish(self) -> None:
        """Write the final policy: the best where early stopping chose it, one before an alarm where it is rolled back, else the last.

        Then its critic, where there is one, beside it.
        """
        if self.directory is None:
            return
        wanted = self._wanted()
        if wanted is None and self.phase.alarm_step is not None and self._rolls_back:
            self.console.print("[yellow]No checkpoint is older than the alarm: the final model is the last one.[/yellow]", soft_wrap=True)
        if wanted is not None and wanted != self.position.step:
            self.learner.restore(checkpoint.load(checkpoint.step_path(self.directory.checkpoints, wanted)).everything())
            self.console.print(f"The final model is that of step {wanted}.")
        actor = self.learner.actor.eval()
        if self.learner.average is not None:
            self.learner.average.install()
        failpoint("final.before")
        with explained("writing the final model", self.directory.final):
            save_model(actor, self.found.tokenizer, self.directory.final, adapter=self.setup.adapter)
        failpoint("final.between")
        if (critic := actor.as_classifier()) is not None:
            self._keep(critic.eval(), self.directory.path / CRITIC)
        failpoint("final.after")

    def _keep(self, critic: RewardModel, path: Path) -> None:
        try:
            with explained("writing the critic", path):
                save_model(critic, self.found.tokenizer, path, adapter=self.learner.critic_adapter)
        except NoClassifier as error:
            self.console.print(f"[yellow]The critic is not saved: {error.what}.[/yellow]", soft_wrap=True)

    def _wanted(self) -> int | None:
        """The step whose weights are the final ones; None takes the last."""
        assert self.directory is not None
        if self._rolls_back and self.phase.alarm_step is not None:
            before = [step for step in checkpoint.saved_steps(self.directory.checkpoints) if step < self.phase.alarm_step]
            return before[-1] if before else None
        return self.progress.best_step if self.online.early_stopping else None

    @property
    def _rolls_back(self) -> bool:
        return self.online.alarms is not None and self.online.alarms.action == "rollback"


def train(name: str, config: OnlineConfig, console: Console) -> int:
    """`preftune train` of an online method: to the end, or to a signal. Returns the exit code."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("an online method runs in one process", fix="Start it without torchrun.")
    return until_stopped(lambda stop: _train(name, config, console, stop), console)


def _train(name: str, config: OnlineConfig, console: Console, stop: GracefulStop) -> int:
    world = World.join(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    with ExitStack() as stack:
        stack.callback(world.leave)
        directory = stack.enter_context(RunDirectory(Path(config.output)))
        found = ready(name, config, world)
        setup = prepare(found, world)
        for notice in (*found.notices, *setup.notices):
            console.print(f"[yellow]{notice}[/yellow]", soft_wrap=True)
        manifest, done = _manifest(setup, found, directory)
        if done:
            console.print(f"This run is finished: its model is in {config.output}/final.")
            return 0
        directory.write_manifest(manifest)
        run = OnlineRun(setup, directory, console, stop, found=found)
        stack.callback(run.collector.drawing.close)
        total = run.plan()
        run.restore()
        console.print(opening(run, total), soft_wrap=True)
        stop.patient = True
        with meter(console, name, total, run.position.step) as shown:
            whole = run.train(total, shown)
        if whole:
            run.finish()
            beside = f", {config.output}/{CRITIC} its critic" if run.learner.actor.has_values else ""
            console.print(f"Done: {config.output}/final is a plain Hugging Face model{beside}.", soft_wrap=True)
        else:
            console.print(f"Saved step {run.position.step}; the same command goes on from there.")
        directory.write_manifest(manifest.ended("finished" if whole else "interrupted"))
        return 0 if whole else stop.exit_code


def opening(run: OnlineRun, total: int) -> str:
    """What is about to happen, as a sentence or two."""
    config, row = run.online, run.found.row
    trains = sum(p.numel() for p in run.learner.parameters.values()) / 1e6
    critic = " with its critic" if run.learner.actor.has_values else ""
    return (
        f"{row.title} of {run.found.source.name}: {total} steps of {config.prompts_per_step} prompts, {config.rollout.n} responses to "
        f"each, drawn {config.prompts_per_rollout} prompts at a time at temperature {config.rollout.temperature:g}; "
        f"{len(run.found.prompts)} "
        f"prompts, {len(run.found.held_out)} held out; {trains:.1f}M weights train{critic}, "
        f"{str(run.setup.compute).removeprefix('torch.')} on {run.setup.world.device.type}."
    )


def _manifest(setup: Any, found: Ready, directory: RunDirectory) -> tuple[RunManifest, bool]:
    """The run's manifest, and whether it is finished. Raises UserError where an earlier run here was another."""
    facts = json.dumps([one.facts for one in found.judges.everyone], sort_keys=True, default=str)
    current = RunManifest.begin(
        found.row.name,
        found.config.model_dump(mode="json"),
        data=found.hashes | {"judges": hashlib.sha256(facts.encode()).hexdigest()},
        session=Session.begin([sys.executable, *sys.argv], torch.get_num_threads()),
        model_hash=setup.model_hash,
    )
    decision = directory.decide_resume(current, found.config.resume, may_change=MAY_CHANGE_ONLINE)
    previous = directory.manifest()
    manifest = previous.resumed(current) if previous else current
    return manifest, decision == "finished" and directory.final.is_dir()
