import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from preftune.errors import NonFiniteError, UserError
from preftune.training import checkpoint, durable
from preftune.training.checkpoint import Checkpoint, load, load_latest, recover, restore_rng, rng_state, save, saved_steps, step_path
from tests.training.processes import run, start

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def tensors_of(step: int, size: int = 300) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"w": torch.randn(size, generator=generator), "b": torch.randn(7, generator=generator).bfloat16()},
        "optimizer": {"w.exp_avg": torch.randn(size, generator=generator), "w.step": torch.tensor(float(step))},
    }


def save_step(root: Path, step: int, keep: int = 2, protect: tuple[int, ...] = (), size: int = 300) -> Path:
    return save(root, step, tensors_of(step, size), {"cursor": step * 10}, keep=keep, protect=protect)


def assert_is_step(found: Checkpoint | None, step: int, size: int = 300) -> None:
    assert found is not None
    assert (found.step, found.state) == (step, {"cursor": step * 10})
    assert set(found.groups) == {"model", "optimizer"}
    for group, named in tensors_of(step, size).items():
        read = found.tensors(group)
        assert read.keys() == named.keys()
        for name, tensor in named.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def visible(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def flip(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


# ---- what is saved comes back


def test_round_trip_of_every_dtype_shape_and_layout(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    model = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "tied": base,
        "tied too": base,
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "half": torch.full((3,), 60000.0, dtype=torch.float16),  # its sum overflows, its values do not
        "integers": torch.tensor([2**62, -1]),
        "flags": torch.tensor([True, False]),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "float8": torch.tensor([0.5, -2.0]).to(torch.float8_e4m3fn),
    }
    path = save(tmp_path, 3, {"model": model, "optimizer": {}}, {"nested": {"list": [1, 0.1, None, "\u2028"]}}, keep=1)
    found = load(path)
    assert found.state == {"nested": {"list": [1, 0.1, None, "\u2028"]}}
    read = found.tensors("model")
    assert read.keys() == model.keys()
    for name, tensor in model.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(read[name].contiguous().view(-1).view(torch.uint8), tensor.detach().contiguous().view(-1).view(torch.uint8)), (
            name
        )
    assert found.tensors("optimizer") == {}


def test_manifest_hashes_agree_with_sha256sum(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == set(FILES) - {"manifest.json"}
    for name, about in files.items():
        assert subprocess.check_output(["sha256sum", path / name], text=True).split()[0] == about["sha256"]
        assert (path / name).stat().st_size == about["size"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_no_non_finite_number_enters_a_checkpoint(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    save_step(tmp_path, 1)
    tensors = tensors_of(2)
    tensors["optimizer"]["w.exp_avg"] = torch.zeros(10_001, dtype=dtype)
    tensors["optimizer"]["w.exp_avg"][7_777] = bad
    with pytest.raises(NonFiniteError, match=r"optimizer.*w\.exp_avg"):
        save(tmp_path, 2, tensors, {}, keep=1)
    assert visible(tmp_path) == {"step-00000001"}


@pytest.mark.parametrize("state", [{"a": float("nan")}, {"a": {1: 2}}, {"a": [{None: 1}]}, {"a": object()}, {"a": torch.ones(1)}])
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict) -> None:
    with pytest.raises((TypeError, ValueError)):
        save(tmp_path, 1, {}, state, keep=1)
    assert not tmp_path.exists() or not visible(tmp_path)


def test_rng_state_survives_json_and_resumes_every_generator() -> None:
    def draw() -> list[object]:
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(),
            torch.rand(3).tolist(),
            torch.randn(5).tolist(),
        ]

    draw()  # leaves half a Gaussian pair waiting in Python's and NumPy's generators
    state = json.loads(json.dumps(rng_state()))
    expected = draw()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    assert draw() != expected
    restore_rng(state)
    assert draw() == expected


# ---- rotation


def test_the_newest_and_the_protected_are_kept(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_step(tmp_path, step, keep=2, protect=(3,))
    assert saved_steps(tmp_path) == [3, 5, 6]
    assert visible(tmp_path) == {"step-00000003", "step-00000005", "step-00000006"}
    save_step(tmp_path, 7, keep=2, protect=())
    assert saved_steps(tmp_path) == [6, 7]


def test_steps_beyond_the_saved_one_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        save_step(tmp_path, step, keep=5)
    save_step(tmp_path, 3, keep=2)
    assert saved_steps(tmp_path) == [2, 3, 9]


def test_a_failed_rotation_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path, 1, keep=1)
    monkeypatch.setenv("PREFTUNE_FAILPOINT", "checkpoint.rotating:raise-eio")
    save_step(tmp_path, 2, keep=1)
    assert_is_step(load_latest(tmp_path), 2)
    assert "could not remove old checkpoints" in caplog.text


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save(tmp_path, 1, {"model": {"w": torch.zeros(1)}}, {"second": True}, keep=1)
    found = load_latest(tmp_path)
    assert found and found.state == {"second": True} and found.groups == ("model",)
    assert visible(tmp_path) == {"step-00000001"}


# ---- death


def failpoints_of_a_save(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    monkeypatch.setattr(checkpoint, "failpoint", seen.append)
    save_step(root, 4)
    monkeypatch.undo()
    return seen


def three_saved(root: Path) -> Path:
    for step in (1, 2, 3):
        save_step(root, step, keep=3)
    return root


def test_killed_at_every_failpoint_a_whole_checkpoint_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = failpoints_of_a_save(three_saved(tmp_path / "dry"), monkeypatch)
    assert len(names) >= 10 and len(set(names)) >= 9  # two checkpoints are rotated out, so those names come twice
    for index, name in enumerate(names):
        root = three_saved(tmp_path / f"{index}")
        nth = names[: index + 1].count(name)
        assert run(save_step, root, 4, failpoint=f"{name}:kill:{nth}") == -signal.SIGKILL, name
        expected = 4 if index >= names.index("checkpoint.after_rename") else 3
        assert_is_step(load_latest(root), expected)
        found = recover(root)
        assert_is_step(found, expected)
        assert found and found.problems == ()
        assert not any(entry.startswith(".") for entry in visible(root)), name
        save_step(root, 4)  # and the run goes on
        assert saved_steps(root) == [3, 4]


def test_killed_while_a_step_is_replaced_it_is_put_back(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    assert run(save_step, tmp_path, 1, failpoint="checkpoint.replacing:kill") == -signal.SIGKILL
    assert_is_step(recover(tmp_path), 1)
    assert visible(tmp_path) == {"step-00000001"}


def save_forever(root: str) -> None:
    step = 0
    while True:
        step += 1
        save_step(Path(root), step, size=400_000)


def test_killed_at_random_moments_a_whole_checkpoint_remains(tmp_path: Path) -> None:
    chance = random.Random(7)
    for index in range(8):
        root = tmp_path / f"{index}"
        process = start(save_forever, str(root))
        deadline = time.monotonic() + 30
        while not (root.is_dir() and saved_steps(root)) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.15)
        process.kill()
        process.join()
        newest = saved_steps(root)[-1]
        assert_is_step(recover(root), newest, size=400_000)
        shutil.rmtree(root)


def test_the_owner_removes_what_killed_saves_left_and_others_do_not(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    assert run(save_step, tmp_path, 2, failpoint="checkpoint.after_manifest:kill") == -signal.SIGKILL
    assert len(visible(tmp_path)) == 2
    assert_is_step(load_latest(tmp_path), 1)
    assert len(visible(tmp_path)) == 2
    assert_is_step(recover(tmp_path), 1)
    assert visible(tmp_path) == {"step-00000001"}


# ---- a disk that fails


def save_with_file_limit(root: str, step: int, limit: int, report: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_step(Path(root), step, keep=1, size=100_000)
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(report).write_text(f"{error}")


@pytest.mark.parametrize("limit", [20, 4096, 390_000, 401_000])
def test_file_size_limit_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, limit: int) -> None:
    root, report = tmp_path / "checkpoints", tmp_path / "report"
    save_step(root, 1, size=100_000)
    before = {path.name: path.read_bytes() for path in (root / "step-00000001").iterdir()}
    assert run(save_with_file_limit, str(root), 2, limit, str(report)) == 0
    if limit == 401_000:  # the control: all files fit
        assert saved_steps(root) == [2] and not report.exists()
        return
    message = report.read_text()
    assert "step 2" in message and "File too large" in message and str(root) in message and "ulimit" in message
    assert visible(root) == {"step-00000001"}
    assert {path.name: path.read_bytes() for path in (root / "step-00000001").iterdir()} == before


@pytest.mark.parametrize("error", ["enospc", "eio", "erofs"])
def test_an_error_at_any_failpoint_before_the_rename_leaves_the_old_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    names = failpoints_of_a_save(three_saved(tmp_path / "dry"), monkeypatch)
    root = three_saved(tmp_path / "run")
    for name in names[: names.index("checkpoint.after_rename")]:
        monkeypatch.setenv("PREFTUNE_FAILPOINT", f"{name}:raise-{error}")
        checkpoint.failpoint.__globals__["_passed"].clear()
        with pytest.raises(UserError, match="saving the checkpoint of step 4 failed"):
            save_step(root, 4, keep=1)
        monkeypatch.delenv("PREFTUNE_FAILPOINT")
        assert visible(root) == {"step-00000001", "step-00000002", "step-00000003"}
        assert_is_step(load_latest(root), 3)


def test_an_error_while_replacing_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_step(tmp_path, 1)
    real = os.rename

    def rename(source: Path, target: Path) -> None:
        if source.name.startswith(".tmp-"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", rename)
    with pytest.raises(UserError, match=f"{path}.*No space left on device"):
        save_step(tmp_path, 1)
    assert_is_step(load_latest(tmp_path), 1)
    assert visible(tmp_path) == {"step-00000001"}


# ---- corruption


@pytest.mark.parametrize("name", FILES)
def test_any_damage_to_the_newest_is_noticed_and_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    save_step(tmp_path, 1)
    whole = (save_step(tmp_path, 2) / name).read_bytes()
    path = step_path(tmp_path, 2) / name
    chance = random.Random(name)
    flips = [(offset, bit) for offset in range(len(whole)) for bit in range(8)]
    damages = [bytes(whole[:o]) + bytes([whole[o] ^ (1 << b)]) + whole[o + 1 :] for o, b in chance.sample(flips, min(len(flips), 150))]
    damages += [b"", whole[:-1], whole[: len(whole) // 2], whole + b"\0", bytes(len(whole)), None]
    for damage in damages:
        path.unlink(missing_ok=True)
        if damage is not None:
            path.write_bytes(damage)
        found = load_latest(tmp_path)
        assert_is_step(found, 1)
        assert found and len(found.problems) == 1 and "step-00000002" in found.problems[0]
        assert name in found.problems[0] or name == "manifest.json"
    path.write_bytes(whole)
    assert_is_step(load_latest(tmp_path), 2)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 12, {"model": {"w": torch.ones(1)}}, {}, keep=1) / "manifest.json"
    whole = path.read_bytes()
    for offset in range(len(whole)):
        flip(path, offset, bit=offset % 8)
        with pytest.raises(UserError, match="step-00000012"):
            load(path.parent)
        path.write_bytes(whole)


def test_files_swapped_between_steps_are_noticed(tmp_path: Path) -> None:
    first, second = save_step(tmp_path, 1), save_step(tmp_path, 2)
    shutil.copy(first / "optimizer.safetensors", second / "optimizer.safetensors")
    assert_is_step(load_latest(tmp_path), 1)
    shutil.rmtree(second)
    os.rename(first, second)  # a whole directory under another step's name
    with pytest.raises(UserError, match=r"manifest\.json is of step 1"):
        load(second)


def test_when_all_are_broken_it_says_so_instead_of_starting_afresh(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(save_step(tmp_path, step) / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"no checkpoint can be used.*step-00000002.*altered.*step-00000001.*altered"):
        load_latest(tmp_path)
    assert len(visible(tmp_path)) == 2


def test_none_at_all_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "absent") is None
    assert recover(tmp_path / "absent") is None
    (tmp_path / "notes").mkdir()
    assert load_latest(tmp_path) is None


def test_a_missing_path_and_a_newer_format_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load(tmp_path / "step-00000001")
    path = save_step(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(UserError, match="its format is 2, this preftune reads 1"):
        load(path)


def test_the_owner_sets_a_broken_newest_aside_so_it_cannot_push_good_ones_out(tmp_path: Path) -> None:
    for step in (2, 4):
        save_step(tmp_path, step)
    flip(step_path(tmp_path, 4) / "model.safetensors", 200)
    found = recover(tmp_path)
    assert_is_step(found, 2)
    assert visible(tmp_path) == {"step-00000002", "broken-step-00000004"}
    save_step(tmp_path, 5, keep=2)
    assert saved_steps(tmp_path) == [2, 5]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.integers(0, 30), min_size=1, max_size=6, unique=True),
    keep=st.integers(1, 4),
    best=st.sets(st.integers(0, 30), max_size=2),
    broken=st.sets(st.integers(0, 5), max_size=3),
)
def test_rotation_and_loading_agree_with_a_plain_model(
    tmp_path: Path, steps: list[int], keep: int, best: set[int], broken: set[int]
) -> None:
    root = tmp_path / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    expected: set[int] = set()
    for step in sorted(steps):
        save_step(root, step, keep=keep, protect=tuple(best))
        expected.add(step)
        expected = {one for one in expected if one in sorted(expected)[-keep:] or one in best}
    assert saved_steps(root) == sorted(expected)
    ruined = {sorted(expected)[index] for index in broken if index < len(expected)}
    for step in ruined:
        flip(step_path(root, step) / "state.json", 3)
    if good := expected - ruined:
        found = load_latest(root)
        assert_is_step(found, max(good))
        assert found and len(found.problems) == sum(step > max(good) for step in ruined)
    else:
        with pytest.raises(UserError):
            load_latest(root)


# ---- the order that makes it survive a power cut


def test_files_are_synced_before_the_rename_and_the_old_removed_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = three_saved(tmp_path)
    events: list[tuple[str, str]] = []
    real_fsync, real_rename, real_rmtree = os.fsync, os.rename, shutil.rmtree

    def fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        real_rename(source, target)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            events.append(("remove", path.name))
        real_rmtree(path, ignore_errors)

    monkeypatch.setattr(durable.os, "fsync", fsync)
    monkeypatch.setattr(checkpoint.os, "rename", rename)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    save_step(root, 4, keep=2)
    at = events.index
    temporary, final = ".tmp-step-00000004", "step-00000004"
    for name in FILES[:-1]:
        assert at(("fsync", name)) < at(("fsync", "manifest.json"))
    assert at(("fsync", "manifest.json")) < at(("fsync", temporary)) < at(("rename", final)) < at(("fsync", root.name))
    first_removal = next(index for index, (kind, name) in enumerate(events) if "step-00000001" in name or "step-00000002" in name)
    assert at(("fsync", root.name)) < first_removal


class PowerCut:
    """What a disk may hold when the power goes: it records what was synced, and rebuilds a directory as a cut at any moment leaves it.

    Entries of a directory are certain once that directory is synced, a file's bytes once that file is; whatever else happened may or
    may not be there, so every combination of "all of it" and "none of it" is tried for the root's entries, those below, and bytes.
    """

    def __init__(self, root: Path, rebuilt: Path, monkeypatch: pytest.MonkeyPatch, allowed: Callable[[Path], None]) -> None:
        self.root, self.rebuilt, self.allowed, self.states = root, rebuilt, allowed, 0
        self.entries: dict[int, dict[str, int]] = {}
        self.content: dict[int, bytes] = {}
        for path in [root, *root.rglob("*")]:
            self.sync(path)
        self.graveyard = rebuilt.with_name("graveyard")  # so that no inode number is used twice
        self.graveyard.mkdir()
        real_fsync, real_rename, real_rmtree = os.fsync, os.rename, shutil.rmtree

        def fsync(descriptor: int) -> None:
            self.try_all()
            real_fsync(descriptor)
            self.sync(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
            self.try_all()

        def rename(source: Path, target: Path) -> None:
            real_rename(source, target)
            self.try_all()

        def rmtree(path: Path, ignore_errors: bool = False) -> None:
            if self.rebuilt in path.parents:
                real_rmtree(path, ignore_errors)
            elif path.exists():
                for index, inner in enumerate(sorted(path.iterdir())):
                    real_rename(inner, self.graveyard / f"{path.name}-{index}")
                    self.try_all()
                real_rename(path, self.graveyard / path.name)
                self.try_all()

        monkeypatch.setattr(durable.os, "fsync", fsync)
        monkeypatch.setattr(checkpoint.os, "rename", rename)
        monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
        self.pause = lambda: (
            monkeypatch.setattr(durable.os, "fsync", real_fsync),
            monkeypatch.setattr(checkpoint.os, "rename", real_rename),
        )
        self.resume = lambda: (monkeypatch.setattr(durable.os, "fsync", fsync), monkeypatch.setattr(checkpoint.os, "rename", rename))
        self.remove = real_rmtree

    def sync(self, path: Path) -> None:
        if path.is_dir():
            self.entries[path.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self.content[path.stat().st_ino] = path.read_bytes()

    def try_all(self) -> None:
        paths = {path.stat().st_ino: path for top in (self.root, self.graveyard) for path in [top, *top.rglob("*")]}
        self.pause()
        for synced_root, synced_below, synced_bytes in itertools.product((True, False), repeat=3):
            self.rebuilt.mkdir()
            self.build(self.rebuilt, self.root.stat().st_ino, paths, synced_root, synced_below, synced_bytes)
            self.allowed(self.rebuilt)
            self.states += 1
            self.remove(self.rebuilt)
        self.resume()

    def build(self, target: Path, inode: int, paths: dict[int, Path], synced: bool, synced_below: bool, synced_bytes: bool) -> None:
        live = {entry.name: entry.inode() for entry in os.scandir(paths[inode])}
        for name, child in (self.entries.get(inode, {}) if synced else live).items():
            if paths[child].is_dir():
                (target / name).mkdir()
                self.build(target / name, child, paths, synced_below, synced_below, synced_bytes)
            else:
                (target / name).write_bytes(self.content.get(child, b"") if synced_bytes else paths[child].read_bytes())


class AtOnce:
    """ThreadPoolExecutor's face on one thread: a cut is tried at each step, so the steps must come in one order."""

    def __init__(self, workers: int) -> None: ...
    def __enter__(self) -> "AtOnce":
        return self

    def __exit__(self, *error: object) -> None: ...
    def submit(self, call: Callable[..., object], *args: object) -> Future[object]:
        done: Future[object] = Future()
        done.set_result(call(*args))
        return done

    map = staticmethod(map)


@pytest.mark.parametrize("step", [4, 3])
def test_after_a_power_cut_at_any_moment_a_whole_checkpoint_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    root = three_saved(tmp_path / "checkpoints")
    found_steps: set[int] = set()

    def allowed(rebuilt: Path) -> None:
        for path in rebuilt.glob("step-*"):
            load(path)  # no torn one under a real name, not even an old one that was being removed
        found = recover(rebuilt)
        assert found and found.step in {3, step} and found.problems == ()
        assert_is_step(found, found.step)
        found_steps.add(found.step)

    monkeypatch.setattr(checkpoint, "ThreadPoolExecutor", AtOnce)
    disk = PowerCut(root, tmp_path / "rebuilt", monkeypatch, allowed)
    save_step(root, step, keep=1)
    assert disk.states > 100 and found_steps == {3, step}
    found_steps.clear()
    disk.try_all()
    assert found_steps == {step}  # once `save` has returned, no cut can take the new one away
