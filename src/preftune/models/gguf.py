"""A .gguf file unpacked once into a plain folder: transformers takes many seconds to read one, and every command would pay for it anew."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.home import cache_home

LARGEST = 512 * 2**20
"""Bytes of the largest file that is unpacked: its weights take up to eight times as much in fp32."""


def unpacked(file: Path) -> Path | None:
    """A folder with the config, tokenizer and fp32 weights of `file`, made at its first use; None where it is to be read as it is.

    The name holds the file's hash and transformers' version, so that neither can be another's. None too where there is no room, where
    nothing may be written, and where transformers cannot read the file: who then reads it says why.
    """
    try:
        if file.stat().st_size > LARGEST:
            return None
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        folder = cache_home() / "models" / f"{digest[:24]}-{transformers.__version__}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with open(folder.parent / ".lock", "a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not folder.is_dir():
                    _unpack(file, folder)
        return folder
    except Exception:
        return None


def _unpack(file: Path, folder: Path) -> None:
    """Write the folder, whole or not at all; one process at a time."""
    if shutil.disk_usage(folder.parent).free < 16 * file.stat().st_size:
        raise OSError("no room")
    temporary = folder.parent / ".tmp"  # of this process, or left by a killed one
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        read = {"gguf_file": file.name, "trust_remote_code": False}
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **read)
        model.hf_quantizer = None  # the weights are plain tensors now
        del model.config.quantization_config
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(file.parent, **read).save_pretrained(temporary)
        for path in temporary.iterdir():
            with path.open("rb") as written:
                os.fsync(written.fileno())
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
