"""Files: lossless, in order, and gone when the next prediction begins."""

import os
import time

import numpy as np
import pytest
from PIL import Image

from generation.options import OutputFormat
from generation.outputs import OutputFolders, save


def _noise(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "server").mkdir()
    return tmp_path / "server"


def test_pictures_are_saved_losslessly_and_in_order(tmp_path):
    pictures = {number: _noise(number) for number in (0, 1, 3)}
    paths = save(pictures, tmp_path, OutputFormat.PNG, 90, {})
    assert [p.name for p in paths] == ["out-0.png", "out-1.png", "out-3.png"]
    for path, picture in zip(paths, pictures.values(), strict=True):
        with Image.open(path) as stored:
            assert stored.format == "PNG"
            assert stored.tobytes() == picture.tobytes()


@pytest.mark.parametrize("kind", OutputFormat)
@pytest.mark.parametrize("count", [1, 6])
def test_each_picture_has_its_own_parameters(tmp_path, kind, count):
    pictures = {i: _noise(i) for i in range(count)}
    texts = {i: f"picture {i}" for i in range(count)}
    paths = save(pictures, tmp_path, kind, 90, texts)
    assert [p.name for p in paths] == [f"out-{i}.{kind}" for i in range(count)]
    for path, text in zip(paths, texts.values(), strict=True):
        content = path.read_bytes()
        assert any(text.encode(coding) in content for coding in ("latin-1", "utf-16-be"))


def test_predictions_leave_one_folder(files, server):
    folders = OutputFolders(files, server)
    for i in range(20):
        (server / f"prediction-{i}" / "outputs").mkdir(parents=True)  # as the server does
        os.utime(server / f"prediction-{i}", (i, i))
        folder = folders.fresh()
        assert list(folder.iterdir()) == []
        (folder / "out-0.png").write_bytes(b"x")
    assert len([p for p in files.rglob("*") if p.is_file()]) == 1
    assert [p.name for p in server.iterdir()] == ["prediction-19"]
    folders.remove()
    assert list(files.iterdir()) == []


def test_another_servers_recent_leftovers_are_left_alone(files, server):
    (files / f"stable-diffusion-outputs-{os.getppid()}").mkdir()  # a process that lives
    for name, age in (("old", 700), ("running", 60), ("ours", 0)):
        (server / name).mkdir()
        os.utime(server / name, (time.time() - age,) * 2)
    OutputFolders(files, server).fresh()
    assert {p.name for p in server.iterdir()} == {"running", "ours"}


def test_folders_of_dead_processes_are_removed_and_those_of_living_ones_kept(files, server):
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for name in (f"stable-diffusion-outputs-{dead}", "stable-diffusion-outputs-1", "mine"):
        (files / name).mkdir()
    OutputFolders(files, server)
    kept = {p.name for p in files.iterdir()}
    assert kept == {"stable-diffusion-outputs-1", "mine"}
