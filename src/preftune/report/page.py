"""`report.html`: one file that says what a run did, with every number traceable to the file it came from.

All text comes from models and data sets, so nothing of it is trusted: jinja2 escapes everything, charts escape their own text, links
are made only to files beside the report, and the page forbids scripts and every request by its Content-Security-Policy.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from preftune.errors import UserError
from preftune.report import words
from preftune.report.charts import Interval, histogram, interval_chart
from preftune.report.contents import EVALUATION_FILE, Metric, Quickstart, Stage, read_quickstart
from preftune.report.curves import Figure, Row, figures, is_online, numeric
from preftune.report.online import ALARM_FILE, alarm, responses
from preftune.training.durable import explained, replace_file
from preftune.training.manifest import RUN_FILE, RunManifest, read_manifest
from preftune.training.metrics import METRICS_FILE, read_metrics

REPORT_FILE = "report.html"
CHANGE_FILE = "change.json"
SHOWN_GENERATIONS = 6
ENOUGH_FOR_HISTOGRAM = 12


def write(run_dir: Path) -> Path:
    """Write `run_dir/report.html` from its `run.json` and `metrics.jsonl`, or from a quickstart's `evaluation.json`; return its path.

    Raises UserError when the directory holds no run, or a file of it cannot be read.
    """
    manifest = read_manifest(run_dir)
    if manifest is None:
        if (run_dir / EVALUATION_FILE).exists():
            return write_quickstart(run_dir)
        raise UserError("no run here", where=str(run_dir), fix=f"Give the output folder of a training run: it holds {RUN_FILE}.")
    rows = _rows(run_dir)
    seconds = [value for _, value in numeric(rows, "seconds") if value is not None]
    tokens = [value for _, value in numeric(rows, "tokens") if value is not None]
    memory = [value for _, value in numeric(rows, "peak_memory") if value is not None]
    in_rounds = any("score_selected" in row for row in rows)
    facts = {
        "Rounds" if in_rounds else "Steps": words.number(max((row["step"] for row in rows), default=None)),
        "Time in rounds" if in_rounds else "Time in steps": words.duration(sum(seconds) if seconds else None),
        "Tokens": words.number(sum(tokens) if tokens else None),
        "Peak memory": words.size(max(memory, default=None)),
    }
    page = _environment().get_template("run.html").render(
        title=run_dir.resolve().name,
        run=manifest,
        sentence=f"{run_sentence(manifest, rows)} {_change(run_dir)}".strip(),
        facts=facts,
        bad_rows=sum("nonfinite" in row for row in rows),
        alarm=alarm(run_dir, rows),
        responses=(shown := responses(run_dir)),
        figures=figures(rows, run_dir.resolve().name),
        details=_details(manifest),
        files=_present(run_dir, [RUN_FILE, METRICS_FILE, CHANGE_FILE, ALARM_FILE, *(rollout.file for rollout in shown)]),
        root=run_dir,
    )  # fmt: skip
    return _saved(run_dir, page)


def write_quickstart(root: Path) -> Path:
    """Write `root/report.html` from `root/evaluation.json` and the run directories of its stages; return its path.

    Raises UserError when a file is missing or malformed.
    """
    results = read_quickstart(root)
    files = [EVALUATION_FILE]
    for stage in results.stages:
        files += [f"{stage.run}/{name}" for name in (RUN_FILE, METRICS_FILE, REPORT_FILE)] if stage.run else []
    page = _environment().get_template("quickstart.html").render(
        title="From human feedback to an aligned model",
        results=results,
        sentence=results.headline or quickstart_sentence(results),
        section_charts=[_accuracy_chart(section.title, section.metrics) for section in results.sections],
        curves=[(stage, drawn) for stage in results.stages if (drawn := _stage_figures(root, stage))],
        score_changes=_score_changes(results),
        shown=SHOWN_GENERATIONS,
        files=_present(root, files),
        root=root,
    )  # fmt: skip
    return _saved(root, page)


def quickstart_sentence(results: Quickstart) -> str:
    """The result in plain words: each held-out accuracy with its interval, and whether that is better than guessing."""
    known = [metric for metric in results.accuracies if metric.value is not None]
    if not known:
        return f"{results.meta.model} was trained on human preferences; the figures below say what changed."
    said = [
        f"{_mid_sentence(metric.name)} is {words.share(metric.value)}"
        + (f" (95% interval {_between(metric)})" if _has_interval(metric) else "")
        for metric in known
    ]
    above = [metric for metric in known if _has_interval(metric) and (metric.low or 0) > 0.5]
    if len(above) == len(known):
        verdict = "the whole interval lies above that" if len(known) == 1 else "the intervals lie wholly above that"
    elif above:
        verdict = f"{len(above)} of {len(known)} intervals lie above that, the others are not yet distinguishable from it"
    else:
        verdict = "with this much data that is not yet distinguishable from it"
    return f"On prompts kept out of training, {_listed(said)}. Guessing would give 50%; {verdict}."


def run_sentence(manifest: RunManifest, rows: list[Row]) -> str:
    """How a run went, in one or two plain sentences."""
    ends = {"running": "is still running", "interrupted": "was interrupted", "stopped": "was stopped"}
    said = []
    told = (
        ("score", "eval", "held-out score"),
        ("score", "train", "score of what was drawn"),
        ("gold", "train", "gold score"),
        ("loss", "train", "loss"),
        ("loss", "eval", "held-out loss"),
        ("accuracy", "eval", "held-out accuracy"),
    )
    for metric, kind, name in told[:3] if is_online(rows) else told:
        values = [value for _, value in numeric(rows, metric, kind) if value is not None]
        if len(values) > 1:
            said.append(f"{name} {words.number(values[0])} → {words.number(values[-1])}")
    went = f" First and last measurement: {', '.join(said)}." if said else ""
    return f"A {manifest.method} run that {ends.get(manifest.status, manifest.status)}.{went}"


def _change(run_dir: Path) -> str:
    """What a run in rounds did to the held-out score, from its `change.json`; nothing for other runs."""
    file = run_dir / CHANGE_FILE
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    ends = f"{found['low']:+.3f} to {found['high']:+.3f}"
    return f"Change of the held-out score: {found['change']:+.3f} (95% interval {ends}, {found['prompts']} prompts, each beside itself)."


def link(root: Path, source: str) -> str | None:
    """The href of a `file#place` beside the report, or None unless it is a file inside `root`: never a scheme, never a way out."""
    name, _, place = source.partition("#")
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or not (root / path).is_file():
        return None
    return f"./{quote(name)}" + (f"#{quote(place, safe='/~')}" if place else "")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("preftune.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": words.number, "duration": words.duration, "size": words.size, "quantity": words.quantity, "fixed": words.fixed,
        "between": _between, "breakable": _breakable,
        "svg": Markup,  # for the strings of charts.py alone: they escape their text
    }  # fmt: skip
    environment.globals |= {"link": link}
    return environment


def _saved(folder: Path, page: str) -> Path:
    path = folder / REPORT_FILE
    with explained("writing the report", path):
        replace_file(path, page.encode("utf-8", "replace"))
    return path


def _rows(run_dir: Path) -> list[Row]:
    return [*read_metrics(run_dir / METRICS_FILE)] if (run_dir / METRICS_FILE).exists() else []


def _present(root: Path, files: list[str]) -> list[str]:
    return [name for name in dict.fromkeys(files) if link(root, name)]


def _stage_figures(root: Path, stage: Stage) -> list[Figure]:
    return figures(_rows(root / stage.run), stage.name) if stage.run else []


def _has_interval(metric: Metric) -> bool:
    return metric.low is not None and metric.high is not None and math.isfinite(metric.low) and math.isfinite(metric.high)


def _mid_sentence(name: str) -> str:
    return name[:1].lower() + name[1:] if name[1:2].islower() else name


def _listed(parts: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _breakable(place: str) -> Markup:
    """A path that may break after its slashes and hashes, not inside a word."""
    return Markup("<wbr>").join(re.findall(r"[^/#]*[/#]+|[^/#]+", place))


def _between(metric: Metric) -> str:
    if not _has_interval(metric):
        return words.DASH
    scaled = metric.unit in words.SCALED  # these need their unit at both ends
    return " to ".join(words.quantity(end, metric.unit if scaled else "") for end in (metric.low, metric.high))


def _accuracy_chart(title: str, metrics: tuple[Metric, ...]) -> str | None:
    rows = [Interval(one.name, one.value, one.low, one.high) for one in metrics if one.unit == "accuracy" and one.value is not None]
    return interval_chart(rows, title=title, chance=0.5) if rows else None


def _score_changes(results: Quickstart) -> dict[str, Any] | None:
    pairs = [(g.scores.before, g.scores.after) for g in results.generations if g.scores]
    changes = [after - before for before, after in pairs if before is not None and after is not None]
    if not changes:
        return None
    chart = histogram(changes, title="Change of score", x_label="score after minus score before", y_label="prompts")
    better = sum(change > 0 for change in changes)
    return {"better": better, "of": len(changes), "chart": chart if len(changes) >= ENOUGH_FOR_HISTOGRAM else None}


def _details(manifest: RunManifest) -> dict[str, dict[str, str]]:
    """Everything in the manifest that a reader may want to look up, as tables of key and value."""
    last = manifest.sessions[-1] if manifest.sessions else None
    tables: dict[str, Mapping[str, Any]] = {
        "Configuration": _flat(manifest.config),
        "Data (SHA-256)": manifest.data,
        "Versions": last.versions if last else {},
        "Sessions": {one.started: f"{one.status}, {one.threads} threads" for one in manifest.sessions},
    }
    return {name: {key: _shown(value) for key, value in table.items()} for name, table in tables.items() if table}


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) and inner else {f"{prefix}{key}": inner}
    return flat


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
