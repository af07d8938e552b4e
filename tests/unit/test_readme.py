"""What the README says by hand is true."""

import math
import re
from pathlib import Path

import pytest

from generation.base_models import MINIATURE_SDXL, SDXL

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


def test_the_layout_names_files_that_exist_and_every_file_of_the_core():
    layout = README.split("## Layout")[1].split("```")[1]
    named = set(re.findall(r"[a-z_]+\.(?:py|yaml|md)", layout))
    folders = [Path(f) for f in ("generation", "training", "preprocess", "weights", "docs")]
    existing = {p.name for folder in folders for p in folder.rglob("*.*")}
    existing |= {p.name for p in Path().glob("*.*")}
    assert named - existing == set()
    core = {
        p.name
        for folder in ("generation", "training", "preprocess", "weights")
        for p in Path(folder).glob("[!_]*.py")
    }
    assert core - named == set()


def test_every_command_it_shows_exists():
    for name in set(re.findall(r"script/([a-z]+)", README)):
        assert Path("script", name).exists(), name
