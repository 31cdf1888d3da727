"""A model as the trainer sees it: token log-probabilities or rewards of a batch, whatever the architecture behind it.

`LanguageModel` and `RewardModel` share one backbone path. The backbone reads the packed row through tree attention where the
architecture takes it, else plain padded rows; both give hidden states at the same places, so nothing downstream knows which it was.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from preftune.models.attention import NAME as TREE
from preftune.models.attention import TreePlan
from preftune.models.logprobs import chunked_logprobs
from preftune.packing.batch import Batch

log = logging.getLogger(__name__)


class Backbone(nn.Module):
    """The decoder without its head: a batch to the hidden states of its packed tokens."""

    def __init__(self, model: Any, *, compute: torch.dtype = torch.float32, packed: bool = True) -> None:
        super().__init__()
        self.hf = model
        self.compute = compute
        self.packed = packed and model.config._attn_implementation == TREE

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """bf16 products over fp32 weights where asked, plain fp32 otherwise."""
        if self.compute == torch.float32:
            yield
        else:
            with torch.autocast(self.device.type, dtype=self.compute):
                yield

    def forward(self, batch: Batch) -> Tensor:
        """[T, D] hidden states, after the final norm, at every packed position."""
        decoder = self.hf.base_model
        with self.precision():
            if self.packed:
                states = decoder(
                    input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, tree=TreePlan(batch.layout)
                )
                return states.last_hidden_state[0]
            ids, mask, positions, index = padded_rows(batch)
            states = decoder(input_ids=ids, attention_mask=mask, use_cache=False, **({"position_ids": positions} if self._positions else {}))
            return states.last_hidden_state.flatten(0, 1)[index]

    @property
    def _positions(self) -> bool:
        return "position_ids" in self.hf.base_model.forward.__code__.co_varnames or not hasattr(self.hf.base_model, "build_alibi_tensor")


def padded_rows(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batch as plain right-padded rows of prompt + response: ids, mask, positions [R, L], and [T] where each packed token stands in them.

    A prompt's tokens are read from its first response's row.
    """
    rows = batch.layout.rows()
    longest = max(p + r for _, p, _, r in rows)
    ids = batch.input_ids.new_zeros((len(rows), longest))
    mask = torch.zeros_like(ids)
    index = torch.empty_like(batch.input_ids)
    for i, (prompt_at, prompt, at, size) in reversed(list(enumerate(rows))):
        ids[i, :prompt] = batch.input_ids[prompt_at : prompt_at + prompt]
        ids[i, prompt : prompt + size] = batch.input_ids[at : at + size]
        mask[i, : prompt + size] = 1
        index[prompt_at : prompt_at + prompt] = torch.arange(prompt, device=index.device) + i * longest
        index[at : at + size] = torch.arange(prompt, prompt + size, device=index.device) + i * longest
    positions = torch.arange(longest, device=ids.device).expand_as(ids)
    return ids, mask, positions, index


class LanguageModel(nn.Module):
    """A causal language model: log-probabilities of the batch's response tokens."""

    def __init__(self, model: Any, *, compute: torch.dtype = torch.float32, packed: bool = True) -> None:
        super().__init__()
        self.backbone = Backbone(model, compute=compute, packed=packed)

    @property
    def hf(self) -> Any:
        """The transformers model inside."""
        return self.backbone.hf

    def forward(self, batch: Batch) -> Tensor:
        """[M] fp32 log-probability of each response token given all before it, at temperature 1."""
        return self.logprobs(self.backbone(batch), batch)

    def logprobs(self, states: Tensor, batch: Batch) -> Tensor:
        """[M] fp32 log-probabilities from the [T, D] hidden states of `batch`."""
        config, head = self.hf.config.get_text_config(), self.hf.get_output_embeddings()
        scale = getattr(config, "logit_scale", None)
        if scale is None:
            divisor = getattr(config, "logits_scaling", None)
            scale = 1.0 / divisor if divisor else 1.0
        return chunked_logprobs(
            states.index_select(0, batch.predict),
            head.weight,
            batch.targets,
            bias=getattr(head, "bias", None),
            scale=scale,
            softcap=getattr(config, "final_logit_softcapping", None),
            compute=self.backbone.compute,
        )


class RewardModel(nn.Module):
    """A backbone with a linear head, read at the last token of each response: the token is found from lengths, never from pad ids."""

    def __init__(self, model: Any, *, head: nn.Linear | None = None, compute: torch.dtype = torch.float32, packed: bool = True) -> None:
        super().__init__()
        self.backbone = Backbone(model, compute=compute, packed=packed)
        width = model.config.get_text_config().hidden_size
        if head is None:
            head = nn.Linear(width, 1, bias=False)
            nn.init.normal_(head.weight, std=1.0 / (width + 1) ** 0.5)
        self.head = head

    @property
    def hf(self) -> Any:
        """The transformers model inside."""
        return self.backbone.hf

    def forward(self, batch: Batch) -> Tensor:
        """[G, N] fp32 rewards, 0 where there is no response."""
        states = self.backbone(batch).index_select(0, batch.last)
        return batch.on_grid(self.head(states.float()).squeeze(-1))
