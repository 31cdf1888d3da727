"""`preftune sample`: responses of a model to the prompts of a file, as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preftune.cli.choices import OnError, Precision
from preftune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.records import Example
    from preftune.rollout.sampling import Sampling


def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, a .gguf file, or smollm2.", show_default=False)],
    prompts: Annotated[list[str], typer.Option(help="Files with the prompts; responses in them are left out.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Records with the responses: .jsonl, .json, either with .gz.", show_default=False)],
    n: Annotated[int, typer.Option("-n", min=1, help="Responses to each prompt.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Never draw a token this many times less likely than the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Divide the logits of tokens that were there already; 1 is off.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 256,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends a response and is left out; may be given again.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="A response depends on seed, prompt and number alone.")] = 0,
    format: Annotated[str, typer.Option(help="Row format of the prompts, or auto.")] = "auto",
    on_error: Annotated[OnError, typer.Option(help="Stop at rows that cannot be used, or leave them out.")] = OnError.stop,
    limit: Annotated[int | None, typer.Option(min=1, help="Read at most so many rows.")] = None,
    precision: Annotated[Precision, typer.Option(help="auto takes bf16 where the hardware has it.")] = Precision.auto,
    cache_gb: Annotated[float, typer.Option(min=0.001, help="Keys and values in memory at once: lower it when memory runs out.")] = 2.0,
) -> None:
    """Draw N responses of a model to each prompt, and write them as records with log-probabilities; goes on where it was stopped."""
    from preftune.cli.console import progress_console
    from preftune.formats import read_prompts, writable
    from preftune.rollout.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, tuple(stop or ()))
    if writable(output).exists():
        raise UserError("the file is there already", where=str(output), fix="Remove it, or give another --output.")
    found = read_prompts(prompts, format=format, on_error=on_error.value, limit=limit)
    console = progress_console()
    console.print(f"{len(found.examples)} prompts read as {found.format}, {n} responses each", soft_wrap=True)
    raise typer.Exit(_draw(model, found.examples, n, sampling, seed, output, precision.value, cache_gb, console))


def _draw(
    model: str,
    examples: Sequence[Example],
    n: int,
    sampling: Sampling,
    seed: int,
    output: Path,
    precision: str,
    cache_gb: float,
    console: Console,
) -> int:
    import torch

    from preftune import formats
    from preftune.models import load
    from preftune.models.policy import LanguageModel, settle_layout
    from preftune.rollout.draw import draw, lacking, records
    from preftune.rollout.engine import Engine
    from preftune.rollout.journal import Journal
    from preftune.training.progress import meter
    from preftune.training.setup import compute_dtype
    from preftune.training.signals import GracefulStop

    source = load.locate(model)
    tokenizer = load.load_tokenizer(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute_dtype(precision, device)
    header = {"samples": 1, "model": load.fingerprint(source), "seed": seed, "precision": str(compute), **asdict(sampling)}
    header["stop"] = list(sampling.stop)
    with GracefulStop() as stop, Journal(output.with_name(f"{output.name}.partial"), header) as journal:
        total = n * len(examples)
        done = total - sum(map(len, lacking(examples, n, journal)))
        if done:
            console.print(f"going on: {done} of {total} responses are there", soft_wrap=True)
        if done < total:
            with console.status(f"loading {source.name}"):
                policy = LanguageModel(load.load_causal_lm(source), compute=compute).to(device)
            notice = settle_layout(policy)
            if notice:
                console.print(f"[yellow]{notice}[/yellow]", soft_wrap=True)
            ends = tokenizer.turn_ends | frozenset(load.eos_ids(policy.hf))
            engine = Engine(policy, ends, tokenizer.decode, int(cache_gb * 1e9))
            with meter(console, "responses", total, done) as shown:
                give_up = lambda: stop.requested is not None
                if not draw(engine, tokenizer, examples, n, sampling, seed, journal, on_done=shown.at, give_up=give_up):
                    kept = total - sum(map(len, lacking(examples, n, journal)))
                    console.print(f"stopped: {kept} of {total} responses are kept; the same command goes on", soft_wrap=True)
                    return stop.exit_code
        formats.write(records(examples, journal, n, model), output)
        journal.path.unlink()
    console.print(f"[bold]{output}[/bold]", soft_wrap=True)
    return 0
