"""`preftune sample`: responses of a model to the prompts of a file, as records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from preftune.cli.choices import OnError, Precision
from preftune.cli.processes import require_one_process
from preftune.errors import UserError
from preftune.rollout.config import EngineName

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.records import Example
    from preftune.rollout.config import VllmConfig
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
    engine: Annotated[EngineName, typer.Option(help="The engine here, or a vLLM server that is started for it.")] = EngineName.local,
    vllm_python: Annotated[str | None, typer.Option(help="Python that has vLLM installed; else the one that runs Preftune.")] = None,
    vllm_url: Annotated[str | None, typer.Option(help="A vLLM server on this machine that serves MODEL already.")] = None,
    vllm_argument: Annotated[list[str] | None, typer.Option(help="A word for `vllm serve`; may be given again.")] = None,
) -> None:
    """Draw N responses of a model to each prompt, and write them as records with log-probabilities; goes on where it was stopped."""
    from preftune.cli.console import progress_console
    from preftune.formats import read_prompts, writable
    from preftune.rollout.sampling import Sampling

    require_one_process("preftune sample")
    vllm = _vllm(engine, vllm_python, vllm_url, vllm_argument)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, tuple(stop or ()))
    if writable(output).exists():
        raise UserError("the file is there already", where=str(output), fix="Remove it, or give another --output.")
    found = read_prompts(prompts, format=format, on_error=on_error.value, limit=limit)
    console = progress_console()
    console.print(f"{len(found.examples)} prompts read as {found.format}, {n} responses each", soft_wrap=True)
    raise typer.Exit(_draw(model, found.examples, n, sampling, seed, output, precision.value, cache_gb, vllm, console))


def _vllm(engine: EngineName, python: str | None, url: str | None, arguments: list[str] | None) -> VllmConfig | None:
    """The server's settings, or None for the local engine."""
    from preftune import configfile
    from preftune.rollout.config import VllmConfig

    given = {"python": python, "url": url, "arguments": arguments or []}
    if engine is EngineName.vllm:
        return configfile.load(VllmConfig, None, base=given)
    for name, value in given.items():
        if value:
            word = f"--vllm-{name.rstrip('s')}"
            raise UserError(f"{word} has no effect without --engine vllm", where=word)
    return None


def _draw(
    model: str,
    examples: Sequence[Example],
    n: int,
    sampling: Sampling,
    seed: int,
    output: Path,
    precision: str,
    cache_gb: float,
    vllm: VllmConfig | None,
    console: Console,
) -> int:
    import tempfile
    from contextlib import ExitStack

    import torch

    from preftune import formats
    from preftune.models import load
    from preftune.models.policy import LanguageModel, settle_layout
    from preftune.rollout.agreement import agreement, said
    from preftune.rollout.draw import draw, lacking, records
    from preftune.rollout.engine import Engine
    from preftune.rollout.folder import plain_folder, turn_ends
    from preftune.rollout.journal import Journal
    from preftune.rollout.vllm import VllmServer
    from preftune.training.progress import meter
    from preftune.training.setup import compute_dtype
    from preftune.training.signals import GracefulStop

    source = load.locate(model)
    tokenizer = load.load_tokenizer(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compute = compute_dtype(precision, device)
    header = {"samples": 1, "model": load.fingerprint(source), "seed": seed, "precision": str(compute), **asdict(sampling)}
    header |= {"stop": list(sampling.stop), **({"engine": "vllm"} if vllm else {})}
    say = lambda line: console.print(line, soft_wrap=True, style="yellow", markup=False)

    def policy() -> LanguageModel:
        with console.status(f"loading {source.name}"):
            found = LanguageModel(load.load_causal_lm(source), compute=compute).to(device)
        notice = settle_layout(found)
        if notice:
            say(notice)
        return found

    def local() -> Engine:
        found = policy()
        return Engine(found, tokenizer.turn_ends | frozenset(load.eos_ids(found.hf)), tokenizer.decode, int(cache_gb * 1e9))

    def server(config: VllmConfig, stack: ExitStack) -> VllmServer:
        folder = plain_folder(source, tokenizer, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        ends = tokenizer.turn_ends | turn_ends(folder)
        cache = int(cache_gb * 1e9)
        found = stack.enter_context(VllmServer(config, folder, ends, tokenizer.decode, compute=compute, cache_bytes=cache, say=say))
        if config.url:
            found.prove(policy(), tokenizer)
        else:
            console.print(f"vLLM starts to serve {source.name}; this may take minutes", soft_wrap=True)
        return found

    with GracefulStop() as stop, Journal(output.with_name(f"{output.name}.partial"), header) as journal:
        total = n * len(examples)
        done = total - sum(map(len, lacking(examples, n, journal)))
        if done:
            console.print(f"going on: {done} of {total} responses are there", soft_wrap=True)
        if done < total:
            with ExitStack() as stack:
                engine = server(vllm, stack) if vllm else local()
                shown = stack.enter_context(meter(console, "responses", total, done))
                give_up = lambda: stop.requested is not None
                whole = draw(engine, tokenizer, examples, n, sampling, seed, journal, on_done=shown.at, give_up=give_up)
            if not whole:
                kept = total - sum(map(len, lacking(examples, n, journal)))
                console.print(f"stopped: {kept} of {total} responses are kept; the same command goes on", soft_wrap=True)
                return stop.exit_code
            if isinstance(engine, VllmServer):  # the server has left by now, and its memory is free
                console.print(said(agreement(policy(), engine.seen), compute), soft_wrap=True)
        formats.write(records(examples, journal, n, model), output)
        journal.path.unlink()
    console.print(f"[bold]{output}[/bold]", soft_wrap=True)
    return 0
