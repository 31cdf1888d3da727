"""Distance of a policy from its reference, estimated from the tokens that the policy drew, and the coefficients that hold it.

Shapes: M tokens. r = log pi - log ref of a token. In a reward k1 belongs, without gradient; in a loss k2, or `k1_weighted`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3", "k3_is", "k1_weighted"]

FARTHEST = 20.0
"""Log ratios are held within +-FARTHEST before exp()."""


def kl_estimate(logp: Tensor, reference: Tensor, kind: Estimator, old: Tensor | None = None) -> Tensor:
    """An estimate of KL(pi || ref) for each token, [M], that is differentiable in `logp` [M] alone.

    `reference` [M] and `old` [M] (of the policy that drew the tokens; the policy itself if None) are constants. The estimators are of
    John Schulman's note "Approximating KL divergence" (2020):

    - `k1`: r. Unbiased, of either sign; as a loss its expected gradient is 0, so it is for rewards only.
    - `k2`: r^2 / 2. Biased, never negative; as a loss its expected gradient is exactly that of KL(pi || ref).
    - `k3`: exp(-r) - 1 + r. Unbiased, never negative; as a loss it has the gradient of KL(ref || pi). GRPO's (arXiv:2402.03300, eq. 4).
    - `k3_is`: k3 * exp(logp - old). On the policy's own tokens its value is k3 and its expected gradient that of KL(pi || ref).
    - `k1_weighted`: r * logp with r constant. The expected gradient of k2; its value estimates nothing.

    >>> policy, reference = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
    >>> [[round(x, 4) for x in kl_estimate(policy, reference, kind).tolist()] for kind in ("k1", "k2", "k3")]
    [[-0.47, 0.9163], [0.1105, 0.4198], [0.13, 0.3163]]
    """
    r = logp - reference.detach()
    if kind == "k1":
        return r
    if kind == "k2":
        return r.square() / 2
    if kind == "k1_weighted":
        return r.detach() * logp
    near = r.clamp(-FARTHEST, FARTHEST)
    k3 = torch.expm1(-near) + near
    if kind == "k3":
        return k3
    if kind == "k3_is":
        return k3 * (logp - (logp if old is None else old).detach()).clamp(-FARTHEST, FARTHEST).exp()
    raise ValueError(f"no estimator is called {kind!r}")


def reference_coefficient(beta: float, kl: float, target: float, episodes: int, horizon: float) -> float:
    """beta * (1 + e * episodes / horizon) with e = kl / target - 1 held within +-0.2: the leash of arXiv:1909.08593.

    `kl` is the mean over `episodes` responses of their summed KL from the reference, and `target` what it should be.

    >>> round(reference_coefficient(1.0, 12.0, 6.0, 256, 10_000), 5)
    1.00512
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * episodes / horizon)


def trust_region_coefficient(coefficient: float, kl: float, target: float) -> float:
    """Half of it where kl < target / 1.5, twice where kl > 1.5 target, else the same: PPO with a penalty, arXiv:1707.06347, section 4.

    `kl` is the mean over tokens of KL(old || new) after an update.
    """
    if kl < target / 1.5:
        return coefficient / 2
    return coefficient * 2 if kl > target * 1.5 else coefficient
