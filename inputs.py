"""Declare an input once: default, range, choices and description are metadata of a dataclass field.

    @dataclass(frozen=True)
    class GenerationRequest:
        seed: int | None = option(None, "Random seed.", ge=0, le=2**32 - 1)
        outpaint: Margins = grouped("outpaint", Margins)  # outpaint_left, outpaint_top ...
        controls: tuple[ControlRequest, ...] = repeated("controlnet_{n}", ControlRequest, count=3)

`script/sync` writes the signatures that Cog reads, the reference and openapi.json from `flatten`;
`from_inputs` builds the dataclass from what Cog passes; `check` tests its values.
"""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

REQUIRED: Final = dataclasses.MISSING  # as `default`: there is none
_KEY = "input"  # in the metadata of a dataclass field


@dataclass(frozen=True)
class Option:
    """What is declared of one input."""

    description: str  # {n}: the number of the group in a repeated one, from 1
    ge: float | None = None  # of a list: each element's
    le: float | None = None
    choices: tuple[str, ...] = ()
    secret: bool = False
    name: str | None = None  # None: the field's; "" in a group: the group's


@dataclass(frozen=True)
class Input:
    """One input as Cog sees it: a parameter of the signature."""

    name: str
    type: type  # str, int, float, bool, pathlib.Path or a StrEnum; of a list, its elements'
    is_list: bool
    is_optional: bool
    default: object  # or REQUIRED
    option: Option  # with {n} and the choices of a StrEnum filled in
    field: str = ""  # that has its value, in the dataclass or in a group
    group: str = ""  # the field of the group, if it is in one
    index: int | None = None  # of the group, if that is repeated


@dataclass(frozen=True)
class _Group:
    """The inputs of a nested dataclass, once for each prefix."""

    cls: type[Any]
    prefixes: tuple[str, ...]
    order: tuple[str, ...]  # of the inputs in the signature; (): that of the fields
    is_repeated: bool


def option(
    default: Any,  # noqa: ANN401
    description: str,
    *,
    ge: float | None = None,
    le: float | None = None,
    choices: Iterable[str] = (),
    secret: bool = False,
    name: str | None = None,
) -> Any:  # noqa: ANN401  as dataclasses.field: of whatever type the field has
    """Declare an input in a field of type str, int, float, bool, Path or a StrEnum.

    `X | None` and `tuple[X, ...]` of these work too. The values of a StrEnum are its choices;
    `repr` leaves secrets out; a dataclass has its REQUIRED fields first.
    """
    declared = Option(description, ge, le, tuple(map(str, choices)), secret, name)
    return dataclasses.field(default=default, metadata={_KEY: declared}, repr=not secret)


def grouped(prefix: str, cls: type, *, order: tuple[str, ...] = ()) -> Any:  # noqa: ANN401
    """Declare a field of type `cls`, whose inputs are named prefix_field.

    `order` is that of the signature where it is not that of the fields.
    """
    group = _Group(cls, (prefix,), order, is_repeated=False)
    return dataclasses.field(default_factory=cls, metadata={_KEY: group})


def repeated(prefix: str, cls: type, *, count: int) -> Any:  # noqa: ANN401
    """Declare a field of type `tuple[cls, ...]`: `count` groups, their numbers {n} in `prefix`."""
    prefixes = tuple(prefix.format(n=n) for n in range(1, count + 1))
    group = _Group(cls, prefixes, (), is_repeated=True)
    return dataclasses.field(default_factory=lambda: (cls(),) * count, metadata={_KEY: group})


def flatten(cls: type[Any]) -> tuple[Input, ...]:
    """Return the inputs of a dataclass in the order of the signature."""
    return _flatten(cls)  # type: ignore[arg-type]  # mypy takes a class for not hashable


@functools.cache  # type hints take milliseconds
def _flatten(cls: type[Any]) -> tuple[Input, ...]:
    found: list[Input] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        declared = field.metadata.get(_KEY)
        if isinstance(declared, Option):
            type_, is_list, is_optional = _parse_annotation(hints[field.name])
            if issubclass(type_, StrEnum):
                declared = replace(declared, choices=tuple(member.value for member in type_))
            name = field.name if declared.name is None else declared.name
            default = field.default
            found.append(Input(name, type_, is_list, is_optional, default, declared, field.name))
        elif isinstance(declared, _Group):
            entries = list(flatten(declared.cls))
            if declared.order:
                entries.sort(key=lambda entry: declared.order.index(entry.name))
            for k, prefix in enumerate(declared.prefixes):
                index = k if declared.is_repeated else None
                found += [_grouped(entry, prefix, field.name, index) for entry in entries]
    return tuple(found)


def _grouped(entry: Input, prefix: str, group: str, index: int | None) -> Input:
    """Return a group's input as one of the dataclass that has the group."""
    name = f"{prefix}_{entry.name}" if entry.name else prefix
    description = entry.option.description.replace("{n}", str((index or 0) + 1))
    option = replace(entry.option, description=description)
    return replace(entry, name=name, option=option, group=group, index=index)


def _parse_annotation(annotation: Any) -> tuple[type, bool, bool]:  # noqa: ANN401
    """Return (type, whether it is a list, whether it may be None)."""
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        type_, is_list, _ = _parse_annotation(arguments[0])
        return type_, is_list, True
    if typing.get_origin(annotation) is tuple:
        return arguments[0], True, False
    return annotation, False, False


def from_inputs(cls: type[T], values: Mapping[str, object], error: type[Exception]) -> T:
    """Build the dataclass from the arguments that Cog passes; an absent one takes its default.

    Whole floats become int, as JSON has one type of number; secrets str, lists tuples. Raises
    `error` for a value of the wrong type, and for a file that the server has not downloaded.
    """
    arguments: dict[str, Any] = {}
    groups: dict[tuple[str, int | None], dict[str, Any]] = {}
    names = set()
    for entry in flatten(cls):
        names.add(entry.name)
        group = groups.setdefault((entry.group, entry.index), {}) if entry.group else arguments
        if entry.name in values:
            group[entry.field] = _convert(entry, values[entry.name], error)
    if unknown := values.keys() - names:
        raise TypeError(f"{cls.__name__} has no input named {', '.join(sorted(unknown))}")
    for (name, index), given in groups.items():
        (declared,) = (f for f in dataclasses.fields(cls) if f.name == name)  # type: ignore[arg-type]
        built = declared.metadata[_KEY].cls(**given)
        arguments[name] = built if index is None else (*arguments.get(name, ()), built)
    return cls(**arguments)


def _convert(entry: Input, value: Any, error: type[Exception]) -> object:  # noqa: ANN401
    """Return a value as its field has it."""
    if value is None and entry.is_optional:
        return None
    if entry.is_list and isinstance(value, list | tuple):
        elements = [
            replace(entry, name=f"{entry.name}[{k}]", is_list=False) for k in range(len(value))
        ]
        return tuple(_convert(e, v, error) for e, v in zip(elements, value, strict=True))
    if entry.option.secret and hasattr(value, "get_secret_value"):
        return value.get_secret_value()
    if entry.type is Path and not isinstance(value, Path):
        # The server passes on what it has not downloaded: it would name a file of the container's.
        raise error(f"{entry.name} is {str(value)[:80]!r}; it must be a URL or a data URI")
    if entry.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if issubclass(entry.type, StrEnum):
        _check_value(entry, value, error)
        return entry.type(value)
    if entry.is_list or not isinstance(value, int | float if entry.type is float else entry.type):
        shown = "not of its type" if entry.option.secret else repr(str(value)[:80])
        kind = f"list of {entry.type.__name__}" if entry.is_list else entry.type.__name__
        raise error(f"{entry.name} is {shown}; it must be of type {kind}")
    return value


def check(instance: object, error: type[Exception]) -> None:
    """Raise `error` for the first value outside its range (NaN is) or choices."""
    for entry in flatten(type(instance)):
        holders: Any = getattr(instance, entry.group) if entry.group else instance
        if entry.index is not None and entry.index >= len(holders):
            continue  # of a repeated group, there may be fewer
        value = getattr(holders if entry.index is None else holders[entry.index], entry.field)
        if entry.is_list:
            for k, element in enumerate(value or ()):
                _check_value(replace(entry, name=f"{entry.name}[{k}]"), element, error)
        elif value is not None:
            _check_value(entry, value, error)


def _check_value(entry: Input, value: Any, error: type[Exception]) -> None:  # noqa: ANN401
    name, low, high = entry.name, entry.option.ge, entry.option.le
    choices = entry.option.choices
    if choices and value not in choices:
        raise error(f"{name} {value!r} is not known; choose one of {', '.join(choices)}")
    if (low is None or value >= low) and (high is None or value <= high):  # neither holds for NaN
        return
    limits = f"from {low} to {high}"
    if low is None or high is None:
        limits = f"at least {low}" if high is None else f"at most {high}"
    raise error(f"{name} is {value}; it must be {limits}")
