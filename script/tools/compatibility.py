"""Would a client of the old OpenAPI document break on the new one?"""

from collections.abc import Mapping

from script.tools.cog_model import Json

Object = Mapping[str, Json]
LOWER_BOUNDS = ("minimum", "minLength")
UPPER_BOUNDS = ("maximum", "maxLength")
TYPE_KEYS = ("type", "format", "items")
EXACT_KEYS = ("pattern", "x-cog-accept")


def breaking_changes(old: Object, new: Object) -> list[str]:
    """One sentence per change that an existing client can notice; empty when there is none."""
    found = [
        f"endpoint {path} was removed"
        for path in _object(old.get("paths"))
        if path not in _object(new.get("paths"))
    ]
    old_schemas, new_schemas = _schemas(old), _schemas(new)
    for component in ("Input", "TrainingInput"):
        if component in old_schemas and component in new_schemas:
            found += _inputs(component, old_schemas, new_schemas)
    for component in ("Output", "TrainingOutput"):
        before, after = old_schemas.get(component), new_schemas.get(component)
        if before is not None and after is not None and before != after:
            found.append(f"{component} changed from {before} to {after}")
    return found


def _inputs(component: str, old_schemas: Object, new_schemas: Object) -> list[str]:
    old, new = _object(old_schemas[component]), _object(new_schemas[component])
    before, after = _object(old.get("properties")), _object(new.get("properties"))
    found = []
    for name in before:
        label = f"{component}.{name}"
        if name in after:
            old_field = _resolved(_object(before[name]), old_schemas)
            new_field = _resolved(_object(after[name]), new_schemas)
            found += [f"{label}: {change}" for change in _field(old_field, new_field)]
        else:
            found.append(f"{label} was removed")
    newly_required = [name for name in _list(new.get("required")) if name not in _required(old)]
    return found + [f"{component}.{name} became required" for name in newly_required]


def _field(old: Object, new: Object) -> list[str]:
    found = [
        f"{key} changed from {old.get(key)!r} to {new.get(key)!r}"
        for key in TYPE_KEYS
        if old.get(key) != new.get(key)
    ]
    found += [
        f"{key} changed from {old.get(key)!r} to {new[key]!r}"
        for key in EXACT_KEYS
        if key in new and old.get(key) != new[key]
    ]
    for key in LOWER_BOUNDS + UPPER_BOUNDS:
        before, after = old.get(key), new.get(key)
        if not isinstance(after, int | float):
            continue
        if not isinstance(before, int | float):
            found.append(f"{key} {after} was added")
        elif (after > before) if key in LOWER_BOUNDS else (after < before):
            found.append(f"{key} tightened from {before} to {after}")
    if "enum" in new and "enum" not in old:
        found.append("choices were added")
    elif "enum" in new:
        lost = [choice for choice in _list(old["enum"]) if choice not in _list(new["enum"])]
        found += [f"choice {choice!r} was lost" for choice in lost]
    if old.get("nullable") and not new.get("nullable"):
        found.append("is no longer nullable")
    return found


def _resolved(field: Object, schemas: Object) -> Object:
    """The field with the enumeration it refers to merged in."""
    merged: dict[str, Json] = {}
    for part in _list(field.get("allOf")):
        reference = _object(part).get("$ref")
        assert isinstance(reference, str), part
        merged |= _object(schemas[reference.rpartition("/")[2]])
    return {**merged, **field}


def _schemas(document: Object) -> Object:
    return _object(_object(document.get("components")).get("schemas"))


def _required(component: Object) -> list[Json]:
    return _list(component.get("required"))


def _object(value: Json | Object) -> Object:
    return value if isinstance(value, Mapping) else {}


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []
