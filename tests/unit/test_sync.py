"""script/sync writes everything that follows from declarations, and --check only compares."""

import shutil
from pathlib import Path

import pytest

from generation.options import GenerationRequest
from inputs import REQUIRED, Input, Option, flatten
from script.tools import sync
from script.tools.input_table import input_table
from training.config import TrainConfig

FILES = ("predict.py", "train.py", "openapi.json", "docs/reference/inputs.md", "README.md")


@pytest.fixture
def project(tmp_path):
    for file in (*FILES, "cog.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(sync.ROOT / file, tmp_path / file)
    return tmp_path


@pytest.fixture
def more(monkeypatch):
    """One more input of predictions."""
    entry = Input("eta", float, False, False, 0.5, Option("DDIM's eta.", ge=0, le=1))
    inputs = [*flatten(GenerationRequest), entry]
    monkeypatch.setattr(
        sync, "flatten", lambda cls: inputs if cls is GenerationRequest else flatten(cls)
    )


def test_everything_is_current():
    assert sync.main(["--check"], sync.ROOT) == 0, "remedy: run script/sync"


def test_an_input_appears_everywhere(project, more, capsys):
    before = {file: (project / file).read_text() for file in FILES}
    assert sync.main(["--check"], project) == 1
    changed = [file for file in FILES if file != "train.py"]
    assert capsys.readouterr().err.splitlines() == [
        f"{file} differs from its sources; remedy: run script/sync" for file in changed
    ]
    assert before == {file: (project / file).read_text() for file in FILES}
    assert sync.main([], project) == 0
    assert capsys.readouterr().out == "".join(f"{file} updated\n" for file in changed)
    assert "        eta: float = Input(" in (project / "predict.py").read_text()
    assert '"title": "Eta"' in (project / "openapi.json").read_text()
    row = "| `eta` | float | `0.5` | 0 to 1 | DDIM's eta. |\n"
    for file in ("README.md", "docs/reference/inputs.md"):
        assert row in (project / file).read_text()
    assert sync.main(["--check"], project) == 0


def test_the_reference_is_made_from_nothing(project):
    (project / "docs/reference/inputs.md").unlink()
    assert sync.main(["--check"], project) == 1
    assert sync.main([], project) == 0
    assert sync.main(["--check"], project) == 0


def test_a_description_that_cog_cannot_read_is_refused(project, monkeypatch, capsys):
    entry = Input("eta", float, False, False, 0.5, Option('so-called "eta"'))
    monkeypatch.setattr(sync, "flatten", lambda _: [entry])
    before = (project / "predict.py").read_text()
    assert sync.main([], project) == 1
    assert "Cog reads no quotes" in capsys.readouterr().err
    assert (project / "predict.py").read_text() == before


@pytest.mark.parametrize(
    "readme",
    [
        "",
        "<!-- a:begin -->",
        "<!-- a:end --><!-- a:begin -->",
        "<!-- a:begin --><!-- a:end -->" * 2,
    ],
)
def test_a_readme_without_the_marks_is_explained(readme):
    with pytest.raises(
        sync.SyncError, match=r"README\.md: put <!-- a:begin --> and <!-- a:end -->"
    ):
        sync.replace_table(readme, "a", "table")


def test_a_table_replaces_what_is_between_its_marks():
    text = "a\n<!-- t:begin -->\nold\n<!-- t:end -->\nb\n"
    assert sync.replace_table(text, "t", "new") == text.replace("old", "new")


def test_a_table_says_what_an_input_takes():
    def entry(name, kind, *, default=None, **about):
        return Input(
            name, kind, isinstance(default, tuple), False, default, Option("a | b", **about)
        )

    rows = input_table(
        [
            entry("file", Path, default=REQUIRED),
            entry("size", str, default="a", choices=("a", "b")),
            entry("seed", int, ge=0, le=9),
            entry("least", int, ge=0),
            entry("most", int, le=9),
            entry("scales", float, default=(), ge=-1, le=1),
            entry("token", str, default="", secret=True),
        ]
    ).splitlines()[2:]
    assert rows == [
        r"| `file` | file | required |  | a \| b |",
        r"| `size` | str | `a` | `a`, `b` | a \| b |",
        r"| `seed` | int | none | 0 to 9 | a \| b |",
        r"| `least` | int | none | at least 0 | a \| b |",
        r"| `most` | int | none | at most 9 | a \| b |",
        r"| `scales` | list of float | `[]` | -1 to 1 each | a \| b |",
        r"| `token` | secret | `''` |  | a \| b |",
    ]


def test_every_input_is_described():
    for entry in [*flatten(GenerationRequest), *flatten(TrainConfig)]:
        assert entry.option.description.strip()
