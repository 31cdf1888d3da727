"""`preftune select`: scored samples to training records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preftune.cli.choices import OnError
from preftune.cli.processes import require_one_process
from preftune.selection.pairing import PAIRINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from preftune.records import Example
    from preftune.selection.select import Selected

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Turn scored samples into training records.")

Samples = Annotated[list[str], typer.Argument(metavar="FILE...", help="Records whose responses have scores.", show_default=False)]
Output = Annotated[Path, typer.Option(help="Where the records go: .jsonl, .json, either with .gz.", show_default=False)]
By = Annotated[str | None, typer.Option(help="Attribute to go by, where scores have several.")]
Errors = Annotated[OnError, typer.Option(help="Stop at rows that cannot be used, or leave them out.")]


@app.command()
def best(files: Samples, output: Output, by: By = None, on_error: Errors = OnError.stop) -> None:
    """Keep the best response of each prompt (Best-of-N, and RAFT's local option): for SFT."""
    from preftune.cli.console import progress_console
    from preftune.selection import select
    from preftune.selection.best_of_n import best_of_n_curve, in_words

    examples = _read(files, output, on_error)
    _write(select.choose(examples, select.best, by), output)
    known, _ = select.with_scores(examples, by)
    if scores := [found for example in known if len(found := select.scores_of(example, by))]:
        progress_console().print(in_words(best_of_n_curve([one.tolist() for one in scores])), soft_wrap=True)


@app.command()
def top(
    files: Samples,
    output: Output,
    k: Annotated[int, typer.Option("-k", min=1, help="Responses to keep of each prompt.")] = 2,
    by: By = None,
    on_error: Errors = OnError.stop,
) -> None:
    """Keep the k best responses of each prompt."""
    from preftune.selection import select

    _write(select.choose(_read(files, output, on_error), select.top(k), by), output)


@app.command()
def threshold(
    files: Samples,
    output: Output,
    least: Annotated[float, typer.Option("--at-least", help="Lowest score that stays.", show_default=False)],
    by: By = None,
    on_error: Errors = OnError.stop,
) -> None:
    """Keep every response that scores at least so much."""
    from preftune.selection import select

    _write(select.choose(_read(files, output, on_error), select.threshold(least), by), output)


@app.command()
def raft(
    files: Samples,
    output: Output,
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of all responses that stays.")] = 0.2,
    by: By = None,
    on_error: Errors = OnError.stop,
) -> None:
    """Keep the best share of all responses, whatever their prompt (RAFT's global option)."""
    from preftune.selection import select

    _write(select.raft(_read(files, output, on_error), share, by), output)


@app.command()
def rso(
    files: Samples,
    output: Output,
    count: Annotated[int, typer.Option(min=1, help="Responses to accept of each prompt.")] = 8,
    beta: Annotated[float, typer.Option(min=0, help="0 takes the highest scores, a large one any.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    by: By = None,
    on_error: Errors = OnError.stop,
) -> None:
    """Accept responses by statistical rejection sampling (RSO): draws from policy * exp(score / beta)."""
    from preftune.selection import select

    _write(select.choose(_read(files, output, on_error), select.rso(count, beta, seed), by), output)


@app.command()
def pairs(
    files: Samples,
    output: Output,
    how: Annotated[str, typer.Option(help=f"Which two meet: {', '.join(PAIRINGS)}.")] = "first_round",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffles.")] = 0,
    by: By = None,
    on_error: Errors = OnError.stop,
) -> None:
    """Make pairs of a better and a worse response: for DPO and reward models. Ties give none."""
    from preftune.errors import UserError
    from preftune.selection import select

    if how not in PAIRINGS:
        raise UserError(f"unknown pairing {how!r}", where="--how", fix=f"Known: {', '.join(PAIRINGS)}.")
    _write(select.pairs(_read(files, output, on_error), how, seed, by), output)


def _read(files: Sequence[str], output: Path, on_error: OnError) -> Sequence[Example]:
    from preftune import formats
    from preftune.errors import UserError

    require_one_process("preftune select")
    if formats.writable(output).exists():
        raise UserError("the file is there already", where=str(output), fix="Remove it, or give another --output.")
    return formats.read(list(files), on_error=on_error.value).examples


def _write(found: Selected, output: Path) -> None:
    """Write the records, and say how many stayed and what became of the scores."""
    from preftune import formats
    from preftune.cli.console import progress_console
    from preftune.errors import UserError

    if not found.examples:
        total = len(found.before) + found.unscored
        raise UserError(f"none of {total} responses stayed", fix="Choose a lower bar, or score the file anew.")
    formats.write(found.examples, output)
    console = progress_console()
    share = len(found.after) / len(found.before)
    console.print(
        f"{len(found.before)} responses, {len(found.after)} stayed ({share:.0%}), in {len(found.examples)} records", soft_wrap=True
    )
    for name, scores in (("before", found.before), ("after", found.after)):
        spread = (
            f"mean {scores.mean():.4g}, least {scores.min():.4g}, median {sorted(scores)[len(scores) // 2]:.4g}, most {scores.max():.4g}"
        )
        console.print(f"scores {name}: {spread}", soft_wrap=True)
    if found.unscored:
        console.print(f"{found.unscored} more responses have no score and are left out", soft_wrap=True)
    if found.prompts_without:
        console.print(f"{found.prompts_without} prompts are left with nothing", soft_wrap=True)
    console.print(f"[bold]{output}[/bold]", soft_wrap=True)
