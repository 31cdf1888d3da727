"""Sampling for models whose attention does not take a packed row: left-padded rows with transformers' own cache, the same draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from preftune.models.logprobs import finished
from preftune.models.policy import language_head
from preftune.rollout.samples import Row, Sample
from preftune.rollout.sampling import Sampling, draw, uniforms
from preftune.rollout.weights import product

if TYPE_CHECKING:
    from preftune.rollout.engine import Engine

ROWS = 32
"""Responses in a batch at most."""


def generate(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[Sequence[int]],
    order: Sequence[int],
    sampling: Sampling,
    seed: int,
    give_up: Callable[[], bool],
) -> Iterator[Sample]:
    """The samples of `Engine.generate`, batch by batch; a response that ends leaves its batch, none joins it."""
    rows = [(i, number) for i in order for number in asked[i]]
    for start in range(0, len(rows), ROWS):
        yield from _batch(engine, prompts, rows[start : start + ROWS], sampling, seed, give_up)


def _batch(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[tuple[int, int]],
    sampling: Sampling,
    seed: int,
    give_up: Callable[[], bool],
) -> Iterator[Sample]:
    device, backbone = engine.model.backbone.device, engine.model.backbone
    longest = max(len(prompts[i]) for i, _ in rows)
    ids = torch.zeros((len(rows), longest), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for at, (i, _) in enumerate(rows):
        ids[at, longest - len(prompts[i]) :] = torch.tensor(prompts[i], device=device)
        mask[at, longest - len(prompts[i]) :] = 1
    seen: Tensor | None = None
    weight, options = language_head(backbone)
    times = product(weight.to(options["compute"]))
    if sampling.repetition_penalty != 1:
        seen = torch.zeros((len(rows), weight.shape[0]), dtype=torch.bool, device=device)
        for at, (i, _) in enumerate(rows):
            seen[at, torch.tensor(prompts[i], device=device)] = True
    live = [Row(i, n, uniforms(seed, prompts[i], n, engine.room(prompts[i], sampling))) for i, n in rows]
    cache: Any = None
    step = ids
    while live:
        if give_up():
            return
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        places = {"position_ids": positions} if backbone._takes_positions else {}
        with backbone.precision():
            out = backbone.hf.base_model(input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True, **places)
        cache = out.past_key_values
        uniform = torch.tensor([row.uniform[len(row.ids)] for row in live], dtype=torch.float64, device=device)
        shaped = finished(times(out.last_hidden_state[:, -1].to(options["compute"])), **options)[0]
        tokens, logp, drawn = draw(shaped.float(), uniform, sampling, seen)
        if seen is not None:
            seen[torch.arange(len(live), device=device), tokens] = True
        staying = engine.advance(live, tokens, logp, drawn)
        yield from (row.sample() for row in live if row.finish is not None)
        index = torch.tensor(staying, dtype=torch.long, device=device)
        if len(staying) < len(live):
            if not staying:
                return
            cache.batch_select_indices(index)
            mask, tokens, seen = mask[index], tokens[index], None if seen is None else seen[index]
            live = [live[at] for at in staying]
        step = tokens.unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
