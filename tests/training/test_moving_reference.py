"""A reference that follows the policy: the update's formula, what it must not disturb, what a checkpoint holds of it, what is refused."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from preftune.errors import UserError
from preftune.methods import METHODS
from preftune.models.attention import NAME
from preftune.models.lora import Adapter
from preftune.models.policy import LanguageModel
from preftune.packing.batch import collate
from preftune.packing.chat import Tree
from preftune.training.distributed import World
from preftune.training.learner import Learner, Schedule, make_optimizer
from preftune.training.reference import MovingReference, live_reference
from tests import tiny
from tests.training import runs
from tests.training.runs import LORA, command
from tests.training.test_learner import one_step

TREES = [tiny.tree(9, (5, 8), seed=1), tiny.tree(4, (7, 9), seed=2)]
LR, BETA = 1e-2, 0.1


def learner_of(every: int, mix: float, *, lora: bool = False, saving: bool = False) -> Learner:
    """DPO of a tiny model whose reference is its own, moving one."""
    row = METHODS["dpo"]
    inner = tiny.model()
    inner.set_attn_implementation(NAME)
    if lora:
        torch.manual_seed(3)
        Adapter(inner, rank=4, alpha=8, dropout=0.0, targets="all-linear")
    if saving:
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    learner = Learner(row, row.knobs(beta=BETA), LanguageModel(inner), World(torch.device("cpu")), 24, clip_norm=1e9)
    learner.reference = MovingReference(learner.model, learner.parameters, every, mix)
    learner.optimizer = make_optimizer(learner.parameters, weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8)
    learner.schedule = Schedule(LR, 10, warmup=0.0, shape="constant")
    return learner


def moving(learner: Learner) -> MovingReference:
    assert isinstance(learner.reference, MovingReference)
    return learner.reference


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.parameters.items()}


def plain_logp(model: Any, tree: Tree, response: Any) -> Tensor:
    logits = model(input_ids=torch.tensor([[*tree.prompt, *response]])).logits[0, len(tree.prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None]).sum()


@pytest.mark.parametrize(("every", "mix"), [(1, 0.6), (1, 0.05), (2, 1.0), (2, 0.25)])
def test_steps_equal_the_formulas_written_out_on_two_plain_models(every: int, mix: float) -> None:
    """DPO's loss, AdamW and ref <- a policy + (1 - a) ref, on two separate transformers models."""
    learner = learner_of(every, mix)
    policy, reference = tiny.model(), tiny.model()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    for index in range(4):
        margins = []
        for tree in TREES:
            with torch.no_grad():
                before = [plain_logp(reference, tree, r) for r in tree.responses]
            now = [plain_logp(policy, tree, r) for r in tree.responses]
            margins.append((now[0] - before[0]) - (now[1] - before[1]))
        loss = -torch.nn.functional.logsigmoid(BETA * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (index + 1) % every == 0:
            with torch.no_grad():
                for ours, theirs in zip(reference.parameters(), policy.parameters(), strict=True):
                    ours.copy_(mix * theirs + (1 - mix) * ours)
        step = learner.step(TREES, index)
        assert step.loss == pytest.approx(loss.item(), abs=2e-5), index
        assert index or step.loss == pytest.approx(math.log(2), abs=1e-7)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(moving(learner).tensors[f"backbone.hf.{name}"], parameter, atol=2e-3, rtol=0)
    assert math.isfinite(loss.item()) and loss.item() != pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("mix", [0.6, 1.0])
def test_the_update_is_the_mix_exactly_and_only_when_it_is_due(lora: bool, mix: float) -> None:
    learner = learner_of(2, mix, lora=lora)
    start = weights(learner)
    assert moving(learner).tensors.keys() == learner.parameters.keys()  # an adapter's alone where there is one
    learner.step(TREES, 0)
    assert all(torch.equal(moving(learner).tensors[name], start[name]) for name in start)
    learner.step(TREES, 1)
    for name, policy in weights(learner).items():
        expected = policy if mix == 1.0 else start[name].double() * (1 - mix) + policy.double() * mix
        torch.testing.assert_close(moving(learner).tensors[name].double(), expected.double(), atol=1e-7, rtol=1e-6)
        assert mix < 1.0 or torch.equal(moving(learner).tensors[name], policy)
    assert any(not torch.equal(moving(learner).tensors[name], start[name]) for name in start)


def test_after_a_hard_update_policy_and_reference_are_one_again() -> None:
    learner = learner_of(3, 1.0, lora=True)
    losses = [learner.step(TREES, index).loss for index in range(4)]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-7) and losses[3] == pytest.approx(math.log(2), abs=1e-7)
    assert abs(losses[2] - math.log(2)) > 1e-3


@pytest.mark.parametrize("saving", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_it_leaves_the_gradients_of_the_policy_alone(lora: bool, saving: bool) -> None:
    """Bit for bit those with a second, frozen model of the same weights, also where backward computes activations again."""
    ours, theirs = (learner_of(1, 0.3, lora=lora, saving=saving) for _ in range(2))
    frozen = copy.deepcopy(theirs.model)
    for learner in (ours, theirs):
        learner.step(TREES, 0)  # from here on policy and reference differ
    with torch.no_grad():
        for name, parameter in frozen.named_parameters():
            if name in theirs.parameters:
                parameter.lerp_(theirs.parameters[name], 0.3)
    theirs.reference = live_reference(frozen.eval().requires_grad_(False))
    (step, gradients), (expected, others) = one_step(ours, TREES), one_step(theirs, TREES)
    assert step.loss == expected.loss and step.loss != pytest.approx(math.log(2), abs=1e-4)
    assert gradients.keys() == others.keys() and len(gradients) > 10
    assert all(torch.equal(gradients[name], others[name]) for name in others)
    assert ours.model.training and not any(t.requires_grad for t in moving(ours).tensors.values())


def test_its_log_probabilities_are_without_dropout_and_gradient() -> None:
    learner = learner_of(1, 0.5)
    dropped = torch.nn.Dropout(0.9)
    embed = learner.model.hf.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, out: dropped(out))
    embed.noise = dropped  # a part of the module, as an adapter's dropout is
    learner.model.train()
    batch = collate(TREES)
    one, two = moving(learner)(batch), moving(learner)(batch)
    assert torch.equal(one, two) and not one.requires_grad and learner.model.training
    learner.model.eval()
    assert torch.equal(one, learner.model(batch))


def test_a_step_that_is_not_taken_does_not_move_it() -> None:
    learner = learner_of(1, 1.0)
    learner.step(TREES, 0)
    before = {name: t.clone() for name, t in moving(learner).tensors.items()}
    with torch.no_grad():
        next(iter(learner.parameters.values())).fill_(math.nan)
    assert not learner.step(TREES, 1).taken
    assert all(torch.equal(moving(learner).tensors[name], t) for name, t in before.items())


def test_a_checkpoint_holds_it_under_a_name_of_its_own_and_it_comes_back() -> None:
    ours, theirs = learner_of(1, 0.5), learner_of(1, 0.5)
    ours.step(TREES, 0)
    saved = {group: {name: t.detach().clone() for name, t in named.items()} for group, named in ours.tensors().items()}
    assert saved.keys() == {"model", "optimizer", "reference"}
    theirs.restore(saved)
    assert theirs.step(TREES, 1) == ours.step(TREES, 1)
    assert all(torch.equal(moving(theirs).tensors[name], t) for name, t in moving(ours).tensors.items())
    with pytest.raises(ValueError, match="not this model's"):
        theirs.restore({**saved, "reference": {"other": torch.zeros(1)}})


SYNC = ("reference_sync.every=2", "reference_sync.mix=0.5", "eval_fraction=0", "eval_every=null", "max_steps=4")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [(), LORA], ids=["all weights", "LoRA"])
def test_a_run_starts_at_ln_2_and_keeps_the_reference_beside_the_model(
    precision: str, lora: tuple[str, ...], tiny_llama: Path, tmp_path: Path
) -> None:
    assert runs.train(command("dpo", tiny_llama, tmp_path / "run", *SYNC, *lora, f"precision={precision}")) == 0
    rows = runs.rows(tmp_path / "run")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    found = [{g: load_file(tmp_path / f"run/checkpoints/step-0000000{n}/{g}.safetensors") for g in ("model", "reference")} for n in (2, 4)]
    for name, policy in found[1]["model"].items():
        expected = 0.5 * policy + 0.5 * found[0]["reference"][name]
        torch.testing.assert_close(found[1]["reference"][name], expected, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("dpo", ("cache_reference=true",), "`cache_reference` and `reference_sync` exclude each other"),
        ("dpo", ("reference=smollm2",), "`reference` and `reference_sync` exclude each other"),
        ("sft", (), "`reference_sync` has no effect"),
        ("reward", (), "`reference_sync` has no effect"),
        ("dpo", ("reference_sync.every=4",), "reference_sync.every: the reference would never move: the run has 4 steps"),
        ("dpo", ("reference_sync.mix=0",), "`reference_sync.mix` must be above 0, not 0"),
        ("dpo", ("sync_ref_model=true",), "Did you mean `reference_sync`"),
        ("dpo", ("ref_model_mixup_alpha=0.6",), "Did you mean `reference_sync.mix`"),
        ("dpo", ("ref_model_sync_steps=64",), "Did you mean `reference_sync.every`"),
    ],
)
def test_what_cannot_go_together_is_refused_in_one_line(
    method: str, words: tuple[str, ...], said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        runs.train(command(method, tiny_llama, tmp_path / "run", *SYNC, *words))
    assert said in str(caught.value) and "\n" not in str(caught.value)
