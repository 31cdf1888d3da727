"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum


class OnError(StrEnum):
    """What to do with rows that cannot be used."""

    stop = "stop"
    skip = "skip"


class Precision(StrEnum):
    """Number format of the model's products."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
