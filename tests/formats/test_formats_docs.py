"""docs/data-formats.md and the code say the same: every format by its example row, every reason by its meaning."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from preftune.formats import FORMATS, REASONS, TARGETS
from preftune.formats.dataset import parse
from preftune.formats.table import recognise
from preftune.records import Example

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^\| `([\w-]+)` \|[^|]*\| `(\{.*\})` \|$", PAGE, flags=re.MULTILINE))


def test_every_format_is_in_the_table_in_its_order() -> None:
    assert list(EXAMPLES) == list(FORMATS)
    for name, one in FORMATS.items():
        assert f"| `{name}` | {one.about} |" in PAGE


@pytest.mark.parametrize("name", FORMATS)
def test_the_example_of_each_format_is_recognised_and_read(name: str) -> None:
    row = json.loads(EXAMPLES[name])
    assert recognise([row], "docs").name == name
    found = parse(row, FORMATS[name], "docs:1")
    assert isinstance(found, Example), found


def test_every_reason_is_explained() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE, flags=re.MULTILINE)
    listed = {name: (meaning, fix) for name, meaning, fix in rows if name in REASONS}
    assert listed == {name: tuple(reason) for name, reason in REASONS.items()}


def test_every_target_is_named() -> None:
    section = PAGE[PAGE.index("## Writing") :]
    assert all(f"`{name}`" in section for name in TARGETS)


def test_every_reason_is_used_somewhere() -> None:
    source = "".join(path.read_text() for path in Path(__file__).resolve().parents[2].joinpath("src/preftune/formats").glob("*.py"))
    assert [name for name in REASONS if source.count(f'"{name}"') < 2] == []
