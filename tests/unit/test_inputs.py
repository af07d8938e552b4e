"""How inputs are declared, listed, read from Cog's arguments and checked."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import pytest
from cog import Path as CogPath
from cog import Secret

from inputs import REQUIRED, check, flatten, from_inputs, grouped, option, repeated


class Size(StrEnum):
    SMALL = "small"
    LARGE = "large"


@dataclass(frozen=True)
class Sides:
    left: int = option(0, "Pixels on the left.", ge=0, le=64)
    top: int = option(0, "Pixels on top.", ge=0, le=64)
    right: int = option(0, "Pixels on the right.", ge=0, le=64)


@dataclass(frozen=True)
class Control:
    kind: str = option("none", "Kind of control {n}.", choices=("none", "edges"), name="")
    image: Path | None = option(None, "Image of control {n}.")
    is_map: bool = option(False, "Whether it is a map.")


@dataclass(frozen=True)
class Request:
    archive: Path = option(REQUIRED, "Archive.")
    prompt: str = option("a dog", "Text prompt.")
    size: Size = option(Size.LARGE, "Size.")
    seed: int | None = option(None, "Random seed.", ge=0, le=9)
    strength: float = option(0.5, "Strength.", ge=0)
    n_tokens: int = option(2, "Number of vectors.", le=8, name="num_new_tokens")
    names: tuple[str, ...] = option((), "Names.")
    scales: tuple[float, ...] = option((), "Scales.", ge=-1, le=1)
    token: str | None = option(None, "Token.", secret=True)
    sides: Sides = grouped("pad", Sides, order=("left", "right", "top"))
    controls: tuple[Control, ...] = repeated("control_{n}", Control, count=2)
    internal: int = 3  # no input


FILE = CogPath("a.zip")
REQUEST = Request(FILE)


def read(**values):
    return from_inputs(Request, {"archive": FILE, **values}, ValueError)


def refusal(**values):
    with pytest.raises(ValueError, match=" ") as raised:
        read(**values)
    return str(raised.value)


def test_inputs_are_listed_in_the_order_of_the_signature():
    entries = flatten(Request)
    assert [entry.name for entry in entries] == [
        *("archive", "prompt", "size", "seed", "strength", "num_new_tokens", "names", "scales"),
        *("token", "pad_left", "pad_right", "pad_top"),
        *("control_1", "control_1_image", "control_1_is_map"),
        *("control_2", "control_2_image", "control_2_is_map"),
    ]
    named = {entry.name: entry for entry in entries}
    assert named["archive"].default is REQUIRED
    assert named["size"].option.choices == ("small", "large")
    assert named["control_2"].option.description == "Kind of control 2."
    assert (named["seed"].type, named["seed"].is_optional, named["seed"].default) == (
        *(int, True, None),
    )
    assert (named["scales"].type, named["scales"].is_list) == (float, True)
    assert named["token"].option.secret


def test_defaults_fill_what_is_absent():
    assert read() == REQUEST
    assert REQUEST.controls == (Control(), Control())
    assert REQUEST.internal == 3


def test_values_become_those_of_the_fields():
    image = CogPath("b.png")
    request = read(
        size="small",
        seed=3.0,
        strength=1,
        num_new_tokens=4,
        names=["a"],
        scales=[1, 0.5],
        token=Secret("t"),
        pad_top=5.0,
        control_2="edges",
        control_2_image=image,
    )
    assert request == replace(
        REQUEST,
        size=Size.SMALL,
        seed=3,
        strength=1,
        n_tokens=4,
        names=("a",),
        scales=(1, 0.5),
        token="t",
        sides=Sides(top=5),
        controls=(Control(), Control("edges", image)),
    )
    assert type(request.seed) is type(request.sides.top) is int
    assert type(request.size) is Size


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("archive", "/etc/passwd", "archive is '/etc/passwd'; it must be a URL or a data URI"),
        ("control_1_image", "a", "control_1_image is 'a'; it must be a URL or a data URI"),
        ("size", "huge", "size 'huge' is not known; choose one of small, large"),
        ("seed", 1.5, "seed is '1.5'; it must be of type int"),
        ("seed", "1", "seed is '1'; it must be of type int"),
        ("num_new_tokens", None, "num_new_tokens is 'None'; it must be of type int"),
        ("names", "a", "names is 'a'; it must be of type list of str"),
        ("names", ["a", 1], "names[1] is '1'; it must be of type str"),
        ("token", 1, "token is not of its type; it must be of type str"),
    ],
)
def test_what_is_of_another_type_is_refused(name, value, message):
    assert refusal(**{name: value}) == message


def test_an_unknown_name_is_an_error_of_the_program():
    with pytest.raises(TypeError, match="Request has no input named left, sead"):
        read(sead=1, left=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 10}, "seed is 10; it must be from 0 to 9"),
        ({"seed": math.nan}, "seed is nan; it must be from 0 to 9"),
        ({"strength": -0.5}, "strength is -0.5; it must be at least 0"),
        ({"strength": math.nan}, "strength is nan; it must be at least 0"),
        ({"n_tokens": 9}, "num_new_tokens is 9; it must be at most 8"),
        ({"scales": (0, 2)}, "scales[1] is 2; it must be from -1 to 1"),
        ({"size": "huge"}, "size 'huge' is not known; choose one of small, large"),
        ({"sides": Sides(right=65)}, "pad_right is 65; it must be from 0 to 64"),
        (
            {"controls": (Control(), Control("depth"))},
            "control_2 'depth' is not known; choose one of none, edges",
        ),
    ],
)
def test_a_value_outside_its_range_or_choices_is_refused(change, message):
    with pytest.raises(ValueError, match=" ") as raised:
        check(replace(REQUEST, **change), ValueError)
    assert str(raised.value) == message


def test_values_at_their_limits_are_accepted():
    check(replace(REQUEST, seed=9, strength=1e9, scales=(-1, 1), n_tokens=-5), ValueError)
    check(replace(REQUEST, size="small", controls=(Control("edges"),)), ValueError)


def test_secrets_are_not_shown():
    assert "hush" not in repr(replace(REQUEST, token="hush"))


def test_declaring_imports_nothing_heavy():
    code = "import sys, inputs; sys.exit(bool({'torch', 'pydantic', 'cog'} & sys.modules.keys()))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
