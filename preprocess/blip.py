"""Images → captions, by BLIP (arXiv:2201.12086).

Beam search is not random, so a training can be repeated by its seed. cog-sdxl samples its captions
before it sets the seed (preprocess.py, blip_captioning_dataset).
"""

from collections.abc import Sequence

from PIL import Image

from preprocess.models import pretrained
from weights import cache
from weights.catalog import Edition
from weights.edition import Device

# salesforce/BLIP, models/blip.py (prompt) and configs/caption_coco.yaml (beams): BLIP was
# fine-tuned and evaluated with this prefix, which is removed afterwards.
PROMPT = "a picture of"
BEAMS = 3
MAX_NEW_TOKENS = 40  # BLIP's own 20 cut longer descriptions off
BATCH = 8


def caption(images: Sequence[Image.Image], edition: Edition, device: Device) -> list[str]:
    """Return a description of each image, in lower case, without a final full stop.

    Args:
        images: mode RGB, of any sizes.
        edition: whose BLIP to use; it is downloaded if missing.
        device: to run on; its memory is freed afterwards.

    Raises:
        WeightsError: if BLIP cannot be downloaded.
    """
    if not images:
        return []
    from transformers import BlipForConditionalGeneration, BlipProcessor

    folder = cache.ensure("blip-captioning", edition)
    processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
    texts: list[str] = []
    with pretrained(BlipForConditionalGeneration, folder, device) as model:
        for start in range(0, len(images), BATCH):
            batch = list(images[start : start + BATCH])
            inputs = processor(images=batch, text=[PROMPT] * len(batch), return_tensors="pt")
            ids = model.generate(
                **inputs.to(device),
                num_beams=BEAMS,
                do_sample=False,
                max_new_tokens=MAX_NEW_TOKENS,
            )
            texts += processor.batch_decode(ids, skip_special_tokens=True)
    return [" ".join(text.split()).lower().removeprefix(PROMPT).strip(" .") for text in texts]
