"""Seeded tensor contents, the same bit for bit on CPU, CUDA and XPU.

An element is an integer hash of (seed, tensor name, index) turned into a value by integer arithmetic and exact scaling
by powers of two, so that a case found on one device replays on another.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from hypothesis import strategies as st

Style = Literal["ones", "small_integers", "signed", "sparse", "wide", "cancelling", "subnormal"]
"""What values a tensor holds, simplest first:

- ones: every element 1
- small_integers: -2 to 2, so that small sums are exact
- signed: uniform in (-1, 1), then rounded to the dtype
- sparse: as signed, half of them zero
- wide: signed values times 2^-12 to 2^3
- cancelling: signed values plus large ones, 8 to 16; in activations the second half of a row takes back what the first
  half has added, so that partial sums of products are large and whole sums are not
- subnormal: small multiples of the dtype's smallest subnormal
"""

STYLES: tuple[Style, ...] = get_args(Style)

_MASK = 0xFFFFFFFF


@functools.cache
def styles(*only: Style) -> st.SearchStrategy[Style]:
    """Draw a content style, out of `only` if given; the earliest in `STYLES` is the simplest."""
    return st.sampled_from(only or STYLES)


@functools.cache
def seeds() -> st.SearchStrategy[int]:
    """Draw a content seed, a 32-bit integer; 0 is the simplest."""
    return st.integers(0, _MASK)


def hash_bits(seed: int | Sequence[int], name: str, count: int, device: torch.device | str) -> torch.Tensor:
    """Return `count` hash values in [0, 2^32), one per index, int64 [count]; for S seeds [S, count], row by row what a
    seed alone gives.

    The finaliser of MurmurHash3 over an odd-multiplied index and a key from seed and name. 64-bit products wrap, which
    leaves their low 32 bits right on every device.
    """
    bits = torch.arange(1, count + 1, dtype=torch.int64, device=device).mul_(0x9E3779B1)
    if isinstance(seed, int):
        bits.add_(_key(seed, name))
    else:
        keys = torch.tensor([_key(one, name) for one in seed], dtype=torch.int64)
        bits = bits + keys.to(device, non_blocking=True)[:, None]
    bits.bitwise_and_(_MASK)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = bits.bitwise_xor_(bits >> shift).mul_(factor).bitwise_and_(_MASK)
    return bits.bitwise_xor_(bits >> 16)


def _key(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())


def values(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    style: Style,
    seed: int,
    name: str,
    device: torch.device | str,
    *,
    weights: bool = False,
) -> torch.Tensor:
    """Return a contiguous tensor of finite values of a floating-point `dtype` in the given style. None is -0.0.

    `weights` tells the tensor that activations are multiplied with; only the style cancelling makes the two differ.
    """
    count = math.prod(shape)
    if style == "ones":
        return torch.ones(shape, dtype=dtype, device=device)
    bits = hash_bits(seed, name, count, device)
    if style == "subnormal":
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        result = ((bits & 15) - 7).to(torch.float64).mul_(smallest)
    elif style == "small_integers":
        result = (bits % 5 - 2).to(torch.float64)
    else:
        # 24 bits: exact in float32, rounded once to the dtype. Odd, so that no value is zero before it is rounded.
        result = ((bits >> 8) - (1 << 23)).mul_(2).add_(1).to(torch.float64).mul_(2.0**-24)
        if style == "sparse":
            result = torch.where((bits & 1) == 0, 0.0, result)
        elif style == "wide":
            result.mul_(1 << (bits & 15)).mul_(2.0**-12)
            # Float16 would round these to zero, the negative ones to -0.0.
            result = torch.where(result.abs() < 2.0**-24, 0.0, result)
        elif style == "cancelling":
            result += _large(shape or (1,), seed, name, device, taken_back=not weights).flatten()
    return result.to(dtype).view(shape)


def _large(
    shape: tuple[int, ...], seed: int, name: str, device: torch.device | str, *, taken_back: bool
) -> torch.Tensor:
    """Return multiples of 1/8 in [8, 16), float64, the same in both halves of a row, but for the sign if `taken_back`.

    The middle column of an odd row is 0.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1]
    half = columns // 2
    bits = hash_bits(seed, f"{name}/large", rows * half, device).view(rows, half)
    large = ((bits >> 26) + 64).to(torch.float64).mul_(2.0**-3)
    middle = torch.zeros((rows, columns % 2), dtype=torch.float64, device=device)
    return torch.cat([large, middle, -large if taken_back else large], dim=1)


def routing_weights(
    shape: tuple[int, ...], style: Style, seed: int, name: str, device: torch.device | str
) -> torch.Tensor:
    """Return float32 router weights in (0, 1].

    They have 24 significant bits, so that a kernel which rounds them shows; in the styles ones and small_integers they
    are multiples of 1/4.
    """
    bits = hash_bits(seed, name, math.prod(shape), device)
    if style in ("ones", "small_integers"):
        return ((bits & 3) + 1).to(torch.float32).mul_(2.0**-2).view(shape)
    return ((bits >> 8) | 1).to(torch.float32).mul_(2.0**-24).view(shape)
