"""`preftune evaluate` on tiny models: figures against plain transformers, every record counted, mistakes in one line."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from preftune import formats
from preftune.cli.main import run
from preftune.evaluation import held_out
from preftune.models.policy import LanguageModel, RewardModel
from preftune.models.save import save_model
from preftune.packing.chat import ChatTokenizer
from tests import tiny

WORDS = ["yes", "no", "the butterflies of the area", "a cat and a dog", "I do not know that", "then do it"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A policy, its reference, a reward model, and 12 pairs on 6 prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    tokenizer = ChatTokenizer(tiny.tokenizer(pad="<unk>"))
    save_model(LanguageModel(tiny.model(seed=1)), tokenizer, folder / "policy")
    save_model(LanguageModel(tiny.model(seed=2)), tokenizer, folder / "start")
    torch.manual_seed(0)
    save_model(RewardModel(tiny.model(seed=3)), tokenizer, folder / "reward")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"question {i // 2}"}],
            "chosen": [{"role": "assistant", "content": f"{WORDS[i % 6]} {i}"}],
            "rejected": [{"role": "assistant", "content": WORDS[(i + 1) % 6]}],
        }
        for i in range(12)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def evaluated(place, capsys, *words, data="pairs.jsonl"):
    out = place / "out.json"
    out.unlink(missing_ok=True)
    code = run(["evaluate", words[0], str(place / data), "--output", str(out), "--precision", "fp32", *words[1:]])
    told = capsys.readouterr()
    return code, json.loads(out.read_text()) if out.exists() else None, told.out, told.err


def values(report):
    return {one["key"]: one["value"] for one in report["figures"]}


def texts(path):
    """Each record's prompt, preferred and other response as plain text with its end of turn, by the template alone."""
    for example in formats.read(path).examples:
        prompt = f"<|user|>{example.prompt[0].content}<|end|>\n<|assistant|>"
        better, worse = sorted(example.responses, key=lambda r: r.rank)
        yield prompt, better.text + "<|end|>", worse.text + "<|end|>"


def test_a_reward_model_s_figures_equal_plain_transformers(place, capsys):
    code, report, shown, _ = evaluated(place, capsys, str(place / "reward"))
    model = AutoModelForSequenceClassification.from_pretrained(place / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "reward")
    score = lambda text: model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits.item()
    with torch.no_grad():
        margins = np.array([score(prompt + better) - score(prompt + worse) for prompt, better, worse in texts(place / "pairs.jsonl")])
    found = values(report)
    assert code == 0 and report["kind"] == "reward"
    assert found["accuracy"] == pytest.approx((margins > 0).mean())
    assert found["margin_mean"] == pytest.approx(margins.mean(), rel=1e-4)
    assert found["nll"] == pytest.approx(np.logaddexp(0, -margins).mean(), rel=1e-4)
    assert "Pair accuracy" in shown and "the preferred response scores higher" in shown
    assert "12 records read as" in shown and "12 kept, of 6 prompts" in shown


def test_a_policy_s_figures_equal_plain_transformers(place, capsys):
    code, report, _, _ = evaluated(place, capsys, str(place / "policy"), "--reference", str(place / "start"))
    tokenizer = AutoTokenizer.from_pretrained(place / "policy")
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def logp(model, prompt, response):
        start, rest = ids(prompt), ids(response)
        logits = torch.log_softmax(model(torch.tensor([start + rest])).logits[0, len(start) - 1 : -1], -1)
        return logits.gather(1, torch.tensor(rest)[:, None]).sum().item()

    models = [AutoModelForCausalLM.from_pretrained(place / name).eval() for name in ("policy", "start")]
    rows = list(texts(place / "pairs.jsonl"))
    grid = np.array([[[logp(m, p, r) for r in (better, worse)] for p, better, worse in rows] for m in models])
    tokens = np.array([[len(ids(r)) for r in row[1:]] for row in rows])
    found = values(report)
    ratio = grid[0] - grid[1]
    assert code == 0 and report["kind"] == "policy"
    assert found["accuracy"] == pytest.approx((ratio[:, 0] > ratio[:, 1]).mean())
    assert found["margin_mean"] == pytest.approx((ratio[:, 0] - ratio[:, 1]).mean(), rel=1e-3)
    assert found["logp_accuracy"] == pytest.approx((grid[0, :, 0] > grid[0, :, 1]).mean())
    assert found["mean_logp_accuracy"] == pytest.approx(((grid[0] / tokens)[:, 0] > (grid[0] / tokens)[:, 1]).mean())
    assert found["perplexity"] == pytest.approx(math.exp(-grid[0, :, 0].sum() / tokens[:, 0].sum()), rel=1e-4)
    assert found["reference_perplexity"] == pytest.approx(math.exp(-grid[1, :, 0].sum() / tokens[:, 0].sum()), rel=1e-4)
    assert found["best_length"] == pytest.approx(tokens[:, 0].mean())
    assert set(report["models"]) == {str(place / "policy"), str(place / "start")} and len(set(report["models"].values())) == 2


def test_the_file_names_what_was_evaluated_and_holds_no_nan(place, capsys):
    _, report, _, _ = evaluated(place, capsys, str(place / "reward"), "--limit", "1")
    raw = (place / "pairs.jsonl").read_bytes()
    assert report["data"]["sha256"] == hashlib.sha256(raw + f"|{len(raw)}|".encode()).hexdigest()  # as in a run's run.json
    assert len(report["models"][str(place / "reward")]) == 64
    assert all(one["low"] is None for one in report["figures"] if one["key"] == "margin_mean")  # one prompt: no interval
    assert report["data"]["rows"] == report["data"]["kept"] == 1
    assert "NaN" not in (place / "out.json").read_text() and "Infinity" not in (place / "out.json").read_text()


def test_every_dropped_record_is_counted_by_reason(place, capsys):
    rows = (place / "pairs.jsonl").read_text().splitlines()
    turn = lambda text: [{"role": "assistant", "content": text}]
    long = {"prompt": [{"role": "user", "content": "x " * 200}], "chosen": turn("a"), "rejected": turn("b")}
    (place / "mixed.jsonl").write_text("\n".join([*rows, "{broken", json.dumps(long)]))
    words = (str(place / "reward"), "--on-error", "skip", "--max-length", "100")
    code, report, shown, _ = evaluated(place, capsys, *words, data="mixed.jsonl")
    data = report["data"]
    assert code == 0 and data["rows"] == 14 == data["kept"] + sum(data["dropped"].values())
    assert data["dropped"]["prompt_too_long"] == 1 and len(data["dropped"]) == 2
    assert "1 dropped, prompt_too_long: the prompt alone fills max_length" in shown and "mixed.jsonl:14" in shown


def test_records_without_a_pair_count_for_a_policy_s_perplexity_alone(place, capsys):
    rows = (place / "pairs.jsonl").read_text().splitlines()[:2]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    kwise = [
        json.dumps(
            {"prompt": r["prompt"], "responses": [{"text": r[k][0]["content"], "rank": n} for n, k in enumerate(("chosen", "rejected"), 1)]}
        )
        for r in map(json.loads, rows)
    ]
    kwise.append(json.dumps({"prompt": turns[:1], "responses": [{"text": "hello"}]}))
    (place / "some.jsonl").write_text("\n".join(kwise))
    _, report, shown, _ = evaluated(place, capsys, str(place / "policy"), data="some.jsonl")
    counts = {one["key"]: one["n"] for one in report["figures"]}
    assert (counts["logp_accuracy"], counts["perplexity"], report["data"]["without_pair"]) == (2, 3, 1)
    assert "1 of them have no preferred response" in shown
    _, report, shown, _ = evaluated(place, capsys, str(place / "reward"), data="some.jsonl")
    assert report["data"]["dropped"] == {"no_preference": 1} and "1 dropped, no_preference" in shown


def test_a_value_that_is_not_finite_drops_its_record_and_is_counted(place, capsys, monkeypatch):
    real = held_out.response_values
    monkeypatch.setattr(held_out, "response_values", lambda *a: [v * math.nan if n == 2 else v for n, v in enumerate(real(*a))])
    code, report, shown, _ = evaluated(place, capsys, str(place / "reward"))
    assert code == 0 and report["data"]["dropped"] == {"not_finite": 1} and report["data"]["kept"] == 11 and "pairs.jsonl:3" in shown


def test_eval_fraction_takes_the_prompts_that_a_run_held_out(place, capsys):
    _, report, _, _ = evaluated(place, capsys, str(place / "reward"), "--eval-fraction", "0.34", "--seed", "3")
    _, held = formats.split_by_prompt(formats.read(place / "pairs.jsonl").examples, 0.34, 3)
    assert report["data"]["kept"] == len(held) == 4


def test_the_result_does_not_depend_on_the_micro_batch(place, capsys):
    one, two = (values(evaluated(place, capsys, str(place / "reward"), "--tokens-per-microbatch", n)[1]) for n in ("32", "4096"))
    defined = {key for key, value in one.items() if value is not None}
    assert defined == {key for key, value in two.items() if value is not None} and len(defined) > 8
    assert {key: one[key] for key in defined} == pytest.approx({key: two[key] for key in defined}, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gone", "pairs.jsonl"], "no such model"),
        (["policy", "gone.jsonl"], "gone.jsonl"),
        (["reward", "pairs.jsonl", "--reference", "start"], "a reward model has no reference"),
        (["policy", "pairs.jsonl", "--max-length", "2"], "no record is left to evaluate on"),
        (["policy", "pairs.jsonl", "--output", "no/such/folder/x.json"], "its folder does not exist"),
        (["policy", "pairs.jsonl", "--output", "policy"], "the output is a directory"),
        (["policy", "pairs.jsonl", "--refrence", "start"], "No such option"),
        (["policy"], "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(place, capsys, monkeypatch, words, told):
    monkeypatch.chdir(place)
    (place / "here").mkdir(exist_ok=True)
    names = [f"./{word}" if word in ("policy", "reward", "start", "gone") else word for word in words]
    assert run(["evaluate", *names]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("preftune: ")]
    assert len(lines) == 1 and told in lines[0], err


def test_a_reference_with_another_vocabulary_is_refused(place, capsys):
    other = tiny.tokenizer()
    other.add_tokens(["zebra"])
    tiny.model(vocab_size=330).save_pretrained(place / "other")
    other.save_pretrained(place / "other")
    assert run(["evaluate", str(place / "policy"), str(place / "pairs.jsonl"), "--reference", str(place / "other")]) == 2
    assert "do not share a vocabulary" in capsys.readouterr().err
