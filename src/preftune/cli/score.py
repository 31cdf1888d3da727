"""`preftune score`: a reward model's scores on the responses of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from preftune.cli.choices import OnError, Precision


def score(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Records with responses.", show_default=False)],
    judge: Annotated[str, typer.Option(help="A reward model, ours or another tool's classifier.", show_default=False)],
    output: Annotated[Path, typer.Option(help="The records with scores: .jsonl, .json, either with .gz.", show_default=False)],
    attribute: Annotated[str | None, typer.Option(help="Name of the score beside those that are there; else it replaces them.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longest prompt and response together, in tokens.")] = 2048,
    tokens_per_microbatch: Annotated[int, typer.Option(min=1, help="Tokens through the model at once: for your memory alone.")] = 4096,
    precision: Annotated[Precision, typer.Option(help="auto takes bf16 where the hardware has it.")] = Precision.auto,
    format: Annotated[str, typer.Option(help="Row format, or auto.")] = "auto",
    on_error: Annotated[OnError, typer.Option(help="Stop at rows that cannot be used, or leave them out.")] = OnError.stop,
) -> None:
    """Add a reward model's score to every response."""
    from dataclasses import replace

    import torch

    from preftune import formats
    from preftune.cli.console import progress_console
    from preftune.errors import UserError
    from preftune.evaluation.measure import response_values
    from preftune.models import load
    from preftune.models.policy import RewardModel
    from preftune.training.progress import meter
    from preftune.training.setup import compute_dtype

    if formats.writable(output).exists():
        raise UserError("the file is there already", where=str(output), fix="Remove it, or give another --output.")
    examples = formats.read(list(files), format=format, on_error=on_error.value).examples
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = load.locate(judge)
    tokenizer = load.load_tokenizer(source)
    console = progress_console()
    trees = []
    for example in examples:
        tree, reason, *_ = tokenizer.encode(example, max_length)
        if tree is None:
            raise UserError(f"this record cannot be scored: {reason}", where=example.where, fix="Raise --max-length, or mend the record.")
        trees.append(tree)
    classifier = load.load_classifier(source)
    if classifier is None:
        raise UserError("this is no reward model: it has no score head", where=judge, fix="Train one with `preftune train reward`.")
    model = RewardModel(classifier, head=load.score_head(classifier)[1], compute=compute_dtype(precision.value, device)).to(device)
    with meter(console, "records", len(trees)) as shown:
        values = response_values(model, trees, tokens_per_microbatch, shown.at)
    scored = []
    for example, found in zip(examples, values, strict=True):
        given = (float(value) for value in found)
        responses = tuple(replace(r, score=_beside(r.score, attribute, one)) for r, one in zip(example.responses, given, strict=True))
        scored.append(replace(example, responses=responses))
    formats.write(scored, output)
    console.print(f"[bold]{output}[/bold]: {sum(map(len, values))} responses scored", soft_wrap=True)


def _beside(score: object, attribute: str | None, value: float) -> float | dict[str, float]:
    """The new score, under its name beside the others where it has one."""
    if attribute is None:
        return value
    others = dict(score) if isinstance(score, dict) else {} if score is None else {"overall": score}
    return {**others, attribute: value}  # type: ignore[dict-item]
