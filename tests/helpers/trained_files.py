"""Files of trained weights, good and hostile, made in code: the repository holds none."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from tests.helpers.archives import gz_bytes, tar_bytes, tar_info, zip_bytes  # noqa: F401
from weights.cache import MINIATURE_FOLDER
from weights.formats.key_map import to_sgm
from weights.formats.read import read_trained
from weights.formats.types import LoraDelta, ModelShapes, TrainedWeights

if TYPE_CHECKING:  # slow to import, and most tests that use this module do not need it
    from transformers import CLIPTextConfig

NAME = "lora_weights"  # the input's name, which every message has to mention
WIDTH = 64  # of the miniature's text encoders
ATTN1 = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
ATTN2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
CONV = "down_blocks.1.resnets.0.conv1"
TOKEN_EMBEDDING = "embeddings.token_embedding.weight"


@functools.cache
def model_parts() -> dict[str, nn.Module]:
    """The miniature's classes with random weights; nobody may change them."""
    from weights.miniature.architecture import build_text_encoders, build_unet

    torch.manual_seed(0)
    vocabulary, _ = miniature_shapes().parameters[f"text_encoder.{TOKEN_EMBEDDING}"]
    first, second = build_text_encoders(vocabulary)
    return {"unet": build_unet(), "text_encoder": first, "text_encoder_2": second}


@functools.cache
def miniature_shapes() -> ModelShapes:
    """The miniature SDXL's, from its files' headers: making the models takes seconds."""
    parameters = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        (path,) = (MINIATURE_FOLDER / "sdxl-base" / part).glob("*.safetensors")
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shape = tuple(tensors.get_slice(name).get_shape())
                parameters[f"{part}.{name}"] = shape
    return ModelShapes(parameters)


@functools.cache
def sdxl_shapes() -> ModelShapes:
    """The real SDXL's, from its published configs, without any weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = CLIPTextModel(_clip_config(768, 12, 12))
        second = CLIPTextModelWithProjection(_clip_config(1280, 32, 20))
    return ModelShapes.of({"unet": unet, "text_encoder": first, "text_encoder_2": second})


def _clip_config(width: int, layers: int, heads: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )


def read(path: Path, shapes: ModelShapes | None = None) -> TrainedWeights:
    return read_trained(path, NAME, shapes or miniature_shapes())


def read_tensors(folder: Path, tensors: dict[str, Tensor], metadata=None) -> TrainedWeights:
    path = folder / "file.safetensors"
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata=metadata)
    return read(path)


def change(delta: LoraDelta) -> Tensor:
    """What a delta adds to its module's weight, at scale 1."""
    down, up = delta.down.double(), delta.up.double()
    flat = up.flatten(1) @ down.flatten(1)
    return (delta.alpha / delta.rank * flat).reshape(up.shape[0], *down.shape[1:])


def matrices(weight: tuple[int, ...], rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random down and up for a weight of this shape."""
    generator = torch.Generator().manual_seed(seed)
    ones = (1,) * (len(weight) - 2)
    return (
        torch.randn(rank, *weight[1:], generator=generator),
        torch.randn(weight[0], rank, *ones, generator=generator),
    )


def kohya_name(module: str, sgm: bool) -> str:
    part, path = module.split(".", 1)
    if part == "unet":
        return "lora_unet_" + (to_sgm(path, 1) if sgm else path).replace(".", "_")
    bare = path.removeprefix("text_model.")
    full = bare if bare.startswith("text_projection") else f"text_model.{bare}"
    prefix = "lora_te1_" if part == "text_encoder" else "lora_te2_"
    return prefix + full.replace(".", "_")


def kohya_tensors(modules, rank: int = 4, alpha: float | None = 2.0, sgm: bool = True):
    """A kohya LoRA of the miniature: tensors by name."""
    shapes = miniature_shapes().modules()
    tensors = {}
    for seed, module in enumerate(modules):
        down, up = matrices(shapes[module], rank, seed)
        name = kohya_name(module, sgm)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


# Stability-AI/generative-models, sgm/modules/diffusionmodules/openaimodel.py.
SGM_OUTER = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
}
SGM_RESNET = {
    ".norm1.": ".in_layers.0.",
    ".conv1.": ".in_layers.2.",
    ".time_emb_proj.": ".emb_layers.1.",
    ".norm2.": ".out_layers.0.",
    ".conv2.": ".out_layers.3.",
    ".conv_shortcut.": ".skip_connection.",
}
# mlfoundations/open_clip, src/open_clip/transformer.py.
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
}


def sgm_blocks(unet: nn.Module) -> dict[str, str]:
    """Beginnings of diffusers' names → Stability's, counted as UNetModel.__init__ builds them."""
    blocks = {}
    number = 1
    for i, down in enumerate(unet.down_blocks):
        for j in range(len(down.resnets)):
            blocks[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{number}.0."
            blocks[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{number}.1."
            number += 1
        if down.downsamplers is not None:
            blocks[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{number}.0.op."
            number += 1
    number = 0
    for i, up in enumerate(unet.up_blocks):
        for j in range(len(up.resnets)):
            blocks[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{number}.0."
            blocks[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{number}.1."
            number += 1
        # The last layer of its level: after the resnet and, where there is one, the attention.
        place = 2 if hasattr(up, "attentions") else 1
        blocks[f"up_blocks.{i}.upsamplers.0.conv."] = f"output_blocks.{number - 1}.{place}.conv."
    return blocks


def checkpoint_tensors(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The parts as one file with Stability's names, and what else such files have in them."""
    tensors = {}
    blocks = SGM_OUTER | sgm_blocks(parts["unet"])
    for name, value in parts["unet"].state_dict().items():
        start, new = next((s, n) for s, n in blocks.items() if name.startswith(s))
        key = new + name.removeprefix(start)
        if ".resnets." in start:
            key = _replace(key, SGM_RESNET)
        tensors[f"model.diffusion_model.{key}"] = value
    for name, value in parts["text_encoder"].state_dict().items():
        path = name.removeprefix("text_model.")
        tensors[f"conditioner.embedders.0.transformer.text_model.{path}"] = value
    tensors |= _open_clip_tensors(parts["text_encoder_2"].state_dict())
    clip = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    return tensors | {
        clip: torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "first_stage_model.decoder.conv_in.weight": torch.full((2, 2), torch.inf),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2, 2),
        "denoiser.sigmas": torch.zeros(1000),
        "alphas_cumprod": torch.zeros(1000),
    }


def _open_clip_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in state.items():
        key = "conditioner.embedders.1.model." + _replace(
            name.removeprefix("text_model."), OPEN_CLIP
        )
        if name == "text_projection.weight":
            tensors[key.removesuffix(".weight")] = value.T.contiguous()
        elif ".self_attn.q_proj." in name:
            three = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            tensors[key.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(three)
        elif ".k_proj." not in name and ".v_proj." not in name:
            tensors[key] = value
    return tensors


def _replace(text: str, pairs: dict[str, str]) -> str:
    for old, new in pairs.items():
        text = text.replace(old, new)
    return text


def cog_lora_tensors(rank: int = 4) -> dict[str, Tensor]:
    """What cog-sdxl's trainer saves: the UNet's attention, diffusers' old names, no prefix."""
    tensors = {}
    for module, shape in miniature_shapes().modules().items():
        for matrix in ("to_q", "to_k", "to_v", "to_out.0"):
            if module.startswith("unet.") and ".attn" in module and module.endswith(matrix):
                down, up = matrices(shape, rank, len(tensors))
                stem = module.removeprefix("unet.").removesuffix(f".{matrix}")
                key = f"{stem}.processor.{matrix.removesuffix('.0')}_lora"
                tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    return tensors


def cog_embeddings(n: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n)
    return {
        f"text_encoders_{i}": torch.randn(n, WIDTH, generator=generator).bfloat16() for i in (0, 1)
    }


def cog_members() -> dict[str, bytes]:
    """The three members of cog-sdxl's trained_model.tar."""
    return {
        "lora.safetensors": save(cog_lora_tensors()),
        "embeddings.pti": save(cog_embeddings()),
        "special_params.json": b'{"TOK": "<s0><s1>"}',
    }


def small_lora() -> bytes:
    return save(kohya_tensors([f"unet.{ATTN1}.to_q", f"unet.{CONV}"]))


def raw_safetensors(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with any header: an object for JSON, or its bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}
