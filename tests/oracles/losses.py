"""One loss of each method on one fixed table, by loops over numpy: no torch, nothing of Preftune.

`python -m tests.oracles.losses` writes tests/methods/golden.json.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parents[1] / "methods" / "golden.json"

RECORDS: list[dict[str, Any]] = [
    {  # a plain pair, the better one longer
        "ranks": [1, 2],
        "scores": [0.9, 0.2],
        "labels": [True, False],
        "logps": [[-1.25, -0.5, -2.0, -0.125], [-3.0, -0.75]],
        "reference": [-4.5, -3.25],
        "rewards": [0.5, -0.25],
    },
    {  # a ranking of four whose second and third are tied, best last
        "ranks": [4, 2, 2, 1],
        "scores": [0.1, 0.5, 0.5, 0.8],
        "labels": [False, True, None, True],
        "logps": [[-0.25], [-6.0, -1.0, -0.5], [-2.0, -2.0], [-0.75, -0.25, -0.5, -1.5, -3.0]],
        "reference": [-1.0, -7.0, -4.5, -5.0],
        "rewards": [1.5, -0.5, 0.25, 2.0],
    },
    {  # the model has it the wrong way round
        "ranks": [2, 1],
        "scores": [-1.0, 1.0],
        "labels": [False, True],
        "logps": [[-0.125, -0.0625, -0.25], [-9.0, -7.5, -0.5]],
        "reference": [-6.0, -8.0],
        "rewards": [3.0, -2.0],
    },
]
"""Rank 1 is the best, a higher score is better, a label says desirable or not; `logps` are the policy's per token, `reference` sums over
each response."""


def pairs(ranks: list[int]) -> list[tuple[int, int]]:
    """(better, worse) for each two responses that are not tied."""
    return [(i, j) for i, j in itertools.permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def softplus(x: float) -> float:
    """log(1 + exp(x)) = -log sigma(-x)."""
    return float(np.logaddexp(0.0, x))


def sft() -> float:
    """Methods B: minus the mean log-probability of all tokens of the best responses."""
    best = [record["logps"][int(np.argmin(record["ranks"]))] for record in RECORDS]
    return -float(np.mean(np.concatenate(best)))


def reward(centering: float = 0.0) -> float:
    """Methods C.2: mean over records of the mean over pairs, and the centering term likewise."""
    losses = []
    for record in RECORDS:
        r = record["rewards"]
        each = [softplus(r[j] - r[i]) + centering * (r[i] + r[j]) ** 2 for i, j in pairs(record["ranks"])]
        losses.append(np.mean(each))
    return float(np.mean(losses))


def dpo(beta: float = 0.1) -> float:
    """Methods E.1 over every pair of a record, mean over records."""
    losses = []
    for record in RECORDS:
        ratio = [sum(tokens) - reference for tokens, reference in zip(record["logps"], record["reference"], strict=True)]
        losses.append(np.mean([softplus(-beta * (ratio[i] - ratio[j])) for i, j in pairs(record["ranks"])]))
    return float(np.mean(losses))


CASES: list[tuple[str, dict[str, float], float]] = [
    ("sft", {}, sft()),
    ("reward", {}, reward()),
    ("reward", {"centering": 0.01}, reward(0.01)),
    ("dpo", {}, dpo()),
    ("dpo", {"beta": 0.5}, dpo(0.5)),
]


def golden() -> dict[str, Any]:
    """The table and what each method loses on it, with its default knobs and with others."""
    return {"records": RECORDS, "losses": [{"method": m, "knobs": k, "loss": loss} for m, k, loss in CASES]}


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
