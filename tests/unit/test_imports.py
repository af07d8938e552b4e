"""The import rule: predict.py → generation → weights, never back; and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = [
    *("script", "predict", "train", "generation", "training"),
    *("models", "preprocess", "weights", "inputs"),
]
MAY_IMPORT = {
    "predict": {"generation", "weights", "inputs"},
    "train": {"training", "weights", "inputs"},
    "generation": {"generation", "models", "preprocess", "weights", "inputs"},
    "training": {"training", "models", "preprocess", "weights", "inputs"},
    "models": {"models", "preprocess", "weights"},
    "preprocess": {"preprocess", "weights"},
    "weights": {"weights"},
    "inputs": set(),
}
SOURCES = [
    path for name in MAY_IMPORT for path in [*Path().glob(f"{name}.py"), *Path(name).rglob("*.py")]
]


def _imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import, which Cog's loader refuses"
            yield node.module


def test_there_is_something_to_check():
    assert {"predict", "generation", "weights"} <= {path.parts[0].split(".")[0] for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path):
    layer = path.parts[0].removesuffix(".py")
    for module in _imported_modules(path):
        top = module.split(".")[0]
        assert top not in LAYERS or top in MAY_IMPORT[layer], f"{path} imports {module}"
        assert layer in ("predict", "train") or top != "cog", (
            f"{path} imports cog: only the boundary may"
        )


@pytest.mark.parametrize(
    "module",
    [
        "generation.request",
        "generation.schedulers",
        "generation.base_models",
        "predict",
        "training.config",
        "preprocess.crop",
    ],
)
def test_rules_are_checked_without_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_torch_is_loaded_before_cog_runs_a_training():
    """On the main thread, as train.py explains; predict.py's `setup` does the same."""
    code = "import sys, train; print('torch' in sys.modules, 'diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"
