"""The strict reader: what it takes from a source, and what it refuses with which rule."""

# ruff: noqa: E501  one case per line reads better than a wrapped one

import re

import pytest

from script.tools.cog_model import InputField, Mode, Primitive, Signature
from script.tools.cog_rules import RULES, SchemaError
from script.tools.cog_source import read_signature
from script.tools.openapi import input_schema, output_schema

IMPORTS = """\
from typing import Iterator, List, Optional

from cog import BaseModel, BasePredictor, ConcatenateIterator, Input, Path, Secret, streaming
"""


def predictor(parameter: str, module: str = "", returns: str = "Path") -> str:
    """A predictor with one parameter; `module` stands above the class."""
    return (
        f"{IMPORTS}{module}\n\n"
        "class Predictor(BasePredictor):\n"
        f"    def predict(\n        self,\n        {parameter},\n    ) -> {returns}: ...\n"
    )


def described(annotation: str, *arguments: str) -> str:
    keywords = ", ".join([*arguments, 'description="d"'])
    return f"x: {annotation} = Input({keywords})"


def read(source: str, mode: Mode = Mode.PREDICT) -> Signature:
    target = "Predictor" if mode is Mode.PREDICT else "train"
    return read_signature(source, "predict.py", target, mode)


def one_input(source: str) -> InputField:
    (field,) = read(source).inputs
    return field


STR = {"title": "X", "type": "string"}
INT = {"title": "X", "type": "integer"}
NUM = {"title": "X", "type": "number"}
URI = {"title": "X", "type": "string", "format": "uri"}
AB = {"allOf": [{"$ref": "#/components/schemas/x"}]}

ACCEPTED: list[tuple[str, str, dict[str, object]]] = [
    ("", described("str"), STR),
    ("", described("str", 'default="cat"'), STR | {"default": "cat"}),
    ("", described("str", "default=''"), STR | {"default": ""}),
    ("", described("str", 'default="""two\nlines"""'), STR | {"default": "two\nlines"}),
    ("", described("str", 'default="größe", max_length=9'), STR | {"default": "größe", "maxLength": 9}),
    ("", described("int", "default=-10, ge=-1_000, le=1_000_000"), INT | {"default": -10, "minimum": -1000, "maximum": 1000000}),
    ("", described("int", "default=4294967295"), INT | {"default": 4294967295}),
    ("", described("float", "default=7.0, ge=0, le=1e2"), NUM | {"default": 7, "minimum": 0, "maximum": 100}),
    ("", described("float", "default=.5, le=2."), NUM | {"default": 0.5, "maximum": 2}),
    ("", described("bool", "default=True"), {"title": "X", "type": "boolean", "default": True}),
    ("", described("Path"), URI),
    ("", described("Path", 'accept="image/*"'), URI | {"x-cog-accept": "image/*"}),
    ("", described("Optional[Path]", "default=None"), URI | {"default": None, "nullable": True}),
    ("", described("int | None", "default=None"), INT | {"default": None, "nullable": True}),
    ("", described("None | int", "default=3"), INT | {"default": 3, "nullable": True}),
    ("", described("list[int]", "default=[1, 2]"), {"title": "X", "type": "array", "items": {"type": "integer"}, "default": [1, 2]}),
    ("", described("List[str]"), {"title": "X", "type": "array", "items": {"type": "string"}}),
    ("", described("Optional[List[Path]]", "default=None"), {"title": "X", "type": "array", "items": {"type": "string", "format": "uri"}, "default": None, "nullable": True}),
    ("", described("Optional[Secret]", "default=None"), {"title": "X", "type": "string", "format": "password", "writeOnly": True, "x-cog-secret": True, "default": None, "nullable": True}),
    ("", described("str", r'regex=r"^\d+$"'), STR | {"pattern": r"^\d+$"}),
    ("", described("str", "deprecated=True"), STR | {"deprecated": True}),
    ("", described("str", "deprecated=False"), STR),
    ("", described("str", 'choices=["a", "b"], default="b"'), AB | {"default": "b"}),
    ("C = ['a', 'b']", described("str", "choices=C"), AB),
    ("C = ('a', 'b')", described("str", "choices=C"), AB),
    ("from typing import Final\nC: Final = ['a', 'b']  # known names", described("str", "choices=C"), AB),
    ("C = ['a']", described("str", "choices=C + ['b']"), AB),
    ("C = {'a': 1, 'b': 2}", described("str", "choices=list(C.keys())"), AB),
    ("C = {1: 'a', 2: 'b'}", described("str", "choices=list(C.values())"), AB),
    ("C = [1, 2]", described("Optional[int]", "choices=C, default=None"), AB | {"default": None, "nullable": True}),
    ("D = 3", described("int", "default=D"), INT | {"default": 3}),
    ("D = 'd'", 'x: str = Input(description=D, default="é")', STR | {"default": "é"}),
    ("", 'x: str = Input(\n            # what it is\n            default="a",  # or b\n            description="d",\n        )', STR | {"default": "a"}),
]  # fmt: skip


@pytest.mark.parametrize(("module", "parameter", "expected"), ACCEPTED)
def test_accepted_inputs_give_cogs_fragment(module, parameter, expected):
    field = one_input(predictor(parameter, module))
    assert input_schema(field) == {"x-order": 0, "description": "d"} | expected


REFUSED_INPUTS: list[tuple[str, str, str]] = [
    # The four that a reader meets most often
    ("choices-not-literal", "from d import A, B\nC = {'a': A, 'b': B}", described("str", "choices=list(C.keys())")),
    ("default-none", "", described("int", "default=None")),
    ("default-not-literal", "from settings import STEPS", described("int", "default=STEPS")),
    ("description-form", "", 'x: str = Input(description=f"a {1}")'),
    # Defaults
    ("input-positional", "", "x: float = Input(0.7, description='d')"),
    ("default-none", "D = None", described("int", "default=D")),
    ("default-none", "", described("Secret", "default=None")),
    ("default-absent", "", described("Optional[int]")),
    ("default-not-literal", "import s", described("int", "default=s.STEPS")),
    ("default-not-literal", "", described("int", "default=int(3)")),
    ("default-not-literal", "", described("int", "default=2 * 3")),
    ("default-not-literal", "", described("int", "default=+5")),
    ("default-not-literal", "", described("list[int]", "default=(1, 2)")),
    ("default-not-literal", "if True:\n    D = 3", described("int", "default=D")),
    ("default-not-literal", "A = B = 3", described("int", "default=B")),
    ("default-not-literal", "D = 3", described("list[int]", "default=[D, 4]")),
    ("name-rebound", "D = 3\nD = max(4, 5)", described("int", "default=D")),
    ("name-rebound", "D = 3\ndef f():\n    global D", described("int", "default=D")),
    ("number-form", "", described("int", "default=- 5")),
    ("number-form", "", described("int", "default=0x10")),
    ("number-form", "", described("int", "default=99999999999999999999")),
    ("number-form", "", described("float", "default=1e999")),
    ("parenthesised", "", described("int", "default=(5)")),
    ("parenthesised", "D = (\n    3\n)", described("int", "default=D")),
    ("parenthesised", "", described("list[str]", 'default=["a", ("b")]')),
    ("comment-inside", "", described("list[str]", 'default=[\n"a",  # first\n"b"]')),
    ("comment-inside", "", described("list[str]", 'default=["a", \\\n"b"]')),
    ("string-form", "", described("str", 'default="a" "b"')),
    ("string-form", "", described("str", r'default="a\n"')),
    ("string-form", "", described("str", 'default=u"a"')),
    ("string-form", "", described("str", 'default=r"""a"""')),
    ("default-not-literal", "", described("str", 'default=f"a"')),
    ("default-type", "", described("int", "default=1.5")),
    ("default-type", "", described("int", "default=True")),
    ("default-type", "", described("str", "default=1")),
    ("default-type", "", described("list[int]", "default=1")),
    ("default-type", "", described("list[int]", 'default=["a"]')),
    ("default-type", "", described("Path", 'default="/etc/hostname"')),
    ("default-outside", "", described("int", "default=0, ge=1")),
    ("default-outside", "", described("float", "default=2.5, le=2")),
    ("default-outside", "", described("str", 'default="c", choices=["a", "b"]')),
    ("default-outside", "", described("str", 'default="abc", max_length=2')),
    ("default-outside", "", described("str", 'default="", min_length=1')),
    ("default-outside", "", described("str", 'default="abc", regex="[0-9]+"')),
    # Choices
    ("choices-not-literal", "", described("str", 'choices=("a", "b")')),
    ("choices-not-literal", "C = {'a': 1, 'b': 2}", described("str", "choices=C.keys()")),
    ("choices-not-literal", "C = {'a': 1, 'b': 2}", described("str", "choices=list(C)")),
    ("choices-not-literal", "C = {'a': 1, 'b': 2}", described("str", "choices=list((C.keys()))")),
    ("choices-not-literal", "C = {'a': int, 'b': 2}", described("str", "choices=list(C.keys())")),
    ("choices-not-literal", "B = {}\nC = {'a': 1, **B}", described("str", "choices=list(C.keys())")),
    ("choices-not-literal", "C = ['a', 'b']", described("str", "choices=sorted(C)")),
    ("choices-not-literal", "C = ['a', 'b']", described("str", "choices=[*C]")),
    ("choices-not-literal", "C = ['a', 'b']", described("str", "choices=[c for c in C]")),
    ("choices-not-literal", "A = ['a']\nC = A + ['b']", described("str", "choices=C")),
    ("choices-not-literal", "A = 'a'", described("str", 'choices=[A, "b"]')),
    ("choices-not-literal", "from d import C", described("str", "choices=C")),
    ("choices-not-literal", "C = {'a', 'b'}", described("str", "choices=C")),
    ("name-rebound", "C = ['a', 'b']\nC.append('c')", described("str", "choices=C")),
    ("name-rebound", "C = ['a', 'b']\nC += ['c']", described("str", "choices=C")),
    ("name-rebound", "C = {'a': 1, 'b': 2}\nC['c'] = 3", described("str", "choices=list(C.keys())")),
    ("comment-inside", "C = [\n    'a',  # first\n    'b',\n]", described("str", "choices=C")),
    ("choices-values", "", described("str", 'choices=["a"]')),
    ("choices-values", "", described("str", 'choices=["a", "a"]')),
    ("choices-values", "", described("str", "choices=[1, 2]")),
    ("choices-values", "", described("float", "choices=[1.0, 2.0]")),
    ("choices-values", "", described("bool", "choices=[True, False]")),
    ("choices-values", "", described("list[str]", 'choices=["a", "b"]')),
    ("choices-values", "", described("int", "choices=[1, 2], ge=1")),
    # Constraints
    ("constraint-not-literal", "LOW = 1", described("int", "ge=LOW")),
    ("constraint-not-literal", "", described("int", "le=2**32 - 1")),
    ("constraint-not-literal", "", described("int", "ge=True")),
    ("constraint-not-literal", "", described("int", "ge=None")),
    ("constraint-not-literal", "", described("str", "max_length=1.5")),
    ("constraint-not-literal", "", described("str", "min_length=-1")),
    ("constraint-not-literal", "R = 'a'", described("str", "regex=R")),
    ("constraint-not-literal", "", described("str", 'regex="["')),
    ("constraint-not-literal", "", described("str", "regex=1")),
    ("constraint-not-literal", "", described("str", "deprecated=1")),
    ("number-form", "", described("int", "le=0x10")),
    ("number-form", "", described("int", "le=9007199254740993")),
    ("constraint-type", "", described("str", "ge=1")),
    ("constraint-type", "", described("list[int]", "ge=1")),
    ("constraint-type", "", described("int", "max_length=1")),
    ("constraint-type", "", described("int", 'regex="a"')),
    ("constraint-type", "", described("str", 'accept="image/*"')),
    ("constraint-order", "", described("int", "ge=2, le=1")),
    ("constraint-order", "", described("str", "min_length=2, max_length=1")),
    # Descriptions
    ("description-missing", "", "x: str = Input()"),
    ("description-missing", "", 'x: str = Input(description=" ")'),
    ("parenthesised", "", 'x: str = Input(description=("d"))'),
    ("parenthesised", "", 'x: str = Input(description=(\n"a "\n"b"))'),
    ("string-form", "", 'x: str = Input(description="a " "b")'),
    ("string-form", "", r'x: str = Input(description="say \"a\"")'),
    ("description-form", "", 'x: str = Input(description="a" + "b")'),
    ("description-form", "from d import TEXT", "x: str = Input(description=TEXT)"),
    ("description-form", "", "x: str = Input(description=None)"),
    # Input itself
    ("input-missing", "", "x: str"),
    ("input-missing", "", 'x: str = "cat"'),
    ("input-not-in-place", "D = 1", "x: int = D"),
    ("input-not-in-place", "S = Input(description='d')", "x: str = S"),
    ("input-not-in-place", "class I:\n    x = Input(description='d')", "x: str = I.x"),
    ("input-not-in-place", "def f():\n    return Input(description='d')", "x: str = f()"),
    ("input-not-in-place", "import cog", "x: str = cog.Input(description='d')"),
    ("parenthesised", "", "x: str = (Input(description='d'))"),
    ("name-origin", "from dataclasses import field as Input", described("str")),
    ("input-keyword", "", described("str", "default_factory=str")),
    ("input-keyword", "", described("int", "gt=1")),
    ("input-keyword", "O = {}", "x: str = Input(description='d', **O)"),
    ("syntax", "", "x: str = Input(description='d', description='e')"),
    ("syntax", "", "x: str = Input(description='d'"),
    # Annotations
    ("annotation-missing", "", "x"),
    ("annotation-missing", "", "x=Input(description='d')"),
    ("name-origin", "from pathlib import Path", described("Path")),
    ("name-origin", "if True:\n    from cog import Path", described("Path")),
    ("name-origin", "class Path: ...", described("Path")),
    ("name-origin", "Optional = list", described("Optional[int]", "default=None")),
    ("annotation-form", "import cog", described("cog.Path")),
    ("annotation-form", "", described('"str"')),
    ("parenthesised", "", described("(str)")),
    ("comment-inside", "", described("Optional[  # maybe\nint]", "default=None")),
    ("annotation-unsupported", "from typing import Literal", described('Literal["a", "b"]')),
    ("annotation-unsupported", "from enum import Enum\nclass E(Enum):\n    A = 1", described("E")),
    ("annotation-unsupported", "from typing import Annotated", described('Annotated[str, "a"]')),
    ("annotation-unsupported", "Text = str", described("Text")),
    ("annotation-unsupported", "str = int", described("str")),
    ("annotation-unsupported", "from cog import Path as P", described("P")),
    ("annotation-unsupported", "", described("Path | str")),
    ("annotation-unsupported", "", described("int | str | None", "default=None")),
    ("annotation-unsupported", "", described("tuple[int, int]")),
    ("annotation-unsupported", "", described("list")),
    ("annotation-unsupported", "", described("dict")),
    ("annotation-unsupported", "", described("List[Optional[int]]")),
    ("annotation-unsupported", "", described("Optional[Optional[int]]", "default=None")),
    # Kinds of parameter
    ("parameter-kind", "", "*args"),
    ("parameter-kind", "", "**options"),
    ("parameter-kind", "", "*, x: str = Input(description='d')"),
    ("parameter-kind", "", "/, x: str = Input(description='d')"),
]  # fmt: skip

CLASS = IMPORTS + "class Predictor(BasePredictor):\n"
REFUSED_SOURCES: list[tuple[str, str]] = [
    ("target-missing", "from base import Predictor"),
    ("target-missing", "x = 1"),
    ("target-missing", f"if True:\n    {CLASS.splitlines()[-1]} ..."),
    ("target-twice", CLASS + "    def predict(self) -> Path: ...\n\nPredictor = 3"),
    ("target-kind", "def Predictor() -> str: ..."),
    ("target-base", "class Predictor:\n    def predict(self) -> str: ..."),
    ("target-base", "from base import Base\nclass Predictor(Base):\n    def predict(self) -> str: ..."),
    ("run-and-predict", CLASS + "    def run(self) -> Path: ...\n    predict = run"),
    ("run-and-predict", CLASS + "    def run(self) -> Path: ...\n    def predict(self) -> Path: ..."),
    ("method-missing", CLASS + "    def setup(self) -> None: ..."),
    ("method-missing", CLASS + "    if True:\n        def predict(self) -> Path: ..."),
    ("target-twice", CLASS + "    def predict(self) -> Path: ...\n    def predict(self) -> str: ..."),
    ("self", CLASS + "    def predict() -> Path: ..."),
    ("self", CLASS + "    def predict(self: object) -> Path: ..."),
    ("self", CLASS + "    @classmethod\n    def predict(cls) -> Path: ..."),
    ("return-missing", CLASS + "    def predict(self): ..."),
    ("return-unsupported", CLASS + "    def predict(self) -> None: ..."),
    ("return-unsupported", CLASS + "    def predict(self) -> Optional[Path]: ..."),
    ("return-unsupported", CLASS + "    def predict(self) -> Secret: ..."),
    ("return-unsupported", CLASS + "    def predict(self) -> ConcatenateIterator[int]: ..."),
    ("annotation-unsupported", CLASS + "    def predict(self) -> tuple[str, str]: ..."),
    ("streaming-output", CLASS + "    @streaming\n    def predict(self) -> Path: ..."),
    ("return-unsupported", "class Out:\n    a: str\n" + CLASS + "    def predict(self) -> Out: ..."),
    ("default-not-literal", CLASS + "    def predict(self) -> Out: ...\n\nclass Out(BaseModel):\n    a: str = str(1)"),
    ("syntax", "def"),
]  # fmt: skip

REFUSED = [
    *((rule, predictor(parameter, module)) for rule, module, parameter in REFUSED_INPUTS),
    *REFUSED_SOURCES,
]
# Tests of these two stand with the document, which is what they are about.
DOCUMENT_RULES = {"shared-choices", "component-clash"}


@pytest.mark.parametrize(("rule", "source"), REFUSED)
def test_refused_sources_name_their_rule(rule, source):
    with pytest.raises(SchemaError) as caught:
        read(source)
    assert caught.value.rule == rule, str(caught.value)


def test_every_rule_has_a_refused_source():
    assert {rule for rule, _ in REFUSED} | DOCUMENT_RULES == set(RULES)


def test_an_error_names_place_text_reason_and_remedy():
    with pytest.raises(SchemaError) as caught:
        read(predictor(described("int", "default=None")))
    assert re.fullmatch(
        r"predict\.py:9: input x defaults to None \[default-none\]\n"
        r"    x: int = Input\(default=None, description=\"d\"\),\n"
        r"  why: .+\n"
        r"  remedy: .+",
        str(caught.value),
    )


OUTPUTS = [
    ("Path", {"type": "string", "format": "uri"}),
    ("str", {"type": "string"}),
    ("List[Path]", {"type": "array", "items": {"type": "string", "format": "uri"}}),
    ("list[str]", {"type": "array", "items": {"type": "string"}}),
    ("Iterator[Path]", {"type": "array", "items": {"type": "string", "format": "uri"}, "x-cog-array-type": "iterator"}),
    ("ConcatenateIterator[str]", {"type": "array", "items": {"type": "string"}, "x-cog-array-type": "iterator", "x-cog-array-display": "concatenate"}),
    ("Out", {"type": "object", "required": ["weights_file"], "properties": {
        "weights_file": {"title": "Weights File", "type": "string", "format": "uri"},
        "note": {"title": "Note", "type": "string", "nullable": True},
        "steps": {"title": "Steps", "type": "integer"},
    }}),
]  # fmt: skip
OUT = '''
class Out(BaseModel):
    """What comes out."""

    weights_file: Path
    note: Optional[str]
    steps: int = 3
'''


@pytest.mark.parametrize(("returns", "expected"), OUTPUTS)
def test_outputs_give_cogs_fragment(returns, expected):
    signature = read(predictor(described("str"), module=OUT, returns=returns))
    assert output_schema(signature.output) == expected


def test_streaming_is_read_from_the_decorator():
    source = CLASS + "    @streaming\n    def predict(self) -> Iterator[str]: ..."
    assert read(source).streaming


def test_training_target_is_a_function_without_self():
    source = IMPORTS + f"def train({described('Path')}) -> Path: ..."
    (field,) = read(source, Mode.TRAIN).inputs
    assert (field.name, field.order, field.type.primitive) == ("x", 0, Primitive.PATH)
    with pytest.raises(SchemaError, match="target-kind"):
        read(IMPORTS + "class train:\n    def train(self) -> Path: ...", Mode.TRAIN)
