"""Numbers laid out as a CPU multiplies bf16: two that follow each other, along a product's inner dimension, in one int32."""

from __future__ import annotations

from numba import njit

from preftune.kernels.tiles import LANES, at16, at32, at32i, paired


@njit(inline="always")
def up(n, multiple):
    """The next multiple of it, from n on."""
    return (n + multiple - 1) // multiple * multiple


@njit(inline="always")
def across(source, row, tokens, width, to, column):
    """Columns of `to` [width / 2, ..]: of each token its pairs of neighbours."""
    for start in range(0, tokens, LANES):
        for c in range(width // 2):
            for j in range(start, min(start + LANES, tokens)):
                to[c, column + j] = at32i(source + 2 * j * row)[c]


@njit(inline="always")
def along(source, row, tokens, width, to, first):
    """Rows of `to` [.., width]: pairs of tokens that follow each other, the last with nothing where there is no other."""
    for j in range(0, tokens - 1, 2):
        low, high = at16(source + 2 * j * row), at16(source + 2 * (j + 1) * row)
        for c in range(width):
            to[first + j // 2, c] = paired(low[c], high[c])
    if tokens % 2:
        low = at16(source + 2 * (tokens - 1) * row)
        for c in range(width):
            to[first + tokens // 2, c] = paired(low[c], 0)


@njit(inline="always")
def along_turned(source, row, tokens, width, to):
    """[width, tokens / 2] pairs of tokens that follow each other."""
    for j in range(0, tokens - 1, 2):
        low, high = at16(source + 2 * j * row), at16(source + 2 * (j + 1) * row)
        for c in range(width):
            to[c, j // 2] = paired(low[c], high[c])
    if tokens % 2:
        low = at16(source + 2 * (tokens - 1) * row)
        for c in range(width):
            to[c, tokens // 2] = paired(low[c], 0)


@njit(inline="always")
def down(source, column, to, first, lines, tokens, width):
    """Columns [width, ..] as rows of floats, the first of them line `first` and `lines` from one to the next."""
    for j in range(tokens):
        line = at32(to + 4 * (first + j * lines) * width)
        for c in range(width):
            line[c] = source[c, column + j]
