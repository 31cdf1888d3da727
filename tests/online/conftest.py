"""One place for all online tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts and a rule."""
    from tests.online import small

    return small.place(tmp_path_factory.mktemp("online"))
