"""A .gguf file is unpacked once, and what is read from the folder is what is in the file."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import gguf as peer
import numpy as np
import pytest
import torch

from preftune.models import gguf, load
from tests.tiny import tokenizer

WIDTH, HEADS, INNER, LAYERS = 32, 4, 64, 2


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small random Llama, written with the format's own library."""
    inner = json.loads(tokenizer().backend_tokenizer.to_str())
    vocabulary = sorted(inner["model"]["vocab"].items(), key=lambda item: item[1])
    special = {one["content"] for one in inner["added_tokens"]}
    path = tmp_path / "model" / "tiny.gguf"
    path.parent.mkdir()
    writer = peer.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in inner["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    draw = np.random.default_rng(0)
    put = lambda name, *shape: writer.add_tensor(name, np.asarray(draw.normal(0, 0.3, shape), dtype=np.float16))
    put("token_embd.weight", len(vocabulary), WIDTH)
    put("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH // 2, WIDTH), ("attn_v", WIDTH // 2, WIDTH), ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", INNER, WIDTH), ("ffn_up", INNER, WIDTH), ("ffn_down", WIDTH, INNER),
        ):  # fmt: skip
            put(f"blk.{layer}.{name}.weight", rows, columns)
        put(f"blk.{layer}.attn_norm.weight", WIDTH)
        put(f"blk.{layer}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def both(file: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Model and tokenizer as they come from the unpacked folder, and from the file itself."""
    read = lambda: (load.load_causal_lm(load.locate(str(file))), load.load_tokenizer(load.locate(str(file))))
    first = read()
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "unpacked", lambda file: None)
        return [first, read()]


def test_the_folder_is_what_the_file_is(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, words), (direct, plain) = both(file, monkeypatch)
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1
    mine, theirs = model.state_dict(), direct.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    ours = {"_name_or_path", "architectures"}
    known = lambda one: {k: v for k, v in one.config.to_dict().items() if k not in ours}
    assert known(model) == known(direct) and model.generation_config.to_dict() == direct.generation_config.to_dict()
    assert model.name_or_path == direct.name_or_path == str(file)
    text = "the tin.\n\n: <|user|>\u2028 w\u00f6rld"
    assert words.tokenizer(text).input_ids == plain.tokenizer(text).input_ids and words.turn_ends == plain.turn_ends


def test_it_is_unpacked_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gguf.unpacked(file)
    assert folder is not None

    def never(*_: object) -> NoReturn:
        raise AssertionError("unpacked again")

    monkeypatch.setattr(gguf, "_unpack", never)
    assert gguf.unpacked(file) == folder and load.locate(str(file)).plain.path == str(folder)


def test_another_file_has_another_folder(file: Path, cache: Path) -> None:
    first = gguf.unpacked(file)
    changed = bytearray(file.read_bytes())
    changed[-64:] = bytes(64)
    file.write_bytes(changed)
    second = gguf.unpacked(file)
    assert first is not None and second is not None and first != second


def test_two_processes_at_once_make_one_folder(file: Path, cache: Path) -> None:
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(gguf.unpacked, [file, file]))
    assert found[0] is not None and found[0] == found[1] and sorted(p.name for p in cache.iterdir()) == sorted([".lock", found[0].name])


def test_what_a_killed_process_left_is_cleared(file: Path, cache: Path) -> None:
    (cache / ".tmp").mkdir(parents=True)
    (cache / ".tmp" / "stray.safetensors").write_bytes(b"half")
    folder = gguf.unpacked(file)
    assert folder is not None and not (folder / "stray.safetensors").exists() and not (cache / ".tmp").exists()


@pytest.mark.parametrize("why", ["full disk", "failing write", "read-only", "large"])
def test_where_it_cannot_be_kept_the_file_is_read_as_it_is(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "full disk":
        monkeypatch.setattr(gguf.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    elif why == "failing write":
        monkeypatch.setattr(gguf.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    elif why == "read-only":
        cache.parent.write_text("a file where a folder should be")
    else:
        monkeypatch.setattr(gguf, "LARGEST", 100)
    assert gguf.unpacked(file) is None
    assert load.load_causal_lm(load.locate(str(file))).config.num_hidden_layers == LAYERS
    assert not cache.is_dir() or [p.name for p in cache.iterdir()] in ([], [".lock"])


def test_a_file_that_is_no_model_is_explained(tmp_path: Path, cache: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(load.UserError, match="could not be loaded"):
        load.load_causal_lm(load.locate(str(broken)))
