"""Each change that would break a client is found, and the others are not."""

# ruff: noqa: E501  one case per line reads better than a wrapped one

import copy

import pytest

from script.tools.compatibility import breaking_changes

DOCUMENT = {
    "paths": {"/predictions": {}},
    "components": {
        "schemas": {
            "Input": {
                "required": ["image"],
                "properties": {
                    "prompt": {"type": "string", "minLength": 1, "maxLength": 9, "default": "a"},
                    "image": {"type": "string", "format": "uri", "x-cog-accept": "image/*"},
                    "steps": {"type": "integer", "minimum": 1, "maximum": 9, "nullable": True},
                    "sizes": {"type": "array", "items": {"type": "integer"}},
                    "scheduler": {"allOf": [{"$ref": "#/components/schemas/scheduler"}]},
                },
            },
            "scheduler": {"type": "string", "enum": ["DDIM", "PNDM"]},
            "Output": {"type": "array", "items": {"type": "string", "format": "uri"}},
        }
    },
}


def changed(edit):
    document = copy.deepcopy(DOCUMENT)
    schemas = document["components"]["schemas"]
    edit(document, schemas, schemas["Input"], schemas["Input"]["properties"])
    return document


BREAKING = [
    ("Input.prompt was removed", lambda d, s, i, p: p.pop("prompt")),
    ("Input.steps: type changed from 'integer' to 'number'", lambda d, s, i, p: p["steps"].update(type="number")),
    ("Input.image: format changed from 'uri' to None", lambda d, s, i, p: p["image"].pop("format")),
    ("Input.sizes: items changed", lambda d, s, i, p: p["sizes"].update(items={"type": "string"})),
    ("Input.steps: minimum tightened from 1 to 2", lambda d, s, i, p: p["steps"].update(minimum=2)),
    ("Input.steps: maximum tightened from 9 to 8", lambda d, s, i, p: p["steps"].update(maximum=8)),
    ("Input.prompt: minLength tightened from 1 to 2", lambda d, s, i, p: p["prompt"].update(minLength=2)),
    ("Input.prompt: maxLength tightened from 9 to 8", lambda d, s, i, p: p["prompt"].update(maxLength=8)),
    ("Input.image: maxLength 9 was added", lambda d, s, i, p: p["image"].update(maxLength=9)),
    ("Input.prompt: pattern changed from None to 'a'", lambda d, s, i, p: p["prompt"].update(pattern="a")),
    ("Input.image: x-cog-accept changed", lambda d, s, i, p: p["image"].update({"x-cog-accept": "image/png"})),
    ("Input.scheduler: choice 'PNDM' was lost", lambda d, s, i, p: s["scheduler"].update(enum=["DDIM"])),
    ("Input.prompt: choices were added", lambda d, s, i, p: p["prompt"].update(enum=["a"])),
    ("Input.prompt became required", lambda d, s, i, p: i["required"].append("prompt")),
    ("Input.mask became required", lambda d, s, i, p: (p.update(mask={"type": "string"}), i["required"].append("mask"))),
    ("Input.steps: is no longer nullable", lambda d, s, i, p: p["steps"].pop("nullable")),
    ("Output changed from", lambda d, s, i, p: s["Output"].update(items={"type": "string"})),
    ("endpoint /predictions was removed", lambda d, s, i, p: d["paths"].clear()),
]  # fmt: skip


@pytest.mark.parametrize(("message", "edit"), BREAKING)
def test_breaking_changes_are_found(message, edit):
    (found,) = breaking_changes(DOCUMENT, changed(edit))
    assert found.startswith(message)


HARMLESS = [
    lambda d, s, i, p: None,
    lambda d, s, i, p: p.update(mask={"type": "string"}),
    lambda d, s, i, p: i.pop("required"),
    lambda d, s, i, p: p["steps"].update(minimum=0, maximum=10),
    lambda d, s, i, p: p["steps"].pop("maximum"),
    lambda d, s, i, p: s["scheduler"]["enum"].insert(0, "K_EULER"),
    lambda d, s, i, p: p.update(scheduler={"type": "string"}),
    lambda d, s, i, p: p["prompt"].update(default="b", description="new", nullable=True),
    lambda d, s, i, p: p["image"].pop("x-cog-accept"),
    lambda d, s, i, p: d["paths"].update({"/trainings": {}}),
    lambda d, s, i, p: s.update(TrainingInput={"required": ["x"], "properties": {"x": {}}}),
]


@pytest.mark.parametrize("edit", HARMLESS)
def test_harmless_changes_are_not_reported(edit):
    assert breaking_changes(DOCUMENT, changed(edit)) == []


def test_training_inputs_are_compared_too():
    old = {"components": {"schemas": {"TrainingInput": {"properties": {"x": {}}}}}}
    new = {"components": {"schemas": {"TrainingInput": {"properties": {}}}}}
    assert breaking_changes(old, new) == ["TrainingInput.x was removed"]
