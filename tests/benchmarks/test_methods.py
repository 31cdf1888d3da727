"""The comparison of methods: what rows learn from, which files they leave, a page that says what the files say. No training here."""

from __future__ import annotations

import json
from argparse import Namespace
from xml.etree import ElementTree

import pytest

from benchmarks import methods, methods_page
from preftune import formats
from preftune.methods import METHODS


@pytest.fixture
def bench(tmp_path):
    """Some bundled pairs, and a folder."""
    settings = {"model": "m", "data": "sample:hh_pairs", "output": tmp_path / "out", "records": 20, "held_out": 10, "steps": 2}
    settings |= {"prompts_per_step": 8, "max_length": 512, "tokens_per_microbatch": 1024, "save_every": 1, "written": 4, "new_tokens": 8}
    return methods.Bench(Namespace(**settings, precision="auto", keep=False))


def test_no_prompt_is_on_both_sides(bench):
    assert 0 < len(bench.examples) <= 20 and len(bench.held) >= 10
    assert not {formats.prompt_key(e) for e in bench.examples} & {formats.prompt_key(e) for e in bench.held}


@pytest.mark.parametrize("name", METHODS)
def test_every_row_of_the_table_can_learn_from_pairs_or_is_said_not_to(bench, name):
    method = METHODS[name]
    variant = methods.variant_for(method, bench.examples)
    assert variant is None or variant in methods.VARIANTS
    assert methods.rate(method) > 0
    if "a score" not in method.needs and "label" not in method.needs:
        assert variant == "pairs"


def test_scores_and_labels_say_what_the_pair_said(bench):
    scored, labelled = (methods.varied(bench.examples, methods.VARIANTS[name]) for name in list(methods.VARIANTS)[1:])
    for pair, one, other in zip(bench.examples, scored, labelled):
        assert formats.strict_pairs(pair) == formats.strict_pairs(one) == formats.strict_pairs(other)
        assert {r.score for r in one.responses} == {0.0, 1.0} and {r.label for r in other.responses} == {True, False}
        assert all(r.rank is None for r in (*one.responses, *other.responses))


def test_results_of_other_settings_are_not_mixed_in(bench):
    bench.prepare()
    bench.prepare()
    bench.setup["steps"] = 3
    with pytest.raises(SystemExit, match="other settings"):
        bench.prepare()


def test_a_finished_row_is_not_trained_again_and_a_started_one_goes_on(bench, monkeypatch):
    bench.prepare()
    seen = []
    monkeypatch.setattr(methods.Bench, "train", lambda self, method, model, output, *rest: seen.append(f"start from {model}") or {})
    monkeypatch.setattr(methods.Bench, "row", lambda self, method, *rest: seen.append(method.name) or self.result(method.name).touch())
    meter = Namespace(at=lambda done, note: None)
    methods.measure(bench, ["sft", "dpo"], meter)
    methods.measure(bench, ["sft", "dpo", "reward"], meter)
    assert seen == ["start from m", "sft", "dpo", "start from m", "reward"]  # nothing made the start here, so it is asked for again


# --- the page -------------------------------------------------------------------------------------------------------------------


def estimate(value, reach=0.1):
    return {"value": value, "low": None if reach is None else value - reach, "high": None if reach is None else value + reach, "n": 100}


@pytest.fixture
def results(tmp_path):
    """Made-up results of four rows, and of one that could not be trained."""
    folder = tmp_path / "results"
    folder.mkdir()
    setup = {"model": "m", "data": "pairs.jsonl", "steps": 24, "prompts_per_step": 8, "records": 192, "max_length": 512}
    (tmp_path / "setup.json").write_text(json.dumps({**setup, "written": 16, "new_tokens": 48, "threads": 2}))
    shared = {"data": "pairs", "lr": 5e-6, "seconds": 83.0, "final_loss": 0.654321, "length_accuracy": estimate(0.512, 0.05)}
    policy = lambda kl: {"kl": estimate(kl, kl / 2), "kl_per_token": estimate(kl / 40), "length": estimate(41.0)}
    rows = {
        "sft": {**shared, **policy(0.5), "accuracy": estimate(0.52)},
        "dpo": {**shared, **policy(2.5), "accuracy": estimate(0.66)},
        "reward": {**shared, "accuracy": estimate(0.63)},
        "rrhf": {**shared, **policy(0.25), "accuracy": estimate(0.4)},
        "reward_pointwise": {"data": None},
    }
    for name, row in rows.items():
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "title": name, "model": "policy", **row}))
    return tmp_path


def test_the_page_says_what_the_files_say(results, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = methods_page.write(results, docs).read_text()
    lines = {line.split("|")[2].strip(): line for line in page.splitlines() if line.startswith("| ") and "`" in line}
    assert list(lines) == [f"`{name}`" for name in METHODS if name in ("sft", "dpo", "reward", "rrhf")]
    assert "66.0% (56.0% to 76.0%)" in lines["`dpo`"] and "2.5 (1.25 to 3.75)" in lines["`dpo`"] and "1 min 23 s" in lines["`dpo`"]
    assert lines["`reward`"].count("–") == 3  # no KL and no responses of its own
    assert "2 of 4 methods order held-out pairs better than a coin beyond their interval: `reward`, `dpo`." in page.replace(
        "`dpo`, `reward`", "`reward`, `dpo`"
    )
    assert "The highest accuracy is that of `dpo`, 66.0%; the intervals of 2 others reach" in page
    assert "Furthest from the start went `dpo` (2.5 nats a response), least far `rrhf` (0.25)" in page
    assert "`reward_pointwise` was not trained" in page and "Not run yet: " in page and "51.2% (46.2% to 56.2%)" in page
    assert (docs / methods_page.CHART).is_file() and f"({methods_page.CHART})" in page


def test_the_chart_is_a_picture_of_its_own_with_every_row_s_number(results, tmp_path):
    rows = [json.loads((results / "results" / f"{name}.json").read_text()) for name in ("sft", "dpo", "reward", "rrhf")]
    rows[0]["accuracy"] = estimate(0.5, None)
    svg = methods_page.chart(rows)
    texts = ["".join(node.itertext()).strip() for node in ElementTree.fromstring(svg.encode()).iter() if node.tag.endswith("}text")]
    assert {"1", "2", "3", "4"} <= set(texts) and len(svg) < 200_000
    assert svg == methods_page.chart(rows)


def test_without_results_there_is_no_page(results, tmp_path):
    for file in (results / "results").iterdir():
        file.unlink()
    with pytest.raises(SystemExit, match="no result"):
        methods_page.write(results, tmp_path)
