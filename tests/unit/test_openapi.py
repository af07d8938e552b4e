"""openapi.json follows the declared inputs, and the SDK sees the same."""

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
from openapi_spec_validator import validate

from generation.options import GenerationRequest
from inputs import flatten, option
from script.tools import openapi, signature
from training.config import TrainConfig

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / openapi.FILE).read_text(encoding="utf-8")
DOCUMENT = json.loads(TEXT)
COMPONENTS = {"TrainingInput": flatten(TrainConfig), "Input": flatten(GenerationRequest)}


def inspected(module: str, name: str):
    """The SDK's own view of a target, which comes from importing it."""
    from cog._inspector import create_predictor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # predict() and BasePredictor
        return create_predictor(module, name)


def test_the_committed_document_is_current_and_valid():
    assert openapi.updated(TEXT, COMPONENTS, DOCUMENT["info"]["version"]) == TEXT
    validate(DOCUMENT)


@pytest.mark.parametrize(
    ("module", "name", "component"),
    [("predict", "Predictor", "Input"), ("train", "train", "TrainingInput")],
)
def test_the_sdk_sees_the_same_inputs(module, name, component):
    theirs = inspected(module, name).inputs
    properties = DOCUMENT["components"]["schemas"][component]["properties"]
    expected = signature.parameters(COMPONENTS[component])
    assert list(theirs) == [parameter.name for parameter in expected]
    for parameter in expected:
        their, ours = theirs[parameter.name], parameter.keywords
        assert their.order == properties[parameter.name]["x-order"]
        assert their.default == ours.get("default")
        assert (their.ge, their.le) == (ours.get("ge"), ours.get("le"))
        assert their.description == ours["description"]
        assert (their.choices or []) == ours.get("choices", [])
        optional = parameter.annotation.startswith("Optional[")
        assert their.type.repetition.name.startswith("OPTIONAL") is optional
        if not their.choices:
            assert their.type.json_type().items() <= properties[parameter.name].items()


def test_the_sdk_sees_the_same_output():
    output = inspected("predict", "Predictor").output.json_type()
    assert DOCUMENT["components"]["schemas"]["Output"] == output


@dataclass(frozen=True)
class Choosing:
    size: str = option("a", "Size", choices=("a", "b"))


@dataclass(frozen=True)
class ChoosingOtherwise:
    size: str = option("a", "Size", choices=("a", "c"))


@dataclass(frozen=True)
class Clashing:
    Status: str = option("a", "Status", choices=("a", "b"))


def test_inputs_of_one_name_have_the_same_choices():
    one, other = flatten(Choosing), flatten(ChoosingOtherwise)
    text = openapi.updated(TEXT, {"Input": one, "TrainingInput": one}, "1")
    schemas = json.loads(text)["components"]["schemas"]
    assert schemas["size"]["enum"] == ["a", "b"]
    assert "scheduler" not in schemas
    with pytest.raises(openapi.OpenapiError, match="size: there is another component"):
        openapi.updated(TEXT, {"Input": one, "TrainingInput": other}, "1")
    with pytest.raises(openapi.OpenapiError, match="Status: there is another component"):
        openapi.updated(TEXT, {"Input": flatten(Clashing), "TrainingInput": one}, "1")


def test_reading_the_document_needs_no_heavy_import():
    """script/predict starts through this; torch would cost it seconds."""
    code = "import sys, script.tools.openapi; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


VALIDATOR = jsonschema.Draft4Validator({**DOCUMENT, "$ref": "#/components/schemas/Input"})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prompt": "a large red circle on a blue background", "seed": 1},
        {"width": 128, "height": 128, "num_outputs": 4, "scheduler": "K_EULER"},
        {"num_inference_steps": 500, "guidance_scale": 0.5, "negative_prompt": ""},
    ],
)
def test_example_inputs_are_valid(given):
    VALIDATOR.validate(given)


@pytest.mark.parametrize(
    "given",
    [
        {"num_outputs": 17},
        {"num_outputs": 0},
        {"num_inference_steps": 501},
        {"guidance_scale": 51},
        {"scheduler": "nope"},
        {"seed": "1"},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": None},  # the server does not honour `nullable`: clients leave the key out
        {"prompt": 1},
    ],
)
def test_wrong_inputs_are_refused(given):
    assert not VALIDATOR.is_valid(given)
