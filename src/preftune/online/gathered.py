"""A rollout as one table: everything known of its responses once they are scored, laid out by response and token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Gathered:
    """G prompts with N responses each, R = G * N in all, prompt by prompt; T tokens of the longest. On the CPU, in float64."""

    scores: Tensor
    """[G, N] the judge's scores as they count: after the rules for cut responses; NaN where a response could not be scored."""
    weights: Tensor
    """[G, N] 0 where a response is left out of the loss, as every one without a score is; else 1."""
    mask: Tensor
    """[R, T] which tokens there are."""
    dense: Tensor
    """[R, T] rewards at the ends of segments, weighted; 0 elsewhere."""
    ends: Tensor
    """[R, T] where a segment ends, also one whose reward is 0."""
    old: Tensor
    """[R, T] log-probability under the policy that drew them; 0 behind the last token, as in what follows."""
    reference: Tensor | None = None
    """[R, T] under the reference."""
    values: Tensor | None = None
    """[R, T] the critic's value of each token's state."""
    greedy: Tensor | None = None
    """[G] score of the likeliest response to each prompt, NaN where it could not be scored."""

    @property
    def scored(self) -> Tensor:
        """[G, N] which responses have a score, and so are compared and learned."""
        return ~self.scores.isnan()

    @property
    def counted(self) -> Tensor:
        """[R, T] the tokens that the loss reads."""
        return self.mask & (self.weights.reshape(-1, 1) > 0)

    @property
    def lengths(self) -> Tensor:
        """[R] tokens of each response."""
        return self.mask.sum(1)

    def spread(self, values: Tensor) -> Tensor:
        """[G, N] values of responses, on each of their tokens: [R, T]."""
        return values.reshape(-1, 1) * self.mask
