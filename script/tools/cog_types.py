"""Annotations: which Python types Cog reads as inputs and outputs."""

import ast

from script.tools.cog_model import (
    ListOutput,
    ObjectOutput,
    Output,
    OutputField,
    Primitive,
    ScalarOutput,
    ValueType,
)
from script.tools.cog_text import SourceFile, scope_bindings

BUILTINS = {
    "str": Primitive.STR,
    "int": Primitive.INT,
    "float": Primitive.FLOAT,
    "bool": Primitive.BOOL,
}
FROM_COG = {"Path": Primitive.PATH, "Secret": Primitive.SECRET}
ITERATORS = {
    "Iterator": ("typing", "collections.abc"),
    "ConcatenateIterator": ("cog",),
}


def read_value_type(source: SourceFile, node: ast.expr) -> ValueType:
    """`X`, `list[X]`, `Optional[...]` or `... | None`."""
    source.check_plain(node)
    inner = _optional_inner(source, node)
    if inner is not None:
        value = read_value_type(source, inner)
        if value.optional:
            raise _unsupported(source, node)
        return ValueType(value.primitive, value.is_list, optional=True)
    item = _list_item(source, node)
    if item is not None:
        return ValueType(_primitive(source, item), is_list=True, optional=False)
    return ValueType(_primitive(source, node), is_list=False, optional=False)


def read_output(source: SourceFile, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Output:
    """The return annotation of a target."""
    node = function.returns
    if node is None:
        raise source.refuse(function, "return-missing", f"{function.name}() has no return type")
    source.check_plain(node)
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=item) if name in ITERATORS:
            _check_origin(source, node, name, ITERATORS[name])
            output = ListOutput(_primitive(source, item), True, name == "ConcatenateIterator")
            if output.concatenate and output.item is not Primitive.STR:
                raise source.refuse(node, "return-unsupported", "only str can be concatenated")
            return output
        case ast.Name(id=name) if (model := _local_class(source, name)) is not None:
            return _read_model(source, model)
        case ast.Constant(value=None):
            raise source.refuse(node, "return-unsupported", "None is not an output")
    value = read_value_type(source, node)
    if value.optional or value.primitive is Primitive.SECRET:
        problem = f"{source.text_of(node)} is not an output"
        raise source.refuse(node, "return-unsupported", problem)
    if value.is_list:
        return ListOutput(value.primitive, iterator=False, concatenate=False)
    return ScalarOutput(value.primitive)


def _read_model(source: SourceFile, model: ast.ClassDef) -> ObjectOutput:
    match model.bases:
        case [ast.Name(id=base)] if source.origin(base) == ("cog", "BaseModel"):
            pass
        case _:
            problem = f"{model.name} must inherit from cog's BaseModel alone"
            raise source.refuse(model, "return-unsupported", problem)
    bindings = scope_bindings(model.body)
    fields = []
    for statement in model.body:
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=default):
                type_ = read_value_type(source, annotation)
                if default is not None:
                    source.literal(default, "default-not-literal")
                if bindings[name] != 1:
                    raise source.refuse(statement, "target-twice", f"{name} is defined twice")
                fields.append(OutputField(name, type_, default is None and not type_.optional))
            case ast.Expr(value=ast.Constant(value=str())) | ast.Pass():
                pass
            case _:
                problem = f"{model.name} holds more than annotated fields"
                raise source.refuse(statement, "return-unsupported", problem)
    return ObjectOutput(tuple(fields))


def _optional_inner(source: SourceFile, node: ast.expr) -> ast.expr | None:
    match node:
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            _check_origin(source, node, "Optional", ("typing",))
            return inner
        case ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None)):
            return inner
        case ast.BinOp(left=ast.Constant(value=None), op=ast.BitOr(), right=inner):
            return inner
    return None


def _list_item(source: SourceFile, node: ast.expr) -> ast.expr | None:
    match node:
        case ast.Subscript(value=ast.Name(id="list"), slice=item) if not source.bindings["list"]:
            return item
        case ast.Subscript(value=ast.Name(id="List"), slice=item):
            _check_origin(source, node, "List", ("typing",))
            return item
    return None


def _primitive(source: SourceFile, node: ast.expr) -> Primitive:
    source.check_plain(node)
    match node:
        case ast.Name(id=name) if name in BUILTINS and not source.bindings[name]:
            return BUILTINS[name]
        case ast.Name(id=name) if name in FROM_COG:
            _check_origin(source, node, name, ("cog",))
            return FROM_COG[name]
        case ast.Attribute() | ast.Constant(value=str()):
            problem = f"annotation {source.text_of(node)} is not a bare name"
            raise source.refuse(node, "annotation-form", problem)
    raise _unsupported(source, node)


def _check_origin(source: SourceFile, node: ast.expr, name: str, modules: tuple[str, ...]) -> None:
    if source.origin(name) not in [(module, name) for module in modules]:
        problem = f"{name} must come from `from {modules[0]} import {name}` and nothing else"
        raise source.refuse(node, "name-origin", problem)


def _local_class(source: SourceFile, name: str) -> ast.ClassDef | None:
    found = [
        statement
        for statement in source.tree.body
        if isinstance(statement, ast.ClassDef) and statement.name == name
    ]
    return found[0] if len(found) == 1 and source.bindings[name] == 1 else None


def _unsupported(source: SourceFile, node: ast.expr) -> Exception:
    problem = f"{source.text_of(node)} is not a supported type"
    return source.refuse(node, "annotation-unsupported", problem)
