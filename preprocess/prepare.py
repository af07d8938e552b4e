"""A training's archive → images, masks and captions at the sizes to train on.

The models of the stages (captions, masks, upscaling) are in memory one after the other. Errors in
the archive or its captions are raised before the first one is loaded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

from preprocess.archive import Photo, PhotoArchive, check_filetype, unpacked
from preprocess.blip import caption
from preprocess.captions import check_trigger_word, read_captions
from preprocess.crop import Crop, Size, Upscale, center_of_mass, choose_bucket, crop, is_short
from preprocess.images import read_image
from preprocess.segment import face_masks, text_masks
from preprocess.upscale import FACTOR, Upscaler
from weights.catalog import Edition
from weights.edition import Device

THUMBNAIL_SIDE = 768  # pixels of the longer side: BLIP and CLIPSeg see at most that many


@dataclass(frozen=True)
class PrepareSettings:
    """How to prepare the images; named as the inputs of a training."""

    token_string: str
    caption_prefix: str
    mask_target_prompts: str  # empty: no text mask
    clipseg_temperature: float
    use_face_detection_instead: bool
    crop_based_on_salience: bool
    input_images_filetype: str  # infer, zip or tar
    buckets: tuple[Size, ...]


@dataclass(frozen=True)
class PreparedImage:
    """One image as a model trains on it."""

    name: str  # inside the archive
    caption: str  # with the trigger word
    crop: Crop


@dataclass(frozen=True)
class _Thumbnail:
    """A photo, small enough for all of them to be in memory."""

    photo: Photo
    rgb: Image.Image
    alpha: Image.Image | None


def prepare(
    path: Path, settings: PrepareSettings, edition: Edition, device: Device, folder: Path
) -> list[PreparedImage]:
    """Caption, mask and crop every image of an archive, which is unpacked into `folder`.

    Nothing stays in `folder`. Raises a PreprocessError, or a WeightsError if a model cannot be
    downloaded.
    """
    check_filetype(path, settings.input_images_filetype, "input_images")
    with unpacked(path, "input_images", folder) as archive:
        captions = read_captions(archive)
        check_trigger_word(captions, settings.token_string, settings.caption_prefix)
        return _prepare(archive, captions, settings, edition, device)


def prepare_class_images(path: Path, buckets: Sequence[Size], folder: Path) -> list[PreparedImage]:
    """Crop every image of a class to its center, without a mask; captions may be empty."""
    with unpacked(path, "class_images", folder) as archive:
        captions = read_captions(archive)
        return [
            PreparedImage(
                photo.name, captions[photo.name] or "", _crop_to_bucket(photo, None, buckets, None)
            )
            for photo in archive.photos
        ]


def _prepare(
    archive: PhotoArchive,
    captions: dict[str, str | None],
    settings: PrepareSettings,
    edition: Edition,
    device: Device,
) -> list[PreparedImage]:
    thumbnails = [_thumbnail(photo) for photo in archive.photos]
    uncaptioned = [t for t in thumbnails if captions[t.photo.name] is None]
    automatic = caption([t.rgb for t in uncaptioned], edition, device)
    prefix = " ".join(settings.caption_prefix.split())
    texts = {name: text for name, text in captions.items() if text is not None}
    texts |= {t.photo.name: f"{prefix} {a}" for t, a in zip(uncaptioned, automatic, strict=True)}
    masks = _masks(thumbnails, settings, edition, device)
    with _upscaler(archive.photos, settings.buckets, edition, device) as upscale:
        return [
            PreparedImage(
                photo.name,
                texts[photo.name],
                _crop_to_bucket(
                    photo,
                    mask,
                    settings.buckets,
                    upscale,
                    around_mask=settings.crop_based_on_salience,
                ),
            )
            for photo, mask in zip(archive.photos, masks, strict=True)
        ]


def _thumbnail(photo: Photo) -> _Thumbnail:
    image = read_image(photo.path, photo.label)
    scale = min(1.0, THUMBNAIL_SIDE / max(image.rgb.size))
    size = (max(1, round(image.rgb.width * scale)), max(1, round(image.rgb.height * scale)))
    rgb = image.rgb.resize(size, Image.Resampling.LANCZOS)
    alpha = image.alpha and image.alpha.resize(size, Image.Resampling.BILINEAR)
    return _Thumbnail(photo, rgb, alpha)


def _masks(
    thumbnails: Sequence[_Thumbnail], settings: PrepareSettings, edition: Edition, device: Device
) -> list[Image.Image]:
    """Return masks of the thumbnails' sizes: of alpha and of what the settings focus on."""
    images = [thumbnail.rgb for thumbnail in thumbnails]
    found: Sequence[Image.Image | None] = [None] * len(images)
    if settings.use_face_detection_instead:
        found = face_masks(images, edition)
    elif settings.mask_target_prompts.strip():
        temperature = settings.clipseg_temperature
        found = text_masks(images, settings.mask_target_prompts, temperature, edition, device)
    return [
        combine_masks(t.rgb.size, [t.alpha, mask])
        for t, mask in zip(thumbnails, found, strict=True)
    ]


def combine_masks(size: Size, masks: Sequence[Image.Image | None]) -> Image.Image:
    """Return the product of masks (mode L) of this size; None is white."""
    product = Image.new("L", size, 255)
    for mask in masks:
        if mask is not None:
            product = ImageChops.multiply(product, mask)
    return product


@contextmanager
def _upscaler(
    photos: Sequence[Photo], buckets: Sequence[Size], edition: Edition, device: Device
) -> Iterator[Upscale | None]:
    """Load SwinIR if an image is too small."""
    if not any(is_short(photo.size, choose_bucket(photo.size, buckets)) for photo in photos):
        yield None
        return
    with Upscaler(edition, device) as upscaler:
        yield lambda image: upscaler.upscale(image, FACTOR)


def _crop_to_bucket(
    photo: Photo,
    mask: Image.Image | None,
    buckets: Sequence[Size],
    upscale: Upscale | None,
    around_mask: bool = False,
) -> Crop:
    image = read_image(photo.path, photo.label).rgb
    if mask is None:
        mask = Image.new("L", image.size, 255)
    mask = mask.resize(image.size, Image.Resampling.BILINEAR)
    center = center_of_mass(mask) if around_mask else (image.width / 2, image.height / 2)
    return crop(image, mask, choose_bucket(image.size, buckets), center, upscale)
