"""`preftune chat` through a pipe."""

from __future__ import annotations

import io

from preftune.cli import chat
from tests import tiny


def test_each_line_is_answered_and_an_empty_line_forgets(tmp_path, monkeypatch, capsys):
    seen = []

    def fake(model, tokenizer, prompts, **options):
        seen.append([m.content for m in prompts[0]])
        return [type("G", (), {"text": f"reply {len(seen)}"})()]

    monkeypatch.setattr(chat, "generate", fake)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert chat.chat(str(tiny.save(tmp_path / "m"))) == 0
    assert seen == [["one"], ["one", "reply 1", "two"], ["three"]]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("reply")] == ["reply 1", "reply 2", "reply 3"]
