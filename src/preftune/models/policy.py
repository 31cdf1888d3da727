"""A model as the trainer sees it: token log-probabilities or rewards of a batch, whatever the architecture behind it.

`LanguageModel` and `RewardModel` share one backbone path. The backbone reads the packed row through tree attention where the
architecture takes it, else plain padded rows; both give hidden states at the same places, so nothing downstream knows which it was.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preftune.errors import UserError
from preftune.models.attention import NAME as TREE
from preftune.models.attention import TreePlan
from preftune.models.lean import make_lean, only_read
from preftune.models.logprobs import chunked_logprobs, chunked_logprobs_and_entropy
from preftune.models.scoring import Scoring, scoring_of
from preftune.packing.batch import Batch, collate
from preftune.packing.chat import Tree

log = logging.getLogger(__name__)


class Backbone(nn.Module):
    """The decoder without its head: a batch to the hidden states of its packed tokens."""

    def __init__(self, model: Any, *, compute: torch.dtype = torch.float32, packed: bool = True) -> None:
        super().__init__()
        make_lean(model)
        self.hf = model
        self.compute = compute
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        self.use_packed(packed and model.config._attn_implementation == TREE)

    def use_packed(self, packed: bool) -> None:
        """Read batches as one packed row (tree attention) or as padded rows (the architecture's own attention)."""
        self.packed = packed
        config = self.hf.config.get_text_config()
        own = "eager" if getattr(config, "attn_logit_softcapping", None) or not self.hf._supports_sdpa else "sdpa"
        wanted = TREE if packed else own
        if self.hf.config._attn_implementation != wanted:
            self.hf.set_attn_implementation(wanted)

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

    def forward(self, batch: Batch, read: Tensor | None = None) -> Tensor:
        """[T, D] hidden states, after the final norm, of the packed tokens; only of those that will be `read` [M], where that is told."""
        decoder = self.hf.base_model
        with self.precision(), only_read(decoder, read if self.packed else None):
            if self.packed:
                states = decoder(
                    input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, tree=TreePlan(batch.layout)
                )
                return states.last_hidden_state[0]
            ids, mask, positions, index = padded_rows(batch)
            places = {"position_ids": positions} if self._takes_positions else {}
            states = decoder(input_ids=ids, attention_mask=mask, use_cache=False, **places)
            return states.last_hidden_state.flatten(0, 1)[index]


def padded_rows(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The batch as plain right-padded rows of prompt + response.

    Returns ids, mask and positions, each [R, L], and [T] where each packed token stands in the flattened rows.
    A prompt's tokens are read from its first response's row.
    """
    rows, packed = batch.layout.rows(), batch.layout.spread(batch.input_ids)
    longest = max(p + r for _, p, _, r in rows)
    ids = packed.new_zeros((len(rows), longest))
    mask = torch.zeros_like(ids)
    index = torch.empty_like(packed)
    for i, (prompt_at, prompt, at, size) in reversed(list(enumerate(rows))):
        ids[i, :prompt] = packed[prompt_at : prompt_at + prompt]
        ids[i, prompt : prompt + size] = packed[at : at + size]
        mask[i, : prompt + size] = 1
        index[prompt_at : prompt_at + prompt] = torch.arange(prompt, device=index.device) + i * longest
        index[at : at + size] = torch.arange(prompt, prompt + size, device=index.device) + i * longest
    positions = torch.arange(longest, device=ids.device).expand_as(ids)
    return ids, mask, positions, batch.layout.gathered(index)


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
        """[M] fp32 log-probability of each response token given all before it, at the batch's temperature."""
        batch = batch.predicting
        return token_logprobs(self.backbone, self.backbone(batch, batch.predict), batch)


def token_logprobs(backbone: Backbone, states: Tensor, batch: Batch) -> Tensor:
    """[M] fp32 log-probabilities from the [T, D] hidden states of `batch`, through the language head of the model inside."""
    return chunked_logprobs(**_of_tokens(backbone, states, batch))


def token_logprobs_and_entropy(backbone: Backbone, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """What `token_logprobs` gives, and the [M] entropy (nats) of the distributions that the tokens come from."""
    return chunked_logprobs_and_entropy(**_of_tokens(backbone, states, batch))


def _of_tokens(backbone: Backbone, states: Tensor, batch: Batch) -> dict[str, Any]:
    weight, options = language_head(backbone)
    options["scale"] /= batch.temperature
    return {"hidden": states.index_select(0, batch.predict), "weight": weight, "targets": batch.targets, **options}


def language_head(backbone: Backbone) -> tuple[Tensor, dict[str, Any]]:
    """The [V, D] weight of the language head, and what else makes logits of hidden states: bias, scale, soft cap, type of the products."""
    config, head = backbone.hf.config.get_text_config(), backbone.hf.get_output_embeddings()
    scale = getattr(config, "logit_scale", None)
    if scale is None:
        divisor = getattr(config, "logits_scaling", None)
        scale = 1.0 / divisor if divisor else 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return head.weight, {"bias": getattr(head, "bias", None), "scale": scale, "softcap": softcap, "compute": backbone.compute}


class RewardModel(nn.Module):
    """A backbone with a linear head, read at the last token of each response: the token is found from lengths, never from pad ids."""

    head: nn.Linear

    def __init__(
        self,
        model: Any,
        *,
        head: nn.Linear | None = None,
        heads: int = 1,
        scoring: Scoring | None = None,
        compute: torch.dtype = torch.float32,
        packed: bool = True,
    ) -> None:
        """With `head` a saved one, whose scoring the model's config holds; else a new one of so many `heads`. `scoring` replaces both's."""
        super().__init__()
        self.backbone = Backbone(model, compute=compute, packed=packed)
        width = model.config.get_text_config().hidden_size
        if head is None:
            head = nn.Linear(width, heads, bias=False)
            nn.init.normal_(head.weight, std=1.0 / (width + 1) ** 0.5)
            scoring = scoring or Scoring(attributes=tuple(f"reward_{n}" for n in range(heads)) if heads > 1 else ())
        self.head = head
        self.scoring = scoring or scoring_of(model.config, head.out_features)

    @property
    def hf(self) -> Any:
        """The transformers model inside."""
        return self.backbone.hf

    def forward(self, batch: Batch) -> Tensor:
        """[G, N] fp32 rewards, 0 where there is no response; [G, N, A] of a model with A > 1 heads."""
        return self._rewards(self.backbone(batch, batch.last), batch)

    def score(self, batch: Batch, flagged: Tensor | None = None) -> Tensor:
        """[G, N] fp32 the one score of each response, heads combined and put on a scale as `scoring` says; 0 where there is no response.

        `flagged`, [G] booleans, marks the safety prompts of Llama 2's rule.
        """
        combined = self.scoring.combine(self(batch), None if flagged is None else flagged[:, None])
        return self.scoring.scale(combined).masked_fill(~batch.present, 0.0)

    def with_logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rewards as `forward` gives them and [M] token log-probabilities by the language head, from one pass of the backbone."""
        states = self.backbone(batch, torch.cat([batch.last, batch.predict]))
        return self._rewards(states, batch), token_logprobs(self.backbone, states, batch)

    def _rewards(self, states: Tensor, batch: Batch) -> Tensor:
        scores = self.head(states.index_select(0, batch.last).float())
        return batch.on_grid(scores if scores.shape[1] > 1 else scores.squeeze(-1))


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference in hidden states, relative to their size, between two correct ways to compute them."""


def probe_trees(vocabulary: int) -> list[Tree]:
    """Two small trees of arbitrary tokens that begin alike, on which two ways to read a batch can be compared."""
    rng = np.random.default_rng(0)
    draw = lambda n: np.asarray(rng.integers(0, vocabulary, n))
    shapes, alike = ((7, (4, 2, 5)), (3, (6,))), draw(10)
    made = []
    for p, rs in shapes:
        prompt, responses, n = np.concatenate([alike, draw(p)]), tuple(draw(r) for r in rs), len(rs)
        made.append(Tree("probe", "", prompt, responses, (True,) * n, np.zeros(n), np.zeros((n, n))))
    return made


def layout_gap(model: LanguageModel | RewardModel, trees: Sequence[Tree]) -> float:
    """Largest difference between packed and padded hidden states, relative to the largest padded one. Leaves the layout as it was."""
    batch = collate(trees).to(model.backbone.device)
    before = model.backbone.packed
    try:
        with torch.no_grad():
            model.backbone.use_packed(False)
            padded = model.backbone(batch).float()
            model.backbone.use_packed(True)
            packed = model.backbone(batch).float()
    finally:
        model.backbone.use_packed(before)
    return float((packed - padded).abs().max() / padded.abs().max().clamp(min=1e-6))


def settle_layout(model: LanguageModel | RewardModel) -> str | None:
    """Keep the packed row where it gives this model's own numbers, else fall back to padded rows; returns the notice to show, if any.

    Raises UserError where the log-probabilities differ from the model's own logits: its head does something this toolkit does not know.
    """
    trees = probe_trees(min(model.hf.config.get_text_config().vocab_size, 1000))
    notice = None
    if model.backbone.packed:
        try:
            gap = layout_gap(model, trees)
            reason = f"packed and padded rows differ by {gap:.1e}" if not gap < TOLERANCE[model.backbone.compute] else None
        except Exception as error:  # whatever an unknown architecture raises, padded rows still work
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        if reason:
            model.backbone.use_packed(False)
            notice = reason
    else:
        notice = "its attention does not go through transformers' attention interface"
    if isinstance(model, LanguageModel):
        _check_head(model, trees)
    if notice:
        notice = f"{type(model.hf).__name__} is read as padded rows instead of one packed row ({notice}): same numbers, more tokens."
    return notice


def _check_head(model: LanguageModel, trees: Sequence[Tree]) -> None:
    batch = collate(trees[1:]).to(model.backbone.device)
    with torch.no_grad():
        ours = model(batch)
        packed = model.backbone.packed
        model.backbone.use_packed(False)
        with model.backbone.precision():
            logits = model.hf(input_ids=batch.input_ids[None], use_cache=False).logits[0].float()
        model.backbone.use_packed(packed)
    theirs = torch.log_softmax(logits, -1)[batch.predict, batch.targets]
    gap = float((ours - theirs).abs().max())
    if not gap < 20 * TOLERANCE[model.backbone.compute]:
        raise UserError(
            f"log-probabilities of {type(model.hf).__name__} differ by {gap:.2g} from its own logits: its output head is not supported",
            where="model",
            fix="Please report the architecture.",
        )
