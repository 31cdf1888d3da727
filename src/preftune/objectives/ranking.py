"""Objectives that train a policy on a whole ranking of responses: RRHF, PRO, KnowPAT and listwise DPO.

Shapes: G prompts, N responses. Every loss is a sum over prompts, each with its weight; ties are no pairs and teach nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from preftune.objectives.listwise import plackett_luce
from preftune.objectives.metrics import Metrics, mean_over
from preftune.objectives.pairwise import pair_metrics


@dataclass(frozen=True)
class Ranked:
    """Ranked responses, as every loss here reads them."""

    logp: Tensor
    """[G, N] log-probability, summed over the response's tokens, the end-of-turn token included."""
    length: Tensor
    """[G, N] tokens of the response; 0 where there is none."""
    order: Tensor
    """[G, N, N] True where response i is better than j."""
    best: Tensor
    """[G, N] weights that sum to 1 over a prompt's best responses."""
    weight: Tensor
    """[G] weights of the prompts, which sum to 1 over the step."""

    @property
    def mean(self) -> Tensor:
        """[G, N] mean log-probability of a token; 0 where there is no response."""
        return self.logp / self.length.clamp(min=1)

    @property
    def likelihood(self) -> Tensor:
        """[G] mean log-probability of a token of the best response."""
        return (self.best * self.mean).sum(1)

    @property
    def summed_likelihood(self) -> Tensor:
        """[G] summed log-probability of the best response."""
        return (self.best * self.logp).sum(1)

    def result(self, loss: Tensor, values: Tensor) -> tuple[Tensor, Metrics]:
        """The weighted loss of [G] losses, and metrics of the [G, N] values by which the method ranks."""
        metrics = pair_metrics(values, self.order.to(values.dtype))
        metrics["nll"] = mean_over(-self.mean, self.best)
        metrics["logp_chosen"] = mean_over(self.logp, self.best)
        return (loss * self.weight).sum(), metrics


def rrhf(ranked: Ranked, strength: float = 1.0, exponent: float = 1.0, summed: bool = False) -> tuple[Tensor, Metrics]:
    """`strength` * sum over pairs of max(0, p_worse - p_better) + NLL of the best, p = logp / |y|^`exponent`; arXiv:2304.05302.

    No margin: a pair in the right order has neither loss nor gradient. The NLL is the mean over the best response's tokens; `summed`,
    as in the paper, their sum.

    >>> one, order = torch.ones(1), torch.ones(1, 3, 3).triu(1).bool()
    >>> three = Ranked(torch.tensor([[-0.5, -0.4, -1.0]]), torch.ones(1, 3), order, torch.tensor([[1.0, 0.0, 0.0]]), one)
    >>> round(rrhf(three)[0].item(), 6)
    0.6
    """
    values = ranked.logp / ranked.length.clamp(min=1) ** exponent
    wrong = F.relu(values.unsqueeze(1) - values.unsqueeze(2)) * ranked.order
    likelihood = ranked.summed_likelihood if summed else ranked.likelihood
    return ranked.result(strength * wrong.sum((1, 2)) - likelihood, values)


def pro(ranked: Ranked, sft_weight: float = 0.05, ratings: Tensor | None = None) -> tuple[Tensor, Metrics]:
    """Plackett-Luce over mean log-probabilities + `sft_weight` * (n - 1)^2 * summed NLL of the best; arXiv:2306.17492.

    n is the number of the prompt's responses. With `ratings` [G, N] the contrasts have the paper's temperatures (`gap_contrast`).

    >>> one, order = torch.ones(1), torch.ones(1, 3, 3).triu(1).bool()
    >>> three = Ranked(torch.tensor([[-0.5, -0.4, -1.0]]), torch.ones(1, 3), order, torch.tensor([[1.0, 0.0, 0.0]]), one)
    >>> round(pro(three, 0.0)[0].item(), 6), round(pro(three, 0.0, torch.tensor([[3.0, 2.0, 1.0]]))[0].item(), 6)
    (1.435064, 1.597508)
    """
    values = ranked.mean
    ranking = plackett_luce(values, ranked.order) if ratings is None else gap_contrast(values, ranked.order, ratings)
    others = ranked.length.gt(0).sum(1).to(values.dtype) - 1
    return ranked.result(ranking - sft_weight * others**2 * ranked.summed_likelihood, values)


def gap_contrast(values: Tensor, order: Tensor, ratings: Tensor) -> Tensor:
    """- sum_k log [e^(v_k / T_kk) / (e^(v_k / T_kk) + sum_i e^(v_i / T_ki))] over what ranks below k; `values` [G, N], to [G].

    1 / T_ki is the gap between the `ratings` [G, N] of k and i, 1 / T_kk the widest of k's gaps (arXiv:2306.17492). Where there is no
    gap there is no contrast.
    """
    gap = torch.where(order, ratings.unsqueeze(2) - ratings.unsqueeze(1), 0.0).clamp(min=0)
    own = values * gap.amax(2)
    others = (values.unsqueeze(1) * gap).masked_fill(gap == 0, -torch.inf)
    return (torch.cat([own.unsqueeze(2), others], 2).logsumexp(2) - own).sum(1)


def knowpat(ranked: Ranked, strength: float = 0.01) -> tuple[Tensor, Metrics]:
    """NLL of the best + `strength` * mean over k of mu_k [softplus(-S_k) + mean over i below k of softplus(S_i)]; arXiv:2311.06503.

    S is the mean log-probability of a token, k runs over the responses that have any ranked below them (n - 1 of them without ties), and
    mu_k = (S_k - min S) / (max S - min S), without gradient, is 1 where all S are equal. Tied responses are not each other's negatives.

    >>> one, order = torch.ones(1), torch.ones(1, 3, 3).triu(1).bool()
    >>> three = Ranked(torch.tensor([[-0.5, -0.4, -1.0]]), torch.ones(1, 3), order, torch.tensor([[1.0, 0.0, 0.0]]), one)
    >>> round(knowpat(three, 1.0)[0].item() - 0.5, 6)
    1.191145
    """
    values = ranked.mean
    below = ranked.order.sum(2)
    negatives = (ranked.order * -F.logsigmoid(-values).unsqueeze(1)).sum(2) / below.clamp(min=1)
    contrast = mu(values.detach(), ranked.length > 0) * (negatives - F.logsigmoid(values)) * below.gt(0)
    align = contrast.sum(1) / below.gt(0).sum(1).clamp(min=1)
    return ranked.result(strength * align - ranked.likelihood, values)


def mu(values: Tensor, present: Tensor) -> Tensor:
    """(S - min S) / (max S - min S) over each prompt's present responses, 1 where they are all equal; both [G, N], to [G, N]."""
    low = values.masked_fill(~present, torch.inf).amin(1, keepdim=True)
    span = values.masked_fill(~present, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(span > 0, (values - low) / span.masked_fill(span == 0, 1.0), 1.0)


def listwise_dpo(ranked: Ranked, reference: Tensor, beta: float) -> tuple[Tensor, Metrics]:
    """Plackett-Luce over the implicit rewards beta * (logp - reference); arXiv:2305.18290, appendix A.3. Two responses are DPO.

    `reference` [G, N] are summed log-probabilities under the frozen reference, without gradient.

    >>> one, order = torch.ones(1), torch.ones(1, 2, 2).triu(1).bool()
    >>> two = Ranked(torch.tensor([[-3.0, -5.0]]), torch.ones(1, 2), order, torch.tensor([[1.0, 0.0]]), one)
    >>> round(listwise_dpo(two, torch.tensor([[-4.0, -4.5]]), 0.1)[0].item(), 6)
    0.620957
    """
    implicit = beta * (ranked.logp - reference)
    return ranked.result(plackett_luce(implicit, ranked.order), implicit)
