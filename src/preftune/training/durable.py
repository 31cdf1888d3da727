"""Writes that survive a power cut, and their failures in the user's words. No torch."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from preftune.errors import UserError
from preftune.training.failpoints import failpoint

_FIXES = {
    errno.ENOSPC: "Free some space on this disk, then run the same command again.",
    errno.EDQUOT: "Free some of your quota on this disk, then run the same command again.",
    errno.EFBIG: "Raise the file size limit (ulimit -f), then run the same command again.",
    errno.EACCES: "Choose an output directory that you may write to.",
    errno.EPERM: "Choose an output directory that you may write to.",
    errno.EROFS: "This disk is read-only: choose another output directory.",
    errno.ENOTDIR: "A part of this path is a file: choose another output directory.",
    errno.EEXIST: "A file stands where a directory is needed: choose another output directory.",
}


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError or a SafetensorError inside the block into a UserError that names what was done, the path and the reason."""
    try:
        yield
    except (OSError, SafetensorError) as raised:
        error = _system_error(raised) if isinstance(raised, SafetensorError) else raised
        reason = error.strerror or str(error)
        fix = _FIXES.get(error.errno or 0, "Check the disk, then run the same command again.")
        raise UserError(f"{doing} failed: {reason}", where=str(path), fix=fix) from raised


def _system_error(error: SafetensorError) -> OSError:
    """The operating system's error behind this one, whose only trace of it is in the text."""
    code = re.search(r"os error (\d+)", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(errno.EIO, str(error))


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Force a directory's entries (what was created, renamed, removed in it) to the disk."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not, sync a directory
            raise


def replace_file(path: Path, content: bytes) -> None:
    """Write `path` so that after any crash it holds either all of its old content or all of the new.

    For one writer at a time (what a killed one leaves is overwritten by the next). Raises OSError, with the old content in place.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            failpoint(f"{path.name}.written")
            os.fsync(file.fileno())
        os.replace(temporary, path)
        failpoint(f"{path.name}.replaced")
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
