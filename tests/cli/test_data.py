"""`preftune data show` and `preftune data convert` on real and on hostile files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from preftune.cli.data import app
from preftune.errors import UserError
from preftune.formats import read
from preftune.formats.summary import lengths, summarise

runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"})


def run(*words: str) -> str:
    result = runner.invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def fails(*words: str) -> str:
    result = runner.invoke(app, list(words))
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def test_show_tells_format_counts_drops_and_records(shared_data: Path) -> None:
    """The README of the data: 1,419 rows, 3 with an empty response, chosen longer in 59% of the rows."""
    said = run("show", str(shared_data / "hh/helpful_base_train.jsonl.gz"))
    assert "hh, Anthropic HH transcripts" in said
    assert "1,419 = 1,416 kept + 3 that cannot be used" in said
    assert "3 empty_response" in said and "helpful_base_train.jsonl.gz:79 empty_response" in said
    assert "longer in 59%" in said
    assert said.count("response 2 (rank 2)") == 3
    assert "What are some common species then?" in said  # the first record, in full


def test_show_tells_ties_scores_and_labels(shared_data: Path) -> None:
    said = run("show", str(shared_data / "webgpt/comparisons.jsonl"), "--records", "0")
    assert "500 with a better response" in said and "186 records with several responses and none better" in said
    assert "1,372 responses" in said and "response 1" not in said
    assert "150 true, 150 false" in run("show", str(shared_data / "llamafactory/kto_en_demo.json"), "--records", "0")


def test_summary_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "pp", "chosen": "long", "rejected": "s"},
        {"prompt": "pp", "chosen": "long", "rejected": "s"},
        {"prompt": " pp", "chosen": "a", "rejected": "b"},
        {"prompt": "pppp", "chosen": "a", "rejected": "bb"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = summarise(read(path))
    assert (found.examples, found.prompts, found.repeated_examples, found.plain_prompts) == (4, 2, 1, 4)
    assert (found.strict_pairs, found.tied, found.first_longer) == (4, 0, (1 + 1 + 0.5 + 0) / 4)
    assert found.responses_per_example == {2: 4} and found.turns_per_prompt == {}
    assert (found.response_lengths.least, found.response_lengths.most, found.response_lengths.mean) == (1, 4, 15 / 8)


def test_lengths_by_nearest_rank() -> None:
    found = lengths(range(100, 0, -1))
    assert (found.least, found.median, found.mean, found.p95, found.most) == (1, 51, 50.5, 96, 100)


def test_show_does_not_obey_the_data(tmp_path: Path) -> None:
    """Markup and terminal escapes in a record are shown, not executed."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "[red]p[/red] [/]", "completion": "\x1b[2Jgone\x07 \x9b31m"}))
    said = run("show", str(path))
    assert "[red]p[/red] [/]" in said and "gone" in said
    assert not set(said) & set("\x1b\x07\x9b")


@pytest.mark.parametrize("to", ["trl", "paddlenlp", "preftune"])
def test_convert_writes_what_reads_back(to: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    said = run("convert", "sample:hh_pairs", str(out), "--to", to)
    assert "200 rows from 200 records" in said and str(out) in said
    assert [one.responses for one in read(out).examples] == [one.responses for one in read("sample:hh_pairs").examples]


def test_convert_says_what_it_leaves_out_and_loses(shared_data: Path, tmp_path: Path) -> None:
    source, out = str(shared_data / "hh/helpful_base_train.jsonl.gz"), str(tmp_path / "out.jsonl")
    message = fails("convert", source, out, "--to", "paddlenlp")
    assert "3 of 1419 rows" in message and "add --on-error skip" in message and not Path(out).exists()
    said = run("convert", source, out, "--to", "paddlenlp", "--on-error", "skip")
    assert "1,409 rows from 1,409 records" in said
    assert "left out: 3 rows, empty_response" in said and "left out: 7 whose turns are not user, assistant" in said
    assert "not carried by trl: reference_answer (1,019 times)" in run(
        "convert", str(shared_data / "gsm8k/test.jsonl"), str(tmp_path / "b.jsonl"), "--to", "trl"
    )


def test_convert_keeps_a_file_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    assert "exists already" in fails("convert", "sample:hh_pairs", str(out), "--to", "trl") and out.read_text() == "mine"
    run("convert", "sample:hh_pairs", str(out), "--to", "trl", "--overwrite", "--limit", "5")
    assert read(out).rows == 5


def test_mistakes_are_user_errors(tmp_path: Path) -> None:
    assert "unknown format 'hhh'" in fails("show", "sample:hh_pairs", "--format", "hhh")
    assert "unknown target 'tlr'" in fails("convert", "sample:hh_pairs", str(tmp_path / "a.jsonl"), "--to", "tlr")
    assert "unknown kind of file" in fails("convert", "sample:hh_pairs", str(tmp_path / "a.xls"), "--to", "trl")
    assert "no such file" in fails("show", str(tmp_path / "none.jsonl"))


def test_looking_at_data_needs_no_torch() -> None:
    code = (
        "import sys; from preftune.cli.data import app; app(['show', 'sample:kwise'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "376 with a better response" in done.stdout
