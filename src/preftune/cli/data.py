"""`preftune data`: look at a file of records before training on it, and turn it into other tools' formats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from preftune.cli.choices import OnError
from preftune.errors import UserError
from preftune.formats import FORMATS, REASONS, TARGETS, Dataset, read, write
from preftune.formats.summary import Lengths, Summary, summarise
from preftune.records import Example, Response

app = typer.Typer(
    name="data",
    help="Show what a file of records holds, or convert it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_ROWS_LISTED = 10
_TEXT_SHOWN = 600
# Control characters in data must not reach the terminal, where an escape sequence is a command.
_CONTROL = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

Source = Annotated[list[str], typer.Argument(metavar="FILE...", help="Files, a directory, a Hub id owner/name, or sample:hh_pairs.")]
FormatName = Annotated[str, typer.Option("--format", help=f"auto, or one of: {', '.join(FORMATS)}.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Read at most so many rows.")]


@app.command()
def show(
    source: Source,
    format: FormatName = "auto",
    limit: Limit = None,
    records: Annotated[int, typer.Option(min=0, help="How many records to print.")] = 3,
) -> None:
    """Print what was recognised, counts, rows that cannot be used, lengths, and a few records.

    Example: preftune data show pairs.jsonl
    """
    dataset = read(source, format=format, on_error="skip", limit=limit)
    console = Console(highlight=False)
    console.print(Text.assemble((_clean(", ".join(source)), "bold"), f": {dataset.format}, {_about(dataset)}"))
    console.print(_counts(dataset, summarise(dataset)))
    if dataset.dropped:
        console.print(_dropped(dataset))
    step = max(1, len(dataset.examples) // records) if records else 1
    for example in dataset.examples[::step][:records]:
        console.print(_record(example))
    console.print(Text(f"sha256 {dataset.sha256}", style="dim"))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="FILE", help="A file, a directory, a Hub id, or sample:hh_pairs.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write: .jsonl or .json, either with .gz.")],
    to: Annotated[str, typer.Option("--to", help=f"One of: {', '.join(TARGETS)}.")],
    format: FormatName = "auto",
    on_error: Annotated[OnError, typer.Option("--on-error", help="Stop at rows that cannot be used, or leave them out.")] = OnError.stop,
    limit: Limit = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it exists.")] = False,
) -> None:
    """Write the records of FILE as another format, and say what it cannot carry.

    Example: preftune data convert pairs.jsonl out.jsonl --to trl
    """
    if out.exists() and not overwrite:
        raise UserError("the file exists already", where=str(out), fix="Choose another name, or add --overwrite")
    try:
        dataset = read(source, format=format, on_error=on_error.value, limit=limit)
    except UserError as error:
        raise UserError(error.what, where=error.where, fix=error.fix.replace("set data.on_error=skip", "add --on-error skip")) from None
    written = write(dataset.examples, out, to)
    console = Console(highlight=False)
    console.print(Text(f"{source}: {dataset.format}, {dataset.rows:,} rows, {len(dataset.examples):,} records"), soft_wrap=True)
    console.print(Text(f"{written.path}: {to}, {written.rows:,} rows from {written.examples:,} records"), soft_wrap=True)
    for reason, count in dataset.dropped_by_reason().items():
        console.print(Text(f"  left out: {count:,} rows, {reason}: {REASONS[reason].meaning}"), soft_wrap=True)
    for why, count in written.left_out.items():
        console.print(Text(f"  left out: {count:,} {why}"), soft_wrap=True)
    for what, count in written.lost.items():
        console.print(Text(f"  not carried by {to}: {what} ({count:,} times)"), soft_wrap=True)


def _about(dataset: Dataset) -> str:
    return "; ".join(FORMATS[name].about for name in dataset.format.split(", "))


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8").translate(_CONTROL)


def _counts(dataset: Dataset, found: Summary) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("rows", f"{dataset.rows:,} = {len(dataset.examples):,} kept + {len(dataset.dropped):,} that cannot be used")
    table.add_row("prompts", f"{found.prompts:,} different, {_turns(found)}")
    table.add_row("responses", f"{_numbers(found.responses_per_example)} to a record")
    if found.strict_pairs or found.tied:
        longer = "" if found.first_longer is None else f"; the better one is longer in {found.first_longer:.0%}"
        table.add_row("pairs", f"{found.strict_pairs:,} with a better response{longer}")
        table.add_row("ties", f"{found.tied:,} records with several responses and none better")
    if found.labels:
        table.add_row("labels", f"{found.labels.get(True, 0):,} true, {found.labels.get(False, 0):,} false")
    if found.scored:
        table.add_row("scores", f"{found.scored:,} responses")
    table.add_row("repeated", f"{found.repeated_examples:,} records with the prompt and responses of an earlier one")
    table.add_row("prompt length", _lengths(found.prompt_lengths))
    table.add_row("response length", _lengths(found.response_lengths))
    return table


def _turns(found: Summary) -> str:
    kinds = [f"{found.plain_prompts:,} plain strings (used as they stand)"] if found.plain_prompts else []
    if found.turns_per_prompt:
        kinds.append(f"{_numbers(found.turns_per_prompt)} turns")
    return ", ".join(kinds)


def _numbers(histogram: Mapping[int, int]) -> str:
    """`2` where all are equal, else the smallest and largest with the most frequent: `1 to 5 (mostly 2)`."""
    if len(histogram) == 1:
        return str(next(iter(histogram)))
    return f"{min(histogram)} to {max(histogram)} (mostly {max(histogram, key=lambda value: histogram[value])})"


def _lengths(found: Lengths) -> str:
    return f"{found.least:,} to {found.most:,} characters, median {found.median:,}, mean {found.mean:,.0f}, 95% within {found.p95:,}"


def _dropped(dataset: Dataset) -> Group:
    lines = [Text(f"{len(dataset.dropped):,} rows cannot be used; training stops at them unless data.on_error=skip", style="yellow")]
    for reason, count in dataset.dropped_by_reason().items():
        lines.append(Text(f"  {count:,} {reason}: {REASONS[reason].meaning}; {REASONS[reason].fix}"))
    for one in dataset.dropped[:_ROWS_LISTED]:
        lines.append(Text(_clean(f"  {one.where} {one.reason}{f' ({one.detail})' if one.detail else ''}"), style="dim"))
    if len(dataset.dropped) > _ROWS_LISTED:
        lines.append(Text(f"  and {len(dataset.dropped) - _ROWS_LISTED:,} more", style="dim"))
    return Group(*lines)


def _record(example: Example) -> Panel:
    prompt = example.prompt
    parts = [_block("prompt", prompt)] if isinstance(prompt, str) else [_block(turn.role, turn.content) for turn in prompt]
    parts += [_block(_title(index, response), response.text) for index, response in enumerate(example.responses, 1)]
    if example.reference_answer is not None:
        parts.append(_block("reference answer", example.reference_answer))
    return Panel(Group(*parts), title=Text(_clean(example.where)), subtitle=Text(example.id), title_align="left", subtitle_align="right")


def _title(index: int, response: Response) -> str:
    facts = {"rank": response.rank, "score": response.score, "label": response.label}
    known = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return f"response {index}" + (f" ({known})" if known else "")


def _block(title: str, text: str) -> Text:
    shown = text if len(text) <= _TEXT_SHOWN else f"{text[:_TEXT_SHOWN]} ... ({len(text) - _TEXT_SHOWN:,} characters more)"
    return Text.assemble((f"{_clean(title)}: ", "bold cyan"), _clean(shown))
