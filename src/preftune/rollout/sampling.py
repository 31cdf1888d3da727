"""From logits to tokens: temperature, truncation of the distribution, and inverse-CDF sampling from one uniform number a token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preftune.errors import UserError
from preftune.kernels import find

BLOCK = 64
"""Tokens whose probabilities are summed before the cumulative sum, which then runs over V / BLOCK sums and over one block."""
CANDIDATES = 1024
"""Likeliest tokens that are sorted to find a nucleus; where they do not hold it, the whole vocabulary is."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The order is transformers': repetition penalty, temperature, top-k, top-p, min-p."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    """A response ends where one of these texts appears in it; the text is left out."""

    def __post_init__(self) -> None:
        rules = (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (0 <= self.temperature < float("inf"), "temperature", "0 or more"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (self.top_k >= 0, "top_k", "0 (off) or more"),
            (0 <= self.min_p <= 1, "min_p", "between 0 and 1"),
            (self.repetition_penalty > 0, "repetition_penalty", "above 0 (1 is off)"),
            (all(self.stop), "stop", "texts that are not empty"),
        )
        for holds, name, wanted in rules:
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)!r}, it must be {wanted}", where=name)

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def uniforms(seed: int, prompt: Sequence[int], number: int, count: int) -> np.ndarray:
    """[count] uniform numbers in [0, 1) of response `number` to `prompt` (token ids): they depend on nothing else.

    A response is therefore the same whatever stands beside it, in whatever order and however many rows a batch has.
    """
    digest = hashlib.blake2b(np.asarray(prompt, dtype=np.int64).tobytes(), digest_size=16).digest()
    key = [seed, number, *np.frombuffer(digest, dtype=np.uint32).tolist()]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).random(count)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those of the tokens marked in `seen` [B, V] divided by the penalty, or multiplied where negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """A token a row: `logits` [B, V] in fp32 or bf16, `uniform` [B] in [0, 1) as float64, `seen` [B, V] where a repetition penalty is set.

    Returns [B] tokens, their log-probability at temperature 1 under the model as it is, and under the distribution they were drawn from.
    """
    kernels = find("pointwise")
    if kernels is None or not kernels.takes(logits) or seen is not None or sampling.temperature != 1 or sampling.truncates:
        logits = logits.float()  # else they are read once, and a copy would cost more than that
    shaped = logits if seen is None else penalise(logits, seen, sampling.repetition_penalty)
    pick = lambda values, tokens: values.gather(1, tokens.unsqueeze(1)).squeeze(1).float()
    weights, log_total = _weights(logits)
    if sampling.temperature == 0:
        tokens = shaped.argmax(1)
        return tokens, pick(logits, tokens) - log_total, torch.zeros_like(log_total)
    if sampling.truncates:
        tokens, drawn = _from_candidates(shaped / sampling.temperature, uniform, sampling)
        return tokens, pick(logits, tokens) - log_total, drawn
    log_shaped = log_total
    if sampling.temperature != 1 or seen is not None:
        shaped = shaped / sampling.temperature
        weights, log_shaped = _weights(shaped)
    tokens, _ = _inverse_cdf(weights, uniform)
    return tokens, pick(logits, tokens) - log_total, pick(shaped, tokens) - log_shaped


@dataclass(frozen=True)
class _Weights:
    """Non-negative [B, V] weights: [B, blocks] cumulative sums of whole blocks (float64), and [B, BLOCK] weights of a block of each row."""

    ends: Tensor
    block: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, weights: Tensor) -> Self:
        if weights.shape[1] % BLOCK:
            weights = F.pad(weights, (0, BLOCK - weights.shape[1] % BLOCK))
        blocks = weights.view(len(weights), -1, BLOCK)
        rows = torch.arange(len(blocks), device=blocks.device)
        # a sum of BLOCK numbers in fp32, then in float64: no copy of them all
        return cls(blocks.sum(2).double().cumsum(1), lambda block: blocks[rows, block])

    @classmethod
    def of_sums(cls, sums: Tensor, logits: Tensor, top: Tensor) -> Self:
        """Of exp(logits - top), where only the [B, blocks] sums of blocks are at hand."""

        def block(which: Tensor) -> Tensor:
            at = which.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=which.device)
            there = logits.gather(1, at.clamp(max=logits.shape[1] - 1))
            return (there - top.unsqueeze(1)).exp_().mul_(at < logits.shape[1])

        return cls(sums.double().cumsum(1), block)


def _weights(logits: Tensor) -> tuple[_Weights, Tensor]:
    """exp of [B, V] logits relative to their maximum, and their [B] log-sum-exp."""
    kernels = find("pointwise")
    if kernels is not None and kernels.takes(logits):
        top, sums = kernels.exp_sums(logits, BLOCK)
        weights = _Weights.of_sums(sums, logits, top)
    else:
        top = logits.amax(1)
        weights = _Weights.of((logits - top.unsqueeze(1)).exp_())
    return weights, weights.ends[:, -1].log().to(top.dtype) + top


def _inverse_cdf(weights: _Weights, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[B] index at which the cumulative sum of the weights passes `uniform` of its total, and that total (float64)."""
    ends = weights.ends
    total = ends[:, -1]
    target = (uniform * total).unsqueeze(1)
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = weights.block(block.squeeze(1))
    at = torch.searchsorted(inside.double().cumsum(1), target - before, right=True)
    last = BLOCK - 1 - inside.gt(0).flip(1).int().argmax(1, keepdim=True)  # rounding must not step past the last that can be drawn
    return (block * BLOCK + torch.minimum(at, last)).squeeze(1), total


def _from_candidates(shaped: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """[B] tokens and their log-probability under the truncated distribution of [B, V] logits (temperature already applied)."""
    width = shaped.shape[1]
    count = min(sampling.top_k or CANDIDATES, width)
    values, tokens = shaped.topk(count, dim=1)
    if not sampling.top_k:
        mass = (values - shaped.logsumexp(1, keepdim=True)).exp_().sum(1)
        least = values[:, -1] - values[:, 0]
        held = (mass >= sampling.top_p) if sampling.top_p < 1 else (least < np.log(max(sampling.min_p, 1e-30)))
        if count < width and not bool(held.all()):
            values, tokens = shaped.sort(1, descending=True)
        total = shaped.logsumexp(1, keepdim=True)
    else:
        total = values.logsumexp(1, keepdim=True)
    share = (values - total).exp_()
    kept = torch.ones_like(share, dtype=torch.bool)
    if sampling.top_p < 1:
        kept = share.double().cumsum(1) - share < sampling.top_p  # the token that passes top_p is the last one kept
    if sampling.min_p > 0:
        nucleus = share * kept
        kept &= nucleus >= sampling.min_p * nucleus.amax(1, keepdim=True)
    kept[:, 0] = True
    share = share * kept
    at, mass = _inverse_cdf(_Weights.of(share), uniform)
    at = at.unsqueeze(1)
    return tokens.gather(1, at).squeeze(1), (share.gather(1, at).squeeze(1).log() - mass.log()).to(shaped.dtype)
