"""Read, write, read: nothing that a format can carry changes, and what it cannot carry is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preftune.errors import UserError
from preftune.formats import TARGETS, read, write
from preftune.records import Comparison, Example, Message, Response, SpanLabel, StepLabel

U = lambda text: Message("user", text)
A = lambda text: Message("assistant", text)
PAIR = (Response("x", rank=1), Response("y", rank=2))


def carried(example: Example) -> Example:
    """Without the place of one reading, and without an id that follows from the text."""
    return replace(example, where="", id="")


# ---------------------------------------------------------------- our own format: every field, any text

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
words = text.filter(str.strip)
number = st.floats(allow_nan=False, allow_infinity=False)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | number | text, lambda of: st.lists(of) | st.dictionaries(text, of), max_leaves=5
)
meta = st.dictionaries(text, json_value, max_size=3)
steps = st.lists(st.builds(StepLabel, text, st.none() | number), max_size=3).map(tuple)


@st.composite
def responses(draw) -> Response:
    body = draw(words)
    ends = st.lists(st.integers(0, len(body)), min_size=2, max_size=2).map(sorted)
    spans = draw(st.lists(st.builds(lambda at, name, value: SpanLabel(at[0], at[1], name, value), ends, text, number), max_size=2))
    return Response(
        body,
        score=draw(st.none() | number | st.dictionaries(text, number, max_size=3)),
        rank=draw(st.none() | st.integers(1, 9)),
        label=draw(st.none() | st.booleans()),
        steps=draw(steps),
        spans=tuple(spans),
        finished=draw(st.booleans()),
        meta=draw(meta),
    )


@st.composite
def examples(draw) -> Example:
    turns = st.lists(st.builds(Message, st.sampled_from(["system", "user", "assistant", "tool"]), words), min_size=1, max_size=4).map(tuple)
    plain = words.filter(lambda value: not value.startswith(("\n\nHuman:", "## Human:", "<|prompter|>")))
    found = draw(st.lists(responses(), min_size=1, max_size=4))
    several = len(found) > 1
    index = st.permutations(range(len(found))).map(lambda order: order[:2])
    judged = st.builds(
        lambda pair, outcome, strength, who: Comparison(pair[0], pair[1], outcome, strength, who),
        index,
        st.floats(0, 1),
        st.none() | number,
        st.none() | text,
    )
    return Example(
        prompt=draw(plain | turns),
        responses=tuple(found),
        id=draw(st.just("") | words),
        comparisons=tuple(draw(st.lists(judged, max_size=3))) if several else (),
        annotator=draw(st.none() | text),
        source=draw(st.none() | text),
        reference_answer=draw(st.none() | text),
        meta=draw(meta),
    )


@settings(max_examples=50, deadline=None)
@given(st.lists(examples(), min_size=1, max_size=3), st.sampled_from([".jsonl", ".json", ".jsonl.gz"]))
def test_own_format_carries_every_field(tmp_path_factory: pytest.TempPathFactory, records: list[Example], ending: str) -> None:
    path = tmp_path_factory.mktemp("own") / f"a{ending}"
    written = write(records, path)
    assert (written.rows, written.left_out, written.lost) == (len(records), {}, {})
    back = read(path).examples
    assert [replace(one, where="", id="") for one in back] == [replace(one, id="") for one in records]
    assert [one.id for one, wanted in zip(back, records) if wanted.id] == [one.id for one in records if one.id]


@pytest.mark.parametrize(
    "name", ["hh/helpful_base_train.jsonl.gz", "webgpt/comparisons.jsonl", "gsm8k/test.jsonl", "dsp/domain_specific.jsonl"]
)
def test_own_format_carries_real_files(shared_data: Path, tmp_path: Path, name: str) -> None:
    first = read(shared_data / name, on_error="skip").examples
    write(first, tmp_path / "a.jsonl")
    again = read(tmp_path / "a.jsonl").examples
    assert [replace(one, where="") for one in again] == [replace(one, where="") for one in first]


# ---------------------------------------------------------------- other tools' formats


@pytest.mark.parametrize("target", ["preftune", "trl", "trl-messages", "paddlenlp", "sharegpt", "alpaca", "hh"])
def test_pairs_come_back_as_they_were(target: str, tmp_path: Path) -> None:
    first = read("sample:hh_pairs").examples
    written = write(first, tmp_path / "a.jsonl", target)
    assert (written.rows, written.examples, written.left_out, written.lost) == (200, 200, {}, {})
    assert [replace(one, where="") for one in read(tmp_path / "a.jsonl").examples] == [replace(one, where="") for one in first]


def test_kwise_comes_back_as_it_was(tmp_path: Path) -> None:
    first = read("sample:kwise").examples
    write(first, tmp_path / "a.jsonl", "kwise")
    assert [replace(one, where="") for one in read(tmp_path / "a.jsonl").examples] == [replace(one, where="") for one in first]


@pytest.mark.parametrize("target", ["trl", "sharegpt", "alpaca"])
def test_labels_come_back(target: str, shared_data: Path, tmp_path: Path) -> None:
    first = read(shared_data / "llamafactory/kto_en_demo.json").examples
    assert write(first, tmp_path / "a.jsonl", target).lost == {}
    assert [carried(one) for one in read(tmp_path / "a.jsonl").examples] == [carried(one) for one in first]


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in ("kwise", "hh")])
def test_regression_26_every_turn_survives_every_target(target: str, tmp_path: Path) -> None:
    """Think blocks, blanks, line separators, braces and quotes in earlier turns are text like any other."""
    turns = (U(" a\n"), A("<think>\nso\n</think>\n\nb  "), U("c\u2028d {{ x }}"), A('"e"\r\n'), U("f <|im_end|>"))
    record = Example(turns, (Response("<think>g</think> h"),))
    written = write([record], tmp_path / "a.jsonl", target)
    assert (written.rows, written.left_out, written.lost) == (1, {}, {})
    assert carried(read(tmp_path / "a.jsonl").examples[0]) == record


def test_ranking_of_k_becomes_all_its_strict_pairs(tmp_path: Path) -> None:
    records = [Example((U("q"),), tuple(Response(f"r{score}", score=score) for score in (2.0, 9.0, 2.5, 2.5)))]
    written = write(records, tmp_path / "a.jsonl", "trl")
    assert (written.rows, written.lost) == (5, {"tied or unjudged pair": 1})
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    pairs = {(row["score_chosen"], row["score_rejected"]) for row in rows}
    assert pairs == {(9.0, 2.0), (2.5, 2.0), (9.0, 2.5)} and all(row["chosen"] != row["rejected"] for row in rows)


def test_what_a_target_cannot_carry_is_named(tmp_path: Path) -> None:
    rich = Example(
        (U("q"),),
        (Response("x", rank=1, steps=(StepLabel("x", 1),), meta={"model": "m"}), Response("y", rank=2, finished=False)),
        id="mine",
        reference_answer="7",
        comparisons=(Comparison(0, 1, strength=3.0, annotator="Ann"),),
        source="s",
    )
    written = write([rich], tmp_path / "a.jsonl", "paddlenlp")
    assert written.lost == {"steps": 1, "meta": 1, "finished": 1, "id": 1, "reference_answer": 1, "comparisons": 1}
    back = read(tmp_path / "a.jsonl").examples[0]
    assert back.comparisons == (Comparison(0, 1, strength=3.0),) and back.source == "s"


@pytest.mark.parametrize(
    ("target", "record", "why"),
    [
        ("paddlenlp", Example((Message("system", "s"), U("q")), PAIR), "with a system turn"),
        ("paddlenlp", Example((U("q"), U("r")), PAIR), "whose turns are not user, assistant"),
        ("alpaca", Example((U("q"), A("r")), PAIR), "whose turns are not user, assistant"),
        ("hh", Example((Message("system", "s"), U("q")), PAIR), "with a system or tool turn"),
        ("hh", Example((U("q\n\nAssistant: no"),), PAIR), "whose text would come back changed"),
        ("hh", Example((U("q"),), (Response("a\n\nHuman: b"), Response("c", score=1))), "without a strict pair"),
        ("hh", Example((U("q"),), (Response("a\n\nHuman: b", rank=1), Response("c", rank=2))), "(diverges_before_response)"),
        ("trl", Example((U("q"),), (Response("x", score=1), Response("y", score=1))), "without a strict pair"),
        ("trl", Example("plain", PAIR), "with a plain prompt among conversations"),
        ("kwise", Example((U("q"),), PAIR), "without one number as the score"),
    ],
)
def test_records_a_target_has_no_place_for_are_left_out_by_name(target: str, record: Example, why: str, tmp_path: Path) -> None:
    scored = (Response("x", score=1.0, rank=1), Response("y", score=0.0, rank=2))
    fine = Example((U("fine"),), scored)
    written = write([record, fine], tmp_path / "a.jsonl", target)
    assert written.examples == 1 and len(written.left_out) == 1 and why in next(iter(written.left_out))
    with pytest.raises(UserError, match="nothing can be written"):
        write([Example((U("q"), A("r")), (Response("x"), Response("y")))], tmp_path / "b.jsonl", "hh")
    assert not (tmp_path / "b.jsonl").exists()


def test_plain_prompts_stay_plain_in_trl_and_become_a_turn_elsewhere(tmp_path: Path) -> None:
    record = Example("Q:\nA:", (Response(" x", rank=1), Response(" y", rank=2)))
    assert write([record], tmp_path / "a.jsonl", "trl").lost == {}
    assert carried(read(tmp_path / "a.jsonl").examples[0]) == record
    assert write([record], tmp_path / "b.jsonl", "trl-messages").lost == {"plain prompt (now a user turn)": 1}
    assert read(tmp_path / "b.jsonl").examples[0].prompt == (U("Q:\nA:"),)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("old")
    with pytest.raises(UserError, match="what JSON cannot"):
        write([Example("p", (Response("x", meta={"bad": object()}),))], path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write([Example("p", (Response("x"),))], path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    for name, target, said in (("a.csv", "trl", "unknown kind of file"), ("a.jsonl", "tlr", "unknown target")):
        with pytest.raises(UserError, match=said):
            write([], tmp_path / name, target)


def test_gzip_bytes_do_not_depend_on_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Example("p", (Response("x"),))
    write([record], tmp_path / "a.jsonl.gz")
    monkeypatch.setattr("time.time", lambda: 1e9)
    write([record], tmp_path / "b.jsonl.gz")
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


# ---------------------------------------------------------------- TRL itself


def test_trl_takes_what_we_write_and_agrees_on_the_prompt(tmp_path: Path) -> None:
    """TRL loads the file, sees conversations, and its own prompt extraction on whole conversations finds our prompt."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.data_utils")
    records = read("sample:hh_pairs").examples
    write(records, tmp_path / "a.jsonl", "trl")
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 200 and set(loaded.column_names) == {"prompt", "chosen", "rejected", "source"}
    implicit = []
    for row, record in zip(loaded, records, strict=True):
        assert trl.is_conversational(row)
        whole = {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        found = trl.extract_prompt(whole)
        assert tuple(Message(**turn) for turn in found["prompt"]) == record.prompt
        assert (found["chosen"], found["rejected"]) == (row["chosen"], row["rejected"])
        implicit.append(whole)
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, implicit)), encoding="utf-8")
    ours = read(tmp_path / "b.jsonl")
    assert ours.format == "trl-preference-implicit"
    assert [(one.prompt, one.responses) for one in ours.examples] == [(one.prompt, one.responses) for one in records]


def test_trl_unpairs_our_pairs_into_our_labels(tmp_path: Path) -> None:
    """TRL's conversion of pairs to KTO data, read by us, has the chosen labelled true and the rejected false."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl.data_utils")
    records = read("sample:hh_pairs", limit=20).examples
    write(records, tmp_path / "a.jsonl", "trl")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n") if line]
    pairs = datasets.Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
    unpaired = list(trl.unpair_preference_dataset(pairs))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, unpaired)), encoding="utf-8")
    back = read(tmp_path / "b.jsonl")
    assert back.format == "trl-unpaired" and back.rows == 40
    expected = {(one.prompt, response.text, response.rank == 1) for one in records for response in one.responses}
    assert {(one.prompt, one.responses[0].text, one.responses[0].label) for one in back.examples} == expected
