"""What one optimizer step promises: one gradient however it is cut, first losses, learning rates, and no step on bad numbers."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from preftune.errors import NonFiniteError, UserError
from preftune.methods import METHODS
from preftune.models.attention import NAME
from preftune.models.lora import Adapter
from preftune.models.policy import LanguageModel, RewardModel
from preftune.packing.chat import Tree
from preftune.training.distributed import World
from preftune.training.learner import Learner, Schedule, Step, make_optimizer
from preftune.training.manifest import read_manifest
from preftune.training.metrics import read_metrics
from preftune.training.reference import live_reference
from tests import tiny
from tests.training import runs
from tests.training.runs import LORA, command

SHAPES = ((9, (5, 8)), (4, (7, 3, 11)), (30, (2, 6)), (1, (12, 1)), (6, (4, 4)), (17, (20, 9)))


def trees_of(method: str) -> list[Tree]:
    """Ragged records, kept as the method keeps them."""
    kept = [METHODS[method].keep(tiny.tree(p, r, seed=i), METHODS[method].knobs()) for i, (p, r) in enumerate(SHAPES)]
    assert all(isinstance(tree, Tree) for tree in kept)
    return kept  # type: ignore[return-value]


def learner_of(method: str, *, budget: int = 4096, lora: bool = False, packed: bool = True, saving: bool = False, **knobs: Any) -> Learner:
    """A learner on a tiny model, with its reference where the method has one (another model, so that losses differ from their start)."""
    row = METHODS[method]
    inner = tiny.model()
    inner.set_attn_implementation(NAME)
    torch.manual_seed(1)
    model = (RewardModel if row.model == "reward" else LanguageModel)(inner)
    if lora:
        Adapter(inner, rank=4, alpha=8, dropout=0.0, targets="all-linear")
    model.backbone.use_packed(packed)
    if saving:
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    learner = Learner(row, row.knobs(**knobs), model, World(torch.device("cpu")), budget, clip_norm=1e9)
    if row.reference:
        other = tiny.model(seed=5)
        other.set_attn_implementation(NAME)
        frozen = LanguageModel(other, packed=packed)
        learner.reference = live_reference(frozen.eval().requires_grad_(False))
    learner.optimizer = make_optimizer(learner.parameters, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    learner.schedule = Schedule(1e-3, 10)
    return learner


def one_step(learner: Learner, trees: list[Tree]) -> tuple[Step, dict[str, Tensor]]:
    """The step, and the gradients that it gave the optimizer."""
    seen: dict[str, Tensor] = {}
    assert learner.optimizer is not None
    taken: Callable[[], Any] = learner.optimizer.step

    def step() -> Any:
        seen.update({name: p.grad.clone() for name, p in learner.parameters.items() if p.grad is not None})
        return taken()

    learner.optimizer.step = step  # type: ignore[method-assign, assignment]
    return learner.step(trees, 0), seen


def assert_same_step(ours: tuple[Step, dict[str, Tensor]], theirs: tuple[Step, dict[str, Tensor]]) -> None:
    assert ours[0].loss == pytest.approx(theirs[0].loss, rel=1e-5, abs=1e-6)
    assert ours[0].grad_norm == pytest.approx(theirs[0].grad_norm, rel=1e-4)
    assert ours[0].metrics == pytest.approx(theirs[0].metrics, rel=1e-4, abs=1e-5)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 10
    for name, gradient in theirs[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(ours[1][name], gradient, atol=2e-5 * scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


KNOBS = {"reward": {"centering": 0.01}}


@pytest.mark.parametrize("budget", [1, 30, 60], ids=["one record each", "30 tokens", "60 tokens"])
@pytest.mark.parametrize("method", METHODS)
def test_regression_01_any_cut_into_micro_batches_gives_the_same_gradient(method: str, budget: int) -> None:
    trees, knobs = trees_of(method), KNOBS.get(method, {})
    whole = one_step(learner_of(method, **knobs), trees)
    cut = learner_of(method, budget=budget, **knobs)
    assert len(list(cut._batches(trees))) > 1
    assert_same_step(one_step(cut, trees), whole)


@pytest.mark.parametrize("method", ["sft", "reward", "dpo"])  # one of each kind; for the others their objective's own tests stand
def test_regression_01_the_gradient_is_that_of_the_loss_written_out(method: str) -> None:
    """The whole step's loss from separate plain forwards of transformers, response by response, differentiated by torch."""
    trees = trees_of(method)
    learner = learner_of(method)
    step, gradients = one_step(learner, trees)
    plain = tiny.model()
    plain.set_attn_implementation("eager")
    reference = tiny.model(seed=5)
    head = learner_of(method).model.head.weight if METHODS[method].model == "reward" else None
    pairs, logps = [], []
    for tree in trees:
        values = []
        for response in tree.responses:
            ids = torch.tensor([[*tree.prompt, *response]])
            if head is not None:
                values.append(plain.model(input_ids=ids).last_hidden_state[0, -1] @ head[0])
                continue
            each = [torch.log_softmax(m(input_ids=ids).logits[0, len(tree.prompt) - 1 : -1], -1) for m in (plain, reference)]
            logp = [one.gather(1, torch.tensor(response)[:, None]).sum() for one in each]
            logps.append(logp[0])
            values.append(0.1 * (logp[0] - logp[1].detach()))
        losses = [-torch.nn.functional.logsigmoid(values[i] - values[j]) for i in range(len(values)) for j in range(i + 1, len(values))]
        if losses:
            pairs.append(torch.stack(losses).mean())
    loss = torch.stack(pairs).mean() if pairs else -torch.stack(logps).sum() / sum(t.response_tokens for t in trees)
    loss.backward()
    assert step.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, p in plain.named_parameters():
        if p.grad is None:
            continue
        found = gradients[f"backbone.hf.{name}"]
        torch.testing.assert_close(
            found, p.grad, atol=2e-5 * max(1.0, float(p.grad.abs().max())), rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("method", METHODS)
def test_regression_15_every_path_gives_the_same_loss_and_gradient(method: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from preftune.models import logprobs

    trees = trees_of(method)
    plain = one_step(learner_of(method, lora=lora), trees)
    assert_same_step(one_step(learner_of(method, lora=lora, saving=True), trees), plain)
    assert_same_step(one_step(learner_of(method, lora=lora, packed=False), trees), plain)
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 320 * 5)  # five tokens a chunk
    assert_same_step(one_step(learner_of(method, lora=lora), trees), plain)


def test_regression_15_merged_base_weights_give_what_the_adapter_gives_after_training() -> None:
    """Frozen weights stay as they were, whichever path trains."""
    learner = learner_of("dpo", lora=True)
    before = {name: p.clone() for name, p in learner.model.named_parameters() if not p.requires_grad}
    for index in range(3):
        learner.step(trees_of("dpo"), index)
    assert before and all(torch.equal(before[name], p) for name, p in learner.model.named_parameters() if not p.requires_grad)


@pytest.mark.parametrize("saving", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_regression_32_every_adapter_tensor_gets_a_gradient(method: str, saving: bool) -> None:
    """The B of an adapter starts at 0, so its A has a gradient from the second step on."""
    learner = learner_of(method, lora=True, saving=saving)
    learner.step(trees_of(method), 0)
    _, gradients = one_step(learner, trees_of(method))
    trained = {name for name in learner.parameters if "lora_" in name}
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear layers in two blocks
    assert gradients.keys() == learner.parameters.keys()
    dead = [name for name, gradient in gradients.items() if not gradient.abs().sum() > 0]
    assert dead == []


def test_regression_31_the_learning_rate_is_its_closed_form(tiny_llama: Path, tmp_path: Path) -> None:
    words = ("prompts_per_step=1", "epochs=1", "warmup=0.25", "min_lr_ratio=0.2", "lr=3e-4", "eval_fraction=0", "eval_every=null")
    assert runs.train(command("sft", tiny_llama, tmp_path / "run", *words)) == 0
    found = [row["lr"] for row in runs.rows(tmp_path / "run") if row["kind"] == "train"]
    total = len(found)
    warm = math.ceil(total / 4)
    assert total >= 8
    for step, lr in enumerate(found):
        share = (step + 1) / warm if step < warm else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
        assert lr == pytest.approx(3e-4 * share, rel=1e-12)


def test_the_optimizer_is_adamw_at_the_logged_rate() -> None:
    """Three steps against AdamW written out (arXiv:1711.05101, algorithm 2), with decay on matrices only."""
    learner = learner_of("sft")
    learner.optimizer = make_optimizer(learner.parameters, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    expected = {name: p.detach().clone().double() for name, p in learner.parameters.items()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in (1, 2, 3):
        learner.schedule = Schedule(1e-2 / t, 1, warmup=0)
        step, gradients = one_step(learner, trees_of("sft"))
        assert step.lr == 1e-2 / t
        for name, gradient in gradients.items():
            g = gradient.double()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            update = (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-6)
            decay = 0.1 * expected[name] if expected[name].ndim >= 2 else 0.0
            expected[name] = expected[name] - step.lr * (update + decay)
    for name, p in learner.parameters.items():
        torch.testing.assert_close(p.detach().double(), expected[name], atol=2e-5, rtol=1e-4)


def test_clipping_scales_to_the_norm() -> None:
    free, clipped = learner_of("sft"), learner_of("sft")
    clipped.clip_norm = 0.01
    (step, before), (again, after) = one_step(free, trees_of("sft")), one_step(clipped, trees_of("sft"))
    assert again.grad_norm == pytest.approx(step.grad_norm) and step.grad_norm > 1
    assert math.sqrt(sum(float(g.square().sum()) for g in after.values())) == pytest.approx(0.01, rel=1e-3)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name] * step.grad_norm / 0.01, gradient, atol=1e-4, rtol=1e-3)


# ---- first losses, on whole runs

FIRST = {
    "full": (),
    "checkpointing": ("gradient_checkpointing=true",),
    "LoRA": LORA,
    "LoRA, checkpointing": (*LORA, "gradient_checkpointing=true"),
}


def first_loss(output: Path) -> float:
    return next(row["loss"] for row in runs.rows(output) if row["kind"] == "train")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", FIRST)
def test_regression_08_the_first_logged_loss_of_dpo_is_ln_2(variant: str, precision: str, tiny_llama: Path, tmp_path: Path) -> None:
    words = command("dpo", tiny_llama, tmp_path / "run", "max_steps=2", f"precision={precision}", *FIRST[variant])
    assert runs.train(words) == 0
    assert abs(first_loss(tmp_path / "run") - math.log(2)) < 1e-6
    losses = [row["loss"] for row in runs.rows(tmp_path / "run") if row["kind"] == "train"]
    assert abs(losses[1] - math.log(2)) > 1e-3  # and it does not stay there
    held = next(row for row in runs.rows(tmp_path / "run") if row["kind"] == "eval")
    assert held["step"] == 0 and abs(held["loss"] - math.log(2)) < 1e-6 and held["accuracy"] == 0.5


@pytest.mark.parametrize("lora", [(), LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 1e-3)])
def test_regression_36_a_cached_reference_is_a_fresh_one(
    lora: tuple[str, ...], precision: str, tolerance: float, tiny_llama: Path, tmp_path: Path
) -> None:
    words = [f"precision={precision}", "max_steps=3", "lr=1e-4", *lora]
    for name, extra in (("fresh", ()), ("cached", ("cache_reference=true",))):
        assert runs.train(command("dpo", tiny_llama, tmp_path / name, *words, *extra)) == 0
    assert abs(first_loss(tmp_path / "cached") - math.log(2)) < tolerance
    assert len(list((tmp_path / "cached" / "cache").glob("reference-*.safetensors"))) == 2  # training and held-out records
    for ours, theirs in zip(runs.rows(tmp_path / "cached"), runs.rows(tmp_path / "fresh"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=5 * tolerance)
    changed = command("dpo", tiny_llama, tmp_path / "other", *words, "cache_reference=true", f"reference={other_model(tmp_path)}")
    assert runs.train(changed) == 0
    assert abs(first_loss(tmp_path / "other") - math.log(2)) > 1e-2  # a cache of another model would be seen


def other_model(folder: Path) -> Path:
    return tiny.save(folder / "another", seed=9)


@pytest.mark.parametrize("method", METHODS)
def test_regression_07_dropout_of_the_model_is_off_in_every_pass(method: str, tmp_path: Path) -> None:
    """A model whose config asks for dropout trains as if it did not."""
    outputs = []
    for rate in (0.0, 0.5):
        model = tiny.save(tmp_path / f"model-{rate}", "gpt2")
        config = json.loads((model / "config.json").read_text())
        config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), rate)
        (model / "config.json").write_text(json.dumps(config))
        outputs.append(tmp_path / f"run-{rate}")
        assert runs.train(command(method, model, outputs[-1], "max_steps=3")) == 0
    assert runs.rows(outputs[0]) == runs.rows(outputs[1])


@pytest.mark.parametrize("method", METHODS)
def test_regression_33_the_weights_just_before_step_1_are_those_of_the_file(
    method: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    step = Learner.step

    def watched(self: Learner, *args: Any) -> Step:
        if not seen:
            seen.append({name.removeprefix("backbone.hf."): p.detach().clone() for name, p in self.model.named_parameters()})
        return step(self, *args)

    monkeypatch.setattr(Learner, "step", watched)
    assert runs.train(command(method, tiny_llama, tmp_path / "run", "max_steps=1")) == 0
    file = load_file(tiny_llama / "model.safetensors")
    assert len(file) > 10
    assert file.keys() == seen[0].keys() - {"head.weight"}
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in file.items())


def test_regression_34_options_of_other_tools_and_shadowed_ones_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for word, text in (
        ("max_seq_length=64", "max_length"),
        ("best_mode=max", "no effect"),
        ("data.max_samples=3", "limit"),
        ("gradient_accumulation_steps=4", "prompts_per_step"),
        ("reference=x", "no effect"),
    ):
        with pytest.raises(UserError, match=text):
            runs.train(command("sft", tiny_llama, tmp_path / "run", word))


def test_regression_34_max_length_is_obeyed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longest: list[int] = []
    step = Learner.step

    def watched(self: Learner, trees: list[Tree], *args: Any) -> Step:
        longest.extend(len(t.prompt) + len(r) for t in trees for r in t.responses)
        return step(self, trees, *args)

    monkeypatch.setattr(Learner, "step", watched)
    assert runs.train(command("sft", tiny_llama, tmp_path / "run", "max_length=96")) == 0
    assert max(longest) == 96


# ---- regression 13 and 6: what a record becomes


def test_regression_13_a_prompt_that_fills_the_window_is_dropped_and_counted(
    tiny_llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    long = {"prompt": "q" * 400, "chosen": "yes", "rejected": "no"}
    rows = [long if i in (2, 5) else {"prompt": f"question {i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("eval_fraction=0", "eval_every=null", "data.limit=100", f"data.path={data}", "epochs=1", "prompts_per_step=1")
    assert runs.train(command("dpo", tiny_llama, tmp_path / "run", *words)) == 0
    text = capfd.readouterr().err
    assert "8 records" in text and "6 kept" in text and "2 dropped, prompt_too_long" in text
    assert f"{data}:3, {data}:6" in text
    trained = [row for row in runs.rows(tmp_path / "run") if row["kind"] == "train"]
    assert len(trained) == 6 and all(math.isfinite(row["loss"]) for row in trained)


def test_regression_06_end_of_turn_carries_loss_though_it_is_the_pad_token(tiny_llama: Path) -> None:
    from preftune.models.load import load_tokenizer, locate
    from preftune.packing.batch import collate
    from preftune.records import Example, Message, Response

    tokenizer = load_tokenizer(locate(str(tiny_llama)))
    assert tokenizer.turn_end == tokenizer.tokenizer.pad_token_id
    example = Example(id="a", prompt=(Message("user", "hi"),), responses=(Response("fine"),))
    tree = tokenizer.tokenize([example], 100).trees[0]
    batch = collate([tree])
    assert batch.targets[-1] == tokenizer.turn_end and (batch.targets == tokenizer.turn_end).sum() == 1
    learner = learner_of("sft")
    logp = learner.model(batch)
    assert learner.loss(batch)[0].item() == pytest.approx(-logp.mean().item(), rel=1e-5)  # the last token counted like every other


# ---- numbers that are not finite


def planted(monkeypatch: pytest.MonkeyPatch, kind: str, at: set[int]) -> list[int]:
    """Make the loss or only its gradient non-finite in the given calls of the training loss; the list counts its calls."""
    row, calls = METHODS["sft"], [0]

    def loss(out: Any, batch: Any, knobs: Any) -> Any:
        value, metrics = row.loss(out, batch, knobs)
        if not torch.is_grad_enabled():
            return value, metrics
        calls[0] += 1
        if calls[0] in at:
            bad = float("nan") if kind == "loss" else float("inf")
            value = value * bad if kind == "loss" else value + _InfiniteGradient.apply(out.token_logp).sum() * 0.0
        return value, metrics

    monkeypatch.setitem(METHODS, "sft", dataclasses.replace(row, loss=loss))
    return calls


class _InfiniteGradient(torch.autograd.Function):
    """Zeros forward, infinity backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full_like(gradient, float("inf"))


ONE_EACH = ("prompts_per_step=1", "epochs=1", "save_every=1", "keep_checkpoints=99", "warmup=0", "schedule=constant")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_on_bad_numbers_is_not_taken_and_its_records_are_named(
    kind: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    planted(monkeypatch, kind, {2, 4})
    assert runs.train(command("sft", tiny_llama, tmp_path / "run", *ONE_EACH, "max_bad_steps=2")) == 0
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows if not row["taken"]] == [2, 4] and len(rows) > 5
    for row in rows:
        assert ("records" in row) == (not row["taken"])
    assert all(len(row["records"]) == 1 and "hh_pairs:" in row["where"][0] for row in rows if not row["taken"])
    assert rows[1]["nonfinite"].keys() == {"loss" if kind == "loss" else "grad_norm"}
    assert rows[1]["where"][0] in capfd.readouterr().err
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    weights = [load_file(path / "model.safetensors") for path in checkpoints]
    state = [load_file(path / "optimizer.safetensors") for path in checkpoints]
    for step in range(2, len(weights) + 1):
        same = all(torch.equal(weights[step - 1][name], weights[step - 2][name]) for name in weights[0])
        assert same == (step in (2, 4))
        if step in (2, 4):
            assert all(torch.equal(state[step - 1][name], state[step - 2][name]) for name in state[0])
    assert all(tensor.isfinite().all() for group in (*weights, *state) for tensor in group.values())


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_too_many_bad_steps_stop_the_run_with_exit_code_3(
    kind: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from preftune.cli.main import run

    calls = planted(monkeypatch, kind, {2, 3, 4})
    words = command("sft", tiny_llama, tmp_path / "run", *ONE_EACH, "max_bad_steps=2")
    assert run(["train", *words]) == 3
    last = capfd.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("preftune: 3 steps gave a non-finite loss or gradient (max_bad_steps=2)")
    assert read_manifest(tmp_path / "run").status == "stopped"  # type: ignore[union-attr]
    assert [row["step"] for row in runs.rows(tmp_path / "run")] == [0, 1, 2, 3, 3, 4]
    for path in (tmp_path / "run" / "checkpoints").glob("*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert calls == [4]
    with pytest.raises(NonFiniteError):  # going on is possible, and stops at the next bad step
        calls[0] = 3
        runs.train(words)


def test_an_evaluation_that_is_not_finite_never_becomes_the_best(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([float("nan"), 3.0, float("inf"), 2.5, 2.75])
    evaluate = Learner.evaluate

    def planted(self: Learner, trees: list[Tree], *of_a_run: Any) -> dict[str, float]:
        return {"loss": next(found)} if of_a_run else evaluate(self, trees)

    monkeypatch.setattr(Learner, "evaluate", planted)
    words = ("max_steps=4", "eval_every=1", "best_metric=loss", "save_every=null")
    assert runs.train(command("reward", tiny_llama, tmp_path / "run", *words)) == 0
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())["progress"]
    assert (state["best_step"], state["best_value"]) == (3, 2.5)
