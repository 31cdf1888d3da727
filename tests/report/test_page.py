"""The page is parsed as a browser would: what it shows, that it loads nothing, and that text from models stays text."""

import json
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.report.contents import Quickstart
from preftune.report.page import link, quickstart_sentence, write, write_quickstart
from preftune.training.metrics import METRICS_FILE, MetricsLog, read_metrics
from tests.report import fake

VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}
LOADING = {"script", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "form", "input", "image", "foreignobject"}
PAYLOADS = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "'><svg onload=alert(1)>",
    "</td></table></details><iframe src=//evil.example>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% include 'x' %}",
    "</style><style>@import url(https://evil.example/x.css)</style>",
    "<!--", "]]>", "\u202e\u2028\x00&lt;b&gt;", "https://evil.example/x.png",
]  # fmt: skip


class Parsed(HTMLParser):
    """Every element with its attributes, the text of the page, and whether tags nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(path: Path) -> Parsed:
    return Parsed(path.read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return fake.quickstart(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture(scope="module")
def page(root) -> Parsed:
    return parsed(write_quickstart(root))


def assert_safe(page: Parsed) -> None:
    assert not page.wrong and not page.open, "tags nest"
    names = {name for name, _ in page.elements}
    assert not names & LOADING
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], "no handlers"
        for key in ("src", "srcset", "data", "action", "poster", "background", "xlink:href"):
            assert key not in attributes
        href = attributes.get("href", "#")
        assert href.startswith(("#", "./", "data:,")), f"{name} {href}"
        style = attributes.get("style", "").replace("url(#", "")
        assert "url(" not in style and "import" not in style
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing_and_runs_nothing(root, page):
    assert_safe(page)
    html = (root / "report.html").read_text()
    assert html.replace("http://www.w3.org/2000/svg", "").count("://") == 0
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    [policy] = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.split("; ")[:3] == ["default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"]
    assert "script-src" not in policy


def test_every_figure_is_shown_with_its_interval_and_its_source(root, page):
    for section in fake.evaluation()["sections"]:
        assert section["title"] in page.text
        for metric in section["metrics"]:
            assert metric["name"] in page.text and metric["source"] in page.text.replace("\u200b", "")
    for text in ("66.4%", "60.1% to 72.4%", "12.43", "1.83 nats", "1.41 to 2.3", "87.2 tokens", "214"):
        assert text in page.text
    hrefs = [attributes["href"] for attributes in page.all("a")]
    assert "./dpo/evaluation.json#/accuracy" in hrefs
    for href in hrefs:
        if href.startswith("./"):
            assert (root / href[2:].partition("#")[0]).is_file(), href


def test_the_result_is_said_in_one_sentence(page):
    assert (
        "On prompts kept out of training, reward-model accuracy is 66.4% (95% interval 60.1% to 72.4%) and implicit-reward accuracy is "
        "58.6% (95% interval 52.3% to 65.1%). Guessing would give 50%; the intervals lie wholly above that." in page.text
    )


@pytest.mark.parametrize(
    ("lows", "verdict"),
    [
        ([0.6, 0.52], "the intervals lie wholly above that"),
        ([0.6, 0.48], "1 of 2 intervals lie above that, the others are not yet distinguishable from it"),
        ([0.4, 0.5], "with this much data that is not yet distinguishable from it"),
        ([0.6], "the whole interval lies above that"),
        ([None], "with this much data that is not yet distinguishable from it"),
    ],
)
def test_the_sentence_claims_no_more_than_the_intervals(lows, verdict):
    metrics = [{"name": "Accuracy", "value": 0.65, "low": low, "high": 0.8, "unit": "accuracy"} for low in lows]
    results = Quickstart.model_validate({"sections": [{"title": "t", "metrics": metrics}], "meta": {"model": "m"}})
    assert quickstart_sentence(results).endswith(verdict + ".")


def test_headings_follow_each_other_in_the_asked_order(page):
    levels = [int(name[1]) for name, _ in page.elements if name in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))
    order = ["stages", "results", "curves", "responses", "sources", "next"]
    assert [attributes["id"] for attributes in page.all("h2")] == order
    assert [a["href"] for a in page.all("a") if a["href"] in {f"#{name}" for name in order}] == [f"#{name}" for name in order]


def test_tables_and_pictures_have_names(page):
    assert all("scope" in attributes for attributes in page.all("th"))
    charts = [attributes for attributes in page.all("svg") if "aria-hidden" not in attributes]
    assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in charts)
    assert page.all("html") == [{"lang": "en"}]


def test_stages_tell_time_memory_and_what_was_left_out(page):
    for text in ("2 min 21 s, peak 3.3 GB", "412 records used, 3 left out", "3 × empty response", "12 left out", "380 records used"):
        assert text in page.text


def test_before_and_after_are_counted_from_the_scores(page):
    scores = [one["scores"] for one in fake.evaluation()["generations"]]
    better = sum(one["after"] > one["before"] for one in scores)
    assert f"{better} of {len(scores)}" in page.text
    assert page.text.count("Twenty minutes a day is plenty.") == len(scores)
    assert "10 more prompts" in page.text


def test_metrics_that_nobody_foresaw_are_charted_too(page):
    assert "Response length" in page.text and "response length" in page.text
    for curve in ("Loss of SFT", "Accuracy of Reward model", "KL to the reference of DPO", "Response length of DPO"):
        assert curve in page.text


def test_only_evaluation_and_no_runs_make_a_page_too(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps({"sections": [], "meta": {"model": "m"}}))
    page = parsed(write(tmp_path))
    assert_safe(page)
    assert "m was trained on human preferences" in page.text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_text_from_models_and_data_stays_text(tmp_path, payload):
    results = fake.evaluation()
    results["generations"] = [
        {"prompt": payload, "before": payload, "after": payload, "reference_answer": payload, "scores": {"before": 1, "after": None}},
        {"prompt": [{"role": payload, "content": payload}] * 2, "before": payload, "after": payload},
    ]
    results["sections"][0] |= {"title": payload, "text": payload}
    results["sections"][0]["metrics"][0] |= {"name": payload, "explain": payload, "source": payload, "unit": "accuracy"}
    results["sections"][0]["metrics"][1] |= {"unit": payload}
    results["stages"][0] |= {"name": payload, "what": payload, "why": payload, "records": {"kept": 1, "dropped": {payload: 1}}}
    results |= {"next": [payload], "headline": payload}
    results["meta"] |= {"model": payload, "data": payload, "versions": {payload: payload}, "note": payload}
    results["stages"] = results["stages"][:1]
    fake.run(tmp_path / "sft", "sft", steps=2)
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    log = MetricsLog(tmp_path / "sft" / METRICS_FILE)
    log.append(3, "train", {"loss": 1.0, payload: 1.0})
    log.close()
    page = parsed(write_quickstart(tmp_path))
    assert_safe(page)
    shown = payload.replace("\x00", "�")
    assert page.text.replace("\x00", "�").count(shown) > 15
    run = parsed(write(tmp_path / "sft"))
    assert_safe(run)


def test_a_run_page_tells_how_the_run_went(tmp_path):
    page = parsed(write(fake.run(tmp_path / "first", "dpo", status="interrupted")))
    assert_safe(page)
    losses = [row["loss"] for row in read_metrics(tmp_path / "first" / METRICS_FILE) if row["kind"] == "train"]
    assert "A dpo run that was interrupted. First and last measurement: " in page.text
    assert f"loss {losses[0]:.4g} → {losses[-1]:.4g}, held-out loss 0.6732 → 0.6531, held-out accuracy" in page.text
    for text in ("75", "3.7 GB", "method.beta", "prompts_per_step", "torch", "ab" * 32):
        assert text in page.text
    seconds = sum(row.get("seconds", 0) for row in read_metrics(tmp_path / "first" / METRICS_FILE))
    assert f"{int(seconds // 60)} min {round(seconds) % 60:02d} s" in page.text


def test_numbers_that_are_not_finite_are_gaps_and_said(tmp_path):
    log = MetricsLog(fake.run(tmp_path / "run", "sft") / METRICS_FILE)
    log.append(76, "train", {"loss": float("nan"), "lr": 1e-6, "never_finite": float("inf")})
    log.close()
    page = parsed(write(tmp_path / "run"))
    assert "1 row of the log held numbers that are not finite" in page.text
    assert "Never finite" not in page.text, "a metric without one finite value has no curve"
    assert "75 points" in page.text and "nan" not in page.text.lower().split()


def test_a_run_without_a_step_has_a_page(tmp_path):
    fake.run(tmp_path / "run", "sft", steps=0, status="failed")
    (tmp_path / "run" / METRICS_FILE).unlink(missing_ok=True)
    page = parsed(write(tmp_path / "run"))
    assert "No step was logged yet." in page.text and "A sft run that failed." in page.text


def test_the_same_run_gives_the_same_page(tmp_path):
    fake.run(tmp_path / "run", "sft")
    first = write(tmp_path / "run").read_bytes()
    assert write(tmp_path / "run").read_bytes() == first


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        write(tmp_path)


@pytest.mark.parametrize(
    ("content", "named"),
    [("{", "JSON"), ('{"sections": [], "meta": {"model": "m"}, "sectoins": []}', "sectoins"), ('{"sections": []}', "meta")],
)
def test_a_malformed_evaluation_is_named(tmp_path, content, named):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(UserError, match=named) as error:
        write_quickstart(tmp_path)
    assert str(tmp_path / "evaluation.json") in str(error.value)


@pytest.mark.parametrize(
    ("source", "href"),
    [
        ("dpo/evaluation.json#/accuracy", "./dpo/evaluation.json#/accuracy"),
        ("a b.json#/x y", "./a%20b.json#/x%20y"),
        ("missing.json#/x", None), ("javascript:alert(1)", None), ("https://evil.example/dpo/evaluation.json", None), ("/etc/passwd", None),
        ("../outside.json", None), ("dpo/../../outside.json", None), ("#/x", None), ("", None), ("dpo", None),
    ],
)  # fmt: skip
def test_links_lead_only_to_files_beside_the_report(tmp_path, source, href):
    root = tmp_path / "root"
    (root / "dpo").mkdir(parents=True)
    for file in (root / "dpo" / "evaluation.json", root / "a b.json", tmp_path / "outside.json"):
        file.write_text("{}")
    assert link(root, source) == href


def test_a_scheme_is_no_link_even_where_a_file_has_its_name(tmp_path):
    (tmp_path / "javascript:alert(1)").write_text("")
    assert link(tmp_path, "javascript:alert(1)") == "./javascript%3Aalert%281%29"


def test_the_report_needs_neither_torch_nor_transformers():
    code = "import sys, preftune.report.page, preftune.evaluation.statistics; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- online reinforcement learning ------------------------------------------------------------------------------------------------

ONLINE_ORDER = [
    "Score", "Gold score", "KL to the reference of a response", "Perplexity under the reference", "Response length", "Entropy of a token",
    "Clip fraction", "Explained variance", "Share finished", "Repetition",
]  # fmt: skip


def test_an_online_run_shows_first_what_tells_how_it_goes(tmp_path):
    page = parsed(write(fake.online(tmp_path / "run")))
    assert_safe(page)
    titles = [page.text.index(f"{title} of run") for title in ONLINE_ORDER]
    assert titles == sorted(titles) and max(titles) < page.text.index("Loss of run")
    main = page.text[: page.text.index("more curve")]
    assert "Loss of run" not in main and "Repetition of run" in main
    assert "Alarm" not in page.text and "score of what was drawn" in page.text and ", loss" not in page.text
    rest = page.text[page.text.index("more curve") :]
    for name in ("Score std", "Step kl", "Sampler gap", "Prompts drawn", "Value loss", "Time of a rollout", "Least and greatest score"):
        assert name in rest
    for band in ("Score low", "Gold high", "Response tokens p10"):
        assert band not in page.text, "what a band shows has no chart of its own"


def test_without_a_second_judge_there_is_no_gold_chart(tmp_path):
    page = parsed(write(fake.online(tmp_path / "run", gold=False)))
    assert "Gold score of run" not in page.text and "Score of run" in page.text


def test_held_out_scores_and_lengths_have_their_bands(tmp_path):
    from preftune.report.curves import ONLINE, _series

    rows = read_metrics(fake.online(tmp_path / "run") / METRICS_FILE)
    lines = {curve.title: {line.name: line for line in _series(curve, rows)} for curve in ONLINE}
    held, drawn = lines["Score"]["held out"], lines["Score"]["drawn"]
    assert drawn.low is None and [high - low for high, low in zip(held.high, held.low)] == pytest.approx([0.6] * 4)
    assert lines["Gold score"]["held out"].high is not None
    assert set(lines["Response length"]["drawn"].low) == {20.0} and lines["Response length"]["held out"].low is None


def test_an_alarm_is_said_at_the_top_in_a_sentence(tmp_path):
    folder = fake.online(tmp_path / "run", alarm=True)
    page = parsed(write(folder))
    said = "Alarm after rollout 20 (step 40): the gold score fell from 0.7 to 0.1."
    assert said in page.text and page.text.index(said) < page.text.index("Curves")
    assert "./alarm.json" in [a["href"] for a in page.all("a")]
    kept = [line for line in (folder / METRICS_FILE).read_text().splitlines(keepends=True) if "alarm" not in line]
    (folder / METRICS_FILE).write_text("".join(kept))
    assert "Alarm" not in parsed(write(folder)).text, "a run that went back to before its alarm has none"


def test_responses_of_the_newest_and_the_first_rollout_are_shown(tmp_path):
    page = parsed(write(fake.online(tmp_path / "run")))
    assert page.text.index("Because 11.") < page.text.index("Because 1.")
    for text in ("best, score 2, 5 tokens", "worst, score −1, 5 tokens", "random, score –, 5 tokens", "Rollout 11"):
        assert text in page.text
    assert "./rollouts/11/shown.json" in [a["href"] for a in page.all("a")]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_responses_and_alarms_stay_text(tmp_path, payload):
    folder = fake.online(tmp_path / "run", rollouts=2, alarm=True)
    turns = [{"role": payload, "content": payload}] * 2
    one = {"which": payload, "prompt": payload, "response": payload, "score": 1.0, "tokens": 3, "finish": payload}
    (folder / "rollouts" / "1" / "shown.json").write_text(json.dumps([one, one | {"prompt": turns}]))
    (folder / "alarm.json").write_text(json.dumps({"rollout": payload, "step": payload, "said": payload}))
    page = parsed(write(folder))
    assert_safe(page)
    assert page.text.replace("\x00", "�").count(payload.replace("\x00", "�")) >= 11


@pytest.mark.parametrize("content", ["{", "{}", '[{"which": "best"}]'])
def test_a_malformed_file_of_responses_is_named(tmp_path, content):
    folder = fake.online(tmp_path / "run", rollouts=2)
    (folder / "rollouts" / "11" / "shown.json").write_text(content)
    with pytest.raises(UserError, match="not the responses of a rollout") as error:
        write(folder)
    assert "rollouts/11/shown.json" in str(error.value)
