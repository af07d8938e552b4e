"""The signatures that Cog reads: written from declarations, and literal."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import pytest

from generation.options import GenerationRequest
from inputs import REQUIRED, flatten, option
from script.tools.signature import (
    Parameter,
    SignatureError,
    parameters,
    read_signature,
    replace_signature,
)
from training.config import TrainConfig


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


@dataclass(frozen=True)
class Request:
    archive: Path = option(REQUIRED, "An archive")
    size: Size = option(Size.LARGE, "It's a size: 3 | 4")
    seed: int | None = option(None, "Seed", ge=0, le=2**32 - 1)
    scale: float = option(-0.5, "Scale", ge=-1, le=1e-6)
    token: str | None = option(None, "Token", secret=True)
    names: tuple[str, ...] = option(("a",), "Names")
    scales: tuple[float, ...] = option((), "Scales", ge=0, le=1)
    long: str = option("x0", "Long", choices=[f"x{k}" for k in range(20)])
    is_on: bool = option(True, "On")


TEXT = (
    "def target(\n    # script/sync: begin\n    old: int,\n    # script/sync: end\n) -> Path: ...\n"
)
WRITTEN = """\
def target(
    # script/sync: begin
    archive: Path = Input(description="An archive"),
    size: str = Input(
        default="large", description="It's a size: 3 | 4", choices=["small", "large"]
    ),
    seed: Optional[int] = Input(default=None, description="Seed", ge=0, le=4294967295),
    scale: float = Input(default=-0.5, description="Scale", ge=-1, le=1e-06),
    token: Optional[Secret] = Input(default=None, description="Token"),
    names: List[str] = Input(default=["a"], description="Names"),
    scales: List[float] = Input(default=[], description="Scales"),
    long: str = Input(
        default="x0",
        description="Long",
        choices=[
LONG
        ],
    ),
    is_on: bool = Input(default=True, description="On"),
    # script/sync: end
) -> Path: ...
""".replace("LONG", "\n".join(f'            "x{k}",' for k in range(20)))


def test_a_signature_is_written_and_read_again():
    wanted = parameters(flatten(Request))
    text = replace_signature(TEXT, "target.py", wanted)
    assert text == WRITTEN
    assert replace_signature(text, "target.py", wanted) == text
    assert read_signature(text, "target.py", "target") == wanted


@pytest.mark.parametrize(
    ("file", "function", "cls"),
    [("predict.py", "predict", GenerationRequest), ("train.py", "train", TrainConfig)],
)
def test_cog_reads_what_is_declared(file, function, cls):
    text = Path(file).read_text(encoding="utf-8")
    assert read_signature(text, file, function) == parameters(flatten(cls))
    # Of pathlib's class the server would make no file.
    assert "from cog import" in text
    assert "from pathlib import Path\n" not in text


@pytest.mark.parametrize("text", ["", TEXT + TEXT, TEXT.replace("begin", "end")])
def test_a_text_without_its_marks_is_refused(text):
    with pytest.raises(SignatureError, match=r"f\.py: put `# script/sync: begin` and"):
        replace_signature(text, "f.py", [])


@pytest.mark.parametrize("description", ['a "b"', "a\\b", "a\nb"])
def test_what_cog_would_garble_is_not_written(description):
    wanted = [Parameter("a", "str", {"description": description})]
    with pytest.raises(SignatureError, match="Cog reads no quotes"):
        replace_signature(TEXT, "f.py", wanted)


def read(parameter: str) -> list[Parameter]:
    return read_signature(f"def target({parameter}): ...", "f.py", "target")


@pytest.mark.parametrize(
    ("parameter", "keywords"),
    [
        ('a: str = Input(default="b", description="c")', {"default": "b", "description": "c"}),
        ('a: List[int] = Input(default=[1, -2], description="c")', {"default": [1, -2]}),
        ('a: str = Input(description="c", choices=["x, y", "z"])', {"choices": ["x, y", "z"]}),
        ('a: str = Input(description="c", choices=[\n "x",\n "y",\n])', {"choices": ["x", "y"]}),
    ],
)
def test_literals_are_read(parameter, keywords):
    ((found),) = read(parameter)
    assert found.keywords == {"description": "c", **keywords}


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("a: str", "every parameter of target needs `= Input"),
        ('a: str = "b"', "write `= Input"),
        ('a: str = Input("b", description="c")', "write `= Input"),
        ('a: str = cog.Input(description="c")', "write `= Input"),
        ('a = Input(description="c")', "Cog knows no type ''"),
        ('a: Literal["b"] = Input(description="c")', "Cog knows no type"),
        ("a: str = Input()", "there is no description"),
        ('a: int = Input(default=None, description="c")', "default=None for Optional"),
        ('a: int = Input(default=B, description="c")', "default is no plain literal"),
        ('a: int = Input(default=2 * 3, description="c")', "default is no plain literal"),
        ('a: int = Input(default=- 3, description="c")', "default is no plain literal"),
        ('a: int = Input(description="c", le=2**32)', "le is no plain literal"),
        ('a: int = Input(description="c", ge=(1))', "ge is no plain literal"),
        ('a: str = Input(description=("c"))', "description is no plain literal"),
        ('a: str = Input(description="c" "d")', "description is no plain literal"),
        ('a: str = Input(description=f"c")', "description is no plain literal"),
        ("a: str = Input(description='c')", "description is no plain literal"),
        (r'a: str = Input(description="c\n")', "description is no plain literal"),
        ('a: str = Input(description="c", choices=("b",))', "choices is no plain literal"),
        ('a: str = Input(description="c", choices=[*B])', "choices is no plain literal"),
        ('a: str = Input(description="c", choices=[B])', "choices is no plain literal"),
        ('a: str = Input(description="c", choices=["b" "d"])', "choices is no plain literal"),
        ('a: str = Input(description="c", **more)', "None is no plain literal"),
        ('a: str = Input(description="c", default_factory=list)', "default_factory is no plain"),
    ],
)
def test_what_cog_would_drop_is_refused(parameter, reason):
    with pytest.raises(SignatureError) as raised:
        read(parameter)
    assert reason in str(raised.value)
