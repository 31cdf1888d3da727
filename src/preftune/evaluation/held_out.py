"""From a model and held-out records to a report of figures: `preftune evaluate`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from preftune import formats
from preftune.errors import UserError
from preftune.evaluation.preferences import Figure, policy_figures, reward_figures
from preftune.methods import KEEP_REASONS
from preftune.models import load
from preftune.models.policy import LanguageModel, RewardModel, settle_layout
from preftune.models.values import Values, response_values
from preftune.packing.chat import REASONS, ChatTokenizer, Tree
from preftune.training.progress import meter
from preftune.training.setup import compute_dtype

WHY = {**REASONS, **KEEP_REASONS, "not_finite": "the model's value of a response is no finite number"}
"""Why a record is left out of an evaluation."""


@dataclass(frozen=True)
class Request:
    """What is evaluated on what."""

    model: str
    data: tuple[str, ...]
    reference: str | None = None
    format: str = "auto"
    on_error: Literal["stop", "skip"] = "stop"
    limit: int | None = None
    eval_fraction: float | None = None
    """Only the prompts that a run with this `eval_fraction` and `seed` held out."""
    seed: int = 0
    max_length: int = 1024
    tokens_per_microbatch: int = 4096
    precision: str = "auto"
    level: float = 0.95


@dataclass
class Records:
    """What was read and what became of it. rows == len(trees) + sum(dropped.values())."""

    rows: int
    trees: list[Tree]
    prompts: list[str]
    """A key of each tree's prompt."""
    dropped: Counter[str]
    where: dict[str, list[str]]
    format: str
    sha256: str
    truncated: int = 0

    def leave_out(self, reasons: Sequence[str | None]) -> None:
        """Drop each tree that has a reason."""
        for tree, reason in zip(self.trees, reasons, strict=True):
            if reason is not None:
                self.dropped[reason] += 1
                self.where.setdefault(reason, []).append(tree.where)
        kept = [n for n, reason in enumerate(reasons) if reason is None]
        self.trees, self.prompts = [self.trees[n] for n in kept], [self.prompts[n] for n in kept]


@dataclass
class Report:
    """Figures and all that is needed to know what they are of."""

    kind: Literal["reward", "policy"]
    request: Request
    records: Records
    fingerprints: dict[str, str]
    figures: list[Figure]
    without_pair: int
    notices: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """As JSON data; what is not finite is null."""
        finite = lambda value: None if isinstance(value, float) and not math.isfinite(value) else value
        figures = []
        for figure in self.figures:
            estimate = {key: finite(value) for key, value in asdict(figure.estimate).items()}
            figures.append({"key": figure.key, "name": figure.name, **estimate, "unit": figure.unit, "about": figure.about})
        records = self.records
        return {
            "format": 1,
            "kind": self.kind,
            "request": asdict(self.request),
            "models": self.fingerprints,
            "data": {
                "format": records.format,
                "sha256": records.sha256,
                "rows": records.rows,
                "kept": len(records.trees),
                "without_pair": self.without_pair,
                "dropped": dict(records.dropped),
                "dropped_where": {reason: places[:5] for reason, places in records.where.items()},
                "responses_cut": records.truncated,
            },
            "figures": figures,
            "versions": {name: version(name) for name in ("preftune", "torch", "transformers")},
        }


def evaluate(request: Request, console: Console) -> Report:
    """Measure the model on the records. Raises UserError for whatever the user can mend, data first."""
    source = load.locate(request.model)
    reference = load.locate(request.reference) if request.reference else None
    read = _read(request)
    tokenizer = load.load_tokenizer(source)
    if reference is not None and load.load_tokenizer(reference).tokenizer.get_vocab() != tokenizer.tokenizer.get_vocab():
        raise UserError("model and reference do not share a vocabulary", where=reference.name, fix="Give the model that it started from.")
    records = _tokenise(read, tokenizer, request)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute_dtype(request.precision, device)
    classifier = load.load_classifier(source)
    if classifier is not None and reference is not None:
        raise UserError("a reward model has no reference", where="--reference", fix="Leave it out: rewards are compared as they are.")
    if classifier is not None:
        _only_pairs(records)
    notices: list[str] = []
    model: LanguageModel | RewardModel
    if classifier is not None:
        model = RewardModel(classifier, head=load.score_head(classifier)[1], compute=compute)
    else:
        model = LanguageModel(load.load_causal_lm(source), compute=compute)
    values = [_values(model.to(device), source.name, records, request, console, notices)]
    del model
    fingerprints = {request.model: load.fingerprint(source)}
    if reference is not None:
        frozen = LanguageModel(load.load_causal_lm(reference), compute=compute).to(device)
        values.append(_values(frozen, reference.name, records, request, console, notices))
        fingerprints[reference.name] = load.fingerprint(reference)
    values = _finite(values, records)
    with console.status("intervals"):
        if classifier is not None:
            figures = reward_figures(values[0], records.trees, records.prompts, request.level)
        else:
            other = values[1] if reference is not None else None
            figures = policy_figures(values[0], other, records.trees, records.prompts, request.level)
    without = sum(not _has_pair(tree) for tree in records.trees)
    return Report("reward" if classifier is not None else "policy", request, records, fingerprints, figures, without, notices)


def _read(request: Request) -> formats.Dataset:
    return formats.read(list(request.data), format=request.format, on_error=request.on_error, limit=request.limit)


def _tokenise(read: formats.Dataset, tokenizer: ChatTokenizer, request: Request) -> Records:
    """Trees of the records, or of those that a training run held out."""
    examples, rows = list(read.examples), read.rows
    if request.eval_fraction is not None:
        _, examples = formats.split_by_prompt(examples, request.eval_fraction, request.seed)
        rows = len(examples) + len(read.dropped)
    tokens = tokenizer.tokenize(examples, request.max_length)
    key = {example.where: formats.prompt_key(example) for example in examples}
    where: dict[str, list[str]] = {}
    for one in read.dropped:
        where.setdefault(one.reason, []).append(one.where)
    dropped = Counter(read.dropped_by_reason()) + tokens.dropped
    prompts = [key[tree.where] for tree in tokens.trees]
    records = Records(
        rows, tokens.trees, prompts, dropped, where | tokens.dropped_where, read.format, read.sha256, tokens.truncated_responses
    )
    _require(records)
    return records


def _has_pair(tree: Tree) -> bool:
    return bool((tree.preference > tree.preference.T).any())


def _only_pairs(records: Records) -> None:
    """Leave out the records of which a reward model's scores say nothing."""
    records.leave_out([None if _has_pair(tree) else "no_preference" for tree in records.trees])
    _require(records)


def _require(records: Records) -> None:
    if records.rows != len(records.trees) + sum(records.dropped.values()):
        raise AssertionError(f"{records.rows} rows in, {len(records.trees)} kept and {sum(records.dropped.values())} dropped")
    if not records.trees:
        reasons = "; ".join(f"{count} {reason}: {why(reason)}" for reason, count in records.dropped.items())
        raise UserError(f"no record is left to evaluate on: {reasons}", where="data", fix="Give other data, or raise --max-length.")


def why(reason: str) -> str:
    """A reason for leaving a record out, in words."""
    return formats.REASONS[reason].meaning if reason in formats.REASONS else WHY.get(reason, reason)


def _values(
    model: LanguageModel | RewardModel, name: str, records: Records, request: Request, console: Console, notices: list[str]
) -> Values:
    notice = settle_layout(model)
    notices += [notice] if notice else []
    with meter(console, name, len(records.trees)) as shown:
        return response_values(model, records.trees, request.tokens_per_microbatch, shown.at)


def _finite(values: Sequence[Values], records: Records) -> list[Values]:
    """The values of the records that all models gave finite ones; the others are counted as dropped."""
    sound = [all(np.isfinite(one).all() for one in each) for each in zip(*values, strict=True)]
    records.leave_out([None if ok else "not_finite" for ok in sound])
    _require(records)
    return [[one for one, ok in zip(side, sound, strict=True) if ok] for side in values]
