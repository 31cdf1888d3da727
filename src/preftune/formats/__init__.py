"""Rows in the wild <-> records. `read` recognises a format and names every bad row; `write` says what a format cannot carry."""

from preftune.formats.dataset import Dataset, Dropped, read, read_prompts, record_id
from preftune.formats.order import strict_pairs
from preftune.formats.reasons import REASONS, Reason
from preftune.formats.split import prompt_key, split_by_prompt
from preftune.formats.table import FORMATS, Format
from preftune.formats.writers import TARGETS, Written, writable, write

__all__ = [
    "FORMATS",
    "REASONS",
    "TARGETS",
    "Dataset",
    "Dropped",
    "Format",
    "Reason",
    "Written",
    "prompt_key",
    "read",
    "read_prompts",
    "record_id",
    "split_by_prompt",
    "strict_pairs",
    "writable",
    "write",
]
