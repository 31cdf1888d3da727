"""The command line. Every command imports what it runs only when it runs, so that `--help` answers at once."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from preftune.cli.evaluate import evaluate
from preftune.cli.sample import sample
from preftune.cli.score import score
from preftune.errors import EXIT_NONFINITE, EXIT_SIGINT, EXIT_USER, NonFiniteError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from preftune.training.config import RunConfig

app = typer.Typer(
    name="preftune",
    help="From human feedback to an aligned language model.\n\nTry it on this machine, with nothing of your own:  preftune quickstart",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_WORDS_HELP = "A method (see preftune methods), a config file, and settings over it; a config that says `use: METHOD` needs no METHOD."
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="METHOD | CONFIG.yaml | KEY=VALUE", show_default=False, help=_WORDS_HELP),
]
_SETTING = re.compile(r"[A-Za-z_][\w.-]*=", re.ASCII)
# What the system says when the disk or a limit is full, whether or not the error names a file.
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)


def _examples(*lines: str) -> str:
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"  [cyan]{line}[/cyan]" for line in lines)


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        from preftune import __version__
        from preftune.cli.console import say

        say(f"preftune {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command(
    epilog=_examples(
        "preftune train dpo model=smollm2 data=pairs.jsonl output=runs/dpo",
        "preftune train recipes/dpo.yaml lr=1e-6 method.beta=0.05",
        "torchrun --nproc-per-node 2 -m preftune train recipes/dpo.yaml",
    )
)
def train(words: Words = None) -> None:
    """Train a model, or go on with a run that was stopped."""
    name, config = resolve(words or [])
    from preftune.cli.console import progress_console

    code = start(name, config, progress_console())
    if code == 0 and os.environ.get("RANK", "0") == "0":
        from preftune.report.page import write

        progress_console().print(f"What happened, in pictures: {write(Path(config.output))}", soft_wrap=True, highlight=False)
    raise typer.Exit(code)


@app.command(epilog=_examples("preftune check recipes/dpo.yaml", "preftune check dpo model=smollm2 data=pairs.jsonl output=runs/dpo"))
def check(words: Words = None) -> None:
    """Prove before step 1 that your model and data fit together; each line passes or fails with its cause."""
    name, config = resolve(words or [])
    from preftune.cli.console import progress_console
    from preftune.online.config import OnlineConfig
    from preftune.rounds.config import RoundsConfig

    if isinstance(config, RoundsConfig):
        from preftune.rounds.ready import check as in_rounds

        raise typer.Exit(0 if in_rounds(name, config, progress_console()) else EXIT_USER)
    if isinstance(config, OnlineConfig):
        from preftune.online.ready import check as online

        raise typer.Exit(0 if online(name, config, progress_console()) else EXIT_USER)
    from preftune.training.check import check as run

    raise typer.Exit(0 if run(name, config, progress_console()) else EXIT_USER)


@app.command(
    "config",
    epilog=_examples(
        "preftune config dpo > dpo.yaml",
        "preftune config recipes/dpo.yaml lr=1e-6",
        "preftune config dpo --json-schema > dpo.schema.json",
    ),
)
def show_config(
    words: Words = None,
    schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON Schema instead, for editors.")] = False,
) -> None:
    """Print every key of a method's config with its default and doc; with a CONFIG or settings, the config they make."""
    from preftune import configfile, configschema
    from preftune.cli.console import say

    name, path, overrides = parse(words or [])
    from preftune.online.methods import config_kind  # which needs torch: not before the words are known to be sound

    kind = config_kind(name)
    if schema:
        import json

        say(json.dumps(configfile.json_schema(kind), indent=2))
    elif path or overrides:
        say(configfile.to_yaml(configfile.load(kind, path, overrides)))
    else:
        say(configschema.template(kind))


@app.command(epilog=_examples("preftune methods"))
def methods(markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False) -> None:
    """List the methods: what each is, needs and where it comes from."""
    from preftune.cli import docs
    from preftune.cli.console import say

    if markdown:
        say(docs.methods_table())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "title", "each record needs", "paper", "what it does")
    for row in docs.method_rows():
        table.add_row(*row)
    Console().print(table)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog=_examples("preftune data show pairs.jsonl", "preftune data convert pairs.jsonl out.jsonl --to trl"),
)
def data(ctx: typer.Context) -> None:
    """Show what a file of records holds, or convert it."""
    from preftune.cli.data import app as data_app

    raise typer.Exit(data_app(ctx.args, prog_name="preftune data", standalone_mode=False) or 0)


@app.command(epilog=_examples("preftune quickstart", "preftune quickstart --output runs/first"))
def quickstart(output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart")) -> None:
    """Fine-tune, train a reward model, run DPO and evaluate on a bundled model and data, in minutes, with a report."""
    from preftune.cli.console import progress_console
    from preftune.quickstart import quickstart as run

    raise typer.Exit(run(output, progress_console()) or 0)


@app.command(epilog=_examples("preftune chat runs/quickstart/dpo/final", "preftune chat smollm2 --temperature 0.7"))
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, a .gguf file, or smollm2.", show_default=False)],
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
) -> None:
    """Talk to a model."""
    from preftune.cli.chat import chat as run
    from preftune.rollout.sampling import Sampling

    raise typer.Exit(run(model, Sampling(max_new_tokens, temperature, top_p), seed) or 0)


app.command(
    epilog=_examples(
        "preftune sample smollm2 --prompts sample:hh_pairs -n 4 --output samples.jsonl",
        "preftune sample runs/sft/final --prompts prompts.jsonl -n 8 --temperature 0.7 --output samples.jsonl",
    )
)(sample)
app.command(epilog=_examples("preftune score samples.jsonl --judge runs/reward/final --output scored.jsonl"))(score)


@app.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog=_examples(
        "preftune select best scored.jsonl --output sft.jsonl",
        "preftune select rso scored.jsonl --count 8 --beta 0.5 --output accepted.jsonl",
        "preftune select pairs accepted.jsonl --how first_round --output pairs.jsonl",
    ),
)
def select(ctx: typer.Context) -> None:
    """Turn scored samples into training records: best, top, threshold, raft, rso or pairs."""
    from preftune.cli.select import app as select_app

    raise typer.Exit(select_app(ctx.args, prog_name="preftune select", standalone_mode=False) or 0)


app.command(
    epilog=_examples(
        "preftune evaluate runs/reward/final pairs.jsonl --eval-fraction 0.1",
        "preftune evaluate runs/dpo/final held-out.jsonl --reference runs/sft/final --output dpo.json",
    )
)(evaluate)


@app.command(epilog=_examples("preftune report runs/dpo"))
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]) -> None:
    """Write a run's report.html again."""
    from preftune.cli.console import say
    from preftune.report.page import write

    say(str(write(run)))


def start(name: str, config: RunConfig, console: Console) -> int:
    """Train as the config says, at once, in rounds or online; returns the exit code."""
    from preftune.online.config import OnlineConfig
    from preftune.rounds.config import RoundsConfig

    if isinstance(config, RoundsConfig):
        from preftune.rounds.run import train as in_rounds

        return in_rounds(name, config, console)
    if isinstance(config, OnlineConfig):
        from preftune.online.run import train as online

        return online(name, config, console)
    from preftune.training.run import train as at_once

    return at_once(name, config, console)


def parse(words: Sequence[str]) -> tuple[str, Path | None, list[str]]:
    """METHOD, CONFIG.yaml and KEY=VALUE words, told apart by their looks; the config's `use` stands in for METHOD.

    Raises UserError where there is no method, or two of one thing.
    """
    overrides = [word for word in words if _SETTING.match(word)]
    rest = [word for word in words if not _SETTING.match(word)]
    configs = [word for word in rest if word.endswith((".yaml", ".yml", ".json")) or os.sep in word]
    names = [word for word in rest if word not in configs]
    for kind, found in (("config files", configs), ("methods", names)):
        if len(found) > 1:
            raise UserError(f"two {kind} were given: {found[0]} and {found[1]}", fix="Give one; settings are written key=value.")
    path = Path(configs[0]) if configs else None
    used = None
    if path is not None:
        from preftune.configfile import peek

        used = peek(path, "use")
    name = names[0] if names else used
    if name is None:
        fix = "Name one (`preftune methods` lists them)" + (f", or write `use: METHOD` in {path}." if path else ".")
        raise UserError("no method was given", where=str(path or ""), fix=fix)
    if used is not None and name != used:
        raise UserError(f"the config says `use: {used}` but the command says {name}", where=str(path), fix="Remove one of them.")
    return str(name), path, overrides


def resolve(words: Sequence[str]) -> tuple[str, RunConfig]:
    """The method's name and the resolved config of a command's words."""
    from preftune.configfile import load

    name, path, overrides = parse(words)
    from preftune.online.methods import config_kind  # which needs torch: not before the words are known to be sound

    return name, load(config_kind(name), path, overrides)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what the user can mend is one line on stderr."""
    from preftune.cli.console import complain

    try:
        return int(app(arguments, prog_name="preftune", standalone_mode=False) or 0)
    except UserError as error:
        complain(str(error))
        return EXIT_USER
    except NonFiniteError as error:
        complain(str(error))
        return EXIT_NONFINITE
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_SIGINT
    except OSError as error:
        if error.filename is None and error.errno not in _NO_ROOM:
            raise
        complain(_os_error(error))
        return EXIT_USER
    except Exception as error:
        usage = _usage_error(error)
        if usage is None:
            raise
        complain(usage)
        return EXIT_USER


def main() -> None:
    """The command `preftune`."""
    from preftune.cli.preload import preload_allocator

    preload_allocator()
    sys.exit(run())


def _os_error(error: OSError) -> str:
    fixes: Mapping[int | None, str] = {
        errno.ENOSPC: "Free some disk space and run the same command again.",
        errno.EDQUOT: "Free some of your quota and run the same command again.",
        errno.EFBIG: "Raise the file size limit (ulimit -f) and run the same command again.",
        errno.EACCES: "Check its permissions.",
        errno.EROFS: "Choose another output folder.",
    }
    where = str(error.filename or "")
    return str(UserError(error.strerror or str(error), where=where, fix=fixes.get(error.errno, "")))


def _usage_error(error: Any) -> str | None:
    """The line of a wrong command or option, or None for any other error: typer's own classes for these are private."""
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "preftune"
    message = re.sub(r" \(Possible options.*\)", "", error.format_message())
    if "No such option" in message and path.rpartition(" ")[2] in ("train", "check", "config"):
        message += " (settings are written key=value)"
    message = message.rstrip(".")
    return f"{message}{'' if message.endswith('?') else '.'} See `{path} --help`."
