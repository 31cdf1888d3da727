"""Scores of lenient and of strict annotators brought onto one scale, by what each of them gave to the training records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import lsmr

from preftune.records import Example, Response


@dataclass(frozen=True, slots=True)
class Rating:
    """One score: who gave it (None: nobody says), to what, and how much."""

    annotator: str | None
    item: Hashable
    value: float


@dataclass(frozen=True, slots=True)
class Scale:
    """How an annotator uses the scale: a score s stands for (s - offset) / spread, and for 0 where the spread is 0."""

    offset: float
    spread: float

    def __call__(self, value: float) -> float:
        return (value - self.offset) / self.spread if self.spread else 0.0


@dataclass(frozen=True)
class Calibration:
    """The scale of every annotator who was seen; `other` stands for anybody else."""

    known: Mapping[str, Scale]
    other: Scale = field(default_factory=lambda: Scale(0.0, 1.0))
    back: Scale = field(default_factory=lambda: Scale(0.0, 1.0))
    """The scale onto which calibrated scores are put back."""

    def __call__(self, value: float, annotator: str | None) -> float:
        """A score by this annotator on the common scale."""
        scale = self.other if annotator is None else self.known.get(annotator, self.other)
        return self.back.offset + self.back.spread * scale(value)


def zscore(ratings: Iterable[Rating], shrinkage: float = 5.0, *, back: bool = False) -> Calibration:
    """z = (s - mu_a) / sigma_a for each annotator a; with `back`, mu + sigma z, the scores' own scale.

    Mean and variance are those of all ratings, counted `shrinkage` times, and of the annotator's own n ratings, so that few ratings move
    them little: mu_a = (n m_a + k mu) / (n + k), and the variance likewise; an annotator never seen has mu and sigma. Deviations are the
    population's. Where sigma_a is 0, z is 0. Only for annotators whose responses are on average alike: it takes what differs between
    their responses for leniency (`additive` does not).
    """
    own: dict[str, list[float]] = defaultdict(list)
    everything = []
    for one in ratings:
        everything.append(one.value)
        if one.annotator is not None:
            own[one.annotator].append(one.value)
    mean, variance = _moments(everything)
    known = {}
    for name, values in own.items():
        m, v = _moments(values)
        share = len(values) / (len(values) + shrinkage)
        known[name] = Scale(share * m + (1 - share) * mean, (share * v + (1 - share) * variance) ** 0.5)
    whole = Scale(mean, variance**0.5)
    return Calibration(known, whole, whole) if back else Calibration(known, whole)


def additive(ratings: Iterable[Rating]) -> Calibration:
    """s - b_a, from the least-squares fit of s_ai = q_i + b_a + e: quality of item i, leniency of annotator a, sum_a b_a = 0.

    Leniency shows only where annotators scored the same item. Among annotators whom no chain of such items joins it cannot be told from
    quality, so it sums to 0 within each group that is joined; one who shares no item has 0, and so has one who was never seen.
    """
    return Calibration({name: Scale(value, 1.0) for name, value in leniency(list(ratings)).items()})


def leniency(ratings: Sequence[Rating]) -> dict[str, float]:
    """b_a of each annotator: by how much their scores lie above the quality of what they scored."""
    said = [one for one in ratings if one.annotator is not None]
    annotators: dict[str, int] = {}
    items: dict[Hashable, int] = {}
    who = np.array([annotators.setdefault(str(one.annotator), len(annotators)) for one in said], dtype=int)
    what = np.array([items.setdefault(one.item, len(items)) for one in said], dtype=int)
    if not said:
        return {}
    values = np.array([one.value for one in said])
    rows, size = np.arange(len(said)), len(annotators) + len(items)
    ends = np.concatenate([who, what + len(annotators)])
    design = coo_array((np.ones(len(ends)), (np.concatenate([rows, rows]), ends)), shape=(len(said), size)).tocsr()
    fitted = lsmr(design, values - values.mean(), atol=1e-13, btol=1e-13, conlim=0, maxiter=10 * size)[0][: len(annotators)]
    _, group = connected_components(design.T @ design)
    group = group[: len(annotators)]
    middle = np.bincount(group, fitted) / np.maximum(np.bincount(group), 1)
    return {name: float(fitted[at] - middle[group[at]]) for name, at in annotators.items()}


def shared_items(ratings: Iterable[Rating]) -> int:
    """Items that two or more annotators scored."""
    raters: dict[Hashable, set[str]] = defaultdict(set)
    for one in ratings:
        if one.annotator is not None:
            raters[one.item].add(one.annotator)
    return sum(len(names) > 1 for names in raters.values())


def ratings_of(examples: Iterable[Example]) -> dict[str | None, list[Rating]]:
    """Every score of the records by the attribute it judges, None for a plain score. An item is a response's text to a prompt."""
    found: dict[str | None, list[Rating]] = defaultdict(list)
    for example in examples:
        for response in example.responses:
            for attribute, value in _scores(response).items():
                found[attribute].append(Rating(example.annotator, (example.prompt, response.text), value))
    return dict(found)


def calibrator(examples: Iterable[Example], fit: Callable[[Sequence[Rating]], Calibration]) -> Callable[[Example], Example]:
    """Fit each attribute on these records alone; what is returned puts any record's scores on the common scale."""
    calibrations = {attribute: fit(ratings) for attribute, ratings in ratings_of(examples).items()}

    def calibrated(example: Example) -> Example:
        return replace(example, responses=tuple(_calibrated(r, example.annotator, calibrations) for r in example.responses))

    return calibrated


def _calibrated(response: Response, annotator: str | None, calibrations: Mapping[str | None, Calibration]) -> Response:
    known = {name: calibrations[name](v, annotator) if name in calibrations else v for name, v in _scores(response).items()}
    if not known:
        return response
    return replace(response, score={str(n): v for n, v in known.items()} if isinstance(response.score, Mapping) else known[None])


def _scores(response: Response) -> dict[str | None, float]:
    if isinstance(response.score, Mapping):
        return {name: float(value) for name, value in response.score.items()}
    return {} if response.score is None else {None: float(response.score)}


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Mean and population variance; equal values have a variance of exactly 0, whatever their sum rounds to."""
    if not len(values):
        return 0.0, 0.0
    return float(np.mean(values)), float(np.var(values)) if np.ptp(values) else 0.0
