"""Keep what Cog must read as literals, and the README's input tables, equal to their sources.

In predict.py and train.py a comment marks a list of names that repeats a registry:

    # script/sync: generation.schedulers.SCHEDULERS
    SCHEDULER_CHOICES = ["DDIM", ...]

In README.md the inputs stand between `<!-- inputs:begin -->` and `<!-- inputs:end -->`, and those
of training, when cog.yaml names it, between `<!-- training-inputs:begin -->` and its end. The
models stand between `<!-- models:begin -->` and its end, where there is such a region, and the
kinds of control between `<!-- controls:begin -->` and its end.
"""

import argparse
import ast
import importlib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import EnumType
from pathlib import Path

from script.tools.cog_config import ConfigError, read_config
from script.tools.cog_model import InputField, Mode
from script.tools.cog_rules import SchemaError
from script.tools.cog_source import read_signature
from script.tools.control_table import control_table
from script.tools.model_table import model_table

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"# script/sync: ([\w.]+)\.(\w+)")
LINE_LENGTH = 100
SAFE_NAME = re.compile(r"[^\"\\\n]+")


class SyncError(Exception):
    """A region or its source is not as expected; the message says where and what to do."""


@dataclass(frozen=True)
class Region:
    """A generated part of a file that differs from its source."""

    file: str
    name: str


def main(argv: list[str], root: Path) -> int:
    """The command; 0 when every region is (now) equal to its source."""
    parser = argparse.ArgumentParser(prog="script/sync", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    check = parser.parse_args(argv).check
    try:
        texts, changed = synchronise(root)
    except (SyncError, ConfigError, SchemaError) as error:
        print(f"script/sync: {error}", file=sys.stderr)
        return 1
    for region in changed:
        state = "differs from its source; remedy: run script/sync" if check else "updated"
        print(f"{region.file}: {region.name} {state}", file=sys.stderr if check else sys.stdout)
    if not check:
        for file in {region.file for region in changed}:
            (root / file).write_text(texts[file], encoding="utf-8", newline="\n")
    return 1 if check and changed else 0


def synchronise(root: Path) -> tuple[dict[str, str], list[Region]]:
    """The wanted text of every file, and the regions in which it differs from the present one."""
    config = read_config(root)
    texts: dict[str, str] = {}
    changed: list[Region] = []
    tables: list[tuple[str, str]] = []
    for mode, target in ((Mode.PREDICT, config.predict), (Mode.TRAIN, config.train)):
        if target is None:
            continue
        file = str(target.file.relative_to(root))
        texts[file], regions = sync_choices(_read(root, file), file)
        changed += regions
        # The table is made from the source as it will be, so that one run settles both.
        signature = read_signature(texts[file], file, target.name, mode)
        name = "inputs" if mode is Mode.PREDICT else "training-inputs"
        tables.append((name, input_table(signature.inputs)))
    readme = "README.md"
    texts[readme] = _read(root, readme)
    if "<!-- models:begin -->" in texts[readme]:
        tables.append(("models", model_table()))
    if "<!-- controls:begin -->" in texts[readme]:
        tables.append(("controls", control_table()))
    for name, table in tables:
        wanted = replace_table(texts[readme], readme, name, table)
        if wanted != texts[readme]:
            changed.append(Region(readme, name))
        texts[readme] = wanted
    return texts, changed


def sync_choices(text: str, file: str) -> tuple[str, list[Region]]:
    """Rewrite every marked list of a source file from its registry."""
    lines = text.split("\n")
    changed: list[Region] = []
    marks = [(number, MARK.fullmatch(line)) for number, line in enumerate(lines, start=1)]
    # From the end, so that line numbers before the change stay true.
    for number, mark in reversed(marks):
        if mark is None:
            continue
        name, value = _marked_list(text, file, number + 1)
        assert value.end_lineno is not None
        prefix = lines[value.lineno - 1].encode()[: value.col_offset].decode()
        suffix = lines[value.end_lineno - 1].encode()[value.end_col_offset :].decode()
        wanted = format_list(prefix, registry_names(mark[1], mark[2]), suffix)
        if lines[value.lineno - 1 : value.end_lineno] != wanted:
            lines[value.lineno - 1 : value.end_lineno] = wanted
            changed.append(Region(file, name))
    return "\n".join(lines), changed[::-1]


def _marked_list(text: str, file: str, line: int) -> tuple[str, ast.List]:
    for statement in ast.parse(text, file).body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=ast.List() as value, lineno=at)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.List() as value, lineno=at)
            ) if at == line:
                return name, value
    remedy = "put `NAME = []` below the comment, at the top level"
    raise SyncError(f"{file}:{line}: no list under `# script/sync:`; {remedy}")


def registry_names(module: str, attribute: str) -> list[str]:
    """The keys of a registry, the values of a StrEnum, or the elements of a sequence of names."""
    where = f"{module}.{attribute}"
    try:
        registry = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SyncError(f"registry {where} of a `# script/sync:` comment: {error}") from error
    iterable = isinstance(registry, Mapping | list | tuple | EnumType)
    names = list(registry) if iterable else []
    if not names or not all(isinstance(name, str) and SAFE_NAME.fullmatch(name) for name in names):
        problem = "is not a dict or a sequence of plain, non-empty strings"
        raise SyncError(f"registry {where} {problem}, which `choices=` needs: {registry!r:.80}")
    return names


def format_list(prefix: str, names: Iterable[str], suffix: str) -> list[str]:
    """The lines of the assignment, as ruff formats it."""
    quoted = [f'"{name}"' for name in names]
    line = f"{prefix}[{', '.join(quoted)}]{suffix}"
    if len(line) <= LINE_LENGTH:
        return [line]
    return [f"{prefix}[", *(f"    {name}," for name in quoted), f"]{suffix}"]


def replace_table(text: str, file: str, name: str, table: str) -> str:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        remedy = "put both, once, where the table belongs"
        raise SyncError(f"{file}: no region from {begin} to {end}; {remedy}")
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    return f"{head}{begin}\n{table}\n{end}{tail}"


def input_table(fields: Iterable[InputField]) -> str:
    """A Markdown table with one row per input."""
    rows = [("Input", "Type", "Default", "Allowed", "Description"), ("---",) * 5]
    for field in fields:
        kind = field.type.primitive.value
        type_ = f"list of {kind}" if field.type.is_list else kind
        rows.append(
            (f"`{field.name}`", type_, _default(field), _allowed(field), _cell(field.description))
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _default(field: InputField) -> str:
    if field.required:
        return "required"
    return "none" if field.default is None else _code(field.default)


def _allowed(field: InputField) -> str:
    if field.choices:
        return ", ".join(_code(choice) for choice in field.choices)
    parts = []
    if field.ge is not None or field.le is not None:
        parts.append(_range(field.ge, field.le, ""))
    if field.min_length is not None or field.max_length is not None:
        parts.append(_range(field.min_length, field.max_length, " characters"))
    parts += [_code(value) for value in (field.regex, field.accept) if value is not None]
    return "; ".join(parts)


def _range(low: float | None, high: float | None, unit: str) -> str:
    if low is None:
        return f"at most {high}{unit}"
    return f"at least {low}{unit}" if high is None else f"{low} to {high}{unit}"


def _code(value: object) -> str:
    return _cell("`" + (value if isinstance(value, str) and value else repr(value)) + "`")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _read(root: Path, file: str) -> str:
    try:
        return (root / file).read_text(encoding="utf-8")
    except OSError as error:
        raise SyncError(
            f"{file} is unreadable: {error}; script/sync keeps regions of it"
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], ROOT))
