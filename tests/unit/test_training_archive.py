"""A training's archive: which photos come out, in what order, what is refused; nothing stays."""

import errno
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import archive
from preprocess.archive import natural_order, unpacked
from preprocess.errors import BadArchive, BadCaptions, BadImage, DiskFull, PreprocessError
from preprocess.image_formats import begins_like_photo, image_suffixes
from preprocess.images import read_image
from tests.helpers.archives import gz_bytes, tar_bytes, tar_info, zip_bytes
from tests.helpers.image_corpus import corpus, encode, orientation, plain
from tests.helpers.photos import LABEL, SIZE, photo, photos, png_header, zipped
from weights.formats.archive import Member

PACKERS = {
    "zip": zip_bytes,
    "zip, stored": lambda members: zip_bytes(members, zipfile.ZIP_STORED),
    "tar": tar_bytes,
    "tar, GNU": lambda members: tar_bytes(members, tarfile.GNU_FORMAT),
    "tar.gz": lambda members: gz_bytes(tar_bytes(members)),
}


@pytest.fixture
def folder(tmp_path):
    """Where archives are unpacked: empty after every test."""
    folder = tmp_path / "unpacked"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def unpack_bytes(tmp_path, folder):
    def unpack_content(content, name="download"):
        path = tmp_path / name
        path.write_bytes(content)
        return unpacked(path, LABEL, folder)

    return unpack_content


@pytest.fixture
def names_in(unpack_bytes):
    """The names of the photos that come out of an archive."""

    def names(content):
        with unpack_bytes(content) as found:
            return [photo.name for photo in found.photos]

    return names


# --- what comes out


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
@pytest.mark.parametrize("name", ["photos.zip", "photos.tar", "x", "photos.jpg"])
def test_the_packing_is_told_by_content(unpack_bytes, pack, name):
    members = photos("b.jpg", "a.jpg") | {"caption.csv": b"caption,image_file"}
    with unpack_bytes(pack(members), name) as found:
        assert [(p.name, p.label, p.size) for p in found.photos] == [
            ("a.jpg", "input_images: 'a.jpg'", SIZE),
            ("b.jpg", "input_images: 'b.jpg'", SIZE),
        ]
        assert [p.path.read_bytes() for p in found.photos] == [members["a.jpg"], members["b.jpg"]]
        assert [(t.name, t.path.read_bytes()) for t in found.texts] == [
            ("caption.csv", b"caption,image_file")
        ]
        assert found.label == LABEL


def test_the_order_is_that_of_people(names_in):
    ordered = [
        "10/1.jpg", "IMG_1.jpg", "img_2.JPG", "IMG_010.jpg", "IMG_10.jpg", "photo (2).jpg",
        "photo (10).jpg", "photo.jpg", "x/2/9.jpg", "x/10/1.jpg", "x/a.jpg", "Ä.jpg",
    ]  # fmt: skip
    for shuffled in (ordered, ordered[::-1], sorted(ordered)):
        assert names_in(zipped(*shuffled)) == ordered


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("aB0129 ./²é", max_size=9), max_size=9))
def test_any_names_have_an_order(names):
    backwards = list(reversed(names))
    assert sorted(names, key=natural_order) == sorted(backwards, key=natural_order)
    assert natural_order("9" * 9999) < natural_order("1" + "0" * 9999)


def test_equal_names_in_two_folders_are_two_photos(unpack_bytes):
    members = photos("cats/1.jpg", "dogs/1.jpg", "dogs/old/1.jpg")
    with unpack_bytes(zip_bytes(members)) as found:
        assert {p.name: p.path.read_bytes() for p in found.photos} == members


CLUTTER = (
    "__MACOSX/._a.jpg", "x/__MACOSX/b.jpg", "._a.jpg", "x/._b.jpg", ".DS_Store", "x/.DS_Store",
    "Thumbs.db", "x/desktop.ini", "@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", ".hidden/a.jpg",
    "__MACOSX/x/._caption.csv", "._captions.json",
)  # fmt: skip


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_what_systems_add_is_left_alone(unpack_bytes, capsys, pack):
    members = photos("a.jpg", "x/b.jpg") | dict.fromkeys(CLUTTER, b"\0\5\x16\7junk")
    with unpack_bytes(pack(members)) as found:
        assert [p.name for p in found.photos] == ["a.jpg", "x/b.jpg"]
        assert found.texts == ()
    assert capsys.readouterr().out == ""


def test_folders_are_no_images(names_in):
    entry = tar_info("set.jpg/", tarfile.DIRTYPE)
    files = [(tar_info(f"./set.jpg/{n}", size=len(c)), c) for n, c in photos("1", "2").items()]
    assert names_in(tar_bytes([(entry, b""), *files])) == ["set.jpg/1", "set.jpg/2"]
    assert names_in(zip_bytes({"x/": b"", "y\\": b""} | photos("x\\1.jpg", "y\\2.jpg"))) == [
        "x/1.jpg",
        "y/2.jpg",
    ]


def test_names_of_a_mac(unpack_bytes):
    """Its zips hold UTF-8, decomposed, without saying so."""
    said = zip_bytes(photos("u\u0308ber.jpg", "b.jpg"))
    unsaid = bytearray(said)
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = unsaid.index(signature)
        assert unsaid[at + offset + 1] == 8
        unsaid[at + offset + 1] = 0
    for content in (said, bytes(unsaid)):
        with unpack_bytes(content) as found:
            assert {p.name for p in found.photos} == {"b.jpg", "über.jpg"}


def test_names_that_are_no_text(names_in):
    members = photos("a.jpg", "\udcff.jpg")
    files = [(tar_info(name, size=len(c)), c) for name, c in members.items()]
    assert names_in(tar_bytes(files, tarfile.GNU_FORMAT)) == ["a.jpg", "\ufffd.jpg"]


def test_every_kind_of_image(unpack_bytes):
    good = {
        f"{k}/{sample.file_name}": sample
        for k, sample in enumerate(corpus())
        if sample.error is None and min(sample.size) >= 4 and len(sample.content) < 300_000
    }
    assert len(good) >= 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "MIN_SIDE", 1)
        content = zip_bytes({name: sample.content for name, sample in good.items()})
        with unpack_bytes(content) as found:
            assert {p.name: p.size for p in found.photos} == {
                name: sample.size for name, sample in good.items()
            }
            for p in found.photos:
                assert read_image(p.path, p.label).rgb.size == p.size


def test_a_photo_from_a_phone_is_upright(unpack_bytes):
    turned = encode(plain(size=(96, 80)), "JPEG", exif=orientation(6))
    with unpack_bytes(zip_bytes({"a.jpg": turned, "b.jpg": photo()})) as found:
        assert found.photos[0].size == (80, 96)


def test_alpha_survives_as_a_mask(unpack_bytes):
    soft = photo((180, 80, 40, 64), SIZE, "PNG", "RGBA")
    with unpack_bytes(zip_bytes({"a.png": soft, "b.jpg": photo()})) as found:
        alphas = [read_image(p.path, p.label).alpha for p in found.photos]
    assert alphas[1] is None
    assert (np.asarray(alphas[0]) == 64).all()


def test_images_need_no_ending_others_are_left_with_a_note(unpack_bytes, capsys):
    others = {
        "film.mp4": b"\0\0\0\x18ftypmp42",
        "IMG.CR2": b"II*\0",
        "a.pdf": b"%PDF-1.7",
        "z": b"",
    }
    members = photos("IMG_1", "IMG_2.orig", "c.jpeg_large") | others
    with unpack_bytes(zip_bytes(members)) as found:
        assert [p.name for p in found.photos] == ["c.jpeg_large", "IMG_1", "IMG_2.orig"]
    assert capsys.readouterr().out == (
        "input_images: ignored, as neither an image nor captions:"
        " 'a.pdf', 'film.mp4', 'IMG.CR2', 'z'\n"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "AVIF", "HEIF", "TIFF", "BMP"])
def test_which_images_need_an_ending(kind):
    """A camera's raw files begin as TIFF does, and BM may begin a text."""
    assert begins_like_photo(photo(kind=kind)[:64]) is (kind not in ("TIFF", "BMP"))
    assert f".{kind.lower()}" in image_suffixes()


def test_no_ending_is_of_two_kinds():
    assert {".jpg", ".jpeg", ".jfif", ".heic", ".heif", ".tif"} <= image_suffixes()
    others = {".csv", ".txt", ".json", ".pdf", ".mp4", ".mov", ".dng", ".cr2", ".svg", ".zip", ""}
    assert not others & image_suffixes()


def test_nobodys_names_are_written(unpack_bytes, folder):
    with unpack_bytes(zipped("$(x)/a.jpg", "b.jpg", caption_csv="x")) as found:
        (private,) = folder.iterdir()
        assert sorted(path.name for path in private.iterdir()) == ["0", "1", "2"]
        assert {p.path.parent for p in (*found.photos, *found.texts)} == {private}


# --- what is refused

ONE = photo()
GOOD = photos("a.jpg", "b.jpg")
PADDED = {f"{name}.bmp": photo(kind="BMP") for name in "ab"}


def encrypted():
    content = bytearray(zip_bytes(GOOD))
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


def zip_link():
    info = zipfile.ZipInfo("c.jpg")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return zip_bytes([*GOOD.items(), (info, b"/etc/passwd")])


def tar_with(kind, name="c.jpg"):
    files = [(tar_info(name, size=len(content)), content) for name, content in GOOD.items()]
    return tar_bytes([*files, (tar_info(name, kind, linkname="/etc/passwd"), b"")])


def good_and(name, content):
    return zip_bytes(GOOD | {name: content})


def bomb(members):
    return gz_bytes(tar_bytes(members))


def twice():
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zip_bytes([("a.jpg", ONE), ("b.jpg", ONE), ("a.jpg", photo((0, 0, 0)))])


BAD = {
    # name: (content, error, what the message has to say, and its remedy)
    "empty file": (b"", BadArchive, "is an empty file", "send a zip, tar"),
    "one photo": (ONE, BadArchive, "is a JPEG image, not an archive", "send a zip, tar"),
    "web page": (b"<html>log in</html>", BadArchive, "is a web page", "send a zip, tar"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(99), BadArchive, "is a 7z archive", "send a zip, tar"),
    "rar": (b"Rar!\x1a\x07" + bytes(99), BadArchive, "is a RAR archive", "send a zip, tar"),
    "noise": (bytes(range(256)), BadArchive, "of an unknown kind", "send a zip, tar"),
    "empty tar": (tar_bytes({}), BadArchive, "of an unknown kind", "send a zip, tar"),
    "empty zip": (zip_bytes({}), BadArchive, "but nothing at all", "send a zip, tar"),
    "only folders": (zip_bytes({"x/": b""}), BadArchive, "holds no image", "send a zip, tar"),
    "only a Mac's doubles": (
        tar_bytes({"._a.jpg": ONE, "__MACOSX/b.jpg": ONE}),
        BadArchive, "holds no image, but nothing at all", "send a zip",
    ),
    "only a video": (zip_bytes({"a.mp4": b"x"}), BadArchive, "no image, but 'a.mp4'", "send a"),
    "only captions": (zip_bytes({"a.txt": b"x"}), BadArchive, "no image, but 'a.txt'", "send a"),
    "archive in archive": (
        zip_bytes({"photos.zip": zip_bytes(GOOD)}),
        BadArchive, "no image, but 'photos.zip'", "send a zip",
    ),
    "one image": (
        zip_bytes({"a.jpg": ONE}),
        BadArchive, "holds one image, 'a.jpg'; at least 2 are needed", "send more",
    ),
    "same name twice": (twice(), BadArchive, "holds 'a.jpg' twice", "pack it again"),
    "4 pixels": (
        good_and("c.png", photo(size=(2, 2), kind="PNG")),
        BadImage, "'c.png' is 2x2 pixels; each side needs at least 64", "send a larger",
    ),
    "a line": (
        good_and("c.png", photo(size=(1000, 63), kind="PNG")),
        BadImage, "is 1000x63 pixels", "send a larger",
    ),
    "text named jpg": (
        good_and("c.jpg", b"hello"),
        BadImage, "'c.jpg' is not an image that can be read (5 bytes", "send a PNG",
    ),
    "empty picture": (good_and("x/c.png", b""), BadImage, "'x/c.png' is an empty", "send a PNG"),
    "PDF named png": (good_and("c.png", b"%PDF-1.7"), BadImage, "a PDF document", "send a PNG"),
    "start of a JPEG": (good_and("c", ONE[:9]), BadImage, "'c' is ", "send "),
    "200 megapixels": (
        good_and("c.png", png_header(20_000, 10_000)),
        BadImage, "has 200000000 pixels", "send a smaller",
    ),
    "encrypted": (encrypted(), BadArchive, "is encrypted", "without a password"),
    "lzma": (zip_bytes(GOOD, zipfile.ZIP_LZMA), BadArchive, "a rare zip compression", "deflate"),
    "zip cut short": (zip_bytes(GOOD)[:-9], BadArchive, "is no valid zip file", "pack it again"),
    "zip, wrong bytes": (
        zip_bytes(GOOD, zipfile.ZIP_STORED).replace(GOOD["a.jpg"][-40:], bytes(40)),
        BadArchive, "is no valid zip file (Bad CRC-32", "pack it again",
    ),
    "tar cut short": (tar_bytes(GOOD)[:900], BadArchive, "is cut short", "get it again"),
    "tar with noise": (
        tar_bytes(GOOD)[:-9000] + bytes(range(256)) * 4,
        BadArchive, "is no readable tar", "get it again",
    ),
    "tar.gz cut short": (bomb(GOOD)[:-90], BadArchive, "cannot be expanded", "get it again"),
    "gz of a photo": (gz_bytes(ONE), BadArchive, "is no readable tar", "pack it as tar"),
    "symbolic link": (tar_with(tarfile.SYMTYPE), BadArchive, "not a regular file, 'c.jpg'", "link"),
    "hard link": (tar_with(tarfile.LNKTYPE), BadArchive, "not a regular file", "links"),
    "device": (tar_with(tarfile.CHRTYPE), BadArchive, "not a regular file", "devices"),
    "zip link": (zip_link(), BadArchive, "not a regular file, 'c.jpg'", "links"),
    "absolute": (tar_with(b"0", "/c.jpg"), BadArchive, "outside of it, '/c.jpg'", "plain names"),
    "parent": (good_and("x/../../c.jpg", ONE), BadArchive, "outside of it", "plain names"),
    "parent, hidden": (good_and("__MACOSX/../../c", ONE), BadArchive, "outside", "plain names"),
    "drive": (good_and("C:\\c.jpg", ONE), BadArchive, "points outside of it", "plain names"),
    "captions in JSON": (
        good_and("captions.json", b"{}"),
        BadCaptions, "'captions.json' seems to hold captions", "caption.csv with the columns",
    ),
    "captions of Hugging Face": (
        good_and("metadata.jsonl", b"{}"), BadCaptions, "'metadata.jsonl' seems", "caption.csv",
    ),
    "captions of kohya": (
        good_and("x/a.caption", b"TOK"), BadCaptions, "'x/a.caption' seems", "a .txt beside",
    ),
}  # fmt: skip


def check_refusal(message, fault, remedy):
    assert message.startswith(LABEL)
    assert fault in message
    assert remedy in message.partition(fault)[2], message
    assert "\n" not in message


@pytest.mark.parametrize(("content", "error", "fault", "remedy"), BAD.values(), ids=BAD)
def test_a_bad_archive_is_refused_and_named(names_in, tmp_path, content, error, fault, remedy):
    with pytest.raises(error) as caught:
        names_in(content)
    assert isinstance(caught.value, PreprocessError)
    check_refusal(str(caught.value), fault, remedy)
    assert str(tmp_path) not in str(caught.value)


LIMITS = {
    # name: (limits, content, what the message has to say)
    "packed bytes": ({"MAX_ARCHIVE_BYTES": 99}, zip_bytes(GOOD), "at most 99 are read"),
    "members": ({"members": 2}, good_and("x.mp4", b""), "has more than 2 members"),
    "pictures": ({"MAX_IMAGES": 2}, zipped("a.jpg", "b.jpg", "c.jpg"), "more than 2 images"),
    "a picture": (
        {"MAX_IMAGE_BYTES": 9},
        zip_bytes(GOOD),
        f"holds 'a.jpg' of {len(GOOD['a.jpg'])} bytes; 9 are allowed",
    ),
    "a text": ({"MAX_TEXT_BYTES": 9}, good_and("a.txt", bytes(10)), "holds 'a.txt' of 10 bytes"),
    "zip, expanded": ({"total_bytes": 999}, zip_bytes(GOOD), "holds more than 999 bytes"),
    "tar, expanded": ({"total_bytes": 999}, tar_bytes(GOOD), "holds more than 999 bytes"),
    "zip bomb": (
        {"free_bytes": 99_999},
        zip_bytes({"a.bmp": bytes(2_000_000)}),
        "expands to more than 200 times its size",
    ),
    "tar.gz bomb": (
        {"free_bytes": 99_999},
        bomb({"x.mp4": bytes(2_000_000)}),
        "expands to more than 200 times its size",
    ),
}


@pytest.mark.parametrize(("limits", "content", "fault"), LIMITS.values(), ids=LIMITS)
def test_every_limit_holds(names_in, monkeypatch, limits, content, fault):
    for name, value in limits.items():
        if name.isupper():
            monkeypatch.setattr(archive, name, value)
        else:
            monkeypatch.setattr(archive, "LIMITS", replace(archive.LIMITS, **{name: value}))
    with pytest.raises(BadArchive) as caught:
        names_in(content)
    check_refusal(str(caught.value), fault, "")


def test_a_large_film_is_not_even_written(names_in, monkeypatch):
    monkeypatch.setattr(archive, "MAX_IMAGE_BYTES", 5000)
    assert names_in(good_and("film.mp4", bytes(5001))) == ["a.jpg", "b.jpg"]


def test_flat_drawings_may_shrink_a_lot(names_in):
    drawings = {f"{k}.bmp": photo((k, 0, 0), (800, 600), "BMP") for k in range(3)}
    assert len(names_in(zip_bytes(drawings))) == 3


def test_no_file_and_a_folder(tmp_path, folder):
    for path, fault in ((tmp_path / "no", "is missing"), (tmp_path, "is a folder")):
        with (
            pytest.raises(BadArchive, match=f"{LABEL} {fault}.*; send a zip"),
            unpacked(path, LABEL, folder),
        ):
            pass


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_a_full_disk_says_so(names_in, folder, monkeypatch, pack):
    def fail(self, path):
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Member, "save", fail)
    with pytest.raises(DiskFull, match=f"^{LABEL} does not fit .*: the disk is full; free some"):
        names_in(pack(GOOD))


def test_a_full_disk_that_takes_no_folder(names_in, monkeypatch):
    def fail(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(DiskFull):
        names_in(zip_bytes(GOOD))


def test_another_error_of_the_disk_stays_what_it_is(names_in, monkeypatch):
    def fail(self, path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Member, "save", fail)
    with pytest.raises(OSError, match="Input/output"):
        names_in(zip_bytes(GOOD))


class Cancelled(BaseException):
    pass


def test_a_cancelled_training_leaves_nothing(unpack_bytes, monkeypatch):
    with pytest.raises(Cancelled), unpack_bytes(zip_bytes(GOOD)):
        raise Cancelled

    def cancel(path, label):
        raise Cancelled

    monkeypatch.setattr(archive, "read_size", cancel)
    with pytest.raises(Cancelled), unpack_bytes(zip_bytes(GOOD)):
        pass


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_is_an_error_of_ours_or_none(data, tmp_path_factory):
    """Flipped bytes and cuts anywhere, in every packing."""
    content = bytearray(data.draw(st.sampled_from(DAMAGED)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    folder = tmp_path_factory.getbasetemp() / "damaged-folder"
    folder.mkdir(exist_ok=True)
    try:
        with unpacked(path, LABEL, folder) as found:
            told, names = LABEL, len(found.photos)
    except PreprocessError as error:
        told, names = str(error), 2
    assert told.startswith(LABEL)
    assert names == 2
    assert list(folder.iterdir()) == []


DAMAGED = [pack(photos("a.jpg", "b.png")) for pack in PACKERS.values()]
