"""Markdown tables of inputs, for the README and docs/reference/inputs.md."""

from collections.abc import Iterable
from pathlib import Path

from inputs import REQUIRED, Input


def input_table(inputs: Iterable[Input]) -> str:
    """Return a table with one row per input."""
    rows = [("Input", "Type", "Default", "Allowed", "Description"), ("---",) * 5]
    for entry in inputs:
        description = _cell(entry.option.description)
        rows.append(
            (f"`{entry.name}`", _type(entry), _default(entry), _allowed(entry), description)
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _type(entry: Input) -> str:
    kind = {Path: "file", int: "int", float: "float", bool: "bool"}.get(entry.type, "str")
    kind = "secret" if entry.option.secret else kind
    return f"list of {kind}" if entry.is_list else kind


def _default(entry: Input) -> str:
    if entry.default is REQUIRED:
        return "required"
    if entry.default is None:
        return "none"
    return _code(list(entry.default) if isinstance(entry.default, tuple) else entry.default)


def _allowed(entry: Input) -> str:
    option = entry.option
    if option.choices:
        return ", ".join(map(_code, option.choices))
    each = " each" if entry.is_list else ""
    if option.ge is not None and option.le is not None:
        return f"{option.ge} to {option.le}{each}"
    if option.ge is not None:
        return f"at least {option.ge}{each}"
    return "" if option.le is None else f"at most {option.le}{each}"


def _code(value: object) -> str:
    return _cell(f"`{value}`" if isinstance(value, str) and value else f"`{value!r}`")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
