"""What a rollout says of itself, and when that means that the reward is being exploited (2307.04964; methods H.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from preftune.objectives.value import explained_variance
from preftune.online.config import AlarmConfig
from preftune.online.gathered import Gathered

Figures = dict[str, float]


def lengths_of(tokens: Sequence[int], finished: Sequence[bool]) -> Figures:
    """Length of responses and its quantiles, and the share that ended by themselves."""
    low, middle, high = np.quantile(tokens, [0.1, 0.5, 0.9])
    return {
        "response_tokens": float(np.mean(tokens)),
        "response_tokens_p10": float(low),
        "response_tokens_p50": float(middle),
        "response_tokens_p90": float(high),
        "finished": float(np.mean(finished)),
    }


def scores_of(scores: np.ndarray, name: str = "score") -> Figures:
    """Mean, deviation and range of [G, N] scores, NaN left out; and the share of prompts whose responses all score the same.

    Beside them the share of NaN, responses that could not be scored; alone where all are.
    """
    known = scores[~np.isnan(scores)]
    share = {"unscorable" if name == "score" else f"unscorable_{name}": 1 - len(known) / scores.size}
    if not len(known):
        return share
    found = share | {
        name: float(known.mean()),
        f"{name}_std": float(known.std()),
        f"{name}_min": float(known.min()),
        f"{name}_max": float(known.max()),
    }
    if scores.shape[1] > 1:
        found[f"equal_{name}s"] = float(np.mean([np.ptp(row[~np.isnan(row)]) == 0 if (~np.isnan(row)).any() else True for row in scores]))
    return found


def agreement(scores: np.ndarray, gold: np.ndarray) -> Figures:
    """Correlation of [G, N] scores with gold ones among the responses to one prompt, all prompts pooled; none where either is flat.

    A step that raises the score moves the gold score the way of their covariance under the policy (the policy gradient of one along that of
    the other, in the space of distributions): where it turns negative, the gold score is at its peak.
    """
    known = ~(np.isnan(scores) | np.isnan(gold))
    rows = [(s[k] - s[k].mean(), g[k] - g[k].mean()) for s, g, k in zip(scores, gold, known, strict=True) if k.any()]
    if not rows:
        return {}
    ours, theirs = (np.concatenate(part) for part in zip(*rows, strict=True))
    size = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    return {"gold_agreement": float((ours * theirs).sum() / size)} if size > 0 else {}


def distances(logp: Tensor, reference: Tensor | None, mask: Tensor, *, kl: bool = True) -> Figures:
    """Of [R, T] log-probabilities at the sampling temperature: perplexities, and with `kl` that to the reference a token and a response.

    KL as the mean log ratio (k1, may be negative) and as the k3 estimate, which never is.
    """
    count, each = mask.sum(), mask.sum(1) > 0
    mean = lambda values: float((values * mask).sum() / count)
    found = {"policy_perplexity": float(np.exp(-mean(logp)))}
    if reference is not None:
        found["reference_perplexity"] = float(np.exp(-mean(reference)))
    if reference is None or not kl:
        return found
    gap = (logp - reference).clamp(-20, 20) * mask
    k3 = ((-gap).expm1() + gap) * mask
    return found | {
        "kl_token": mean(gap),
        "kl_response": float(gap.sum(1)[each].mean()),
        "kl_response_k3": float(k3.sum(1)[each].mean()),
    }


def repetition(ids: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams, of all responses, that their own response had before."""
    total = repeated = 0
    for one in ids:
        grams = [tuple(one[i : i + n]) for i in range(len(one) - n + 1)]
        total, repeated = total + len(grams), repeated + len(grams) - len(set(grams))
    return repeated / total if total else 0.0


def of_critic(found: Gathered, returns: Tensor | None) -> Figures:
    """How much of the returns the critic foresaw."""
    if returns is None or found.values is None:
        return {}
    return {"explained_variance": float(explained_variance(found.values, returns, found.counted))}


def alarm(history: Sequence[Figures], config: AlarmConfig) -> str | None:
    """What is wrong after the newest rollout, in words; None where nothing is.

    The first `window` rollouts make the bands, and the newest `window` are compared with them. Perplexity under the reference and length
    count only while the score rises, and so does a gold score that falls or runs against it; a KL over its bound always does.
    """
    w = config.window
    if len(history) < 2 * w:
        return None
    mean = lambda rows, key: float(np.mean([row[key] for row in rows if key in row])) if any(key in row for row in rows) else None
    first, last = history[:w], history[-w:]
    told = []
    if config.kl is not None and (kl := mean(last, "kl_response_k3")) is not None and kl > config.kl:
        told.append(f"KL to the reference is {kl:.3g} nats a response, above {config.kl:g}")
    before, after = mean(first, "score"), mean(last, "score")
    if before is None or after is None or after <= before + _error(first, last, "score"):
        return "; ".join(told) or None
    for key, name, factor in (
        ("reference_perplexity", "perplexity under the reference", config.perplexity),
        ("response_tokens", "response length", config.length),
    ):
        old, new = mean(first, key), mean(last, key)
        if old and new and not 1 / factor <= new / old <= factor:
            told.append(f"{name} went from {old:.3g} to {new:.3g}")
    if fell := _fall([row["gold"] for row in history if "gold" in row], w):
        told.append(f"the gold score fell from {fell[0]:.3g} to {fell[1]:.3g}")
    agreed = [row["gold_agreement"] for row in history if "gold_agreement" in row]
    if _below_zero(agreed, w):
        told.append(f"what raises it now lowers the gold score: among a prompt's responses they correlate by {np.mean(agreed[-w:]):.2g}")
    return f"the score rose from {before:.3g} to {after:.3g}, but {'; '.join(told)}" if told else None


def _noise(values: Sequence[float]) -> float:
    """Deviation of one rollout's number, from successive differences, which hold little of a trend."""
    return float(np.sqrt(np.mean(np.diff(values) ** 2) / 2))


def _below_zero(values: Sequence[float], window: int) -> bool:
    """Whether the newest window's mean is further below 0 than the lowest of so many would be by noise, and one deviation more."""
    if len(values) < 2 * window:
        return False
    bound = (1 + np.sqrt(2 * np.log(len(values) / window))) * _noise(values) / np.sqrt(window)
    return bool(np.mean(values[-window:]) < -max(bound, 1e-9))


def _fall(values: Sequence[float], window: int) -> tuple[float, float] | None:
    """The best mean of so many rollouts and the newest one, where they lie further apart than noise would bring them.

    Means of k of n rollouts that only differ by noise spread over about 2 sqrt(2 log(n / k)) of their deviations, which is what the best
    and the newest may be apart; one deviation more is a fall. Longer windows see slower falls.
    """
    count, k = len(values), window
    if count < 2 * window:
        return None
    while 2 * k <= count:
        means = np.convolve(values, np.ones(k) / k, "valid")
        best, newest = float(max(means)), float(means[-1])
        if best - newest > max((1 + 2 * np.sqrt(2 * np.log(count / k))) * _noise(values) / np.sqrt(k), 1e-9):
            return best, newest
        k *= 2
    return None


def _error(first: Sequence[Figures], last: Sequence[Figures], key: str) -> float:
    """Standard error of the difference of two means of rollouts."""
    known = lambda rows: [row[key] for row in rows if key in row]
    spread = lambda rows: float(np.var(known(rows))) / len(known(rows))
    return (spread(first) + spread(last)) ** 0.5


def kept(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Of scored responses the best, the worst and three at random, each told which it is."""
    known = [row for row in rows if row["score"] is not None]
    order = sorted(known, key=lambda row: row["score"])
    chosen = [("worst", order[0]), ("best", order[-1])] if order else []
    random = np.random.default_rng(seed).permutation(len(rows))[:3]
    return [{"which": name, **row} for name, row in (*chosen, *(("random", rows[i]) for i in random))]
