"""Photos → masks of what a text names, by CLIPSeg (arXiv:2112.10003), and of faces, by YuNet.

A mask says how much each pixel counts in a training: mode L, of the photo's size, 255 = fully.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from preprocess.errors import ModelMissing
from preprocess.models import borrowed
from weights import cache
from weights.catalog import CATALOG, Edition
from weights.edition import Device

if TYPE_CHECKING:
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

# What does not show the text counts this much (cog-sdxl, preprocess.py, clipseg_mask_generator).
TEXT_FLOOR = 0.01
FOUND = 0.1  # a text whose probability nowhere reaches this is reported as not found

# All but the faces (cog-sdxl, preprocess.py, face_mask_google_mediapipe).
FACE_FLOOR = 50
FACE_GROWTH = 1.15  # the box ends at the brows' and jaw's edge; the oval in it would cut cheeks off
FACE_SCORE = 0.6  # of 1; opencv_zoo's demo asks for 0.9, which drops faces that are turned away
FACE_OVERLAP = 0.3  # of two boxes, above which they are one face; opencv_zoo's demo
# YuNet knows faces of 10 to 300 pixels (opencv_zoo, face_detection_yunet/README.md), so a photo is
# looked at twice: the small size finds a face that fills the picture, the large one small faces.
FACE_SIDES = (320, 640)  # pixels of the longer side


@dataclass(frozen=True)
class Box:
    """Where a face is, in pixels of the photo."""

    x: float
    y: float
    width: float
    height: float


def text_masks(
    images: Sequence[Image.Image], prompt: str, temperature: float, edition: Edition, device: Device
) -> list[Image.Image]:
    """A mask of each photo: white where it shows what the prompt names.

    Args:
        images: mode RGB, of any sizes.
        prompt: what to look for; several things are separated by commas, and any of them counts.
            Empty: everything counts.
        temperature: above 0; above 1 softens the masks, below 1 hardens them.
        edition: whose CLIPSeg; it is fetched where it is missing.
        device: what it runs on; its memory is free again afterwards.

    Raises:
        WeightsError: if CLIPSeg cannot be fetched.
    """
    assert temperature > 0, f"temperature {temperature} is not above 0"
    texts = [text for part in prompt.split(",") if (text := " ".join(part.split()))]
    if not texts or not images:
        return [_white(image) for image in images]
    from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

    folder = cache.ensure("clipseg", edition)
    processor = CLIPSegProcessor.from_pretrained(folder, local_files_only=True)

    def load() -> "CLIPSegForImageSegmentation":
        return CLIPSegForImageSegmentation.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )

    masks = []
    with borrowed(load, device) as model:
        for number, image in enumerate(images, 1):
            found = _probability(_logits(model, processor, image, texts), temperature)
            if found.max() < FOUND:
                print(f"Picture {number} of {len(images)} hardly shows {' or '.join(texts)}")
            masks.append(_text_mask(found, image.size))
    return masks


def _logits(
    model: "CLIPSegForImageSegmentation",
    processor: "CLIPSegProcessor",
    image: Image.Image,
    texts: Sequence[str],
) -> NDArray[np.float64]:
    """(N + 1, H, W) for the texts and for "", at the model's own size."""
    asked = [*texts, ""]
    inputs = processor(
        text=asked,
        images=[image] * len(asked),
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    logits: NDArray[np.float64] = model(**inputs.to(model.device)).logits.double().cpu().numpy()
    return logits


def _probability(logits: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """(N + 1, H, W) → (H, W) in [0, 1]: of the text that fits best at each pixel, against "".

    The softmax over [text, ""] of cog-sdxl's clipseg_mask_generator: a logistic function of the
    difference.
    """
    difference = (logits[:-1] - logits[-1]).max(axis=0) / temperature
    probability: NDArray[np.float64] = 1 / (1 + np.exp(-difference.clip(-500, 500)))
    return probability


def _text_mask(probability: NDArray[np.float64], size: tuple[int, int]) -> Image.Image:
    """With a floor, and scaled so that the likeliest pixel counts fully (as cog-sdxl)."""
    lifted = (probability + TEXT_FLOOR).clip(0, 1)
    grey = Image.fromarray((255 * lifted / lifted.max() + 0.5).astype(np.uint8))
    return grey.resize(size, Image.Resampling.BILINEAR)  # a wider filter would undercut the floor


def face_masks(
    images: Sequence[Image.Image], edition: Edition, device: Device
) -> list[Image.Image]:
    """A mask of each photo: ovals around all its faces white, all else dark but not black.

    A photo without a face counts everywhere, and a line in the log says so.

    Args:
        images: mode RGB, of any sizes.
        edition: whose YuNet; it is fetched where it is missing.
        device: not used: OpenCV runs YuNet on the CPU, in milliseconds.

    Raises:
        ModelMissing: with the miniature edition, which has no face detector.
        WeightsError: if YuNet cannot be fetched.
    """
    if "yunet" not in CATALOG[edition]:
        raise ModelMissing(
            f"the {edition} weights hold no face detector: set WEIGHTS_EDITION=full, or say what"
            " counts with mask_target_prompts instead of use_face_detection_instead"
        )
    folder = cache.ensure("yunet", edition)
    (path,) = folder.glob("*.onnx")
    masks = []
    for number, image in enumerate(images, 1):
        faces = list(_find_faces(path, image))
        if not faces:
            print(f"No face was found in picture {number} of {len(images)}: all of it counts")
        masks.append(mask_of_faces(image.size, faces) if faces else _white(image))
    return masks


def _find_faces(path: Path, image: Image.Image) -> Iterator[Box]:
    """Boxes in pixels of the photo; a face may be found at both sizes."""
    import cv2

    for side in FACE_SIDES:
        scale = min(1.0, side / max(image.size))
        width, height = (max(1, round(length * scale)) for length in image.size)
        small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
        detector = cv2.FaceDetectorYN.create(
            str(path), "", (width, height), FACE_SCORE, FACE_OVERLAP
        )
        blue_first = np.ascontiguousarray(np.asarray(small)[..., ::-1])
        _, found = detector.detect(blue_first)
        # A row each: box x, y, width, height, five landmarks, score (opencv, face_detect.cpp).
        for x, y, w, h in () if found is None else found[:, :4].tolist():
            yield Box(x / scale, y / scale, w / scale, h / scale)


def mask_of_faces(size: tuple[int, int], faces: Sequence[Box]) -> Image.Image:
    """One mask with an oval for every face, whatever part of it is outside of the photo.

    cog-sdxl makes a mask for each face, which shifts the masks of all photos behind.
    """
    mask = Image.new("L", size, FACE_FLOOR)
    draw = ImageDraw.Draw(mask)
    for face in faces:
        x, y = face.x + face.width / 2, face.y + face.height / 2
        rx, ry = (FACE_GROWTH * length / 2 for length in (face.width, face.height))
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
    return mask


def _white(image: Image.Image) -> Image.Image:
    return Image.new("L", image.size, 255)
