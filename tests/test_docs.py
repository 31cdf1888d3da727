"""What the pages say is so: commands parse, links lead somewhere, trees, tables and named tests match the code, recipes are explained."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import typer

from preftune import __version__, errors
from preftune.cli import docs
from preftune.cli.data import app as data_app
from preftune.cli.main import app, parse, resolve
from preftune.cli.select import app as select_app
from preftune.formats import FORMATS
from preftune.methods import METHODS
from preftune.online import monitor
from preftune.online.losses import policy_loss
from preftune.online.methods import ONLINE
from preftune.rounds.methods import ITERATED
from preftune.training.run import MAY_CHANGE
from tests.test_house import FLOORS, ROOT, SOURCE

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
STAND_INS = {"METHOD": "dpo", "CONFIG.yaml": "dpo.yaml", "CONFIG": "dpo.yaml", "key=value": "seed=1"}
"""What the pages write where a reader puts something of their own."""


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- commands ---------------------------------------------------------------------------------------------------------------


def told(text: str) -> Iterator[str]:
    """Every command that a page or a recipe's comments tell the reader to type."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line.split("  #")[0].strip() for language, fence in fences for line in fence.splitlines() if not language]
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    lines += [line.partition("# ")[2].split(": ")[-1].strip() for line in text.splitlines() if line.startswith("#")]
    return (line for line in lines if re.match(r"([A-Z_]+=\S+ )?(preftune|torchrun|make) ", line))


def mistake(line: str, targets: set[str]) -> str | None:
    """What is wrong with a command line, or None. Configs are read from the working directory."""
    words = [STAND_INS.get(word, word) for word in shlex.split(line.partition(" > ")[0])]
    while re.match("[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "make":
        return None if words[1] in targets else f"no target {words[1]}"
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :]
    command: click.Command = typer.main.get_command(app)
    groups = {"data": data_app, "select": select_app}
    if words[1] in groups and len(words) > 2:
        command, words = typer.main.get_command(groups[words[1]]), words[1:]
    name, rest = words[1], words[2:]
    if name.startswith("--"):
        return None if name in options(command) else f"no option {name}"
    found = getattr(command, "commands", {}).get(name)
    if found is None:
        return f"no command {name}"
    unknown = [word for word in rest if word.startswith("--") and word not in options(found)]
    if unknown:
        return f"no option {unknown[0]}"
    return wrong_settings(name, [word for word in rest if not word.startswith("--")])


def options(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts} | {"--help"}


def wrong_settings(name: str, words: Sequence[str]) -> str | None:
    try:
        if name in ("train", "check") and words:
            resolve(words)
        elif name == "config" and words:
            parse(words)
    except errors.UserError as error:
        return str(error)
    return None


@pytest.fixture
def beside_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """A working directory with the recipes and a config of the reader's own; the targets of the Makefile."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "recipes" / "dpo.yaml", tmp_path / "dpo.yaml")
    monkeypatch.chdir(tmp_path)
    return set(re.findall(r"^([a-z]+):", page("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("path", [*PAGES, *RECIPES], ids=short)
def test_every_command_that_is_told_works(path: Path, beside_recipes: set[str]) -> None:
    lines = list(told(path.read_text(encoding="utf-8")))
    assert lines or path.name in ("CHANGELOG.md",)
    assert {line: wrong for line in lines if (wrong := mistake(line, beside_recipes))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "make quickstrat",
        "preftune trian dpo model=a data=b output=c",
        "preftune train dpo model=a data=b output=c learning_rate=1",
        "preftune train recipes/gone.yaml",
        "preftune check dop model=a data=b output=c",
        "preftune data shwo FILE",
        "preftune data convert a b --into trl",
        "preftune quickstart --out x",
        "PREFTUNE_ALLOCATOR=system torchrun --nproc-per-node 2 -m preftune train recipes/dpo.yaml beta=1",
    ],
)
def test_a_wrong_command_is_seen(line: str, beside_recipes: set[str]) -> None:
    places = [f"```json\n{{}}\n```\nText\n```\n{line}\n```\n", f"see `{line}` there", f"# So: {line}"]
    assert [list(told(place)) for place in places] == [[line]] * 3
    assert mistake(line, beside_recipes)


def test_the_two_commands_of_the_readme_stand_first() -> None:
    targets = re.findall(r"make ([a-z]+)`", page("README.md"))
    assert targets[:2] == ["quickstart", "test"]


# --- links ------------------------------------------------------------------------------------------------------------------


def dead_links(path: Path) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = (path.parent / name).resolve() if name else path
        if not place.exists() or (anchor and anchor not in anchors(place)):
            dead.append(target)
    return dead


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=short)
def test_links_lead_somewhere(path: Path) -> None:
    assert dead_links(path) == []


def test_a_dead_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One, two\n[x](#one-two) [y](b.md) [z](#three) [w](https://example.org/gone) [v](a.md#one-two)")
    assert dead_links(tmp_path / "a.md") == ["b.md", "#three"]


def test_every_page_and_the_picture_are_linked_from_the_readme() -> None:
    targets = set(re.findall(r"\]\(([^)\s]+)\)", page("README.md")))
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    assert pictures
    assert {short(path) for path in [*(ROOT / "docs").glob("*.md"), *pictures]} <= targets
    assert all(path.stat().st_size < 200_000 for path in pictures)


# --- what the pages say of the code -----------------------------------------------------------------------------------------


def test_the_tree_of_the_readme_holds_every_room_from_the_ground_up() -> None:
    tree = page("README.md").partition("src/preftune/\n")[2].partition("```")[0]
    told_rooms = [line.split()[0] for line in tree.splitlines()]
    assert all(len(line.split()) > 3 for line in tree.splitlines())
    there = {path.name + "/" * path.is_dir() for path in SOURCE.iterdir() if not path.name.startswith("__")}
    assert set(told_rooms) == there and len(told_rooms) == len(there)
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    order = [floors[name] for room in told_rooms if (name := room.removesuffix("/").removesuffix(".py")) in floors]
    assert order == sorted(order)


def test_what_stands_between_markers_is_current() -> None:
    for name in docs.MARKED:
        assert page(str(name)) == docs.filled(page(str(name))), "run: make docs"


def test_every_method_has_its_section_with_a_formula() -> None:
    sections = re.split(r"^## ", page("docs/methods.md"), flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == [f"`{name}`" for name in METHODS]
    for name, section in zip(METHODS, sections, strict=True):
        assert f"<!-- method {name} -->\n{docs.method_facts(name)}<!-- /method {name} -->" in section
        assert len(re.findall(r"^\$\$ .+ \$\$$", section, re.MULTILINE)) >= 1, name


def test_every_online_method_has_its_section_with_a_formula() -> None:
    part = page("docs/online.md").partition("\n## Methods\n")[2].partition("\n## ")[0]
    sections = re.split(r"^### ", part, flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == [f"`{name}`" for name in ONLINE]
    for name, section in zip(ONLINE, sections, strict=True):
        assert f"<!-- method {name} -->\n{docs.method_facts(name)}<!-- /method {name} -->" in section
        assert len(re.findall(r"^\$\$ .+ \$\$$", section, re.MULTILINE)) >= 1, name


def test_every_metric_of_online_methods_is_explained() -> None:
    """Those of steps from the source of the losses, those of rollouts from the functions that make them."""
    losses = Path(str(inspect.getsourcefile(policy_loss))).read_text(encoding="utf-8")
    named = set(re.findall(r'metrics\["(\w+)"\]|^ +"(\w+)": mean_over', losses, re.MULTILINE))
    logp, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    told = {
        *(one or other for one, other in named), *monitor.lengths_of([3], [True]), *monitor.scores_of(np.ones((1, 2))),
        *monitor.scores_of(np.ones((1, 2)), "gold"), *monitor.distances(logp, logp, mask),
    }  # fmt: skip
    told |= {f"coefficient_{name}" for name in ("kl", "penalty", "cost")} | {
        f"seconds_{name}" for name in ("sampling", "judging", "looking")
    }
    told |= {"explained_variance", "repetition", "prompts_drawn", "sampled_tokens_per_second", "dense_reward", "pretraining_nll", "alarm"}
    watched = page("docs/online.md").partition("\n## What is watched\n")[2].partition("\n## ")[0]
    assert len(named) > 6 and told - set(re.findall(r"`(\w+)`", watched)) == set()


def test_facts_of_a_method_are_written_between_its_markers() -> None:
    text = "a\n<!-- method dpo -->\nold\n<!-- /method dpo -->\nb\n<!-- method sft -->\n<!-- /method sft -->\n"
    facts = {name: docs.method_facts(name) for name in ("dpo", "sft")}
    marked = [f"<!-- method {name} -->\n{fact}<!-- /method {name} -->" for name, fact in facts.items()]
    assert docs.filled(text) == f"a\n{marked[0]}\nb\n{marked[1]}\n"
    assert "`method.beta` (default 0.1)" in facts["dpo"] and "0.693147" in facts["dpo"] and "0.693147" not in facts["sft"]


def test_every_named_test_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page("docs/design.md"))
    assert len(named) > 10
    missing = [f"{file}::{name}" for file, name in named if not re.search(rf"^def {name}\(", page(file), re.MULTILINE)]
    assert missing == []


def test_getting_started_names_what_a_resumed_run_may_change() -> None:
    sentence = page("docs/getting-started.md").partition("Only these keys may change")[2].partition("\n- ")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == MAY_CHANGE


def test_getting_started_lists_the_exit_codes() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page("docs/getting-started.md"), re.MULTILINE)}
    assert listed == {0, *(value for name, value in vars(errors).items() if name.startswith("EXIT_"))}


def test_the_changelog_has_this_version_and_counts_right() -> None:
    text = page("CHANGELOG.md")
    assert f"## [{__version__}]" in text
    assert re.search(r"Records from (\d+) formats", text)[1] == str(len(FORMATS))  # type: ignore[index]


# --- recipes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES, ids=short)
def test_recipes_run_as_they_are_and_explain_every_key(recipe: Path) -> None:
    lines = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    assert [line for line in lines if not re.match(r" *\w+:.*  # \w", line)] == []
    name, config = resolve([str(recipe)])
    assert config.use == name and config.model == "smollm2" and config.eval_fraction > 0
    assert config.output == f"runs/{recipe.stem}"
    for path in config.data.path:
        kind, _, sample = path.partition(":")
        assert kind == "sample" and (SOURCE / "data" / "sample" / f"{sample}.jsonl").is_file()


def test_every_method_has_a_recipe() -> None:
    assert {resolve([str(recipe)])[0] for recipe in RECIPES} == set(METHODS) | set(ITERATED) | set(ONLINE)
