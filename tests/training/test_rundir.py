import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preftune.errors import UserError
from preftune.training import durable, failpoints
from preftune.training.manifest import RunManifest, Session, config_hash, read_manifest, redact
from preftune.training.metrics import MetricsLog, read_metrics
from preftune.training.rundir import RunDirectory
from tests.training.processes import run, start

CONFIG = {"lr": 1e-6, "max_steps": 10, "output": "runs/a", "method": {"beta": 0.1}, "report": {"theme": "dark"}}


def manifest(config: dict[str, Any] = CONFIG, **changed: Any) -> RunManifest:
    given = {
        "method": "dpo",
        "data": {"train.jsonl": "a" * 64},
        "model_hash": "c" * 64,
        "session": Session.begin(["preftune"], 2),
    } | changed
    return RunManifest.begin(given.pop("method"), config, **given)


# ---- one owner


def hold(path: Path, ready: Path) -> None:
    with RunDirectory(path):
        ready.touch()
        time.sleep(60)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert path.exists()


def test_a_second_process_is_refused_and_the_lock_dies_with_its_owner(tmp_path: Path) -> None:
    owner = start(hold, tmp_path / "run", tmp_path / "ready")
    wait_for(tmp_path / "ready")
    with pytest.raises(UserError, match=rf"in use by process {owner.pid} on {os.uname().nodename}"), RunDirectory(tmp_path / "run"):
        pass
    owner.kill()
    owner.join()
    with RunDirectory(tmp_path / "run"):  # nobody removed anything: the lock went with its owner
        pass


def test_two_owners_in_one_process_are_refused_too(tmp_path: Path) -> None:
    with RunDirectory(tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), RunDirectory(tmp_path):
            pass
        with pytest.raises(UserError, match="in use"), RunDirectory(tmp_path):  # the refused one released nothing
            pass


ORPHAN = """
import os, sys, time
from pathlib import Path
from preftune.training.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])):
    child = os.fork()
    if not child:
        os.close(1)
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), 9)
"""


def test_a_worker_that_outlives_the_owner_does_not_hold_the_lock(tmp_path: Path) -> None:
    orphan = int(subprocess.run([sys.executable, "-c", ORPHAN, tmp_path], stdout=subprocess.PIPE, text=True).stdout)
    try:
        os.kill(orphan, 0)  # it lives
        with RunDirectory(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_an_output_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"file/run.*Not a directory.*choose another output"), RunDirectory(tmp_path / "file" / "run"):
        pass
    with pytest.raises(UserError, match="file"), RunDirectory(tmp_path / "file"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody without rights")
def test_an_output_without_permission_is_refused_even_when_the_lock_file_is_writable(tmp_path: Path) -> None:
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock").chmod(0o666)
    refused = [RunDirectory(path) for path in (tmp_path, tmp_path / "new")]
    os.seteuid(65534)
    try:
        for directory in refused:
            with pytest.raises(UserError, match=r"Permission denied.*that you may write to"), directory:
                pass
    finally:
        os.seteuid(0)
    with RunDirectory(tmp_path):  # the refused attempt, still alive, let go of the lock
        pass
    assert refused


# ---- run.json


def test_the_manifest_comes_back_and_tells_what_ran(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "deep" / "run") as directory:
        assert directory.manifest() is None
        written = manifest(parents=("runs/sft",))
        directory.write_manifest(written)
        assert directory.manifest() == written
        directory.write_manifest(written.ended("finished"))
    plain = json.loads((tmp_path / "deep" / "run" / "run.json").read_text())
    assert plain["status"] == plain["sessions"][0]["status"] == "finished"
    assert plain["sessions"][0]["ended"] >= plain["sessions"][0]["started"]
    assert plain["sessions"][0]["versions"].keys() == {"preftune", "torch", "transformers", "python"}
    assert plain["sessions"][0]["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert plain["config"] == CONFIG and plain["parents"] == ["runs/sft"] and plain["sessions"][0]["threads"] == 2


def test_sessions_pile_up_over_resumes() -> None:
    first = manifest().ended("interrupted")
    second = first.resumed(manifest())
    assert [one.status for one in second.sessions] == ["interrupted", "running"]
    assert second.status == "running"
    assert [one.status for one in second.ended("finished").sessions] == ["interrupted", "finished"]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "failed"), (UserError, "failed"), (KeyboardInterrupt, "interrupted")])
def test_an_exception_marks_the_run(tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), RunDirectory(tmp_path) as directory:
        directory.write_manifest(manifest())
        raise error("boom")
    found = read_manifest(tmp_path)
    assert found and found.status == status


def test_an_exception_after_the_end_or_before_the_start_marks_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunDirectory(tmp_path) as directory:
        directory.write_manifest(manifest().ended("stopped"))
        raise RuntimeError
    with pytest.raises(RuntimeError), RunDirectory(tmp_path):
        raise RuntimeError
    found = read_manifest(tmp_path)
    assert found and found.status == "stopped"


def write_two(path: Path) -> None:
    with RunDirectory(path) as directory:
        directory.write_manifest(manifest().ended("finished"))


@pytest.mark.parametrize(("point", "status"), [("run.json.written", "running"), ("run.json.replaced", "finished")])
def test_killed_while_writing_it_the_manifest_is_the_old_or_the_new(tmp_path: Path, point: str, status: str) -> None:
    with RunDirectory(tmp_path) as directory:
        directory.write_manifest(manifest())
    assert run(write_two, tmp_path, failpoint=f"{point}:kill") == -signal.SIGKILL
    found = read_manifest(tmp_path)
    assert found and found.status == status


def test_a_file_is_replaced_in_the_order_that_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, events = tmp_path / "run.json", []
    path.write_bytes(b"old")
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("fsync", target, target.is_file() and target.read_bytes(), path.read_bytes()))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(("replace", source, target))
        real_replace(source, target)

    monkeypatch.setattr(durable.os, "fsync", fsync)
    monkeypatch.setattr(durable.os, "replace", replace)
    durable.replace_file(path, b"new")
    temporary = events[0][1]
    assert events == [("fsync", temporary, b"new", b"old"), ("replace", temporary, path), ("fsync", tmp_path, False, b"new")]
    assert temporary.parent == tmp_path and [one.name for one in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_only_a_directory_that_cannot_be_synced_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(durable.os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises(OSError):
            durable.sync_directory(tmp_path)
    else:
        durable.sync_directory(tmp_path)
    with pytest.raises(OSError):
        durable.sync_file(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', "\0\0"])
def test_a_foreign_run_json_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: not a run manifest"):
        read_manifest(tmp_path)


def test_secrets_stay_out_of_the_command_line() -> None:
    command = [
        "preftune",
        "train",
        "hub_token=hf_abcdefghijkl",
        "--api-key",
        "abc",
        "track.wandb_api_key=1",
        "password=p=q",
        "url=https://me:pw@host/x",
    ]
    command += ["hf_ABCDEFGHIJKLMN", "tokens_per_microbatch=4096", "eos_token=</s>", "lr=1e-6", "--verbose", "data=a.jsonl"]
    assert redact(command) == [
        *["preftune", "train", "hub_token=***", "--api-key", "***", "track.wandb_api_key=***", "password=***", "url=https://***@host/x"],
        *["***", "tokens_per_microbatch=4096", "eos_token=</s>", "lr=1e-6", "--verbose", "data=a.jsonl"],
    ]
    assert Session.begin(["--token", "x"], 1).command == ("--token", "***")


def test_the_config_hash_ignores_order_only() -> None:
    assert config_hash({"a": 1, "b": {"c": 2, "d": 3}}) == config_hash({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2})


# ---- whether to resume


def decide(path: Path, current: RunManifest, mode: Any = "auto", may_change: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    with RunDirectory(path) as directory:
        return directory.decide_resume(current, mode, may_change=may_change)


def existing(path: Path, status: Any = "running") -> Path:
    with RunDirectory(path) as directory:
        directory.write_manifest(manifest().ended(status))
    return path


def test_an_empty_output_is_fresh(tmp_path: Path) -> None:
    assert decide(tmp_path, manifest()) == "fresh"
    assert decide(tmp_path, manifest(), "never") == "fresh"
    with pytest.raises(UserError, match="holds no run"):
        decide(tmp_path, manifest(), "require")


@pytest.mark.parametrize("status", ["running", "interrupted", "stopped", "failed", "finished"])
@pytest.mark.parametrize("mode", ["auto", "require"])
def test_the_same_run_goes_on_unless_it_is_finished(tmp_path: Path, status: str, mode: str) -> None:
    assert decide(existing(tmp_path, status), manifest(), mode) == ("finished" if status == "finished" else "resume")


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (manifest({**CONFIG, "lr": 2e-6}), r"config lr: 1e-06 -> 2e-06"),
        (manifest({**CONFIG, "method": {"beta": 0.5}}), r"config method\.beta: 0\.1 -> 0\.5"),
        (manifest({**CONFIG, "extra": None}), r"config extra: \(absent\) -> null"),
        (manifest({k: v for k, v in CONFIG.items() if k != "lr"}), r"config lr: 1e-06 -> \(absent\)"),
        (manifest(data={"train.jsonl": "b" * 64}), r"data train\.jsonl: sha256 a{12} -> sha256 b{12}"),
        (manifest(data={"other.jsonl": "a" * 64}), r"data other\.jsonl: \(absent\) -> .*data train\.jsonl: .* -> \(absent\)"),
        (manifest(model_hash="d" * 64), r"model weights: sha256 c{12} -> sha256 d{12}"),
        (manifest(method="sft"), r"method: dpo -> sft"),
        (manifest({**CONFIG, "lr": 2.0, "max_steps": 11}), r"config lr: .*; config max_steps: 10 -> 11"),
    ],
)
@pytest.mark.parametrize("status", ["running", "finished"])
def test_a_changed_run_is_refused_and_each_change_named(tmp_path: Path, current: RunManifest, message: str, status: str) -> None:
    before = (existing(tmp_path, status) / "run.json").read_bytes()
    with pytest.raises(UserError, match=message) as refusal:
        decide(tmp_path, current)
    assert f"mv {tmp_path} {tmp_path}.old-1" in str(refusal.value)
    assert (tmp_path / "run.json").read_bytes() == before


def test_what_may_change_may_change_alone_or_as_a_section(tmp_path: Path) -> None:
    other = {**CONFIG, "output": "runs/b", "report": {"theme": "light", "new": 1}}
    assert decide(existing(tmp_path), manifest(other), may_change={"output", "report"}) == "resume"
    with pytest.raises(UserError, match=r"config report\.new"):
        decide(tmp_path, manifest(other), may_change={"output", "report.theme"})
    with pytest.raises(UserError, match="config report"):
        decide(tmp_path, manifest(other), may_change={"output", "rep"})


def test_infinity_tuples_and_paths_in_a_config_are_not_changes(tmp_path: Path) -> None:
    config = {"clip": math.inf, "betas": (0.9, 0.999), "where": Path("a"), "nothing": {}}
    with RunDirectory(tmp_path) as directory:
        directory.write_manifest(manifest(config))
        assert directory.decide_resume(manifest(config), "auto") == "resume"


def test_never_refuses_whatever_is_there_and_names_a_free_place(tmp_path: Path) -> None:
    path = existing(tmp_path / "run")
    (tmp_path / "run.old-1").mkdir()
    with pytest.raises(UserError, match=rf"mv {path} {path}\.old-2"):
        decide(path, manifest(), "never")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "final"])
@pytest.mark.parametrize("mode", ["auto", "never", "require"])
def test_results_without_a_manifest_are_never_written_over(tmp_path: Path, name: str, mode: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"mv {tmp_path}"):
        decide(tmp_path, manifest(), mode)


# ---- metrics


def log_of(path: Path, steps: int) -> MetricsLog:
    log = MetricsLog(path / "metrics.jsonl")
    for step in range(1, steps + 1):
        log.append(step, "train", {"loss": 1 / step})
        if step % 2 == 0:
            log.append(step, "eval", {"accuracy": step / 10})
    return log


def test_rows_come_back(tmp_path: Path) -> None:
    log = log_of(tmp_path, 3)
    log.append(4, "train", {"loss": 0.1 + 0.2, "record_ids": ["a\u2028b", "ü\n"]})
    rows = read_metrics(log.path)
    assert [(row["step"], row["kind"]) for row in rows] == [(1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train")]
    assert rows[-1] == {"step": 4, "kind": "train", "loss": 0.1 + 0.2, "record_ids": ["a\u2028b", "ü\n"]}
    assert log.path.read_bytes().count(b"\n") == 5


def test_non_finite_numbers_are_null_and_named(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(1, "train", {"loss": math.nan, "grad_norm": math.inf, "kl": -math.inf, "lr": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(log.path.read_text(), parse_constant=refuse)
    assert row == {
        **{"step": 1, "kind": "train", "loss": None, "grad_norm": None, "kl": None, "lr": 0.5},
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "kl": "-inf"},
    }
    assert read_metrics(log.path) == [row]


def test_a_torn_last_line_is_dropped_wherever_it_tore_and_the_next_row_starts_clean(tmp_path: Path) -> None:
    log = log_of(tmp_path, 3)
    log.close()
    whole = log.path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        log.path.write_bytes(whole[:cut])
        assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 2]
        log.append(3, "train", {"loss": 1 / 3})
        log.close()
        assert log.path.read_bytes() == whole


@pytest.mark.parametrize(
    "bad", [b"", b"{", b"null", b"[1]", b'{"step": 2}', b'{"step": "2", "kind": "train"}', b'{"step": 2, "kind": "x"}', b"\xff", b"\0"]
)
def test_any_other_bad_line_is_an_error_that_names_it(tmp_path: Path, bad: bytes) -> None:
    log = log_of(tmp_path, 3)
    lines = log.path.read_bytes().split(b"\n")
    for index in range(4):
        log.path.write_bytes(b"\n".join([*lines[:index], bad, *lines[index + 1 :]]))
        with pytest.raises(UserError, match=rf"metrics\.jsonl:{index + 1}: "):
            read_metrics(log.path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(done=st.integers(0, 9), saved=st.integers(-1, 9), torn=st.integers(0, 30), total=st.integers(0, 12))
def test_truncated_and_resumed_the_file_is_that_of_an_uninterrupted_run(
    tmp_path: Path, done: int, saved: int, torn: int, total: int
) -> None:
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    log = log_of(tmp_path, done)
    log.close()
    saved, total = min(saved, done), max(total, done)
    with open(log.path, "ab") as file:
        file.write(b'{"step": 10, "kind": "train", "loss": 0.1'[:torn])
    log.truncate(saved)
    for step in range(max(saved, 0) + 1, total + 1):
        log.append(step, "train", {"loss": 1 / step})
        if step % 2 == 0:
            log.append(step, "eval", {"accuracy": step / 10})
    log.close()
    resumed = log.path.read_bytes()
    log.path.unlink()
    log_of(tmp_path, total).close()
    assert resumed == (log.path.read_bytes() if log.path.exists() else b"")


def append_one(path: Path) -> None:
    MetricsLog(path).append(3, "train", {"loss": 1 / 3})


def truncate_to_one(path: Path) -> None:
    MetricsLog(path).truncate(1)


@pytest.mark.parametrize(("point", "rows"), [("metrics.before", 3), ("metrics.written", 4)])
def test_killed_while_appending_the_rows_are_whole(tmp_path: Path, point: str, rows: int) -> None:
    log = log_of(tmp_path, 2)
    assert run(append_one, log.path, failpoint=f"{point}:kill") == -signal.SIGKILL
    assert len(read_metrics(log.path)) == rows


@pytest.mark.parametrize(("point", "rows"), [("metrics.jsonl.written", 3), ("metrics.jsonl.replaced", 1)])
def test_killed_while_truncating_the_file_is_the_old_or_the_new(tmp_path: Path, point: str, rows: int) -> None:
    log = log_of(tmp_path, 2)
    assert run(truncate_to_one, log.path, failpoint=f"{point}:kill") == -signal.SIGKILL
    assert len(read_metrics(log.path)) == rows


def test_a_full_disk_in_the_middle_of_a_row_leaves_no_torn_line(tmp_path: Path) -> None:
    log = log_of(tmp_path, 2)
    size = log.path.stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # the kernel takes ten bytes, then refuses
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl: writing the metrics failed: File too large"):
            log.append(3, "train", {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert log.path.stat().st_size == size
    log.append(3, "train", {"loss": 1.0})
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 2, 3]


def test_truncating_on_a_full_disk_keeps_every_row_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(tmp_path, 2)
    monkeypatch.setenv(failpoints.VARIABLE, "metrics.jsonl.written:raise-enospc")
    with pytest.raises(UserError, match=r"No space left on device.*Free some space"):
        log.truncate(1)
    assert len(read_metrics(log.path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr("preftune.training.metrics.os.fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    log = log_of(tmp_path, 1)
    assert synced == []
    log.sync()
    assert synced == [str(log.path)]


def test_the_run_directory_needs_no_torch() -> None:
    script = "import sys, preftune.training.rundir; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# ---- failpoints themselves


def test_a_failpoint_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints.failpoint("here")
    monkeypatch.setenv(failpoints.VARIABLE, "here:raise-enospc:3")
    failpoints.failpoint("here")
    failpoints.failpoint("there")
    failpoints.failpoint("here")
    with pytest.raises(OSError) as raised:
        failpoints.failpoint("here")
    assert raised.value.errno == errno.ENOSPC
    failpoints.failpoint("here")
