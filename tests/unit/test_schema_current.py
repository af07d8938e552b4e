"""openapi.json is the document of this very predict.py, and the SDK sees the same inputs."""

import json
import subprocess
import sys
import warnings

import jsonschema
import pytest
from openapi_spec_validator import validate

from script.tools import schema
from script.tools.cog_model import InputField, Signature
from script.tools.openapi import dump, output_schema, value_schema

SDK_LIMITS = ("description", "ge", "le", "min_length", "max_length", "regex")


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((schema.ROOT / "openapi.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def predict() -> Signature:
    signature, _ = schema.signatures(schema.ROOT)
    return signature


def test_committed_document_is_current():
    committed = (schema.ROOT / "openapi.json").read_text(encoding="utf-8")
    assert dump(schema.document(schema.ROOT)) == committed, "remedy: run script/schema"


def test_committed_document_is_valid_openapi(committed):
    validate(committed)


def inspected(module: str, name: str):
    """The SDK's own view of a target, which comes from importing it."""
    from cog._inspector import create_predictor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # predict() and BasePredictor
        return create_predictor(module, name)


def assert_same_field(ours: InputField, theirs) -> None:
    assert (ours.name, ours.order) == (theirs.name, theirs.order)
    assert value_schema(ours.type) == theirs.type.json_type()
    assert ours.type.optional == theirs.type.repetition.name.startswith("OPTIONAL")
    assert ours.default == theirs.default
    for limit in SDK_LIMITS:
        assert getattr(ours, limit) == getattr(theirs, limit), (ours.name, limit)
    assert list(ours.choices) == (theirs.choices or [])
    assert ours.deprecated == bool(theirs.deprecated)


def test_the_sdk_sees_the_same_inputs_and_output(predict):
    theirs = inspected("predict", "Predictor")
    assert [field.name for field in predict.inputs] == list(theirs.inputs)
    for field in predict.inputs:
        assert_same_field(field, theirs.inputs[field.name])
    assert output_schema(predict.output) | {"title": "Output"} == theirs.output.json_type()


def test_reading_the_predictor_needs_no_heavy_import(predict):
    """script/serve and script/predict start through this; torch would cost them seconds."""
    code = "import sys, script.tools.schema; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=schema.ROOT).returncode == 0


def input_validator(document: dict) -> jsonschema.Draft4Validator:
    return jsonschema.Draft4Validator({**document, "$ref": "#/components/schemas/Input"})


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prompt": "a large red circle on a blue background", "seed": 1},
        {"width": 128, "height": 128, "num_outputs": 4, "scheduler": "K_EULER"},
        {"num_inference_steps": 500, "guidance_scale": 0.5, "negative_prompt": ""},
    ],
)
def test_example_inputs_are_valid(committed, given):
    input_validator(committed).validate(given)


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
def test_wrong_inputs_are_refused(committed, given):
    assert not input_validator(committed).is_valid(given)
