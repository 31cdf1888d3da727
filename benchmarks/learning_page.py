"""docs/online-learning.md and its figure, from the results of `python -m benchmarks.learning`: every number comes from a file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from preftune.report.charts import INK, MUTED, SERIES, STYLE
from preftune.report.words import duration, fixed, number, share
from preftune.training.durable import replace_file

PAGE, FIGURE, RESULTS = "online-learning.md", "online-learning.svg", "online-learning.json"
EXPLOITED = "exploited"
DRAWN = ("grpo", "ppo")
"""Lines of the first panel."""
CUT = ("cut", "cut-keep")
"""Lines of the second."""
LATE = 10
"""Rollouts at the end whose mean score is the accuracy of samples."""

Run = dict[str, Any]


def write(results: Path, docs: Path, lines: Mapping[str, str]) -> Path:
    """The page, its figure and the numbers of both, from the folder of results; `lines` are the runs' names and what they are."""
    runs: list[Run] = json.loads((results / "learning.json").read_text())
    by = {name: [run for run in runs if run["name"] == name] for name in (*lines, EXPLOITED)}
    if not all(by.values()):
        raise SystemExit(f"not run yet: {', '.join(name for name, found in by.items() if not found)}")
    replace_file(docs / RESULTS, json.dumps(_rounded(runs)).encode())
    replace_file(docs / FIGURE, figure(by, lines).encode())
    replace_file(docs / PAGE, page(by, lines).encode())
    return docs / PAGE


# --- numbers -----------------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of Student's t over seeds."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2 or not np.std(values):
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5)
    return mean, mean - half, mean + half


def greedy(run: Run, which: int = -1) -> float:
    """Held-out accuracy of the likeliest answers at one of the evaluations."""
    return float(run["evaluations"][which]["score"])


def late(run: Run, key: str = "score") -> float:
    """Mean over the last rollouts."""
    return float(np.mean([row[key] for row in run["rollouts"][-LATE:]]))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def _said(values: Sequence[float], words: Any = share) -> str:
    mean, low, high = interval(values)
    if words is share:
        low, high = max(0.0, low), min(1.0, high)
    return words(mean) if words(low) == words(high) else f"{words(mean)} ({words(low)} to {words(high)})"


# --- the page ----------------------------------------------------------------------------------------------------------------


def page(by: Mapping[str, Sequence[Run]], lines: Mapping[str, str]) -> str:
    """The whole page as Markdown."""
    spent = sum(run["seconds"] for found in by.values() for run in found)
    seeds = len(by[next(iter(lines))])
    parts = [
        "# Online methods seen learning\n",
        "<!-- Written by `python -m benchmarks.learning --write`: run it again instead of changing this page. -->\n",
        "A model of 0.4M random weights is shown sums of two numbers up to 49 by demonstrators who mostly forget to carry the one "
        "([recipes/arithmetic.py](../recipes/arithmetic.py)). Imitation (`sft`) learns the sums and the mistake. Then an online method "
        "goes on with a rule that knows the right answer, on the same questions; accuracy is that of the likeliest answer on 300 questions "
        f"that no stage saw. {seeds} seeds, whose mean and 95% interval (Student's t) stand in the table.\n",
        f"![Accuracy over rollouts, the same where answers are cut, and a reward that is exploited]({FIGURE})\n",
        _table(by, lines),
        "Sampled: mean score of answers drawn at temperature 1, in the first rollout and in the last ten. "
        "Every run saw 60 rollouts of 256 answers.\n",
        "## What is seen\n",
        _reading(by),
        "## A reward that is exploited\n",
        _exploited(by[EXPLOITED][0], [run for name in lines for run in by[name]]),
        "## Closed forms\n",
        "Where every response can be enumerated, methods are held to more than learning: `tests/online/test_optimum.py` checks that PPO, "
        "REINFORCE++, GRPO and RLOO end within 2% total variation of ref exp(r / kl) / Z, and where they do not:\n\n"
        "- With the KL in the reward (PPO, RLOO, REINFORCE++), whitening does not move the optimum: it scales reward and KL alike.\n"
        "- With the KL in the loss (GRPO), dividing the advantage by the group's deviation s makes the coefficient kl s; "
        "`method.scale: none` leaves it as it is.\n"
        "- With the KL in the loss and several tokens, a token answers for its own KL alone, not for that of the tokens behind it.\n"
        "- `kl_loss: k3`, as published, has the gradient of the KL the other way round and another optimum; `k2` and `k3_is` have the "
        "right one.\n",
        "## Again\n",
        "```\npython -m benchmarks.learning\npython -m benchmarks.learning --write\n```\n",
        "By hand, after `python recipes/arithmetic.py runs/arithmetic` and `cd runs/arithmetic`:\n\n"
        "```\npreftune train sft model=model data=shown.jsonl output=sft prompts_per_step=64 max_steps=700 epochs=9 lr=2e-3\n"
        "preftune train grpo model=sft/final data=questions.jsonl judge=final_answer output=grpo rollout.max_new_tokens=6 lr=2e-4\n```\n",
        f"The steps and rollouts of all runs took {duration(spent)} on one core that had other work besides. Stopped or killed, the same "
        f"command goes on inside the run. All curves: [{RESULTS}]({RESULTS}).\n",
    ]
    return "\n".join(parts)


def _table(by: Mapping[str, Sequence[Run]], lines: Mapping[str, str]) -> str:
    rows = [
        "| run | before | after | sampled, before | sampled, after | KL to the start | answers that end | alarms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, what in lines.items():
        runs = by[name]
        cells = [
            what,
            _said([greedy(run, 0) for run in runs]),
            _said([greedy(run) for run in runs]),
            _said([run["rollouts"][0]["score"] for run in runs]),
            _said([late(run) for run in runs]),
            _said([late(run, "kl_response") for run in runs], fixed),
            _said([late(run, "finished") for run in runs]),
            f"{sum(run['alarm'] for run in runs)} of {len(runs)}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def _difference(one: Sequence[Run], other: Sequence[Run]) -> str:
    """How two lines differ, seed by seed."""
    mean, low, high = interval([greedy(b) - greedy(a) for a, b in zip(one, other, strict=True)])
    points = lambda x: f"{100 * x:+.0f}".replace("-", "−")
    if low == high == 0:
        return "not one answer is another"
    return f"{points(mean)} points ({points(low)} to {points(high)}){', which may be chance' if low <= 0 <= high else ''}"


def _reading(by: Mapping[str, Sequence[Run]]) -> str:
    gain = {name: interval([greedy(run) - greedy(run, 0) for run in by[name]]) for name in DRAWN}
    gains = ", ".join(f"{name.upper()} by {100 * m:.0f} points ({100 * a:.0f} to {100 * b:.0f})" for name, (m, a, b) in gain.items())
    return (
        f"- Accuracy rises above what imitation reached: {gains}. The likeliest answer is mended before samples are: what was a common "
        "second choice becomes the first.\n"
        f"- Whitening: without it, {_difference(by['ppo'], by['ppo-plain'])}. Advantages of a 0 or 1 score are of one size already.\n"
        f"- KL: without it, {_difference(by['ppo'], by['ppo-free'])}. This rule cannot be fooled; what the KL buys is "
        "nearness to the start, which the table shows.\n"
        f"- Penalty for answers that are cut, where there is room for all: without it, {_difference(by['grpo'], by['grpo-keep'])}. Nearly "
        "every answer ends, and a longer one is wrong by the rule anyway.\n"
        f"- The same penalty where answers are cut by design, after two tokens: accuracy ends at {_said([greedy(r) for r in by['cut']])} "
        f"with it and at {_said([greedy(r) for r in by['cut-keep']])} without. A right answer of two digits has no room for its end and is "
        "punished. Set `missing_eos: keep` there.\n"
    )


def _exploited(run: Run, healthy: Sequence[Run]) -> str:
    rows = run["rollouts"]
    gold, score = ([row[key] for row in rows] for key in ("gold", "score"))
    level = np.convolve(gold, np.ones(4) / 4, "valid")
    peak, fired = int(level.argmax()), heard(rows)
    lost = 1 - level[fired - 3] / level[peak]
    return (
        "Another small policy is trained (`grpo`, no KL) by a judge that counts how often a letter is there. The gold judge, which is only "
        "watched, likes the letter too, but not beside itself. While the letter is rare the two agree.\n\n"
        f"The judge's score rises all along, from {number(score[0], 2)} to {number(score[-1], 2)}. The gold score (mean of four rollouts) "
        f"peaks at {number(float(level[peak]), 2)} around rollout {peak + 3} and ends at {number(float(level[-1]), 2)}. The alarm comes "
        f"after rollout {fired + 1}, when it has lost {share(max(0.0, float(lost)))} of its peak. It looks at two things: whether the gold "
        "score has fallen further than noise over so many looks would bring it, and the correlation of both scores among the responses to "
        "a prompt (`gold_agreement`). A step raises the gold score only while that is positive, so that it crosses zero at the peak.\n\n"
        f"In the runs above, where the score is the real thing, it comes in {sum(one['alarm'] for one in healthy)} of {len(healthy)}.\n"
    )


def heard(rows: Sequence[Mapping[str, Any]]) -> int:
    """The rollout, from 0, after which the alarm came."""
    return next((i for i, row in enumerate(rows) if row.get("alarm")), len(rows) - 1)


# --- the figure --------------------------------------------------------------------------------------------------------------


def figure(by: Mapping[str, Sequence[Run]], lines: Mapping[str, str]) -> str:
    """Three panels as SVG."""
    with mpl.rc_context(STYLE):
        drawing = Figure(figsize=(11, 3.4), layout="constrained")
        learned, cut, exploited = drawing.subplots(1, 3)
        _curves(learned, by, {name: lines[name] for name in DRAWN}, "Accuracy on held-out sums")
        _curves(cut, by, {name: lines[name].partition(", ")[2] for name in CUT}, "GRPO, answers cut by design")
        _gold(exploited, by[EXPLOITED][0])
        out = io.StringIO()
        drawing.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return out.getvalue()


def _curves(axes: Axes, by: Mapping[str, Sequence[Run]], lines: Mapping[str, str], title: str) -> None:
    for (name, what), color in zip(lines.items(), SERIES, strict=False):
        runs = by[name]
        rollouts = len(runs[0]["rollouts"])
        steps = [row["step"] for row in runs[0]["evaluations"]]
        at = [step * rollouts / steps[-1] for step in steps]
        means = [interval([greedy(run, i) for run in runs]) for i in range(len(steps))]
        axes.plot(at, [m for m, _, _ in means], color=color, label=what.partition(": ")[0], marker="o", markersize=3)
        axes.fill_between(at, [max(0, a) for _, a, _ in means], [min(1, b) for _, _, b in means], color=color, alpha=0.15)
    axes.set(title=title, xlabel="rollouts of 256 answers", ylim=(0, 1))
    _dressed(axes)


def _gold(axes: Axes, run: Run) -> None:
    rows = run["rollouts"]
    at = np.arange(1, len(rows) + 1)
    axes.plot(at, [row["score"] for row in rows], color=SERIES[1], label="judge")
    axes.plot(at, [row["gold"] for row in rows], color=SERIES[0], label="gold")
    fired = heard(rows) + 1
    axes.axvline(fired, color=MUTED, linestyle="--", linewidth=1)
    axes.annotate("alarm", (fired, axes.get_ylim()[1]), xytext=(4, -10), textcoords="offset points", color=INK)
    axes.set(title="A reward that is exploited", xlabel="rollout")
    _dressed(axes)


def _dressed(axes: Axes) -> None:
    axes.title.set_color(INK)
    axes.title.set_fontsize(10)
    axes.grid(axis="y")
    axes.legend()
