"""Checkpoints that are either whole or not there: `root/step-00000012/` with tensors, `state.json` and `manifest.json`.

A save writes every file into a hidden sibling, syncs them, describes them by size and SHA-256 in the manifest, syncs that and the
directory, renames the directory into place, syncs the parent, and only then removes older checkpoints. A load hashes every byte first.
safetensors and JSON only: nothing that is read here can run code.
"""

import base64
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from preftune.errors import NonFiniteError, UserError
from preftune.training.durable import explained, sync_directory, sync_file
from preftune.training.failpoints import failpoint

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
_SUFFIX = ".safetensors"
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"  # half-written or half-removed: deleted by `recover`
_REPLACED = ".replaced-"  # whole, out of the way while its successor moves in: put back by `recover` if that did not happen
_BROKEN = "broken-"  # failed its manifest: left for the user to look at

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `problems` says, a line each, which newer checkpoints were broken and passed over."""

    step: int
    path: Path
    state: dict[str, Any]
    groups: tuple[str, ...]
    problems: tuple[str, ...] = ()

    def tensors(self, group: str, device: str | torch.device = "cpu") -> dict[str, Tensor]:
        """The tensors saved under `group`, read from disk now."""
        return load_file(self.path / f"{group}{_SUFFIX}", device=str(device))

    def everything(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every group, read from disk now."""
        return {group: self.tensors(group) for group in self.groups}


def step_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lives."""
    return root / f"step-{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """Steps that have a checkpoint with a manifest, oldest first; their bytes are not verified."""
    return sorted(step for step, path in _step_directories(root) if (path / MANIFEST).is_file())


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int,
    protect: Collection[int] = (),
) -> Path:
    """Write the checkpoint of `step` atomically, then remove all but the newest `keep` and the `protect`ed steps; returns its path.

    `tensors` maps a group (the file's name: `model`, `optimizer`) to tensors of any device, dtype and stride; tied tensors are written
    once for every name. `state` must be JSON. Checkpoints newer than `step` are neither counted nor removed.
    Raises UserError when the disk refuses (earlier checkpoints intact, nothing left behind), NonFiniteError for a NaN or infinity.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    state_bytes = _to_json(state)
    for group, named in tensors.items():
        _refuse_nonfinite(group, named)
    final = step_path(root, step)
    temporary = root / f"{_TEMPORARY}{final.name}"
    with explained(f"saving the checkpoint of step {step}", final):
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _write_files(temporary, step, tensors, state_bytes)
            _move_into_place(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    _rotate(root, step, keep, protect)
    return final


def load(path: Path) -> Checkpoint:
    """The checkpoint in directory `path`, every byte of it verified. Raises UserError when it is absent, torn or altered."""
    with explained("reading the checkpoint", path):
        manifest = _verified_manifest(path)
        state = json.loads((path / STATE).read_bytes())
    groups = tuple(name.removesuffix(_SUFFIX) for name in manifest["files"] if name.endswith(_SUFFIX))
    return Checkpoint(manifest["step"], path, state, groups)


def load_latest(root: Path) -> Checkpoint | None:
    """The newest checkpoint under `root` that verifies, with the `problems` of those passed over; None when there is none at all.

    Raises UserError when there are checkpoints and every one is broken: starting afresh is then the user's decision.
    """
    problems: list[str] = []
    for _, path in sorted(_step_directories(root), reverse=True):
        try:
            found = load(path)
        except UserError as error:
            problems.append(str(error))
            continue
        return Checkpoint(found.step, found.path, found.state, found.groups, tuple(problems))
    if problems:
        raise UserError(
            f"no checkpoint can be used: {'; '.join(problems)}",
            where=str(root),
            fix="Restore this directory from a backup, or train again into another output.",
        )
    return None


def recover(root: Path) -> Checkpoint | None:
    """`load_latest` for the owner of the run's lock, who may tidy first: removes what killed saves left behind, and renames broken
    checkpoints that are newer than the one returned to `broken-...`, so that they can never be counted, rotated or met again."""
    with explained("tidying the checkpoints", root):
        for path in _children(root):
            if path.name.startswith(_TEMPORARY):
                shutil.rmtree(path)
            elif path.name.startswith(_REPLACED):
                original = root / path.name.removeprefix(_REPLACED)
                shutil.rmtree(path) if original.exists() else os.rename(path, original)
        checkpoint = load_latest(root)
        if checkpoint and checkpoint.problems:
            for step, path in _step_directories(root):
                if step > checkpoint.step:
                    aside = root / f"{_BROKEN}{path.name}"
                    shutil.rmtree(aside, ignore_errors=True)
                    os.rename(path, aside)
        if root.is_dir():
            sync_directory(root)
    return checkpoint


def rng_state() -> dict[str, Any]:
    """The state of every global random generator (Python, NumPy, torch on CPU and CUDA) as JSON."""
    version, words, gauss = random.getstate()
    numpy_state: dict[str, Any] = dict(np.random.get_state(legacy=False))
    numpy_state["state"] = {"key": numpy_state["state"]["key"].tolist(), "pos": numpy_state["state"]["pos"]}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "python": [version, list(words), gauss],
        "numpy": numpy_state,
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(one) for one in cuda],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the generators back to what `rng_state` saw; CUDA devices that are not here now are passed over."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key = np.asarray(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    torch.set_rng_state(_decode(state["torch"]))
    for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_decode(one), device)


def _write_files(directory: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes) -> None:
    sealed: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(2) as pool:  # a file is synced and hashed while the next one is written
        for group, named in tensors.items():
            path = directory / f"{group}{_SUFFIX}"
            _write_tensors(path, named)
            failpoint(f"checkpoint.{path.name}")
            sealed[path.name] = pool.submit(_seal, path)
        (directory / STATE).write_bytes(state)
        failpoint(f"checkpoint.{STATE}")
        sealed[STATE] = pool.submit(_seal, directory / STATE)
    files = {name: one.result() for name, one in sealed.items()}
    failpoint("checkpoint.before_manifest")
    (directory / MANIFEST).write_bytes(_to_json({"format": FORMAT, "step": step, "files": files}))
    failpoint("checkpoint.after_manifest")
    sync_file(directory / MANIFEST)
    sync_directory(directory)


def _seal(path: Path) -> dict[str, Any]:
    sync_file(path)
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _move_into_place(temporary: Path, final: Path) -> None:
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    failpoint("checkpoint.before_rename")
    if final.exists():  # a directory cannot be renamed over a full one
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
        failpoint("checkpoint.replacing")
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    failpoint("checkpoint.after_rename")
    sync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _rotate(root: Path, newest: int, keep: int, protect: Collection[int]) -> None:
    mine = [step for step in saved_steps(root) if step <= newest]
    doomed = [step_path(root, step) for step in mine[:-keep] if step not in protect]
    try:
        for path in doomed:  # renamed before they are emptied, so that no half checkpoint ever bears a real name
            os.rename(path, root / f"{_TEMPORARY}{path.name}")
            failpoint("checkpoint.rotating")
        if doomed:
            sync_directory(root)
        for path in doomed:
            shutil.rmtree(root / f"{_TEMPORARY}{path.name}")
            failpoint("checkpoint.rotated")
    except OSError as error:  # the new checkpoint is safe: no reason to end the run
        _log.warning("could not remove old checkpoints in %s: %s", root, error)


def _write_tensors(path: Path, named: Mapping[str, Tensor]) -> None:
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in named.items():
        one = tensor.detach().contiguous()
        plain[name] = one.clone() if one.data_ptr() in seen else one
        seen.add(one.data_ptr())
    save_file(plain, path)


def _refuse_nonfinite(group: str, named: Mapping[str, Tensor]) -> None:
    for name, tensor in named.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        plain = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()  # float8 has no aminmax
        if not torch.stack(torch.aminmax(plain)).isfinite().all():  # NaN wins both; unlike a sum it cannot overflow, and copies nothing
            raise NonFiniteError(f"{group}: tensor {name} holds NaN or infinity: such a checkpoint is not written")


def _verified_manifest(path: Path) -> dict[str, Any]:
    def broken(why: str) -> UserError:
        return UserError(f"broken checkpoint: {why}", where=str(path))

    name = _STEP.fullmatch(path.name)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
        expected = {file: (about["size"], about["sha256"]) for file, about in files.items()}
    except FileNotFoundError:
        raise broken(f"{MANIFEST} is missing" if path.is_dir() else "there is no such directory") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise broken(f"{MANIFEST} cannot be read") from None
    if version != FORMAT:
        raise broken(f"its format is {version!r}, this preftune reads {FORMAT}")
    if name and step != int(name[1]):
        raise broken(f"{MANIFEST} is of step {step}")
    if STATE not in expected:
        raise broken(f"{MANIFEST} does not list {STATE}")
    for file, (size, _) in expected.items():
        if not (path / file).is_file():
            raise broken(f"{file} is missing")
        if (actual := (path / file).stat().st_size) != size:
            raise broken(f"{file} has {actual} bytes, not {size}")
    with ThreadPoolExecutor(2) as pool:
        for file, digest in zip(expected, pool.map(lambda file: _sha256(path / file), expected), strict=True):
            if digest != expected[file][1]:
                raise broken(f"{file} was altered (its SHA-256 differs)")
    return manifest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _children(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


def _step_directories(root: Path) -> list[tuple[int, Path]]:
    return [(int(match[1]), path) for path in _children(root) if (match := _STEP.fullmatch(path.name))]


def _to_json(value: Mapping[str, Any]) -> bytes:
    """Raises TypeError or ValueError for what would come back as something else: integer keys, NaN, objects."""
    _refuse_other_keys(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _refuse_other_keys(value: object) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"JSON would turn the key {key!r} into a string")
            _refuse_other_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_other_keys(inner)


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
