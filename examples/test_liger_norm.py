"""Kernels of another project, liger-kernel, fuzzed with oracles of our own. See README.md on how to run this."""

# ruff: noqa: ANN001, ANN201, D103 - read as a test file

import torch
import triton
import triton.language as tl
from hypothesis import strategies as st
from liger_kernel.ops import rms_norm
from liger_kernel.ops.rms_norm import rms_norm_forward
from liger_kernel.ops.rope import rope_forward
from torch.nn.functional import pad

from kernelfuzz.fuzz import Expected, OutputSpec, kernel_test, tensors
from kernelfuzz.oracles.rounding import accumulate, add, cast, divide, exact, monotone, multiply
from kernelfuzz.strategies.layouts import layouts

DTYPES = st.sampled_from(("float32", "float16", "bfloat16"))


# What rms_norm needs to run in Triton's interpreter; on a GPU it is left as it is.


class InterpretedNumber(float):
    """A float with `to`, which kernels call: the interpreter passes a plain float as it is."""

    def to(self, dtype):
        return tl.full((), float(self), dtype)


number = float
if triton.knobs.runtime.interpret:
    number = InterpretedNumber
    # The libdevice function has no body there. tl.math.rsqrt is looked up late, since each launch replaces it.
    rms_norm.rsqrt = lambda mean: tl.math.rsqrt(mean)


# y = x / sqrt(mean(x²) + eps) (offset + w). In float32, but for one rounding in the middle where Llama has it.


@st.composite
def rows(draw):
    x = draw(tensors((draw(st.integers(0, 4)), draw(st.integers(1, 300))), draw(DTYPES), layout=layouts(max_step=1)))
    casting = {"eps": draw(st.sampled_from((1e-6, 1e-5))), "mode": draw(st.sampled_from(("llama", "gemma")))}
    return {"x": x, "w": draw(tensors(x.shape[1:], x.dtype)), "offset": draw(st.sampled_from((0.0, 1.0))), **casting}


def normed(inputs):
    x, dtype = exact(inputs.x), inputs.x.dtype
    eps, offset, columns = torch.tensor((inputs.eps, inputs.offset, inputs.x.shape[1]), device=inputs.x.device)
    mean = divide(accumulate(multiply(x, x), 1), exact(columns))
    rstd = monotone(torch.rsqrt, cast(add(mean, exact(eps)), torch.float32))
    scaled = multiply(x, rstd) if inputs.mode == "gemma" else cast(multiply(x, rstd), dtype)
    weight = cast(add(exact(offset), exact(inputs.w)), torch.float32)
    return {"y": cast(multiply(scaled, weight), dtype), "rstd": Expected(rstd, dtype=torch.float32)}


@kernel_test(cases=rows(), oracle=normed)
def test_rms_norm(inputs, outputs):
    y, _, rstd, *_ = rms_norm_forward(inputs.x, inputs.w, number(inputs.eps), number(inputs.offset), inputs.mode, True)
    outputs.y.copy_(y)
    outputs.rstd.copy_(rstd[:, None])


# Turns the pairs (x[i], x[half + i]) of each head by an angle, in place and in the dtype of the angles; what is beyond
# the angles' width stays as it is.


@st.composite
def heads(draw):
    batch, length, half = (draw(st.integers(1, most)) for most in (3, 4, 40))
    size, dtype = 2 * half + draw(st.sampled_from((0, 1, 16))), draw(DTYPES)
    angles = draw(st.sampled_from((1, batch))), length, 2 * half
    shapes = {name: (batch, length, draw(st.integers(1, 5)), size) for name in "qk"} | {"cos": angles, "sin": angles}
    return {name: draw(tensors(shape, dtype)) for name, shape in shapes.items()}


def turned(inputs, x):
    half, rest = inputs.cos.shape[2] // 2, x.shape[3] - inputs.cos.shape[2]
    cos, sin = (pad(each[:, :, None, :half].repeat(1, 1, 1, 2), (0, rest)) for each in (inputs.cos, inputs.sin))
    across = pad(torch.cat([-x[..., half : 2 * half], x[..., :half]], 3), (0, rest))
    terms = [cast(multiply(exact(a), exact(b)), x.dtype) for a, b in ((x, cos), (across, sin))]
    written = pad(torch.ones_like(x[..., : 2 * half], dtype=torch.bool), (0, rest))
    return Expected(cast(add(*terms), x.dtype), written=written)


def in_place(inputs):
    return {name: OutputSpec(x.shape, x.dtype, initial=x) for name, x in (("q", inputs.q), ("k", inputs.k))}


@kernel_test(cases=heads(), oracle=lambda i, before: {n: turned(i, x) for n, x in before.items()}, outputs=in_place)
def test_rope(inputs, outputs):
    rope_forward(outputs.q.transpose(1, 2), outputs.k.transpose(1, 2), inputs.cos, inputs.sin)
