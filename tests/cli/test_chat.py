"""`preftune chat` through a pipe."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from preftune.cli import chat
from preftune.models.policy import LanguageModel
from preftune.packing.chat import ChatTokenizer
from preftune.records import Message
from preftune.rollout.sampling import Sampling
from tests import tiny


def test_each_line_is_answered_and_an_empty_line_forgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def fake(model, tokenizer, turns, sampling, seed, write):
        seen.append([m.content for m in turns])
        write(f"reply {len(seen)}")
        return f"reply {len(seen)}"

    monkeypatch.setattr(chat, "answer", fake)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert chat.chat(str(tiny.save(tmp_path / "m")), Sampling()) == 0
    assert seen == [["one"], ["one", "reply 1", "two"], ["three"]]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("reply")] == ["reply 1", "reply 2", "reply 3"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_shown_piece_by_piece_is_the_answer(temperature: float) -> None:
    """Bytes of the tiny vocabulary make letters of several tokens now and then: half of one is never shown."""
    model, tokenizer = LanguageModel(tiny.model(scale=2.0)), ChatTokenizer(tiny.tokenizer())
    pieces: list[str] = []
    turns = (Message("user", "Say it."),)
    answers = [chat.answer(model, tokenizer, turns, Sampling(24, temperature), seed, pieces.append) for seed in range(5)]
    assert "".join(pieces) == "".join(answers) and len(pieces) > 20
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces[:-1]) or "\N{REPLACEMENT CHARACTER}" in "".join(answers)
