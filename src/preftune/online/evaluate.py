"""How the policy does on held-out prompts: drawn, scored, and compared with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from preftune.evaluation.statistics import clustered_mean_ci
from preftune.online import monitor
from preftune.online.collect import Collector
from preftune.online.experience import by_tree, grid, passes, trees_of
from preftune.records import Example
from preftune.rewards.judge import ask
from preftune.rollout.samples import Sample
from preftune.training.learner import Interrupted


def evaluate(collector: Collector, held_out: Sequence[Example], step: int, give_up: Callable[[], bool]) -> dict[str, float]:
    """After `step` steps: score with its interval over prompts, gold score, lengths, distances to the reference. Raises Interrupted.

    There is no score where no response could be scored.
    """
    collector.drawing.ahead.settle()
    config, tokenizer = collector.config, collector.tokenizer
    how = replace(collector.drawing.sampling, temperature=config.rollout.eval_temperature)
    encoded = [tokenizer.encode_prompt(e.prompt) for e in held_out]
    drawn: list[list[Sample]] = [[] for _ in held_out]
    for one in collector.drawing.engine(step).generate(encoded, config.rollout.eval_n, how, config.seed, give_up=give_up):
        drawn[one.prompt].append(one)
    if any(len(mine) < config.rollout.eval_n for mine in drawn):
        raise Interrupted
    drawn = [sorted(mine, key=lambda s: s.number) for mine in drawn]
    examples = [collector.judging.record(e, mine) for e, mine in zip(held_out, drawn, strict=True)]
    found: dict[str, float] = {}
    for name, judge in (("score", collector.judging.judges.judge), ("gold", collector.judging.judges.gold)):
        if judge is not None:
            said = ask(judge.judge, examples)
            known = [one[~np.isnan(one)] for one in said]
            mean = clustered_mean_ci([float(np.mean(one)) for one in known if len(one)])
            found |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high} if mean.n else {}
            found["unscorable" if name == "score" else f"unscorable_{name}"] = 1 - sum(map(len, known)) / sum(map(len, said))
    samples = [s for mine in drawn for s in mine]
    found |= monitor.lengths_of([len(s.ids) for s in samples], [s.finish == "stop" for s in samples])
    found["repetition"] = monitor.repetition([s.ids for s in samples])
    return found | _distances(collector, held_out, encoded, drawn)


@torch.no_grad()
def _distances(
    collector: Collector, held_out: Sequence[Example], encoded: Sequence[Sequence[int]], drawn: Sequence[Sequence[Sample]]
) -> dict[str, float]:
    """Perplexities and KL at temperature 1."""
    learner = collector.learner
    trees = trees_of([(e.id, e.where, ids) for e, ids in zip(held_out, encoded, strict=True)], drawn)
    told: dict[int, dict[str, tuple[np.ndarray, ...]]] = {i: {} for i in range(len(trees))}
    policy = learner.actor.eval()
    for chosen, batch in passes(trees, [range(len(trees))], collector.config.tokens_per_microbatch, 1.0, learner.world.device):
        said = {"old": policy(batch)} | ({"reference": learner.reference(batch)} if learner.reference is not None else {})
        for name, flat in said.items():
            for i, arrays in by_tree(trees, chosen, flat).items():
                told[i][name] = arrays
    trees = [replace(t, told=told[i]) for i, t in enumerate(trees)]
    old, mask = grid(trees, "old")
    return monitor.distances(old, grid(trees, "reference")[0] if "reference" in trees[0].told else None, mask)
