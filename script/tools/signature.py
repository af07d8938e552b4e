"""The parameter lists of predict.py and train.py, in the literal form that Cog's parser reads.

`cog build` reads the text without running it, and silently drops or garbles what it cannot read:
expressions, imported names, adjacent strings, escapes.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from inputs import REQUIRED, Input

LINE_LENGTH = 100
BEGIN, END = "# script/sync: begin", "# script/sync: end"
SCALARS = {"str", "int", "float", "bool", "Path", "Secret"}
KEYWORDS = {"default", "description", "ge", "le", "choices"}


class SignatureError(Exception):
    """The text or an input is not as Cog needs it; the message says where and what to do."""


@dataclass(frozen=True)
class Parameter:
    """One parameter as Cog reads it."""

    name: str
    annotation: str
    keywords: dict[str, object]  # of Input(...)


def parameters(inputs: Iterable[Input]) -> list[Parameter]:
    """Return what the signature has to say of the inputs."""
    return [Parameter(entry.name, _annotation(entry), _keywords(entry)) for entry in inputs]


def _annotation(entry: Input) -> str:
    scalar = "Secret" if entry.option.secret else entry.type.__name__
    scalar = scalar if scalar in SCALARS else "str"  # a StrEnum
    if entry.is_list:
        scalar = f"List[{scalar}]"
    return f"Optional[{scalar}]" if entry.is_optional else scalar


def _keywords(entry: Input) -> dict[str, object]:
    option, keywords = entry.option, dict[str, object]()
    if entry.default is not REQUIRED:
        default = entry.default
        keywords["default"] = list(default) if isinstance(default, tuple) else _plain(default)
    keywords["description"] = option.description
    if not entry.is_list:  # Cog has no ranges for elements
        keywords |= {k: v for k, v in (("ge", option.ge), ("le", option.le)) if v is not None}
    return keywords | ({"choices": list(option.choices)} if option.choices else {})


def _plain(value: object) -> object:
    return str(value) if isinstance(value, str) else value  # a StrEnum's value


def replace_signature(text: str, file: str, wanted: Iterable[Parameter]) -> str:
    """Return the file's text with the parameters between its two marks."""
    lines = text.split("\n")
    marks = [k for k, line in enumerate(lines) if line.strip() in (BEGIN, END)]
    if [lines[k].strip() for k in marks] != [BEGIN, END]:
        raise SignatureError(f"{file}: put `{BEGIN}` and `{END}` once among the parameters")
    begin, end = marks
    indent = " " * (len(lines[begin]) - len(lines[begin].lstrip()))
    written = [indent + line for parameter in wanted for line in _lines(parameter, len(indent))]
    return "\n".join([*lines[: begin + 1], *written, *lines[end:]])


def _lines(parameter: Parameter, indent: int) -> list[str]:
    """Return the parameter as ruff formats it: in one line, in three, or one for each argument."""
    head = f"{parameter.name}: {parameter.annotation} = Input("
    arguments = ", ".join(f"{name}={_literal(v)}" for name, v in parameter.keywords.items())
    if indent + len(f"{head}{arguments}),") <= LINE_LENGTH:
        return [f"{head}{arguments}),"]
    if indent + len(f"    {arguments}") <= LINE_LENGTH:
        return [head, f"    {arguments}", "),"]
    lines = [head]
    for name, value in parameter.keywords.items():
        line = f"    {name}={_literal(value)},"
        if isinstance(value, list) and indent + len(line) > LINE_LENGTH:
            lines += [f"    {name}=[", *(f"        {_literal(item)}," for item in value), "    ],"]
        else:
            lines.append(line)
    return [*lines, "),"]


def _literal(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if not isinstance(value, str):
        return repr(value)
    if not value.isprintable() or '"' in value or "\\" in value:
        raise SignatureError(f"{value!r}: Cog reads no quotes, backslashes or line breaks in texts")
    return f'"{value}"'


def read_signature(text: str, file: str, function: str) -> list[Parameter]:
    """Return the parameters of a function, as far as Cog's parser reads them: literals alone."""
    found = [
        node
        for node in ast.walk(ast.parse(text, file))
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    if len(found) != 1:
        raise SignatureError(f"{file}: there must be one function {function}")
    arguments = [a for a in found[0].args.args if a.arg != "self"]
    defaults = found[0].args.defaults
    if len(defaults) != len(arguments):
        raise SignatureError(f"{file}: every parameter of {function} needs `= Input(...)`")
    lines = text.encode().split(b"\n")
    return [_read(lines, file, *pair) for pair in zip(arguments, defaults, strict=True)]


def _read(lines: list[bytes], file: str, argument: ast.arg, value: ast.expr) -> Parameter:
    where = f"{file}:{argument.lineno}: {argument.arg}"
    annotation = "" if argument.annotation is None else ast.unparse(argument.annotation)
    scalar = annotation.removeprefix("Optional[").removeprefix("List[").rstrip("]")
    if scalar not in SCALARS:
        raise SignatureError(f"{where}: Cog knows no type {annotation!r}")
    if not isinstance(value, ast.Call) or ast.unparse(value.func) != "Input" or value.args:
        raise SignatureError(f"{where}: write `= Input(...)` with keyword arguments alone")
    keywords = {}
    for keyword in value.keywords:
        name, source = str(keyword.arg), _source(lines, keyword)
        if name not in KEYWORDS or not _is_literal(name, keyword.value, source):
            raise SignatureError(f"{where}: {name} is no plain literal, so Cog would not read it")
        keywords[name] = ast.literal_eval(keyword.value)
    if "description" not in keywords:
        raise SignatureError(f"{where}: there is no description")
    if keywords.get("default", 0) is None and not annotation.startswith("Optional["):
        raise SignatureError(f"{where}: Cog takes default=None for Optional types alone")
    return Parameter(argument.arg, annotation, keywords)


def _source(lines: list[bytes], node: ast.keyword) -> str:
    """Return the text of a node (ast.get_source_segment is slow)."""
    first, last = node.lineno - 1, (node.end_lineno or 0) - 1
    behind = len(lines[last]) - (node.end_col_offset or 0)
    text = b"\n".join(lines[first : last + 1])
    return text[node.col_offset : len(text) - behind].decode()


def _is_literal(name: str, node: ast.expr, source: str) -> bool:
    """Whether the source of a keyword is a literal that Cog reads."""
    try:
        wanted = f"{name}={_literal(ast.literal_eval(node))}"
    except (ValueError, SignatureError):
        return False
    if not isinstance(node, ast.List):
        return source == wanted
    tight = "".join(line.strip() for line in source.splitlines()).replace(",]", "]")
    return tight.replace(", ", ",") == wanted.replace(", ", ",")
