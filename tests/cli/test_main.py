"""The command line: words told apart, exit codes, one line for what a user can mend. The commands' own work is tested with their rooms."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pydantic import Field

from preftune import methods
from preftune.cli import main as cli
from preftune.cli.console import complain
from preftune.configfile import Section
from preftune.errors import NonFiniteError, UserError


class Knobs(Section):
    """Knobs of the made-up method."""

    beta: float = Field(0.1, gt=0, description="Strength.")


PAIRS = SimpleNamespace(
    name="pairs",
    title="Pairs",
    paper="https://example.org/paper",
    summary="Learns from pairs.",
    needs="pairs",
    knobs=Knobs,
    defaults={"lr": 5e-7},
    when="Always.",
    compares=lambda knobs: True,
    also_known_as=(),
)
WORDS = ["pairs", "model=m", "data=d", "output=o"]


@pytest.fixture(autouse=True)
def _one_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(methods, "METHODS", {"pairs": PAIRS}, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a function in place of a module's, and return the list of the calls it gets."""

    def install(module: str, name: str, result: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def function(*arguments: Any) -> Any:
            calls.append(arguments)
            if isinstance(result, BaseException):
                raise result
            return result

        stand_in = ModuleType(module)
        setattr(stand_in, name, function)
        monkeypatch.setitem(sys.modules, module, stand_in)
        return calls

    return install


def error_of(capsys: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    assert cli.run(words) == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("preftune: ")
    return err.removeprefix("preftune: ").strip()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dpo", "lr=1"], ("dpo", None, ["lr=1"])),
        (["lr=1", "dpo", "method.beta=2"], ("dpo", None, ["lr=1", "method.beta=2"])),
        (["dpo", "c.yaml"], ("dpo", "c.yaml", [])),
        (["c.yaml", "output=a/b.yaml"], ("dpo", "c.yaml", ["output=a/b.yaml"])),
        (["./c", "data=[a, b=c]"], ("dpo", "./c", ["data=[a, b=c]"])),
    ],
)
def test_words_are_told_apart(words: list[str], expected: tuple[str, str | None, list[str]]) -> None:
    for name in ("c.yaml", "c"):
        Path(name).write_text("use: dpo\n")
    name, path, overrides = cli.parse(words)
    assert (name, path, overrides) == (expected[0], expected[1] and Path(expected[1]), expected[2])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dpo", "sft"], "two methods were given: dpo and sft"),
        (["a.yaml", "b.yml"], "two config files were given: a.yaml and b.yml"),
        ([], "no method was given"),
        (["none.yaml"], "none.yaml: no method was given. Name one (`preftune methods` lists them), or write `use: METHOD` in none.yaml."),
        (["sft", "c.yaml"], "c.yaml: the config says `use: dpo` but the command says sft"),
        (["absent.yaml"], "absent.yaml: there is no such file"),
    ],
)
def test_words_that_contradict(words: list[str], line: str) -> None:
    Path("c.yaml").write_text("use: dpo\n")
    Path("none.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError) as caught:
        cli.parse(words)
    assert str(caught.value).startswith(line)


def test_train_hands_over_the_resolved_config_and_returns_the_exit_code(fake: Any) -> None:
    calls = fake("preftune.training.run", "train", 130)
    Path("c.yaml").write_text("use: pairs\nmodel: m\ndata: d\noutput: o\nmethod:\n  beta: 0.5\n")
    assert cli.run(["train", "c.yaml", "seed=7"]) == 130
    ((name, config, _console),) = calls
    assert (name, config.use, config.seed, config.method.beta, config.lr) == ("pairs", "pairs", 7, 0.5, 5e-7)


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 2)])
def test_check_says_by_its_exit_code_whether_it_passed(fake: Any, passed: bool, code: int) -> None:
    calls = fake("preftune.training.check", "check", passed)
    assert cli.run(["check", *WORDS]) == code
    assert calls[0][0] == "pairs" and calls[0][1].model == "m"


def test_the_other_commands_reach_their_rooms(fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    started = fake("preftune.quickstart", "quickstart", None)
    talked = fake("preftune.cli.chat", "chat", None)
    written = fake("preftune.report.page", "write", Path("runs/x/report.html"))
    shown = fake("preftune.cli.data", "app", None)
    shown_with = sys.modules["preftune.cli.data"]
    shown_with.app = lambda words, **options: shown.append((words, options)) or 0  # type: ignore[attr-defined]
    assert [cli.run(w.split()) for w in ("quickstart --output q", "chat m", "report runs/x", "data show f.jsonl --format trl")] == [0] * 4
    assert (started[0][0], talked[0][0], written) == (Path("q"), "m", [(Path("runs/x"),)])
    assert shown[0][0] == ["show", "f.jsonl", "--format", "trl"]
    assert capsys.readouterr().out == "runs/x/report.html\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("bad row", where="a.jsonl:3", fix="Mend it."), 2, "a.jsonl:3: bad row. Mend it."),
        (NonFiniteError("4 steps gave\nnon-finite numbers"), 3, "4 steps gave non-finite numbers"),
        (PermissionError(errno.EACCES, "Permission denied", "/o/run.json"), 2, "/o/run.json: Permission denied. Check its permissions."),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device. Free some disk space"),
        (OSError(errno.EFBIG, "File too large", "o/final"), 2, "o/final: File too large. Raise the file size limit"),
    ],
)
def test_what_a_user_can_mend_is_one_line(fake: Any, capsys: pytest.CaptureFixture[str], error: Exception, code: int, line: str) -> None:
    fake("preftune.training.run", "train", error)
    assert error_of(capsys, "train", *WORDS, code=code).startswith(line)


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EBADF, "Bad file descriptor"), AssertionError()])
def test_a_bug_traces_back(fake: Any, error: Exception) -> None:
    fake("preftune.training.run", "train", error)
    with pytest.raises(type(error)):
        cli.run(["train", *WORDS])


def test_ctrl_c_is_130(fake: Any) -> None:
    fake("preftune.training.run", "train", KeyboardInterrupt())
    assert cli.run(["train", *WORDS]) == 130


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? See `preftune --help`."),
        (["train", "--lr", "3"], "No such option: --lr (settings are written key=value). See `preftune train --help`."),
        (["report"], "Missing argument 'RUN'. See `preftune report --help`."),
        (["train", "pair", "model=m"], "there is no method 'pair'. Did you mean pairs?"),
        (["train", *WORDS, "lr=fast"], "override 'lr=fast': `lr` must be a number, not the text 'fast'"),
        (["train", *WORDS, "bta=1"], "override 'bta=1': unknown key `bta`. Did you mean `method.beta`?"),
        (["check", "pairs", "gone.yaml"], "gone.yaml: there is no such file"),
    ],
)
def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], words: list[str], line: str) -> None:
    assert error_of(capsys, *words) == line


def test_a_long_message_is_not_folded_and_its_brackets_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    complain("a [red]word[/red] " * 40)
    assert capsys.readouterr().err == "preftune: " + ("a [red]word[/red] " * 40).strip() + "\n"


def test_config_prints_template_resolved_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "pairs"]) == 0
    template = capsys.readouterr().out
    assert "lr: 5e-07\n" in template and "  # Strength. (number)\n  beta: 0.1\n" in template
    assert cli.run(["config", *WORDS, "method.beta=2"]) == 0
    assert "use: pairs\nmodel: m\n" in (resolved := capsys.readouterr().out) and "  beta: 2.0\n" in resolved
    assert cli.run(["config", "pairs", "--json-schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["lr"]["default"] == 5e-7


def test_help_of_every_command_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands]  # type: ignore[union-attr]
    assert {"train", "check", "config", "methods", "data", "quickstart", "chat", "report"} <= set(names)
    for name in set(names) - {"data", "select"}:
        assert cli.run([name, "--help"]) == 0
        assert f"preftune {name}" in capsys.readouterr().out.split("Examples")[1]


def test_no_words_print_the_help_and_version_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("preftune ")


def test_the_module_runs_as_a_command_and_its_errors_stay_off_stdout() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "preftune", "train", "model=m"], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "preftune: no method was given. Name one (`preftune methods` lists them).\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "preftune", "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].endswith("No space left on device. Free some disk space and run the same command again.")
