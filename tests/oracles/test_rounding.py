"""The bounds hold for every way in which a correct kernel may compute, and wrong ways break them."""

import pytest
import torch

from kernelfuzz.oracles import rounding
from kernelfuzz.oracles.rounding import Approximation
from kernelfuzz.strategies.contents import STYLES, Style, values

NARROW = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 24, 40


def operands(style: Style, dtype: torch.dtype, terms: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x [ROWS, terms] and y [COLUMNS, terms]."""
    x = values((ROWS, terms), dtype, style, seed, "x", "cpu")
    return x, values((COLUMNS, terms), dtype, style, seed, "y", "cpu", weights=True)


def products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the float32 products that a dot product adds up, [ROWS, COLUMNS, terms]."""
    return x.float()[:, None] * y.float()[None]


def truncated(number: torch.Tensor) -> torch.Tensor:
    """Round float64 to float32 towards zero, as matrix units may."""
    rounded = number.float()
    too_large = rounded.double().abs() > number.abs()
    return torch.where(too_large, torch.nextafter(rounded, torch.zeros_like(rounded)), rounded)


def one_by_one(terms: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[..., 0])
    for term in terms.unbind(-1):
        total = total + term
    return total


def one_by_one_truncating(terms: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(terms[..., 0])
    for term in terms.unbind(-1):
        total = truncated(total.double() + term.double())
    return total


def in_blocks(terms: torch.Tensor) -> torch.Tensor:
    return one_by_one(torch.stack([one_by_one(block) for block in terms.split(32, -1)], -1))


def interleaved(terms: torch.Tensor) -> torch.Tensor:
    return one_by_one(torch.stack([one_by_one(terms[..., i::4]) for i in range(min(4, terms.shape[-1]))], -1))


ACCUMULATIONS = (
    one_by_one,
    lambda terms: one_by_one(terms.flip(-1)),
    one_by_one_truncating,
    in_blocks,
    interleaved,
    lambda terms: terms.sum(-1),
)


def worst_ratio(actual: torch.Tensor, expected: Approximation) -> float:
    error = (actual.double() - expected.value).abs()
    assert bool((expected.error >= 0).all())
    return float(torch.where(error == 0, 0.0, error / expected.error).max())


def dot(x: torch.Tensor, y: torch.Tensor, **options: int) -> Approximation:
    return rounding.dot("mk,nk->mn", rounding.exact(x), rounding.exact(y), x.shape[1], **options)


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("terms", [1, 2, 65, 200])
def test_a_float32_accumulation_in_any_order_is_within_the_bound(style, dtype, terms):
    x, y = operands(style, dtype, terms)
    expected = dot(x, y)
    for accumulate in ACCUMULATIONS:
        assert worst_ratio(accumulate(products(x, y)), expected) <= 1


def test_a_truncating_accumulator_can_reach_the_bound():
    # After the first term each product is a little less than the last place of the sum, and is lost.
    x = torch.full((1, 200), 2.0**-12, dtype=torch.bfloat16)
    y = torch.full((1, 200), 2.0**-11 * (1 - 2.0**-8), dtype=torch.bfloat16)
    x[0, 0] = y[0, 0] = 1
    assert 0.95 < worst_ratio(one_by_one_truncating(products(x, y)), dot(x, y)) <= 1


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("style", STYLES)
def test_a_result_cast_once_is_within_the_bound(style, dtype):
    x, y = operands(style, dtype, 130)
    expected = rounding.cast(dot(x, y), dtype)
    for accumulate in ACCUMULATIONS:
        assert worst_ratio(accumulate(products(x, y)).to(dtype), expected) <= 1


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_the_bound_of_a_cast_is_reached(dtype):
    exact = values((20_000,), torch.float64, "signed", 0, "x", "cpu")
    exact = exact + values((20_000,), torch.float64, "signed", 1, "x", "cpu") * 2.0**-23
    expected = rounding.cast(rounding.exact(exact), dtype)
    assert 0.95 < worst_ratio(exact.to(dtype), expected) <= 1


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("style", ["signed", "wide", "cancelling"])
def test_the_bound_of_a_short_dot_product_and_a_cast_is_nearly_reached(style, dtype):
    x, y = operands(style, dtype, 16)
    expected = rounding.cast(dot(x, y), dtype)
    assert 0.8 < worst_ratio(one_by_one(products(x, y)).to(dtype), expected) <= 1


def test_near_zero_a_cast_may_lose_half_a_subnormal():
    smallest = 2.0**-24  # of float16
    numbers = torch.linspace(-4 * smallest, 4 * smallest, 1001, dtype=torch.float64)
    expected = rounding.cast(rounding.exact(numbers), torch.float16)
    assert rounding.half_subnormal(torch.float16) == smallest / 2
    assert 0.9 < worst_ratio(numbers.half(), expected) <= 1


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("style", ["signed", "wide", "cancelling"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_rounded_and_added_in_the_narrow_dtype_are_within_their_bound(style, dtype, parts):
    x, y = operands(style, dtype, 128)
    whole = dot(x, y)
    absolute = Approximation(torch.einsum("mk,nk->mn", x.double().abs(), y.double().abs()), whole.error)
    expected = rounding.cast(whole, dtype, parts=absolute, count=parts)
    pieces = [one_by_one(piece).to(dtype) for piece in products(x, y).split(128 // parts, -1)]
    ratios = []
    for order in (pieces, pieces[::-1]):
        total = torch.zeros_like(order[0])
        for piece in order:
            total = total + piece
        ratios.append(worst_ratio(total, expected))
    assert max(ratios) <= 1
    # A bound that forgets the parts raises a false alarm.
    assert parts < 8 or worst_ratio(total, rounding.cast(whole, dtype)) > 1


@pytest.mark.parametrize("dtype", NARROW)
def test_the_bound_of_parts_is_approached(dtype):
    # Equal signs and few terms: the sum of absolute values is the sum, and rounding is all the error there is.
    x = values((200, 4), dtype, "signed", 0, "x", "cpu").abs()
    y = values((200, 4), dtype, "signed", 0, "y", "cpu").abs()
    whole = dot(x, y)
    expected = rounding.cast(whole, dtype, parts=whole, count=2)
    halves = [one_by_one(piece).to(dtype) for piece in (x.float()[:, None] * y.float()[None]).split(2, -1)]
    assert 0.4 < worst_ratio(halves[0] + halves[1], expected) <= 1


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("style", [style for style in STYLES if style != "subnormal"])
def test_the_whole_chain_of_a_lora_layer_is_within_its_bound(style, dtype):
    """x A^T cast, times B^T, times a routing weight, cast, added to the old output, cast."""
    hidden, rank = 70, 18
    x = values((ROWS, hidden), dtype, style, 0, "x", "cpu")
    a = values((rank, hidden), dtype, style, 0, "a", "cpu", weights=True)
    b = values((COLUMNS, rank), dtype, style, 0, "b", "cpu", weights=True)
    weight = torch.tensor(0.7734375)
    old = values((ROWS, COLUMNS), dtype, "signed", 0, "old", "cpu")

    middle = rounding.cast(dot(x, a), dtype)
    delta = rounding.dot("mr,nr->mn", middle, rounding.exact(b), rank)
    delta = rounding.cast(rounding.multiply(delta, rounding.exact(weight)), dtype)
    expected = rounding.cast(rounding.add(rounding.exact(old), delta), dtype)
    safe = ~(middle.may_overflow(dtype).any(1, keepdim=True) | delta.may_overflow(dtype))

    def computed(accumulate, middle_dtype):
        y = accumulate(products(x, a)).to(middle_dtype)
        return old + (accumulate(products(y, b)) * weight).to(dtype)

    for accumulate in ACCUMULATIONS:
        for middle_dtype in (dtype, torch.float32):  # the intermediate may be rounded, and need not
            actual = computed(accumulate, middle_dtype)
            assert worst_ratio(torch.where(safe, actual.double(), expected.value), expected) <= 1
    if style in ("signed", "sparse"):
        assert worst_ratio(computed(one_by_one, dtype), expected) > 0.4


@pytest.mark.parametrize("style", ["signed", "wide", "cancelling"])
def test_accumulation_in_the_narrow_dtype_breaks_the_bound(style):
    for dtype in NARROW:
        x, y = operands(style, dtype, 128)
        expected = rounding.cast(dot(x, y), dtype)
        assert worst_ratio(one_by_one(products(x, y).to(dtype)), expected) > 1


def test_the_bound_rejects_a_lost_term_that_allclose_with_one_tolerance_accepts():
    x, y = operands("signed", torch.bfloat16, 129)
    x[:, -1], y[:, -1] = 2.0**-4, 2.0**-4
    right = one_by_one(products(x, y)).bfloat16()
    wrong = one_by_one(products(x[:, :-1], y[:, :-1])).bfloat16()
    assert torch.allclose(wrong, right, rtol=1e-2, atol=1e-2)
    expected = rounding.cast(dot(x, y), torch.bfloat16)
    assert worst_ratio(right, expected) <= 1
    assert worst_ratio(wrong, expected) > 1


def test_additional_operations_and_input_errors_widen_the_bound():
    x, y = operands("signed", torch.float16, 33)
    plain = dot(x, y)
    assert bool((dot(x, y, extra=8).error > plain.error).all())
    inexact = rounding.cast(rounding.exact(x), torch.float16)
    wider = rounding.dot("mk,nk->mn", inexact, rounding.exact(y), 33)
    assert bool((wider.error > plain.error).all())
    assert torch.equal(wider.value, plain.value)
    # Worst case by construction: every input off by its whole error, in the direction that adds up.
    shifted = x.double()[:, None] + inexact.error[:, None] * y.double().sign()[None]
    actual = (shifted * y.double()[None]).sum(-1)
    assert 0.9 < worst_ratio(actual, wider) <= 1


def test_multiply_is_one_float32_rounding():
    left = values((10_000,), torch.float32, "signed", 0, "l", "cpu")
    right = values((10_000,), torch.float32, "signed", 0, "r", "cpu")
    expected = rounding.multiply(rounding.exact(left), rounding.exact(right))
    assert 0.4 < worst_ratio(left * right, expected) <= 1
    assert worst_ratio(truncated(left.double() * right.double()), expected) <= 1


def test_may_overflow_is_where_a_cast_can_be_infinite():
    numbers = torch.tensor([1.0, 65000.0, 65504.0, 65519.0, 65520.0, -70000.0], dtype=torch.float64)
    certain = rounding.exact(numbers)
    assert certain.may_overflow(torch.float16).tolist() == [False, False, False, True, True, True]
    assert not bool(certain.may_overflow(torch.bfloat16).any())
    infinite = numbers.half().isinf()
    assert bool((certain.may_overflow(torch.float16) | ~infinite).all())
    # An uncertain number may already overflow below the limit.
    uncertain = Approximation(torch.tensor([65000.0], dtype=torch.float64), torch.tensor([1000.0]))
    assert uncertain.may_overflow(torch.float16).tolist() == [True]


@pytest.mark.parametrize(
    ("dtype", "roundoff", "half_subnormal"),
    [
        (torch.float16, 2.0**-11, 2.0**-25),
        (torch.bfloat16, 2.0**-8, 2.0**-134),
        (torch.float32, 2.0**-24, 2.0**-150),
    ],
)
def test_constants_of_the_formats(dtype, roundoff, half_subnormal):
    assert rounding.unit_roundoff(dtype) == roundoff
    assert rounding.half_subnormal(dtype) == half_subnormal


def test_gamma_bounds_the_product_of_that_many_factors():
    for count in (1, 10, 1000):
        assert (1 + 2.0**-11) ** count - 1 <= rounding.gamma(count, 2.0**-11)
        assert 1 - (1 - 2.0**-11) ** count <= rounding.gamma(count, 2.0**-11)


# Steps for oracles of users.


def within(actual: torch.Tensor, expected: Approximation) -> bool:
    return bool(((actual.double() - expected.value).abs() <= expected.error).all())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("way", ACCUMULATIONS)
def test_a_sum_over_a_dimension_holds_for_every_order(style: Style, way) -> None:
    x = values((ROWS, 300), torch.float32, style, 0, "x", "cpu")
    expected = rounding.accumulate(rounding.exact(x), 1)
    assert expected.value.shape == (ROWS, 1)
    assert within(way(x)[:, None], expected)
    if style in ("signed", "wide"):
        assert not within(way(x[:, 1:])[:, None], expected), "a term is missing"


@pytest.mark.parametrize("style", ["signed", "wide"])
def test_division_carries_the_errors_of_both_sides(style: Style) -> None:
    x, y = (values((1000,), torch.float32, style, 0, name, "cpu") for name in "xy")
    x, y = x[y != 0], y[y != 0]
    narrow = [rounding.cast(rounding.exact(each), torch.bfloat16) for each in (x, y)]
    expected = rounding.divide(*narrow)
    assert within(x.bfloat16().float() / y.bfloat16().float(), expected)
    assert not within(x / (y * 1.05), expected)


def test_division_by_what_may_be_zero_may_give_anything() -> None:
    zero = Approximation(torch.tensor([0.0, 0.5, 2.0]).double(), torch.tensor([0.0, 1.0, 1.0]).double())
    assert rounding.divide(rounding.exact(torch.ones(3)), zero).error.isinf().tolist() == [True, True, False]


@pytest.mark.parametrize("function", [torch.exp, torch.sqrt, torch.rsqrt, torch.sigmoid, torch.tanh])
def test_a_monotone_function_carries_its_arguments_error(function) -> None:
    x = values((1000,), torch.float32, "signed", 0, "x", "cpu").abs() + 0.1
    argument = rounding.cast(rounding.exact(x), torch.bfloat16)
    expected = rounding.monotone(function, argument)
    assert within(function(x.bfloat16().float()), expected)
    assert not within(function(x) * 1.05, expected)
    precise = rounding.monotone(function, rounding.exact(x))
    assert within(function(x), precise)
    assert not within(function(x) * (1 + 1e-5), precise)


def test_a_function_has_no_bound_where_it_has_no_value() -> None:
    argument = Approximation(torch.tensor([0.5, 2.0]).double(), torch.tensor([1.0, 1.0]).double())
    assert rounding.monotone(torch.rsqrt, argument).error.isinf().tolist() == [True, False]


def test_a_change_of_sign_is_exact() -> None:
    number = rounding.negative(rounding.exact(torch.tensor([1.0, -2.0], dtype=torch.float16)))
    assert number.value.tolist() == [-1.0, 2.0]
    assert number.error.tolist() == [0.0, 0.0]
    assert number.dtype == torch.float16
