"""Models that other tools wrote: peft adapters, TRL's trainers, classifiers whose pad token ends turns, heads under other names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from preftune.errors import UserError
from preftune.models import load
from preftune.models.policy import LanguageModel, RewardModel
from preftune.packing.batch import collate
from tests import tiny
from tests.models.test_save import TREES, ended, rows_of, scores_of
from tests.training import runs

IDS = torch.tensor([[5, 9, 100, 37, 2, 64, 250, 8]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("foreign") / "base", max_position_embeddings=512)


def shaken(model: Any, seed: int = 0) -> Any:
    """As if trained: every trainable tensor away from where it starts (B of a LoRA starts at 0)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapter(base: Path, folder: Path, *, classifier: bool = False, **options: Any) -> Path:
    """An adapter as plain peft writes it."""
    if classifier:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=options.pop("labels", 1))
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM", **options}
    shaken(get_peft_model(model, LoraConfig(**settings))).save_pretrained(folder)
    return folder


def rewrite(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def loaded(folder: Path | str) -> Any:
    """Our model, read by its architecture's own attention."""
    model = load.load_causal_lm(load.locate(str(folder)))
    model.set_attn_implementation("sdpa")
    return model


def same(ours: torch.Tensor, theirs: torch.Tensor, start: torch.Tensor | None = None) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert start is None or (ours - start).abs().max() > 0.1, "the adapter must matter for the comparison to mean anything"


# ---------------------------------------------------------------- adapters of language models


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"use_rslora": True, "modules_to_save": ["lm_head"]}], ids=["lora", "dora", "head"]
)
def test_an_adapter_of_peft_gives_the_logits_of_pefts_own_model(options: dict[str, Any], base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter", **options)
    model = loaded(folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    same(logits(model), logits(theirs), logits(loaded(base)))
    assert type(model).__name__ == "LlamaForCausalLM" and not any("lora" in name for name, _ in model.named_modules())
    assert model.name_or_path == str(folder) and all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_trls_sft_trainer_and_ours_on_top_of_it(base: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    talk = [{"role": "user", "content": "Sea?"}, {"role": "assistant", "content": "Water."}]
    quiet = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no"}
    trainer = trl.SFTTrainer(
        model=str(base),
        args=trl.SFTConfig(output_dir=str(tmp_path / "trl"), learning_rate=0.5, lr_scheduler_type="constant", **quiet),
        train_dataset=datasets.Dataset.from_list([{"messages": talk}]),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trl"))
    same(logits(loaded(tmp_path / "trl")), logits(trainer.model.eval()), logits(loaded(base)))
    words = runs.command(
        "dpo", tmp_path / "trl", tmp_path / "run", *runs.LORA, "max_steps=2", "eval_every=null", "eval_fraction=0", "lr=1e-2"
    )
    assert runs.train(words) == 0
    ours = tmp_path / "run" / "final"
    saved = json.loads((ours / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "trl"), "an adapter names what it was trained on, not what lies below"
    same(logits(loaded(ours / "adapter")), logits(loaded(ours)), logits(loaded(tmp_path / "trl")))
    first = next(row for row in runs.rows(tmp_path / "run") if "loss" in row)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6), "the reference is the adapter's model too"


def test_an_adapter_as_reference_is_not_its_base(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter")
    free = ("max_steps=1", "eval_every=null", "eval_fraction=0")
    losses = []
    for name, words in {"same": (), "base": (f"reference={base}",), "adapter": (f"reference={folder}",)}.items():
        assert runs.train(runs.command("dpo", folder, tmp_path / name, *free, *words)) == 0
        losses.append(next(row["loss"] for row in runs.rows(tmp_path / name) if "loss" in row))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6) and losses[2] == pytest.approx(losses[0], abs=1e-6)
    assert abs(losses[1] - losses[0]) > 1e-3


def test_the_tokenizer_is_the_adapters_own_else_its_bases(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter")
    assert load.load_tokenizer(load.locate(str(folder))).tokenizer.chat_template == tiny.TEMPLATE
    tiny.tokenizer(template="{{ bos_token }}" + tiny.TEMPLATE).save_pretrained(folder)
    assert load.load_tokenizer(load.locate(str(folder))).tokenizer.chat_template == "{{ bos_token }}" + tiny.TEMPLATE


def test_the_fingerprint_covers_adapter_and_base(base: Path, tmp_path: Path) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    folder = rewrite(adapter(base, tmp_path / "adapter"), base_model_name_or_path=str(own))
    found = [load.fingerprint(load.locate(str(folder)))]
    for file in (own / "model.safetensors", folder / "adapter_model.safetensors"):
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        found.append(load.fingerprint(load.locate(str(folder))))
    assert len({*found, load.fingerprint(load.locate(str(own)))}) == 4


def test_a_relative_base_is_found_beside_the_adapter_and_from_here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(base, tmp_path / "run" / "adapter")
    shutil.copytree(base, tmp_path / "run" / "start")
    rewrite(folder, base_model_name_or_path="../start")
    same(logits(loaded(folder)), logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)))
    monkeypatch.chdir(tmp_path)
    assert load.locate(str(rewrite(folder, base_model_name_or_path="run/start"))).base == load.Source("run/start", "run/start")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("/nowhere/model", "the adapter's base model '/nowhere/model' cannot be used: no such model. Put it there, or set"),
        ("", "the adapter names no base model. Set `base_model_name_or_path`"),
        (None, "the adapter names no base model"),
        (".", "the adapter names itself as its base model"),
    ],
)
def test_a_base_that_is_not_there_is_said_in_one_line(name: str | None, what: str, base: Path, tmp_path: Path) -> None:
    folder = rewrite(adapter(base, tmp_path / "adapter"), base_model_name_or_path=name)
    with pytest.raises(UserError) as caught:
        load.locate(str(folder))
    assert what in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_and_an_adapter_that_does_not_fit_are_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        load.locate(str(folder))
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"a pickle \(adapter_model\.bin\).*save_pretrained"):
        load.locate(str(folder))
    renamed = {name.replace("q_proj", "k_proj"): tensor for name, tensor in tensors.items()}
    for odd in (renamed, dict(list(tensors.items())[1:]), {**tensors, "more": torch.zeros(2)}):
        save_file(odd, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match="does not fit its base model") as caught:
            loaded(folder)
        assert "\n" not in str(caught.value)


def test_an_adapter_that_is_no_change_of_weights_is_refused(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(tmp_path / "prompt")
    with pytest.raises(UserError, match="an adapter of kind PROMPT_TUNING cannot be folded"):
        loaded(tmp_path / "prompt")


# ---------------------------------------------------------------- reward models


def ours_scores(model: Any, trees: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        batch = collate(trees)
        return RewardModel(model, head=load.score_head(model)[1])(batch)[batch.present]


def theirs_scores(model: Any, trees: list[Any]) -> torch.Tensor:
    """transformers' own, a row at a time: no padding that could be mistaken for text."""
    with torch.no_grad():
        model.config.pad_token_id = 0
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows_of(trees)])


def test_regression_18_a_reward_models_adapter_brings_its_head(base: Path, tmp_path: Path) -> None:
    folder = adapter(base, tmp_path / "adapter", classifier=True, modules_to_save=["score"])
    model = load.load_classifier(load.locate(str(folder)))
    start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    theirs = PeftModel.from_pretrained(start, folder).eval()
    same(ours_scores(model, ended(TREES)), theirs_scores(theirs, ended(TREES)))
    with pytest.raises(UserError, match="this adapter makes a classifier"):
        loaded(folder)
    two = adapter(base, tmp_path / "two", classifier=True, labels=2, modules_to_save=["score"])
    with pytest.raises(UserError, match="has 2 labels"):
        load.load_classifier(load.locate(str(two)))
    tensors = {n: t for n, t in load_file(folder / "adapter_model.safetensors").items() if "score" not in n}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds no score head, and its base has none"):
        load.load_classifier(load.locate(str(folder)))


@pytest.mark.parametrize("start", ["language model", "classifier"])
def test_regression_18_our_own_reward_adapter_brings_its_head(start: str, base: Path, tmp_path: Path) -> None:
    """`final/adapter` of a run with LoRA is the same reward model as `final`, for us and for peft."""
    model = base
    if start == "classifier":
        model = tmp_path / "classifier"
        torch.manual_seed(3)
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0).save_pretrained(model)
        tiny.tokenizer().save_pretrained(model)
    run = tmp_path / "run"
    assert runs.train(runs.command("reward", model, run, "lora.rank=4", "lora.alpha=8", "max_steps=4")) == 0
    whole = load.load_classifier(load.locate(str(run / "final")))
    again = load.load_classifier(load.locate(str(run / "final" / "adapter")))
    same(ours_scores(again, ended(TREES)), ours_scores(whole, ended(TREES)))
    torch.manual_seed(99)
    start_model = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    theirs = PeftModel.from_pretrained(start_model, run / "final" / "adapter").eval()
    same(theirs_scores(theirs, ended(TREES)), ours_scores(whole, ended(TREES)))


@pytest.fixture(scope="module")
def trl_reward(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A reward model and a reward adapter as TRL's RewardTrainer saves them after a step."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    say = lambda text: [{"role": "user", "content": "Sea?"}, {"role": "assistant", "content": text}]
    quiet = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": [], "max_steps": 1, "save_strategy": "no"}
    made = []
    for name, peft in {"whole": None, "adapter": LoraConfig(task_type="SEQ_CLS", r=4, modules_to_save=["score"])}.items():
        folder = tmp_path_factory.mktemp("trl") / name
        trainer = trl.RewardTrainer(
            model=str(base),
            args=trl.RewardConfig(output_dir=str(folder), learning_rate=0.05, lr_scheduler_type="constant", **quiet),
            train_dataset=datasets.Dataset.from_list([{"chosen": say("Water."), "rejected": say("No.")}]),
            processing_class=tiny.tokenizer(),
            peft_config=peft,
        )
        trainer.train()
        trainer.save_model(str(folder))
        trees = ended(TREES)
        torch.save(theirs_scores(trainer.model.eval(), trees), folder / "scores.pt")
        made.append(folder)
    return made[0], made[1]


@pytest.mark.parametrize("which", [0, 1], ids=["whole", "adapter"])
def test_regression_17_18_a_reward_model_of_trl_scores_as_in_trl_and_trains_on(which: int, trl_reward: Any, tmp_path: Path) -> None:
    """Its tokenizer pads with the token that ends a turn, and every response ends with it."""
    folder = trl_reward[which]
    expected = torch.load(folder / "scores.pt", weights_only=True)
    model = load.load_classifier(load.locate(str(folder)))
    same(ours_scores(model, ended(TREES)), expected)
    assert expected.std() > 1e-3
    words = runs.command("reward", folder, tmp_path / "run", "max_steps=2", "eval_every=null", "eval_fraction=0", "lr=1e-6")
    assert runs.train(words) == 0
    final = load.load_classifier(load.locate(str(tmp_path / "run" / "final")))
    torch.testing.assert_close(ours_scores(final, ended(TREES)), expected, atol=1e-2, rtol=1e-2)


def test_regression_17_a_classifier_whose_pad_ends_turns_scores_at_the_last_token(base: Path, tmp_path: Path) -> None:
    """transformers looks for the last token that is no padding, and would read a response's end as padding."""
    classifier = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    classifier.config.pad_token_id = 2
    shaken(classifier).save_pretrained(tmp_path / "rm")
    tiny.tokenizer().save_pretrained(tmp_path / "rm")
    model = load.load_classifier(load.locate(str(tmp_path / "rm")))
    found = ours_scores(model, ended(TREES))
    same(found, theirs_scores(classifier.eval(), ended(TREES)))
    misread = classifier.config
    misread.pad_token_id = 2
    assert (found - scores_of(classifier, rows_of(ended(TREES)), 2, "right", batch=2)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["value_head.weight", "v_head.summary.weight", "score.weight"])
def test_a_head_under_another_name_is_said_in_one_line(name: str, base: Path, tmp_path: Path) -> None:
    """OpenRLHF's reward models: a language model's config and tensors, and a head beside them."""
    folder = shutil.copytree(base, tmp_path / "rm")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, name: torch.randn(1, 32)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load.load_classifier(load.locate(str(folder)))
    assert f"its head is called {name} [1, 32]" in str(caught.value) and "score.weight" in str(caught.value)
    config = json.loads((folder / "config.json").read_text())
    config.update(architectures=["LlamaForSequenceClassification"], id2label={"0": "reward"}, label2id={"reward": 0})
    (folder / "config.json").write_text(json.dumps(config))
    if name == "score.weight":  # what the advice says
        assert load.load_classifier(load.locate(str(folder))) is not None
        return
    with pytest.raises(
        UserError, match=r"the files hold no score\.weight of a LlamaForSequenceClassification, but .*" + name.split(".")[0]
    ):
        load.load_classifier(load.locate(str(folder)))


def test_regression_33_tensors_that_the_files_lack_never_start_at_random(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "short")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the files hold no lm_head\.weight of a LlamaForCausalLM"):
        loaded(folder)


def test_a_policy_reads_the_same_numbers_through_a_folded_adapter(base: Path, tmp_path: Path) -> None:
    """In a packed row, as training reads it."""
    folder = adapter(base, tmp_path / "adapter")
    ours = LanguageModel(load.load_causal_lm(load.locate(str(folder))))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    expected = []
    for tree in TREES:
        for response in tree.responses:
            with torch.no_grad():
                out = theirs(input_ids=torch.tensor([[*tree.prompt, *response]])).logits[0, len(tree.prompt) - 1 : -1]
            expected.append(torch.log_softmax(out, -1).gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(ours(collate(TREES)), torch.cat(expected), atol=1e-4, rtol=1e-4)
