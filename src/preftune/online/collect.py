"""The rollout phase: draw responses, have them judged, look at them with frozen weights, and make advantages of it all (D.0).

`rollouts/R/` holds what a killed run goes on from: `samples.jsonl` and the judges' `scores*.jsonl` as they come, then
`experience.safetensors`, of which the steps are made. `shown.json` keeps some responses for people to read.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from preftune.models.policy import LanguageModel
from preftune.online import monitor, steering
from preftune.online.actor import OnlineLearner
from preftune.online.config import OnlineConfig
from preftune.online.drawing import Drawing
from preftune.online.experience import Experience, by_tree, grid, learned, passes, trees_of
from preftune.online.gathered import Gathered
from preftune.online.judging import Judged, Judging, scores_in, shape_of
from preftune.online.losses import DRAWN, OLD
from preftune.online.methods import Online
from preftune.packing.chat import ChatTokenizer, Tree
from preftune.packing.order import Cursor, permutation, steps
from preftune.records import Example
from preftune.rollout.samples import Sample
from preftune.training.durable import replace_file
from preftune.training.failpoints import failpoint
from preftune.training.learner import Interrupted

Seen = tuple[float, float, float]
EXPERIENCE, SHOWN = "experience.safetensors", "shown.json"


@dataclass
class Collector:
    """Makes experience of prompts, with the policy as it stands."""

    row: Online
    config: OnlineConfig
    learner: OnlineLearner
    tokenizer: ChatTokenizer
    judging: Judging
    prompts: Sequence[Example]
    folder: Path
    console: Console
    give_up: Callable[[], bool]

    def __post_init__(self) -> None:
        self.encoded = [self.tokenizer.encode_prompt(example.prompt) for example in self.prompts]
        self.drawing = Drawing(self.config, self.learner, self.tokenizer, self.encoded, self.console, self.give_up)

    # --- what a rollout is made of ----------------------------------------------------------------------------------------------

    def experience(self, rollout: int, step: int, start: Cursor, coefficients: dict[str, float], seen: Seen) -> tuple[Experience, Cursor]:
        """Rollout `rollout` (from 1) of the prompts behind `start`, drawn by the weights after `step` steps; and where prompts go on."""
        folder = self.folder / str(rollout)
        if not (folder / EXPERIENCE).exists():
            self._collect(folder, rollout, step, start, coefficients, seen).save(folder / EXPERIENCE)
            failpoint("rollout.kept")
        found = Experience.load(folder / EXPERIENCE)
        return found, self._behind(start, found.taken)

    def _behind(self, start: Cursor, taken: int) -> Cursor:
        """Where the order of prompts stands once `taken` of them are drawn."""
        count = len(self.prompts)
        done = start.epoch * count + start.taken + taken
        return Cursor(done // count, done % count)

    def _next(self, start: Cursor, taken: int, wanted: int) -> list[int]:
        """Up to `wanted` prompts behind the first `taken`, within the run's epochs."""
        at = self._behind(start, taken)
        return [int(i) for i, _ in zip(self._order(at), range(wanted), strict=False)]

    def _order(self, start: Cursor) -> Iterator[int]:
        for chosen, _ in steps(len(self.prompts), 1, self.config.epochs, self.config.seed, start):
            yield int(chosen[0])

    def _collect(self, folder: Path, rollout: int, step: int, start: Cursor, coefficients: dict[str, float], seen: Seen) -> Experience:
        config, clock = self.config, _Clock()
        redraws, wanted = getattr(config.knobs, "redraw", 0), config.prompts_per_rollout
        chosen: list[int] = []
        kept: Judged | None = None
        drawn, taken = 0, 0
        for attempt in range(redraws + 1):
            new = self._next(start, taken, wanted - len(chosen))
            if not new:
                break
            taken += len(new)
            part = folder / str(attempt) if attempt else folder
            with clock("sampling"):
                self.drawing.ahead.settle()
                samples = self.drawing.sample(part, rollout, step, new, config.rollout.n, self.drawing.sampling, first=taken - len(new))
            drawn += sum(len(s.ids) for mine in samples for s in mine)
            with clock("judging"):
                judged = self.judging.judged(part, [self.prompts[i] for i in new], samples)
            last = attempt == redraws or not self._next(start, taken, 1)
            mine = judged.uneven if redraws else list(range(len(new)))
            if last and not (chosen or mine):
                mine = list(range(len(new)))  # nothing to learn, but something to say
            kept = judged.only(mine) if kept is None else kept.joined(judged.only(mine))
            chosen += [new[g] for g in mine]
            if len(chosen) >= wanted:
                break
        assert kept is not None
        greedy = self._greedy(folder, rollout, step, chosen, clock) if self.row.greedy else None
        gold = self._gold(folder, rollout, kept, clock)
        with clock("looking"):
            trees, figures = self._look(chosen, kept, greedy, coefficients, rollout, seen)
        figures |= gold | {"prompts_drawn": float(taken)} | clock.seconds
        figures["sampled_tokens_per_second"] = drawn / max(clock.seconds["seconds_sampling"], 1e-9)
        self._show(folder, rollout, kept, chosen)
        return Experience(trees, figures, taken)

    def look_ahead(self, rollout: int, step: int, start: Cursor) -> None:
        """Begin to draw rollout `rollout` of the prompts behind `start` with the weights as they stand, after `step` steps."""
        new = self._next(start, 0, self.config.prompts_per_rollout)
        folder = self.folder / str(rollout)
        if new and not (folder / EXPERIENCE).exists():
            self.drawing.ahead.start(lambda policy: self._draw_ahead(policy, folder, rollout, step, new))

    def _draw_ahead(self, policy: LanguageModel, folder: Path, rollout: int, step: int, new: Sequence[int]) -> None:
        self.drawing.sample(folder, rollout, step, new, self.config.rollout.n, self.drawing.sampling, policy=policy)

    # --- baseline and gold -----------------------------------------------------------------------------------------------------

    def _greedy(self, folder: Path, rollout: int, step: int, chosen: Sequence[int], clock: _Clock) -> tuple[Tensor, list[list[Sample]]]:
        """[G, 1] scores of the likeliest response to each prompt, and the responses."""
        with clock("sampling"):
            samples = self.drawing.sample(folder, rollout, step, chosen, 1, replace(self.drawing.sampling, temperature=0.0), "greedy")
        with clock("judging"):
            examples = [self.judging.record(self.prompts[i], mine) for i, mine in zip(chosen, samples, strict=True)]
            scored = self.judging.ask(folder / "scores-greedy.jsonl", examples, self.judging.judges.judge)
        return torch.from_numpy(scores_in(scored)), samples

    def _gold(self, folder: Path, rollout: int, found: Judged, clock: _Clock) -> dict[str, float]:
        gold = self.judging.judges.gold
        if gold is None or (rollout - 1) % self.config.gold_every:
            return {}
        with clock("judging"):
            scores = scores_in(self.judging.ask(folder / "scores-gold.jsonl", found.examples, gold))
        return monitor.scores_of(scores, "gold") | monitor.agreement(found.scores, scores)

    # --- looking, with frozen weights -------------------------------------------------------------------------------------------

    def _look(
        self,
        chosen: Sequence[int],
        found: Judged,
        greedy: tuple[Tensor, list[list[Sample]]] | None,
        coefficients: dict[str, float],
        rollout: int,
        seen: Seen,
    ) -> tuple[list[Tree], dict[str, float]]:
        """Trees that know everything, and the rollout's figures."""
        knobs = self.config.knobs
        prompts = [(self.prompts[i].id, self.prompts[i].where, self.encoded[i]) for i in chosen]
        trees = trees_of(prompts, found.samples)
        several = self.steps_of(len(trees)) > 1
        kl_in_reward = self.row.kl_in_reward(knobs) and coefficients["kl"] > 0
        trees = self._known(trees, rollout, old=self._recomputes(several or kl_in_reward))
        drawn, mask = grid(trees, DRAWN)
        told = lambda name: grid(trees, name)[0] if name in trees[0].told else None
        old, reference, values = told("old"), told("reference"), told("value")
        combined = self.judging.combined(found, coefficients.get("cost", 0.0))
        running = steering.taken_in(seen, combined) if knobs.normalise == "running" else None
        if running is not None:
            combined = steering.normalised(combined, running)
        scores, weights = self.judging.counted(combined, *shape_of(found.samples))
        dense = torch.full_like(drawn, torch.nan)
        for row, rewards in enumerate(r for mine in found.dense for r in mine):
            dense[row, : len(rewards)] = torch.from_numpy(rewards)
        ends = mask & ~dense.isnan()
        baseline = None
        if greedy is not None:
            likeliest = greedy[0] if running is None else steering.normalised(greedy[0], running)
            baseline = self.judging.counted(likeliest, *shape_of(greedy[1]))[0].squeeze(1)
        gathered = Gathered(
            scores, weights, mask, dense.nan_to_num() * mask, ends, drawn if old is None else old, reference, values, baseline
        )
        advantages, returns = self.row.advantages(gathered, knobs, coefficients["kl"])
        figures = self._figures(found, gathered, old, drawn)
        figures |= monitor.of_critic(gathered, returns)
        if running is not None:
            figures |= dict(zip(("scores_seen", "scores_mean", "scores_squares"), running, strict=True))
        useless = [OLD] if knobs.old_logp == "auto" and not several else []  # the step's own log-probabilities serve
        useless += [DRAWN] if self.drawing.sampling.truncates and knobs.importance_cap is None else []
        trees = learned(trees, advantages=advantages, returns=returns, weights=weights.numpy(), scores=scores.numpy(), useless=useless)
        return trees, figures

    def _recomputes(self, needed: bool) -> bool:
        """Whether the trainer's log-probabilities are computed before the first step: also where the sampler's are of fewer tokens."""
        wanted, truncated = self.config.knobs.old_logp, self.drawing.sampling.truncates and self.learner.reference is not None
        return wanted == "recomputed" or (wanted == "auto" and (needed or truncated))

    def steps_of(self, prompts: int) -> int:
        """Optimizer steps that a rollout of so many prompts makes."""
        return -(-prompts // self.config.prompts_per_step) * int(self.config.knobs.passes)

    def step_groups(self, count: int, rollout: int) -> list[list[int]]:
        """Which of a rollout's `count` trees make each of its steps, in another order in each pass: a function of seed and rollout."""
        size, out = self.config.prompts_per_step, []
        for number in range(int(self.config.knobs.passes)):
            seed = int(np.random.SeedSequence([self.config.seed, rollout, 1]).generate_state(1)[0])
            order = [int(i) for i in permutation(count, seed, number)]
            out += [order[at : at + size] for at in range(0, count, size)]
        return out

    @torch.no_grad()
    def _known(self, trees: list[Tree], rollout: int, *, old: bool) -> list[Tree]:
        """What policy, critic and reference, none of them changing, say of every token."""
        learner, config = self.learner, self.config
        actor = learner.actor.eval()
        groups = self.step_groups(len(trees), rollout)[: -(-len(trees) // config.prompts_per_step)]
        told: dict[int, dict[str, Any]] = {i: {} for i in range(len(trees))}
        for chosen, batch in passes(trees, groups, config.tokens_per_microbatch, config.rollout.temperature, learner.world.device):
            if self.give_up():
                raise Interrupted
            said: dict[str, Tensor] = {}
            if old:
                out = actor.look(batch)
                assert out.token_logp is not None
                said["old"] = out.token_logp
                if out.values is not None:
                    said["value"] = out.values
            elif (values := actor.values(batch)) is not None:
                said["value"] = values
            if learner.reference is not None:
                said["reference"] = learner.reference(batch)
            for name, flat in said.items():
                for i, arrays in by_tree(trees, chosen, flat).items():
                    told[i][name] = arrays
        failpoint("rollout.known")
        if config.knobs.old_logp == "rollout":
            for i, tree in enumerate(trees):
                told[i]["old"] = tree.told[DRAWN]
        return [replace(t, told={**t.told, **told[i]}) for i, t in enumerate(trees)]

    # --- telling ----------------------------------------------------------------------------------------------------------------

    def _figures(self, found: Judged, gathered: Gathered, old: Tensor | None, drawn: Tensor) -> dict[str, float]:
        samples = [s for mine in found.samples for s in mine]
        figures = monitor.scores_of(found.scores)
        for name, values in found.parts.items():
            if len(known := values[~np.isnan(values)]):
                figures[f"score_{name}"] = float(known.mean())
        if gathered.ends.any() and gathered.scored.any():
            figures["dense_reward"] = float(gathered.dense.sum(1)[gathered.scored.flatten()].mean())
        figures |= monitor.lengths_of([len(s.ids) for s in samples], [s.finish == "stop" for s in samples])
        figures |= monitor.distances(gathered.old, gathered.reference, gathered.mask, kl=old is not None)  # else the step says it
        figures["repetition"] = monitor.repetition([s.ids for s in samples])
        if old is not None and self.config.knobs.old_logp != "rollout" and not self.drawing.sampling.truncates:
            figures["sampler_gap"] = float(((old - drawn).abs() * gathered.mask).sum() / gathered.mask.sum())
        return figures

    def _show(self, folder: Path, rollout: int, found: Judged, chosen: Sequence[int]) -> None:
        """Keep some responses for people to read."""
        every = self.config.keep_responses
        if every is None or (rollout - 1) % every:
            return
        rows = []
        for g, index in enumerate(chosen):
            prompt = self.prompts[index].prompt
            asked_for = prompt if isinstance(prompt, str) else [{"role": m.role, "content": m.content} for m in prompt]
            for s, score_of in zip(found.samples[g], found.scores[g], strict=True):
                told = None if np.isnan(score_of) else float(score_of)
                rows.append(
                    {"prompt": asked_for, "response": self.judging.text(s), "score": told, "tokens": len(s.ids), "finish": s.finish}
                )
        text = json.dumps(monitor.kept(rows, rollout), ensure_ascii=False, indent=1)
        replace_file(folder / SHOWN, text.encode())

    def tidy(self, needed: Collection[int]) -> None:
        """Remove what rollouts before the newest of the `needed` ones were made of, theirs aside; what is for people to read stays."""
        for folder in self.folder.glob("*"):
            if folder.name.isdigit() and int(folder.name) < max(needed) and int(folder.name) not in needed:
                for inside in folder.iterdir():
                    if inside.is_dir():
                        shutil.rmtree(inside)
                    elif inside.name != SHOWN:
                        inside.unlink()
                if not any(folder.iterdir()):
                    folder.rmdir()

    def drop_after(self, rollout: int) -> None:
        """Remove rollouts behind `rollout`: they were drawn by weights that are not there any more."""
        for folder in self.folder.glob("*"):
            if folder.name.isdigit() and int(folder.name) > rollout:
                shutil.rmtree(folder)


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        name = f"seconds_{phase}"
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - start, 4)
