"""Charts: what was asked for is in the drawing, gaps are gaps, and nothing in a name can leave its text."""

import math
import re
from xml.etree import ElementTree

import pytest

from preftune.report.charts import MOST_POINTS, Interval, Series, histogram, interval_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"
EVIL = '</text></svg><script>alert(1)</script><img src="https://evil.example/x">$\\frac{\x00&amp;'


def lines(svg: str, series: int = 1) -> list[list[tuple[float, float]]]:
    """The strokes of a series as lists of points, in the drawing's own units."""
    strokes = []
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if f"stroke: var(--series-{series}," not in path.get("style", "") or not path.get("clip-path"):
            continue
        for stroke in path.attrib["d"].split("M")[1:]:
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", stroke)]
            strokes.append(list(zip(numbers[::2], numbers[1::2])))
    return strokes


def words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_a_line_keeps_its_proportions():
    [[a, b, c]] = lines(line_chart([Series("s", [0, 10, 30], [0.0, 1.0, 5.0])], title="t"))
    assert (c[0] - a[0]) / (b[0] - a[0]) == pytest.approx(3, abs=0.01)
    assert (c[1] - a[1]) / (b[1] - a[1]) == pytest.approx(5, abs=0.01)
    assert c[1] < a[1], "larger values stand higher, and y grows downwards in SVG"


def test_a_log_scale_makes_equal_ratios_equal_steps():
    [[a, b, c]] = lines(line_chart([Series("s", [0, 1, 2], [1.0, 10.0, 1000.0])], title="t", log_y=True))
    assert (c[1] - b[1]) / (b[1] - a[1]) == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("hole", [None, math.nan, math.inf])
def test_what_is_not_finite_is_a_gap(hole):
    strokes = lines(line_chart([Series("s", [0, 1, 2, 3, 4], [1.0, 2.0, hole, 2.0, 1.0])], title="t"))
    assert [len(stroke) for stroke in strokes] == [2, 2]


def test_zero_and_less_are_gaps_on_a_log_scale():
    strokes = lines(line_chart([Series("s", [0, 1, 2, 3, 4], [1.0, 2.0, 0.0, 2.0, 1.0])], title="t", log_y=True))
    assert [len(stroke) for stroke in strokes] == [2, 2]


def test_a_point_between_gaps_is_marked():
    y = [1.0] * 40
    without = line_chart([Series("s", range(40), y)], title="t")
    y[20] = y[22] = None
    assert "<use" not in without
    assert line_chart([Series("s", range(40), y)], title="t").count("<use") == 1


def test_long_series_are_means_of_runs_with_their_range():
    steps = 9000
    svg = line_chart([Series("s", range(steps), [float(i % 2) for i in range(steps)])], title="t")
    [stroke] = lines(svg)
    assert len(stroke) <= MOST_POINTS and len({y for _, y in stroke}) == 1, "every run of 30 steps has the mean one half"
    assert "fill: var(--series-1," in svg and len(svg) < 20_000


def test_several_series_have_a_legend_and_their_own_colours():
    svg = line_chart([Series("training", [0, 1], [1.0, 2.0]), Series("held out", [0, 1], [2.0, 1.0])], title="t")
    assert {"training", "held out"} <= set(words(svg))
    assert lines(svg, 1) and lines(svg, 2)


def test_intervals_are_where_their_numbers_are():
    svg = interval_chart([Interval("a", 0.6, 0.5, 0.7), Interval("b", 0.75), Interval("c", 0.55, math.nan, 0.9)], title="t", chance=0.5)
    whiskers = [stroke for stroke in lines(svg) if len(stroke) == 2]
    left, right = whiskers[0][0][0], whiskers[0][1][0]
    assert [stroke[1][0] - stroke[0][0] for stroke in whiskers[1:]] == [0, 0], "no interval, no length"
    assert (whiskers[1][0][0] - left) / (right - left) == pytest.approx((0.75 - 0.5) / 0.2, abs=0.01)
    assert {"a", "60.0%", "b", "75.0%", "50% (chance)"} <= set(words(svg))


def test_a_histogram_counts():
    svg = histogram([0.1, 0.2, 0.3, 0.9, None, math.nan], title="t", bins=2)
    bars = [re.findall(r"-?[\d.]+", path.attrib["d"]) for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
            if "fill: var(--series-1" in path.get("style", "")]  # fmt: skip
    heights = [max(map(float, bar[1::2])) - min(map(float, bar[1::2])) for bar in bars]
    assert heights[0] / heights[1] == pytest.approx(3, abs=0.02)
    assert "4 values" in svg


@pytest.mark.parametrize("draw", [lambda: line_chart([Series("s", [1], [None])], title="t"), lambda: histogram([], title="t")])
def test_nothing_to_draw_is_said(draw):
    assert "no finite values" in words(draw())


def test_the_drawing_is_described_for_those_who_do_not_see_it():
    root = ElementTree.fromstring(line_chart([Series("training", [1, 2], [0.7, 0.6])], title="Loss of dpo"))
    titles = {element.get("id"): element.text for element in root if element.tag in (f"{SVG}title", f"{SVG}desc")}
    assert root.get("role") == "img"
    assert [titles[key] for key in root.attrib["aria-labelledby"].split()] == [
        "Loss of dpo",
        "Line chart of Loss of dpo by step. training: 2 points, first 0.7, last 0.6, lowest 0.6, highest 0.7.",
    ]


DRAWINGS = {
    "line": lambda text: line_chart(
        [Series(text, [0, 1], [1.0, 2.0]), Series("b", [0, 1], [2.0, 1.0])], title=text, x_label=text, y_label=text
    ),
    "interval": lambda text: interval_chart([Interval(text, 0.6, 0.5, 0.7)], title=text, x_label=text),
    "histogram": lambda text: histogram([1.0, 2.0], title=text, x_label=text, y_label=text),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_text_stays_text(draw):
    elements = {element.tag.removeprefix(SVG) for element in ElementTree.fromstring(draw(EVIL).replace("\x00", "")).iter()}
    assert elements <= {"svg", "title", "desc", "defs", "g", "path", "text", "use", "clipPath", "rect"}
    assert any("<script>" in text for text in words(draw(EVIL).replace("\x00", "")))


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
@pytest.mark.parametrize("name", ["$\\frac{$", "$x_1$ in $"])
def test_dollars_are_dollars_and_not_mathematics(draw, name):
    assert name in words(draw(name))


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_the_same_input_gives_the_same_bytes_and_needs_nothing_else(draw):
    svg = draw("Loss")
    assert svg == draw("Loss")
    assert set(re.findall(r"https?://[^\"' )]*", svg)) <= {"http://www.w3.org/2000/svg"}
    ids, used = set(re.findall(r'\bid="([^"]+)"', svg)), re.findall(r'(?:url\(|href=")#([\w-]+)', svg)
    assert set(used) <= ids and all(name.startswith("chart-") for name in ids)
    assert "<style" not in svg and "<!DOCTYPE" not in svg and "<?xml" not in svg
    assert not ids & set(re.findall(r'\bid="([^"]+)"', draw("Accuracy"))), "two charts on a page share no names"


def test_colours_are_the_page_s():
    svg = line_chart([Series("s", [0, 1], [1.0, 2.0])], title="t")
    bare = re.sub(r"var\(--[\w-]+, #[0-9a-f]{6}\)", "", svg)
    assert "#" not in re.sub(r"#chart-[\w-]+", "", bare)


def test_the_band_of_a_single_point_is_seen():
    alone = line_chart([Series("held out", [3], [0.5], [0.2], [0.8])], title="t")
    assert "LineCollection" in alone or alone.count("<path") > line_chart([Series("held out", [3], [0.5])], title="t").count("<path")
