"""Tiny models shared by all tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with its tokenizer, as a model directory."""
    from tests import tiny

    return tiny.save(tmp_path_factory.mktemp("models") / "llama")
