"""Map the names of LoRA tensors, as every trainer writes them, to the model's modules.

The map is built from the model itself (as ComfyUI's `model_lora_keys_unet`). The other way,
rewriting names by rules, must guess where "_" stood for "." (so do diffusers' converters), and a
wrong guess shows late or never.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from weights.formats.types import UNET


class Role(Enum):
    """The part that a tensor has in its module's adapter."""

    DOWN = auto()
    UP = auto()
    MID = auto()  # LyCORIS' middle matrix of a convolution (CP decomposition)
    ALPHA = auto()
    DORA_SCALE = auto()  # LyCORIS: the axis of its norm is told by its shape
    MAGNITUDE = auto()  # PEFT: always one value per output


@dataclass(frozen=True)
class KeyMatch:
    """The module that a name in a file means."""

    module: str  # "<part>.<module path>"
    style: str  # for people


# Ends of tensor names; the first that fits counts. `default` is an adapter's name in PEFT.
_ROLES: tuple[tuple[str, Role], ...] = (
    (r"\.lora_down\.weight", Role.DOWN),
    (r"\.lora_up\.weight", Role.UP),
    (r"\.lora_mid\.weight", Role.MID),
    (r"\.alpha", Role.ALPHA),
    (r"\.dora_scale", Role.DORA_SCALE),
    (r"\.lora_A(?:\.default)?\.weight", Role.DOWN),
    (r"\.lora_B(?:\.default)?\.weight", Role.UP),
    (r"\.lora_magnitude_vector(?:\.default)?(?:\.weight)?", Role.MAGNITUDE),
    (r"\.lora(?:_linear_layer)?\.down\.weight", Role.DOWN),
    (r"\.lora(?:_linear_layer)?\.up\.weight", Role.UP),
    (r"_lora\.down\.weight", Role.DOWN),  # diffusers until 0.20, and cog-sdxl
    (r"_lora\.up\.weight", Role.UP),
)
_ROLE_PATTERNS = tuple((re.compile(rf"(.+){pattern}"), role) for pattern, role in _ROLES)


def split_key(key: str) -> tuple[str, Role] | None:
    """Split `…to_q.lora_A.weight` into (`…to_q`, Role.DOWN); None for any other tensor's name."""
    for pattern, role in _ROLE_PATTERNS:
        if match := pattern.fullmatch(key):
            return match[1], role
    return None


def build_key_map(modules: Iterable[str]) -> dict[str, KeyMatch]:
    """Return every name of every module → the module. `modules`: "<part>.<path>"."""
    key_map: dict[str, KeyMatch] = {}
    modules = list(modules)
    layers = layers_per_block(modules)
    for module in modules:
        part, path = module.split(".", 1)
        names = _unet_names(path, layers) if part == UNET else _text_encoder_names(part, path)
        for name, style in names:
            known = key_map.setdefault(name, KeyMatch(module, style))
            assert known.module == module, f"{name} is both {known.module} and {module}"
    return key_map


def _unet_names(path: str, layers: int) -> list[tuple[str, str]]:
    sgm = to_sgm(path, layers)
    old = path.replace(".to_out.0", ".to_out")  # with _lora cut off its end
    found = []
    if re.search(r"\.attn[12]\.to_", path):
        processor = re.sub(r"\.(attn[12])\.", r".\1.processor.", old)
        found += [
            (f"unet.{processor}", "diffusers LoRA (old names)"),
            (processor, "cog-sdxl LoRA"),
        ]
    return [
        *found,
        (f"unet.{path}", "diffusers LoRA"),
        (path, "diffusers LoRA"),
        (f"base_model.model.{path}", "PEFT LoRA"),
        (f"diffusion_model.{sgm}", "ComfyUI LoRA"),
        ("lora_unet_" + sgm.replace(".", "_"), "kohya LoRA (sgm names)"),
        ("lora_unet_" + path.replace(".", "_"), "kohya LoRA (diffusers names)"),
        ("lycoris_" + path.replace(".", "_"), "LyCORIS LoRA (diffusers names)"),
    ]


_OLD_TEXT_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _text_encoder_names(part: str, path: str) -> list[tuple[str, str]]:
    # transformers 5 has dropped the level "text_model" from CLIPTextModel, and kept it in
    # CLIPTextModelWithProjection; files have it for both, except at the projection.
    bare, full = path.removeprefix("text_model."), _full_text_path(path)
    kohya = "lora_te1_" if part == "text_encoder" else "lora_te2_"
    found = []
    for name in {bare, full}:
        found += [
            (f"{part}.{name}", "diffusers LoRA"),
            (kohya + name.replace(".", "_"), "kohya LoRA"),
        ]
        if part == "text_encoder":  # models with one encoder do not number it
            found.append(("lora_te_" + name.replace(".", "_"), "kohya LoRA"))
        head, _, last = name.rpartition(".")
        if head.endswith("self_attn"):
            found.append((f"{part}.{head}.{_OLD_TEXT_NAMES[last]}", "diffusers LoRA (old names)"))
    return found


def _full_text_path(path: str) -> str:
    bare = path.removeprefix("text_model.")
    return bare if bare.startswith("text_projection") else f"text_model.{bare}"


def layers_per_block(names: Iterable[str]) -> int:
    """Return how many resnets a down block has; an up block has one more. `names`: any modules."""
    found = {
        int(match[1])
        for name in names
        if (match := re.match(r"unet\.down_blocks\.0\.resnets\.(\d+)\.", name))
    }
    return max(found, default=0) + 1


_SGM_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_SGM_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def to_sgm(path: str, layers_per_block: int) -> str:
    """Return a UNet module's name in Stability's code (generative-models, openaimodel.py).

    The map is kohya's (sd-scripts, library/sdxl_model_util.py, make_unet_conversion_map).
    """
    if path in _SGM_OUTER:
        return _SGM_OUTER[path]
    match = _BLOCK.fullmatch(path)
    if not match:
        return path
    side, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = _SGM_RESNET.get(rest, rest)
    if side is None:
        place = 2 * index if kind == "resnets" else 1
        return f"middle_block.{place}.{rest}"
    if side == "down":
        first = (layers_per_block + 1) * block + 1
        if kind == "downsamplers":
            return f"input_blocks.{first + layers_per_block}.0.op"
        return f"input_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"
    first = (layers_per_block + 1) * block
    if kind == "upsamplers":  # behind the attention, which all but SDXL's last block have
        return f"output_blocks.{first + layers_per_block}.2.{rest}"
    return f"output_blocks.{first + index}.{int(kind == 'attentions')}.{rest}"


def to_kohya(module: str, layers_per_block: int) -> str:
    """Return a module's name in kohya's files, with Stability's names in the UNet."""
    part, path = module.split(".", 1)
    if part == UNET:
        return "lora_unet_" + to_sgm(path, layers_per_block).replace(".", "_")
    prefix = "lora_te1_" if part == "text_encoder" else "lora_te2_"
    return prefix + _full_text_path(path).replace(".", "_")


def to_cog_sdxl(module: str) -> str:
    """Return the name of a UNet's attention matrix in cog-sdxl's files, up to ".down.weight"."""
    path = module.removeprefix("unet.").replace(".to_out.0", ".to_out")
    return re.sub(r"\.(attn[12])\.", r".\1.processor.", path) + "_lora"
