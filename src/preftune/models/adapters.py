"""A peft adapter as a model to start from: which base it names, and folding it in. What is read is safetensors and JSON, never a pickle."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import safe_open

from preftune.errors import UserError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, and no whole model beside it."""
    return (folder / CONFIG).is_file() and not any((*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")))


def _setting(folder: Path, key: str) -> Any:
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"not an adapter's config: {str(error).splitlines()[0]}", where=str(folder / CONFIG)) from error


def base_name(folder: Path) -> str:
    """What the adapter calls its base, a relative path of the adapter's folder made whole. Raises UserError where it names none."""
    name = _setting(folder, "base_model_name_or_path")
    if not isinstance(name, str) or not name:
        what = "the adapter names no base model"
        raise UserError(what, where=str(folder / CONFIG), fix="Set `base_model_name_or_path` to the model that it was trained on.")
    beside = folder / Path(name).expanduser()
    if beside.resolve() == folder.resolve():
        raise UserError("the adapter names itself as its base model", where=str(folder / CONFIG))
    return str(beside) if beside.exists() else name


def classifies(folder: Path) -> bool:
    """Whether it adapts a sequence classifier, as the adapter of a reward model does."""
    return _setting(folder, "task_type") == "SEQ_CLS"


def shapes(file: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor in a safetensors file, from its header alone."""
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118


def require_weights(folder: Path) -> None:
    """Raises UserError where the adapter's weights are not there as safetensors."""
    if (folder / WEIGHTS).is_file():
        return
    if (folder / "adapter_model.bin").is_file():
        what = "the adapter's weights are a pickle (adapter_model.bin), and reading one can run code"
        raise UserError(what, where=str(folder), fix="Save it again with peft's `save_pretrained`, which writes safetensors.")
    raise UserError(f"the adapter's folder holds no {WEIGHTS}", where=str(folder))


def head(folder: Path) -> tuple[str, int]:
    """Name and number of labels of the classifier's head that was trained whole beside the adapter. Raises UserError where none was."""
    for name, shape in shapes(folder / WEIGHTS).items():
        module = name.removesuffix(".weight").rpartition(".")[2]
        if module in {"score", "classifier"} and len(shape) == 2:
            return module, shape[0]
    fix = "Train it with `modules_to_save` naming the head."
    raise UserError("the adapter of a reward model holds no score head, and its base has none", where=str(folder), fix=fix)


def fold(model: Any, folder: Path) -> Any:
    """The model with the adapter in its weights, a plain transformers model again; changed in place.

    Raises UserError for an adapter that cannot be folded in (prompt tuning, say) or that does not fit this model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with warnings.catch_warnings(action="ignore"):  # of missing keys, which are errors here
            adapted = PeftModel.from_pretrained(model, str(folder))
        if not hasattr(adapted, "merge_and_unload") or not hasattr(adapted.base_model, "merge_adapter"):
            raise UserError(f"an adapter of kind {_setting(folder, 'peft_type')} cannot be folded into weights", where=str(folder))
        held, wanted = set(shapes(folder / WEIGHTS)), set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        odd = sorted(held - wanted - set(adapted.state_dict())) + sorted(wanted - held)
        if odd:
            what = f"the adapter does not fit its base model: {len(odd)} tensors have no counterpart, for instance {odd[0]}"
            raise UserError(what, where=str(folder), fix="Check `base_model_name_or_path` in its adapter_config.json.")
        return adapted.merge_and_unload().requires_grad_(True)  # peft had frozen it
    except UserError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter does not fit its base model: {text}", where=str(folder)) from error
