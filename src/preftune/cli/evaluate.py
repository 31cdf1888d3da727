"""`preftune evaluate`: what a reward model or a policy says of held-out records, in plain words and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preftune.cli.choices import OnError, Precision
from preftune.report.words import DASH, SCALED, quantity

if TYPE_CHECKING:
    from rich.table import Table

    from preftune.evaluation.held_out import Report
    from preftune.evaluation.preferences import Figure


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A reward model or a policy, as `train` takes it.", show_default=False)],
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help="Held-out records, as `train` takes them.", show_default=False)],
    reference: Annotated[str | None, typer.Option(help="The model that a policy is compared with, usually its start.")] = None,
    eval_fraction: Annotated[
        float | None, typer.Option(min=0, max=1, help="Only the prompts that a run with this eval_fraction held out.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The seed of that run.")] = 0,
    format: Annotated[str, typer.Option(help="Row format of DATA, or auto.")] = "auto",
    on_error: Annotated[OnError, typer.Option(help="Stop at rows that cannot be used, or leave them out.")] = OnError.stop,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most so many rows.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longest prompt and response together, in tokens.")] = 1024,
    tokens_per_microbatch: Annotated[int, typer.Option(min=1, help="Tokens through the model at once: for your memory alone.")] = 4096,
    precision: Annotated[Precision, typer.Option(help="auto takes bf16 where the hardware has it.")] = Precision.auto,
    level: Annotated[float, typer.Option(min=0.5, max=0.999, help="How sure the intervals are.")] = 0.95,
    output: Annotated[Path | None, typer.Option(help="Write every figure, with hashes of data and models, to this JSON file.")] = None,
) -> None:
    """Say what a reward model or a policy makes of held-out records, with intervals."""
    from rich.console import Console

    from preftune.cli.console import progress_console
    from preftune.evaluation.held_out import Request
    from preftune.evaluation.held_out import evaluate as run

    request = Request(
        model=model,
        data=tuple(data),
        reference=reference,
        format=format,
        on_error=on_error.value,
        limit=limit,
        eval_fraction=eval_fraction,
        seed=seed,
        max_length=max_length,
        tokens_per_microbatch=tokens_per_microbatch,
        precision=precision.value,
        level=level,
    )
    if output is not None:
        _writable(output)
    progress = progress_console()
    report = run(request, progress)
    for notice in report.notices:
        progress.print(f"[yellow]{notice}[/yellow]", soft_wrap=True)
    if output is not None:
        from preftune.training.durable import explained, replace_file

        with explained("writing the figures", output):
            replace_file(output, json.dumps(report.plain(), indent=1, ensure_ascii=False).encode())
    console = Console(highlight=False)
    for line in sentences(report):
        console.print(line, soft_wrap=True, markup=False)
    console.print(table(report))
    if output is not None:
        console.print(f"All of it, with hashes: {output}", soft_wrap=True, markup=False)


def _writable(path: Path) -> None:
    """Say before minutes of work that the result could not be written."""
    from preftune.errors import UserError

    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "the output is a directory" if path.is_dir() else "its folder does not exist"
        raise UserError(what, where=str(path), fix="Give the name of a file in an existing folder.")


def sentences(report: Report) -> list[str]:
    """What was evaluated on what, and what was left out and why."""
    from preftune.evaluation.held_out import why

    records = report.records
    prompts = len(set(records.prompts))
    kind = "reward model" if report.kind == "reward" else "policy"
    reference = f", beside the reference {report.request.reference}" if report.request.reference else ""
    lines = [
        f"{report.request.model}, a {kind}{reference}, on {', '.join(report.request.data)}",
        f"{records.rows} records read as {records.format}: {len(records.trees)} kept, of {prompts} prompts",
    ]
    if report.without_pair:
        lines.append(f"  {report.without_pair} of them have no preferred response and count for perplexity and length alone")
    for reason, count in records.dropped.items():
        places = ", ".join(records.where.get(reason, [])[:3])
        lines.append(f"  {count} dropped, {reason}: {why(reason)}{f' ({places})' if places else ''}")
    if records.truncated:
        lines.append(f"  {records.truncated} responses cut to max_length")
    return lines


def table(report: Report) -> Table:
    """Every figure with its interval, and under its name what it means."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    level = f"{100 * report.request.level:g}% interval"
    found = Table(box=box.SIMPLE, caption=_CAPTION, caption_justify="left")
    found.add_column("figure, and what it means")
    for name in ("value", level, "n"):
        found.add_column(name, justify="right", no_wrap=True)
    for figure in report.figures:
        one = figure.estimate
        title = Text.assemble((figure.name, "bold"), "\n", (figure.about, "dim"))
        found.add_row(title, quantity(one.value, figure.unit), _interval(figure), f"{one.n:,}")
    return found


def _interval(figure: Figure) -> str:
    unit = figure.unit if figure.unit in SCALED else ""
    low, high = (quantity(end, unit) for end in (figure.estimate.low, figure.estimate.high))
    return f"{low} to {high}" if low != DASH else DASH


_CAPTION = (
    "Intervals resample whole prompts. A tie counts as half right. n counts pairs, or responses. A dash: not defined for these records."
)
