"""Cases of a user's own kernel: descriptions of tensors, and what is made of them."""

import json
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernelfuzz.fuzz import Buffers
from kernelfuzz.strategies import contents, own
from kernelfuzz.strategies.case import from_json, to_json
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.layouts import CONTIGUOUS, Layout, layouts
from kernelfuzz.strategies.own import Case, TensorSpec, tensors


@st.composite
def drawn(draw):
    rows = draw(st.integers(0, 3))
    return {
        "x": draw(tensors((rows, 5), draw(st.sampled_from(("float16", "float64"))), layout=layouts())),
        "index": draw(tensors((4,), "int32", low=-2, high=3)),
        "weights": (TensorSpec((2,), "bfloat16"), TensorSpec((3,), "bfloat16")),
        "eps": draw(st.sampled_from((1e-6, 1.0))),
        "count": draw(st.integers(0, 2)),
        "flag": draw(st.booleans()),
        "mode": "llama",
        "nothing": None,
    }


@given(own.cases(drawn()))
def test_a_case_survives_json(case):
    again = from_json(Case, json.loads(json.dumps(to_json(case))))
    assert repr(again) == repr(case)
    assert hash(again) == hash(case)


@given(own.cases(drawn()))
def test_inputs_are_what_was_described(case):
    inputs = own.make_inputs(case, "cpu")
    described = {each.name: each.value for each in case.arguments}
    assert tuple(inputs.x.shape) == described["x"].shape
    assert inputs.x.dtype == described["x"].torch_dtype
    assert inputs.x.stride() == described["x"].layout.strides(described["x"].shape)
    assert inputs.x.isfinite().all()
    assert set(inputs.index.tolist()) <= {-2, -1, 0, 1, 2}
    assert [tuple(each.shape) for each in inputs.weights] == [(2,), (3,)]
    assert (inputs.eps, inputs.count, inputs.flag) == (described["eps"], described["count"], described["flag"])
    assert inputs.case == case
    again = own.make_inputs(case, "cpu")
    assert torch.equal(inputs.x, again.x)


def test_contents_depend_on_seed_name_and_style():
    def made(seed, name="x", style="signed"):
        case = Case.of({name: TensorSpec((50,), "float32", style)}, seed)
        return getattr(own.make_inputs(case, "cpu"), name)

    assert not torch.equal(made(0), made(1))
    assert not torch.equal(made(0), made(0, "y"))
    assert bool((made(0, style="ones") == 1).all())


def test_integers_reach_both_ends():
    case = Case.of({"index": TensorSpec((200,), "int64", low=5, high=9)})
    assert set(own.make_inputs(case, "cpu").index.tolist()) == {5, 6, 7, 8}


def test_a_dataclass_and_a_mapping_are_the_same():
    @dataclass
    class Call:
        x: TensorSpec
        eps: float

    spec = TensorSpec([2, 3])
    assert Case.of(Call(spec, 0.5)) == Case.of({"x": spec, "eps": 0.5})
    assert Case.of(Case.of({"x": spec}, 3)).seed == 3


def test_a_case_is_shown_by_its_arguments():
    strided = TensorSpec((2, 3), "float16", layout=Layout(offset=1))
    case = Case.of({"x": strided, "index": TensorSpec((2,), "int32", low=0, high=7), "eps": 0.5}, 4)
    assert {name: str(value) for name, value in case.shown().items()} == {
        "x": "float16[2, 3] signed, Layout(offset=1, row_gap=0, step=1)",
        "index": "int32[2] in [0, 7)",
        "eps": "0.5",
        "seed": "4",
    }
    assert case.size == 8


@pytest.mark.parametrize(
    ("value", "regimes"),
    [
        (TensorSpec((4,), "float16", "wide"), {"float16", "wide"}),
        (TensorSpec((0, 4), "bfloat16", "ones"), {"bfloat16", "ones", "empty"}),
        (TensorSpec((2, 3), "int32"), {"int32", "row_not_power_of_two"}),
        (TensorSpec((2, 4), "float32", "ones", layout=Layout(step=2)), {"float32", "ones", "strided"}),
        ((TensorSpec((1,), "uint8"), TensorSpec((1,), "int8")), {"uint8", "int8"}),
        (3, set()),
    ],
)
def test_regimes(value, regimes):
    assert own.regimes(Case.of({"x": value})) == regimes


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TensorSpec((2,), "float8"), "dtype 'float8': expected one of float16"),
        (lambda: TensorSpec((-1,)), r"shape \(-1,\): expected sizes of 0 or more"),
        (lambda: TensorSpec((1.5,)), "expected sizes"),
        (lambda: TensorSpec((2,), "int32", low=3, high=3), r"integers in \[3, 3\): there is none"),
        (lambda: Case.of([1]), r"a mapping or a dataclass of TensorSpec and plain values, not \[1\]"),
        (lambda: Case.of({"x": torch.ones(2)}), "x cannot be a Tensor: describe tensors by TensorSpec"),
        (lambda: Case.of({"x": object()}), "x cannot be a object: draw a number or a text"),
        (lambda: Case.of({"x": float("nan")}), "x cannot be nan"),
        (lambda: Case.of({"case": 1}), "cannot be called 'case'"),
        (lambda: Case.of({"a b": 1}), "cannot be called 'a b'"),
    ],
)
def test_what_no_case_can_be_is_refused_in_one_line(make, text):
    with pytest.raises(KernelfuzzError, match=text) as caught:
        make()
    assert "\n" not in str(caught.value)


@given(st.data())
def test_a_tensor_shrinks_to_ones_in_the_usual_layout(data):
    spec = data.draw(tensors((2, 2), "float32", layout=layouts()))
    assert spec.contents in contents.STYLES
    assert spec.layout.step in (1, 2)


def test_the_simplest_tensor():
    from hypothesis import find

    spec = find(tensors((2, 2), "float32", layout=layouts()), lambda _: True)
    assert (spec.contents, spec.layout) == ("ones", CONTIGUOUS)


@pytest.mark.parametrize("dtype", get_args(own.TensorDtype))
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_every_dtype_can_be_made_on_guarded_memory(dtype, shape):
    for style in contents.STYLES:
        case = Case.of({"x": TensorSpec(shape, dtype, style)})
        made = own.make_inputs(case, "cpu", Buffers("cpu", seed=1).allocate).x
        assert torch.equal(made, own.make_inputs(case, "cpu").x)
        assert made.dtype == getattr(torch, dtype)
