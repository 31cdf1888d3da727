"""`preftune score`: a judge's scores on the responses of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from preftune.cli.choices import OnError, Precision
from preftune.cli.processes import require_one_process


def score(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Records with responses.", show_default=False)],
    judge: Annotated[
        str,
        typer.Option(
            help="A reward model, a rule (final_answer, length, ... or module:function, file.py:function), or a .yaml file with a judge.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(help="The records with scores: .jsonl, .json, either with .gz.", show_default=False)],
    attribute: Annotated[str | None, typer.Option(help="Name of the score beside those that are there; else it replaces them.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Longest prompt and response together, in tokens.")] = 2048,
    tokens_per_microbatch: Annotated[int, typer.Option(min=1, help="Tokens through the model at once: for your memory alone.")] = 4096,
    precision: Annotated[Precision, typer.Option(help="auto takes bf16 where the hardware has it.")] = Precision.auto,
    format: Annotated[str, typer.Option(help="Row format, or auto.")] = "auto",
    on_error: Annotated[OnError, typer.Option(help="Stop at rows that cannot be used, or leave them out.")] = OnError.stop,
) -> None:
    """Add a judge's score to every response; goes on where it was stopped."""
    import torch

    from preftune import formats
    from preftune.cli.console import progress_console
    from preftune.errors import UserError
    from preftune.rewards.config import parse
    from preftune.rewards.judge import header, open_judge, without_score
    from preftune.rewards.judge import score as score_all
    from preftune.rollout.journal import Journal
    from preftune.training.progress import meter
    from preftune.training.setup import compute_dtype
    from preftune.training.signals import GracefulStop

    require_one_process("preftune score")
    config = parse(judge)
    if formats.writable(output).exists():
        raise UserError("the file is there already", where=str(output), fix="Remove it, or give another --output.")
    examples = formats.read(list(files), format=format, on_error=on_error.value).examples
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute_dtype(precision.value, device)
    opened = open_judge(config, compute=compute, device=device, max_length=max_length, tokens_per_microbatch=tokens_per_microbatch)
    console = progress_console()
    for notice in opened.notices:
        console.print(f"[yellow]{notice}[/yellow]", soft_wrap=True)
    partial = output.with_name(f"{output.name}.partial")
    with GracefulStop() as stop, Journal(partial, header(examples, opened)) as journal:
        if journal.done:
            console.print(f"going on: {len(journal.done)} of {len(examples)} records are scored", soft_wrap=True)
        with meter(console, "records", len(examples), len(journal.done)) as shown:
            give_up = lambda: stop.requested is not None
            scored = score_all(examples, opened.judge, journal, attribute, on_done=shown.at, give_up=give_up)
        if scored is None:
            console.print(f"stopped: {len(journal.done)} of {len(examples)} records are kept; the same command goes on", soft_wrap=True)
            raise typer.Exit(stop.exit_code)
    formats.write(scored, output)
    partial.unlink()
    total, lacking = sum(len(e.responses) for e in scored), without_score(scored, attribute)
    rest = f", {lacking} could not be scored" if lacking else ""
    console.print(f"[bold]{output}[/bold]: {total - lacking} responses scored{rest}", soft_wrap=True)
