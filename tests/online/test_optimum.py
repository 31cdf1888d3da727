"""Where online methods end, against closed forms: every response of the toy is enumerated, so that no sample enters a comparison.

With reward r and coefficient b, the policy that maximises E[r] - b KL(pi || ref) is ref exp(r / b) / Z. What the methods do to the reward
on the way decides which closed form is theirs:

- A KL *in the reward* (PPO, REINFORCE, REINFORCE++, RLOO) is part of the advantage, so that whitening scales both alike and takes a
  constant away: at the optimum the advantage is the same everywhere, and its gradient 0, whatever it is divided by.
- A KL *in the loss* (GRPO) stands beside the advantage. Divided by the group's deviation s, the advantage is weighed against an
  unscaled KL: b becomes b s, where s is that of the policy found. `scale: none` leaves b what it is.
- The KL in the loss has, token by token, the gradient of that token's KL alone, not of what follows from the token. With one token that
  is all there is; with more, earlier tokens do not see that later ones cost KL.
- k3 in the loss has the gradient of KL(ref || pi), and so an optimum of its own: ref b / (c - r).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.online import toy

KL = 0.5
CLOSE = 0.02
"""Total variation within which a policy is where it should be."""
FAR = 0.03
"""Total variation that two closed forms differ by at least, where a test is to tell them apart."""
CUT = {"method.kl": KL, "rollout.n": 128, "lr": 1e-2, "clip_norm": 100}
SHORT, LONG = {"epochs": 60}, {"epochs": 200}
CRITIC = {"method.critic_lr": 1e-2}
CENTRED = {"judge.options.less": 0.65}
"""A constant changes no optimum; where nothing is subtracted from the reward, it only adds noise."""


def tilted(ref: Tensor, r: Tensor, kl: float = KL) -> Tensor:
    """ref exp(r / kl) / Z, the maximum of E[r] - kl KL(pi || ref)."""
    return (ref.log() + r / kl).softmax(-1)


def forward(ref: Tensor, r: Tensor) -> Tensor:
    """ref KL / (c - r), the maximum of E[r] - KL KL(ref || pi), by bisection for the c that makes it sum to 1."""
    low, high = r.amax(1, keepdim=True), r.amax(1, keepdim=True) + KL
    for _ in range(80):
        middle = (low + high) / 2
        over = (ref * KL / (middle - r)).sum(1, keepdim=True) > 1
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return ref * KL / (high - r)


def divided(ref: Tensor, r: Tensor, *, together: bool = False) -> Tensor:
    """What a KL beside scores over their own deviation ends at: ref exp(r / (KL s)) / Z with s the deviation of r under it."""
    pi = ref
    for _ in range(200):
        mean = (pi * r).sum(1, keepdim=True)
        spread = (pi * (r - mean).square()).sum(1, keepdim=True)
        if together:  # over the whole rollout, each score less its group's mean
            spread = spread.mean().expand_as(spread)
        pi = (pi + (ref.log() + r / (KL * spread.sqrt())).softmax(-1)) / 2
    return pi


def shortsighted(known: toy.Exact, r: Tensor) -> Tensor:
    """Each token tilted by the reward that follows it on average, as if the tokens behind it cost no KL."""
    places = {one: i for i, one in enumerate(toy.responses(2))}
    size = len(toy.VOCABULARY)
    second = torch.zeros_like(known.second)
    value = torch.zeros_like(known.first)
    for a in range(size):
        if a == toy.END:
            value[:, a] = r[:, places[a,]]
            continue
        following = r[:, [places[a, b] for b in range(size)]]
        second[:, a] = (known.second[:, a] + following / KL).log_softmax(-1)
        value[:, a] = (second[:, a].exp() * following).sum(1)
    return toy.Exact((known.first + value / KL).log_softmax(-1), second).of(2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.place(tmp_path_factory.mktemp("toy"))


def end_of(place: Path, output: Path, method: str, length: int, **settings: object) -> Tensor:
    """[P, R] the exact distribution that a run ends with."""
    words = {f"method.{key[2:]}" if key.startswith("m_") else key: value for key, value in settings.items()}
    return toy.exact(toy.train(place, output, method, **{**CUT, "rollout.max_new_tokens": length, **words})).of(length)


def known(place: Path, length: int) -> tuple[Tensor, Tensor, toy.Exact]:
    """The reference's distribution, the rewards, and the reference token by token."""
    reference = toy.exact(place / "model")
    return reference.of(length), toy.rewards(place, length), reference


def test_the_toy_is_whole(place: Path) -> None:
    for length in (1, 2):
        ref, r, _ = known(place, length)
        torch.testing.assert_close(ref.sum(1), torch.ones(len(ref), dtype=torch.float64))
        assert ref.shape == r.shape and len(toy.responses(length)) == {1: 10, 2: 91}[length]
        assert toy.total_variation(tilted(ref, r), ref) > 10 * CLOSE, "there is something to learn"


AT_THE_OPTIMUM = {
    "rloo": ("rloo", 1, SHORT),
    "rloo, two tokens": ("rloo", 2, LONG),
    "ppo": ("ppo", 1, {**SHORT, **CRITIC, "m_whiten": "false"}),
    "ppo, two tokens": ("ppo", 2, {**LONG, **CRITIC, "m_whiten": "false"}),
    "ppo, whitened": ("ppo", 1, {**SHORT, **CRITIC}),
    "reinforce++, whitened, two tokens": ("reinforce++", 2, LONG),
    "reinforce++, not whitened": ("reinforce++", 1, {**SHORT, "m_whiten": "false", **CENTRED}),
    "reinforce++_baseline, KL in the reward": ("reinforce++_baseline", 1, {**SHORT, "m_kl_loss": "reward"}),
    "grpo, k2": ("grpo", 1, {**SHORT, "m_scale": "none", "m_kl_loss": "k2"}),
    "grpo, k3_is": ("grpo", 1, {**SHORT, "m_scale": "none", "m_kl_loss": "k3_is"}),
}


@pytest.mark.parametrize("name", AT_THE_OPTIMUM)
def test_the_policy_ends_at_the_closed_form(place: Path, tmp_path: Path, name: str) -> None:
    method, length, settings = AT_THE_OPTIMUM[name]
    ref, r, _ = known(place, length)
    found = end_of(place, tmp_path / "run", method, length, **settings)
    assert toy.total_variation(found, tilted(ref, r)) < CLOSE


ELSEWHERE: dict[str, tuple[str, int, dict[str, object], Callable[[Tensor, Tensor, toy.Exact], Tensor]]] = {
    "grpo over the group's deviation": ("grpo", 1, {**SHORT, "m_kl_loss": "k2"}, lambda ref, r, _: divided(ref, r)),
    "reinforce++_baseline over the rollout's deviation": (
        "reinforce++_baseline", 1, {"epochs": 100}, lambda ref, r, _: divided(ref, r, together=True)
    ),
    "grpo with k3": ("grpo", 1, {**SHORT, "m_scale": "none", "m_kl_loss": "k3"}, lambda ref, r, _: forward(ref, r)),
    "grpo with two tokens": ("grpo", 2, {**LONG, "m_scale": "none", "m_kl_loss": "k2"}, lambda ref, r, first: shortsighted(first, r)),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_kl_in_the_loss_may_have_another_closed_form(place: Path, tmp_path: Path, name: str) -> None:
    method, length, settings, closed = ELSEWHERE[name]
    ref, r, reference = known(place, length)
    wanted = closed(ref, r, reference)
    found = end_of(place, tmp_path / "run", method, length, **settings)
    assert toy.total_variation(found, wanted) < CLOSE
    assert toy.total_variation(wanted, tilted(ref, r)) > FAR
    assert toy.total_variation(found, tilted(ref, r)) > CLOSE


def test_a_larger_kl_ends_nearer_to_the_reference(place: Path, tmp_path: Path) -> None:
    ref, r, _ = known(place, 1)
    found = end_of(place, tmp_path / "run", "rloo", 1, **{**SHORT, "m_kl": 2.0})
    assert toy.total_variation(found, tilted(ref, r, 2.0)) < CLOSE
    assert toy.total_variation(ref, tilted(ref, r, 2.0)) < toy.total_variation(ref, tilted(ref, r)) / 2


def test_at_another_temperature_it_is_the_policy_at_that_temperature(place: Path, tmp_path: Path) -> None:
    ref, r = toy.exact(place / "model", 2.0).of(1), toy.rewards(place, 1)
    final = toy.train(place, tmp_path / "run", "rloo", **{**CUT, **SHORT, "rollout.temperature": 2.0})
    assert toy.total_variation(toy.exact(final, 2.0).of(1), tilted(ref, r)) < CLOSE
    assert toy.total_variation(toy.exact(final).of(1), tilted(ref, r)) > CLOSE
