"""Seeds of episodes, and uniform numbers from them: integer hashes, the same on every device.

torch has no unsigned 64-bit arithmetic on all devices, so this is splitmix64 on int64, which wraps
the same way. Sebastiano Vigna's generator of that name (2015), after Steele, Lea, Flood, "Fast
Splittable Pseudorandom Number Generators" (2014). The global random state is not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 64-bit constants of splitmix64 as the int64 of the same bits.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; ``>>`` alone copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(value: Tensor) -> Tensor:
    """Hash int64 words, any shape; the bits are those of the unsigned function.

    Example:
        >>> import torch
        >>> from perturbed.rl.seeds import splitmix64
        >>> splitmix64(torch.tensor([0])).item() % 2**64 == 0xE220A8397B1DCDAF
        True
    """
    value = value + _GOLDEN
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)


def signed(value: int) -> int:
    """Return the int64 that has the bits of a seed, which may be given as an unsigned number."""
    return (value + 2**63) % 2**64 - 2**63


def hash_words(*words: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Hash a sequence of words into seeds from 0 to 2^63 - 1; tensors are broadcast.

    Args:
        *words: integers of 64 bits, or int64 tensors.
        device: of the result; default: the CPU.

    Example:
        >>> import torch
        >>> from perturbed.rl.seeds import hash_words
        >>> hash_words(7, torch.arange(3)).shape
        torch.Size([3])
    """
    state = torch.zeros((), dtype=torch.int64, device=device)
    for word in words:
        state = add_word(state, word)
    return as_seed(state)


def add_word(state: Tensor, word: int | Tensor) -> Tensor:
    """Take one more word into the state of a hash, int64."""
    return splitmix64(state ^ (signed(word) if isinstance(word, int) else word))


def as_seed(state: Tensor) -> Tensor:
    """Return the state of a hash as seeds from 0 to 2^63 - 1, which every generator takes."""
    return state & (2**63 - 1)


def uniforms(seeds: Tensor, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Return ``count`` numbers in [low, high) for every seed, float64: (n,) -> (n, count).

    Number i of a seed depends on the two alone, not on ``count`` or on other seeds. 53 bits each.

    Example:
        >>> import torch
        >>> from perturbed.rl.seeds import uniforms
        >>> numbers = uniforms(torch.tensor([1, 2]), 3)
        >>> torch.equal(numbers[1:], uniforms(torch.tensor([2]), 3))
        True
    """
    index = torch.arange(count, device=seeds.device, dtype=torch.int64)
    words = splitmix64(seeds[:, None] + index * _GOLDEN)  # the generator that starts at the seed
    return low + (high - low) * (_shift(words, 11).to(torch.float64) * 2.0**-53)
