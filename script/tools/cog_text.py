"""One source file as Cog's parser sees it: syntax tree, original text, names, literals.

The tree alone does not tell parentheses, comments, escapes or joined strings apart, and Cog's
parser trips over exactly those, so every literal is also checked against its text.
"""

import ast
import io
import math
import re
import tokenize
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from script.tools.cog_model import Scalar
from script.tools.cog_rules import SchemaError

Literal = Scalar | None | list["Literal"] | dict["Literal", "Literal"]
Position = tuple[int, int]  # line from 1, column in characters from 0

NUMBER = re.compile(r"-?(\d+(_\d+)*(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
DICT_VIEW = re.compile(r"list\((\w+)\.(keys|values)\(\)\)")
MUTATORS = frozenset(
    (
        *("append", "extend", "insert", "remove", "reverse", "sort"),
        *("clear", "pop", "popitem", "setdefault", "update", "add"),
    )
)
_LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
_OWN_SCOPE = (
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Lambda,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
)


class SourceFile:
    """Text and tree of one file, and the questions that the reader asks of them."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.lines = text.split("\n")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                self.tree = ast.parse(text, path)
                # ast.parse alone lets a repeated keyword or parameter pass.
                compile(self.tree, path, "exec", dont_inherit=True)
        except SyntaxError as error:
            line = error.lineno or 1
            raise SchemaError(path, line, self._line(line), "syntax", error.msg) from error
        self._tokens, self._comments = _tokens(text)
        self._starts = [start for start, _ in self._tokens]
        self.bindings = scope_bindings(self.tree.body)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Global):
                self.bindings.update(node.names)
        self.imports = _imports(self.tree)
        self._constants = _constants(self.tree)

    def refuse(self, node: ast.AST, rule: str, problem: str) -> SchemaError:
        line = getattr(node, "lineno", 1)
        return SchemaError(self.path, line, self._line(line), rule, problem)

    def text_of(self, node: ast.expr) -> str:
        (first, left), (last, right) = self._span(node)
        if first == last:
            return self.lines[first - 1][left:right]
        middle = self.lines[first : last - 1]
        return "\n".join([self.lines[first - 1][left:], *middle, self.lines[last - 1][:right]])

    def check_plain(self, node: ast.expr) -> None:
        """Refuse parentheses around the expression, and comments or continuations inside it."""
        self.check_bare(node)
        start, end = self._span(node)
        if any(start < comment < end for comment in self._comments):
            raise self.refuse(node, "comment-inside", "there is a comment inside the value")
        if not isinstance(node, ast.Constant) and "\\\n" in self.text_of(node):
            raise self.refuse(node, "comment-inside", "a line continuation is inside the value")

    def check_bare(self, node: ast.expr) -> None:
        """Refuse parentheses around the expression."""
        start, end = self._span(node)
        here = bisect_left(self._starts, start)
        after = bisect_left(self._starts, end)
        # Call parentheses do not count: nobody asks about the sole argument of a call.
        if self._tokens[here - 1][1] == "(" and self._tokens[after][1] == ")":
            raise self.refuse(node, "parenthesised", f"({self.text_of(node)}) is in parentheses")

    def origin(self, name: str) -> tuple[str, str] | None:
        """(module, original name) of a name bound once, by a `from … import` at the top level."""
        return self.imports.get(name) if self.bindings[name] == 1 else None

    def constant(self, node: ast.Name, rule: str) -> ast.expr:
        """The literal behind a module-level name."""
        name = node.id
        if name not in self._constants:
            problem = f"{name} is not bound to a literal at the top level of this file"
            raise self.refuse(node, rule, problem)
        if self.bindings[name] != 1:
            raise self.refuse(node, "name-rebound", f"{name} is bound or changed more than once")
        return self._constants[name]

    def literal(self, node: ast.expr, rule: str) -> Literal:
        """The value of a literal; `rule` is broken when it is not one."""
        self.check_plain(node)
        match node:
            case ast.Constant(value=bool() | None as value):
                return value
            case ast.Constant(value=str()):
                return self._string(node)
            case ast.Constant(value=int() | float()):
                return self._number(node)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float())):
                return self._number(node)
            case ast.List(elts=elements):
                return [self.literal(element, rule) for element in elements]
            case _:
                raise self.refuse(node, rule, f"{self.text_of(node)} is not a literal")

    def string(self, node: ast.expr, rule: str) -> str:
        """A string literal, or a module-level name of one."""
        if isinstance(node, ast.Name):
            self.check_plain(node)
            node = self.constant(node, rule)
        value = self.literal(node, rule)
        if not isinstance(value, str):
            raise self.refuse(node, rule, f"{self.text_of(node)} is not a string")
        return value

    def choices(self, node: ast.expr) -> list[Literal]:
        """The elements of a `choices=` expression."""
        rule = "choices-not-literal"
        self.check_plain(node)
        match node:
            case ast.List():
                elements = node.elts
            case ast.Name():
                bound = self.constant(node, rule)
                self.check_plain(bound)
                if not isinstance(bound, ast.List | ast.Tuple):
                    raise self.refuse(node, rule, f"{node.id} is not a list of literals")
                elements = bound.elts
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return [*self.choices(left), *self.choices(right)]
            case ast.Call():
                elements = self._dict_view(node)
            case _:
                raise self.refuse(node, rule, f"choices={self.text_of(node)} is not a literal")
        return [self.literal(element, rule) for element in elements]

    def _dict_view(self, node: ast.Call) -> list[ast.expr]:
        """`list(D.keys())` or `list(D.values())` of a dict whose every entry is a literal."""
        rule = "choices-not-literal"
        text = self.text_of(node)
        match node.args, DICT_VIEW.fullmatch(text):
            case [ast.Call(func=ast.Attribute(value=ast.Name() as name))], re.Match() as view:
                bound = self.constant(name, rule)
            case _:
                raise self.refuse(node, rule, f"choices={text} is not a literal")
        if not isinstance(bound, ast.Dict):
            raise self.refuse(node, rule, f"{name.id} is not a dict literal")
        self.check_plain(bound)
        keys = [key for key in bound.keys if key is not None]
        if len(keys) < len(bound.keys):
            raise self.refuse(bound, rule, f"{name.id} takes in another dict with **")
        for entry in (*keys, *bound.values):
            self.literal(entry, rule)
        return keys if view[2] == "keys" else bound.values

    def _string(self, node: ast.Constant) -> str:
        text = self.text_of(node)
        if text[:3] in ('"""', "'''"):
            read: str | None = text[3:-3]
        elif text[:1] in ('"', "'"):
            read = text[1:-1]
        elif text[:2] in ('r"', "r'"):
            read = text[2:-1]
        else:
            read = None
        if read is None or read != node.value:
            raise self.refuse(node, "string-form", f"Cog reads {text} as {read!r}")
        return read

    def _number(self, node: ast.expr) -> int | float:
        text = self.text_of(node)
        value: int | float = ast.literal_eval(node)
        fits = math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63
        if not fits or NUMBER.fullmatch(text) is None:
            raise self.refuse(node, "number-form", f"{text} is not a plain decimal number")
        return value

    def _span(self, node: ast.expr) -> tuple[Position, Position]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = (node.lineno, self._column(node.lineno, node.col_offset))
        return start, (node.end_lineno, self._column(node.end_lineno, node.end_col_offset))

    def _column(self, line: int, offset: int) -> int:
        # ast counts UTF-8 bytes, tokenize counts characters.
        return len(self.lines[line - 1].encode()[:offset].decode())

    def _line(self, line: int) -> str:
        return self.lines[line - 1].strip() if line <= len(self.lines) else ""


def scope_bindings(body: list[ast.stmt]) -> Counter[str]:
    """How often each name is bound, deleted or changed in place by the statements of one scope."""
    found: Counter[str] = Counter()
    for node in _scope(body):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                found[name] += 1
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found[name] += 1
            case ast.ClassDef(name=name):
                found[name] += 1
            case ast.alias(name=name, asname=alias):
                found[alias or name.partition(".")[0]] += 1
            case ast.AugAssign(target=ast.Attribute(value=ast.Name(id=name))):
                found[name] += 1
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                found[name] += 1
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)):
                found[name] += method in MUTATORS
    return found


def _scope(body: list[ast.stmt]) -> Iterator[ast.AST]:
    stack: list[ast.AST] = list(body)
    while stack:
        node = stack.pop()
        yield node
        if not isinstance(node, _OWN_SCOPE):
            stack.extend(ast.iter_child_nodes(node))


def _tokens(text: str) -> tuple[list[tuple[Position, str]], list[Position]]:
    tokens: list[tuple[Position, str]] = []
    comments: list[Position] = []
    for token in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
        if token.type == tokenize.COMMENT:
            comments.append(token.start)
        elif token.type not in _LAYOUT:
            tokens.append((token.start, token.string))
    return tokens, comments


def _imports(tree: ast.Module) -> dict[str, tuple[str, str]]:
    return {
        alias.asname or alias.name: (statement.module or "", alias.name)
        for statement in tree.body
        if isinstance(statement, ast.ImportFrom) and statement.level == 0
        for alias in statement.names
    }


def _constants(tree: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value, simple=1):
                found[name] = value
    return found
