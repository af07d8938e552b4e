"""script/sync rewrites the marked regions, and only those."""

import sys
import types

import pytest

from script.tools import sync

CONFIG = 'build:\n  sdk_version: "0.23.1"\npredict: "predict.py:Predictor"\n'
SOURCE = """\
from typing import Optional

from cog import BasePredictor, Input, Path

# script/sync: sync_fixture.SCHEDULERS
SCHEDULER_CHOICES = ["old", "older"]  # what the model can step with


class Predictor(BasePredictor):
    def predict(
        self,
        prompt: str = Input(description="What to draw, a | b", max_length=50),
        scheduler: str = Input(default="DDIM", choices=SCHEDULER_CHOICES, description="Stepping"),
        seed: Optional[int] = Input(default=None, description="Seed", ge=0, le=9),
        sizes: list[int] = Input(default=[1], description="Sizes"),
        note: str = Input(default="", description="Note", regex="|a"),
    ) -> Path: ...
"""
README = "# Title\n\n<!-- inputs:begin -->\nold\n<!-- inputs:end -->\n\nend\n"
TABLE = """\
| Input | Type | Default | Allowed | Description |
| --- | --- | --- | --- | --- |
| `prompt` | str | required | at most 50 characters | What to draw, a \\| b |
| `scheduler` | str | `DDIM` | `DDIM`, `K_EULER` | Stepping |
| `seed` | int | none | 0 to 9 | Seed |
| `sizes` | list of int | `[1]` |  | Sizes |
| `note` | str | `''` | `\\|a` | Note |"""


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    module = types.ModuleType("sync_fixture")
    module.SCHEDULERS = {"DDIM": object(), "K_EULER": object()}
    module.NAMES = ("a", "b")
    module.BAD = {"a": 1, 'quo"te': 2}
    module.LONG = [f"SCHEDULER_{number}" for number in range(9)]
    monkeypatch.setitem(sys.modules, "sync_fixture", module)


@pytest.fixture
def project(tmp_path):
    for name, text in (("cog.yaml", CONFIG), ("predict.py", SOURCE), ("README.md", README)):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_sync_rewrites_choices_and_table_in_one_run(project, capsys):
    assert sync.main([], project) == 0
    expected = SOURCE.replace('["old", "older"]', '["DDIM", "K_EULER"]')
    assert (project / "predict.py").read_text() == expected
    assert (project / "README.md").read_text() == README.replace("\nold\n", f"\n{TABLE}\n")
    assert capsys.readouterr().out == (
        "predict.py: SCHEDULER_CHOICES updated\nREADME.md: inputs updated\n"
    )


def test_sync_twice_changes_nothing_more(project, capsys):
    sync.main([], project)
    capsys.readouterr()
    assert sync.main([], project) == 0
    assert sync.main(["--check"], project) == 0
    assert capsys.readouterr().out == ""


def test_check_names_each_difference_and_writes_nothing(project, capsys):
    assert sync.main(["--check"], project) == 1
    remedy = "differs from its source; remedy: run script/sync"
    assert capsys.readouterr().err == (
        f"predict.py: SCHEDULER_CHOICES {remedy}\nREADME.md: inputs {remedy}\n"
    )
    assert (project / "predict.py").read_text() == SOURCE
    assert (project / "README.md").read_text() == README


def test_training_inputs_have_their_own_table(project):
    (project / "cog.yaml").write_text(CONFIG + 'train: "train.py:train"\n')
    (project / "train.py").write_text(
        "from cog import Input, Path\n\n"
        '# script/sync: sync_fixture.NAMES\nKINDS = ["a"]\n\n\n'
        'def train(kind: str = Input(choices=KINDS, description="Kind")) -> Path: ...\n'
    )
    assert sync.main([], project) == 1  # the README has no such region yet
    region = "<!-- training-inputs:begin -->\n<!-- training-inputs:end -->\n"
    (project / "README.md").write_text(README + region)
    assert sync.main([], project) == 0
    assert "| `kind` | str | required | `a`, `b` | Kind |" in (project / "README.md").read_text()


@pytest.mark.parametrize("elements", ['["b"]', '[\n    "b",\n    "c",\n]', "[]"])
def test_a_long_list_is_written_as_ruff_formats_it(elements):
    text = f"# script/sync: sync_fixture.LONG\nNAMES = {elements}\nAFTER = 1\n"
    wanted, changed = sync.sync_choices(text, "predict.py")
    names = "".join(f'    "SCHEDULER_{number}",\n' for number in range(9))
    assert wanted == f"# script/sync: sync_fixture.LONG\nNAMES = [\n{names}]\nAFTER = 1\n"
    assert [region.name for region in changed] == ["NAMES"]


@pytest.mark.parametrize(("width", "lines"), [(100, 1), (101, 4)])
def test_one_line_is_kept_up_to_the_limit(width, lines):
    padding = "x" * (width - len('N = ["", "b"]'))
    assert len(sync.format_list("N = ", [padding, "b"], "")) == lines


def test_several_regions_and_an_annotation_are_kept_apart():
    text = (
        "# script/sync: sync_fixture.NAMES\nA: list[str] = []\n"
        "# script/sync: sync_fixture.SCHEDULERS\nB = []\n"
    )
    wanted, changed = sync.sync_choices(text, "predict.py")
    assert 'A: list[str] = ["a", "b"]\n' in wanted
    assert 'B = ["DDIM", "K_EULER"]\n' in wanted
    assert [region.name for region in changed] == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# script/sync: sync_fixture.NAMES\n\nA = []\n", r"predict.py:2: no list under"),
        ("# script/sync: sync_fixture.NAMES\nA = ()\n", r"predict.py:2: no list under"),
        ("# script/sync: sync_fixture.GONE\nA = []\n", r"sync_fixture\.GONE"),
        ("# script/sync: sync_gone.NAMES\nA = []\n", r"sync_gone\.NAMES"),
        ("# script/sync: sync_fixture.BAD\nA = []\n", r"not a dict or a sequence of plain"),
        ("# script/sync: sync_fixture.__name__\nA = []\n", r"not a dict or a sequence of plain"),
    ],
)
def test_an_unusable_mark_is_explained(text, problem):
    with pytest.raises(sync.SyncError, match=problem):
        sync.sync_choices(text, "predict.py")


@pytest.mark.parametrize(
    "readme",
    ["", "<!-- inputs:begin -->", README + README, "<!-- inputs:end --><!-- inputs:begin -->"],
)
def test_a_readme_without_the_region_is_explained(project, capsys, readme):
    (project / "README.md").write_text(readme)
    assert sync.main([], project) == 1
    assert "README.md: no region from <!-- inputs:begin -->" in capsys.readouterr().err
    assert (project / "predict.py").read_text() == SOURCE


def test_a_source_that_cog_would_refuse_is_not_written(project, capsys):
    (project / "predict.py").write_text(SOURCE.replace('default="DDIM"', 'default="PNDM"'))
    assert sync.main([], project) == 1
    assert "[default-outside]" in capsys.readouterr().err
    assert "old" in (project / "predict.py").read_text()
