"""Write trained weights in the formats that `weights.formats.read` reads, and for other programs.

The same weights give the same bytes: no times, no random order.
"""

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weights.formats.key_map import layers_per_block, to_cog_sdxl, to_kohya
from weights.formats.types import TEXT_ENCODERS, UNET, LoraDelta, ModelShapes, TrainedWeights

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_COG_EMBEDDINGS = dict(zip(TEXT_ENCODERS, ("text_encoders_0", "text_encoders_1"), strict=True))
_CLIP_EMBEDDINGS = dict(zip(TEXT_ENCODERS, ("clip_l", "clip_g"), strict=True))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file. safetensors' own writer puts metadata in a random order."""
    header, ordered = _header(tensors, metadata)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for tensor in ordered:
            file.write(_bytes(tensor))


def _header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> tuple[bytes, list[Tensor]]:
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    ordered = []
    start = 0
    # safetensors' own order: wide types first, so that all of them are aligned
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        tensor = tensors[name].contiguous()
        end = start + tensor.nbytes
        dtype, shape = _DTYPES[tensor.dtype], list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        ordered.append(tensor)
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8), ordered


def _bytes(tensor: Tensor) -> bytes:
    flat: bytes = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return flat


def hashes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> dict[str, str]:
    """Return the two hashes that kohya's files carry of themselves.

    kohya-ss/sd-scripts, library/train_util.py, precalculate_safetensors_hashes: of the tensors, and
    of 64 KiB at 1 MiB of the file, whose header there has the ss_ entries alone.
    """
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    header, ordered = _header(tensors, kept)
    content = b"".join(map(_bytes, ordered))
    file = struct.pack("<Q", len(header)) + header + content
    return {
        "sshs_model_hash": hashlib.sha256(content).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8],
    }


def cog_sdxl_lora(weights: TrainedWeights, shapes: ModelShapes) -> dict[str, Tensor]:
    """Return the LoRA in cog-sdxl's format: all attention matrices, one rank, alpha within `up`.

    Its loader demands all of the UNet; the up matrix of one that was not trained is zero. The
    weights may have nothing else in them.
    """
    rank = max((delta.rank for delta in weights.lora.values()), default=1)
    modules = [
        (module, shape)
        for module, shape in shapes.modules().items()
        if module.startswith(f"{UNET}.") and ".attn" in module and module.endswith(ATTENTION)
    ]
    assert weights.lora.keys() <= {module for module, _ in modules}, "no place for it in the format"
    tensors: dict[str, Tensor] = {}
    for module, (out, in_) in modules:
        down, up = torch.zeros(rank, in_), torch.zeros(out, rank)
        delta = weights.lora.get(module)
        if delta is not None:
            assert delta.dora_scale is None, "no place for DoRA in the format"
            down[: delta.rank] = delta.down
            up[:, : delta.rank] = delta.up * (delta.alpha / delta.rank)
        name = to_cog_sdxl(module)
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
    return tensors


def kohya_lora(weights: TrainedWeights, shapes: ModelShapes) -> dict[str, Tensor]:
    """Return the LoRA under kohya's names, which diffusers, ComfyUI and A1111 read too."""
    layers = layers_per_block(shapes.modules())
    tensors: dict[str, Tensor] = {}
    for module, delta in weights.lora.items():
        name = to_kohya(module, layers)
        tensors |= {f"{name}.{key}": value for key, value in _kohya_module(delta).items()}
    return tensors


def _kohya_module(delta: LoraDelta) -> dict[str, Tensor]:
    tensors = {
        "lora_down.weight": delta.down,
        "lora_up.weight": delta.up,
        "alpha": torch.tensor(delta.alpha, dtype=torch.float32),
    }
    return tensors if delta.dora_scale is None else tensors | {"dora_scale": delta.dora_scale}


def cog_sdxl_embeddings(weights: TrainedWeights) -> dict[str, Tensor]:
    """Return the embeddings under cog-sdxl's names: `<s0>`, `<s1>` … in order."""
    return _embeddings(weights, _COG_EMBEDDINGS)


def clip_embeddings(weights: TrainedWeights) -> dict[str, Tensor]:
    """Return the embeddings under the names of kohya, ComfyUI and A1111."""
    return _embeddings(weights, _CLIP_EMBEDDINGS)


def _embeddings(weights: TrainedWeights, names: Mapping[str, str]) -> dict[str, Tensor]:
    return {
        name: torch.cat([entry.vectors[part] for entry in weights.embeddings])
        for part, name in names.items()
    }


def replaced_unet(weights: TrainedWeights) -> dict[str, Tensor]:
    """Return the UNet's parameters in fp16, under diffusers' names."""
    return {
        name.removeprefix(f"{UNET}."): tensor.half() for name, tensor in weights.parameters.items()
    }


def special_params(weights: TrainedWeights) -> bytes:
    """Return cog-sdxl's special_params.json: trigger word → placeholder tokens."""
    return json.dumps(dict(weights.trigger_words), sort_keys=True).encode()


def write_tar(path: Path, members: Mapping[str, Path | bytes]) -> None:
    """Write an uncompressed tar with the members at its root."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)  # its time is 0
            info.mode = 0o644
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.size = content.stat().st_size
                with content.open("rb") as file:
                    tar.addfile(info, file)
