"""Masks of what a text names, by CLIPSeg (arXiv:2112.10003), and of faces, by YuNet.

A mask is the loss weight of each pixel in a training: mode L, of the image's size, 255 = full.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from preprocess.errors import ModelMissing
from preprocess.models import pretrained
from weights import cache
from weights.catalog import CATALOG, Edition
from weights.edition import Device

# The weight of pixels that do not show the text (cog-sdxl, preprocess.py, clipseg_mask_generator).
TEXT_FLOOR = 0.01
FOUND = 0.1  # a text whose probability stays below this everywhere is reported as not found

# The weight of everything but faces (cog-sdxl, preprocess.py, face_mask_google_mediapipe), of 255.
FACE_FLOOR = 50
FACE_GROWTH = 1.15  # boxes end at brows and jaw, and an oval inside one would cut cheeks off
FACE_SCORE = 0.6  # of 1; opencv_zoo's demo takes 0.9, which drops faces that are turned away
FACE_OVERLAP = 0.3  # of two boxes, above which they are one face; opencv_zoo's demo
# YuNet finds faces of 10 to 300 pixels (opencv_zoo, face_detection_yunet/README.md): a face that
# fills the image is found at the small size, small faces at the large one.
FACE_SIDES = (320, 640)  # pixels of the longer side


class Box(NamedTuple):
    """A face, in pixels of the image."""

    x: float
    y: float
    width: float
    height: float


def text_masks(
    images: Sequence[Image.Image], prompt: str, temperature: float, edition: Edition, device: Device
) -> list[Image.Image]:
    """Return a mask of each image: white where it shows what the prompt names.

    Args:
        images: mode RGB, of any sizes.
        prompt: what to look for, several things separated by commas. Empty: masks are white.
        temperature: above 0; above 1 softens the masks, below 1 hardens them.
        edition: whose CLIPSeg to use; it is downloaded if missing.
        device: to run on; its memory is freed afterwards.

    Raises:
        WeightsError: if CLIPSeg cannot be downloaded.
    """
    assert temperature > 0, f"temperature {temperature} is not above 0"
    texts = [text for part in prompt.split(",") if (text := " ".join(part.split()))]
    if not texts or not images:
        return [Image.new("L", image.size, 255) for image in images]
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    folder = cache.ensure("clipseg", edition)
    processor = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)
    masks = []
    with pretrained(CLIPSegForImageSegmentation, folder, device) as model:
        for number, image in enumerate(images, 1):
            probability = _probability(_logits(model, processor, image, texts), temperature)
            if probability.max() < FOUND:
                print(f"Image {number} of {len(images)} hardly shows {' or '.join(texts)}")
            # Scaled so that the likeliest pixel has full weight (as cog-sdxl).
            lifted = (probability + TEXT_FLOOR).clip(0, 1)
            mask = Image.fromarray((255 * lifted / lifted.max() + 0.5).astype(np.uint8))
            # A wider filter would undercut the floor.
            masks.append(mask.resize(image.size, Image.Resampling.BILINEAR))
    return masks


def _logits(
    model: Any,  # noqa: ANN401
    processor: Any,  # noqa: ANN401
    image: Image.Image,
    texts: Sequence[str],
) -> NDArray[np.float64]:
    """Return (N + 1, H, W) for the texts and for "", at the model's own size."""
    prompts = [*texts, ""]
    inputs = processor(
        text=prompts,
        images=[image] * len(prompts),
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    logits: NDArray[np.float64] = model(**inputs.to(model.device)).logits.double().cpu().numpy()
    return logits


def _probability(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Return (H, W) in [0, 1] from (N + 1, H, W): of each pixel's best text against "".

    The softmax over [text, ""] of cog-sdxl's clipseg_mask_generator, as a logistic function of the
    difference.
    """
    difference = (logits[:-1] - logits[-1]).max(axis=0) / temperature
    probability: NDArray[np.float64] = 1 / (1 + np.exp(-difference.clip(-500, 500)))
    return probability


def face_masks(images: Sequence[Image.Image], edition: Edition) -> list[Image.Image]:
    """Return a mask of each image: white ovals around all faces on dark grey.

    Masks of images without a face are white, and the log says so. OpenCV runs YuNet on the CPU, in
    milliseconds.

    Args:
        images: mode RGB, of any sizes.
        edition: whose YuNet to use; it is downloaded if missing.

    Raises:
        ModelMissing: with the miniature edition, which has no face detector.
        WeightsError: if YuNet cannot be downloaded.
    """
    if "yunet" not in CATALOG[edition]:
        raise ModelMissing(
            f"the {edition} weights have no face detector: set WEIGHTS_EDITION=full, or use"
            " mask_target_prompts instead of use_face_detection_instead"
        )
    (path,) = cache.ensure("yunet", edition).glob("*.onnx")
    masks = []
    for number, image in enumerate(images, 1):
        faces = list(_find_faces(path, image))
        if not faces:
            print(f"No face was found in image {number} of {len(images)}: it is not masked")
        masks.append(mask_of_faces(image.size, faces) if faces else Image.new("L", image.size, 255))
    return masks


def _find_faces(path: Path, image: Image.Image) -> Iterator[Box]:
    """Yield each face's box; a face may be found at both sizes."""
    import cv2

    for side in FACE_SIDES:
        scale = min(1.0, side / max(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
        detector = cv2.FaceDetectorYN.create(
            str(path), "", (width, height), FACE_SCORE, FACE_OVERLAP
        )
        bgr = np.ascontiguousarray(np.asarray(small)[..., ::-1])
        _, found = detector.detect(bgr)
        # Rows of box x, y, width, height, five landmarks, score (opencv, face_detect.cpp).
        for row in () if found is None else found[:, :4].tolist():
            yield Box(*(length / scale for length in row))


def mask_of_faces(size: tuple[int, int], faces: Sequence[Box]) -> Image.Image:
    """Return one mask with an oval for every face, cut off at the image's edges.

    cog-sdxl makes a mask for each face, which shifts the masks of all images behind.
    """
    mask = Image.new("L", size, FACE_FLOOR)
    draw = ImageDraw.Draw(mask)
    for face in faces:
        x, y = face.x + face.width / 2, face.y + face.height / 2
        rx, ry = (FACE_GROWTH * length / 2 for length in (face.width, face.height))
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
    return mask
