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


def levels(ranks: list[int]) -> list[tuple[int, list[int]]]:
    """Each response that has any below it, with those."""
    below = [(i, [j for j in range(len(ranks)) if ranks[j] > ranks[i]]) for i in range(len(ranks))]
    return [(i, worse) for i, worse in below if worse]


def log_sum_exp(values: list[float]) -> float:
    """Log of the sum of exponentials."""
    return float(np.logaddexp.reduce(values))


def rrhf(weight: float = 1.0, exponent: float = 1.0, summed: bool = False) -> float:
    """Methods F.1, mean over records."""
    losses = []
    for record in RECORDS:
        p = [sum(tokens) / len(tokens) ** exponent for tokens in record["logps"]]
        best = record["logps"][int(np.argmin(record["ranks"]))]
        nll = -sum(best) if summed else -float(np.mean(best))
        losses.append(weight * sum(max(0.0, p[j] - p[i]) for i, j in pairs(record["ranks"])) + nll)
    return float(np.mean(losses))


def pro(sft_weight: float = 0.05, gaps: bool = False) -> float:
    """Methods F.2, simple form and that with temperatures from score gaps, mean over records."""
    losses = []
    for record in RECORDS:
        s, rho = [float(np.mean(tokens)) for tokens in record["logps"]], record["scores"]
        total = 0.0
        for k, worse in levels(record["ranks"]):
            share = {j: rho[k] - rho[j] if gaps else 1.0 for j in worse}
            own = s[k] * max(share.values())
            total -= own - log_sum_exp([own, *(s[j] * share[j] for j in worse)])
        best = record["logps"][int(np.argmin(record["ranks"]))]
        losses.append(total - sft_weight * (len(s) - 1) ** 2 * sum(best))
    return float(np.mean(losses))


def knowpat(weight: float = 0.01) -> float:
    """Methods E.7, mean over records; a response's negatives are those ranked strictly below it."""
    losses = []
    for record in RECORDS:
        s = [float(np.mean(tokens)) for tokens in record["logps"]]
        spread = max(s) - min(s)
        terms = []
        for k, worse in levels(record["ranks"]):
            mu = (s[k] - min(s)) / spread if spread else 1.0
            terms.append(mu * (softplus(-s[k]) + np.mean([softplus(s[j]) for j in worse])))
        losses.append(weight * np.mean(terms) - s[int(np.argmin(record["ranks"]))])
    return float(np.mean(losses))


def dpo_listwise(beta: float = 0.1) -> float:
    """Methods F.3, mean over records."""
    losses = []
    for record in RECORDS:
        g = [beta * (sum(tokens) - reference) for tokens, reference in zip(record["logps"], record["reference"], strict=True)]
        losses.append(-sum(g[k] - log_sum_exp([g[k], *(g[j] for j in worse)]) for k, worse in levels(record["ranks"])))
    return float(np.mean(losses))


CASES: list[tuple[str, dict[str, Any], float]] = [
    ("sft", {}, sft()),
    ("reward", {}, reward()),
    ("reward", {"centering": 0.01}, reward(0.01)),
    ("dpo", {}, dpo()),
    ("dpo", {"beta": 0.5}, dpo(0.5)),
    ("rrhf", {}, rrhf()),
    ("rrhf", {"weight": 2.0, "length_exponent": 0.5, "sft_reduction": "sum"}, rrhf(2.0, 0.5, True)),
    ("pro", {}, pro()),
    ("pro", {"sft_weight": 0.5, "temperatures": "score_gaps"}, pro(0.5, True)),
    ("knowpat", {}, knowpat()),
    ("knowpat", {"weight": 1.0}, knowpat(1.0)),
    ("dpo_listwise", {}, dpo_listwise()),
    ("dpo_listwise", {"beta": 0.5}, dpo_listwise(0.5)),
]


def golden() -> dict[str, Any]:
    """The table and what each method loses on it, with its default knobs and with others."""
    return {"records": RECORDS, "losses": [{"method": m, "knobs": k, "loss": loss} for m, k, loss in CASES]}


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
