"""Config files: what is accepted, and that everything else is one line with its place and the right key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError
from ruamel.yaml import YAML

from preftune import configfile, configschema
from preftune.configfile import Section
from preftune.errors import UserError
from preftune.training.config import DataConfig, LoraConfig, RunConfig, run_config


class Knobs(Section):
    """Knobs like those of a preference method."""

    beta: float = Field(0.1, gt=0, description="Strength of the pull to the reference.")
    loss: Literal["sigmoid", "hinge"] = Field("sigmoid", description="Shape of the loss.")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="Share of labels taken to be wrong.")


Run = run_config(Knobs, {"lr": 5e-7, "use": "dpo"})
GOOD = "model: m\ndata: a.jsonl\noutput: o\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(text: str, *overrides: str, kind: type[BaseModel] = Run, base: dict[str, Any] | None = None) -> Any:
        Path("c.yaml").write_text(text, encoding="utf-8")
        return configfile.load(kind, Path("c.yaml"), overrides, base=base)

    return run


@pytest.fixture
def refusal(load: Any) -> Any:
    def run(text: str, *overrides: str, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(text, *overrides, **options)
        line = str(caught.value)
        assert "\n" not in line
        return line

    return run


def test_file_overrides_and_defaults_in_this_order(load: Any) -> None:
    config = load(GOOD + "lr: 1e-4\nseed: 3\n", "seed=4", base={"seed": 1, "epochs": 7, "lr": 1.0})
    assert (config.seed, config.lr, config.epochs, config.clip_norm) == (4, 1e-4, 7, 1.0)


def test_method_row_changes_defaults_and_knobs(load: Any) -> None:
    config = load(GOOD)
    assert (config.lr, config.use, config.method) == (5e-7, "dpo", Knobs())
    assert RunConfig.model_fields["lr"].default != 5e-7
    assert Run.model_fields["lr"].description == RunConfig.model_fields["lr"].description


def test_constraints_hold_for_a_default_the_row_changed(refusal: Any) -> None:
    assert "`lr` must be above 0, not -1" in refusal(GOOD, "lr=-1")


@pytest.mark.parametrize(
    ("words", "data"),
    [
        (["data=b.jsonl"], DataConfig(path=("b.jsonl",), limit=3)),
        (["data=[b.jsonl, c.jsonl]"], DataConfig(path=("b.jsonl", "c.jsonl"), limit=3)),
        (["data.path=b.jsonl"], DataConfig(path=("b.jsonl",), limit=3)),
        (["data.limit=null"], DataConfig(path=("a.jsonl",))),
        (["data={on_error: skip}"], DataConfig(path=("a.jsonl",), limit=3, on_error="skip")),
    ],
)
def test_an_override_changes_only_the_key_it_names(load: Any, words: list[str], data: DataConfig) -> None:
    assert load("model: m\ndata:\n  path: a.jsonl\n  limit: 3\noutput: o\n", *words).data == data


def test_override_inside_a_section_given_in_short(load: Any) -> None:
    assert load(GOOD, "data.limit=5").data == DataConfig(path=("a.jsonl",), limit=5)
    assert load(GOOD, "lora.rank=8", "lora.targets=[q_proj, v_proj]").lora == LoraConfig(rank=8, targets=("q_proj", "v_proj"))


def test_python_takes_the_short_form_too() -> None:
    assert Run(model="m", data="a", output="o").data == Run(model="m", data=["a"], output="o").data == DataConfig(path=("a",))


def test_configs_are_frozen(load: Any) -> None:
    with pytest.raises(ValidationError):
        load(GOOD).lr = 1.0


def test_yaml_numbers_and_words(load: Any) -> None:
    config = load(GOOD.replace("output: o", "output: 2026-11-21"), "lr=1e-5", "eps=1e-08", "model=no", "seed=1_000")
    assert (config.lr, config.eps, config.model, config.seed, config.output) == (1e-5, 1e-8, "no", 1000, "2026-11-21")


# --- regression: 34 seeded typos; the right key is proposed -------------------------------------------------------------------

TYPOS = {
    "modle=m": "model",
    "mdoel=m": "model",
    "refrence=x": "reference",
    "dat=x": "data",
    "eval_dta=x": "eval_data",
    "evaldata=x": "eval_data",
    "outpt=o": "output",
    "ouput=o": "output",
    "sed=1": "seed",
    "epoch=1": "epochs",
    "epcohs=1": "epochs",
    "max_step=1": "max_steps",
    "maxsteps=1": "max_steps",
    "prompt_per_step=1": "prompts_per_step",
    "promtps_per_step=1": "prompts_per_step",
    "tokens_per_micro_batch=1": "tokens_per_microbatch",
    "token_per_microbatch=1": "tokens_per_microbatch",
    "max-length=8": "max_length",
    "max_lenght=8": "max_length",
    "rl=1": "lr",
    "lrr=1": "lr",
    "shedule=x": "schedule",
    "warm_up=0": "warmup",
    "weigth_decay=0": "weight_decay",
    "grad_clip_norm=1": "clip_norm",
    "presicion=x": "precision",
    "save_evry=1": "save_every",
    "keep_checkpoint=1": "keep_checkpoints",
    "early_stoping.patience=1": "early_stopping",
    "lora.rnak=1": "lora.rank",
    "data.limt=1": "data.limit",
    "data.onerror=skip": "data.on_error",
    "beta=1": "method.beta",
    "method.bata=1": "method.beta",
}


def test_typos_are_answered_with_the_right_key(refusal: Any) -> None:
    assert len(TYPOS) == 34
    lines = {word: refusal(GOOD, word) for word in TYPOS}
    assert all(f"override '{word}': unknown key" in line for word, line in lines.items())
    right = [word for word, key in TYPOS.items() if f"Did you mean `{key}`?" in lines[word]]
    assert len(right) >= 0.9 * len(TYPOS), sorted(set(TYPOS) - set(right))


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("learning_rate=1", "lr"),
        ("per_device_train_batch_size=1", "prompts_per_step"),
        ("num_train_epochs=1", "epochs"),
        ("output_dir=x", "output"),
        ("model_name_or_path=x", "model"),
        ("max_grad_norm=1", "clip_norm"),
        ("lora_r=1", "lora.rank"),
        ("rank=1", "lora.rank"),
        ("patience=1", "early_stopping.patience"),
        ("method.rank=1", "lora.rank"),
    ],
)
def test_names_of_other_tools_and_other_sections(refusal: Any, word: str, key: str) -> None:
    assert f"Did you mean `{key}`?" in refusal(GOOD, word)


def test_names_of_other_tools_belong_to_real_keys() -> None:
    for section in (RunConfig, *(s for s in map(lambda n: configschema.section_of(RunConfig, n), RunConfig.model_fields) if s)):
        names = getattr(section, "known_as", {})
        assert set(names) <= set(section.model_fields)
        assert not {alias for words in names.values() for alias in words.split()} & set(section.model_fields)


def test_a_word_like_no_key_gets_no_proposal(refusal: Any) -> None:
    assert "Did you mean" not in refusal(GOOD, "zzzz=1")
    assert refusal(GOOD, "method.zzzz=1").endswith("The keys of `method` are beta, loss, label_smoothing.")


# --- places -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "start"),
    [
        (GOOD + "lrate: 1\n", "c.yaml:4:1: unknown key `lrate`"),
        (GOOD + "# note\nmethod:\n  beta: 0.1\n  bta: 1\n", "c.yaml:7:3: unknown key `method.bta`. Did you mean `method.beta`?"),
        (GOOD + "method: {beta: x}\n", "c.yaml:4:16: `method.beta` must be a number, not the text 'x'"),
        (GOOD + "seed: '3'\n", "c.yaml:4:7: `seed` must be a whole number, not the text '3'"),
        (GOOD + "seed: 1.0\n", "c.yaml:4:7: `seed` must be a whole number, not 1.0"),
        (GOOD + "seed: true\n", "c.yaml:4:7: `seed` must be a whole number, not true"),
        (GOOD + "lr: [1]\n", "c.yaml:4:5: `lr` must be a number, not a list"),
        (GOOD + "gradient_checkpointing: 1\n", "c.yaml:4:25: `gradient_checkpointing` must be true or false, not 1"),
        (GOOD + "max_steps: few\n", "c.yaml:4:12: `max_steps` must be a whole number or null, not the text 'few'"),
        (GOOD + "precision: fp16\n", "c.yaml:4:12: `precision` must be one of auto, fp32, bf16, not the text 'fp16'"),
        (
            GOOD + "schedule: cosin\n",
            "c.yaml:4:11: `schedule` must be one of cosine, linear, constant, not the text 'cosin'. Did you mean cosine?",
        ),
        (GOOD + "lora: yes\n", "c.yaml:4:7: `lora` must be a mapping of `key: value` or null, not the text 'yes'"),
        (GOOD + "lora:\n  targets: 3\n", "c.yaml:5:12: `lora.targets` must be all-linear or a list, not 3"),
        (GOOD + "betas: [0.9, x]\n", "c.yaml:4:14: `betas.1` must be a number, not the text 'x'"),
        (GOOD + "betas: [0.9]\n", "c.yaml:4:8: `betas` has too few values"),
        (GOOD + "eps: .nan\n", "c.yaml:4:6: `eps` must be a finite number, not NaN"),
        (GOOD + "epochs: 0\n", "c.yaml:4:9: `epochs` must be at least 1, not 0"),
        (GOOD + "max_length: 1\n", "c.yaml:4:13: `max_length` must be at least 2, not 1"),
        (GOOD + "warmup: 3\n", "c.yaml:4:9: `warmup` must be at most 1, not 3"),
        ("model: m\ndata: [a, 3]\noutput: o\n", "c.yaml:2:11: `data.path.1` must be text, not 3"),
        ("model: m\ndata: []\noutput: o\n", "c.yaml:2:7: `data.path` has too few values"),
        ("model: ''\ndata: a\noutput: o\n", "c.yaml:1:8: `model` must not be empty"),
        ("model: m\ndata: a\noutput:\n", "c.yaml:3:1: `output` must be text, not nothing (null)"),
        ("model: m\ndata: a\n", "c.yaml: `output` is missing. Give it in the config file, or as output=VALUE."),
        (GOOD + "early_stopping: {patience: 2}\n", "c.yaml:4:1: `early_stopping.metric` is missing"),
        (GOOD + "method.beta: 1\n", "c.yaml:4:1: unknown key `method.beta`. In a file, write `method:` and under it `beta:`."),
        (GOOD + "seed: 1\nseed: 2\n", "c.yaml:5:1: `seed` is given twice, first at c.yaml:4:1"),
        (GOOD + "method: {beta: 1, beta: 2}\n", "c.yaml:4:19: `method.beta` is given twice, first at c.yaml:4:10"),
        ("- a\n- b\n", "c.yaml:1:1: a config is a mapping of `key: value` lines, not a list"),
        ("just text\n", "c.yaml:1:1: a config is a mapping of `key: value` lines, not the text 'just text'"),
        ("a: [1\nb: 2\n", "c.yaml:2:2: not valid YAML"),
        ("model: m\n\tdata: a\n", "c.yaml:2:1: not valid YAML"),
        ("model: m: n\n", "c.yaml:1:9: not valid YAML"),
        (GOOD + "---\na: 1\n", "c.yaml:4:1: not valid YAML: but found another document. A config is one document: remove the `---`."),
        (GOOD + "x: &a [*a]\n", "c.yaml:4:4: an alias refers to the part that holds it"),
        (GOOD + "lr: !!python/name:os.system x\n", "c.yaml:4:5: the tag tag:yaml.org,2002:python/name:os.system is not allowed"),
        (GOOD + "? [a, b]\n: 1\n", "c.yaml:4:3: a key must be a word"),
        (GOOD + "lr: " + "[" * 1200 + "\n", "c.yaml"),
        ("a: \0\n", "c.yaml: not valid YAML"),
    ],
)
def test_the_place_and_the_reason(refusal: Any, text: str, start: str) -> None:
    assert refusal(text).startswith(start)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["lr"], "override 'lr': not a setting. Write key=value, for instance lr=1e-5 or data.limit=100."),
        (["=1"], "override '=1': not a setting."),
        (["lr=1", "lr=2"], "override 'lr=2': `lr` is given twice, first as 'lr=1'"),
        (["lr=x"], "override 'lr=x': `lr` must be a number, not the text 'x'"),
        (["lr=@"], "override 'lr=@': not valid YAML"),
        (["lr.x=1"], "override 'lr.x=1': `lr` must be a number, not a mapping"),
        (["data=3"], "override 'data=3': `data` must be text or a list or a mapping of `key: value`, not 3"),
        (["model="], "override 'model=': `model` must be text, not nothing (null)"),
        (["method.beta=-1"], "override 'method.beta=-1': `method.beta` must be above 0, not -1"),
    ],
)
def test_overrides_name_themselves(refusal: Any, words: list[str], line: str) -> None:
    assert refusal(GOOD, *words).startswith(line)


def test_an_override_on_a_bad_value_in_the_file_is_the_one_blamed(refusal: Any) -> None:
    assert refusal(GOOD + "betas: [0.9, x]\n", "betas=[y, 0.9]").startswith("override 'betas=[y, 0.9]': `betas.0`")
    assert refusal(GOOD + "betas: [0.9, 0.99]\n", "betas=[0.9]") == "override 'betas=[0.9]': `betas` has too few values"


def test_the_first_problem_in_reading_order_and_the_number_of_others(refusal: Any) -> None:
    line = refusal(GOOD + "seed: x\nlr: y\nbta: 1\n", "epochs=z")
    assert line == "c.yaml:4:7: `seed` must be a whole number, not the text 'x'. (and 3 more)"


def test_a_list_with_a_bad_item_is_one_problem(refusal: Any) -> None:
    assert refusal(GOOD, "data=[3]") == "override 'data=[3]': `data.path.0` must be text, not 3"


def test_a_misspelt_required_key_is_one_problem_not_two(refusal: Any) -> None:
    assert refusal(GOOD.replace("model", "modle")) == "c.yaml:1:1: unknown key `modle`. Did you mean `model`?"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    good = tmp_path / "recipe.yaml"
    good.write_text(GOOD)
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    expected = {
        "recpie.yaml": f"there is no such file. Did you mean {good}?",
        "latin.yaml": "not UTF-8 text: byte 10 is 0xe9",
        ".": "cannot be read: Is a directory",
    }
    for name, reason in expected.items():
        with pytest.raises(UserError) as caught:
            configfile.load(Run, tmp_path / name, [])
        assert str(caught.value) == f"{tmp_path / name}: {reason}"


def test_no_file_and_nothing_given() -> None:
    with pytest.raises(UserError, match=r"^`model` is missing. Give it in the config file, or as model=VALUE. \(and 2 more\)$"):
        configfile.load(Run, None, [])


# --- regression 34: an option that another one makes useless is an error -------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["eval_data=b", "eval_fraction=0.1"], "override 'eval_fraction=0.1': `eval_fraction` has no effect beside `eval_data`"),
        (["eval_every=5"], "override 'eval_every=5': `eval_every` needs records to evaluate on"),
        (["eval_fraction=0.1", "early_stopping.metric=loss"], "`early_stopping` needs `eval_every`"),
        (["eval_fraction=0.1", "best_metric=loss"], "override 'best_metric=loss': `best_metric` needs `eval_every`"),
        (["best_mode=max"], "override 'best_mode=max': `best_mode` has no effect without `best_metric`"),
        (["schedule=constant", "min_lr_ratio=0.5"], "override 'min_lr_ratio=0.5': `min_lr_ratio` has no effect with `schedule: constant`"),
        (["max_length=8192"], "override 'max_length=8192': `tokens_per_microbatch` (4096) must be at least `max_length` (8192)"),
        (["tokens_per_microbatch=512"], "override 'tokens_per_microbatch=512': `tokens_per_microbatch` (512) must be at least"),
        (
            ["eval_fraction=0.1", "eval_every=2", "best_metric=acc", "best_mode=max", "early_stopping.metric=acc"],
            "override 'best_metric=acc': `best_metric` and `best_mode` differ from those of `early_stopping`",
        ),
    ],
)
def test_regression_34_contradictions(refusal: Any, words: list[str], reason: str) -> None:
    assert reason in refusal(GOOD, *words)


def test_regression_34_a_reference_for_a_method_without_one(load: Any, refusal: Any) -> None:
    alone = run_config(Knobs, {}, compares=lambda knobs: False)
    for word in ("reference=base", "cache_reference=true"):
        assert refusal(GOOD, word, kind=alone).startswith(f"override '{word}': `{word.partition('=')[0]}` has no effect")
        load(GOOD, word)
    load(GOOD, kind=alone)


def test_the_same_options_without_the_contradiction(load: Any) -> None:
    words = ["eval_fraction=0.1", "eval_every=2", "best_metric=acc", "best_mode=max", "early_stopping={metric: acc, mode: max}"]
    assert load(GOOD, *words).early_stopping.mode == "max"
    assert load(GOOD, "max_length=8192", "tokens_per_microbatch=8192").max_length == 8192
    assert load(GOOD, "schedule=constant").schedule == "constant"


def test_rows_that_are_wrong_are_the_programmer_s_error() -> None:
    class Loose(BaseModel):
        beta: float = 0.1

    with pytest.raises(TypeError, match="Loose must be frozen"):
        run_config(Loose, {})
    with pytest.raises(TypeError, match="bta"):
        run_config(Knobs, {"bta": 1})
    with pytest.raises(ValidationError):
        run_config(Knobs, {"lr": -1.0})(model="m", data="d", output="o")


# --- written out --------------------------------------------------------------------------------------------------------------

_text = st.text(min_size=1, max_size=30).filter(lambda s: not any(0xD800 <= ord(c) <= 0xDFFF for c in s))
_positive = st.floats(min_value=1e-300, max_value=1e300)


@settings(deadline=None, max_examples=50)
@given(model=_text, paths=st.lists(_text, min_size=1, max_size=3), lr=_positive, beta=_positive, seed=st.integers(0, 2**32 - 1))
def test_to_yaml_is_read_back_equal(tmp_path_factory: Any, model: str, paths: list[str], lr: float, beta: float, seed: int) -> None:
    path = tmp_path_factory.mktemp("yaml") / "c.yaml"
    config = Run(model=model, data=paths, output="null", lr=lr, seed=seed, schedule="constant", method=Knobs(beta=beta), lora=LoraConfig())
    path.write_text(configfile.to_yaml(config), encoding="utf-8")
    assert configfile.load(Run, path, []) == config


def test_template_holds_every_key_and_loads_when_filled_in(tmp_path: Path) -> None:
    text = configschema.template(Run)
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert configfile.load(Run, path, ["model=m", "data=d", "output=o"]) == Run(model="m", data="d", output="o")
    optional = "eval_data|early_stopping|lora|reference_sync"
    opened = re.sub(rf"(?m)^# (?=  |(?:{optional}):)", "", re.sub(rf"(?m)^({optional}): null$", "", text))
    everything = YAML(typ="safe", pure=True).load(opened)
    assert list(everything) == list(Run.model_fields)
    assert list(everything["lora"].items()) == [("rank", 16), ("alpha", 32.0), ("dropout", 0.0), ("targets", "all-linear")]
    assert everything["method"] == {"beta": 0.1, "loss": "sigmoid", "label_smoothing": 0.0}
    for row in configschema.keys(Run):
        assert row.doc, row.key
        assert f"# {row.doc} ({row.holds})" in text


def test_json_schema_accepts_the_short_forms() -> None:
    schema = configfile.json_schema(Run)
    data = schema["$defs"]["DataConfig"]["anyOf"]
    assert [form["type"] for form in data] == ["string", "array", "object"]
    assert schema["additionalProperties"] is False
    assert sorted(schema["required"]) == ["data", "model", "output"]
    assert schema["properties"]["lr"]["default"] == 5e-7
