"""docs/methods-compared.md and its chart, from the results of `python -m benchmarks.methods`: every number comes from a file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from preftune.methods import METHODS
from preftune.report.charts import INK, MUTED, SERIES, STYLE
from preftune.report.words import DASH, duration, number, share
from preftune.training.durable import replace_file

PAGE, CHART = "methods-compared.md", "methods-compared.svg"

LEAST_KL = 1e-5
"""In nats: where a policy that did not move stands on the logarithmic axis."""

Row = dict[str, Any]


def write(results: Path, docs: Path) -> Path:
    """The page and its chart, from the folder of results; rows that are not there are named in the page."""
    setup = json.loads((results / "setup.json").read_text())
    files = {name: results / "results" / f"{name}.json" for name in METHODS}
    rows = [json.loads(file.read_text()) for file in files.values() if file.exists()]
    trained = [row for row in rows if row["data"] is not None]
    if not trained:
        raise SystemExit(f"{results} holds no result of a trained method yet")
    missing = [name for name, file in files.items() if not file.exists()]
    replace_file(docs / CHART, chart(trained).encode())
    replace_file(docs / PAGE, page(setup, rows, missing).encode())
    return docs / PAGE


def page(setup: Row, rows: Sequence[Row], missing: Sequence[str]) -> str:
    """The whole page as Markdown."""
    trained = [row for row in rows if row["data"] is not None]
    parts = [
        "# Methods compared\n",
        "<!-- Written by `python -m benchmarks.methods --write`: run it again instead of changing this page. -->\n",
        f"Every method of the table, trained alike: {setup['model']} after {setup['steps']} steps of SFT, then {setup['steps']} steps of "
        f"{setup['prompts_per_step']} prompts with the method's default knobs on the same pairs of `{setup['data']}` (at most "
        f"{setup['records']}; prompt and response within {setup['max_length']} tokens), all weights, one seed. "
        f"It is a look at how the methods behave, not a contest: see [the reading](#reading-it).\n",
        f"![Pair accuracy against KL of every policy; the numbers are those of the table]({CHART})\n",
        table(trained),
        _columns(setup),
        "## Reading it\n",
        reading(trained),
        _left_out(rows, missing),
        "## Again\n",
        f"```\npython -m benchmarks.methods {_options(setup)}\npython -m benchmarks.methods --write\n```\n",
        "Each row is one file of results, written whole; stopped or killed, the first command goes on where it was. A row by hand, from a "
        "model that saw the preferred responses (`preftune train sft model=smollm2 data=pairs.jsonl output=runs/start`), is "
        "`preftune train METHOD model=runs/start/final data=pairs.jsonl output=runs/mine`, then "
        "`preftune evaluate runs/mine/final held-out.jsonl --reference runs/start/final`.\n",
    ]
    return "\n".join(part for part in parts if part)


def _options(setup: Row) -> str:
    """What the command is told to do the same again."""
    names = ("steps", "records", "held_out", "max_length", "written", "new_tokens")
    return " ".join(f"--{name.replace('_', '-')} {setup[name]}" for name in names if name in setup)


def table(rows: Sequence[Row]) -> str:
    """One line a method, with the numbers of the chart."""
    lines = [
        "| | method | learns from | learning rate | pair accuracy | KL, response | KL, token | length | training | last loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for index, row in enumerate(rows, 1):
        kl, token, length = (row.get(key) for key in ("kl", "kl_per_token", "length"))
        cells = [
            str(index),
            f"`{row['name']}`",
            row["data"],
            f"{row['lr']:g}",
            _with_interval(row["accuracy"], share),
            _with_interval(kl, number) if kl else DASH,
            number(token["value"], 3) if token else DASH,
            number(length["value"], 3) if length else DASH,
            duration(row["seconds"]),
            number(row["final_loss"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _with_interval(one: Row, words: Any) -> str:
    interval = f" ({words(one['low'])} to {words(one['high'])})" if one["low"] is not None else ""
    return words(one["value"]) + interval


def _columns(setup: Row) -> str:
    return (
        "Pair accuracy: on held-out prompts, the preferred response has the higher score (reward models), or gained more log-probability "
        "over the SFT start than the other (policies, whatever their loss compares); a tie counts one half. Interval: 95%, prompts "
        f"resampled. KL: to the SFT start in nats, over the policy's own responses to {setup['written']} held-out prompts at "
        f"temperature 1, at most {setup['new_tokens']} tokens, for a whole response and for a token of it. Length: tokens of its greedy "
        f"responses, cut there, too. Training: the time of the steps, CPU threads: {setup['threads']}. "
        "The last loss is in each method's own units: it compares with none.\n"
    )


def reading(rows: Sequence[Row]) -> str:
    """What may be read from the numbers, and what may not."""
    best = max(rows, key=lambda row: row["accuracy"]["value"])
    floor = best["accuracy"]["low"]
    near = [row for row in rows if row is not best and floor is not None and (row["accuracy"]["high"] or 0) >= floor]
    sure = [row for row in rows if row["accuracy"]["low"] is not None and row["accuracy"]["low"] > 0.5]
    longer = rows[0]["length_accuracy"]
    lines = [
        f"- {len(sure)} of {len(rows)} methods order held-out pairs better than a coin beyond their interval"
        f"{': ' + ', '.join(_name(row) for row in sure) if sure else ''}. Always taking the longer response reaches "
        f"{_with_interval(longer, share)}.",
        f"- The highest accuracy is that of {_name(best)}, {share(best['accuracy']['value'])}; the intervals of {len(near)} others "
        "reach into its own, so among these there is no ranking.",
    ]
    moved = sorted((row for row in rows if row.get("kl")), key=lambda row: -row["kl"]["value"])
    if moved:
        far, close = moved[0], moved[-1]
        lines.append(
            f"- Furthest from the start went {_name(far)} ({number(far['kl']['value'])} nats a response), least far {_name(close)} "
            f"({number(close['kl']['value'])}). Accuracy that costs much KL is bought from what the model could do before."
        )
    lines += [
        "- One seed, one learning rate for all of a kind, a few steps of a small model: a method that wants another rate, more steps "
        "or other data looks worse here than it is. Methods for rankings or ratings get pairs only, where they are at their weakest.",
        "- Nothing here says that people prefer what a model writes: accuracy is measured on given responses, and KL "
        "only says how far it moved.",
    ]
    return "\n".join(lines) + "\n"


def _name(row: Row) -> str:
    return f"`{row['name']}`"


def _left_out(rows: Sequence[Row], missing: Sequence[str]) -> str:
    needs = [row for row in rows if row["data"] is None]
    lines = [f"- `{row['name']}` was not trained: pairs cannot give it {METHODS[row['name']].needs}." for row in needs]
    lines += [f"- Not run yet: {', '.join(f'`{name}`' for name in missing)}."] if missing else []
    return "\n".join(lines) + "\n" if lines else ""


def chart(rows: Sequence[Row]) -> str:
    """Accuracy against KL of every policy, with intervals and the table's numbers; reward models stand on the left edge's own strip."""
    with mpl.rc_context({**STYLE, "axes.spines.left": True}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        figure.patch.set_facecolor("white")
        heads, axes = figure.subplots(1, 2, sharey=True, width_ratios=(1, 6))
        for index, row in enumerate(rows, 1):
            accuracy, kl = row["accuracy"], row.get("kl")
            place, at = (axes, max(kl["value"], LEAST_KL)) if kl else (heads, index)
            colour = SERIES[0] if kl else SERIES[1]
            reach = (
                None
                if accuracy["low"] is None
                else [[max(0.0, accuracy["value"] - accuracy["low"])], [max(0.0, accuracy["high"] - accuracy["value"])]]
            )
            place.errorbar(at, accuracy["value"], yerr=reach, fmt="o", color=colour, markersize=4, elinewidth=0.7, alpha=0.8)
            place.annotate(str(index), (at, accuracy["value"]), xytext=(4, 3), textcoords="offset points", fontsize=8, color=INK)
        for place in (heads, axes):
            place.axhline(0.5, color=MUTED, linestyle="--", linewidth=0.8)
            place.grid(axis="y")
        heads.set(xticks=[], xlabel="reward models", ylabel="pair accuracy on held-out prompts")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: number(x))
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("KL to the SFT start, nats a response")
        heads.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator")))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"
