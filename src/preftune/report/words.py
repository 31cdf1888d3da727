"""Numbers as people read them: short, with their unit, minus signs that are minus signs."""

from __future__ import annotations

import math
from collections.abc import Callable

DASH = "–"


def number(value: float | None, digits: int = 4) -> str:
    """At most `digits` significant digits, thousands apart, powers of ten only far from 1; a dash for what is not a number."""
    if value is None or not math.isfinite(value):
        return DASH
    size = abs(value)
    if size and not 1e-4 <= size < 1e15:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    elif size >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.{digits}g}"
    return text.replace("-", "−").replace(",", "\u202f")


def fixed(value: float | None, decimals: int = 2) -> str:
    """With so many decimals, for numbers that stand among their like."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{decimals}f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Seconds as "8.2 s", "4 min 10 s" or "3 h 05 min"."""
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float | None) -> str:
    """Bytes as MB or GB (powers of ten)."""
    if count is None or not math.isfinite(count):
        return DASH
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def share(value: float | None) -> str:
    """A number in [0, 1] as a percentage with one decimal."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


SCALED: dict[str, Callable[[float | None], str]] = {"accuracy": share, "proportion": share, "seconds": duration, "bytes": size}


def quantity(value: float | None, unit: str = "") -> str:
    """A figure with its unit; "accuracy" and "proportion" are shares of 1, "seconds" and "bytes" are scaled."""
    if unit in SCALED:
        return SCALED[unit](value)
    return f"{number(value)} {unit}".strip() if value is not None and math.isfinite(value) else DASH


def title_of(metric: str) -> str:
    """A metric's name as a heading: "chosen_reward" is "Chosen reward"."""
    words = metric.replace("_", " ").replace("/", " ").strip()
    return words[:1].upper() + words[1:]
