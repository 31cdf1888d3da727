"""Metrics as numerator and denominator, so that sums over micro-batches and processes give the exact global mean."""

from __future__ import annotations

from torch import Tensor

Ratio = tuple[Tensor, Tensor]
"""Numerator and denominator, both 0-dimensional; the metric of a step is the sum of the first over the sum of the second."""

Metrics = dict[str, Ratio]


def mean_over(values: Tensor, mask: Tensor) -> Ratio:
    """Mean of `values` where `mask` is non-zero; the mask's values are weights. Both of one shape."""
    weight = mask.to(values.dtype)
    return (values.detach().nan_to_num() * weight).sum(), weight.sum()
