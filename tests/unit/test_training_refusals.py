"""Bad trainings as their users meet them, through script/train.

One line that names the input and the remedy, before any model is loaded; and nothing is left.
"""

import errno
import tempfile
from pathlib import Path

import pytest

from preprocess import models as photo_models
from script.tools import train as tool
from tests.helpers.archives import zip_bytes
from tests.helpers.photos import photos
from tests.unit.test_training_archive import BAD as BAD_ARCHIVES
from tests.unit.test_training_captions import BAD as BAD_CAPTIONS
from tests.unit.test_training_captions import NAMES
from training import model as base_model
from weights.formats import archive

GOOD = zip_bytes(photos("a.jpg", "b.jpg") | {"a.txt": b"a TOK", "b.txt": b"a red TOK"})
UNCAPTIONED = zip_bytes(photos("a.jpg", "b.jpg"))
SETTINGS = {
    # name: (archive, inputs, what the message has to say, and its remedy)
    "no word in captions": (
        zip_bytes(photos("a.jpg", "b.jpg") | {"a.txt": b"a toy", "b.txt": b"a toy"}),
        {}, "none of the 2 captions holds the trigger word 'TOK'", "set token_string",
    ),
    "another word": (GOOD, {"token_string": "CAT"}, "holds the trigger word 'CAT'", "token_string"),
    "no word in the prefix": (
        UNCAPTIONED, {"caption_prefix": "a photo of"}, "lacks the trigger word 'TOK'", "write it",
    ),
    "two words": (GOOD, {"token_string": "a,b:c"}, "token_string is 'a,b:c'", "letters"),
    "a tar is asked for": (
        GOOD, {"input_images_filetype": "tar"}, "is a zip archive", "set that to infer",
    ),
    "an odd resolution": (GOOD, {"resolution": "1000"}, "resolution is 1000", "64 to 256"),
    "more warm-up than steps": (
        GOOD, {"max_train_steps": "5", "lr_warmup_steps": "5"}, "lr_warmup_steps is 5", "less",
    ),
    "a rank without a LoRA": (GOOD, {"is_lora": "false", "lora_rank": "4"}, "lora_rank", "leave"),
    "DoRA in cog-sdxl's format": (GOOD, {"use_dora": "true"}, "use_dora", "set lora_format"),
    "Prodigy at a fixed rate": (
        GOOD, {"optimizer": "prodigy", "lora_lr": "0.0001"}, "lora_lr is 0.0001", "leave it empty",
    ),
    "Adafactor for a LoRA": (GOOD, {"optimizer": "adafactor"}, "is adafactor", "use adamw"),
    "a prior without a class": (
        GOOD, {"prior_preservation": "class_images"}, "class_prompt empty", "name the class",
    ),
    "a class without a prior": (
        GOOD, {"class_prompt": "a dog"}, "class_prompt is 'a dog'", "set that to",
    ),
    "class images without their prior": (
        GOOD, {"class_images": GOOD}, "class_images is set", "prior_preservation",
    ),
    "a prior without its images": (
        GOOD, {"prior_preservation": "class_images", "class_prompt": "a dog"},
        "class_images is empty", "send",
    ),
    "bad class images": (
        GOOD,
        {
            "prior_preservation": "class_images", "class_prompt": "a dog",
            "class_images": zip_bytes({}),
        },
        "class_images holds no image", "send",
    ),
    "no room for a batch": (GOOD, {"train_batch_size": "65"}, "train_batch_size", "64"),
    "not a number": (GOOD, {"seed": "one"}, "seed", "integer"),
    "no such input": (GOOD, {"stepps": "1"}, "stepps", "inputs"),
    "no such choice": (GOOD, {"optimizer": "adam"}, "optimizer", "adamw"),
    "8-bit without a GPU": (GOOD, {"optimizer": "adamw_8bit"}, "adamw_8bit needs", "use adamw"),
}  # fmt: skip
ARCHIVES = {
    name: (content, {}, fault, remedy) for name, (content, _, fault, remedy) in BAD_ARCHIVES.items()
}
CAPTIONS = {
    f"captions: {name}": (
        zip_bytes(
            photos(*NAMES)
            | {n: t.encode() if isinstance(t, str) else t for n, t in texts.items()}
        ),
        {}, fault, remedy,
    )
    for name, (texts, fault, remedy) in BAD_CAPTIONS.items()
}  # fmt: skip
EDITION = (
    "Using the miniature weights: no CUDA GPU is used (WEIGHTS_EDITION=full|miniature overrides)\n"
)
CASES = ARCHIVES | CAPTIONS | SETTINGS


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """What script/train says, which fails without having loaded, written or left anything."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def load(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(photo_models, "ready", load)
    monkeypatch.setattr(base_model, "load", load)

    def refused(content: bytes, inputs: dict[str, str | bytes]) -> str:
        flags = []
        for number, (name, value) in enumerate(({"input_images": content} | inputs).items()):
            if isinstance(value, bytes):
                (tmp_path / str(number)).write_bytes(value)
                value = f"@{number}"
            flags += ["-i", f"{name}={value}"]
        before = set(tmp_path.iterdir())
        assert tool.main([*flags, "-o", "made.tar"], tmp_path) in (1, 2)
        assert list(temporary.iterdir()) == []
        assert set(tmp_path.iterdir()) == before
        return capsys.readouterr().err.removeprefix(EDITION)

    return refused


def test_there_are_more_than_thirty():
    assert len(CASES) > 30


@pytest.mark.parametrize(("content", "inputs", "fault", "remedy"), CASES.values(), ids=CASES)
def test_a_bad_training_is_refused(refused, content, inputs, fault, remedy):
    said = refused(content, inputs)
    assert said.startswith("script/train: ")
    assert said.count("\n") == 1, said
    assert fault in said
    assert remedy in said.partition(fault)[2], said


def test_a_full_disk(refused, monkeypatch):
    def save(member: object, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive.Member, "save", save)
    said = refused(GOOD, {})
    assert "input_images does not fit into" in said
    assert "the disk is full; free some room" in said


def test_no_compiler(refused, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    said = refused(GOOD, {"compile_unet": "true"})
    assert "compile_unet needs a C++ compiler on a CPU, and none was found; install g++" in said
