"""Cases: frozen dataclasses that say everything about one launch, and their JSON form."""

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, Union

from kernelfuzz.strategies.devices import Placement
from kernelfuzz.strategies.errors import KernelfuzzError
from kernelfuzz.strategies.reduction import Reduced

SCHEMA = 1
"""Schema number of a case file. A reader refuses files with another number."""

AnyCase = TypeVar("AnyCase", bound="Case")


@dataclass(frozen=True)
class Case:
    """One launch of one target: a drawn structure and one content seed, no tensors. `placement` says where it runs;
    `reduced` tensors hold something simpler than what the seed gives, once a failure was shrunk.

    Subclasses add the structure as fields of type int, float, bool, str, Literal, tuple, optional, or another frozen
    dataclass of such fields.
    """

    target: ClassVar[str]
    seed: int
    placement: Placement = field(default=Placement(), kw_only=True)
    reduced: tuple[Reduced, ...] = field(default=(), kw_only=True)

    @property
    def size(self) -> int:
        """What a person counts first in a case: its tokens."""
        raise NotImplementedError

    def shown(self) -> dict[str, Any]:
        """Return what a person is shown of the case, by name: the fields that have not their usual value."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }


def to_json(case: Case) -> dict[str, Any]:
    """Return the case as a JSON object ``{schema, target, case}``."""
    return {"schema": SCHEMA, "target": case.target, "case": dataclasses.asdict(case)}


def from_json(case_type: type[AnyCase], document: Any) -> AnyCase:
    """Return the case that `to_json` wrote.

    Raises KernelfuzzError for anything else: another schema or target, missing or unknown fields, wrong types.
    """
    if not isinstance(document, Mapping) or "schema" not in document:
        raise KernelfuzzError("not a case file: it has no schema number")
    if type(document["schema"]) is not int or document["schema"] != SCHEMA:
        raise KernelfuzzError(f"case file has schema {document['schema']!r}, this kernelfuzz reads schema {SCHEMA}")
    if document.get("target") != case_type.target:
        raise KernelfuzzError(f"case file is for target {document.get('target')!r}, not {case_type.target!r}")
    case: AnyCase = _decode(case_type, document.get("case"), "case")
    return case


def derive_seed(seed: int, index: int) -> int:
    """Return content seed number `index` of an example; number 0 is the example's own seed, so that it shrinks."""
    if index == 0:
        return seed
    mixed = (seed * 0x9E3779B1 + index * 0x85EBCA6B) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    return mixed ^ (mixed >> 15)


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _decode(kind: Any, value: Any, where: str) -> Any:
    """Return the value of type `kind` that `value` (from JSON) stands for; `where` names it in an error."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if value is None and len(inner) < len(arguments):
            return None
        fitting = [argument for argument in inner if _fits(argument, value)]
        return _decode((fitting or inner)[0], value, where)
    if origin is tuple and isinstance(value, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            return tuple(_decode(inner, item, f"{where}[{i}]") for i, (inner, item) in enumerate(zip(arguments, value)))
    if origin is typing.Literal and value in arguments:
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    legal = " or ".join(map(repr, arguments)) if origin is typing.Literal else getattr(kind, "__name__", kind)
    raise KernelfuzzError(f"malformed case file: {where} is {value!r}, expected {legal}")


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value from JSON is, on the face of it, one of type `kind`, to choose between those of a union."""
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple))
    return type(value) is kind


def _decode_dataclass(cls: type, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise KernelfuzzError(f"malformed case file: {where} is {value!r}, expected an object")
    wanted = _field_types(cls)
    # A field with a default came later than the schema: older files lack it.
    optional = {each.name for each in dataclasses.fields(cls) if each.default is not dataclasses.MISSING}
    if wrong := set(value) ^ (set(wanted) - optional.difference(value)):
        names = ", ".join(sorted(wrong))
        raise KernelfuzzError(f"malformed case file: fields of {where} missing or unknown: {names}")
    return cls(**{name: _decode(wanted[name], inner, f"{where}.{name}") for name, inner in value.items()})
