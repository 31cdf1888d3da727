"""Charts as inline SVG: plain lists in, one `<svg>` string out, drawn by matplotlib.

The strings are safe to put into a page as they are (every text is escaped) and need nothing from outside it. Colours are CSS variables
with a fallback, so one drawing serves light and dark pages; text stays text, in the page's font. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from preftune.report.words import number

Numbers = Sequence[float | None]
SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"

# matplotlib draws with these marks; the page paints them through CSS variables. One unit of the view box is one point.
SERIES = ("#0b6b61", "#c2570c", "#5b4bb2", "#8a6d00")
INK, MUTED, GRID = "#1c1e23", "#686d76", "#e3e2dd"
PAINT = {INK: "ink", MUTED: "muted", GRID: "grid", **{color: f"series-{i}" for i, color in enumerate(SERIES, 1)}}

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "preftune",
    "text.parse_math": False,  # a metric's name is text, whatever dollars it holds
    "font.size": 9.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.unicode_minus": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0,
    "path.simplify_threshold": 0.25,
    "legend.frameon": False,
}

MOST_POINTS = 300  # more than this are drawn as means of runs of steps, with the range of each run as a band
MARKED_POINTS = 30
LONGEST_LABEL = 40


@dataclass(frozen=True, slots=True)
class Series:
    """A line: x and y of equal length, with an optional band (its lower and upper edge). None, NaN and infinity are gaps."""

    name: str
    x: Sequence[float]
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True, slots=True)
class Interval:
    """A dot with whiskers; without finite ends it is a dot alone."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


def line_chart(series: Sequence[Series], *, title: str, x_label: str = "step", y_label: str = "", log_y: bool = False) -> str:
    """Lines over a common x. With `log_y`, values that are not positive are gaps."""

    def draw(axes: Axes) -> None:
        if not any(np.isfinite(_finite(line.y)).any() for line in series):
            return _nothing(axes)
        for color, line in zip(_colors(len(series)), series):
            _line(axes, _thinned(line), color, log_y)
        axes.grid(axis="y")
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))
        if log_y:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
        if len(series) > 1:
            _legend(axes, len(series))

    about = [_summary(line) for line in series]
    return _svg(draw, title, f"Line chart of {title} by {x_label}. " + " ".join(about), width=350, height=205)


def interval_chart(rows: Sequence[Interval], *, title: str, x_label: str = "", chance: float | None = None) -> str:
    """One row an estimate of a share in [0, 1]: its name, a dot, its interval, and a dashed line where guessing would land."""

    def draw(axes: Axes) -> None:
        left, right = _span(rows, chance)
        across = axes.get_yaxis_transform()
        for place, row in enumerate(rows):
            y = -place
            low, high = _whiskers(row)
            axes.plot([left, right], [y, y], color=GRID, linewidth=1)
            if chance is not None:
                axes.plot([chance, chance], [y - 0.2, y + 0.2], color=MUTED, linewidth=1.2)
            axes.plot([low, high], [y, y], color=SERIES[0], linewidth=6, alpha=0.32, solid_capstyle="round")
            axes.plot([row.value], [y], "o", color=SERIES[0], markersize=8)
            axes.text(0, y + 0.4, _plain(row.label), transform=across, color=INK, size=10.5, va="center")
            axes.text(1, y + 0.4, f"{row.value:.1%}", transform=across, color=INK, size=10.5, va="center", ha="right", weight="bold")
        axes.set_xlim(left, right)
        axes.set_ylim(-len(rows) + 0.6, 0.6)
        axes.set_yticks([])
        axes.spines["bottom"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: f"{x:.0%}" + (" (chance)" if chance is not None and math.isclose(x, chance) else ""))
        )
        axes.set_xlabel(_plain(x_label))

    about = [f"{row.label}: {row.value:.1%} (interval {low:.1%} to {high:.1%})" for row in rows for low, high in [_whiskers(row)]]
    guess = "" if chance is None else f" Chance is {chance:.0%}."
    return _svg(draw, title, f"Estimates with intervals. {'; '.join(about)}.{guess}", width=360, height=34 + 48 * len(rows))


def histogram(values: Numbers, *, title: str, x_label: str = "", y_label: str = "count", bins: int | str = "auto") -> str:
    """Bars of how many values fall where; a line marks the mean. Values that are not finite are left out."""
    finite = _finite(values)
    finite = finite[~np.isnan(finite)]

    def draw(axes: Axes) -> None:
        if not finite.size:
            return _nothing(axes)
        axes.hist(finite, bins=bins, color=SERIES[0], alpha=0.75, rwidth=0.92)
        axes.axvline(float(finite.mean()), color=INK, linewidth=1.2)
        axes.grid(axis="y")
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x)))

    about = "No values."
    if finite.size:
        about = f"{finite.size} values from {number(finite.min())} to {number(finite.max())}, mean {number(finite.mean())}."
    return _svg(draw, title, f"Histogram of {title}. {about}", width=350, height=190)


def _line(axes: Axes, line: Series, color: str, log_y: bool) -> None:
    x, y = np.asarray(line.x, dtype=float), _finite(line.y)
    if log_y:
        y = np.where(y > 0, y, np.nan)
    present = ~np.isnan(y)
    # A point between two gaps has no line to be seen by.
    alone = present & ~np.concatenate([[False], present[:-1]]) & ~np.concatenate([present[1:], [False]])
    few = present.sum() <= MARKED_POINTS
    marked = np.flatnonzero(present if few else alone).tolist()
    axes.plot(x, y, color=color, label=_plain(line.name), linewidth=1.8 if few else 1.2, marker="o", markersize=3.4, markevery=marked)
    if line.low is not None and line.high is not None:
        low, high = _finite(line.low), _finite(line.high)
        axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
        axes.vlines(x[alone], low[alone], high[alone], color=color, alpha=0.32, linewidth=5)  # a band has no width there


def _nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, color=MUTED, ha="center", va="center")


def _thinned(line: Series) -> Series:
    """At most MOST_POINTS points: means over runs of neighbours, and how far each run reaches as the band."""
    if len(line.x) <= MOST_POINTS or line.low is not None:
        return line
    runs = np.array_split(np.arange(len(line.x)), MOST_POINTS)
    x, y = np.asarray(line.x, dtype=float), _finite(line.y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a run of gaps is a gap
        mean, low, high = ([float(reduce(y[run])) for run in runs] for reduce in (np.nanmean, np.nanmin, np.nanmax))
    return Series(line.name, [float(x[run].mean()) for run in runs], mean, low, high)


def _summary(line: Series) -> str:
    y = _finite(line.y)
    y = y[~np.isnan(y)]
    if not y.size:
        return f"{line.name}: no finite values."
    return f"{line.name}: {y.size} points, first {number(y[0])}, last {number(y[-1])}, lowest {number(y.min())}, highest {number(y.max())}."


def _span(rows: Sequence[Interval], chance: float | None) -> tuple[float, float]:
    """The tenths of [0, 1] that hold every interval and chance, with some air."""
    ends = [end for row in rows for end in _whiskers(row)] + ([] if chance is None else [chance])
    return max(0.0, math.floor(10 * min(ends) - 0.3) / 10), min(1.0, math.ceil(10 * max(ends) + 0.3) / 10)


def _whiskers(row: Interval) -> tuple[float, float]:
    ends = (row.low, row.high)
    if any(end is None or not math.isfinite(end) for end in ends):
        return row.value, row.value
    return float(row.low or 0.0), float(row.high or 0.0)


def _finite(values: Numbers) -> np.ndarray:
    flat = np.array([math.nan if v is None else v for v in values], dtype=float)
    return np.where(np.isfinite(flat), flat, math.nan)


def _colors(count: int) -> list[str]:
    return [SERIES[i % len(SERIES)] for i in range(count)]


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.012, 0.99), ncols=min(entries, 3), handlelength=1.2, handletextpad=0.5, columnspacing=1.4,
        borderaxespad=0, labelcolor=MUTED,
    )  # fmt: skip


def _svg(draw: Callable[[Axes], None], title: str, about: str, *, width: float, height: float) -> str:
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has the glyph
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.subplots()
        axes.patch.set_visible(False)
        draw(axes)
        file = io.StringIO()
        none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=none)
    return _inlined(file.getvalue(), title, about)


def _inlined(svg: str, title: str, about: str) -> str:
    """matplotlib's file as part of a page: names of its own, no page-wide style, no metadata, colours and font from the page."""
    root = ElementTree.fromstring(svg)
    box = root.attrib["viewBox"]
    root.attrib.clear()
    name = "chart-" + hashlib.sha256(f"{title}\0{about}\0{svg}".encode()).hexdigest()[:10]
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style") or _local(child.tag) == "RDF":
                parent.remove(child)
    for element in root.iter():
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.attrib['id']}")
        if XLINK in element.attrib:
            element.set("href", "#" + name + "-" + element.attrib.pop(XLINK)[1:])
        for key in ("clip-path", "style"):
            if key in element.attrib:
                element.set(key, _restyled(element.attrib[key], name))
    heading, description = ElementTree.Element(f"{{{SVG}}}title"), ElementTree.Element(f"{{{SVG}}}desc")
    heading.text, description.text = title, about
    heading.set("id", f"{name}-t")
    description.set("id", f"{name}-d")
    root[:0] = [heading, description]
    for key, value in {
        "class": "chart", "viewBox": box, "role": "img", "aria-labelledby": f"{name}-t {name}-d",
        "font-family": "system-ui, sans-serif", "stroke-linejoin": "round",
    }.items():  # fmt: skip
        root.set(key, value)
    _drop_unused_ids(root)
    ElementTree.register_namespace("", SVG)
    return _compact(ElementTree.tostring(root, encoding="unicode"))


def _restyled(style: str, name: str) -> str:
    style = style.replace("url(#", f"url(#{name}-")
    style = re.sub(r" ?font-family: [^;]*;", "", style)
    return re.sub("|".join(PAINT), lambda mark: f"var(--{PAINT[mark[0]]}, {mark[0]})", style)


def _drop_unused_ids(root: ElementTree.Element) -> None:
    markup = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', markup)) | set(root.attrib["aria-labelledby"].split())
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _compact(svg: str) -> str:
    """Coordinates to a hundredth of a point, no blank between tags, no group without content: a third of the size, the same picture."""
    trim = lambda value: re.sub(r"\d+\.\d{3,}", lambda d: f"{float(d[0]):.2f}".rstrip("0").rstrip("."), value[0])
    svg = re.sub(r' (?:d|x|y|x1|x2|y1|y2|width|height|transform)="[^"]*"', trim, svg)
    svg = re.sub(r' transform="rotate\(-?0 [^"]*"', "", svg)
    svg = re.sub(r">\s+<", "><", svg)
    while svg != (svg := re.sub(r"<g ?/>|<g></g>", "", svg)):
        pass
    return svg


def _plain(text: str) -> str:
    """Text that fits, without the characters that XML cannot hold."""
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
