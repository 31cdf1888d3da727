"""Commands that one process does."""

from __future__ import annotations

import os

from preftune.errors import UserError


def require_one_process(command: str) -> None:
    """Raises UserError under torchrun, where every process would do all the work and write the same file."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{command} runs in one process", fix="Start it without torchrun.")
