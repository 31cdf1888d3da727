"""Numbers on one scale: whitening, and the logit that undoes a sigmoid's squeeze."""

from __future__ import annotations

import torch
from torch import Tensor

VARIANCE_FLOOR = 1e-8
"""Added to every variance, so that equal numbers divide by no zero."""


def moments(values: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and deviation sqrt(var + 1e-8) of `values` where `mask` is true; the variance is unbiased (divided by n - 1).

    Of a single value the deviation is 1, of none the mean is 0 too. Both 0-dimensional.
    """
    kept = values.flatten() if mask is None else values[mask.bool()]
    if len(kept) < 2:
        return kept.sum(), torch.ones_like(kept.sum())
    return kept.mean(), (kept.var(unbiased=True) + VARIANCE_FLOOR).sqrt()


def whiten(values: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """(x - mean) / deviation over the `mask` only, of any shape; with `shift_mean` false the mean is added back. 0 outside the mask.

    A single value gives x - mean, which is 0. Example: (0.451, 0.58, 0.4) -> (-0.280251, 1.110225, -0.829974).
    """
    mean, deviation = moments(values, mask)
    scaled = (values - mean) / deviation + (0.0 if shift_mean else mean)
    return scaled if mask is None else torch.where(mask.bool(), scaled, torch.zeros_like(scaled))
