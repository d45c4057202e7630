"""Cases for `fp8_layout`: host code that lays the fp8 weights of a mixture of experts out as a backend's kernels want
them.

E experts, hidden size H, intermediate size I: w13 [E, 2I, H] holds the gate's rows and then those of the projection up,
w2 [E, H, I] the projection down. An fp8 tensor is float8_e4m3fn, kept as a uint8 tensor of its bits.

Weights and scales are chosen so that quantisation is exact, whatever order its steps have and whether it divides by a
scale or multiplies by its reciprocal: what is compared is bits.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from hypothesis import strategies as st

from kernelfuzz.strategies import contents
from kernelfuzz.strategies.case import Case as BaseCase
from kernelfuzz.strategies.contents import hash_bits
from kernelfuzz.strategies.devices import PLATFORMS, USUAL, Placement, Platform
from kernelfuzz.strategies.dtypes import DTYPES, Dtype
from kernelfuzz.strategies.layouts import Allocate, plain_allocator
from kernelfuzz.strategies.sizes import sizes

Entry = Literal["convert", "checkpoint", "online", "online_block", "online_legacy"]
"""Where a call enters:

- convert: `convert_to_fp8_moe_kernel_format` itself, with quantised weights
- checkpoint: loading of quantised weights; with a scale per tensor there is one for each half of w13, and both halves
  are quantised again with the larger
- online: loading of 16-bit weights, which are quantised with a scale per expert
- online_block: likewise, with a scale per block
- online_legacy: as online, through the method that releases before online quantisation had modules of its own used
"""

Backend = Literal[
    "TRITON",
    "BATCHED_TRITON",
    "VLLM_CUTLASS",
    "BATCHED_VLLM_CUTLASS",
    "XPU",
    "HPC",
    "EMULATION",
    "TRITON_MXFP8",
    "FLASHINFER_CUTLASS",
    "NONE",
]
"""A backend by its name in vLLM's `Fp8MoeBackend`, which decides the layout. NONE must be refused."""

Scales = Literal["per_tensor", "per_channel", "per_channel_2d", "block"]
"""Shapes of the scales of w13 and w2:

- per_tensor: [E] and [E]
- per_channel: [E, 2I, 1] and [E, H, 1]; per_channel_2d: [E, 2I] and [E, H]
- block: [E, ceil(2I / 128), ceil(H / 128)] and [E, ceil(H / 128), ceil(I / 128)]
"""

Layout = Literal["kept", "transposed", "gate_up_swapped"]
"""What a backend wants:

- kept: everything as it is
- transposed: the last two dimensions of weights and of scales with three dimensions exchanged
- gate_up_swapped: the halves of w13 exchanged and, with scales per block, those of its scale. Scales per block are at
  least `MINIMUM_SCALE`; with scales per tensor I is padded with zeros to a multiple of `ALIGNMENT` first, each half of
  w13 by itself
"""

Style = Literal["ones", "random"]
"""What values the tensors hold, simplest first:

- ones: scales of 1 and fp8 values of 1; what is quantised is 448 at one place of each expert or block
- random: any finite fp8 values and any scales; what is quantised has the largest magnitude 448 * 2^p, with another p
  for each expert or block, and e4m3 values times 2^p elsewhere
"""

Option = TypeVar("Option")

ENTRIES: tuple[Entry, ...] = get_args(Entry)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
SCALES: tuple[Scales, ...] = get_args(Scales)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

BLOCK = 128
"""Rows and columns of a block with a scale of its own."""

ALIGNMENT = 16
"""The padded intermediate size of the layout gate_up_swapped is a multiple of it."""

MINIMUM_SCALE = 1e-10
"""The smallest scale of a block in the layout gate_up_swapped."""

SMALL: dict[str, Any] = {"max_size": 4}
"""Arguments with which `cases` draws small cases."""

MAX_SIZE_WITHOUT_BLOCKS = 200

_ONE = 0x38
_LARGEST = 0x7E
_SIGN = 0x80
_MAGNITUDES = 0x7F
_EXPONENTS = 23
_SMALLEST_EXPONENT = -15  # 2^-9, the smallest e4m3 value, times 2^-15 is float16's smallest; 448 * 2^7 is finite in it

_ENTRY_SCALES: dict[Entry, tuple[Scales, ...]] = {
    "convert": SCALES,
    "checkpoint": ("per_tensor", "block"),
    "online": ("per_tensor",),
    "online_block": ("block",),
    "online_legacy": ("per_tensor",),
}
_BACKEND_SCALES: dict[Backend, tuple[Scales, ...]] = {"FLASHINFER_CUTLASS": ("per_tensor", "block")}
_COMMON_SCALES: tuple[Scales, ...] = ("per_tensor", "block")
_CONVERT_ONLY: tuple[Backend, ...] = ("EMULATION", "TRITON_MXFP8", "FLASHINFER_CUTLASS", "NONE")


@dataclass(frozen=True)
class Case(BaseCase):
    """One call that lays weights out; `calls` of them in a row on the same layer."""

    target: ClassVar[str] = "fp8_layout"

    entry: Entry
    platform: Platform  # what the host code is told it runs on, which must not matter
    backend: Backend
    num_experts: int
    hidden: int
    intermediate: int
    scales: Scales
    dtype: Dtype  # of the 16-bit weights: online entries only
    contents: Style
    input_scales: bool  # convert only: scales of activations are passed too
    calls: int  # online entries only: a second call must change nothing

    @property
    def size(self) -> int:
        """Number of experts."""
        return self.num_experts

    @property
    def layout(self) -> Layout:
        """What the backend wants; the platform has no say."""
        if self.backend == "XPU":
            return "transposed"
        return "gate_up_swapped" if self.backend == "FLASHINFER_CUTLASS" else "kept"

    @property
    def padded_intermediate(self) -> int:
        """The intermediate size of the result."""
        if self.layout == "gate_up_swapped" and self.scales == "per_tensor":
            return -(-self.intermediate // ALIGNMENT) * ALIGNMENT
        return self.intermediate

    @property
    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of w13 and w2 as they are loaded."""
        return _weight_shapes(self.num_experts, self.hidden, self.intermediate)

    @property
    def scale_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of w13_scale and w2_scale before the backend's layout: of scales that are given or made by
        quantisation. Only entry checkpoint is given another one, [E, 2] for w13 with scales per tensor."""
        return {f"{name}_scale": self._scale_shape(shape) for name, shape in self.weight_shapes.items()}

    @property
    def result_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of w13, w2, w13_scale and w2_scale that must come out."""
        weights = _weight_shapes(self.num_experts, self.hidden, self.padded_intermediate)
        shapes = weights | self.scale_shapes
        if self.layout != "transposed":
            return shapes
        return {name: _transposed(shape) if len(shape) == 3 else shape for name, shape in shapes.items()}

    def _scale_shape(self, weights: tuple[int, ...]) -> tuple[int, ...]:
        experts, rows, columns = weights
        if self.scales == "per_tensor":
            return (experts,)
        if self.scales == "block":
            return (experts, -(-rows // BLOCK), -(-columns // BLOCK))
        return (experts, rows, 1) if self.scales == "per_channel" else (experts, rows)


def _weight_shapes(experts: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {"w13": (experts, 2 * intermediate, hidden), "w2": (experts, hidden, intermediate)}


def _transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    entry: tuple[Entry, ...] = ENTRIES,
    platform: tuple[Platform, ...] = PLATFORMS,
    backend: tuple[Backend, ...] = BACKENDS,
    scales: tuple[Scales, ...] = SCALES,
    max_experts: int = 4,
    max_size: int = 300,
    placement: st.SearchStrategy[Placement] = USUAL,
) -> Case:
    """Draw a case. The simplest has one expert of sizes 1; every argument narrows a dimension.

    As much is drawn for every case, whatever it uses of it, so that none is simpler for being drawn from less.

    `max_size` bounds hidden and intermediate size, but where blocks must begin with the halves of w13 the intermediate
    size is a multiple of 128 and the hidden size may be as large. The backend NONE is one in twenty or so.
    """
    possible = {each: entries for each in backend if (entries := _possible(each, entry, scales))}
    legal = tuple(each for each in possible if each != "NONE")
    refused = tuple(each for each in possible if each == "NONE")
    chosen_backend = draw(st.sampled_from(legal * -(-19 // max(len(legal), 1)) + refused))
    entries = possible[chosen_backend]
    chosen_scales = draw(_chosen((*entries, *(kind for kind in _COMMON_SCALES * 5 if kind in entries))))
    chosen_entry = draw(_chosen(entries[chosen_scales]))
    online, dtype, calls = chosen_entry.startswith("online"), draw(st.sampled_from(DTYPES)), draw(st.integers(1, 2))
    input_scales = draw(st.booleans())
    whole_blocks = chosen_scales == "block" and (chosen_entry == "checkpoint" or chosen_backend == "FLASHINFER_CUTLASS")
    hidden, intermediate = draw(_shapes(max_size, block=chosen_scales == "block", whole_blocks=whole_blocks))
    return Case(
        seed=draw(contents.seeds()),
        entry=chosen_entry,
        platform=draw(st.sampled_from((*platform, *(each for each in platform if each == "xpu")))),
        backend=chosen_backend,
        num_experts=draw(st.integers(1, max_experts)),
        hidden=hidden,
        intermediate=intermediate,
        scales=chosen_scales,
        dtype=dtype if online else DTYPES[0],
        contents=draw(st.sampled_from(get_args(Style))),
        input_scales=input_scales and chosen_entry == "convert",
        calls=calls if online else 1,
        placement=draw(placement),
    )


def _possible(
    backend: Backend, entries: tuple[Entry, ...], scales: tuple[Scales, ...]
) -> dict[Scales, tuple[Entry, ...]]:
    """Return the kinds of scales that a backend takes, each with the entries that it has there, the online ones
    twice."""
    found: dict[Scales, tuple[Entry, ...]] = {}
    for kind in scales:
        legal = [each for each in entries if kind in _ENTRY_SCALES[each]]
        if backend in _CONVERT_ONLY:
            legal = [each for each in legal if each == "convert"]
        if legal and kind in _BACKEND_SCALES.get(backend, SCALES):
            found[kind] = (*legal, *(each for each in legal if each.startswith("online")))
    return found


def _chosen(options: tuple[Option, ...]) -> st.SearchStrategy[Option]:
    """Draw an option. Each is there twice, since a draw from one takes nothing, and less than any other."""
    return st.sampled_from(options * 2)


@st.composite
def _shapes(draw: st.DrawFn, maximum: int, *, block: bool, whole_blocks: bool) -> tuple[int, int]:
    """Draw (hidden, intermediate); often with w2 or w13 square, so that a transposition keeps its shape."""
    maximum = maximum if block else min(maximum, MAX_SIZE_WITHOUT_BLOCKS)
    square = draw(st.sampled_from((None, None, None, "w2", "w13")))
    widest = max(1, maximum // 2) if square == "w13" else maximum
    if whole_blocks:
        widest = max(BLOCK, widest // BLOCK * BLOCK)
    intermediate = draw(sizes(1, widest, around=(BLOCK // 2, BLOCK)))
    hidden = draw(sizes(1, maximum, around=(BLOCK // 2, BLOCK)))
    if whole_blocks:
        intermediate = -(-intermediate // BLOCK) * BLOCK
    return {None: hidden, "w2": intermediate, "w13": 2 * intermediate}[square], intermediate


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, all contiguous.

    - w13: [E, 2I, H], w2: [E, H, I]; uint8 bits of float8_e4m3fn, in the online entries float16 or bfloat16
    - w13_scale, w2_scale: float32 of the case's `scale_shapes`; w13_scale [E, 2] in entry checkpoint with scales per
      tensor, powers of two; None in the online entries
    - w13_input_scale, w2_input_scale: float32 [E], or None
    """

    case: Case
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    w13_input_scale: torch.Tensor | None
    w2_input_scale: torch.Tensor | None


def make_inputs(case: Case, device: torch.device | str, allocate: Allocate | None = None) -> Inputs:
    """Make the tensors of a case on `device`, with `allocate` or in plain memory."""
    allocate = allocate or plain_allocator(device)

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.uint8:
            # Allocated as what the bits are: NaN is poison, bytes have none.
            return allocate(name, tuple(tensor.shape), torch.float8_e4m3fn).view(torch.uint8).copy_(tensor)
        return allocate(name, tuple(tensor.shape), tensor.dtype).copy_(tensor)

    tensors: dict[str, torch.Tensor] = {}
    for name in ("w13", "w2"):
        if case.entry.startswith("online"):
            tensors[name] = _quantisable(case, name, device)
        elif name == "w13" and case.entry == "checkpoint" and case.scales == "per_tensor":
            tensors[name], tensors["w13_scale"] = _requantisable(case, device)
        else:
            tensors[name] = _finite_bits(case, name, device)
            tensors[f"{name}_scale"] = _scales(case, f"{name}_scale", case.scale_shapes[f"{name}_scale"], device)
        if case.input_scales:
            tensors[f"{name}_input_scale"] = _scales(case, f"{name}_input_scale", (case.num_experts,), device)
    placed = {name: place(name, tensor) for name, tensor in tensors.items()}
    return Inputs(
        case,
        placed["w13"],
        placed["w2"],
        placed.get("w13_scale"),
        placed.get("w2_scale"),
        placed.get("w13_input_scale"),
        placed.get("w2_input_scale"),
    )


def fp8_values(bits: torch.Tensor) -> torch.Tensor:
    """Return the values of uint8 bits of float8_e4m3fn, float32."""
    return bits.view(torch.float8_e4m3fn).to(torch.float32)


def per_element(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return scales [E], or of blocks, so that they broadcast over weights [E, rows, columns]."""
    if scale.ndim == 1:
        return scale[:, None, None]
    return scale.repeat_interleave(BLOCK, 1)[:, :rows].repeat_interleave(BLOCK, 2)[:, :, :columns]


def _finite_bits(case: Case, name: str, device: torch.device | str) -> torch.Tensor:
    """Return any finite values, -0.0 among them: they are only moved."""
    shape = case.weight_shapes[name]
    if case.contents == "ones":
        return torch.full(shape, _ONE, dtype=torch.uint8, device=device)
    bits = hash_bits(case.seed, name, math.prod(shape), device)
    return (((bits >> 1) % _MAGNITUDES) + (bits & 1) * _SIGN).to(torch.uint8).view(shape)


def _scales(case: Case, name: str, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """Return positive scales, in the style random from 2^-66 to 1 with 24 significant bits."""
    if case.contents == "ones":
        return torch.ones(shape, dtype=torch.float32, device=device)
    exponents = (hash_bits(case.seed, f"{name}/exponent", math.prod(shape), device) & 3) * -14
    scales = contents.routing_weights(shape, "signed", case.seed, name, device)
    return scales * _power_of_two(exponents).view(shape)


def _quantisable(case: Case, name: str, device: torch.device | str) -> torch.Tensor:
    """Return 16-bit weights for entries online: e4m3 values, 448 in each expert or block, times its power of two.

    None is -0.0.
    """
    _, rows, columns = case.weight_shapes[name]
    scale_shape = case.scale_shapes[f"{name}_scale"]
    grid = scale_shape[1:] or (1, 1)
    blocks = torch.arange(math.prod(scale_shape), device=device)
    top, left = (blocks // grid[1] % grid[0]) * BLOCK, (blocks % grid[1]) * BLOCK
    height, width = (BLOCK, BLOCK) if case.scales == "block" else (rows, columns)
    places = hash_bits(case.seed, f"{name}/largest", blocks.numel(), device)
    row = top + (places & 0xFFFF) % (rows - top).clamp_max(height)
    column = left + (places >> 16) % (columns - left).clamp_max(width)
    signs_and_exponents = hash_bits(case.seed, f"{name}/exponent", blocks.numel(), device)
    exponents = (signs_and_exponents >> 1) % _EXPONENTS + _SMALLEST_EXPONENT
    largest = _LARGEST + (signs_and_exponents & 1) * _SIGN
    if case.contents == "ones":
        exponents, largest = torch.zeros_like(exponents), torch.full_like(largest, _LARGEST)

    bits = _finite_bits(case, name, device)
    bits = torch.where(bits == _SIGN, 0, bits)
    expert = blocks // (grid[0] * grid[1])
    bits.view(-1)[(expert * rows + row) * columns + column] = largest.to(torch.uint8)
    scale = per_element(_power_of_two(exponents).view(scale_shape), rows, columns)
    return (fp8_values(bits) * scale).to(getattr(torch, case.dtype))


def _requantisable(case: Case, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return w13 and its two scales per expert, [E, 2], powers of two.

    The values of the half with the smaller scale are zero or stay normal e4m3 values when they are divided by the ratio
    of the scales. None is -0.0.
    """
    shape = case.weight_shapes["w13"]
    if case.contents == "ones":
        bits = torch.full(shape, _ONE, dtype=torch.uint8, device=device)
        return bits, torch.ones((case.num_experts, 2), dtype=torch.float32, device=device)
    hashed = hash_bits(case.seed, "w13_scale", case.num_experts, device)[:, None]
    smaller = torch.arange(2, device=device) == (hashed & 1)
    differences = torch.where(smaller, (hashed >> 1) % 7, 0)
    scales = _power_of_two(-((hashed >> 8) % 10) - differences)

    hashed = hash_bits(case.seed, "w13", math.prod(shape), device).view(shape)
    lowest = torch.where(differences == 0, 1, (differences + 1) * 8).repeat_interleave(case.intermediate, 1)[:, :, None]
    magnitudes = lowest + (hashed >> 8) % (_MAGNITUDES - lowest)
    bits = torch.where((hashed >> 1) % 16 == 0, 0, magnitudes + (hashed & 1) * _SIGN)
    return bits.to(torch.uint8), scales


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return 2^exponents, float32, made of bits: torch.exp2 need not be exact."""
    return ((exponents + 127) << 23).to(torch.int32).view(torch.float32)


REGIMES = (
    *(f"entry_{entry}" for entry in ENTRIES),
    *(f"platform_{platform}" for platform in PLATFORMS),
    *(f"backend_{backend.lower()}" for backend in BACKENDS),
    *(f"layout_{layout}" for layout in LAYOUTS),
    *(f"scales_{scales}" for scales in SCALES),
    "square",
    "not_square",
    "tails",
    "padded_intermediate",
    "input_scales",
    "applied_twice",
    "refused",
)
"""Every regime that `regimes` names."""


def regimes(case: Case) -> set[str]:
    """Return the names of the regimes that a case is in."""
    square = case.hidden in (case.intermediate, 2 * case.intermediate)
    lengths = (case.hidden, case.intermediate, 2 * case.intermediate)
    found = {
        f"entry_{case.entry}": True,
        f"platform_{case.platform}": True,
        f"backend_{case.backend.lower()}": True,
        f"layout_{case.layout}": case.backend != "NONE",
        f"scales_{case.scales}": True,
        "square" if square else "not_square": True,
        "tails": case.scales == "block" and any(length % BLOCK for length in lengths),
        "padded_intermediate": case.padded_intermediate != case.intermediate,
        "input_scales": case.input_scales,
        "applied_twice": case.calls > 1,
        "refused": case.backend == "NONE",
    }
    return {name for name, holds in found.items() if holds}
