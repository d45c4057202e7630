"""Cases as JSON, and content seeds."""

import dataclasses
import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernelfuzz.strategies import bgmv, fused_moe_lora, lora_shrink_expand, moe_lora_align
from kernelfuzz.strategies.case import SCHEMA, Case, derive_seed, from_json, to_json
from kernelfuzz.strategies.contents import seeds
from kernelfuzz.strategies.errors import KernelfuzzError

TARGETS = (fused_moe_lora, lora_shrink_expand, bgmv, moe_lora_align)


@dataclass(frozen=True)
class Part:
    low: int
    high: float


@dataclass(frozen=True)
class Sample(Case):
    """A case that has every kind of field."""

    target: ClassVar[str] = "sample"

    count: int
    scale: float
    wanted: bool
    name: str
    kind: Literal["thin", "thick"]
    pair: tuple[int, str]
    widths: tuple[int, ...]
    limit: int | None
    parts: tuple[Part, ...]


SAMPLE = Sample(5, 3, 0.5, True, "n", "thick", (1, "a"), (3, 4), None, (Part(1, 2.0),))


def edited(document, *removed, **changed):
    for name in removed:
        del document["case"][name]
    document["case"].update(changed)
    return document


def without(document, name):
    return {key: value for key, value in document.items() if key != name}


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.Case.target)
@settings(max_examples=60)
@given(data=st.data())
def test_a_drawn_case_survives_json(target, data):
    case = data.draw(target.cases())
    document = to_json(case)
    assert document["schema"] == SCHEMA
    assert document["target"] == target.Case.target
    again = from_json(target.Case, json.loads(json.dumps(document)))
    assert again == case
    assert hash(again) == hash(case)
    assert repr(again) == repr(case)  # 1 == 1.0 == True, but they are not the same case


@pytest.mark.parametrize("limit", [None, 7])
def test_every_kind_of_field_survives_json(limit):
    case = dataclasses.replace(SAMPLE, limit=limit)
    assert repr(from_json(Sample, json.loads(json.dumps(to_json(case))))) == repr(case)


def test_an_integer_is_read_where_a_fraction_is_wanted():
    case = from_json(Sample, edited(to_json(SAMPLE), scale=2))
    assert repr(case.scale) == "2.0"


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda _: [], "schema number"),
        (lambda _: None, "schema number"),
        (lambda _: "text", "schema number"),
        (lambda d: without(d, "schema"), "schema number"),
        (lambda d: d | {"schema": 99}, "schema 99"),
        (lambda d: d | {"schema": "1\n2"}, "schema '1\\n2'"),
        (lambda d: d | {"target": "bgmv"}, "target 'bgmv', not 'sample'"),
        (lambda d: without(d, "target"), "target None"),
        (lambda d: without(d, "case"), "case is None, expected an object"),
        (lambda d: d | {"case": [1]}, "case is [1], expected an object"),
        (lambda d: edited(d, "count"), "fields of case missing or unknown: count"),
        (lambda d: edited(d, colour=1), "fields of case missing or unknown: colour"),
        (lambda d: edited(d, count="8"), "case.count is '8', expected int"),
        (lambda d: edited(d, count=8.0), "case.count is 8.0, expected int"),
        (lambda d: edited(d, count=None), "case.count is None, expected int"),
        (lambda d: edited(d, seed=True), "case.seed is True, expected int"),
        (lambda d: edited(d, scale=True), "case.scale is True, expected float"),
        (lambda d: edited(d, scale="1"), "case.scale is '1', expected float"),
        (lambda d: edited(d, wanted=0), "case.wanted is 0, expected bool"),
        (lambda d: edited(d, name=1), "case.name is 1, expected str"),
        (lambda d: edited(d, kind="fat"), "case.kind is 'fat', expected"),
        (lambda d: edited(d, kind="a\nb"), "case.kind is 'a\\nb', expected"),
        (lambda d: edited(d, pair=[1]), "case.pair is [1], expected"),
        (lambda d: edited(d, pair=["a", 1]), "case.pair[0] is 'a', expected int"),
        (lambda d: edited(d, widths=[1, "2"]), "case.widths[1] is '2', expected int"),
        (lambda d: edited(d, widths=3), "case.widths is 3, expected"),
        (lambda d: edited(d, limit="1"), "case.limit is '1', expected int"),
        (lambda d: edited(d, parts=[0]), "case.parts[0] is 0, expected an object"),
        (lambda d: edited(d, parts=[{"low": 1}]), "fields of case.parts[0] missing or unknown: high"),
        (lambda d: edited(d, parts=[{"low": None, "high": 1}]), "case.parts[0].low is None, expected int"),
    ],
)
def test_a_malformed_document_is_refused_in_one_line(edit, text):
    with pytest.raises(KernelfuzzError) as caught:
        from_json(Sample, edit(to_json(SAMPLE)))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@given(seeds(), st.integers(1, 1000))
def test_derived_seeds_start_with_the_examples_own(seed, index):
    assert derive_seed(seed, 0) == seed
    assert 0 <= derive_seed(seed, index) < 2**32


def test_derived_seeds_are_distinct_and_pinned():
    assert [derive_seed(7, index) for index in range(4)] == [7, 989210662, 2835748400, 2090868978]
    assert len({derive_seed(seed, index) for seed in range(50) for index in range(50)}) == 2500
