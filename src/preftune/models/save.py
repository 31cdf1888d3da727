"""Save models as plain Hugging Face directories: a causal LM, or a reward model as a sequence classifier with a label for each head."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from preftune.errors import UserError
from preftune.models.load import quiet, score_head
from preftune.models.lora import Adapter, merged_state
from preftune.models.policy import LanguageModel, RewardModel
from preftune.models.scoring import KEY
from preftune.packing.chat import ChatTokenizer


class NoClassifier(UserError):
    """A model of which no sequence classifier can be made that transformers reads."""


def save_model(model: LanguageModel | RewardModel, tokenizer: ChatTokenizer, path: Path, *, adapter: Adapter | None = None) -> None:
    """Write the model to `path`, whole or not at all; an adapter is folded in, and written beside as `adapter/`.

    `transformers` loads the directory and gives equal outputs. The model is left with its adapter merged; a language model whose adapter is
    not handed over is written with it folded in all the same, and is left as it was. Raises NoClassifier for a
    reward model that could not be read again.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with quiet():
            _write(model, tokenizer, temporary, adapter)
        for written in (*temporary.rglob("*"), temporary):
            _sync(written)
        shutil.rmtree(path, ignore_errors=True)
        os.rename(temporary, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(model: LanguageModel | RewardModel, tokenizer: ChatTokenizer, path: Path, adapter: Adapter | None) -> None:
    if adapter is not None:
        adapter.save(path / "adapter", head=model.head if isinstance(model, RewardModel) else None)
        model.backbone.hf = adapter.merge()
    if isinstance(model, RewardModel):
        _save_classifier(model, tokenizer, path)
    else:
        with _config_of(model.hf, _plain_config(model.hf)):
            model.hf.save_pretrained(path, state_dict=merged_state(model.hf))
        tokenizer.tokenizer.save_pretrained(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain_config(model: Any) -> Any:
    """The config as it was before loading changed it: dropout rates back, no attention of ours."""
    config = copy.deepcopy(model.config)
    for key, value in getattr(model, "preftune_dropouts", {}).items():
        setattr(config, key, value)
    config._attn_implementation = None
    return config


class _config_of:
    """Let a model carry another config while it is saved."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config

    def __enter__(self) -> None:
        self.before, self.model.config = self.model.config, self.config

    def __exit__(self, *_: object) -> None:
        self.model.config = self.before


def pad_token(tokenizer: ChatTokenizer) -> int:
    """A token id for padding that ends no turn: a classifier finds the last token as the last one that is not padding."""
    inner = tokenizer.tokenizer
    candidates = [inner.pad_token_id, inner.unk_token_id, *sorted(inner.all_special_ids)]
    for candidate in candidates:
        if candidate is not None and candidate not in tokenizer.turn_ends and candidate != inner.bos_token_id:
            return int(candidate)
    raise NoClassifier("the tokenizer has no special token that could pad without ending a turn", where="model")


def _save_classifier(model: RewardModel, tokenizer: ChatTokenizer, path: Path) -> None:
    config = _plain_config(model.hf)
    pad = pad_token(tokenizer)
    labels = model.scoring.attributes or ("reward",)
    config.num_labels = len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {label: n for n, label in enumerate(labels)}
    config.__dict__.pop(KEY, None)  # of the model that training started from
    if scoring := model.scoring.to_config():
        setattr(config, KEY, scoring)
    config.problem_type = "regression"
    config.get_text_config().pad_token_id = pad
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise NoClassifier(f"transformers has no sequence classifier for {type(config).__name__}", where="model") from error
    name, _ = score_head(classifier)
    prefix = classifier.base_model_prefix
    state = {f"{prefix}.{key}": value for key, value in model.hf.base_model.state_dict().items()}
    state[f"{name}.weight"] = model.head.weight.detach()
    if model.head.bias is not None:
        state[f"{name}.bias"] = model.head.bias.detach()
    classifier.config.architectures = [type(classifier).__name__]
    classifier.save_pretrained(path, state_dict=state)
    saved = copy.deepcopy(tokenizer.tokenizer)
    saved.pad_token_id = pad
    saved.save_pretrained(path)
