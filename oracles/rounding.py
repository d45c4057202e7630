"""Elementwise error bounds for kernels that accumulate in float32 and cast where their contract allows it.

The model is the standard one of Higham, *Accuracy and Stability of Numerical Algorithms* (2nd ed.), sections 2.2 and
3.1: every operation in a format with unit roundoff u returns x (1 + d) + t with |d| <= u and |t| <= half the smallest
subnormal, and n such factors multiply to 1 + theta with |theta| <= gamma_n = n u / (1 - n u), equation (3.4). A dot
product of n terms in any order, blocked or split, is then wrong by at most gamma_n |x|.|y|, equation (3.5).

Float32 accumulation takes u = 2^-23 instead of 2^-24, since the matrix units of GPUs truncate (Fasi, Higham, Mikaitis,
Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021), and its underflow term is
the smallest normal number, since they may flush subnormals to zero.

An `Approximation` carries a float64 reference value and a bound on how far a correct kernel may be from it; each
function applies one step of the kernel to both. The reference's own rounding, 2^-53, is far below every bound and is
left out.

Steps that a device does not round to nearest take `ulps`, units in the last place, as vendors document them: 2 for
Triton's float32 division, square root and its reciprocal, 2 for exp (CUDA C++ Programming Guide, appendix
"Mathematical Functions", full range, default compilation).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ACCUMULATOR_ROUNDOFF = 2.0**-23
ACCUMULATOR_UNDERFLOW = 2.0**-126


def gamma(count: int, roundoff: float) -> float:
    """Return n u / (1 - n u), the bound on n accumulated relative errors u; there is none where n u >= 1."""
    return count * roundoff / (1.0 - count * roundoff) if count * roundoff < 1.0 else float("inf")


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return u of rounding to nearest into `dtype`: 2^-11 for float16, 2^-8 for bfloat16, 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


def half_subnormal(dtype: torch.dtype) -> float:
    """Return half the smallest subnormal of `dtype`: the rounding error near zero."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Approximation:
    """A float64 reference `value` and a float64 bound `error` on a correct kernel's distance from it, elementwise.

    `dtype` is what it was last rounded into; None for an intermediate result.
    """

    value: torch.Tensor
    error: torch.Tensor
    dtype: torch.dtype | None = None

    def magnitude(self) -> torch.Tensor:
        """Return the largest absolute value that a correct kernel may hold."""
        return self.value.abs() + self.error

    def may_overflow(self, dtype: torch.dtype) -> torch.Tensor:
        """Return where a correct kernel may exceed the finite range of `dtype`."""
        return self.magnitude() > torch.finfo(dtype).max


def exact(tensor: torch.Tensor) -> Approximation:
    """Take a tensor's values as they are: the oracle starts from inputs that are already quantised."""
    value = tensor.to(torch.float64, copy=True)
    return Approximation(value, torch.zeros_like(value), tensor.dtype)


def dot(equation: str, left: Approximation, right: Approximation, terms: int, *, extra: int = 0) -> Approximation:
    """Contract `left` with `right` (torch.einsum's `equation`) as float32 accumulation over `terms` products does.

    error <= gamma_n (|x| + dx)(|y| + dy) + |x| dy + dx |y| + dx dy, with n = terms + 1 + extra: one rounding for a
    product that is not exact in float32, and `extra` further float32 operations on each partial sum, as split-K adds
    them.
    """
    absolute = torch.einsum(equation, left.magnitude(), right.magnitude())
    propagated = absolute - torch.einsum(equation, left.value.abs(), right.value.abs())
    count = terms + 1 + extra
    error = gamma(count, ACCUMULATOR_ROUNDOFF) * absolute + propagated.clamp_min(0) + count * ACCUMULATOR_UNDERFLOW
    return Approximation(torch.einsum(equation, left.value, right.value), error)


def multiply(left: Approximation, right: Approximation) -> Approximation:
    """Multiply elementwise in float32 (tensors broadcast)."""
    absolute = left.magnitude() * right.magnitude()
    propagated = absolute - left.value.abs() * right.value.abs()
    error = ACCUMULATOR_ROUNDOFF * absolute + propagated.clamp_min(0) + ACCUMULATOR_UNDERFLOW
    return Approximation(left.value * right.value, error)


def accumulate(number: Approximation, dim: int) -> Approximation:
    """Sum over a dimension, which is kept with size 1, as float32 accumulation in any order does.

    error <= gamma_n (|x| + dx) + dx, each summed: n - 1 roundings of partial sums, and one for a term that is not exact
    in float32.
    """
    count = number.value.shape[dim]
    absolute = number.magnitude().sum(dim, keepdim=True)
    error = gamma(count, ACCUMULATOR_ROUNDOFF) * absolute + count * ACCUMULATOR_UNDERFLOW
    return Approximation(number.value.sum(dim, keepdim=True), error + number.error.sum(dim, keepdim=True))


def divide(left: Approximation, right: Approximation, *, ulps: float = 2.0) -> Approximation:
    """Divide elementwise in float32 (tensors broadcast). Where the divisor may be zero the error is infinite."""
    smallest = (right.value.abs() - right.error).clamp_min(0)
    value = left.value / right.value
    # |x/y - x'/y'| <= (dx + |x/y| dy) / |y'|
    propagated = (left.error + value.abs() * right.error) / smallest
    error = propagated + ulps * ACCUMULATOR_ROUNDOFF * (value.abs() + propagated) + ACCUMULATOR_UNDERFLOW
    return Approximation(value, torch.where(smallest > 0, error, torch.inf))


def monotone(
    function: Callable[[torch.Tensor], torch.Tensor], number: Approximation, *, ulps: float = 2.0
) -> Approximation:
    """Apply a monotone `function` of float64 tensors elementwise in float32, like torch.exp, torch.sqrt or torch.rsqrt.

    What is wrong with the argument is carried on by the function's values at both ends of its interval, which is why a
    function that is not monotone there gets too small a bound. The error is infinite where it has no value at an end.
    """
    value = function(number.value)
    ends = [(function(number.value + sign * number.error) - value).abs() for sign in (1, -1)]
    propagated = torch.maximum(*ends).nan_to_num(nan=torch.inf, posinf=torch.inf)
    error = propagated + ulps * ACCUMULATOR_ROUNDOFF * (value.abs() + propagated) + ACCUMULATOR_UNDERFLOW
    return Approximation(value, error)


def negative(number: Approximation) -> Approximation:
    """Change the sign, exactly."""
    return Approximation(-number.value, number.error, number.dtype)


def add(left: Approximation, right: Approximation) -> Approximation:
    """Add elementwise without rounding; the cast of the sum is a step of its own."""
    return Approximation(left.value + right.value, left.error + right.error)


def cast(
    number: Approximation, dtype: torch.dtype, *, parts: Approximation | None = None, count: int = 1
) -> Approximation:
    """Round to nearest into `dtype`.

    With `count` > 1 the number arrives as that many parts which are rounded and added in `dtype` one by one (split-K
    with atomics); each of the `count` casts and `count` - 1 additions is relative to sums of absolute values, which
    `parts` holds.
    """
    roundoff, underflow = unit_roundoff(dtype), half_subnormal(dtype)
    if count == 1 or parts is None:
        return Approximation(number.value, number.error + roundoff * number.magnitude() + underflow, dtype)
    error = number.error + gamma(2 * count - 1, roundoff) * parts.magnitude() + (2 * count - 1) * underflow
    return Approximation(number.value, error, dtype)
