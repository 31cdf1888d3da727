"""Numbers laid out as a CPU multiplies bf16: two that follow each other, along a product's inner dimension, in one int32.

Floats are laid out by the same functions, `across`, and by their own twins of the others: a float is read as two halves that stay together,
so lengths of rows are given in halves.
"""

from __future__ import annotations

from numba import njit

from preftune.kernels.tiles import LANES, at16, at32, at32i, narrow, paired


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
def straight(source, row, tokens, width, to, first):
    """As `along`, of floats: rows of `to` [.., width / 2]."""
    for j in range(tokens):
        line = at32i(source + 2 * j * row)
        for c in range(width // 2):
            to[first + j, c] = line[c]


@njit(inline="always")
def straight_turned(source, row, tokens, width, to):
    """As `along_turned`, of floats: [width / 2, tokens]."""
    for j in range(tokens):
        line = at32i(source + 2 * j * row)
        for c in range(width // 2):
            to[c, j] = line[c]


@njit(inline="always")
def down(source, column, to, first, lines, tokens, width):
    """Columns [width, ..] as rows of floats, the first of them line `first` and `lines` from one to the next."""
    for j in range(tokens):
        line = at32(to + 4 * (first + j * lines) * width)
        for c in range(width):
            line[c] = source[c, column + j]


@njit(inline="always")
def by_pairs(scores, slopes, weights, pulls, pulls_along, rows, whole):
    """Weights and gradients of the scores as pairs of queries that follow each other, and the latter as pairs of keys."""
    if rows % 2:
        scores[rows, :whole] = 0
        slopes[rows, :whole] = 0
    for i in range(0, rows, 2):
        for c in range(whole):
            weights[i // 2, c] = paired(narrow(scores[i, c]), narrow(scores[i + 1, c]))
            low, high = narrow(slopes[i, c]), narrow(slopes[i + 1, c])
            pulls[i // 2, c] = paired(low, high)
            pulls_along[i, c] = low
            pulls_along[i + 1, c] = high


@njit(inline="always")
def former(one, other):
    """What bf16 has copied by pairs."""
    return one


@njit(inline="always")
def latter(one, other):
    """What floats leave where it is."""
    return other
