"""What models say of held-out records: log-probabilities of tokens, margins of pairs, and KL to a reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from preftune.models.policy import LanguageModel
from preftune.models.values import Values
from preftune.packing.batch import collate, microbatches
from preftune.packing.chat import Tree


def pair_margins(values: Values, trees: Sequence[Tree]) -> tuple[np.ndarray, list[int]]:
    """Value of the preferred minus value of the other response for every strict pair, and the index of each pair's tree."""
    margins, owners = [], []
    for index, (value, tree) in enumerate(zip(values, trees, strict=True)):
        for i, j in zip(*np.nonzero(tree.preference > tree.preference.T), strict=True):
            margins.append(value[i] - value[j])
            owners.append(index)
    return np.asarray(margins), owners


@torch.no_grad()
def token_logps(model: LanguageModel, trees: Sequence[Tree], budget: int = 4096) -> Values:
    """Log-probability of every response token: one [tokens] array a tree, its responses one after the other."""
    model.eval()
    found: dict[int, np.ndarray] = {}
    for part in microbatches(trees, budget):
        flat = model(collate([trees[i] for i in part]).to(model.backbone.device)).float().cpu().numpy().astype(np.float64)
        ends = np.cumsum([trees[i].response_tokens for i in part])
        found.update(zip(part, np.split(flat, ends[:-1]), strict=True))
    return [found[i] for i in range(len(trees))]


def sequence_kl(policy: Values, reference: Values) -> np.ndarray:
    """An estimate of KL(pi || ref) in nats for each response, from token log-probabilities of the policy's own samples at temperature 1.

    The sum over tokens of k3 = exp(-r) - 1 + r, r = log pi - log ref: unbiased by the chain rule, and never negative.
    """
    gap = [np.clip(p - q, -20, 20) for p, q in zip(policy, reference, strict=True)]
    return np.array([float((np.expm1(-r) + r).sum()) for r in gap])
