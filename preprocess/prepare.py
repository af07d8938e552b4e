"""A training's archive of photos → pictures, masks and captions at the sizes to train on.

The models of the stages (captions, masks, enlarging) are in memory one after the other, and gone at
the end. What is wrong with the archive or its captions is said before the first one is loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from preprocess.archive import Photo, PhotoArchive, check_filetype, unpacked
from preprocess.caption import caption
from preprocess.captions import check_trigger_word, read_captions
from preprocess.crop import (
    Crop,
    Enlarge,
    Size,
    centre_of_image,
    centre_of_mass,
    choose_bucket,
    crop,
    is_short,
)
from preprocess.images import read_image
from preprocess.masks import combine
from preprocess.segment import face_masks, text_masks
from preprocess.upscale import FACTOR, Upscaler
from weights.catalog import Edition
from weights.edition import Device

LOOK = 768  # pixels: BLIP and CLIPSeg see a photo's longer side at no more, and at less themselves


@dataclass(frozen=True)
class PrepareSettings:
    """What is done with the photos; named as the inputs of a training."""

    token_string: str
    caption_prefix: str
    mask_target_prompts: str  # empty: no text mask
    clipseg_temperature: float
    use_face_detection_instead: bool
    crop_based_on_salience: bool
    filetype: str  # infer, zip or tar
    buckets: tuple[Size, ...]  # (width, height)


@dataclass(frozen=True)
class PreparedPhoto:
    """One photo as a model trains on it."""

    name: str  # inside the archive
    caption: str  # with the trigger word
    crop: Crop


@dataclass(frozen=True)
class _Look:
    """A photo, small enough for all of them to be in memory."""

    photo: Photo
    rgb: Image.Image
    alpha: Image.Image | None


def prepare(
    path: Path, settings: PrepareSettings, edition: Edition, device: Device, folder: Path
) -> list[PreparedPhoto]:
    """Caption, mask and cut out every photo of an archive; it is unpacked into `folder`.

    Raises a PreprocessError, or a WeightsError if a model cannot be fetched. Nothing is left in
    `folder`.
    """
    check_filetype(path, settings.filetype, "input_images")
    with unpacked(path, "input_images", folder) as archive:
        captions = read_captions(archive, automatic=True)
        check_trigger_word(captions, settings.token_string, settings.caption_prefix)
        return _prepare(archive, captions, settings, edition, device)


def prepare_class_images(
    path: Path, settings: PrepareSettings, folder: Path
) -> list[PreparedPhoto]:
    """The same for pictures of a class: all of each counts, and captions are their own or empty."""
    with unpacked(path, "class_images", folder) as archive:
        captions = read_captions(archive, automatic=True)
        whole = replace(settings, crop_based_on_salience=False)
        return [
            PreparedPhoto(
                photo.name,
                captions[photo.name] or "",
                _cut(photo, Image.new("L", photo.size, 255), whole, None),
            )
            for photo in archive.photos
        ]


def _prepare(
    archive: PhotoArchive,
    captions: dict[str, str | None],
    settings: PrepareSettings,
    edition: Edition,
    device: Device,
) -> list[PreparedPhoto]:
    looks = [_look(photo) for photo in archive.photos]
    described = _describe(looks, captions, settings, edition, device)
    masks = _masks(looks, settings, edition, device)
    with _enlarger(looks, settings, edition, device) as enlarge:
        crops = [
            _cut(look.photo, mask, settings, enlarge)
            for look, mask in zip(looks, masks, strict=True)
        ]
    return [
        PreparedPhoto(look.photo.name, text, cut)
        for look, text, cut in zip(looks, described, crops, strict=True)
    ]


def _look(photo: Photo) -> _Look:
    source = read_image(photo.path, photo.label)
    size = source.rgb.size
    if max(size) > LOOK:
        scale = LOOK / max(size)
        size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    rgb = source.rgb.resize(size, Image.Resampling.LANCZOS)
    alpha = source.alpha and source.alpha.resize(size, Image.Resampling.BILINEAR)
    return _Look(photo, rgb, alpha)


def _describe(
    looks: Sequence[_Look],
    captions: dict[str, str | None],
    settings: PrepareSettings,
    edition: Edition,
    device: Device,
) -> list[str]:
    """People's captions as they are; for the other photos the prefix and what BLIP sees."""
    without = [look for look in looks if captions[look.photo.name] is None]
    automatic = caption([look.rgb for look in without], edition, device)
    prefix = " ".join(settings.caption_prefix.split())
    written = {
        look.photo.name: f"{prefix} {text}" for look, text in zip(without, automatic, strict=True)
    }
    return [captions[look.photo.name] or written[look.photo.name] for look in looks]


def _masks(
    looks: Sequence[_Look], settings: PrepareSettings, edition: Edition, device: Device
) -> list[Image.Image]:
    """What counts in each photo, at the look's size: its alpha, and what is asked for by text."""
    images = [look.rgb for look in looks]
    found: Sequence[Image.Image | None] = [None] * len(looks)
    if settings.use_face_detection_instead:
        found = face_masks(images, edition, device)
    elif settings.mask_target_prompts.strip():
        temperature = settings.clipseg_temperature
        found = text_masks(images, settings.mask_target_prompts, temperature, edition, device)
    return [
        combine(look.rgb.size, [look.alpha, mask]) for look, mask in zip(looks, found, strict=True)
    ]


@contextmanager
def _enlarger(
    looks: Sequence[_Look], settings: PrepareSettings, edition: Edition, device: Device
) -> Iterator[Enlarge | None]:
    """SwinIR, if any photo needs it."""
    sizes = [look.photo.size for look in looks]
    if not any(is_short(size, choose_bucket(size, settings.buckets)) for size in sizes):
        yield None
        return
    with Upscaler(edition, device) as upscaler:
        yield lambda image: upscaler.upscale(image, FACTOR)


def _cut(
    photo: Photo,
    mask: Image.Image,
    settings: PrepareSettings,
    enlarge: Enlarge | None,
) -> Crop:
    image = read_image(photo.path, photo.label).rgb
    mask = mask.resize(image.size, Image.Resampling.BILINEAR)
    centre = centre_of_mass(mask) if settings.crop_based_on_salience else centre_of_image(mask.size)
    return crop(image, mask, choose_bucket(image.size, settings.buckets), centre, enlarge)
