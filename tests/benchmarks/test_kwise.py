"""The K-wise benchmark compares like with like: its plain side trains the same thing, and a side that does not is seen."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import kwise
from preftune.methods import METHODS
from preftune.models.policy import LanguageModel, RewardModel
from preftune.models.save import save_model
from preftune.packing.chat import ChatTokenizer
from tests import tiny

PLAIN_CAN = [
    name
    for name, method in METHODS.items()
    if method.survey is None
    and (method.model == "policy" or method.heads(method.knobs()) == 1)
    and not method.language_head(method.knobs())
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A tiny policy and reward model in their folders, and three records with three responses."""
    folder = tmp_path_factory.mktemp("kwise")
    tokenizer = ChatTokenizer(tiny.tokenizer(pad="<unk>"))
    save_model(LanguageModel(tiny.model()), tokenizer, folder / "policy")
    torch.manual_seed(0)
    save_model(RewardModel(tiny.model()), tokenizer, folder / "reward")
    trees = [tiny.tree(prompt, responses, seed=prompt) for prompt, responses in ((9, (4, 7, 2)), (5, (6, 3, 5)), (12, (2, 2, 8)))]
    rows = [{"prompt": t.prompt.tolist(), "responses": [r.tolist() for r in t.responses]} for t in trees]
    (folder / "rows.json").write_text(json.dumps(rows))
    return SimpleNamespace(
        folder=folder, rows=folder / "rows.json", prompts_per_microbatch=3, steps=2, prompts_per_step=3, precision="fp32"
    )


def compared(options, name):
    return kwise.compare(SimpleNamespace(**vars(options), method=name))


@pytest.mark.parametrize("name", PLAIN_CAN)
def test_both_sides_have_one_loss_and_gradient(options, name):
    found = compared(options, name)
    ours, theirs = found["losses"]
    assert ours == pytest.approx(theirs, rel=kwise.LOSS_TOLERANCE, abs=kwise.LOSS_TOLERANCE) and np.isfinite(ours)
    assert found["tensors"] > 15 and found["gap"] < kwise.GRADIENT_TOLERANCE, found


def test_a_plain_side_that_reads_one_token_off_is_seen(options, monkeypatch):
    shifted = lambda learner, model, batch, ids, mask: torch.cat(
        [torch.log_softmax(model(ids).logits, -1)[i, p : p + r].amax(-1) for i, (_, p, _, r) in enumerate(batch.layout.rows())]
    )
    monkeypatch.setattr(kwise.PlainLearner, "_logprobs", shifted)
    found = compared(options, "sft")
    assert found["gap"] > kwise.GRADIENT_TOLERANCE


def test_a_side_says_what_went_through_the_model(options):
    sides = {
        side: kwise.one_side(side, SimpleNamespace(**{**vars(options), "steps": 1}, method="dpo")) for side in (kwise.PREFTUNE, kwise.PLAIN)
    }
    assert sides[kwise.PREFTUNE]["tokens"] == [9 + 13 + 5 + 14 + 12 + 12]
    assert sides[kwise.PLAIN]["tokens"] == [9 * (12 + 8)]
    assert sides[kwise.PREFTUNE]["losses"] == pytest.approx(sides[kwise.PLAIN]["losses"], rel=1e-5)
