"""The catalog's own consistency, the choice of edition and device, and the command's table."""

import re
from pathlib import Path, PurePosixPath

import pytest

from tests.helpers import fake_hub
from tests.helpers.fake_hub import TOY_FILES, Workplace
from weights import __main__ as command
from weights import cache, edition, errors
from weights.catalog import CATALOG, CatalogEntry, Edition, HubFiles, PackagedFiles, UrlFile
from weights.catalog import get_entry as entry_of

workplace = fake_hub.workplace
ENTRIES = [(e, name, entry) for e in Edition for name, entry in CATALOG[e].items()]


def test_the_first_models_are_there():
    assert {"sdxl-base", "sdxl-refiner", "sdxl-vae-fp16-fix"} <= set(CATALOG[Edition.FULL])
    assert "sdxl-base" in CATALOG[Edition.MINIATURE]


# What their authors publish is nothing else; so with all annotators and SD 2.1's ControlNets.
PICKLES = {"safety-checker", "controlnet-tile-sd15"}


@pytest.mark.parametrize(
    ("kind", "name", "entry"), ENTRIES, ids=[f"{e}-{name}" for e, name, _ in ENTRIES]
)
def test_entries_are_complete(kind: Edition, name: str, entry: CatalogEntry):
    assert entry.name == name
    assert entry.licence
    source = entry.source
    if kind is Edition.MINIATURE:
        assert isinstance(source, PackagedFiles)
        return
    assert isinstance(source, HubFiles | UrlFile)
    assert source.size_bytes > 0
    if isinstance(source, UrlFile):
        assert re.fullmatch(r"[0-9a-f]{64}", source.sha256)
        assert source.url.startswith("https://")
        return
    assert re.fullmatch(r"[0-9a-f]{40}", source.revision), "pin a commit, not a branch"
    assert len(set(source.files)) == len(source.files)
    for file in source.files:
        path = PurePosixPath(file)
        assert not path.is_absolute()
        assert ".." not in path.parts
        pickled = name in PICKLES or name.startswith("annotator-") or name.endswith("-sd21")
        known = {".json", ".txt", ".safetensors"} | ({".bin", ".pth", ".pt"} if pickled else set())
        assert path.suffix in known, "no pickles"


def test_weights_come_with_the_configuration_that_names_their_class():
    checked = 0
    for _, _, entry in ENTRIES:
        if not isinstance(entry.source, HubFiles):
            continue
        for file in entry.source.files:
            if file.endswith(".safetensors") and "lora" not in file:  # those are differences
                assert str(PurePosixPath(file).with_name("config.json")) in entry.source.files
                checked += 1
    assert checked >= 5


def test_an_unknown_name_lists_the_right_ones():
    with pytest.raises(errors.UnknownWeights) as caught:
        entry_of("sdxl-bse", Edition.FULL)
    assert "'sdxl-bse'" in str(caught.value)
    for name in CATALOG[Edition.FULL]:
        assert name in str(caught.value)
    with pytest.raises(errors.UnknownWeights, match=r"is in the full edition: set WEIGHTS_EDITION"):
        entry_of("sdxl-vae-fp16-fix", Edition.MINIATURE)


def test_packaged_folders_are_used_in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(cache, "MINIATURE_FOLDER", tmp_path)
    assert not cache.is_present("sdxl-base", Edition.MINIATURE)
    with pytest.raises(errors.MissingPackaged, match=r"sdxl-base is missing.*git checkout"):
        cache.ensure("sdxl-base", Edition.MINIATURE)
    (tmp_path / "sdxl-base" / "unet").mkdir(parents=True)
    (tmp_path / "sdxl-base" / "unet" / "config.json").write_bytes(b"12345")
    assert cache.ensure("sdxl-base", Edition.MINIATURE) == tmp_path / "sdxl-base"
    entry = entry_of("sdxl-base", Edition.MINIATURE)
    assert cache.files_of(entry) == ("unet/config.json",)
    assert cache.size_bytes(entry) == 5


@pytest.mark.parametrize(
    ("value", "cuda", "expected"),
    [
        ("full", False, Edition.FULL),
        ("miniature", True, Edition.MINIATURE),
        (" Full ", False, Edition.FULL),
    ],
)
def test_an_edition_that_is_asked_for_is_used_in_silence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: str,
    cuda: bool,
    expected: Edition,
):
    monkeypatch.setenv("WEIGHTS_EDITION", value)
    assert edition.resolve_edition(cuda_available=cuda) is expected
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", ["auto", "", None])
@pytest.mark.parametrize(("cuda", "expected"), [(True, Edition.FULL), (False, Edition.MINIATURE)])
def test_auto_says_in_one_line_what_it_chose_and_why(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: str | None,
    cuda: bool,
    expected: Edition,
):
    monkeypatch.delenv("WEIGHTS_EDITION", raising=False)
    if value is not None:
        monkeypatch.setenv("WEIGHTS_EDITION", value)
    assert edition.resolve_edition(cuda_available=cuda) is expected
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert ("no CUDA" in line) is not cuda


def test_a_wrong_edition_names_the_choices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHTS_EDITION", "tiny")
    with pytest.raises(errors.WrongSetting, match=r"'tiny'.*full, miniature, auto"):
        edition.resolve_edition(cuda_available=True)


@pytest.mark.parametrize(
    ("available", "requested", "expected"),
    [
        (("cuda", "cpu"), None, "cuda"),
        (("mps", "cpu"), None, "mps"),
        (("cpu",), "", "cpu"),
        (("cuda", "cpu"), "cpu", "cpu"),
        (("cuda", "cpu"), "CUDA", "cuda"),
    ],
)
def test_the_device(
    monkeypatch: pytest.MonkeyPatch,
    available: tuple[edition.Device, ...],
    requested: str | None,
    expected: str,
):
    monkeypatch.setattr(edition, "available_devices", lambda: available)
    monkeypatch.delenv("DEVICE", raising=False)
    if requested is not None:
        monkeypatch.setenv("DEVICE", requested)
    assert edition.resolve_device() == expected


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(edition, "available_devices", lambda: ("mps", "cpu"))
    monkeypatch.setenv("DEVICE", "cuda")
    with pytest.raises(errors.WrongSetting, match=r"'cuda'.*mps, cpu"):
        edition.resolve_device()


def rows_of(table: str) -> dict[tuple[str, str], list[str]]:
    lines = [re.split(r"  +", line) for line in table.splitlines()]
    assert tuple(lines[0]) == command.HEADINGS
    return {(line[0], line[1]): line[2:] for line in lines[1:]}


def test_the_table(workplace: Workplace, capsys: pytest.CaptureFixture[str]):
    assert command.main(["--list"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert set(rows) == {(name, str(e)) for e in Edition for name in CATALOG[e]}
    assert rows["toy", "full"] == [str(len(TOY_FILES)), "0.3 MB", "MIT", "yes", "no"]
    assert rows["single", "full"] == ["1", "0.1 MB", "MIT", "no", "no"]
    assert rows["sdxl-base", "full"][:2] == ["16", "6.77 GB"]
    assert workplace.hub.api_requests == []
    cache.ensure("toy", Edition.FULL)
    command.main(["--list"])
    assert rows_of(capsys.readouterr().out)["toy", "full"][-1] == "yes"


def test_prefetching(
    workplace: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("WEIGHTS_EDITION", "full")
    assert command.main(["toy", "nonsense"]) == 1
    message = capsys.readouterr().err
    assert "'nonsense'" in message
    assert "sdxl-base" in message
    assert workplace.hub.api_requests == []  # nothing starts while a name is wrong
    assert command.main(["toy", "single"]) == 0
    out = capsys.readouterr().out
    folder = cache.ensure("toy", Edition.FULL)
    assert f"toy (full): {folder}" in out
    assert {file: (folder / file).read_bytes() for file in TOY_FILES} == TOY_FILES
    assert cache.is_present("single", Edition.FULL)


def test_no_arguments_is_an_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        command.main([])
    assert caught.value.code == 2
    assert "--list" in capsys.readouterr().err
