"""vLLM's own parametrised cases of two kernels against what the strategies draw; docs/vllm_cases.md is the table.

The numbers are those of tests/lora/test_moe_lora_align_sum.py at vLLM's commit 081b8e3 and of
tests/lora/test_fused_moe_lora_kernel.py at 042eb52. A combination is shown to be drawable as a whole, with
every size at the maximum that an argument of `cases` sets; its batch, and what has no such argument, alone.
"""

import dataclasses
import inspect
import itertools
from typing import Any, NamedTuple

import hypothesis
import pytest
from hypothesis import strategies as st

from kernelfuzz.strategies import fused_moe_lora, moe_lora_align, sizes
from kernelfuzz.strategies.batches import BASE, Batch, Segment, batches
from kernelfuzz.strategies.case import from_json, to_json
from kernelfuzz.strategies.layouts import CONTIGUOUS
from kernelfuzz.strategies.routing import Routing

MAXIMA = {
    "num_adapters": "max_adapters",
    "num_experts": "max_experts",
    "top_k": "max_top_k",
    "slices": "max_slices",
    "rank": "max_rank",
    "hidden": "max_hidden",
    "columns": "max_columns",
}
"""The argument of `cases` that is a field's largest value."""

ALIGN = {
    "num_tokens": (100, 200, 1024, 4096),
    "top_k": (6,),
    "num_experts": (64, 128, 256, 512),
    "num_adapters": (2, 32),
}


class Fused(NamedTuple):
    """One of vLLM's tests of fused_moe_lora: the values that it combines, and how many sequences it makes at most."""

    sequences: int
    path: tuple[str, ...]
    num_tokens: tuple[int, ...]
    top_k: tuple[int, ...]
    num_experts: tuple[int, ...]
    num_adapters: tuple[int, ...]
    output_columns: tuple[int, ...]
    hidden: tuple[int, ...]
    rank: tuple[int, ...]
    slices: tuple[int, ...] = (1, 2)
    block_size: tuple[int, ...] = (16,)
    dtype: tuple[str, ...] = ("float16", "bfloat16")
    add_inputs: tuple[bool, ...] = (True,)
    aligned: bool = True
    fully_sharded: bool = False


FUSED = {
    "kernel": Fused(10, ("one_shot",), (100,), (6, 12), (64,), (4, 6, 16), (1408,), (2048,), (16, 32, 64)),
    "large_rank_fallback": Fused(
        4, ("one_shot", "two_kernel"), (8,), (2,), (4,), (2,), (256,), (256,), (128, 256), add_inputs=(True, False)
    ),
    "naive_block_assignment": Fused(
        4,
        ("small_batch",),
        (1, 2, 4, 8),
        (1, 2),
        (64, 128),
        (4, 8),
        (1408,),
        (2048,),
        (16, 32),
        aligned=False,
    ),
    # Two ranks: half of LoRA A's rows and half of the columns on each.
    "fully_sharded_column_parallel": Fused(
        10, ("two_kernel",), (100,), (6,), (64,), (4,), (704,), (2048,), (8, 16, 32), (1,), fully_sharded=True
    ),
    "small_rank": Fused(
        8, ("one_shot",), (16, 100), (2,), (8, 64), (4,), (1408,), (2048,), (4, 8), block_size=(16, 64)
    ),
    "npid_path": Fused(
        4,
        ("one_shot",),
        (16, 64),
        (2,),
        (8,),
        (4,),
        (2048,),
        (4096,),
        (8, 16, 32, 64),
        (2,),
        (64,),
        ("bfloat16",),
    ),
}
FUSED_COUNTS = {
    "kernel": 72,
    "large_rank_fallback": 16,
    "naive_block_assignment": 256,
    "fully_sharded_column_parallel": 6,
    "small_rank": 64,
    "npid_path": 8,
}


def combinations(values: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def align_cases():
    return [
        moe_lora_align.Case(
            seed=1,
            # vLLM draws an adapter for each token; here two have the tokens, each half of them in a row.
            batch=split(each["num_tokens"], 2, each["num_adapters"]),
            num_adapters=each["num_adapters"],
            disabled=(),
            descending_ids=False,
            num_experts=each["num_experts"],
            top_k=each["top_k"],
            routing=Routing("distinct"),
            expert_map="none",
            block_size=16,
            rounded_capacity=True,
            ids_dtype="int32",
        )
        for each in combinations(ALIGN)
    ]


def fused_cases(test: Fused):
    varied = {name: value for name, value in test._asdict().items() if isinstance(value, tuple) and name != "path"}
    return [
        fused_moe_lora.Case(
            seed=42,
            batch=split(each["num_tokens"], min(test.sequences, each["num_tokens"]), each["num_adapters"]),
            num_adapters=each["num_adapters"],
            disabled=(),
            num_experts=each["num_experts"],
            top_k=each["top_k"],
            routing=Routing("distinct"),
            hidden=each["hidden"],
            rank=each["rank"],
            columns=each["output_columns"] // each["slices"],
            slices=each["slices"],
            dtype=each["dtype"],
            contents="signed",  # vLLM's are uniform in [0, 1)
            aligned=test.aligned,
            block_size=each["block_size"],
            fully_sharded=test.fully_sharded,
            mul_routed_weight=False,
            add_inputs=each["add_inputs"],
            descending_ids=False,
            visit_all=True,
            column_offset=0,
            compute_units=132,
            shrink=fused_moe_lora.Tiles(32, 64, 1, 1),
            expand=fused_moe_lora.Tiles(64, 64, 1, 1),  # vLLM's tests have block_n = 32
            input_layout=CONTIGUOUS,
            output_gap=0,
        )
        for each in combinations(varied)
    ]


def split(tokens: int, sequences: int, adapters: int) -> Batch:
    """Return so many segments of equal length, the first ones a token longer, of one adapter after another."""
    lengths = [tokens // sequences + (number < tokens % sequences) for number in range(sequences)]
    return Batch(tuple(Segment(number % adapters, length) for number, length in enumerate(lengths)))


ALL_ALIGN = align_cases()
ALL_FUSED = {name: fused_cases(test) for name, test in FUSED.items()}
EVERY_FUSED = [case for some in ALL_FUSED.values() for case in some]


def find(strategy, condition, examples=5000):
    """Return a case that the strategy draws, as it is drawn; raises NoSuchExample if none comes."""
    phases = [hypothesis.Phase.generate, hypothesis.Phase.target]
    checks = list(hypothesis.HealthCheck)
    settings = hypothesis.settings(max_examples=examples, phases=phases, suppress_health_check=checks)
    return hypothesis.find(strategy, condition, settings=settings)


def approach(strategy, distance, examples=1500):
    """As `find`, for a case at distance 0, led there by the distance."""

    def arrived(case):
        left = distance(case)
        hypothesis.target(-float(left))
        return left == 0

    return find(strategy, arrived, examples)


def test_every_combination_is_a_case():
    assert len(ALL_ALIGN) == 32
    assert {name: len(cases) for name, cases in ALL_FUSED.items()} == FUSED_COUNTS
    for case in (*ALL_ALIGN, *EVERY_FUSED):
        assert from_json(type(case), to_json(case)) == case
    for name, test in FUSED.items():
        assert {case.path for case in ALL_FUSED[name]} == set(test.path)


CHOSEN = (
    *("dtype", "block_size", "aligned", "fully_sharded", "mul_routed_weight", "add_inputs", "descending_ids"),
    *("visit_all", "column_offset", "compute_units", "input_layout", "output_gap", "routing", "disabled", "contents"),
)


@pytest.mark.parametrize(
    ("field", "value"), sorted({(f, getattr(c, f)) for c in EVERY_FUSED for f in CHOSEN}, key=repr)
)
def test_fused_draws_each_choice_by_default(field, value):
    assert getattr(find(fused_moe_lora.cases(), lambda case: getattr(case, field) == value), field) == value


@pytest.mark.parametrize(("field", "value"), [("descending_ids", False), ("rounded_capacity", True)])
def test_align_draws_each_choice_by_default(field, value):
    assert {getattr(case, field) for case in ALL_ALIGN} == {value}
    assert getattr(find(moe_lora_align.cases(), lambda case: getattr(case, field) == value), field) == value


@pytest.mark.parametrize("tiles", ["shrink", "expand"])
def test_fused_draws_the_tiles_by_default(tiles):
    (wanted,) = {getattr(case, tiles) for case in EVERY_FUSED}
    assert getattr(find(fused_moe_lora.cases(), lambda case: getattr(case, tiles) == wanted), tiles) == wanted


def lengths(batch):
    return [segment.length for segment in batch.segments]


@pytest.mark.parametrize(
    "wanted",
    sorted({tuple(lengths(case.batch)) for case in (*ALL_ALIGN, *EVERY_FUSED)}),
    ids=lambda each: f"{len(each)}x{each[0]}",
)
def test_a_batch_of_vllms_sequences_is_drawn(wanted):
    def distance(batch):
        missing = len(wanted) - len(batch.segments)
        return 1000 * missing + sum(abs(a - b) for a, b in zip(lengths(batch), wanted))

    narrowed = batches(16, max_segments=len(wanted), max_length=max(wanted), empty=False, base=False)
    assert lengths(approach(narrowed, distance)) == list(wanted)


class LargestSizes:
    """Stands in for hypothesis.strategies in a module of strategies: of what counts from 1 the largest is drawn."""

    def integers(self, low, high):
        return st.just(high) if low == 1 else st.integers(low, high)

    def __getattr__(self, name):
        return getattr(st, name)


class WholeRange(LargestSizes):
    """The stand-in for the module sizes, which first chooses between ranges: the whole one comes first."""

    def sampled_from(self, ranges):
        return st.just(ranges[0])


@pytest.fixture
def drawn_as(monkeypatch):
    """The function that draws a case in which every size is its maximum, and that has the batch of the given one."""

    def draw(target, case, **narrowed):
        maxima = {MAXIMA[field]: getattr(case, field) for field in MAXIMA if hasattr(case, field)}
        monkeypatch.setattr(target, "batches", lambda *_, **__: st.just(case.batch))

        def same(drawn):
            return drawn.routing == case.routing and drawn.disabled == case.disabled

        return find(target.cases(**maxima, **narrowed, block_size=(case.block_size,), invalid_ids=("none",)), same)

    for module in (moe_lora_align, fused_moe_lora):
        monkeypatch.setattr(module, "st", LargestSizes())
    monkeypatch.setattr(sizes, "st", WholeRange())
    return draw


def same_but(drawn, case, *free):
    """Whether two cases are equal but for the seed and some fields that are free."""
    return dataclasses.replace(drawn, **{name: getattr(case, name) for name in ("seed", *free)}) == case


def test_align_draws_every_combination(drawn_as):
    for case in ALL_ALIGN:
        drawn = drawn_as(moe_lora_align, case, expert_maps=("none",), ids_dtype=("int32",), refusals=False)
        assert same_but(drawn, case, "descending_ids", "rounded_capacity")


@pytest.mark.parametrize("name", FUSED)
def test_fused_draws_every_combination(name, drawn_as):
    narrowing = ("dtype", "aligned", "fully_sharded", "mul_routed_weight", "add_inputs", "compute_units")
    for case in ALL_FUSED[name]:
        narrowed = {field: (getattr(case, field),) for field in narrowing}
        drawn = drawn_as(fused_moe_lora, case, **narrowed, style=("signed",), input_layout=st.just(CONTIGUOUS))
        assert same_but(drawn, case, "descending_ids", "visit_all", "column_offset", "output_gap", "shrink", "expand")


def active(case):
    return set(case.batch.active())


def in_range(case):
    return {adapter for adapter in active(case) if 0 <= adapter < case.num_adapters}


def disabled_beside_enabled(case):
    return bool(in_range(case) & set(case.disabled)) and bool(in_range(case) - set(case.disabled))


ALIGN_ONLY_OURS = {
    "base tokens": lambda case: BASE in active(case) and in_range(case),
    "disabled adapter": disabled_beside_enabled,
    "adapter out of range": lambda case: max(active(case), default=0) >= case.num_adapters,
    "no tokens": lambda case: case.batch.num_tokens == 0,
    "one token": lambda case: case.batch.num_tokens == 1,
    "expert -1": lambda case: case.routing.invalid == "minus_one",
    "expert beyond": lambda case: case.routing.invalid == "beyond",
    "expert chosen twice": lambda case: case.routing.style == "first_expert" and case.top_k > 1,
    "expert map": lambda case: case.expert_map != "none",
    "map with holes": lambda case: case.expert_map in ("holes", "reversed_holes"),
    "64-bit expert ids": lambda case: case.ids_dtype == "int64",
    "block size not a power of two": lambda case: case.block_size == 7,
    "other top_k": lambda case: case.top_k != 6,
    "number of experts no multiple of a warp": lambda case: case.num_experts % 32 != 0,
    "fewer pairs than experts": lambda case: 0 < case.pairs < case.num_experts,
    "many pairs, few experts": lambda case: case.pairs >= 1024 and case.num_experts < 64,
    "capacity not of whole blocks": lambda case: case.capacity % case.block_size != 0 if case.block_size > 0 else False,
    "descending lora ids": lambda case: case.descending_ids,
    "to be refused": lambda case: "refused" in moe_lora_align.regimes(case),
}

FUSED_ONLY_OURS = {
    "base tokens beside adapters": lambda case: BASE in active(case) and in_range(case),
    "disabled beside enabled adapter": disabled_beside_enabled,
    "adapter out of range": lambda case: max(active(case), default=0) >= case.num_adapters,
    "no tokens": lambda case: case.batch.num_tokens == 0,
    "expert -1": lambda case: case.routing.invalid == "minus_one",
    "expert chosen twice": lambda case: case.routing.style == "first_expert" and case.top_k > 1,
    "cancelling contents": lambda case: case.contents == "cancelling",
    "subnormal contents": lambda case: case.contents == "subnormal",
    "contents of many magnitudes": lambda case: case.contents == "wide",
    "routed weights": lambda case: case.mul_routed_weight,
    "split K": lambda case: case.path == "two_kernel" and case.shrink.split_k > 1,
    "groups of blocks": lambda case: case.path == "two_kernel" and case.shrink.group_m > 1,
    "hidden tail": lambda case: case.hidden % 64 != 0,
    "columns tail": lambda case: case.columns % 16 != 0,
    "rank not a power of two": lambda case: case.rank & (case.rank - 1) != 0,
    "transposed input": lambda case: case.input_layout.step > 1,
    "gap between output rows": lambda case: case.output_gap > 0,
    "sharded, several slices": lambda case: case.fully_sharded and case.slices > 1,
    "sharded, unaligned": lambda case: case.fully_sharded and not case.aligned,
    "sharded, odd offset": lambda case: case.column_offset % 2 == 1,
    "overwriting, to be refused": lambda case: case.fully_sharded and not case.add_inputs,
    "overwriting on the one-shot path, unaligned": (
        lambda case: case.path == "one_shot" and not case.add_inputs and not case.aligned
    ),
    "block size 32": lambda case: case.block_size == 32,
    "active adapters visited alone": lambda case: not case.visit_all,
    "descending lora ids": lambda case: case.descending_ids,
}


@pytest.mark.parametrize("name", ALIGN_ONLY_OURS)
def test_align_draws_what_vllms_tests_never_vary(name):
    holds = ALIGN_ONLY_OURS[name]
    assert not any(holds(case) for case in ALL_ALIGN)
    assert holds(find(moe_lora_align.cases(), holds))


@pytest.mark.parametrize("name", FUSED_ONLY_OURS)
def test_fused_draws_what_vllms_tests_never_vary(name):
    holds = FUSED_ONLY_OURS[name]
    assert not any(holds(case) for case in EVERY_FUSED)
    assert holds(find(fused_moe_lora.cases(), holds))


def default(target, argument):
    return inspect.signature(target.cases).parameters[argument].default


@pytest.mark.parametrize(
    ("target", "every", "beyond"),
    [
        (moe_lora_align, ALL_ALIGN, {"num_adapters", "num_experts"}),
        (
            fused_moe_lora,
            EVERY_FUSED,
            {"num_adapters", "num_experts", "top_k", "rank", "hidden", "columns"},
        ),
    ],
    ids=["align", "fused"],
)
def test_the_sizes_that_need_arguments(target, every, beyond):
    largest = {field: max(getattr(case, field) for case in every) for field in MAXIMA if hasattr(every[0], field)}
    assert {field for field, value in largest.items() if value > default(target, MAXIMA[field])} == beyond
    most_tokens = default(target, "max_segments") * default(target, "max_length")
    assert max(case.batch.num_tokens for case in every) > most_tokens


SAME_SIDE = {
    "align, few pairs and experts": (
        moe_lora_align,
        lambda case: case.pairs < moe_lora_align.SMALL_BATCH_PAIRS and case.num_experts == 64,
    ),
    "align, few pairs and many experts": (
        moe_lora_align,
        lambda case: case.pairs < moe_lora_align.SMALL_BATCH_PAIRS and case.num_experts > 64,
    ),
    "align, many pairs and 64 experts": (
        moe_lora_align,
        lambda case: case.pairs >= moe_lora_align.SMALL_BATCH_PAIRS and case.num_experts == 64,
    ),
    "align, many pairs and experts": (
        moe_lora_align,
        lambda case: case.pairs >= moe_lora_align.SMALL_BATCH_PAIRS and case.num_experts > 64,
    ),
    "fused, hidden of whole tiles of every size": (fused_moe_lora, lambda case: case.hidden == 256),
    "fused, columns of whole tiles of every size": (fused_moe_lora, lambda case: case.columns == 256),
    "fused, columns beyond a tile of 128, with a tail": (
        fused_moe_lora,
        lambda case: case.columns > 128 and case.columns % 128 != 0,
    ),
    "fused, rank beyond the one-shot path": (fused_moe_lora, lambda case: case.rank > 128 and not case.fully_sharded),
}


@pytest.mark.parametrize("name", SAME_SIDE)
def test_smaller_cases_lie_on_the_same_side_by_default(name):
    target, holds = SAME_SIDE[name]
    assert holds(find(target.cases(), holds))


EARLY_EXITS = {
    "all base, unaligned": lambda case: active(case) == {BASE} and not case.aligned,
    "all base, aligned": lambda case: active(case) == {BASE} and case.aligned,
    "all of the batch disabled, unaligned": (
        lambda case: active(case) == set(case.disabled) and active(case) and not case.aligned
    ),
}


@pytest.mark.parametrize("name", EARLY_EXITS)
def test_fused_draws_vllms_early_exits_by_default(name):
    assert EARLY_EXITS[name](find(fused_moe_lora.cases(), EARLY_EXITS[name]))
