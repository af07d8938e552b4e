"""Images from outside: every kind of file, upright, in sRGB, or a clear refusal."""

import io
import re
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from preprocess.errors import BadImage
from preprocess.images import MAX_IMAGE_PIXELS, _split, read_image, read_mask
from tests.helpers.image_corpus import (
    GREEN,
    ORIENTATION,
    RUST,
    WIDTH,
    corpus,
    encode,
    flat_png,
    orientation,
    plain,
    png_chunk,
    srgb_profile,
    swapped_profile,
)

CORPUS = {sample.name: sample for sample in corpus()}
GOOD = [name for name, sample in CORPUS.items() if sample.error is None]
BAD = [name for name, sample in CORPUS.items() if sample.error is not None]
RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


@pytest.fixture
def sent(tmp_path):
    """Write a file as a user would send it."""

    def write(content: bytes, name: str = "sent") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def first_pixel(image):
    return image.getpixel((0, 0))


def grey_of(sent, image, kind="TIFF"):
    """What the grey values of an image have become."""
    rgb = np.asarray(read_image(sent(encode(image, kind)), "image").rgb)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0].tolist()


# --- the corpus


def test_the_corpus_is_the_same_each_time():
    assert corpus() == list(CORPUS.values())
    assert len(CORPUS) >= 45


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file(name, sent):
    sample = CORPUS[name]
    read = read_image(sent(sample.content, sample.file_name), "image")
    assert (read.rgb.mode, read.rgb.size) == ("RGB", sample.size)
    mean = np.asarray(read.rgb).reshape(-1, 3).mean(0)
    assert np.abs(mean - sample.mean).max() <= sample.tolerance
    if read.alpha is not None:
        assert (read.alpha.mode, read.alpha.size) == ("L", sample.size)
        assert read.alpha.getextrema()[0] < 255


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_a_bad_file(name, read, sent):
    sample = CORPUS[name]
    path = sent(sample.content, sample.file_name)
    with pytest.raises(BadImage, match=re.escape(sample.error)) as caught:
        read(path, "control_image")
    message = str(caught.value)
    assert message.startswith("control_image ")
    assert "send " in message
    assert "\n" not in message
    assert str(path.parent) not in message
    assert not re.search(r"_io|object at", message)


# --- what is no file


@pytest.mark.parametrize("read", [read_image, read_mask])
def test_no_file(read, tmp_path):
    with pytest.raises(BadImage, match=r"^mask is missing: its file does not exist; send "):
        read(tmp_path / "nothing", "mask")
    with pytest.raises(BadImage, match=r"^mask is a folder; send "):
        read(tmp_path, "mask")


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_file_is_closed_and_may_go(sent):
    for name in ("png", "tiff-16-bit-grey", "bmp", "gif-moving", "webp-moving", "mpo", "heic"):
        path = sent(CORPUS[name].content)
        before = open_files()
        read = read_image(path, "image")
        assert open_files() == before
        path.write_bytes(bytes(path.stat().st_size))
        path.unlink()
        assert np.asarray(read.rgb).any()


def test_what_decodes_the_newer_formats_is_there():
    assert features.check("avif")
    assert features.check("webp")
    assert features.check("littlecms2")


# --- the limit


def test_the_limit_is_on_pixels(sent, monkeypatch):
    monkeypatch.setattr("preprocess.images.MAX_IMAGE_PIXELS", 64 * 48)
    read_image(sent(encode(plain(), "PNG")), "image")
    with pytest.raises(BadImage, match=r"image has 64x49 = 3136 pixels; at most 3072"):
        read_image(sent(encode(plain(size=(64, 49)), "PNG")), "image")


def test_nothing_too_large_is_decoded(sent, monkeypatch):
    def load(_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(BadImage, match=f"at most {MAX_IMAGE_PIXELS} are read"):
        read_image(sent(CORPUS["png-72-megapixels"].content), "image")


# --- upright


UNDONE = {  # Orientation → how the image is turned before it is stored so
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation(kind, value, sent):
    quarters = Image.new("RGB", (48, 32), "white")
    quarters.paste(RED, (0, 0, 24, 16))
    quarters.paste(BLUE, (24, 0, 48, 16))
    stored = quarters if value == 1 else quarters.transpose(UNDONE[value])
    exif = orientation(value)
    content = encode(stored, kind, exif=exif if kind == "TIFF" else exif.tobytes())
    upright = read_image(sent(content), "image").rgb
    assert upright.size == quarters.size
    assert np.abs(np.asarray(upright, int) - np.asarray(quarters)).mean() < 6


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_is_none(value, sent):
    content = encode(plain(), "PNG", exif=orientation(value).tobytes())
    assert read_image(sent(content), "image").rgb.size == plain().size


def test_an_orientation_in_words(sent):
    tag = struct.pack(">HHI4s", ORIENTATION, 2, 4, b"six")
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + tag + bytes(4)
    assert read_image(sent(encode(plain(), "JPEG", exif=exif)), "image").rgb.size == plain().size


def test_alpha_and_mask_turn_along(sent):
    image = plain((*RUST, 255), "RGBA", size=(4, 2))
    image.putpixel((0, 0), (*RUST, 0))
    path = sent(encode(image, "PNG", exif=orientation(6).tobytes()))
    assert read_image(path, "image").alpha.getpixel((1, 0)) == 0
    assert read_mask(path, "mask").size == (2, 4)
    assert read_mask(path, "mask").getpixel((1, 0)) == 0


# --- transparency


def test_white_shows_through_rounded_to_the_nearest(sent):
    colour, alpha = np.meshgrid(np.arange(256), np.arange(256))
    image = Image.fromarray(np.stack([colour] * 3 + [alpha], -1).astype(np.uint8))
    read = read_image(sent(encode(image, "PNG")), "image")
    exact = np.floor((colour * alpha + 255 * (255 - alpha)) / 255 + 0.5)
    assert (np.asarray(read.rgb) == exact[..., None]).all()
    assert (np.asarray(read.alpha) == alpha).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGB", "L", "1", "P", "CMYK"])
def test_no_alpha_where_all_is_opaque(mode, sent):
    image = plain((90, 90, 90, 255), "RGBA").convert(mode)
    assert read_image(sent(encode(image, "TIFF")), "image").alpha is None


def test_hidden_colours_stay_hidden_with_a_profile_too(sent):
    image = plain((*RUST, 0), "RGBA")
    image.putpixel((0, 0), (*RUST, 255))
    read = read_image(sent(encode(image, "PNG", icc_profile=swapped_profile())), "image")
    red, green, _ = first_pixel(read.rgb)
    assert green > red
    assert read.rgb.getpixel((1, 0)) == WHITE
    assert (first_pixel(read.alpha), read.alpha.getpixel((1, 0))) == (255, 0)


@pytest.mark.parametrize(
    ("depth", "colour_type", "pair", "key"),  # a clear pixel and another one
    [
        (8, 2, bytes([*RUST, *GREEN]), RUST),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc" + bytes(6), (0x1234, 0x5678, 0x9ABC)),
        (16, 0, b"\x12\x34\x12\x35", (0x1234,)),
        (8, 0, b"\x66\x67", (0x66,)),
        (4, 0, b"\x6f", (6,)),
        (2, 0, b"\x77", (1,)),
        (1, 0, b"\x55", (0,)),
    ],
)
def test_a_png_may_name_one_colour_as_clear(depth, colour_type, pair, key, sent):
    chunk = png_chunk(b"tRNS", b"".join(value.to_bytes(2, "big") for value in key))
    bits = depth * len(key) * 2
    row = pair * (WIDTH // 2 * bits // 8 // len(pair))
    read = read_image(sent(flat_png(depth, colour_type, row, chunk)), "image")
    assert np.asarray(read.alpha)[0].tolist() == [0, 255] * (WIDTH // 2)
    assert first_pixel(read.rgb) == WHITE


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_premultiplied_colours(mode):
    image = plain((100, 128), "LA").convert(mode)
    colour, alpha = _split(image.convert(mode.replace("A", "a")))
    assert np.asarray(colour).flat[0] in (99, 100)
    assert first_pixel(alpha) == 128


# --- depth and colour spaces


def test_sixteen_bits(sent):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    expected = [[0, 0, 1, 1, 128, 255]]
    assert grey_of(sent, Image.fromarray(values), "PNG") == expected
    assert grey_of(sent, Image.fromarray(values), "TIFF") == expected
    assert grey_of(sent, Image.fromarray(values.astype(np.int32)), "TIFF") == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.5, 1], [0, 128, 255]),
        ([0, 1, 2, 255], [0, 1, 2, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([-1, 0, 1], [0, 128, 255]),
        ([0, 50_000, 100_000], [0, 128, 255]),
        ([np.nan, 0.5, np.inf, -np.inf], [0, 128, 255, 0]),
        ([np.nan, np.nan], [0, 0]),
        ([-3, -3], [0, 0]),
        ([-3e38, 3e38], [0, 255]),
    ],
)
def test_fractions(values, expected, sent):
    assert grey_of(sent, Image.fromarray(np.array([values], np.float32))) == [expected]


def test_whole_numbers_of_32_bits(sent):
    values = np.array([[-(2**31), 0, 2**31 - 1]], np.int32)
    assert grey_of(sent, Image.fromarray(values)) == [[0, 128, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_a_file_can_have(mode, sent):
    if mode == "LAB":
        image = Image.frombytes("LAB", (1, 1), b"\xff\0\0")
    else:
        image = Image.new("RGB", (1, 1), "white").convert(mode)
    assert Image.open(io.BytesIO(encode(image, "TIFF"))).mode in (mode, "RGB")
    read = read_image(sent(encode(image, "TIFF")), "image")
    assert min(first_pixel(read.rgb)) >= 254


@pytest.mark.parametrize(
    ("mode", "colour"), [("HSV", (0, 0, 200)), ("RGBX", (200,) * 4), ("PA", None), ("I;16B", 51400)]
)
def test_every_mode_a_decoder_can_give(mode, colour):
    image = plain((200, 200, 200, 90), "RGBA").convert("LA").convert("PA") if mode == "PA" else None
    colours, alpha = _split(image or Image.new(mode, (2, 2), colour))
    assert np.asarray(colours).flat[0] == 200
    assert (alpha is not None) == (mode == "PA")


# --- colour profiles


def test_srgb_stays_as_it_is(sent):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    path = sent(encode(Image.fromarray(noise), "PNG", icc_profile=srgb_profile()))
    assert np.abs(np.asarray(read_image(path, "image").rgb, int) - noise).max() <= 1


def test_a_profile_that_is_of_no_use_is_named_in_the_log(sent, capsys):
    read_image(sent(CORPUS["png-damaged-profile"].content), "image")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("image: its color profile is ignored")
    read_mask(sent(CORPUS["png-damaged-profile"].content), "mask")
    assert capsys.readouterr().out == ""


def test_a_lab_image_with_a_profile(sent, capsys):
    lab = Image.frombytes("LAB", (1, 1), b"\xff\0\0")
    content = encode(lab, "TIFF", icc_profile=srgb_profile())
    assert min(first_pixel(read_image(sent(content), "image").rgb)) >= 254
    assert capsys.readouterr().out == ""


# --- masks


@pytest.mark.parametrize(
    ("colour", "mode", "grey"),
    [
        (WHITE, "RGB", 255),
        (BLACK, "RGB", 0),
        ((255, 0, 0), "RGB", 76),
        (1, "1", 255),
        (180, "L", 180),
        ((255, 255, 255, 0), "RGBA", 0),
        ((255, 255, 255, 100), "RGBA", 100),
        ((200, 200, 200, 100), "RGBA", 78),
        ((200, 255), "LA", 200),
        ((0, 0, 0, 0), "CMYK", 255),
    ],
)
def test_a_mask_is_luminance_times_alpha(colour, mode, grey, sent):
    mask = read_mask(sent(encode(plain(colour, mode), "TIFF")), "mask")
    assert (mask.mode, mask.size) == ("L", plain().size)
    assert mask.getextrema() == (grey, grey)


def test_a_mask_of_palette_and_of_16_bits(sent):
    assert first_pixel(read_mask(sent(CORPUS["png-palette-alpha"].content), "mask")) == 56
    assert first_pixel(read_mask(sent(CORPUS["png-16-bit-grey"].content), "mask")) == 100


def test_a_mask_has_no_colours_to_manage(sent):
    content = encode(plain(RUST), "PNG", icc_profile=swapped_profile())
    assert first_pixel(read_mask(sent(content), "mask")) == first_pixel(plain(RUST).convert("L"))


# --- whatever comes

SEEDS = {
    kind: encode(plain((*RUST, 200), "RGBA" if kind in ("PNG", "WEBP", "TIFF") else "RGB"), kind)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF")
}
SEEDS["JPEG with everything"] = encode(
    plain(), "JPEG", exif=orientation(6), icc_profile=swapped_profile()
)


def a_picture_or_a_refusal(path, content: bytes) -> None:
    path.write_bytes(content)
    for read in (read_image, read_mask):
        message = "image "
        try:
            read(path, "image")
        except BadImage as error:
            message = str(error)
        assert message.startswith("image ")
        assert path.name not in message


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("whatever") / "temporary-name"


some_or_many = pytest.mark.parametrize("examples", [30, pytest.param(250, marks=pytest.mark.slow)])


@some_or_many
def test_any_bytes(path, examples):
    @settings(max_examples=examples, deadline=None)
    @given(content=st.binary(max_size=200))
    def check(content):
        a_picture_or_a_refusal(path, content)

    check()


@some_or_many
def test_any_truncation(path, examples):
    @settings(max_examples=examples, deadline=None)
    @given(kind=st.sampled_from(list(SEEDS)), share=st.floats(0, 1))
    def check(kind, share):
        a_picture_or_a_refusal(path, SEEDS[kind][: int(share * len(SEEDS[kind]))])

    check()


@some_or_many
def test_any_flipped_bits(path, examples):
    @settings(max_examples=examples, deadline=None)
    @given(
        kind=st.sampled_from(list(SEEDS)),
        flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=6),
    )
    def check(kind, flips):
        content = bytearray(SEEDS[kind])
        for place, bit in flips:
            content[int(place * len(content))] ^= 1 << bit
        a_picture_or_a_refusal(path, bytes(content))

    check()
