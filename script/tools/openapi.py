"""Signatures → the OpenAPI document that `cog build` writes, key for key."""

import json
from collections.abc import Iterable

from script.tools.cog_model import (
    InputField,
    Json,
    ListOutput,
    Mode,
    ObjectOutput,
    Output,
    Primitive,
    ScalarOutput,
    Signature,
    ValueType,
)
from script.tools.cog_rules import SchemaError

REF = "#/components/schemas/"
PRIMITIVES: dict[Primitive, dict[str, Json]] = {
    Primitive.STR: {"type": "string"},
    Primitive.INT: {"type": "integer"},
    Primitive.FLOAT: {"type": "number"},
    Primitive.BOOL: {"type": "boolean"},
    Primitive.PATH: {"type": "string", "format": "uri"},
    Primitive.SECRET: {
        "type": "string",
        "format": "password",
        "writeOnly": True,
        "x-cog-secret": True,
    },
}


def build_document(predict: Signature, train: Signature | None, version: str) -> dict[str, Json]:
    """The whole document; prediction's components win where both define one, as in Cog."""
    signatures = [predict] if train is None else [train, predict]
    if train is not None:
        _check_shared_choices(predict, train)
    paths: dict[str, Json] = {
        "/": {"get": _operation("Root", "root__get", {})},
        "/health-check": {"get": _operation("Healthcheck", "healthcheck_health_check_get", {})},
    }
    schemas: dict[str, Json] = {}
    for signature in signatures:
        paths |= _paths(signature)
        schemas |= _components(signature)
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def dump(document: dict[str, Json]) -> str:
    """The committed form: sorted, so that a change of the source is a change of few lines."""
    return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def title_case(name: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _names(mode: Mode) -> tuple[str, str]:
    """(prefix of component names, plural of the endpoint)."""
    return ("", "prediction") if mode is Mode.PREDICT else ("Training", "training")


def _paths(signature: Signature) -> dict[str, Json]:
    prefix, noun = _names(signature.mode)
    verb = signature.mode.value
    request = (prefix or "Prediction") + "Request"
    response = (prefix or "Prediction") + "Response"
    main: dict[str, Json] = {
        **_operation(verb.capitalize(), f"{verb}_{noun}s_post", {"$ref": REF + response}),
        "description": f"Run a single {noun} on the model",
        "requestBody": {"content": {"application/json": {"schema": {"$ref": REF + request}}}},
    }
    if signature.streaming:
        main["x-cog-streaming"] = True
    parameter = f"{noun}_id"
    cancel: dict[str, Json] = {
        **_operation("Cancel", f"cancel_{noun}s__{parameter}__cancel_post", {}),
        "parameters": [
            {
                "in": "path",
                "name": parameter,
                "required": True,
                "schema": {"title": title_case(parameter), "type": "string"},
            }
        ],
    }
    for operation in (main, cancel):
        responses = operation["responses"]
        assert isinstance(responses, dict)
        schema: dict[str, Json] = {"$ref": REF + "HTTPValidationError"}
        responses["422"] = _response("Validation Error", schema)
    return {f"/{noun}s": {"post": main}, f"/{noun}s/{{{parameter}}}/cancel": {"post": cancel}}


def _operation(summary: str, name: str, schema: dict[str, Json]) -> dict[str, Json]:
    responses: dict[str, Json] = {"200": _response("Successful Response", schema)}
    return {"summary": summary, "operationId": name, "responses": responses}


def _response(description: str, schema: dict[str, Json]) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _components(signature: Signature) -> dict[str, Json]:
    prefix, _ = _names(signature.mode)
    noun = prefix or "Prediction"
    own: dict[str, Json] = {
        prefix + "Input": _input_component(prefix + "Input", signature.inputs),
        prefix + "Output": {**output_schema(signature.output), "title": "Output"},
        noun + "Request": _object(
            noun + "Request",
            {"id": _string("Id"), "input": {"$ref": REF + prefix + "Input"}},
        ),
        noun + "Response": _response_component(noun + "Response", prefix),
        **_fixed_components(),
    }
    for field in signature.inputs:
        if not field.choices:
            continue
        if field.name in own:
            source, problem = field.name, f"input {field.name} has choices"
            raise SchemaError(signature.path, field.line, source, "component-clash", problem)
        own[field.name] = {
            "title": field.name,
            "description": "An enumeration.",
            "enum": list(field.choices),
            "type": PRIMITIVES[field.type.primitive]["type"],
        }
    return own


def _input_component(title: str, fields: Iterable[InputField]) -> Json:
    properties: dict[str, Json] = {}
    required: list[Json] = []
    for field in fields:
        properties[field.name] = input_schema(field)
        if field.required:
            required.append(field.name)
    component = _object(title, properties)
    return {**component, "required": required} if required else component


def input_schema(field: InputField) -> dict[str, Json]:
    """One property of the Input component."""
    schema: dict[str, Json] = {"x-order": field.order, "description": field.description}
    if field.choices:
        schema["allOf"] = [{"$ref": REF + field.name}]
    else:
        schema |= {"title": title_case(field.name), **value_schema(field.type)}
    if field.type.optional:
        schema["nullable"] = True
    if not field.required:
        default = field.default
        if isinstance(default, list):
            schema["default"] = [_number(item) for item in default]
        else:
            schema["default"] = _number(default)
    optional: dict[str, Json] = {
        "minimum": _number(field.ge),
        "maximum": _number(field.le),
        "minLength": field.min_length,
        "maxLength": field.max_length,
        "pattern": field.regex,
        "x-cog-accept": field.accept,
        "deprecated": True if field.deprecated else None,
    }
    return schema | {key: value for key, value in optional.items() if value is not None}


def value_schema(type_: ValueType) -> dict[str, Json]:
    item = dict(PRIMITIVES[type_.primitive])
    return {"type": "array", "items": item} if type_.is_list else item


def output_schema(output: Output) -> dict[str, Json]:
    match output:
        case ScalarOutput(primitive):
            return dict(PRIMITIVES[primitive])
        case ListOutput(item, iterator, concatenate):
            schema: dict[str, Json] = {"type": "array", "items": dict(PRIMITIVES[item])}
            if iterator:
                schema["x-cog-array-type"] = "iterator"
            if concatenate:
                schema["x-cog-array-display"] = "concatenate"
            return schema
        case ObjectOutput(fields):
            properties: dict[str, Json] = {}
            for field in fields:
                nullable: dict[str, Json] = {"nullable": True} if field.type.optional else {}
                title: dict[str, Json] = {"title": title_case(field.name)}
                properties[field.name] = value_schema(field.type) | title | nullable
            required: list[Json] = [field.name for field in fields if field.required]
            component: dict[str, Json] = {"type": "object", "properties": properties}
            return {**component, "required": required} if required else component


def _number(value: Json) -> Json:
    # Go writes 1.0 as 1.
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e21:
        return int(value)
    return value


def _object(title: str, properties: dict[str, Json]) -> dict[str, Json]:
    return {"title": title, "type": "object", "properties": properties}


def _string(title: str, **more: Json) -> Json:
    return {"title": title, "type": "string", **more}


def _response_component(title: str, prefix: str) -> Json:
    times: dict[str, Json] = {
        name: _string(title_case(name), format="date-time")
        for name in ("created_at", "started_at", "completed_at")
    }
    texts: dict[str, Json] = {
        name: _string(title_case(name)) for name in ("id", "version", "status", "error", "logs")
    }
    properties: dict[str, Json] = {
        "input": {"$ref": REF + prefix + "Input"},
        "output": {"$ref": REF + prefix + "Output"},
        "metrics": {"title": "Metrics", "type": "object"},
    }
    return _object(title, properties | times | texts)


def _fixed_components() -> dict[str, Json]:
    location: Json = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    detail: Json = {
        "title": "Detail",
        "type": "array",
        "items": {"$ref": REF + "ValidationError"},
    }
    error = _object(
        "ValidationError",
        {
            "loc": {"title": "Location", "type": "array", "items": location},
            "msg": _string("Message"),
            "type": _string("Error Type"),
        },
    )
    return {
        "Status": {
            "title": "Status",
            "description": "An enumeration.",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
            "type": "string",
        },
        "HTTPValidationError": _object("HTTPValidationError", {"detail": detail}),
        "ValidationError": {**error, "required": ["loc", "msg", "type"]},
    }


def _check_shared_choices(predict: Signature, train: Signature) -> None:
    """Components live under the bare input name, and the prediction's wins the merge."""
    choices = {field.name: field.choices for field in predict.inputs if field.choices}
    for field in train.inputs:
        other = choices.get(field.name, field.choices)
        if field.choices and other != field.choices:
            problem = f"choices of input {field.name} differ from those in {predict.path}"
            raise SchemaError(train.path, field.line, field.name, "shared-choices", problem)
