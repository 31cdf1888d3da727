"""Files: endings, encodings, damage, places; and the totals that a Dataset promises."""

from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from preftune.errors import UserError
from preftune.formats import Dataset, read
from preftune.formats.files import sources

ROWS = [{"prompt": f"p{i}\u2028\u0085end", "chosen": "好" * (i + 1), "rejected": 'say "no",\nthen stop'} for i in range(3)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def stops(path, **options) -> str:
    with pytest.raises(UserError) as error:
        read(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_ending_gives_the_same_records(tmp_path: Path) -> None:
    import csv

    text = "\n".join(LINES) + "\n"
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "bom.jsonl").write_text("\ufeff" + text.replace("\n", "\r\n\r\n"), encoding="utf-8", newline="")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": ROWS}, indent=1), encoding="utf-8")
    (tmp_path / "d1.json").write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    (tmp_path / "e.json").write_text(text, encoding="utf-8")  # JSON lines under another name
    (tmp_path / "f.jsonl").write_text(json.dumps(ROWS), encoding="utf-8")  # an array under another name
    (tmp_path / "g.json.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "h.parquet")
    for name, delimiter in (("i.csv", ","), ("j.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    expected = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]
    paths = sorted(path for path in tmp_path.iterdir())
    assert len(paths) == 12
    for path in paths:
        found = read(path)
        assert found.format == "trl-preference"
        assert [(one.prompt, *(r.text for r in one.responses)) for one in found.examples] == expected, path.name
    assert read(tmp_path).rows == 3 * len(paths)  # the directory
    assert [one.where for one in read(paths[:1] * 2).examples] == [f"{paths[0]}:{n}" for n in (1, 2, 3)] * 2


def test_places_are_the_lines_an_editor_shows(tmp_path: Path) -> None:
    pretty = tmp_path / "a.json"
    pretty.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8")
    lines = pretty.read_text(encoding="utf-8").split("\n")
    for example in read(pretty).examples:
        assert lines[int(example.where.rpartition(":")[2]) - 1].strip() == "{"
    table = tmp_path / "b.csv"
    table.write_text('prompt,completion\np1,"two\nlines"\n\np2,c\np3,"a\n\nb"\np4\np5,c\n', encoding="utf-8")
    found = read(table, on_error="skip")
    assert [(one.prompt, one.where[-2:]) for one in found.examples] == [("p1", ":2"), ("p2", ":5"), ("p3", ":6"), ("p5", "10")]
    assert [(one.reason, one.where[-2:]) for one in found.dropped] == [("broken_csv", ":9")]


def test_csv_cells_of_json_and_long_cells(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    turns = json.dumps([{"role": "user", "content": "q"}]).replace('"', '""')
    path.write_text(f'prompt,completion,label\n"{turns}","{"x" * 200_000}",true\n[1] is a list,c,0\n', encoding="utf-8")
    first, second = read(path).examples
    assert first.prompt[0].content == "q" and len(first.responses[0].text) == 200_000 and first.responses[0].label is True
    assert second.prompt == "[1] is a list" and second.responses[0].label is False


def test_bad_lines_are_named_by_line_and_the_rest_is_kept_when_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [
        b'{"prompt": "cut',
        b"[1, 2]",
        b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}',
        b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
    ]
    path.write_bytes(b"\n".join([LINES[0].encode(), *bad, b"", b"   ", LINES[1].encode(), b"[" * 100_000]))
    found = read(path, on_error="skip")
    reasons = {int(one.where.rpartition(":")[2]): one.reason for one in found.dropped}
    assert reasons == {2: "broken_json", 3: "not_an_object", 4: "bad_utf8", 5: "bad_unicode", 9: "broken_json"}
    assert found.rows == 7 and [one.where.rpartition(":")[2] for one in found.examples] == ["1", "8"]
    message = stops(path)
    assert "5 of 7 rows" in message and "2 broken_json" in message and f"{path}:2 broken_json" in message
    assert "data.on_error=skip" in message


def test_stop_names_the_first_five_and_the_total(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "chosen": "x", "rejected": "" if n % 2 else "y"} for n in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    message = stops(path)
    assert "20 of 40 rows" in message and "20 empty_response" in message and "and 15 more" in message
    assert [f"{path}:{line} " in message for line in (2, 10, 12)] == [True, True, False]


def test_when_no_row_is_left_skipping_is_an_error_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": ""}\n', encoding="utf-8")
    assert "1 of 1 rows" in stops(path, on_error="skip")
    assert "data.on_error" not in stops(path, on_error="skip")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", json.dumps(ROWS, indent=2)[:-40].encode(), "a.json:15: the JSON is cut off"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "a.json:1: broken JSON: Expecting ',' or ']'"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', "a.json:2: the JSON is cut off"),
        ("a.json", b'[{"a": 1}] x', "broken JSON: Extra data"),
        ("a.json", b'{\n"a": ', "a.json:2: the JSON is cut off"),
        ("a.json", b'[\n"\xff"]', "a.json:2: not UTF-8"),
        ("a.jsonl", '{"prompt": "p"}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl.gz", gzip.compress(LINES[0].encode() * 99)[:-20], "cut off or damaged"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("a.csv", b"a,b\n\xff,1\n", "a.csv:2: not UTF-8"),
        ("a.jsonl", b"", "there are no rows"),
        ("a.jsonl", b"\n \n", "there are no rows"),
        ("a.json", b"[]", "there are no rows"),
        ("a.jsonl", b"{cut\n{cut", "none of the first rows can be read: broken_json"),
        ("a.jsonl", b"{}\n", "no row is a JSON object with fields"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: none of the first rows can be read: not_an_object"),
        ("a.txt", b"hello", "unknown kind of file"),
    ],
)
def test_damaged_files_are_one_line(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    message = stops(path)
    assert said in message and str(path) in message


def test_missing_files_and_unknown_names(tmp_path: Path) -> None:
    assert "no such file" in stops(tmp_path / "no.jsonl")
    assert "no such file" in stops("data/train.jsonl")  # looks like owner/name, but ends like a file
    assert "no data file" in stops(tmp_path)
    assert "sample:hh_pairs" in stops("sample:hh_pair")
    (tmp_path / "a.jsonl").write_text(LINES[0], encoding="utf-8")
    assert "Did you mean trl-preference" in stops(tmp_path / "a.jsonl", format="trl-preferences")
    assert "Use stop or skip" in stops(tmp_path / "a.jsonl", on_error="ignore")


def test_directories_are_read_in_the_order_of_names_and_skip_what_is_no_data(tmp_path: Path) -> None:
    for name, line in (
        ("b/1.jsonl", LINES[0]),
        ("a.jsonl", LINES[1]),
        (".cache/x.jsonl", "{"),
        ("dataset_info.json", "{}"),
        ("README.md", "x"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line, encoding="utf-8")
    assert [one.prompt[:2] for one in read(tmp_path).examples] == ["p1", "p0"]


def test_each_file_has_its_own_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES[0], encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"prompt": "p", "completion": "c"}', encoding="utf-8")
    assert read(tmp_path).format == "trl-preference, trl-completion"


def test_a_file_of_two_formats_is_refused_when_neither_leads(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    other = '{"prompt": "p", "completion": "c"}'
    path.write_text("\n".join([LINES[0], other]), encoding="utf-8")
    assert "no common format: trl-preference (1), trl-completion (1)" in stops(path)
    path.write_text("\n".join([LINES[0], LINES[1], other]), encoding="utf-8")
    assert "1 missing_field" in stops(path)


def test_limit_counts_rows_over_all_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n".join([LINES[0], "{broken", LINES[1]]), encoding="utf-8")
    found = read(tmp_path, on_error="skip", limit=4)
    assert (found.rows, len(found.examples)) == (4, 3)
    assert found.sha256 == read(tmp_path, on_error="skip").sha256


def test_sha256_is_of_the_raw_bytes_in_order(tmp_path: Path) -> None:
    data = [line.encode() for line in LINES]
    paths = [tmp_path / f"{n}.jsonl" for n in range(3)]
    for path, one in zip(paths, data):
        path.write_bytes(one)
    expected = hashlib.sha256(b"".join(one + f"|{len(one)}|".encode() for one in data)).hexdigest()
    assert read(tmp_path).sha256 == read(paths).sha256 == expected
    assert read(paths[::-1]).sha256 != expected
    paths[0].write_bytes(data[0] + b"\n")  # the same records, other bytes
    assert read(paths).sha256 != expected


def test_a_dataset_whose_numbers_do_not_add_up_cannot_exist() -> None:
    with pytest.raises(ValueError, match="2 rows in, but 0 kept and 0 dropped"):
        Dataset((), "hh", 2, (), "")


def test_ids_depend_on_prompt_and_responses_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "b", "rejected": "a"}]
    rows.append(rows[0] | {"source": "elsewhere"})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, turned, again = read(tmp_path / "a.jsonl").examples
    assert first.id == again.id != turned.id and again.source == "elsewhere"
    assert first.id == hashlib.sha256(b'["p",["a","b"]]').hexdigest()[:16]


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    asked = []

    def load(name: str, split: str):
        asked.append((name, split))
        if name == "someone/nothing":
            raise ConnectionError("Couldn't reach\nthe Hub")
        return [dict(row, when=__import__("datetime").date(2026, 1, 2)) for row in ROWS]

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read("someone/pairs:test[:3]")
    assert asked == [("someone/pairs", "test[:3]")] and found.rows == 3
    assert found.examples[2].where == "someone/pairs:test[:3]:row 3" and found.examples[0].meta == {"when": "2026-01-02"}
    assert len(found.sha256) == 64 and found.sha256 == read("someone/pairs:test[:3]").sha256
    assert "someone/nothing: no such file, and no data set" in stops("someone/nothing")
    Path("someone").mkdir()
    assert "no such file or directory" in stops("someone/pears")  # a slip in a path here, not a question to the Hub
    Path("someone/pairs").mkdir()  # a path that exists is never looked for on the Hub
    assert "no data file" in stops("someone/pairs") and len(asked) == 3


def test_lines_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"prompt": "p" * 8000, "completion": "c"}) + "\n") * 1000, encoding="utf-8")
    tracemalloc.start()
    try:
        count = sum(1 for _ in sources(path)[0].rows())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 1000 and peak < path.stat().st_size / 10
