"""Seeded contents: the same for ever, and of the style that was asked for."""

import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.strategies.contents import STYLES, hash_bits, routing_weights, seeds, styles, values

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple)

# A saved case must replay for ever, so these may only change together with the schema number of a case file.
# CRC-32 of values((3, 17), dtype, style, 7, "x", "cpu"), by style, for each of DTYPES.
PINNED = {
    "ones": (0xF4A8C19A, 0x7ACC224E, 0xFE7D1C53),
    "small_integers": (0xA5611551, 0xBC710B1D, 0xBD211FAA),
    "signed": (0x75CA6BD3, 0x30AE0202, 0x163B6FE3),
    "sparse": (0x350C0425, 0x4430749F, 0xC6A6F344),
    "wide": (0x9AC11648, 0xA43345A8, 0xFD0AF61F),
    "cancelling": (0x0C4BFFBF, 0xC69FAE9C, 0x20241756),
    "subnormal": (0x511DFC95, 0x511DFC95, 0x6BBF7124),
}


def bits_of(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32).flatten().tolist()


def crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def test_minimal(minimal):
    assert minimal(styles()) == "ones"
    assert minimal(seeds()) == 0
    assert minimal(seeds(), lambda seed: seed > 1000) == 1001


@given(styles("wide", "sparse"), seeds())
def test_narrowed(style, seed):
    assert style in ("wide", "sparse")
    assert 0 <= seed < 2**32


def test_every_style_is_drawn(drawn):
    assert set(drawn(styles(), 100)) == set(STYLES)


def test_the_hash_is_pinned():
    assert hash_bits(0, "x", 4, "cpu").tolist() == [511537296, 3730030517, 3567747736, 1783193950]
    assert hash_bits(2**32 - 1, "w/0", 3, "cpu").tolist() == [454431006, 2100073371, 2126599915]


@given(st.lists(seeds(), max_size=5), st.integers(0, 9))
def test_several_seeds_hash_as_each_does_alone(several, count):
    rows = hash_bits(several, "x", count, "cpu")
    assert rows.shape == (len(several), count)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [hash_bits(seed, "x", count, "cpu").tolist() for seed in several]


@pytest.mark.parametrize("style", STYLES)
def test_values_are_pinned(style):
    assert tuple(crc32(values((3, 17), dtype, style, 7, "x", "cpu")) for dtype in DTYPES) == PINNED[style]


def test_weights_and_routing_weights_are_pinned():
    assert crc32(values((3, 17), torch.float16, "cancelling", 7, "w", "cpu", weights=True)) == 0xC032DAC3
    assert crc32(routing_weights((17,), "signed", 7, "weights", "cpu")) == 0x79D059A2
    assert routing_weights((4,), "ones", 7, "weights", "cpu").tolist() == [0.25, 0.25, 0.75, 0.25]


def test_some_values_are_as_the_docstring_computes_them():
    signed = (hash_bits(7, "x", 4, "cpu").double() // 256 - 2**23) / 2**23 + 2.0**-24
    assert values((4,), torch.float32, "signed", 7, "x", "cpu").tolist() == signed.tolist()
    small = hash_bits(7, "x", 4, "cpu") % 5 - 2
    assert values((4,), torch.bfloat16, "small_integers", 7, "x", "cpu").tolist() == small.tolist()


@given(SHAPES, st.sampled_from(DTYPES), styles(), seeds(), st.booleans())
def test_the_same_arguments_give_the_same_bits(shape, dtype, style, seed, weights):
    first = values(shape, dtype, style, seed, "x", "cpu", weights=weights)
    assert first.shape == shape
    assert first.dtype == dtype
    assert first.is_contiguous()
    assert bits_of(first) == bits_of(values(shape, dtype, style, seed, "x", "cpu", weights=weights))


@pytest.mark.parametrize("style", [style for style in STYLES if style != "ones"])
def test_seed_and_name_matter(style):
    tensor = values((64,), torch.float32, style, 1, "x", "cpu")
    assert bits_of(tensor) != bits_of(values((64,), torch.float32, style, 2, "x", "cpu"))
    assert bits_of(tensor) != bits_of(values((64,), torch.float32, style, 1, "y", "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", STYLES)
def test_values_are_finite_and_no_zero_is_negative(style, dtype):
    tensor = values((400, 1001), dtype, style, 3, "x", "cpu")
    assert bool(tensor.isfinite().all())
    assert not bool(((tensor == 0) & tensor.signbit()).any())


@pytest.mark.parametrize("dtype", DTYPES)
class TestStyles:
    def make(self, style, dtype, **role):
        return values((64, 257), dtype, style, 11, "x", "cpu", **role).double()

    def test_ones(self, dtype):
        assert set(self.make("ones", dtype).flatten().tolist()) == {1.0}

    def test_small_integers(self, dtype):
        assert set(self.make("small_integers", dtype).flatten().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}

    def test_signed(self, dtype):
        tensor = self.make("signed", dtype)
        assert tensor.abs().max() <= 1
        assert not bool((tensor == 0).any())
        assert abs(tensor.mean()) < 0.02
        assert abs(tensor.var() - 1 / 3) < 0.02

    def test_sparse(self, dtype):
        tensor = self.make("sparse", dtype)
        signed = self.make("signed", dtype)
        assert abs((tensor == 0).double().mean() - 0.5) < 0.02
        assert bool(((tensor == signed) | (tensor == 0)).all())

    def test_wide(self, dtype):
        tensor = self.make("wide", dtype)
        binades = tensor[tensor != 0].abs().log2().floor()
        assert tensor.abs().max() <= 8
        assert {-12.0, -8.0, -4.0, 0.0, 2.0} <= set(binades.tolist())
        assert 0.4 < (tensor > 0).double().mean() < 0.6

    def test_cancelling(self, dtype):
        activations, weights = self.make("cancelling", dtype), self.make("cancelling", dtype, weights=True)
        half = activations.shape[1] // 2
        assert activations[:, half].abs().max() <= 1  # the middle of an odd row
        assert activations[:, :half].min() >= 6.9
        assert activations[:, :half].max() > 15
        assert (activations[:, :half] + activations[:, -half:]).abs().max() <= 2.2
        assert (weights[:, :half] - weights[:, -half:]).abs().max() <= 2.2

    def test_cancelling_products_cancel(self, dtype):
        x = values((20, 257), dtype, "cancelling", 5, "x", "cpu").double()
        w = values((30, 257), dtype, "cancelling", 5, "w", "cpu", weights=True).double()
        assert ((x @ w.T).abs() < 0.1 * (x.abs() @ w.abs().T)).double().mean() > 0.9

    def test_subnormal(self, dtype):
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        multiples = self.make("subnormal", dtype) / smallest
        assert set(multiples.flatten().tolist()) == set(range(-7, 9))


def test_routing_weights_are_in_their_range():
    coarse = routing_weights((100, 50), "ones", 3, "weights", "cpu")
    assert coarse.dtype == torch.float32
    assert set(coarse.flatten().tolist()) == {0.25, 0.5, 0.75, 1.0}
    fine = routing_weights((100, 50), "signed", 3, "weights", "cpu")
    assert 0 < fine.min() < 0.01
    assert 0.99 < fine.max() <= 1
    assert bool((fine != fine.bfloat16()).float().mean() > 0.99)  # a kernel that rounds them shows
