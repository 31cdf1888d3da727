"""Samples on disk: none lost, none doubled, whatever moment the writer died at."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftune.errors import UserError
from preftune.rollout.journal import Journal

HEADER = {"model": "m", "seed": 0}


def write(path: Path, count: int) -> None:
    with Journal(path, HEADER) as journal:
        for number in range(count):
            if number not in journal.done.get("p", set()):
                journal.add({"prompt": "p", "number": number, "text": f"é\u2028{number}"})


def test_any_torn_end_costs_at_most_the_line_that_was_torn(tmp_path: Path) -> None:
    write(tmp_path / "whole", 4)
    whole = (tmp_path / "whole").read_bytes()
    for cut in range(len(whole) + 1):
        path = tmp_path / "torn"
        path.write_bytes(whole[:cut])
        write(path, 4)
        assert path.read_bytes() == whole


def test_what_is_there_is_read_back_in_order(tmp_path: Path) -> None:
    write(tmp_path / "j", 3)
    with Journal(tmp_path / "j", HEADER) as journal:
        assert journal.done == {"p": {0, 1, 2}}
        assert [one["number"] for one in journal.samples()] == [0, 1, 2]


def test_samples_of_another_setting_are_refused_and_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "j", 3)
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(UserError, match="seed was 0 and is now 1"), Journal(tmp_path / "j", HEADER | {"seed": 1}):
        pass
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(UserError, match="no file of work under way"), Journal(tmp_path / "other", HEADER):
        pass
    assert (tmp_path / "j").read_bytes() == before and (tmp_path / "other").read_text() == "hello\n"
