"""Rules of the house, read from the source itself: floors, import budget, purity, blindness to methods' names, pages equal to code."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "preftune"
FILES = sorted(SOURCE.rglob("*.py"))
HEAVY = {"torch", "transformers", "datasets", "peft", "tokenizers", "trl", "numba"}

# Ground floor first; a room imports only itself and the floors under it.
FLOORS = [
    {"errors", "home"},
    {"kernels"},
    {"records"},
    {"configschema", "configfile"},
    {"formats"},
    {"feedback"},
    {"packing"},
    {"objectives"},
    {"models"},
    {"rollout"},
    {"rewards"},
    {"selection"},
    {"methods"},
    {"training"},
    {"evaluation"},
    {"report"},
    {"rounds"},
    {"online"},
    {"quickstart"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def short(path: Path, node: ast.AST | None = None) -> str:
    return f"{path.relative_to(ROOT)}" + (f":{getattr(node, 'lineno', 0)}" if node else "")


def imported(module: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name, wherever in the file: `from a import b` gives a.b."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def floor_breaches(room_name: str, module: ast.Module) -> list[str]:
    """The imports of a file that reach up."""
    wrong = []
    for node, name in imported(module):
        parts = name.split(".")
        if parts[0] != "preftune" or len(parts) == 1 or parts[1].startswith("__"):
            continue
        if FLOOR_OF[parts[1]] > FLOOR_OF[room_name]:
            wrong.append(f"line {getattr(node, 'lineno', 0)}: {name}")
    return wrong


def test_every_room_has_a_floor() -> None:
    rooms = {room(path) for path in FILES} - {"__init__", "__main__"}
    assert rooms - set(FLOOR_OF) == set()


@pytest.mark.parametrize("path", [p for p in FILES if not room(p).startswith("__")], ids=short)
def test_floors(path: Path) -> None:
    assert floor_breaches(room(path), tree(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from preftune.training import config",
        "import preftune.cli.main",
        "def f():\n    from preftune import methods",
        "from preftune.report.page import write",
    ],
)
def test_a_reach_up_is_seen(line: str) -> None:
    assert floor_breaches("models", ast.parse(line))
    assert not floor_breaches(
        "models", ast.parse("from preftune.errors import UserError\nfrom preftune.models.load import x\nimport preftune")
    )


# --- the import budget ------------------------------------------------------------------------------------------------------


def light_modules() -> list[str]:
    names = ["preftune", "preftune.errors", "preftune.records", "preftune.configschema", "preftune.configfile"]
    names += ["preftune.training.config", "preftune.cli.console", "preftune.cli.preload", "preftune.cli.main"]
    for folder in ("formats", "feedback", "report"):
        for path in sorted((SOURCE / folder).rglob("*.py")):
            names.append(".".join(("preftune", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"))
    return names


def heavy_after(code: str) -> str:
    """What a fresh Python prints that runs `code`, which may call `heavy()`."""
    head = f"import sys\ndef heavy(): return sorted({HEAVY!r} & set(sys.modules))\n"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_import_budget() -> None:
    each = "    importlib.import_module(name)\n    assert not heavy(), (name, heavy())\n"
    code = f"import importlib\nfor name in {light_modules()!r}:\n{each}print('light')"
    assert heavy_after(code) == "light"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["train"], ["check", "gone.yaml"], ["data", "--help"]])
def test_help_and_early_mistakes_do_not_wait_for_torch(words: list[str]) -> None:
    assert heavy_after(f"from preftune.cli.main import run\nrun({words!r})\nprint(heavy())") == "[]"


def test_the_budget_would_see_torch() -> None:
    assert heavy_after("import types\nsys.modules['torch'] = types.ModuleType('torch')\nprint(heavy())") == "['torch']"


# --- objectives are pure ----------------------------------------------------------------------------------------------------

OBJECTIVES = [path for path in FILES if room(path) == "objectives"]
PURE = {"__future__", "torch", "math", "typing", "dataclasses", "collections", "functools", "enum", "itertools"}
WAITING = {"item", "tolist", "cpu", "cuda", "numpy", "backward", "step"}  # these move data, wait for a device, or change something
SPEAKING = {"print", "open", "input", "eval", "exec"}


def impurities(module: ast.Module) -> list[str]:
    wrong = [name for _, name in imported(module) if name.split(".")[0] not in PURE and not name.startswith("preftune.objectives")]
    for node in ast.walk(module):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
            wrong.append(f"line {node.lineno}: .{node.func.attr}()")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SPEAKING:
            wrong.append(f"line {node.lineno}: {node.func.id}()")
        elif isinstance(node, ast.Global):
            wrong.append(f"line {node.lineno}: global")
    return wrong


def test_there_are_objectives() -> None:
    assert len(OBJECTIVES) > 1


@pytest.mark.parametrize("path", OBJECTIVES, ids=short)
def test_objectives_are_pure(path: Path) -> None:
    assert impurities(tree(path)) == []


@pytest.mark.parametrize(
    "line", ["import os", "from preftune.models import load", "x.item()", "print(1)", "import transformers", "loss.backward()"]
)
def test_an_impurity_is_seen(line: str) -> None:
    assert impurities(ast.parse(line))


@pytest.mark.parametrize("path", OBJECTIVES, ids=short)
def test_public_functions_of_objectives_have_docstrings(path: Path) -> None:
    public = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# --- nobody but methods/ and the quickstart knows a method's name -------------------------------------------------------------


def named(module: ast.Module, names: set[str], also_words: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """Where a method's name stands as a literal; one that is also a word of another vocabulary only where a name is compared with it."""
    found = []
    for node in ast.walk(module):
        literals = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value in names]
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else [node.subject] if isinstance(node, ast.Match) else []
        if isinstance(node, ast.Constant):
            found += [f"line {n.lineno}: {n.value!r}" for n in literals if n.value not in also_words]
        elif any(re.fullmatch(r"(.*\.)?(use|\w*name|method)", ast.unparse(side)) for side in sides):
            found += [f"line {n.lineno}: {n.value!r}" for n in literals if n.value in also_words]
    return found


def test_no_method_is_named_outside_methods() -> None:
    from preftune.formats import FORMATS
    from preftune.methods import METHODS

    assert METHODS
    also_words = {method.model for method in METHODS.values()} | set(FORMATS)
    paths = [path for path in FILES if room(path) not in ("methods", "quickstart") and path.name != "methods.py"]
    found = {short(path): lines for path in paths if (lines := named(tree(path), set(METHODS), also_words))}
    assert found == {}


def test_a_method_s_name_is_seen() -> None:
    code = "if config.use == 'dpo': pass\nmatch x:\n    case 'sft': pass\n"
    code += "row['reward']\nmethod.name in ('reward', 'x')\nmethod.model == 'reward'"
    assert sorted(named(ast.parse(code), {"dpo", "sft", "reward"}, {"reward", "policy"})) == [
        "line 1: 'dpo'",
        "line 3: 'sft'",
        "line 5: 'reward'",
    ]


# --- nothing that runs code from a file -------------------------------------------------------------------------------------

PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def unsafe(module: ast.Module) -> list[str]:
    wrong = [name for _, name in imported(module) if name.split(".")[0] in PICKLES or name in ("torch.load", "torch.save")]
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle") and ast.unparse(node.value) != "False":
            wrong.append(f"line {node.value.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            wrong.append(f"line {node.lineno}: {node.func.id}")
    return wrong


def test_no_pickle_and_no_remote_code() -> None:
    assert {short(path): lines for path in FILES if (lines := unsafe(tree(path)))} == {}


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from torch import load", "torch.load(p)", "f(trust_remote_code=True)", "np.load(p, allow_pickle=x)", "eval(s)"],
)
def test_an_unsafe_line_is_seen(line: str) -> None:
    assert unsafe(ast.parse(line))


def test_modules_stay_small() -> None:
    assert {short(path): lines for path in FILES if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400} == {}


# --- pages, recipes and help equal the code -----------------------------------------------------------------------------------


def test_the_configuration_page_is_current() -> None:
    from preftune.cli import docs

    page = (ROOT / docs.CONFIGURATION).read_text(encoding="utf-8")
    assert page == docs.configuration_page(), "run: python -m preftune.cli.docs"


def test_the_readme_lists_the_methods() -> None:
    from preftune.cli import docs

    readme = (ROOT / docs.README).read_text(encoding="utf-8")
    assert docs.methods_table() in readme, "put `<!-- methods -->` and `<!-- /methods -->` there and run: python -m preftune.cli.docs"


def test_the_pages_are_written_between_their_markers(tmp_path: Path) -> None:
    from preftune.cli import docs

    (tmp_path / "README.md").write_text("# Title\n\n<!-- methods -->\nold\n<!-- /methods -->\n\nEnd\n")
    docs.main(tmp_path)
    written = (tmp_path / "README.md").read_text()
    assert written == f"# Title\n\n<!-- methods -->\n{docs.methods_table()}<!-- /methods -->\n\nEnd\n"
    assert (tmp_path / docs.CONFIGURATION).read_text() == docs.configuration_page()


def test_every_key_of_every_method_is_described() -> None:
    from preftune.configschema import keys
    from preftune.methods import METHODS
    from preftune.training.config import run_config

    for method in METHODS.values():
        assert [row.key for row in keys(run_config(method.knobs, method.defaults, compares=method.compares)) if not row.doc] == []


def test_every_recipe_loads() -> None:
    from preftune.cli.main import resolve

    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert recipes
    for recipe in recipes:
        name, config = resolve([str(recipe)])
        assert config.use == name, recipe


def test_every_command_has_help_and_stands_in_the_docs() -> None:
    from preftune.cli import docs

    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    commands = list(docs.commands())
    assert len(commands) > 8
    for name, help_line in commands:
        assert help_line.endswith("."), name
        assert f"preftune {name}" in pages, name
