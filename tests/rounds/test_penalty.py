"""RAFT's ranking by scores less the divergence from the reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from preftune import formats
from preftune.models import load
from preftune.records import Example, Response
from preftune.rounds.methods import RaftKnobs, _raft
from preftune.rounds.penalty import DIVERGENCE, JUDGED, less
from tests import tiny
from tests.rounds.test_rounds import RULE, words
from tests.training import runs


def responses(*scores: float) -> tuple[Response, ...]:
    return tuple(Response(f"r{k}", score=s) for k, s in enumerate(scores))


def test_the_penalty_by_hand() -> None:
    """Scores 1, 0.9, 0.8 with log-ratios 4, 1, -2 and beta 0.1: 0.6, 0.8, 1.0, so the order turns round."""
    (made,) = less([Example("a", responses(1.0, 0.9, 0.8))], [np.array([4.0, 1.0, -2.0])], 0.1)
    assert [r.score for r in made.responses] == pytest.approx([0.6, 0.8, 1.0])
    assert [(r.meta[JUDGED], r.meta[DIVERGENCE]) for r in made.responses] == [(1.0, 4.0), (0.9, 1.0), (0.8, -2.0)]
    knobs = {"only_finished": False}
    best = lambda **more: [r.text for e in _raft([made], RaftKnobs(**knobs, **more), 0).examples for r in e.responses]
    assert best() == ["r2"]
    assert best(at_least=0.85) == ["r1"], "a bar is the judge's"
    assert best(ranking="global", share=0.67, at_least=0.85) == ["r1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("penalty")
    tiny.save(folder / "model", scale=2.0)
    rows = [{"messages": [{"role": "user", "content": f"Say {i}!"}]} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    return folder


def test_responses_are_ranked_by_what_plain_transformers_says_and_a_kill_changes_nothing(place: Path, tmp_path: Path) -> None:
    output, log = tmp_path / "run", tmp_path / "log"
    command = words(place, output, "raft", "method.kl=0.05", "keep_models=true", "eval_fraction=0", "lr=0.02")
    assert runs.run(command, log, failpoint="round.penalised:kill:2") == -9, log.read_text()
    assert runs.run(command, log) == 0, log.read_text()
    first = formats.read(output / "rounds/1/penalised.jsonl").examples
    assert all(r.meta[DIVERGENCE] == 0 and r.score == r.meta[JUDGED] for e in first for r in e.responses), (
        "round 1 draws from the reference"
    )
    tokenizer = load.load_tokenizer(load.locate(str(place / "model")))
    sides = [AutoModelForCausalLM.from_pretrained(path).float().eval() for path in (output / "rounds/1/train/final", place / "model")]
    moved = []
    scored = formats.read(output / "rounds/2/scored.jsonl").examples
    ranked = formats.read(output / "rounds/2/penalised.jsonl").examples
    for judged, example in zip(scored, ranked, strict=True):
        tree, *_ = tokenizer.encode(example, 64)
        assert tree is not None
        for plain, response, ids in zip(judged.responses, example.responses, tree.responses, strict=True):
            row = torch.tensor([[*tree.prompt.tolist(), *ids.tolist()]])
            with torch.no_grad():
                logp = [side(row).logits[0, len(tree.prompt) - 1 : -1].log_softmax(-1) for side in sides]
            p, q = (float(one.gather(1, torch.tensor(ids)[:, None]).sum()) for one in logp)
            moved.append(p - q)
            assert response.meta[DIVERGENCE] == pytest.approx(p - q, abs=1e-3)
            assert response.score == pytest.approx(plain.score - 0.05 * (p - q), abs=1e-4)
    assert np.abs(moved).max() > 0.5
    kept = formats.read(output / "rounds/2/selected.jsonl").examples
    for all_of, one in zip(ranked, kept, strict=True):
        assert one.responses[0].text == max(all_of.responses, key=lambda r: r.score).text  # type: ignore[arg-type, return-value]
    facts = json.loads((output / "rounds/2/facts.json").read_text())
    assert facts["divergence"] == pytest.approx(np.mean(moved), abs=1e-3)
    assert facts["score_sampled"] == pytest.approx(np.mean([r.score for e in scored for r in e.responses]))
    assert facts["score_selected"] == pytest.approx(np.mean([e.responses[0].meta[JUDGED] for e in kept]))
