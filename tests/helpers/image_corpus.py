"""Odd and broken image files, made here so that none lies in the repository."""

import io
import mimetypes
import struct
import zlib
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pillow_heif
from PIL import Image, ImageCms

WIDTH, HEIGHT = 64, 48
RUST = (200, 80, 40)
GREEN = (0, 160, 0)
GREY = 100
ORIENTATION = 0x0112
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

pillow_heif.register_heif_opener()


@dataclass(frozen=True)
class Sample:
    """A file and what comes of it: an image, or an error with `error` in its message."""

    name: str
    file_name: str
    content: bytes
    error: str | None = None
    size: tuple[int, int] = (WIDTH, HEIGHT)
    mean: tuple[float, float, float] = RUST  # over white
    tolerance: float = 1.5  # of 255, for each channel's mean

    @property
    def data_uri(self) -> str:
        kind = mimetypes.guess_type(self.file_name)[0] or "application/octet-stream"
        return f"data:{kind};base64,{b64encode(self.content).decode()}"


def corpus() -> list[Sample]:
    """Every sample, good ones first; the same bytes each time."""
    samples = [*_photos(), *_drawings(), *_deep_and_other(), *_odd_but_right(), *_profiles()]
    return [*samples, *_no_pictures(), *_damaged(), *_too_large()]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def plain(colour=RUST, mode="RGB", size=(WIDTH, HEIGHT)) -> Image.Image:
    return Image.new(mode, size, colour)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(width, height, depth, colour_type, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of raw rows, each with its filter byte in front, and further chunks before them."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows, 9))
    body = png_chunk(b"IHDR", header) + b"".join(chunks) + data
    return PNG_MAGIC + body + png_chunk(b"IEND", b"")


def flat_png(depth, colour_type, pixel_row: bytes, *chunks: bytes) -> bytes:
    return png(WIDTH, HEIGHT, depth, colour_type, (b"\0" + pixel_row) * HEIGHT, *chunks)


def swapped_profile() -> bytes:
    """sRGB with the red and the green primary exchanged: a conversion turns red into green.

    A profile's tags are listed behind a header of 128 bytes and a count, each as name, offset and
    length (ICC.1:2022, 7.3); here the names change places.
    """
    profile = srgb_profile()
    (count,) = struct.unpack_from(">I", profile, 128)
    table = slice(132, 132 + 12 * count)
    entries = profile[table].replace(b"rXYZ", b"....").replace(b"gXYZ", b"rXYZ")
    return profile[:132] + entries.replace(b"....", b"gXYZ") + profile[table.stop :]


def srgb_profile() -> bytes:
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = bytes(12)  # the date
    profile[84:100] = bytes(16)  # a checksum of it all
    return bytes(profile)


def _photos() -> Iterator[Sample]:
    jpeg = encode(plain(), "JPEG", quality=95)
    turned = encode(plain(), "JPEG", quality=95, exif=orientation(6))
    broken_exif = encode(plain(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    cmyk = plain().convert("CMYK")
    second = plain(GREEN)
    yield Sample("jpeg", "a.jpg", jpeg)
    yield Sample("jpeg-progressive", "a.jpg", encode(plain(), "JPEG", progressive=True))
    yield Sample("jpeg-grey", "a.jpeg", encode(plain(GREY, "L"), "JPEG"), mean=(GREY,) * 3)
    yield Sample("jpeg-cmyk-adobe", "a.jpg", encode(cmyk, "JPEG", quality=95))
    yield Sample("jpeg-turned", "a.jpg", turned, size=(HEIGHT, WIDTH))
    yield Sample("jpeg-damaged-exif", "a.jpg", broken_exif)
    yield Sample("jpeg-and-garbage", "a.jpg", jpeg + b"garbage" * 100)
    yield Sample("jpeg-named-png", "a.png", jpeg)
    yield Sample(
        "mpo", "a.jpg", encode(plain(), "MPO", save_all=True, append_images=[second], quality=95)
    )
    yield Sample("webp", "a.webp", encode(plain(), "WEBP", quality=95), tolerance=4)
    yield Sample("avif", "a.avif", encode(plain(), "AVIF", quality=90), tolerance=4)
    yield Sample("heic", "a.heic", encode(plain(), "HEIF", quality=95), tolerance=4)
    yield Sample(
        "heic-turned",
        "a.heic",
        encode(plain(), "HEIF", quality=95, exif=orientation(6).tobytes()),
        size=(HEIGHT, WIDTH),
        tolerance=4,
    )
    for kind, brand in (("AVIF", b"ftypavif"), ("HEIF", b"ftypheic")):  # a brand both may have
        content = encode(plain(), kind, quality=95).replace(brand, b"ftypmif1", 1)
        assert b"ftypmif1" in content
        yield Sample(f"{kind.lower()}-brand-mif1", "a.heif", content, tolerance=4)
    yield Sample("jpeg2000", "a.jp2", encode(plain(), "JPEG2000"))


def _drawings() -> Iterator[Sample]:
    """Transparency, palettes, animations."""
    half = (227, 167, 147)  # rust of alpha 128 over white
    bytes_alpha = png_chunk(b"tRNS", bytes([128, 0]))
    palette = png_chunk(b"PLTE", bytes([*RUST, *GREEN]))
    frames = {"save_all": True, "append_images": [plain(GREEN)], "duration": 100}
    clear_gif = plain(RUST).quantize(2)
    clear_gif.paste(1, (0, 0, WIDTH // 2, HEIGHT))
    yield Sample("png", "a.png", encode(plain(), "PNG"))
    yield Sample("png-alpha", "a.png", encode(plain((*RUST, 128), "RGBA"), "PNG"), mean=half)
    yield Sample(
        "png-clear-hides-colour",
        "a.png",
        encode(plain((*RUST, 0), "RGBA"), "PNG"),
        mean=(255, 255, 255),
        tolerance=0,
    )
    yield Sample(
        "png-grey-alpha", "a.png", encode(plain((0, 128), "LA"), "PNG"), mean=(127, 127, 127)
    )
    yield Sample("png-palette", "a.png", encode(plain().quantize(2), "PNG"))
    yield Sample(
        "png-palette-alpha", "a.png", flat_png(8, 3, bytes(WIDTH), palette, bytes_alpha), mean=half
    )
    yield Sample(
        "png-colour-key",
        "a.png",
        flat_png(8, 2, bytes(RUST) * WIDTH, png_chunk(b"tRNS", struct.pack(">HHH", *RUST))),
        mean=(255, 255, 255),
    )
    yield Sample(
        "png-grey-key",
        "a.png",
        flat_png(4, 0, b"\x66" * (WIDTH // 2), png_chunk(b"tRNS", struct.pack(">H", 6))),
        mean=(255, 255, 255),
    )
    yield Sample("webp-alpha", "a.webp", encode(plain((*RUST, 128), "RGBA"), "WEBP"), mean=half)
    yield Sample("webp-moving", "a.webp", encode(plain(), "WEBP", lossless=True, **frames))
    yield Sample("apng", "a.png", encode(plain(), "PNG", **frames))
    yield Sample("gif", "a.gif", encode(plain(), "GIF"))
    yield Sample("gif-moving", "a.gif", encode(plain(), "GIF", **frames))
    yield Sample(
        "gif-clear", "a.gif", encode(clear_gif, "GIF", transparency=1), mean=half, tolerance=2
    )
    yield Sample("avif-alpha", "a.avif", encode(plain((*RUST, 128), "RGBA"), "AVIF"), mean=half)
    yield Sample("heic-alpha", "a.heic", encode(plain((*RUST, 128), "RGBA"), "HEIF"), mean=half)


def _deep_and_other() -> Iterator[Sample]:
    """More than 8 bits, other colour spaces, rarer formats."""
    deep = Image.fromarray(np.full((HEIGHT, WIDTH), GREY * 257, np.uint16))
    fraction = Image.fromarray(np.full((HEIGHT, WIDTH), GREY / 255, np.float32))
    grey = (GREY,) * 3
    lab = Image.frombytes("LAB", (WIDTH, HEIGHT), bytes([136, 0, 0]) * WIDTH * HEIGHT)
    pages = {"save_all": True, "append_images": [plain(GREEN)]}
    rgb48 = struct.pack(">HHH", *(value * 257 for value in RUST)) * WIDTH
    pgm = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + struct.pack(">H", GREY * 257) * WIDTH * HEIGHT
    yield Sample("png-1-bit", "a.png", encode(plain(1, "1"), "PNG"), mean=(255, 255, 255))
    yield Sample("png-16-bit-grey", "a.png", encode(deep, "PNG"), mean=grey)
    yield Sample("png-16-bit-rgb", "a.png", flat_png(16, 2, rgb48))
    yield Sample("pgm-16-bit", "a.pgm", pgm, mean=grey)
    yield Sample("tiff-16-bit-grey", "a.tif", encode(deep, "TIFF"), mean=grey)
    yield Sample("tiff-float", "a.tif", encode(fraction, "TIFF"), mean=grey)
    yield Sample("tiff-lab", "a.tif", encode(lab, "TIFF"), mean=_lab_colour(lab), tolerance=2)
    yield Sample("tiff-cmyk", "a.tif", encode(plain().convert("CMYK"), "TIFF"))
    yield Sample("tiff-pages", "a.tiff", encode(plain(), "TIFF", **pages))
    yield Sample("tiff-lzw", "a.tiff", encode(plain(), "TIFF", compression="tiff_lzw"))
    yield Sample(
        "tiff-turned", "a.tif", encode(plain(), "TIFF", exif=orientation(8)), size=(HEIGHT, WIDTH)
    )
    yield Sample("bmp", "a.bmp", encode(plain(), "BMP"))
    yield Sample("tga", "a.tga", encode(plain(), "TGA"))
    yield Sample("qoi", "a.qoi", encode(plain(), "QOI"))
    yield Sample("dds", "a.dds", encode(plain(), "DDS"))
    yield Sample("pcx", "a.pcx", encode(plain(), "PCX"))
    yield Sample(
        "ico", "a.ico", encode(plain(size=(48, 48)), "ICO", sizes=[(48, 48)]), size=(48, 48)
    )


def _lab_colour(lab: Image.Image) -> tuple[int, int, int]:
    return lab.convert("RGB").getpixel((0, 0))


def _odd_but_right() -> Iterator[Sample]:
    whole = encode(plain(), "PNG")
    wide = png(3000, 2000, 1, 0, (b"\0" + b"\xff" * 375) * 2000)
    few_rows = png(WIDTH, HEIGHT, 8, 2, (b"\0" + bytes(RUST) * WIDTH) * (HEIGHT // 2))
    half_black = tuple(value / 2 for value in RUST)  # as browsers do
    yield Sample("png-too-few-rows", "a.png", few_rows, mean=half_black)
    yield Sample("png-without-end", "a.png", whole[:-12])
    yield Sample("png-and-garbage", "a.png", whole + b"\0" * 1000)
    yield Sample("png-without-extension", "picture", whole)
    yield Sample("png-one-pixel", "a.png", encode(plain(size=(1, 1)), "PNG"), size=(1, 1))
    yield Sample("png-long", "a.png", encode(plain(size=(600, 2)), "PNG"), size=(600, 2))
    yield Sample("png-six-megapixels", "a.png", wide, size=(3000, 2000), mean=(255, 255, 255))


def _profiles() -> Iterator[Sample]:
    swapped = (RUST[1], RUST[0], RUST[2])
    yield Sample("png-srgb-profile", "a.png", encode(plain(), "PNG", icc_profile=srgb_profile()))
    yield Sample(
        "jpeg-other-primaries",
        "a.jpg",
        encode(plain(), "JPEG", quality=95, icc_profile=swapped_profile()),
        mean=swapped,
        tolerance=3,
    )
    yield Sample(
        "png-grey-with-rgb-profile",
        "a.png",
        encode(plain(GREY, "L"), "PNG", icc_profile=srgb_profile()),
        mean=(GREY,) * 3,
    )
    yield Sample("png-damaged-profile", "a.png", encode(plain(), "PNG", icc_profile=b"no profile"))
    yield Sample(
        "tiff-cmyk-with-rgb-profile",
        "a.tif",
        encode(plain().convert("CMYK"), "TIFF", icc_profile=srgb_profile()),
    )


def _no_pictures() -> Iterator[Sample]:
    unreadable = "not an image that can be read"
    noise = np.random.default_rng(1).bytes(1000)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    wmf = b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 9, 9, 96) + bytes(20)
    yield Sample("empty", "a.png", b"", "empty file (0 bytes)")
    yield Sample("noise", "a.png", noise, unreadable)
    yield Sample("one-byte", "a.png", b"P", unreadable)
    yield Sample("text", "a.jpg", b"hello", f"{unreadable} (5 bytes, of an unknown kind)")
    yield Sample("html", "a.jpg", b"\n<!DOCTYPE html><title>404</title>", "a web page")
    yield Sample("json", "a.png", b'{"error": "expired"}', "JSON")
    yield Sample("svg", "a.svg", svg, "an SVG drawing")
    yield Sample("pdf", "a.pdf", b"%PDF-1.7\n1 0 obj\n", "a PDF document")
    yield Sample("eps", "a.eps", eps, "a PostScript document")
    yield Sample("zip", "a.zip", b"PK\3\4" + bytes(40), "a ZIP archive")
    yield Sample("wmf", "a.wmf", wmf, unreadable)
    yield Sample("mp4", "a.mp4", b"\0\0\0\x18ftypmp42" + bytes(40), unreadable)
    yield Sample("only-png-magic", "a.png", PNG_MAGIC, "PNG with a damaged beginning")
    yield Sample("only-jpeg-magic", "a.jpg", b"\xff\xd8\xff", "JPEG with a damaged beginning")
    yield Sample("png-no-pixels", "a.png", png(0, 0, 8, 2, b""), "no pixels")


def _damaged() -> Iterator[Sample]:
    damaged = "is a damaged image"
    random = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    noisy = Image.fromarray(random)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "QOI", "HEIF"):
        whole = encode(noisy, kind)
        yield Sample(f"cut-{kind.lower()}", f"a.{kind.lower()}", whole[: len(whole) // 2], damaged)
    avif = encode(noisy, "AVIF")
    yield Sample("cut-avif", "a.avif", avif[: len(avif) // 2], "AVIF with a damaged beginning")
    whole = bytearray(encode(noisy, "PNG"))
    whole[len(whole) // 2] ^= 0xFF
    yield Sample("png-flipped-byte", "a.png", bytes(whole), damaged)
    header = png(WIDTH, HEIGHT, 8, 2, b"").split(b"IDAT")[0][:-4]
    yield Sample("png-no-data", "a.png", header + png_chunk(b"IEND", b""), damaged)


def _too_large() -> Iterator[Sample]:
    """Few bytes that would fill the memory."""
    row = b"\0" + b"\xff" * (9000 // 8)
    gif = bytearray(encode(plain(), "GIF"))
    gif[6:10] = b"\xff" * 4
    bmp = bytearray(encode(plain(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 30000, 30000)
    huge = png(100000, 100000, 8, 2, bytes(10))
    yield Sample("png-claims-10-gigapixels", "a.png", huge, "has 10000000000 pixels")
    yield Sample(
        "png-72-megapixels",
        "a.png",
        png(9000, 8000, 1, 0, row * 8000),
        "has 9000x8000 = 72000000 pixels; at most 64000000 are read",
    )
    yield Sample("gif-claims-4-gigapixels", "a.gif", bytes(gif), "has 4294836225 pixels")
    yield Sample("bmp-claims-900-megapixels", "a.bmp", bytes(bmp), "has 900000000 pixels")
