"""What a data set holds, in numbers: for people who look at their data before they train on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from preftune.formats.dataset import Dataset
from preftune.formats.order import strict_pairs
from preftune.formats.split import prompt_key
from preftune.records import Example


@dataclass(frozen=True, slots=True)
class Lengths:
    """Smallest, median, mean, 95th percentile and largest length, in characters."""

    least: int
    median: int
    mean: float
    p95: int
    most: int


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts over the examples kept.

    `repeated_examples` have the same prompt and responses as an earlier one; `tied` have several responses and none better;
    `first_longer` is the share of strict pairs whose better response is longer, the accuracy of judging by length alone.
    """

    examples: int
    prompts: int
    repeated_examples: int
    responses_per_example: dict[int, int]
    turns_per_prompt: dict[int, int]
    plain_prompts: int
    strict_pairs: int
    tied: int
    first_longer: float | None
    labels: dict[bool, int]
    scored: int
    prompt_lengths: Lengths
    response_lengths: Lengths


def summarise(dataset: Dataset) -> Summary:
    """Summarise the examples of a data set that has at least one."""
    examples = dataset.examples
    pairs = [(example, pair) for example in examples for pair in strict_pairs(example)]
    won = [_longer(example, better, worse) for example, (better, worse) in pairs]
    responses = [response for example in examples for response in example.responses]
    return Summary(
        examples=len(examples),
        prompts=len({prompt_key(example) for example in examples}),
        repeated_examples=len(examples) - len({example.id for example in examples}),
        responses_per_example=_histogram(len(example.responses) for example in examples),
        turns_per_prompt=_histogram(len(example.prompt) for example in examples if not isinstance(example.prompt, str)),
        plain_prompts=sum(isinstance(example.prompt, str) for example in examples),
        strict_pairs=len(pairs),
        tied=sum(len(example.responses) > 1 and not strict_pairs(example) for example in examples),
        first_longer=sum(won) / len(won) if won else None,
        labels=dict(Counter(response.label for response in responses if response.label is not None)),
        scored=sum(response.score is not None for response in responses),
        prompt_lengths=lengths(_prompt_length(example) for example in examples),
        response_lengths=lengths(len(response.text) for response in responses),
    )


def lengths(values: Iterable[int]) -> Lengths:
    """Order statistics by the nearest rank."""
    ordered = sorted(values)
    return Lengths(ordered[0], _rank(ordered, 0.5), sum(ordered) / len(ordered), _rank(ordered, 0.95), ordered[-1])


def _rank(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _histogram(values: Iterable[int]) -> dict[int, int]:
    return dict(sorted(Counter(values).items()))


def _prompt_length(example: Example) -> int:
    prompt = example.prompt
    return len(prompt) if isinstance(prompt, str) else sum(len(turn.content) for turn in prompt)


def _longer(example: Example, better: int, worse: int) -> float:
    a, b = len(example.responses[better].text), len(example.responses[worse].text)
    return 0.5 if a == b else float(a > b)
