"""Read predict.py or train.py as Cog's static parser does, without running it.

Facts about that parser were taken from replicate/cog, pkg/schema/python; the rules are in
cog_rules.py. Where Cog would refuse the source, or drop or alter a part of it in silence, this
reader raises SchemaError.
"""

import ast
import functools

from script.tools.cog_inputs import read_input
from script.tools.cog_model import InputField, ListOutput, Mode, Signature
from script.tools.cog_text import SourceFile, scope_bindings
from script.tools.cog_types import read_output

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.lru_cache(maxsize=8)
def read_signature(text: str, path: str, target: str, mode: Mode) -> Signature:
    """The signature of `target` in a file; `path` is only for messages."""
    source = SourceFile(path, text)
    definition = _definition(source, target)
    if mode is Mode.PREDICT:
        if not isinstance(definition, ast.ClassDef):
            raise source.refuse(definition, "target-kind", f"{target} is not a class")
        function = _method(source, definition)
        parameters = _without_self(source, function)
    else:
        if isinstance(definition, ast.ClassDef):
            raise source.refuse(definition, "target-kind", f"{target} is not a function")
        function = definition
        parameters = _ordinary(source, function)
    inputs = _inputs(source, function, parameters)
    output = read_output(source, function)
    streaming = any(_is_streaming(source, node) for node in function.decorator_list)
    if streaming and not (isinstance(output, ListOutput) and output.iterator):
        raise source.refuse(function, "streaming-output", f"{function.name}() is @streaming")
    return Signature(path, mode, inputs, output, streaming)


def _definition(source: SourceFile, target: str) -> ast.ClassDef | Function:
    found = [
        statement
        for statement in source.tree.body
        if isinstance(statement, ast.ClassDef | Function) and statement.name == target
    ]
    if not found:
        how = "imported" if target in source.imports else "not defined"
        raise source.refuse(source.tree, "target-missing", f"{target} is {how} in {source.path}")
    if source.bindings[target] != 1:
        raise source.refuse(found[0], "target-twice", f"{target} is bound more than once")
    return found[0]


def _method(source: SourceFile, definition: ast.ClassDef) -> Function:
    match definition.bases:
        case [ast.Name(id=base)] if source.origin(base) in (
            ("cog", "BasePredictor"),
            ("cog", "BaseRunner"),
        ):
            pass
        case _:
            problem = f"{definition.name} does not inherit from BasePredictor alone"
            raise source.refuse(definition, "target-base", problem)
    bound = scope_bindings(definition.body)
    if bound["run"] and bound["predict"]:
        problem = f"{definition.name} has both run and predict"
        raise source.refuse(definition, "run-and-predict", problem)
    methods = [
        statement
        for statement in definition.body
        if isinstance(statement, Function) and statement.name in ("run", "predict")
    ]
    if not methods:
        problem = f"{definition.name} defines neither run() nor predict()"
        raise source.refuse(definition, "method-missing", problem)
    if bound[methods[0].name] != 1:
        problem = f"{methods[0].name} is bound more than once in {definition.name}"
        raise source.refuse(methods[0], "target-twice", problem)
    return methods[0]


def _ordinary(source: SourceFile, function: Function) -> list[ast.arg]:
    arguments = function.args
    if arguments.posonlyargs or arguments.kwonlyargs or arguments.vararg or arguments.kwarg:
        problem = f"{function.name}() has *args, **kwargs, keyword-only or positional-only inputs"
        raise source.refuse(function, "parameter-kind", problem)
    return arguments.args


def _without_self(source: SourceFile, function: Function) -> list[ast.arg]:
    everything = _ordinary(source, function)
    has_default = len(function.args.defaults) >= len(everything)
    match everything:
        case [ast.arg(arg="self", annotation=None), *rest] if not has_default:
            return rest
    raise source.refuse(function, "self", f"{function.name}() does not start with a plain self")


def _inputs(
    source: SourceFile, function: Function, parameters: list[ast.arg]
) -> tuple[InputField, ...]:
    defaults = dict(zip(reversed(parameters), reversed(function.args.defaults), strict=False))
    return tuple(
        read_input(source, order, parameter, defaults.get(parameter))
        for order, parameter in enumerate(parameters)
    )


def _is_streaming(source: SourceFile, node: ast.expr) -> bool:
    callee = node.func if isinstance(node, ast.Call) else node
    return isinstance(callee, ast.Name) and source.origin(callee.id) == ("cog", "streaming")
