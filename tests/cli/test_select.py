"""`preftune score` and `preftune select`, from samples to records that train."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from preftune import formats
from preftune.cli.main import run
from tests import tiny


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    rows = [{"prompt": f"Say {i}.", "responses": [{"text": f"{i} {word}"} for word in ("one", "two", "three", "four")]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "tiny"
    config = tiny.model().config
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    tiny.tokenizer(pad="<unk>").save_pretrained(path)
    return path


def test_scores_are_those_of_plain_transformers(samples: Path, judge: Path, tmp_path: Path) -> None:
    out = tmp_path / "scored.jsonl"
    assert run(["score", str(samples), "--judge", str(judge), "--output", str(out), "--precision", "fp32"]) == 0
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(judge).eval(), AutoTokenizer.from_pretrained(judge)
    for example in formats.read(out).examples:
        for response in example.responses:
            ids = torch.tensor([[*tokenizer(example.prompt + response.text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                assert response.score == pytest.approx(model(ids, attention_mask=torch.ones_like(ids)).logits.item(), abs=1e-5)
    named = tmp_path / "named.jsonl"
    assert run(["score", str(out), "--judge", str(judge), "--output", str(named), "--attribute", "help", "--precision", "fp32"]) == 0
    both = formats.read(named).examples[0].responses[0].score
    assert both["help"] == pytest.approx(both["overall"], abs=1e-6)


def test_every_selection_writes_records_that_the_methods_read(
    samples: Path, judge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scored = tmp_path / "scored.jsonl"
    assert run(["score", str(samples), "--judge", str(judge), "--output", str(scored)]) == 0
    all_of = {r.text: r.score for e in formats.read(scored).examples for r in e.responses}
    cases = {
        "best": ("best", 6, 6),
        "top": ("top", "-k", "3", 6, 18),
        "threshold": ("threshold", "--at-least", str(sorted(all_of.values())[12]), None, 12),
        "raft": ("raft", "--share", "0.25", None, 6),
        "rso": ("rso", "--count", "2", 6, 12),
        "pairs": ("pairs", 12, 24),
        "tournament": ("pairs", "--how", "tournament", 18, 36),
    }
    for name, (kind, *more, records, responses) in cases.items():
        out = tmp_path / f"{name}.jsonl"
        assert run(["select", kind, str(scored), "--output", str(out), *more]) == 0, name
        told = capfd.readouterr().err
        found = formats.read(out).examples
        assert records in (None, len(found)) and sum(len(e.responses) for e in found) == responses, name
        assert f"24 responses, {responses} stayed ({responses / 24:.0%})" in told and "scores before: mean" in told
        if kind == "best":
            best = np.mean([max(r.score for r in e.responses) for e in formats.read(scored).examples])
            assert f"{best:.3f} of 4 (KL at most 0.64 nats)" in told, "log 4 - 3/4"
        if kind == "pairs":
            assert all(e.responses[0].score > e.responses[1].score and e.responses[0].rank == 1 for e in found)
    assert all(
        e.responses[0].score == max(all_of[r.text] for r in s.responses)
        for e, s in zip(formats.read(tmp_path / "best.jsonl").examples, formats.read(scored).examples, strict=True)
    )


def test_mistakes_are_one_line(samples: Path, judge: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out.jsonl")
    policy = tiny.save(tmp_path / "policy")
    cases = [
        (["select", "best", str(samples), "--output", out], "samples.jsonl:1: no response has a score"),
        (["select", "pairs", str(samples), "--how", "all_pairs", "--output", out], "unknown pairing 'all_pairs'"),
        (["select", "best", str(samples), "--output", str(samples)], "there already"),
        (["score", str(samples), "--judge", str(policy), "--output", out], "no score head"),
        (["score", str(samples), "--judge", str(judge), "--output", out, "--max-length", "3"], "samples.jsonl:1: this record cannot"),
    ]
    for line, told in cases:
        assert run(line) == 2, line
        said = capfd.readouterr().err.strip().splitlines()
        assert told in said[-1], (line, said)
    assert not Path(out).exists()


def test_responses_without_a_score_are_left_out_and_counted(samples: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scored, out = tmp_path / "scored.jsonl", tmp_path / "best.jsonl"
    (tmp_path / "rule.py").write_text("def rule(example, response):\n    return None if 'four' in response.text else len(response.text)\n")
    assert run(["score", str(samples), "--judge", f"{tmp_path}/rule.py:rule", "--output", str(scored)]) == 0
    assert "18 responses scored, 6 could not be scored" in capfd.readouterr().err
    assert run(["select", "best", str(scored), "--output", str(out)]) == 0
    told = capfd.readouterr().err
    assert "18 responses, 6 stayed (33%)" in told and "6 more responses have no score and are left out" in told and "of 3 (KL" in told
    assert all(e.responses[0].text.endswith("three") for e in formats.read(out).examples)
    assert run(["select", "best", str(samples), "--output", str(tmp_path / "none.jsonl")]) == 2
    assert "no response has a score" in capfd.readouterr().err
