"""Knobs that a method's loss never reads are refused, or are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from preftune import configfile
from preftune.errors import UserError
from preftune.online.methods import config_kind


@pytest.mark.parametrize(
    ("name", "knob", "value"),
    [("reinforce", "clip", 0.1), ("reinforce", "dual_clip", 3.0), ("remax", "clip", 0.1), ("cispo", "dual_clip", 3.0)],
)
def test_a_clip_that_no_loss_reads_is_refused(name: str, knob: str, value: float, tmp_path: Path) -> None:
    base = {"data": "prompts.jsonl", "output": str(tmp_path), "judge": "length", "method": {knob: value}}
    with pytest.raises(UserError, match=knob):
        configfile.load(config_kind(name), None, base=base)
