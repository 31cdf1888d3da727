"""A model as another program reads it: a plain Hugging Face folder with safetensors, and the ids that end a turn by its own settings."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, GenerationConfig

from preftune.models import load
from preftune.models.policy import LanguageModel
from preftune.models.save import save_model
from preftune.packing.chat import ChatTokenizer


def plain_folder(source: load.Source, tokenizer: ChatTokenizer, scratch: Path) -> str:
    """The model's own folder or Hub id where it is plain; else (an adapter, other weights) it is written to `scratch`."""
    source = source.plain
    root = Path(source.path)
    plain = not root.is_dir() or any(root.glob("*.safetensors"))
    if plain and source.gguf is None and source.base is None:
        return str(root.resolve()) if root.is_dir() else source.path
    save_model(LanguageModel(load.load_causal_lm(source)), tokenizer, scratch / "model")
    return str((scratch / "model").resolve())


def turn_ends(folder: str) -> frozenset[int]:
    """The ids that end a turn according to the generation config in a folder, else to the model's."""
    try:
        found = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):
        found = None
    if found is None:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config().eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
