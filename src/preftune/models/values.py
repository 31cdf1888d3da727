"""One number for each response of many records: a reward model's score, or a language model's summed log-probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from preftune.models.policy import LanguageModel, RewardModel
from preftune.packing.batch import collate, microbatches
from preftune.packing.chat import Tree

Values = list[np.ndarray]
"""One [N] array a tree."""


@torch.no_grad()
def response_values(
    model: LanguageModel | RewardModel, trees: Sequence[Tree], budget: int = 4096, on_done: Callable[[int], None] = lambda done: None
) -> Values:
    """Scores of the responses under a reward model, or their summed log-probabilities under a language model: an [N] array a tree."""
    model.eval()
    found: dict[int, np.ndarray] = {}
    for part in microbatches(trees, budget):
        batch = collate([trees[i] for i in part]).to(model.backbone.device)
        grid = (model.score(batch) if isinstance(model, RewardModel) else batch.per_response(model(batch))).float().cpu().numpy()
        for row, index in enumerate(part):
            found[index] = grid[row, : len(trees[index].responses)].astype(np.float64)
        on_done(len(found))
    return [found[i] for i in range(len(trees))]
