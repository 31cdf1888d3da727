"""Pages written from the code: `python -m preftune.cli.docs [ROOT]` rewrites docs/configuration.md, and what is marked in other pages.

`<!-- methods -->` ... `<!-- /methods -->` holds the table of methods, `<!-- method NAME -->` ... `<!-- /method NAME -->` the facts of one.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from preftune.configschema import Row, keys
from preftune.methods import METHODS, Method
from preftune.online.config import OnlineConfig
from preftune.online.knobs import OnlineKnobs
from preftune.online.methods import ONLINE, Online, config_kind
from preftune.packing.chat import Tree
from preftune.rounds.config import RoundsConfig
from preftune.rounds.methods import ITERATED, Iterated
from preftune.training.config import RunConfig, run_config

CONFIGURATION = Path("docs/configuration.md")
README = Path("README.md")
METHODS_PAGE = Path("docs/methods.md")
ONLINE_PAGE = Path("docs/online.md")
MARKED = (README, METHODS_PAGE, ONLINE_PAGE)
"""Pages that a person writes but for what stands between their markers."""

_MARKER = re.compile(r"(<!-- (methods|method ([\w+-]+)) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
_ARXIV = re.compile(r"\d{4}\.\d{4,5}")

_ROUNDS_ALONE = RoundsConfig.model_fields.keys() - RunConfig.model_fields.keys()
"""Keys that only a run in rounds has."""
_ONLINE_ALONE = OnlineConfig.model_fields.keys() - RunConfig.model_fields.keys()
"""Keys that only an online run has."""

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m preftune.cli.docs`: change the descriptions in the code, not this page. -->

A run is told everything by a YAML file, by `key=value` words on the command line, or both:

```
preftune train dpo model=smollm2 data=pairs.jsonl output=runs/dpo
preftune train recipes/dpo.yaml lr=1e-6 method.beta=0.05
```

- `preftune config METHOD` prints a file with every key, its default and what it does; `preftune config CONFIG.yaml key=value`
  prints the config that a command would run with; `--json-schema` prints a schema for editors.
- A file that says `use: METHOD` needs no METHOD on the command line.
- A key inside a section is written `section.key=value` on the command line. Such a word changes only the key it names.
- Values are YAML: `lr=1e-5`, `data=[a.jsonl,b.jsonl]`, `eval_every=null`, `lora={rank: 8}`.
- Nothing is guessed: an unknown key, a key given twice, a value of another type or an option that another one makes useless is an
  error that names the file, line and column and the nearest right key. Exit code 2.
"""


def configuration_page() -> str:
    """docs/configuration.md: every key of every method, and every command."""
    parts = [_INTRODUCTION, "## Keys of every run\n\n" + _table(row for row in keys(RunConfig) if row.key != "method")]
    parts += [_method_section(name, method) for name, method in METHODS.items()]
    shared = [row for row in keys(RoundsConfig) if row.key.partition(".")[0] in _ROUNDS_ALONE]
    parts.append("## Keys of every method in rounds\n\n" + _table(shared))
    parts += [_own_section(row) for row in ITERATED.values()]
    shared = [row for row in keys(OnlineConfig) if row.key.partition(".")[0] in _ONLINE_ALONE]
    parts.append("## Keys of every online method\n\n" + _table(shared))
    parts += [_own_section(row) for row in ONLINE.values()]
    parts.append("## Commands\n\n" + "\n".join(f"- `preftune {name}`: {help}" for name, help in commands()) + "\n")
    return "\n".join(parts)


def methods_table() -> str:
    """The methods as a Markdown table."""
    lines = ["| method | title | what each record needs | paper | what it does |", "| --- | --- | --- | --- | --- |"]
    for name, title, needs, paper, summary in method_rows():
        lines.append(f"| `{name}` | {_cell(title)} | {_cell(needs)} | {_paper(paper)} | {_cell(summary)} |")
    return "\n".join(lines) + "\n"


def method_rows() -> Iterator[tuple[str, str, str, str, str]]:
    """Name, title, needs, paper and summary of each method, as words."""
    rows: list[tuple[str, Method | Iterated | Online]] = [*METHODS.items(), *ITERATED.items(), *ONLINE.items()]
    for name, method in rows:
        yield name, method.title, method.needs, method.paper or "-", method.summary


def method_facts(name: str) -> str:
    """What the row of one method says of it, as Markdown: summary, when to use it, and a list of facts and knobs."""
    if name in ONLINE:
        return _online_facts(ONLINE[name])
    method = METHODS[name]
    kind = run_config(method.knobs, method.defaults, compares=method.compares)
    metric, way = method.better
    facts = [
        f"Each record needs {method.needs}.",
        f"It trains a {'language model' if method.model == 'policy' else 'model that gives each response a score'}"
        f"{', compared with a frozen reference' if method.reference else ''}.",
        f"Weights: {_lower(method.reduction.__doc__)}",
        f"An evaluation is judged by `{metric}`: {'lower' if way == 'min' else 'higher'} is better.",
    ]
    pair = method.keep(_pair(), method.knobs())
    first = method.first_loss([pair], method.knobs()) if isinstance(pair, Tree) else None
    facts += [] if first is None else [f"The first loss on pairs is {first:.6f} where the starting model is the reference."]
    facts += [f"`{row.key}` (default {row.default}): {row.doc}." for row in keys(kind) if row.key.startswith("method.")]
    facts += [f"Its own default: `{row.key}: {row.default}`." for row in keys(kind) if row.key in method.defaults]
    facts += [f"Paper: {_paper(method.paper)}."] if method.paper else []
    return "\n".join([f"{_sentence(method.summary)} {method.when}\n", *(f"- {fact}" for fact in facts)]) + "\n"


def _online_facts(row: Online) -> str:
    """Those of an online method: knobs that all of them share are left out where their defaults are the same."""
    knobs, kind, shared = row.knobs.model_validate({}), config_kind(row.name), OnlineKnobs.model_validate({})
    facts = ["The KL is in the reward." if row.kl_in_reward(knobs) else "The KL is in the loss."]
    facts += ["It compares the responses to a prompt with each other: `rollout.n` must be 2 or more."] if row.group else []
    facts += ["A critic learns beside the policy."] if row.critic else []
    facts.append(f"Weights: {_lower(row.method(knobs, 1).reduction.__doc__)}")
    own = [name for name in row.knobs.model_fields if getattr(knobs, name) != getattr(shared, name, ...)]
    facts += [f"`{one.key}` (default {one.default}): {one.doc}." for one in keys(kind) if one.key.removeprefix("method.") in own]
    facts += [f"Its own default: `{one.key}: {one.default}`." for one in keys(kind) if one.key in _dotted(row.defaults)]
    facts += [f"Paper: {_paper(row.paper)}."] if row.paper else []
    facts += [f"Also known as {', '.join(f'`{one}`' for one in row.also_known_as)}."] if row.also_known_as else []
    return "\n".join([f"{_sentence(row.summary)} {row.when}\n", *(f"- {fact}" for fact in facts)]) + "\n"


def _pair() -> Tree:
    """A plain pair, the first response preferred."""
    one = np.zeros(1, dtype=np.int64)
    return Tree("", "", one, (one, one), (True, True), np.array([1.0, 0.0]), np.array([[0.0, 1.0], [0.0, 0.0]]))


def filled(page: str) -> str:
    """`page` with everything between markers written anew."""
    return _MARKER.sub(lambda m: m[1] + (method_facts(m[3]) if m[3] else methods_table()) + m[4], page)


def commands() -> Iterator[tuple[str, str]]:
    """Every command of the command line, those of `data` and `select` too, with the first line of its help."""
    from preftune.cli.data import app as data_app
    from preftune.cli.main import app
    from preftune.cli.select import app as select_app

    for prefix, group in (("", app), ("data ", data_app), ("select ", select_app)):
        for command in group.registered_commands:
            name = command.name or getattr(command.callback, "__name__", "").replace("_", "-")
            yield prefix + name, (command.help or inspect.getdoc(command.callback) or "").partition("\n")[0]


def _method_section(name: str, method: Any) -> str:
    kind = run_config(method.knobs, method.defaults, compares=method.compares)
    changed = [row for row in keys(kind) if row.key in method.defaults]
    knobs = [row for row in keys(kind) if row.key.startswith("method.")]
    defaults = ", ".join(f"`{row.key}: {row.default}`" for row in changed)
    lines = [f"## `{name}`: {method.title}\n", f"{_sentence(method.summary)} {method.when}\n", f"Each record needs {method.needs}.\n"]
    lines += [] if method.reference else ["It has no reference model: `reference`, `cache_reference` and `reference_sync` are refused.\n"]
    lines += ["`cache_reference` is refused: it needs the reference on other responses in each step.\n"] if method.survey else []
    lines += [f"Its own defaults: {defaults}.\n"] if changed else []
    lines += [_table(knobs) if knobs else "It has no knobs of its own.\n"]
    return "\n".join(lines)


def _own_section(row: Iterated | Online) -> str:
    kind = config_kind(row.name)
    defaults = ", ".join(f"`{one.key}: {one.default}`" for one in keys(kind) if one.key in _dotted(row.defaults))
    lines = [f"## `{row.name}`: {row.title}\n", f"{_sentence(row.summary)} {row.when}\n", f"Each record needs {row.needs}.\n"]
    lines += [f"Its own defaults: {defaults}.\n", _table(one for one in keys(kind) if one.key.startswith("method."))]
    return "\n".join(lines)


def _dotted(defaults: dict[str, Any]) -> set[str]:
    """The keys that a row's defaults set, those of sections by their dotted names."""
    found: set[str] = set()
    for name, value in defaults.items():
        found |= {f"{name}.{key}" for key in value.model_fields_set} if isinstance(value, BaseModel) else {name}
    return found


def _table(rows: Any) -> str:
    lines = ["| key | type | default | what it does |", "| --- | --- | --- | --- |"]
    lines += [f"| `{row.key}` | {_cell(row.holds)} | {_default(row)} | {_cell(_sentence(row.doc))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _default(row: Row) -> str:
    return "required" if row.required else f"`{row.default}`" if row.default else ""


def _paper(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if _ARXIV.fullmatch(paper) else paper


def _lower(text: str | None) -> str:
    return (text or "")[:1].lower() + (text or "")[1:]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(root: Path) -> None:
    """Rewrite the pages under `root`."""
    (root / CONFIGURATION).parent.mkdir(exist_ok=True)
    (root / CONFIGURATION).write_text(configuration_page(), encoding="utf-8")
    for page in filter(Path.exists, (root / name for name in MARKED)):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
