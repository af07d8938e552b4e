"""Valid trained weights for the miniature, whose effects can be seen."""

from base64 import b64encode
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import CLIPTokenizer

from tests.helpers.trained_files import kohya_tensors, miniature_shapes, tar_bytes
from weights.miniature.evaluate import FOLDER

ENCODERS = ("text_encoder", "text_encoder_2")


def data_uri(content: bytes, name: str = "") -> str:
    """Return a file as a data URI, with a name if one is given."""
    named = f";name={name}" if name else ""
    return f"data:application/octet-stream{named};base64,{b64encode(content).decode()}"


def visible_lora(seed: int) -> bytes:
    """Return a LoRA of the UNet's attention that changes images, though not to noise."""
    modules = [m for m in miniature_shapes().modules() if m.startswith("unet.") and ".attn" in m]
    tensors = kohya_tensors(modules)
    generator = torch.Generator().manual_seed(seed)
    for name in tensors:
        if name.endswith(".lora_up.weight"):
            tensors[name] = 0.1 * torch.randn(tensors[name].shape, generator=generator)
    return save(tensors)


def word_archive(trigger_word: str, meaning: str, lora: bytes | None = None) -> bytes:
    """Return cog-sdxl's archive with a trigger word that means the same as a known word."""
    (token,) = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")(meaning).input_ids[1:-1]
    rows = {
        f"text_encoders_{number}": _token_embedding(FOLDER / encoder)[token][None].clone()
        for number, encoder in enumerate(ENCODERS)
    }
    members = {
        # So that texts are pooled as with the known word, not at the placeholder token.
        "embeddings.pti": save(rows, metadata={"pooling": "eos"}),
        "special_params.json": f'{{"{trigger_word}": "<s0>"}}'.encode(),
    }
    return tar_bytes(members if lora is None else {**members, "lora.safetensors": lora})


def _token_embedding(folder: Path) -> torch.Tensor:
    (path,) = folder.glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        (name,) = (key for key in file.keys() if key.endswith("token_embedding.weight"))  # noqa: SIM118
        return file.get_tensor(name)
