"""Which curves a run's metrics make: known ones first and in words, everything else after them, nothing left out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from preftune.report.charts import Series, line_chart
from preftune.report.words import title_of

Row = Mapping[str, Any]

HELD_OUT = {"train": "training", "eval": "held out"}
NOT_METRICS = {"step", "kind", "nonfinite", "score", "score_low", "score_high", "score_sampled", "score_selected", "alarm"}
"""Keys of a row that no curve shows; the scores of rounds have charts of their own, an alarm is said in words."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One chart: the metrics that share it, and what to look for. `scale` divides, `main` curves are shown unasked.

    `names` tell several metrics apart, `train` names rows of training; a row that has a metric's name with both of `band` behind it makes
    one.
    """

    metrics: tuple[str, ...]
    title: str
    explain: str = ""
    unit: str = ""
    scale: float = 1.0
    main: bool = False
    names: tuple[str, ...] = ()
    train: str = HELD_OUT["train"]
    band: tuple[str, str] = ("_low", "_high")


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawn curve."""

    title: str
    explain: str
    svg: str
    main: bool


KNOWN = (
    Curve(("loss",), "Loss", "What training lowers. Held-out loss that turns upwards is memorising.", main=True),
    Curve(("perplexity",), "Perplexity", "How surprised the model is by the responses it should give: lower is better.", main=True),
    Curve(("accuracy",), "Accuracy", "Share of pairs put in the order people put them; 0.5 is guessing.", main=True),
    Curve(("margin",), "Margin", "How much higher the chosen response is rated than the rejected one.", main=True),
    Curve(
        ("chosen_reward", "rejected_reward"),
        "Chosen and rejected",
        "The gap is what is learnt. Both falling is common in DPO; the chosen one falling far is a warning.",
        main=True,
    ),
    Curve(("kl",), "KL to the reference", "How far the policy has moved from where it began.", "nats", main=True),
    Curve(("lr",), "Learning rate", "The schedule as it was applied."),
    Curve(("grad_norm",), "Gradient norm", "Before clipping. Spikes point at odd records."),
    Curve(("seconds",), "Time per step", "", "seconds"),
    Curve(("tokens",), "Tokens per step", "", "tokens"),
    Curve(("peak_memory",), "Peak memory", "", "GB", 1e9),
)


def _of_rollouts(metric: str, title: str, explain: str = "", unit: str = "", **more: Any) -> Curve:
    return Curve((metric,), title, explain, unit, train="drawn", **more)


ONLINE = (
    _of_rollouts(
        "score",
        "Score",
        "What the judge gives: to what was drawn for learning, and to held-out prompts with its 95% interval. That it rises was asked for; "
        "whether it is what was meant, the other charts say.",
        main=True,
    ),
    _of_rollouts(
        "gold",
        "Gold score",
        "What the second judge gives, which nothing learns from. Where it falls while the score rises, the first judge is being exploited.",
        main=True,
    ),
    _of_rollouts(
        "kl_response",
        "KL to the reference of a response",
        "How far the policy has moved from where it began: what the score was bought with.",
        "nats",
        main=True,
    ),
    _of_rollouts(
        "reference_perplexity",
        "Perplexity under the reference",
        "How odd the responses are to the starting model. A jump up is gibberish, a fall to 1 is one phrase for everything.",
        main=True,
    ),
    _of_rollouts(
        "response_tokens",
        "Response length",
        "Mean; the band of what was drawn holds four fifths of the responses. Length that grows with the score may be all it learned.",
        "tokens",
        band=("_p10", "_p90"),
        main=True,
    ),
    _of_rollouts("entropy", "Entropy of a token", "Near 0 nothing new is tried any more.", "nats", main=True),
    _of_rollouts(
        "clip_fraction", "Clip fraction", "Share of tokens that a step may move no further. Above a third, steps are too large.", main=True
    ),
    _of_rollouts(
        "explained_variance",
        "Explained variance",
        "How much of the returns the critic foresaw: 1 is all of it, 0 no more than their mean.",
        main=True,
    ),
    _of_rollouts("finished", "Share finished", "Responses that ended by themselves; the others were cut.", main=True),
    _of_rollouts("repetition", "Repetition", "Share of four-token phrases that the same response had before.", main=True),
    Curve(("loss",), "Loss", "Its level says nothing about how well it goes."),
    Curve(("kl",), "KL to the reference of a token, in the step", "", "nats"),
    _of_rollouts("kl_response_k3", "KL of a response, k3 estimate", "Never negative.", "nats"),
    _of_rollouts("policy_perplexity", "Perplexity under the policy"),
    _of_rollouts("response_tokens_p50", "Median length", "", "tokens"),
    Curve(("score_min", "score_max"), "Least and greatest score drawn", names=("least", "greatest")),
    _of_rollouts("unscorable", "Responses that could not be scored", "Nothing is learned from them."),
    Curve(
        ("seconds_sampling", "seconds_judging", "seconds_looking"),
        "Time of a rollout",
        "",
        "seconds",
        names=("sampling", "judging", "looking"),
    ),
)
"""The charts of online reinforcement learning, which stand first."""

_OF_A_ROUND = {"drawn": "score_sampled", "learned": "score_selected"}


def figures(rows: Sequence[Row], run: str) -> list[Figure]:
    """The charts of a run's metric rows; `run` names it for those who hear the chart rather than see it."""
    online = is_online(rows)
    first = ONLINE if online else ()
    shown = {metric for curve in first for metric in curve.metrics}
    curves = (*first, *(curve for curve in KNOWN if not shown & set(curve.metrics)))
    return ([] if online else _rounds(rows, run)) + [
        Figure(curve.title, curve.explain, _drawn(curve, lines, run), curve.main)
        for curve in (*curves, *_unknown(rows, curves))
        if (lines := list(_series(curve, rows)))
    ]


def is_online(rows: Sequence[Row]) -> bool:
    """Whether the rows are those of online reinforcement learning: a rollout says how many prompts it drew."""
    return any("prompts_drawn" in row for row in rows)


def numeric(rows: Sequence[Row], metric: str, kind: str = "train") -> list[tuple[int, float | None]]:
    """(step, value) of every row of `kind` that has the metric; null where it was not finite."""
    found = [(row["step"], row[metric]) for row in rows if row["kind"] == kind and metric in row and _is_number(row[metric])]
    return found if any(value is not None for _, value in found) else []


def _rounds(rows: Sequence[Row], run: str) -> list[Figure]:
    """Held-out scores of a run in rounds, with their intervals, and the scores of what was drawn and learned."""
    column = lambda found, name: [row[name] for row in found]
    evaluated = [row for row in rows if row["kind"] == "eval" and "score_low" in row]
    trained = [row for row in rows if row["kind"] == "train" and "score_selected" in row]
    charts = []
    if evaluated:
        held = Series("held out", *(column(evaluated, name) for name in ("step", "score", "score_low", "score_high")))
        about = "What the judge gives the responses to held-out prompts, with its 95% interval over prompts; 0 is the starting model."
        charts.append(("Held-out score", about, [held]))
    if trained:
        lines = [Series(name, column(trained, "step"), column(trained, key)) for name, key in _OF_A_ROUND.items()]
        charts.append(("Scores of a round", "What the judge gives all responses that were drawn, and those that were learned.", lines))
    draw = lambda title, lines: line_chart(lines, title=f"{title} of {run}", x_label="round", y_label="score")
    return [Figure(title, about, draw(title, lines), True) for title, about, lines in charts]


def _unknown(rows: Sequence[Row], curves: Sequence[Curve]) -> list[Curve]:
    known = {metric + end for curve in curves for metric in curve.metrics for end in ("", *curve.band)} | NOT_METRICS
    names = dict.fromkeys(name for row in rows for name in row if name not in known)
    return [Curve((name,), title_of(name)) for name in names]


def _series(curve: Curve, rows: Sequence[Row]) -> Iterator[Series]:
    for at, metric in enumerate(curve.metrics):
        for kind, words in {**HELD_OUT, "train": curve.train}.items():
            points = sorted(numeric(rows, metric, kind), key=lambda point: point[0])
            if points:
                own = curve.names[at] if curve.names else metric.partition("_")[0]
                steps, values = zip(*points)
                scaled = lambda values: [None if value is None else value / curve.scale for value in values]
                edges = [dict(numeric(rows, metric + end, kind)) for end in curve.band]
                low, high = ([edge.get(step) for step in steps] if all(edges) else None for edge in edges)
                name = words if len(curve.metrics) == 1 else f"{own}, {words}"
                yield Series(name, steps, scaled(values), low and scaled(low), high and scaled(high))


def _drawn(curve: Curve, lines: Sequence[Series], run: str) -> str:
    positive = [y for line in lines for y in line.y if y is not None]
    wide = min(positive) > 0 and max(positive) > 100 * sorted(positive)[len(positive) // 2]
    return line_chart(lines, title=f"{curve.title} of {run}", y_label=curve.unit, log_y=wide)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value))
