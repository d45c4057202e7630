"""Writemaps: what became of each element, at its exact place; and the picture of it."""

import dataclasses
import itertools
import json
import math
import struct
import sys

import numpy
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from kernelfuzz.fuzz import picture
from kernelfuzz.fuzz.buffers import Buffers, buffers, watch
from kernelfuzz.fuzz.comparison import compare
from kernelfuzz.fuzz.executor import Request
from kernelfuzz.fuzz.generation import draw
from kernelfuzz.fuzz.isolated import IsolatedExecutor
from kernelfuzz.fuzz.launch import Conditions, judge_alone
from kernelfuzz.fuzz.targets import TARGETS, get_target
from kernelfuzz.fuzz.verdict import Verdict
from kernelfuzz.fuzz.writemap import MOST_COLUMNS, MOST_ROWS, Cell, OutputMap, input_map, output_map
from kernelfuzz.kernels.base import Kernel
from kernelfuzz.oracles.expectation import Axes, Clause, ExpectedOutput, OutputSpec
from kernelfuzz.strategies.batches import Batch, Segment
from kernelfuzz.strategies.bgmv import Case as BgmvCase
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout
from kernelfuzz.strategies.moe_lora_align import Case as AlignCase
from kernelfuzz.strategies.routing import Routing

LETTERS = dict(zip(Cell, ".fkirU123OM#"))
"""A map as text: outside, free, kept, input, right, Unwritten, 1 2 3 wrong, Overwritten, Mutated, # redzone."""

BGMV = BgmvCase(
    seed=5,
    layer="operator",
    op="expand_slice",
    batch=Batch((Segment(0, 2), Segment(-1, 1), Segment(2, 1))),
    num_adapters=3,
    width=16,
    rows=4,
    columns=6,
    slice_offset=1,
    slice_size=4,
    dtype="float16",
    float32_input=False,
    float32_output=True,
    contents="signed",
    scale=1.0,
    accumulate=False,
    weights_4d=False,
)
"""Tokens 0, 1 and 3 have columns 1 to 4 written; token 2 is the base model's."""

ALIGN = AlignCase(
    seed=5,
    batch=Batch((Segment(0, 3), Segment(-1, 1))),
    num_adapters=2,
    disabled=(),
    descending_ids=False,
    num_experts=2,
    top_k=1,
    routing=Routing("distinct"),
    expert_map="none",
    block_size=4,
    rounded_capacity=True,
    ids_dtype="int32",
)
"""Adapter 0 has three tokens, adapter 1 none."""


def right(inputs, outputs):
    """Write what the oracle expects."""
    before = {name: output.clone() for name, output in outputs.items()}
    expectation = get_target(inputs.case.target).expect(inputs, before)
    if expectation.error is not None:
        raise RuntimeError(expectation.error.text)
    for name, output in outputs.items():
        written = expectation.outputs[name].mask("write")
        output[written] = expectation.outputs[name].values[written].to(output.dtype)


def around(tensor, index):
    """Return the element of memory at `index` from the tensor's first."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + index)


def verdict_of(kernel, case, *, maps=True):
    conditions = Conditions(torch.device("cpu"))
    return judge_alone(get_target(case.target), Kernel(kernel, "1"), case, conditions, maps=maps)


def maps_of(kernel, case):
    return {each.name: each for each in verdict_of(kernel, case).maps}


def text(found):
    """Return a map's rows as text."""
    letters = "".join(LETTERS[cell] for cell in found.cells)
    return [letters[start : start + found.width] for start in range(0, len(letters), found.width)]


def counted(found):
    """Return the counts that a map which is not reduced must have."""
    return {cell.name: found.cells.count(cell) for cell in Cell if cell and found.cells.count(cell)}


# Of a launch.


def test_right_outputs_are_right_and_kept():
    found = maps_of(right, BGMV)
    assert list(found) == ["output"]
    assert text(found["output"]) == ["krrrrk", "krrrrk", "kkkkkk", "krrrrk"]
    assert found["output"].counts == {"KEPT": 12, "RIGHT": 12}
    assert found["output"].axes == Axes("token", "column")


def test_no_maps_unless_asked_for():
    assert verdict_of(right, BGMV, maps=False).maps == ()


def last_column_unwritten(inputs, outputs):
    before = outputs["output"].clone()
    right(inputs, outputs)
    outputs["output"][:, 4] = before[:, 4]


def base_row_zeroed(inputs, outputs):
    right(inputs, outputs)
    outputs["output"][2] = 0


def one_element_wrong(inputs, outputs):
    right(inputs, outputs)
    outputs["output"][3, 2] = torch.nan


def element_before(inputs, outputs):
    right(inputs, outputs)
    around(outputs["output"], -2).zero_()


def element_after(inputs, outputs):
    right(inputs, outputs)
    around(outputs["output"], 24).zero_()


def half_way(inputs, outputs):
    outputs["output"][2, 0] = 0
    raise ValueError("no more")


@pytest.mark.parametrize(
    ("kernel", "kind", "rows"),
    [
        (one_element_wrong, "wrong_value", ["krrrrk", "krrrrk", "kkkkkk", "kr3rrk"]),
        (last_column_unwritten, "unwritten", ["krrrUk", "krrrUk", "kkkkkk", "krrrUk"]),
        (base_row_zeroed, "overwritten", ["krrrrk", "krrrrk", "OOOOOO", "krrrrk"]),
        (element_before, "out_of_bounds", ["....#.", "krrrrk", "krrrrk", "kkkkkk", "krrrrk"]),
        (element_after, "out_of_bounds", ["krrrrk", "krrrrk", "kkkkkk", "krrrrk", "#....."]),
        (half_way, "raised", ["kUUUUk", "kUUUUk", "Okkkkk", "kUUUUk"]),
    ],
)
def test_each_kind_shows_where_it_is(kernel, kind, rows):
    verdict = verdict_of(kernel, BGMV)
    (found,) = verdict.maps
    assert [failure.kind for failure in verdict.failures] == [kind]
    assert text(found) == rows
    assert found.above == (1 if kernel is element_before else 0)
    assert (found.rows, found.columns) == (4, 6)
    assert found.counts == counted(found)


def test_inputs_that_were_written_to_have_a_map():
    def kernel(inputs, outputs):
        right(inputs, outputs)
        inputs.x[1, 3] = 5

    verdict = verdict_of(kernel, BGMV)
    output, given = verdict.maps
    assert [failure.kind for failure in verdict.failures] == ["input_mutated"]
    assert (output.is_input, given.is_input) == (False, True)
    assert given.name == "inputs"
    assert text(given) == ["i" * 16, "iiiM" + "i" * 12, "i" * 16, "i" * 16]


def test_memory_around_an_input_is_shown():
    def kernel(inputs, outputs):
        right(inputs, outputs)
        around(inputs.x, -1).zero_()
        around(inputs.x, 64).zero_()

    _, given = verdict_of(kernel, BGMV).maps
    assert text(given) == ["." * 15 + "#", *["i" * 16] * 4, "#" + "." * 15]


@pytest.mark.parametrize("changes", [{"rows": 3}, {"batch": Batch(())}])
def test_nothing_is_shown_of_what_has_no_expectation_or_no_elements(changes):
    for found in verdict_of(right, dataclasses.replace(BGMV, **changes)).maps:
        assert found.height == 0


def test_flat_outputs_are_drawn_as_rows_of_blocks():
    def kernel(inputs, outputs):
        right(inputs, outputs)
        outputs["sorted_token_ids"][ALIGN.capacity] = 0
        outputs["expert_ids"][0] = 1 - outputs["expert_ids"][0]

    found = maps_of(kernel, ALIGN)
    tokens, experts, totals = found["sorted_token_ids"], found["expert_ids"], found["num_tokens_post_pad"]
    assert text(tokens) == ["r" * ALIGN.capacity, "O" + "k" * (ALIGN.capacity - 1)]
    assert (tokens.axes.rows, tokens.axes.block) == ("adapter row", 4)
    assert text(experts) == ["3" + "r" * (ALIGN.max_blocks - 1), "k" * ALIGN.max_blocks]
    assert text(totals) == ["r", "k"]


def test_order_inside_a_group_is_not_shown_as_wrong():
    def kernel(inputs, outputs):
        right(inputs, outputs)
        block = outputs["sorted_token_ids"][:4]
        block.copy_(block.flip(0))

    assert set(text(maps_of(kernel, ALIGN)["sorted_token_ids"])[0]) == {"r"}


def test_unwritten_element_of_a_group_makes_no_other_wrong():
    def kernel(inputs, outputs):
        before = outputs["sorted_token_ids"].clone()
        right(inputs, outputs)
        outputs["sorted_token_ids"][1] = before[1]

    assert text(maps_of(kernel, ALIGN)["sorted_token_ids"])[0] == "rU" + "r" * (ALIGN.capacity - 2)


@pytest.mark.parametrize("name", TARGETS)
def test_outputs_of_every_target_are_mapped_whole(name):
    target = TARGETS[name]
    written = 0
    for case in draw(target.cases(**target.small), 1, 15):
        specs = target.outputs(target.make_inputs(case, "cpu"))
        for found in verdict_of(right, case).maps:
            assert set(found.counts) <= {"FREE", "KEPT", "RIGHT"}
            assert sum(found.counts.values()) == math.prod(specs[found.name].shape)
            assert found.axes != Axes("row", "column")
            written += found.counts.get("RIGHT", 0)
    assert written


# In the worker.


def test_maps_come_out_of_a_worker(engine_job, shrink_case, monkeypatch, worker_environment):
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
    case = shrink_case(rank=9)
    executor = IsolatedExecutor(engine_job("wrong_above_rank_8"))
    try:
        executor.loaded()
        plain = executor.run(Request.alone(case))
        mapped = executor.run(Request(case, (case.seed,), maps=True))
    finally:
        executor.close()
    assert plain.maps == ()
    assert mapped.failures == plain.failures
    (found,) = mapped.maps
    assert set(found.counts) & {"WRONG", "WRONG_BY_10", "WRONG_BY_1000"}


def test_no_maps_of_what_ended_the_worker(engine_job, shrink_case, monkeypatch, worker_environment):
    monkeypatch.setenv("PYTHONPATH", worker_environment["PYTHONPATH"])
    case = shrink_case(rank=1)
    executor = IsolatedExecutor(engine_job("kills_itself"))
    try:
        executor.loaded()
        verdict = executor.run(Request(case, (case.seed,), maps=True))
    finally:
        executor.close()
    assert [failure.kind for failure in verdict.failures] == ["crash"]
    assert verdict.maps == ()


def test_verdict_with_maps_survives_json():
    verdict = verdict_of(base_row_zeroed, BGMV)
    assert verdict.maps
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


# Of single tensors.


def launched(shape, layout=CONTIGUOUS, bound=None):
    """Return buffers with an output of zeros that must be written, before it is."""
    made = Buffers("cpu", 1)
    spec = OutputSpec(shape, torch.float32, layout)
    output = made.output("output", spec)
    return made, output, made.freeze()["output"], zeros(shape, bound)


def zeros(shape, bound):
    region = torch.zeros(shape, dtype=torch.uint8)
    values = torch.zeros(shape, dtype=torch.float64)
    bounds = None if bound is None else torch.full(shape, bound, dtype=torch.float64)
    return ExpectedOutput((Clause("zeros", "write"),), region, values, bounds)


def map_of(made, initial, expected):
    made.stray_writes()
    ((guarded, touched),) = made.changed_places()
    compared = compare(guarded.tensor, initial, expected, from_sentinel=True)
    return output_map(guarded, Axes("token", "column"), compared, touched)


def test_wrong_elements_are_told_apart_by_how_far_they_are_off():
    made, output, initial, expected = launched((1, 8), bound=0.5)
    output.copy_(torch.tensor([0.0, 0.5, 0.6, 5.0, 6.0, 500.0, 600.0, torch.inf]))
    assert text(map_of(made, initial, expected)) == ["rr112233"]


def test_any_difference_counts_most_where_the_value_is_exact():
    made, output, initial, expected = launched((1, 3))
    output.copy_(torch.tensor([0.0, 1.0, torch.nan]))
    assert text(map_of(made, initial, expected)) == ["r33"]


def test_gap_between_rows_is_shown_where_something_was_written_there():
    made, output, initial, expected = launched((3, 2), Layout(row_gap=3))
    output.zero_()
    assert text(map_of(made, initial, expected)) == ["rr", "rr", "rr"]
    around(output, 5 + 2).zero_()
    around(output, 5 + 4).zero_()
    found = map_of(made, initial, expected)
    assert text(found) == ["rr...", "rr#.#", "rr..."]
    assert (found.columns, found.counts) == (2, {"RIGHT": 6, "REDZONE": 2})


def test_memory_before_a_tensor_with_gaps_lies_in_the_gap_before_its_first_row():
    made, output, initial, expected = launched((2, 2), Layout(row_gap=1))
    output.zero_()
    around(output, -1).zero_()
    around(output, -3).zero_()
    assert text(map_of(made, initial, expected)) == ["#.#", "rr.", "rr."]


def test_what_is_written_far_away_is_counted():
    made, output, initial, expected = launched((2, 2))
    output.zero_()
    for index in (4, 4 + 2 * 50, -2 * 60):
        around(output, index).zero_()
    found = map_of(made, initial, expected)
    assert text(found) == ["..", "..", "..", "rr", "rr", "#.", "..", ".."]
    assert (found.unseen, found.counts["REDZONE"]) == (2, 3)


@pytest.mark.parametrize("shape", [(2000, 1000), (161, 3), (3, 241), (700_000,)])
def test_reduction_keeps_a_single_wrong_element(shape):
    made, output, initial, expected = launched(shape)
    output.zero_()
    at = tuple(size * 2 // 3 for size in shape)
    output[at] = 1
    found = map_of(made, initial, expected)
    assert found.rows <= MOST_ROWS
    assert found.columns <= MOST_COLUMNS
    row, column = at if len(at) == 2 else (0, *at)
    (place,) = [index for index, cell in enumerate(found.cells) if cell == Cell.WRONG_BY_1000]
    assert divmod(place, found.width) == (row // found.tile[0], column // found.tile[1])
    assert found.counts == {"RIGHT": output.numel() - 1, "WRONG_BY_1000": 1}
    assert set(found.cells) == {Cell.RIGHT, Cell.WRONG_BY_1000}


def test_reduction_mixes_nothing_outside_into_the_tensor():
    made, output, initial, expected = launched((323, 485), Layout(row_gap=4))
    output.zero_()
    for index in (-1, 485, 489 * 323):
        around(output, index).zero_()
    found = map_of(made, initial, expected)
    assert found.tile == (3, 3)
    rows = text(found)
    assert {row[: found.columns] for row in rows[1:-1]} == {"r" * found.columns}
    assert (found.above, found.rows, found.height) == (1, 108, 110)
    assert rows[0] == "." * (found.width - 1) + "#"
    assert rows[1] == "r" * found.columns + "#."
    assert rows[-1] == "#" + "." * (found.width - 1)


def input_with(shape, layout, indices, **constants):
    """Return the map of an int32 input that was changed at `indices` of memory, with other constants of the buffers."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(watch if name == "BLOCK" else buffers, name, value)
        made = Buffers("cpu", 1)
        tensor = made.allocate("x", shape, torch.int32, layout)
        tensor.fill_(3)
        made.freeze()
        for index in indices:
            around(tensor, index).fill_(4)
        made.stray_writes()
        ((guarded, touched),) = made.changed_places()
        return input_map(guarded, touched)


def test_stepped_input_is_drawn_as_it_lies_in_memory():
    found = input_with((2, 3), Layout(offset=1, row_gap=1, step=2), [2, 3, 6, 9])
    assert text(found) == ["i.M#i.#", "i.M.i.."]
    assert found.axes.columns == "column · 2"
    assert found.counts == {"INPUT": 4, "MUTATED": 2, "REDZONE": 2}


def test_reduced_stepped_input_has_no_holes():
    found = input_with((2, 150), Layout(step=2), [4])
    assert found.tile == (1, 2)
    assert text(found) == ["iiM" + "i" * 147, "i" * 150]


@pytest.mark.parametrize("shape", [(), (5,), (1, 5)])
def test_input_of_one_row_has_no_gap(shape):
    found = input_with(shape, Layout(row_gap=40), [-1, 0])
    columns = found.columns
    assert text(found) == ["." * (columns - 1) + "#", "M" + "i" * (columns - 1)]


def test_empty_input_shows_what_was_written_at_its_place():
    assert text(input_with((0, 3), CONTIGUOUS, [0])) == ["#.."]


def test_digests_know_every_place_outside_and_the_blocks_inside():
    size = 4 * 40
    found = input_with((size // 8, 8), CONTIGUOUS, [-6, -2, -1, 3, 100, size], DIGEST_BYTES=0, BLOCK=40)
    assert found.counts["REDZONE"] == 4
    assert text(found)[0] == "..#...##"
    # Blocks of 40 begin in the redzone of 128 before the tensor.
    assert found.counts["MUTATED"] == 2
    places = [i - found.above * 8 for i, cell in enumerate(found.cells) if cell == Cell.MUTATED]
    assert places == [0, 3 * 40 - 128 + 80]


# The picture.


def map_like(name, height, width, cells=(), **changes):
    """Return a map of right cells but for the first few."""
    kinds = [*cells, *[Cell.RIGHT] * (height * width - len(cells))]
    found = OutputMap(
        name=name,
        is_input=False,
        axes=Axes("token", "column"),
        rows=height,
        columns=width,
        above=0,
        width=width,
        tile=(1, 1),
        counts={cell.name: kinds.count(cell) for cell in set(kinds) - {Cell.OUTSIDE}},
        unseen=0,
        cells=bytes(kinds),
    )
    return dataclasses.replace(found, **changes)


MAPS = {
    "one cell": [map_like("output", 1, 1)],
    "one row": [map_like("output", 1, 240, [Cell.WRONG], tile=(1, 31))],
    "one column": [map_like("output", 160, 1, tile=(9, 1))],
    "every kind": [map_like("output", 4, 6, [cell for cell in Cell if cell != Cell.OUTSIDE], unseen=3)],
    "block by block": [map_like("sorted", 3, 54, axes=Axes("adapter row", "token slot, block by block", 54, 7))],
    "around": [map_like("output", 2, 3, [Cell.REDZONE] * 5, rows=1, above=1, columns=2)],
    "many": [map_like(f"weights_of_a_long_name_{i}", 166, 241, tile=(100, 100), is_input=True) for i in range(12)],
    "tall and small": [map_like("output", 160, 240), *[map_like(f"output_{i}", 3, 1) for i in range(5)]],
    "nothing": [map_like("output", 0, 8)],
}
TITLE = "kernels.of.a.module:with_a_long_name@0.33.0: " + "12 of 345678 elements of sorted_token_ids wrong " * 9


@pytest.mark.parametrize("name", MAPS)
def test_texts_of_a_picture_are_on_the_page_and_apart(name):
    drawn = picture.figure(MAPS[name], TITLE)
    FigureCanvasAgg(drawn).draw()
    texts = [each for each in drawn.findobj(Text) if each.get_visible() and each.get_text().strip()]
    boxes = [each.get_window_extent() for each in texts]
    assert texts
    for box in boxes:
        assert 0 <= box.x0 < box.x1 <= drawn.bbox.width
        assert 0 <= box.y0 < box.y1 <= drawn.bbox.height
    for (one, this), (another, that) in itertools.combinations(zip(texts, boxes), 2):
        assert not this.overlaps(that), (one.get_text(), another.get_text())


@pytest.mark.parametrize("name", MAPS)
def test_every_cell_has_a_pixel(name):
    drawn = picture.figure(MAPS[name], TITLE)
    assert drawn.bbox.width == picture.WIDTH
    for axes, found in zip(drawn.axes, MAPS[name]):
        assert axes.bbox.width >= found.width
        assert axes.bbox.height >= found.height


def test_picture_is_a_png_of_800_pixels_the_same_each_time(tmp_path):
    maps = verdict_of(base_row_zeroed, BGMV).maps
    for name in ("one.png", "two.png"):
        picture.draw(maps, "kernel: 6 elements changed", tmp_path / name)
    content = (tmp_path / "one.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">I", content[16:20]) == (800,)
    assert content == (tmp_path / "two.png").read_bytes()


def test_legend_lists_what_occurs_with_its_count():
    drawn = picture.figure(verdict_of(base_row_zeroed, BGMV).maps, "kernel")
    assert [entry.get_text() for entry in drawn.legends[0].get_texts()] == [
        "kept, as it must be (6)",
        "right (12)",
        "overwritten: must be kept (6)",
    ]


def test_wrong_cell_has_its_colour_in_the_picture():
    drawn = picture.figure([map_like("output", 160, 240, [Cell.WRONG_BY_1000], tile=(50, 50))], "kernel")
    (axes,) = drawn.axes
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    pixels = torch.from_numpy(numpy.asarray(canvas.buffer_rgba()).copy()).int()
    legend_top = int(drawn.bbox.height - axes.bbox.y0)
    dark = (pixels[:legend_top, :, :3] == torch.tensor([0x7D, 0x10, 0x10])).all(2)
    assert dark.any()


def test_panel_says_what_a_cell_and_its_axes_are():
    found = map_like("tokens", 2, 4, axes=Axes("adapter row", "block"), tile=(1, 31), unseen=1234)
    (axes,) = picture.figure([found], "kernel").axes
    assert axes.get_title(loc="left") == (
        "output tokens; a cell is 1 × 31 elements, the worst of them; 1,234 written further away"
    )
    assert axes.get_xlabel() == "across: block; down: adapter row"
    assert max(axes.get_xticks()) < 4 * 31


def test_panels_that_are_left_out_are_counted():
    drawn = picture.figure(MAPS["many"], "kernel")
    assert len(drawn.axes) == picture.MOST_PANELS
    assert "Not shown: 6 more." in drawn.texts[0].get_text()


def test_dollar_signs_are_no_formulas(tmp_path):
    found = map_like("$x", 1, 2, axes=Axes("$a$", "$b$"))
    picture.draw([found], r"$\nonsense$ in a kernel's message", tmp_path / "map.png")
    assert (tmp_path / "map.png").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(KernelfuzzError) as raised:
        picture.draw([], "kernel", tmp_path / "writemap.png")
    assert str(raised.value) == "writemap.png needs matplotlib: pip install 'kernelfuzz[pictures]'"
    assert list(tmp_path.iterdir()) == []
