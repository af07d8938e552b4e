"""One parameter with its `Input(...)` → an InputField, or a SchemaError."""

import ast
import re
from collections.abc import Mapping

from script.tools.cog_model import Default, InputField, Primitive, Scalar, ValueType
from script.tools.cog_text import SourceFile
from script.tools.cog_types import read_value_type

KEYWORDS = frozenset(
    (
        *("default", "description", "choices", "deprecated", "accept"),
        *("ge", "le", "min_length", "max_length", "regex"),
    )
)
NUMERIC = (Primitive.INT, Primitive.FLOAT)
# bool is a subclass of int: exact types are compared.
PYTHON_TYPES: Mapping[Primitive, tuple[type, ...]] = {
    Primitive.STR: (str,),
    Primitive.INT: (int,),
    Primitive.FLOAT: (int, float),
    Primitive.BOOL: (bool,),
    Primitive.PATH: (),
    Primitive.SECRET: (),
}
EXACT_FLOAT = 2**53  # Cog keeps bounds as 64-bit floats


def read_input(
    source: SourceFile, order: int, parameter: ast.arg, value: ast.expr | None
) -> InputField:
    """The field of one parameter of a target."""
    if parameter.annotation is None:
        problem = f"input {parameter.arg} has no type annotation"
        raise source.refuse(parameter, "annotation-missing", problem)
    type_ = read_value_type(source, parameter.annotation)
    keywords = _input_keywords(source, parameter, value)
    description = keywords.get("description")
    if description is None:
        problem = f"input {parameter.arg} has no description"
        raise source.refuse(parameter, "description-missing", problem)
    default = keywords.get("default")
    if default is None and type_.optional:
        problem = f"Optional input {parameter.arg} has no default"
        raise source.refuse(parameter, "default-absent", problem)
    field = InputField(
        name=parameter.arg,
        order=order,
        line=parameter.lineno,
        type=type_,
        description=_description(source, description),
        required=default is None,
        default=_default(source, parameter.arg, type_, default),
        ge=_number(source, keywords.get("ge")),
        le=_number(source, keywords.get("le")),
        min_length=_length(source, keywords.get("min_length")),
        max_length=_length(source, keywords.get("max_length")),
        regex=_text(source, keywords.get("regex")),
        choices=_choices(source, parameter.arg, type_, keywords.get("choices")),
        deprecated=_flag(source, keywords.get("deprecated")),
        accept=_text(source, keywords.get("accept")),
    )
    _check_constraints(source, parameter, field)
    _check_default(source, parameter, field)
    return field


def _input_keywords(
    source: SourceFile, parameter: ast.arg, value: ast.expr | None
) -> dict[str, ast.expr]:
    match value:
        case None | ast.Constant():
            problem = f"input {parameter.arg} has no Input(...)"
            raise source.refuse(parameter, "input-missing", problem)
        case ast.Call(func=ast.Name(id=name) as callee):
            source.check_bare(value)
            source.check_bare(callee)
        case _:
            problem = f"input {parameter.arg} is {source.text_of(value)}, not Input(...)"
            raise source.refuse(value, "input-not-in-place", problem)
    if source.origin(name) != ("cog", "Input"):
        rule = "name-origin" if name == "Input" else "input-not-in-place"
        raise source.refuse(value, rule, f"{name} does not come from `from cog import Input`")
    if value.args:
        problem = f"Input({source.text_of(value.args[0])}) has a positional argument"
        raise source.refuse(value.args[0], "input-positional", problem)
    for keyword in value.keywords:
        if keyword.arg not in KEYWORDS:
            problem = f"Input(...) of {parameter.arg} has the unknown keyword {keyword.arg or '**'}"
            raise source.refuse(keyword, "input-keyword", problem)
    return {keyword.arg: keyword.value for keyword in value.keywords if keyword.arg is not None}


def _description(source: SourceFile, node: ast.expr) -> str:
    text = source.string(node, "description-form")
    if not text.strip():
        raise source.refuse(node, "description-missing", "the description is empty")
    return text


def _default(source: SourceFile, name: str, type_: ValueType, node: ast.expr | None) -> Default:
    if node is None:
        return None
    rule = "default-not-literal"
    source.check_plain(node)
    value = source.literal(
        source.constant(node, rule) if isinstance(node, ast.Name) else node, rule
    )
    if value is None:
        if not type_.optional:
            raise source.refuse(node, "default-none", f"input {name} defaults to None")
        return None
    wrong = source.refuse(
        node, "default-type", f"default {value!r} of input {name} is not {describe_type(type_)}"
    )
    if isinstance(value, list) != type_.is_list or isinstance(value, dict):
        raise wrong
    if not isinstance(value, list):
        return _scalar(value, type_, wrong)
    return [_scalar(item, type_, wrong) for item in value]


def _scalar(value: object, type_: ValueType, wrong: Exception) -> Scalar:
    if type(value) not in PYTHON_TYPES[type_.primitive]:
        raise wrong
    assert isinstance(value, str | int | float | bool)
    return value


def _choices(
    source: SourceFile, name: str, type_: ValueType, node: ast.expr | None
) -> tuple[str | int, ...]:
    if node is None:
        return ()
    values = source.choices(node)
    wanted = {Primitive.STR: str, Primitive.INT: int}.get(type_.primitive)
    chosen = tuple(value for value in values if isinstance(value, str | int))
    right = len(chosen) == len(values) and all(type(value) is wanted for value in chosen)
    if type_.is_list or not right or len(chosen) < 2 or len(set(chosen)) < len(chosen):
        problem = f"choices {values!r} do not fit input {name}: {describe_type(type_)}"
        raise source.refuse(node, "choices-values", problem)
    return chosen


def _number(source: SourceFile, node: ast.expr | None) -> int | float | None:
    if node is None:
        return None
    value = source.literal(node, "constraint-not-literal")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise source.refuse(node, "constraint-not-literal", f"{value!r} is not a number")
    if isinstance(value, int) and abs(value) > EXACT_FLOAT:
        raise source.refuse(node, "number-form", f"{value} does not fit a 64-bit float exactly")
    return value


def _length(source: SourceFile, node: ast.expr | None) -> int | None:
    value = _number(source, node)
    if value is None:
        return None
    if not isinstance(value, int) or value < 0:
        assert node is not None
        raise source.refuse(node, "constraint-not-literal", f"{value} is not a length")
    return value


def _text(source: SourceFile, node: ast.expr | None) -> str | None:
    if node is None:
        return None
    value = source.literal(node, "constraint-not-literal")
    if not isinstance(value, str):
        raise source.refuse(node, "constraint-not-literal", f"{value!r} is not a string")
    return value


def _flag(source: SourceFile, node: ast.expr | None) -> bool:
    if node is None:
        return False
    value = source.literal(node, "constraint-not-literal")
    if not isinstance(value, bool):
        raise source.refuse(node, "constraint-not-literal", f"{value!r} is not True or False")
    return value


def _check_constraints(source: SourceFile, node: ast.arg, field: InputField) -> None:
    kind, scalar = field.type.primitive, not field.type.is_list
    bounds = field.ge is not None or field.le is not None
    lengths = field.min_length is not None or field.max_length is not None
    allowed = [
        ("ge/le", bounds, kind in NUMERIC and scalar),
        ("min_length/max_length", lengths, kind is Primitive.STR and scalar),
        ("regex", field.regex is not None, kind is Primitive.STR and scalar),
        ("accept", field.accept is not None, kind is Primitive.PATH and scalar),
    ]
    for name, present, fits in allowed:
        if present and not fits:
            problem = f"{name} on input {field.name}: {describe_type(field.type)}"
            raise source.refuse(node, "constraint-type", problem)
    if field.choices and (bounds or lengths or field.regex is not None):
        problem = f"input {field.name} has choices and another bound"
        raise source.refuse(node, "choices-values", problem)
    for low, high in ((field.ge, field.le), (field.min_length, field.max_length)):
        if low is not None and high is not None and low > high:
            problem = f"input {field.name}: {low} > {high}"
            raise source.refuse(node, "constraint-order", problem)
    if field.regex is not None:
        try:
            re.compile(field.regex)
        except re.error as error:
            problem = f"regex of input {field.name} is not valid: {error}"
            raise source.refuse(node, "constraint-not-literal", problem) from error


def _check_default(source: SourceFile, node: ast.arg, field: InputField) -> None:
    value = field.default
    if value is None:
        return
    limits: list[tuple[str, bool]] = []
    if field.choices:
        limits.append((f"choices {list(field.choices)!r}", value in field.choices))
    if isinstance(value, int | float):
        limits.append((f"ge={field.ge}", field.ge is None or value >= field.ge))
        limits.append((f"le={field.le}", field.le is None or value <= field.le))
    if isinstance(value, str):
        low, high = field.min_length, field.max_length
        limits.append((f"min_length={low}", low is None or len(value) >= low))
        limits.append((f"max_length={high}", high is None or len(value) <= high))
        # The SDK matches from the start, the server searches: match() satisfies both.
        matches = field.regex is None or re.match(field.regex, value) is not None
        limits.append((f"regex={field.regex!r}", matches))
    for limit, held in limits:
        if not held:
            problem = f"default {value!r} of input {field.name} breaks {limit}"
            raise source.refuse(node, "default-outside", problem)


def describe_type(type_: ValueType) -> str:
    """The annotation in words, as in `Optional[list[int]]`."""
    name = type_.primitive.value
    if type_.is_list:
        name = f"list[{name}]"
    return f"Optional[{name}]" if type_.optional else name
