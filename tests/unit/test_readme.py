"""What the README says by hand is true."""

import math
import re
from pathlib import Path

import pytest

from generation.base_models import MINIATURE_SDXL, SDXL
from training.config import TRAINABLE_MODELS, Method, TrainConfig
from training.plan import resolve
from weights.catalog import Edition

README = Path("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("column", "spec"), [(0, SDXL), (1, MINIATURE_SDXL)])
def test_the_table_of_models_own_values(column, spec):
    table = README.split("What an empty input")[1].split("Each prediction")[0]
    rows = dict(re.findall(r"^\| ([a-z_, ]+) \| ([^|]+ \| [^|]+) \|$", table, flags=re.M))
    cells = {name: values.split(" | ")[column] for name, values in rows.items()}
    side = math.isqrt(spec.max_pixels)
    assert cells == {
        "width, height": str(spec.native_size),
        "scheduler": spec.scheduler,
        "num_inference_steps": str(spec.num_inference_steps),
        "guidance_scale": str(spec.guidance_scale),
        "a side, pixels": f"{spec.min_side} to {spec.max_side}",
        "area, at most": f"{side} × {side}",
    }


@pytest.mark.parametrize(
    ("column", "spec"),
    [(0, TRAINABLE_MODELS[Edition.FULL]), (1, TRAINABLE_MODELS[Edition.MINIATURE])],
)
def test_the_table_of_trainings_own_values(column, spec):
    table = README.split("What an empty input means there")[1].split("On a GPU")[0]
    rows = dict(re.findall(r"^\| ([a-z_]+) \| ([^|]+ \| [^|]+) \|$", table, flags=re.M))
    lora, word = (
        resolve(TrainConfig(Path(), method=method), spec, 8)
        for method in (Method.LORA, Method.TEXTUAL_INVERSION)
    )
    full = resolve(TrainConfig(Path(), method=Method.FULL), spec, 8)
    for name in ("max_train_steps", "ti_lr", "lr_scheduler", "lr_warmup_steps"):
        assert getattr(full, name) == getattr(lora, name)
    cells = {name: values.split(" | ")[column] for name, values in rows.items()}
    for name, cell in cells.items():
        values = [getattr(lora, name), getattr(word, name)]
        assert cell == ", ".join(dict.fromkeys(str(value) for value in values)), name
    assert len(cells) == 13


def test_the_layout_names_files_that_exist_and_every_file_of_the_core():
    layout = README.split("## Layout")[1].split("```")[1]
    named = set(re.findall(r"[a-z_]+\.(?:py|yaml|md)", layout))
    folders = [
        Path(f) for f in ("generation", "models", "training", "preprocess", "weights", "docs")
    ]
    existing = {p.name for folder in folders for p in folder.rglob("*.*")}
    existing |= {p.name for p in Path().glob("*.*")}
    assert named - existing == set()
    core = {
        p.name
        for folder in ("generation", "models", "training", "preprocess", "weights")
        for p in Path(folder).glob("[!_]*.py")
    }
    assert core - named == set()


def test_every_command_it_shows_exists():
    for name in set(re.findall(r"script/([a-z]+)", README)):
        assert Path("script", name).exists(), name
