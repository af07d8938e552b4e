"""Photos → captions, by BLIP (arXiv:2201.12086).

The captions are the same on every run: a beam search draws nothing at random. cog-sdxl samples them
before it sets its seed, so no seed repeats a training (preprocess.py, blip_captioning_dataset).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image

from preprocess.models import borrowed
from weights import cache
from weights.catalog import Edition
from weights.edition import Device

if TYPE_CHECKING:
    from transformers import BlipForConditionalGeneration, BlipProcessor

# salesforce/BLIP, models/blip.py (prompt) and configs/caption_coco.yaml (beams): its captions were
# learnt, and published figures measured, behind this beginning, which is then taken off.
PROMPT = "a picture of"
BEAMS = 3
MAX_NEW_TOKENS = 40  # BLIP's own 20 cut longer descriptions off
BATCH = 8


def caption(images: Sequence[Image.Image], edition: Edition, device: Device) -> list[str]:
    """One description of each picture, in lower case, without a final full stop.

    Args:
        images: mode RGB, of any sizes.
        edition: whose BLIP; it is fetched where it is missing.
        device: what it runs on; its memory is free again afterwards.

    Raises:
        WeightsError: if BLIP cannot be fetched.
    """
    if not images:
        return []
    from transformers import BlipForConditionalGeneration, BlipProcessor

    folder = cache.ensure("blip-captioning", edition)
    processor = BlipProcessor.from_pretrained(folder, local_files_only=True)

    def load() -> "BlipForConditionalGeneration":
        return BlipForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )

    captions: list[str] = []
    with borrowed(load, device) as model:
        for start in range(0, len(images), BATCH):
            captions += _describe(model, processor, images[start : start + BATCH])
    return captions


def _describe(
    model: "BlipForConditionalGeneration",
    processor: "BlipProcessor",
    images: Sequence[Image.Image],
) -> list[str]:
    inputs = processor(images=list(images), text=[PROMPT] * len(images), return_tensors="pt")
    ids = model.generate(
        **inputs.to(model.device),
        num_beams=BEAMS,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return [_clean(text) for text in processor.batch_decode(ids, skip_special_tokens=True)]


def _clean(text: str) -> str:
    """What was said after the prompt, on one line."""
    words = " ".join(text.split()).lower().removeprefix(PROMPT)
    return words.strip(" .")
