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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

T = TypeVar("T")

REQUIRED: Final = dataclasses.MISSING  # as `default`: there is none
_KEY = "input"  # in the metadata of a dataclass field
_Dataclass = Any  # a class or an instance: mypy takes neither for hashable


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


@dataclass(frozen=True)
class _Group:
    """The inputs of a nested dataclass, once for each prefix."""

    cls: _Dataclass
    prefixes: tuple[str, ...]
    order: tuple[str, ...]
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


def flatten(cls: type[Any]) -> list[Input]:
    """Return the inputs of a dataclass in the order of the signature."""
    return list(_flatten(cls, "", 1))


def from_inputs(cls: type[T], values: Mapping[str, object], error: type[Exception]) -> T:
    """Build the dataclass from the arguments that Cog passes; an absent one takes its default.

    Whole floats become int, as JSON has one type of number; secrets str, lists tuples. Raises
    `error` for a value of the wrong type, and for a file that the server has not downloaded.
    """
    unknown = values.keys() - {entry.name for entry in flatten(cls)}
    if unknown:
        raise TypeError(f"{cls.__name__} has no input named {', '.join(sorted(unknown))}")
    built: T = _build(cls, "", values, error)
    return built


def check(instance: object, error: type[Exception]) -> None:
    """Raise `error` for the first value outside its range (NaN is) or choices."""
    _check(instance, "", error)


@functools.cache  # type hints take milliseconds
def _walk(cls: _Dataclass, prefix: str, number: int) -> list[tuple[str, Input | _Group]]:
    """Return the name of each field that is declared here, and what it declares."""
    found: list[tuple[str, Input | _Group]] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        declared = field.metadata.get(_KEY)
        if isinstance(declared, _Group):
            found.append((field.name, declared))
        elif isinstance(declared, Option):
            name = field.name if declared.name is None else declared.name
            name = "_".join(part for part in (prefix, name) if part)
            type_, is_list, is_optional = _taken_apart(hints[field.name])
            option = replace(declared, description=declared.description.replace("{n}", str(number)))
            if issubclass(type_, StrEnum):
                option = replace(option, choices=tuple(member.value for member in type_))
            entry = Input(name, type_, is_list, is_optional, field.default, option)
            found.append((field.name, entry))
    return found


def _taken_apart(annotation: Any) -> tuple[type, bool, bool]:  # noqa: ANN401
    """Return (type, whether it is a list, whether it may be None)."""
    arguments = [a for a in typing.get_args(annotation) if a is not type(None)]
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        type_, is_list, _ = _taken_apart(arguments[0])
        return type_, is_list, True
    if typing.get_origin(annotation) is tuple:
        return arguments[0], True, False
    return annotation, False, False


def _flatten(cls: _Dataclass, prefix: str, number: int) -> Iterator[Input]:
    for _, declared in _walk(cls, prefix, number):
        if isinstance(declared, Input):
            yield declared
            continue
        for n, group_prefix in enumerate(declared.prefixes, 1):
            entries = list(_flatten(declared.cls, group_prefix, n))
            names = [f"{group_prefix}_{name}" for name in declared.order]
            yield from sorted(entries, key=lambda e: names.index(e.name)) if names else entries


def _build(
    cls: _Dataclass, prefix: str, values: Mapping[str, object], error: type[Exception]
) -> _Dataclass:
    arguments: dict[str, object] = {}
    for field, declared in _walk(cls, prefix, 1):
        if isinstance(declared, _Group):
            groups = tuple(_build(declared.cls, p, values, error) for p in declared.prefixes)
            arguments[field] = groups if declared.is_repeated else groups[0]
        elif declared.name in values:
            arguments[field] = _converted(declared, values[declared.name], error)
    return cls(**arguments)


def _converted(entry: Input, value: Any, error: type[Exception]) -> object:  # noqa: ANN401
    if value is None and entry.is_optional:
        return None
    if entry.is_list and isinstance(value, list | tuple):
        names = [f"{entry.name}[{k}]" for k in range(len(value))]
        elements = [replace(entry, name=name, is_list=False) for name in names]
        return tuple(_converted(e, v, error) for e, v in zip(elements, value, strict=True))
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


def _check(instance: _Dataclass, prefix: str, error: type[Exception]) -> None:
    cls: _Dataclass = type(instance)
    for field, declared in _walk(cls, prefix, 1):
        value = getattr(instance, field)
        if isinstance(declared, _Group):
            groups = value if declared.is_repeated else (value,)
            for group_prefix, group in zip(declared.prefixes, groups, strict=False):
                _check(group, group_prefix, error)
        elif declared.is_list:
            for k, element in enumerate(value or ()):
                _check_value(replace(declared, name=f"{declared.name}[{k}]"), element, error)
        elif value is not None:
            _check_value(declared, value, error)


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
