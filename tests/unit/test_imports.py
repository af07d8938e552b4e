"""The import rule: predict.py, train.py → generation, training → models → preprocess → weights.

Nothing imports back, and the request's rules are checked without torch.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Each may import itself and what is below it; inputs.py may be imported by all.
LAYERS = [
    ("predict", "train"),
    ("generation", "training"),
    ("models",),
    ("preprocess",),
    ("weights",),
]
NEVER_IMPORTED = {"script", "tests", "benchmarks", "bulk", "serve", "playground"}
PACKAGES = [name for layer in LAYERS for name in layer] + ["inputs"]
SOURCES = [
    path for name in PACKAGES for path in [*Path().glob(f"{name}.py"), *Path(name).rglob("*.py")]
]


def _may_import(package: str) -> set[str]:
    if package == "inputs":
        return set()
    (level,) = (level for level, names in enumerate(LAYERS) if package in names)
    below = {name for names in LAYERS[level + 1 :] for name in names}
    if package in ("predict", "train"):
        below.remove("training" if package == "predict" else "generation")
    return {package, "inputs", *below}


def _imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import, which Cog's loader refuses"
            yield node.module


def test_there_is_something_to_check():
    assert set(PACKAGES) == {path.parts[0].removesuffix(".py") for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path):
    package = path.parts[0].removesuffix(".py")
    restricted = {*PACKAGES, *NEVER_IMPORTED} - _may_import(package)
    for module in _imported_modules(path):
        top = module.split(".")[0]
        assert top not in restricted, f"{path} imports {module}"
        assert package in ("predict", "train") or top != "cog", (
            f"{path} imports cog: only the boundary may"
        )


LIGHT = [
    "generation.resolve",
    "generation.schedulers",
    "generation.base_models",
    "predict",
    "training.config",
    "preprocess.crop",
]


def test_rules_are_checked_without_torch():
    """One process for all of them: starting it takes longer than the rest."""
    heavy = {"torch", "diffusers", "transformers"}
    code = f"import sys, {', '.join(LIGHT)}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_torch_is_imported_before_cog_runs_a_training():
    """When train.py is loaded, on the main thread, as it explains; predict.py has `setup`."""
    tree = ast.parse(Path("train.py").read_text(encoding="utf-8"))
    imported = [a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names]
    assert "torch" in imported


# docs/architecture.md, "Library internals", says why.
PRIVATE = {"_foreach_copy_", "_register_custom_module"}


@pytest.mark.parametrize("path", [p for p in SOURCES if "miniature" not in p.parts], ids=str)
def test_no_private_name_of_a_library_is_used(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr)
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert used - PRIVATE - defined == set()
