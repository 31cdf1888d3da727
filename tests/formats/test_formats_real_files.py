"""Every public file whose format we claim to read, against counts and texts taken from the raw files without our readers."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.formats import REASONS, read
from preftune.records import Message

# file: (format, rows as README.md of the data counts them, rows dropped by reason as counted with grep and by eye)
FILES = {
    "hh/harmless_base_train.jsonl.gz": ("hh", 1426, {"empty_response": 3}),
    "hh/harmless_base_test.jsonl.gz": ("hh", 300, {}),
    "hh/helpful_base_train.jsonl.gz": ("hh", 1419, {"empty_response": 3}),
    "hh/helpful_base_test.jsonl.gz": ("hh", 350, {}),
    "gsm8k/train.jsonl": ("question-answer", 7343, {}),
    "gsm8k/test.jsonl": ("question-answer", 1019, {}),
    "dsp/domain_specific.jsonl": ("dsp-domains", 469, {"empty_response": 1}),
    "webgpt/comparisons.jsonl": ("text-score", 686, {}),
    "zh/advertisegen_dev.jsonl": ("advertisegen", 793, {}),
    "zh/dpo_zh_500.jsonl": ("sharegpt-preference", 379, {}),
    "llamafactory/dpo_en_demo.json": ("sharegpt-preference", 300, {}),
    "llamafactory/dpo_zh_demo.json": ("sharegpt-preference", 300, {}),
    "llamafactory/kto_en_demo.json": ("messages", 300, {}),
    "llamafactory/alpaca_en_demo.json": ("alpaca", 999, {}),
    "llamafactory/alpaca_zh_demo.json": ("alpaca", 1000, {}),
    "formats/fastchat_dummy_conversation.json": ("sharegpt", 500, {}),
    "sample/hh_pairs.jsonl": ("hh", 200, {}),
    "sample/kwise.jsonl": ("kwise", 100, {}),
}


def raw_rows(path: Path) -> list[dict]:
    """The rows without our reader."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    return json.loads(text) if ".json" in path.suffixes else [json.loads(line) for line in text.split("\n") if line]


def lines_kept(dataset, rows: list[dict]) -> list[tuple]:
    """(example, its raw row) by the line number in `where`."""
    return [(example, rows[int(example.where.rpartition(":")[2]) - 1]) for example in dataset.examples]


@pytest.mark.parametrize("name", FILES)
def test_regression_26_rows_in_are_rows_kept_plus_rows_dropped_by_reason(shared_data: Path, name: str) -> None:
    form, rows, dropped = FILES[name]
    assert len(raw_rows(shared_data / name)) == rows
    found = read(shared_data / name, on_error="skip")
    assert (found.format, found.rows, found.dropped_by_reason()) == (form, rows, dropped)
    assert len(found.examples) + sum(dropped.values()) == rows
    assert set(found.dropped_by_reason()) <= set(REASONS)
    places = [one.where for one in found.examples] + [one.where for one in found.dropped]
    assert len(set(places)) == rows, "two rows claim the same place"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("hh/", "sample/hh"))])
def test_hh_prompt_and_responses_join_to_the_very_transcripts_of_the_file(shared_data: Path, name: str) -> None:
    roles = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    path = shared_data / name
    for example, row in lines_kept(read(path, on_error="skip"), raw_rows(path)):
        shared = "".join(roles[turn.role] + turn.content for turn in example.prompt) + roles["assistant"]
        assert [shared + response.text for response in example.responses] == [row["chosen"], row["rejected"]]
        assert [response.rank for response in example.responses] == [1, 2]
        assert example.prompt[-1].role == "user"


def test_hh_rows_whose_response_holds_a_role_marker_keep_it_in_the_response(shared_data: Path) -> None:
    """README of the data, quirk 3: 6 + 2 train rows; one more is in the harmless test file."""
    count = 0
    for name in ("helpful_base_train", "harmless_base_train", "harmless_base_test"):
        examples = read(shared_data / f"hh/{name}.jsonl.gz", on_error="skip").examples
        count += sum("\n\nAssistant:" in response.text for example in examples for response in example.responses)
        assert not any("\n\nHuman:" in response.text for example in examples for response in example.responses)
    assert count == 6 + 2 + 1


def test_gsm8k_row_with_line_separators_is_one_row(shared_data: Path) -> None:
    examples = read(shared_data / "gsm8k/train.jsonl").examples
    assert sum("\u2028" in example.prompt[0].content for example in examples) == 1
    numbers = [example.reference_answer for example in examples]
    assert sum("," in number for number in numbers) == 75
    assert all(re.fullmatch(r"-?[\d,]+", number) for number in numbers)


def test_webgpt_scores_and_ties(shared_data: Path) -> None:
    examples = read(shared_data / "webgpt/comparisons.jsonl").examples
    assert all(sum(response.score for response in example.responses) == 2 for example in examples)
    assert sum(example.responses[0].score == example.responses[1].score for example in examples) == 186
    for example, row in lines_kept(read(shared_data / "webgpt/comparisons.jsonl"), raw_rows(shared_data / "webgpt/comparisons.jsonl")):
        (question,) = example.prompt
        rebuilt = [f"## Human:\n{question.content}\n\n## Assistant:\n{response.text}" for response in example.responses]
        assert rebuilt == row["text"]


def test_sharegpt_pairs_take_the_better_first_and_map_roles(shared_data: Path) -> None:
    for name in ("llamafactory/dpo_en_demo.json", "zh/dpo_zh_500.jsonl"):
        rows = raw_rows(shared_data / name)
        for example, row in zip(read(shared_data / name).examples, rows, strict=True):
            texts = [side if isinstance(side, str) else side["value"] for side in (row["chosen"], row["rejected"])]
            assert [response.text for response in example.responses] == texts
            roles = {"human": "user", "gpt": "assistant", "system": "system"}
            assert example.prompt == tuple(Message(roles[turn["from"]], turn["value"]) for turn in row["conversations"])


def test_kto_labels_and_last_turn(shared_data: Path) -> None:
    path = shared_data / "llamafactory/kto_en_demo.json"
    for example, row in zip(read(path).examples, raw_rows(path), strict=True):
        (response,) = example.responses
        assert response.text == row["messages"][-1]["content"] and response.label is row["label"]
        assert [turn.content for turn in example.prompt] == [turn["content"] for turn in row["messages"][:-1]]


def test_alpaca_joins_instruction_and_input(shared_data: Path) -> None:
    path = shared_data / "llamafactory/alpaca_en_demo.json"
    users = Counter()
    for example, row in zip(read(path).examples, raw_rows(path), strict=True):
        (user,) = example.prompt
        users[bool(row["input"])] += 1
        assert user.content == (row["instruction"] + "\n" + row["input"] if row["input"] else row["instruction"])
        assert example.responses[0].text == row["output"]
    assert users == {True: 412, False: 587}


def test_kwise_sample_keeps_order_scores_and_source(shared_data: Path) -> None:
    path = shared_data / "sample/kwise.jsonl"
    for example, row in zip(read(path).examples, raw_rows(path), strict=True):
        assert [(response.text, response.score) for response in example.responses] == list(zip(row["responses"], row["scores"]))
        assert example.source == row["source"] and not example.meta
        spoken = "".join(("\n\nHuman: " if turn.role == "user" else "\n\nAssistant: ") + turn.content for turn in example.prompt)
        assert spoken + "\n\nAssistant:" == row["query"]


def test_dsp_domains_are_named(shared_data: Path) -> None:
    path = shared_data / "dsp/domain_specific.jsonl"
    for example, row in lines_kept(read(path, on_error="skip"), raw_rows(path)):
        assert {response.meta["domain"]: response.text for response in example.responses} == row["responses"]
        assert all(response.score is None and response.rank is None for response in example.responses)


def test_files_of_other_kinds_are_refused_with_their_fields_and_never_guessed(shared_data: Path) -> None:
    paths = [path for path in sorted(shared_data.rglob("*.json*")) if path.relative_to(shared_data).as_posix() not in FILES]
    assert len(paths) > 20
    for path in paths:
        with pytest.raises(UserError) as error:
            read(path, on_error="skip", limit=50)
        first = next(iter(raw_rows(path)[0]))
        assert "unknown format with fields" in str(error.value) and first in str(error.value) and "Nearest formats" in str(error.value)


def test_the_bundled_samples_are_the_published_ones(shared_data: Path) -> None:
    for name in ("hh_pairs", "kwise"):
        assert read(f"sample:{name}").sha256 == read(shared_data / f"sample/{name}.jsonl").sha256
