"""LoRA through peft: adapters train, the frozen weights stay one copy, and the model with its adapter off is the reference."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preftune.errors import UserError
from preftune.models.load import score_head


def merged_state(model: Any) -> dict[str, Tensor] | None:
    """The tensors of a transformers model with its adapter in them, under their plain names; None where it has no adapter.

    New tensors where an adapter adds something, the model's own elsewhere: the model itself stays as it is.
    """
    layers = _layers(model)
    if not layers:
        return None
    found = {}
    for name, value in model.state_dict().items():
        layer, inside, part = name.partition(".base_layer.")
        if inside:
            found[f"{layer}.{part}"] = _merged(layers[layer]) if part == "weight" else value
        elif name.partition(".lora_")[0] not in layers:
            found[name] = value
    return found


def _layers(model: Any) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """A layer's weight with what its adapter adds."""
    found: Tensor = layer.base_layer.weight + sum(layer.get_delta_weight(one) for one in layer.active_adapters)
    return found


class Adapter:
    """A LoRA adapter on a transformers model, which is changed in place. The head, of words or of a score, gets none."""

    def __init__(self, model: Any, *, rank: int, alpha: float, dropout: float, targets: str | tuple[str, ...]) -> None:
        from peft import LoraConfig, get_peft_model

        wanted = targets if isinstance(targets, str) else list(targets)
        options: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": wanted, "bias": "none"}
        if hasattr(model, "prepare_inputs_for_generation"):
            options["task_type"] = "CAUSAL_LM"
        else:
            options["exclude_modules"] = [score_head(model)[0]]
        try:
            with warnings.catch_warnings(action="ignore"):  # what peft still calls by its old name in transformers
                self.peft = get_peft_model(model, LoraConfig(**options))
        except ValueError as error:
            names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise UserError(f"no layer matches {targets}", where="lora.targets", fix=f"Layers are {', '.join(names)}.") from error

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The model without its adapter."""
        with self.peft.disable_adapter():
            yield

    def save(self, path: Path, *, head: nn.Linear | None = None) -> None:
        """Write the adapter alone, for peft; with the `head` that was trained beside it, as the adapter of a sequence classifier."""
        self.peft.save_pretrained(str(path), save_embedding_layers=False)  # never trained, and to ask would mean asking the Hub
        if head is None:
            return
        name = (
            "score" if hasattr(self.peft.base_model.model, "prepare_inputs_for_generation") else score_head(self.peft.base_model.model)[0]
        )
        weights, config = path / "adapter_model.safetensors", path / "adapter_config.json"
        tensors = {f"base_model.model.{name}.{key}": value.detach().cpu() for key, value in head.named_parameters()}
        save_file({**load_file(weights), **tensors}, weights, metadata={"format": "pt"})
        told = {**json.loads(config.read_text()), "task_type": "SEQ_CLS", "modules_to_save": [name]}
        config.write_text(json.dumps(told, indent=2))

    def merge(self) -> Any:
        """Fold the adapter into the weights and return the plain model; the adapter is gone afterwards."""
        return self.peft.merge_and_unload()
