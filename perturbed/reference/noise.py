"""The noise contract in plain torch: Philox, normals, signs, and matrices of them.

Two forms of the normals exist. ``exact=True`` repeats ``box_muller`` of ``csrc/noise/normal.h``
operation by operation and gives the bits of the CPU kernels on every device; it needs float64.
``exact=False`` evaluates the textbook formula in float32 with the device's own log, sin and cos; it
agrees to 4e-6 and serves devices without float64. Signs and words are exact in both.
"""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)

_NORMAL_COLS = 4  # a normal block is 1 x 4 elements
_SIGN_ROWS, _SIGN_COLS = 4, 32  # a block of signs is 4 x 32 elements


def _float32s(*values: float) -> list[float]:
    """Round to float32, as the literals of ``csrc/noise/normal.h`` are."""
    return list(struct.unpack(f"{len(values)}f", struct.pack(f"{len(values)}f", *values)))


_TWO_THIRDS_BITS = 0x3F2AAAAB
(_EXPONENT_SCALE,) = _float32s(-1.6525916e-07)  # -2 ln 2 / 2^23
_LOG = _float32s(-2.0, 0.999998629, -0.666660786, 0.500160575, -0.400355816)
_LOG += _float32s(0.328255683, -0.278069288, 0.30806464, -0.288698822)
_SIN = _float32s(-3.14159274, 5.1677103, -2.55007768, 0.598292172, -0.0776594058)
_COS = _float32s(1.0, -4.93479538, 4.05845118, -1.33209383, 0.220080659)


def splitmix64(seed: int) -> int:
    """Mix a user's seed (taken modulo 2^64) into a Philox key, as a signed 64-bit integer."""
    mask = (1 << 64) - 1
    z = (seed + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    z ^= z >> 31
    return z - (1 << 64) if z >> 63 else z


def philox4x32(counters: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        counters: [..., 4] int64, each a 32-bit word.
        key: [] int64, the 64-bit key; its low word is k0.

    Returns:
        [..., 4] int64, each a 32-bit word.
    """
    c0, c1, c2, c3 = counters.unbind(-1)
    k0, k1 = key & MASK, (key >> 32) & MASK
    for _ in range(_PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits of these unsigned products.
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & MASK) ^ c1 ^ k0, ((p0 >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = p1 & MASK, p0 & MASK
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & MASK, (k1 + _PHILOX_WEYL[1]) & MASK
    return torch.stack([c0, c1, c2, c3], -1)


def words(
    key: Tensor, stream: int, first: int, count: int, first_block: int, blocks: int
) -> Tensor:
    """Philox words of ``count`` directions from ``key[2] + first`` on: [count, blocks, 4] int64."""
    direction = (key[2] + first + torch.arange(count, device=key.device)) & MASK
    block = first_block + torch.arange(blocks, device=key.device)
    counters = torch.empty(count, blocks, 4, dtype=torch.int64, device=key.device)
    counters[..., 0] = stream
    counters[..., 1] = block
    counters[..., 2] = key[1] & MASK
    counters[..., 3] = direction[:, None]
    return philox4x32(counters, key[0])


def _fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    """Compute a * b + c of float32 values, rounded once to float32.

    The product of two float32 is exact in float64. The sum is rounded to odd there, which makes the
    second rounding harmless (Boldo and Melquiond 2008: any target at least two bits narrower).
    """
    product = a.double() * b.double()
    c = c.double() if isinstance(c, Tensor) else c
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)  # exactly what the sum lost (Knuth's TwoSum)
    bits = total.view(torch.int64)
    outward = torch.where((lost > 0) == (total > 0), 1, -1)
    bits = torch.where((lost != 0) & (bits & 1 == 0), bits + outward, bits)
    return bits.view(torch.float64).float()


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    """Evaluate a polynomial by Horner's rule with fused steps; coefficients from low to high."""
    p = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        p = _fma(p, x, c)
    return p


def box_muller(w0: Tensor, w1: Tensor, *, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Two standard normals, float32, from two int64 tensors of 32-bit words (Box and Muller 1958).

    u = (2 (w0 >> 9) + 1) 2^-24,  v = (w1 >> 9) 2^-23,
    z0 = sqrt(-2 ln u) cos(2 pi v),  z1 = sqrt(-2 ln u) sin(2 pi v).
    """
    u = (2 * (w0 >> 9) + 1).float() * 2.0**-24  # exact: an odd number of 24 bits
    if not exact:
        # In turns less a half, where the product with 2 pi loses least; both signs flip.
        angle = ((w1 >> 9).float() * 2.0**-23 - 0.5) * (2 * math.pi)
        r = torch.sqrt(-2 * torch.log(u))
        return -r * torch.cos(angle), -r * torch.sin(angle)
    bits = u.view(torch.int32).long()
    # u = 2^e (1 + f) with f in [-1/3, 1/3); `exponent` is e * 2^23.
    exponent = (bits - _TWO_THIRDS_BITS) >> 23 << 23
    f = (bits - exponent).int().view(torch.float32) - 1.0
    square = _fma(_polynomial(_LOG, f), f, exponent.float() * _EXPONENT_SCALE)
    # A float64 root rounded to float32 is the correctly rounded float32 root (Figueroa 1995).
    r = square.double().sqrt().float()

    # 2 pi v = pi (h + x + 1/2) with h the top bit of w1 and x in [-1/2, 1/2) the 22 bits below it.
    x = (w1 >> 9 & 0x3FFFFF).float() * 2.0**-22 - 0.5
    xx = x * x
    r = torch.where(w1 >> 31 == 1, -r, r)
    return r * (_polynomial(_SIN, xx) * x), r * _polynomial(_COS, xx)


def _normals(
    key: Tensor, stream: int, first: int, count: int, rows: int, cols: int, exact: bool
) -> Tensor:
    per_row = -(-cols // _NORMAL_COLS)
    w = words(key, stream, first, count, 0, rows * per_row)
    z0, z1 = box_muller(w[..., 0::2], w[..., 1::2], exact=exact)
    return torch.stack([z0, z1], -1).reshape(count, rows, per_row * _NORMAL_COLS)[..., :cols]


def _signs(key: Tensor, stream: int, first: int, count: int, rows: int, cols: int) -> Tensor:
    down, across = -(-rows // _SIGN_ROWS), -(-cols // _SIGN_COLS)
    w = words(key, stream, first, count, 0, down * across)
    w = w.reshape(count, down, across, _SIGN_ROWS).transpose(2, 3)  # word = row % 4
    bits = (w[..., None] >> torch.arange(_SIGN_COLS, device=key.device)) & 1  # bit = column % 32
    signs = bits.reshape(count, down * _SIGN_ROWS, across * _SIGN_COLS)[:, :rows, :cols]
    return (2 * signs - 1).float()


def dense_materialise(
    key: Tensor,
    stream: int,
    first: int,
    count: int,
    rows: int,
    cols: int,
    rademacher: bool,
    dtype: torch.dtype,
    *,
    exact: bool = True,
) -> Tensor:
    """E_d without sigma for the directions ``first .. first + count - 1``: [count, rows, cols]."""
    if rademacher:
        noise = _signs(key, stream, first, count, rows, cols)
    else:
        noise = _normals(key, stream, first, count, rows, cols, exact)
    return noise.to(dtype).contiguous()
