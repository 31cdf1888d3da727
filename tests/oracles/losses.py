"""One loss of each method on one fixed table, by loops over numpy: no torch, nothing of Preftune.

`python -m tests.oracles.losses` writes tests/methods/golden.json.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
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


def sft(every: bool = False, weigh: Callable[[float], float] = lambda score: 1.0) -> float:
    """Methods B: minus the mean log-probability of all tokens of the best (or of all) responses, each as often as its score says."""
    total, count = 0.0, 0.0
    for record in RECORDS:
        best = int(np.argmin(record["ranks"]))
        for n, tokens in enumerate(record["logps"]):
            if every or n == best:
                weight = weigh(record["scores"][n])
                total -= weight * sum(tokens)
                count += weight * len(tokens)
    return total / count


def best_nll(record: dict[str, Any]) -> float:
    """Methods C.5: minus the mean log-probability of the best response's tokens."""
    return -float(np.mean(record["logps"][int(np.argmin(record["ranks"]))]))


def reward(centering: float = 0.0, smoothing: float = 0.0, imitation: float = 0.0) -> float:
    """Methods C.2: mean over records of the mean over pairs, and the centering term likewise; a label may be wrong; C.5 beside it."""
    losses = []
    for record in RECORDS:
        r = record["rewards"]
        right = [softplus(r[j] - r[i]) + centering * (r[i] + r[j]) ** 2 for i, j in pairs(record["ranks"])]
        wrong = [softplus(r[i] - r[j]) + centering * (r[i] + r[j]) ** 2 for i, j in pairs(record["ranks"])]
        losses.append((1 - smoothing) * np.mean(right) + smoothing * np.mean(wrong) + imitation * best_nll(record))
    return float(np.mean(losses))


def reward_pointwise(imitation: float = 0.0) -> float:
    """Methods C.1: mean squared error over all responses; C.5 as a mean over records beside it."""
    errors = [(r - s) ** 2 for record in RECORDS for r, s in zip(record["rewards"], record["scores"], strict=True)]
    return float(np.mean(errors)) + imitation * float(np.mean([best_nll(record) for record in RECORDS]))


def reward_listwise(mean_over_stages: bool = False, imitation: float = 0.0) -> float:
    """Methods C.4, mean over records; a stage is a response with any ranked strictly below it."""
    losses = []
    for record in RECORDS:
        r = record["rewards"]
        stages = [log_sum_exp([r[k], *(r[j] for j in worse)]) - r[k] for k, worse in levels(record["ranks"])]
        losses.append((np.mean(stages) if mean_over_stages else sum(stages)) + imitation * best_nll(record))
    return float(np.mean(losses))


def pairwise(value: Any, loss: Any, imitate: float = 0.0) -> float:
    """Mean over records of the mean over pairs of `loss` at the difference of `value(tokens, reference)`; `imitate` times C.5 beside it."""
    losses = []
    for record in RECORDS:
        v = [value(np.array(tokens), reference) for tokens, reference in zip(record["logps"], record["reference"], strict=True)]
        losses.append(np.mean([loss(v[i] - v[j]) for i, j in pairs(record["ranks"])]) + imitate * best_nll(record))
    return float(np.mean(losses))


def ratio(tokens: np.ndarray, reference: float) -> float:
    """Log of how much likelier the policy finds a response than the reference does."""
    return float(tokens.sum() - reference)


def raw(tokens: np.ndarray, reference: float) -> float:
    """Log-probability of a response, without reference."""
    return float(tokens.sum())


def mean_ratio(tokens: np.ndarray, reference: float) -> float:
    """`ratio` for each token."""
    return float((tokens.sum() - reference) / len(tokens))


def dpo(beta: float = 0.1) -> float:
    """Methods E.1."""
    return pairwise(ratio, lambda d: softplus(-beta * d))


def diverging(slope: Any, beta: float) -> float:
    """DPO whose responses count `slope(pi / ref)`, the derivative of the divergence's f."""
    return pairwise(lambda t, r: slope(np.exp(ratio(t, r))), lambda d: softplus(-beta * d))


def hinge(value: Any, beta: float, imitate: float = 0.0) -> float:
    """Methods E.2, hinge."""
    return pairwise(value, lambda d: max(0.0, 1 - beta * d), imitate)


def ipo(value: Any, beta: float = 0.1) -> float:
    """Methods E.2, a square around 1 / (2 beta)."""
    return pairwise(value, lambda d: (d - 1 / (2 * beta)) ** 2)


def noisy(wrong: float, beta: float = 0.1, robust: bool = False) -> float:
    """Methods E.2, cdpo and robust."""
    sign, whole = (-1, 1 - 2 * wrong) if robust else (1, 1)
    return pairwise(ratio, lambda d: ((1 - wrong) * softplus(-beta * d) + sign * wrong * softplus(beta * d)) / whole)


def log_odds(tokens: np.ndarray, reference: float) -> float:
    """Methods E.4, of the geometric mean of a token's probability."""
    p = float(np.exp(tokens.mean()))
    return float(np.log(p / (1 - p)))


def simpo(beta: float = 2.0, gamma: float = 1.0, imitate: float = 0.0) -> float:
    """Methods E.6."""
    return pairwise(lambda t, r: t.mean(), lambda d: softplus(gamma - beta * d), imitate)


def orpo(weight: float = 0.1) -> float:
    """Methods E.4."""
    return pairwise(log_odds, lambda d: weight * softplus(-d), 1.0)


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


SURVEYED = 0.4
"""What a method's survey of the step found, in the golden losses of methods that make one."""


def kto(beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> float:
    """Methods E.5: mean over the labelled responses of the step; z0 is given."""
    losses = []
    for record in RECORDS:
        for tokens, reference, label in zip(record["logps"], record["reference"], record["labels"], strict=True):
            gain = beta * (sum(tokens) - reference - SURVEYED)
            if label is not None:
                value = 1 / (1 + np.exp(-gain if label else gain))
                losses.append((desirable_weight if label else undesirable_weight) * (1 - value))
    return float(np.mean(losses))


CASES: list[tuple[str, dict[str, Any], float]] = [
    ("sft", {}, sft()),
    ("sft", {"responses": "all"}, sft(every=True)),
    ("sft", {"weights": "score"}, sft(weigh=lambda score: score)),
    ("sft", {"responses": "all", "weights": "exp_score", "temperature": 0.5}, sft(True, lambda score: math.exp(2 * score))),
    ("reward", {}, reward()),
    ("reward", {"centering": 0.01}, reward(0.01)),
    ("reward", {"label_smoothing": 0.1, "imitation": 0.5}, reward(0.0, 0.1, 0.5)),
    ("reward_pointwise", {}, reward_pointwise()),
    ("reward_pointwise", {"imitation": 1.0}, reward_pointwise(1.0)),
    ("reward_listwise", {}, reward_listwise()),
    ("reward_listwise", {"mean_over_stages": True, "imitation": 0.5}, reward_listwise(True, 0.5)),
    ("dpo", {}, dpo()),
    ("dpo", {"beta": 0.5}, dpo(0.5)),
    ("dpo", {"reference_free": True, "sft_weight": 0.2}, pairwise(raw, lambda d: softplus(-0.1 * d), 0.2)),
    ("dpo", {"f_divergence": "forward_kl"}, diverging(lambda x: -1 / x, 0.1)),
    ("dpo", {"f_divergence": "js"}, diverging(lambda x: np.log(2 * x / (1 + x)), 0.1)),
    ("dpo", {"f_divergence": "alpha", "alpha": 0.3}, diverging(lambda x: (1 - x**-0.3) / 0.3, 0.1)),
    ("dpo_hinge", {}, hinge(ratio, 0.1)),
    ("dpo_hinge", {"beta": 0.5}, hinge(ratio, 0.5)),
    ("ipo", {}, ipo(mean_ratio)),
    ("ipo", {"beta": 0.5}, ipo(mean_ratio, 0.5)),
    ("ipo_sum", {}, ipo(ratio)),
    ("ipo_sum", {"beta": 0.5}, ipo(ratio, 0.5)),
    ("cdpo", {}, noisy(0.1)),
    ("cdpo", {"epsilon": 0.3, "beta": 0.5}, noisy(0.3, 0.5)),
    ("dpo_robust", {}, noisy(0.1, robust=True)),
    ("dpo_robust", {"epsilon": 0.3, "beta": 0.5}, noisy(0.3, 0.5, robust=True)),
    ("dpo_len", {}, pairwise(mean_ratio, lambda d: softplus(-5 * d))),
    ("rso_sigmoid_norm", {}, dpo(0.05)),
    ("rso_hinge_norm", {}, hinge(ratio, 0.05)),
    ("rso_hinge_norm", {"gamma": 0.5}, hinge(ratio, 0.5)),
    ("slic", {}, hinge(raw, 1.0, 0.5)),
    ("slic", {"beta": 0.2, "sft_weight": 0.0}, hinge(raw, 0.2)),
    ("cpo", {}, pairwise(raw, lambda d: softplus(-0.1 * d), 1.0)),
    ("simpo", {}, simpo()),
    ("simpo", {"beta": 1.5, "gamma_ratio": 0.4, "sft_weight": 0.3}, simpo(1.5, 0.6, 0.3)),
    ("orpo", {}, orpo()),
    ("orpo", {"weight": 0.5}, orpo(0.5)),
    ("rrhf", {}, rrhf()),
    ("rrhf", {"weight": 2.0, "length_exponent": 0.5, "sft_reduction": "sum"}, rrhf(2.0, 0.5, True)),
    ("pro", {}, pro()),
    ("pro", {"sft_weight": 0.5, "temperatures": "score_gaps"}, pro(0.5, True)),
    ("knowpat", {}, knowpat()),
    ("knowpat", {"weight": 1.0}, knowpat(1.0)),
    ("dpo_listwise", {}, dpo_listwise()),
    ("dpo_listwise", {"beta": 0.5}, dpo_listwise(0.5)),
    ("kto", {}, kto()),
    ("kto", {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.8}, kto(0.5, 1.5, 0.8)),
]


def golden() -> dict[str, Any]:
    """The table and what each method loses on it, with its default knobs and with others."""
    return {"records": RECORDS, "losses": [{"method": m, "knobs": k, "loss": loss} for m, k, loss in CASES]}


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden(), indent=1) + "\n", encoding="utf-8")
