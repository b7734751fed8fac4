"""Reference twins of the selections and of the permuted family's operators.

Plain torch integers, from the contract: the network's rounds and keys are those of the section
"Selections" in ``docs/conventions.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import MASK, words
from .rows import accumulator, chunks, cycle, repeats_of, row_signs

_ROUNDS = 8
_MIN_BITS = 8


def permutation(
    key: Tensor, stream: int, first: int, directions: int, size: int, count: int
) -> Tensor:
    """Entries 0 .. count - 1 of the permutations of 0 .. size - 1: [directions, count] int64."""
    bits = max(_MIN_BITS, (size - 1).bit_length())
    high_bits, low_bits = bits // 2, bits - bits // 2
    # The 16 words in order are multiplier and offset of round 0, of round 1, ...
    keys = words(key, stream, first, directions, 0, _ROUNDS // 2).reshape(directions, _ROUNDS, 2)

    def hashed(value: Tensor, round_: int, result_bits: int) -> Tensor:
        multiplier, offset = keys[:, round_, :, None].unbind(1)
        return (multiplier * value + offset & MASK) >> (32 - result_bits)

    def encrypt(value: Tensor) -> Tensor:
        high, low = value >> low_bits, value & (1 << low_bits) - 1
        for round_ in range(0, _ROUNDS, 2):
            high = high ^ hashed(low, round_, high_bits)
            low = low ^ hashed(high, round_ + 1, low_bits)
        return high << low_bits | low

    start = torch.arange(count, device=key.device).expand(directions, count)
    if bits > _MIN_BITS:
        step = encrypt
    else:  # small sizes walk far: look their steps up
        whole = torch.arange(1 << bits, device=key.device).expand(directions, -1)
        table = encrypt(whole)

        def step(value: Tensor) -> Tensor:
            return table.gather(1, value)

    value = step(start)
    while bool((value >= size).any()):
        value = torch.where(value >= size, step(value), value)
    return value


def selections(
    key: Tensor,
    stream: int,
    first: int,
    directions: int,
    size: int,
    count: int,
    replace: bool,
) -> Tensor:
    """Entries 0 .. count - 1 of pi_d for the directions ``first ..``: [directions, count] int64.

    pi_d is a permutation of 0 .. size - 1, or draws with replacement: entry j is the high word of
    ``size`` times word j % 4 of block j // 4.

    Raises:
        ValueError: more entries than a permutation has.
    """
    if not replace:
        if count > size:
            raise ValueError(f"selections: count must be at most size = {size}, got {count}")
        return permutation(key, stream, first, directions, size, count)
    drawn = words(key, stream, first, directions, 0, -(-count // 4)).flatten(1)[:, :count]
    return drawn * size >> 32 & MASK


def select(
    x: Tensor,
    key: Tensor,
    stream: int,
    directions: int,
    count: int,
    antithetic: bool,
    shared: bool,
    replace: bool,
) -> Tensor:
    """out[b, t, j] = s_b x[b, t, pi_d(j)] for j < count.

    Args:
        x: [B, T, n]; with ``shared`` [N, T, n], rows that every direction sees.
        key: [3] int64: mixed seed, generation, global index of the first direction.
        stream: counter word c0 of the selection.
        directions: D.
        count: entries of a row of the result.
        antithetic: s_b = -1 in the second half of the repeats; not with ``shared``.
        shared: write row N out for every direction.
        replace: draws with replacement.

    Returns:
        [B, T, count]; with ``shared`` [N * D, T, count], row b from ``x[b // D]``.

    Raises:
        ValueError: the rows of x do not fit, or ``antithetic`` and ``shared``.
    """
    each = spread_rows("select", x, directions, antithetic, shared)
    index = selections(key, stream, 0, directions, x.shape[-1], count, replace)
    index = index[:, None].expand(*each.shape[:-1], count)
    signs = row_signs(each.shape[0], antithetic, x).to(x.dtype)
    return (signs * each.gather(-1, index)).flatten(0, 1)


def spread_rows(op: str, x: Tensor, directions: int, antithetic: bool, shared: bool) -> Tensor:
    """View x as [R, D, T, n], or repeat its N rows for every direction: [N, D, T, n]."""
    if shared:
        if antithetic:
            raise ValueError(f"{op}: antithetic and shared exclude each other")
        if directions <= 0:
            raise ValueError(f"{op}: directions must be positive, got {directions}")
        return x[:, None].expand(-1, directions, -1, -1)
    repeats = repeats_of(op, "x", x.shape[0], directions, antithetic)
    return x.reshape(repeats, directions, *x.shape[1:])


def select_add(
    y: Tensor,
    z: Tensor,
    key: Tensor,
    stream: int,
    directions: int,
    antithetic: bool,
    replace: bool,
) -> Tensor:
    """y[b, t, i] + s_b z[b % M, t, pi_d(i)] wherever pi_d(i) < q, else y[b, t, i].

    Args:
        y: [B, T, m].
        z: [M, T, q], M a multiple of D that divides B, q at most m.
        key: as in :func:`select`.
        stream: counter word c0 of the selection among 0 .. m - 1.
        directions: D.
        antithetic: s_b = -1 in the second half of the repeats.
        replace: draws with replacement.

    Raises:
        ValueError: the rows of y or z do not fit, or z is wider than y.
    """
    rows, _, out = y.shape
    repeats = repeats_of("select_add", "y", rows, directions, antithetic)
    if z.shape[-1] > out:
        raise ValueError(f"select_add: z must have at most y's {out} columns, got {z.shape[-1]}")
    acc = accumulator(y.dtype)
    each = cycle("select_add", "z", z, rows, directions).to(acc)
    each = torch.nn.functional.pad(each, (0, out - z.shape[-1]))
    index = selections(key, stream, 0, directions, out, out, replace)
    added = each.gather(-1, index[:, None].expand(each.shape)) * row_signs(repeats, antithetic, y)
    return (y.to(acc) + added.reshape(y.shape)).to(y.dtype)


def selection_sum(
    weights: Tensor, key: Tensor, stream: int, first: int, rows: int, size: int, replace: bool
) -> Tensor:
    """S[j, k]: the sum of weights[d] over d with pi_d(first + j) = k, in their order: [rows, size].

    ``weights`` is [D], and the result has its dtype.
    """
    total = torch.zeros(rows, size, dtype=weights.dtype, device=weights.device)
    row = torch.arange(rows, device=weights.device)
    for begin, count in chunks(weights.shape[0], first + rows):
        index = selections(key, stream, begin, count, size, first + rows, replace)[:, first:]
        for w, columns in zip(weights[begin : begin + count], index, strict=True):
            total[row, columns] += w
    return total


def permuted_estimate(
    grad: Tensor,
    base: Tensor,
    weights: Tensor,
    key: Tensor,
    in_stream: int,
    out_stream: int,
    accumulate: bool,
) -> Tensor:
    """(accumulate ? grad : 0) + G, G[i, in_d(j)] = sum_d weights[d] base[out_d(i), j].

    Rows i of a direction with out_d(i) >= q get nothing from it.

    Args:
        grad: [m, n].
        base: [q, p], q at most m and p at most n, in the accumulator's dtype of ``grad``.
        weights: [D] in the same dtype.
        key: [3] int64: mixed seed, generation, global index of the first direction.
        in_stream: counter word c0 of the permutations in_d of 0 .. n - 1, -1: identity.
        out_stream: counter word c0 of the permutations out_d of 0 .. m - 1, -1: identity.
        accumulate: add to ``grad``.
    """
    (out, cols), (q, p), acc = grad.shape, base.shape, accumulator(grad.dtype)

    def entries(stream: int, first: int, number: int, size: int, count: int) -> Tensor:
        if stream < 0:
            return torch.arange(count, device=grad.device).expand(number, count)
        return permutation(key, stream, first, number, size, count)

    total = torch.zeros(out, cols, dtype=acc, device=grad.device)
    for first, number in chunks(weights.shape[0], out + cols):
        each_row = entries(out_stream, first, number, out, out)
        each_column = entries(in_stream, first, number, cols, p)
        for w, rows, columns in zip(weights[first:], each_row, each_column, strict=False):
            here = (rows < q).nonzero().flatten()
            total[here[:, None], columns] += w.to(acc) * base[rows[here]].to(acc)
    return (grad.to(acc) + total if accumulate else total).to(grad.dtype)
