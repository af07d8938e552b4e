"""What a file is: its container by its first bytes, foreign weights by their tensors' names."""

import re
from collections.abc import Iterable, Mapping
from enum import Enum, auto
from pathlib import Path
from tarfile import TarError, TarInfo

from weights.errors import BadWeights

READABLE = (
    "Give a safetensors file (LoRA, textual inversion, UNet, checkpoint) or a trained_model.tar"
    " that holds one"
)
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
PICKLE_REFUSED = (
    "a pickle, which can run code when it is read, so it never is:"
    " convert it to safetensors where you trust it, or look for its .safetensors version"
)


class Container(Enum):
    """How a file is packed."""

    SAFETENSORS = auto()
    TAR = auto()
    TAR_GZ = auto()
    ZIP = auto()


# First bytes → what people call it.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"GGUF", "a GGUF model"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
)
# Protocols 2 to 5 say so; 0 and 1 begin with an object: "cos\nsystem\n", "(dp0\n".
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\(?(?:c[\w.]+\n[\w.]+\n|[dl]p?\d*\n)")


def quote(text: str) -> str:
    """A name out of a file, made safe to show: escaped, and short."""
    return repr(text if len(text) <= 120 else text[:100] + "…")


def find_container(path: Path, suffix: str, name: str) -> Container:
    """How the file is packed, by content. Raises BadWeights, which says what it is instead.

    `suffix` is that of the file's own name, which the path of a stored copy may lack.
    """
    if path.exists() and not path.is_file():
        raise BadWeights(f"{name} is a folder or a device, not a file. {READABLE}.")
    if suffix.lower() in PICKLE_SUFFIXES:
        raise BadWeights(f"{name} is a {suffix.lower()} file: {PICKLE_REFUSED}.")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise BadWeights(f"{name} is empty: the download may have failed. {READABLE}.")
    packed = find_archive(start)
    # Before gzip and pickle: a header's length may begin with their signatures.
    if start[8:9] == b"{" and packed in (None, Container.TAR_GZ):
        return Container.SAFETENSORS
    if packed is not None:
        return packed
    if _PICKLE.match(start):
        raise BadWeights(f"{name} is {PICKLE_REFUSED}.")
    raise BadWeights(
        f"{name} is {describe(start) or 'neither safetensors, tar nor zip'}. {READABLE}."
    )


def find_archive(start: bytes) -> Container | None:
    """Which archive a file is that begins so, with 512 bytes or all that it has; None for none."""
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return Container.ZIP
    if _is_tar(start):
        return Container.TAR
    return Container.TAR_GZ if start[:2] == b"\x1f\x8b" else None


def _is_tar(start: bytes) -> bool:
    try:
        TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except (TarError, ValueError):  # tarfile's own complaint, or a field that is no number
        return False
    return True


def describe(start: bytes) -> str | None:
    """What a file that begins so is, of what is sent by mistake; None if it does not tell."""
    for signature, what in _SIGNATURES:
        if start.startswith(signature):
            return what
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page: its address may need a login, or lead to a page about the file"
    if text.startswith(b"version https://git-lfs"):
        return "a git LFS pointer, not the file it stands for"
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    return None


_ADAPTER_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.hada_w1", "a LoHa (LyCORIS) adapter"),
    (r"\.lokr_w[12]", "a LoKr (LyCORIS) adapter"),
    (r"\.(?:oft_blocks|oft_diag|oft_R\.)|_boft", "an OFT (LyCORIS) adapter"),
    (r"\.on_input$", "an (IA)³ adapter"),
    (r"\.[ab][12]\.weight$", "a GLoRA (LyCORIS) adapter"),
    (r"\.(?:diff|diff_b|w_norm|b_norm)$", "an adapter of full differences (LyCORIS)"),
    (r"\.lora_embedding_[AB]", "a LoRA on token embeddings"),
    (r"\.lora_E$|\.ranknum$", "an AdaLoRA"),
    (r"^lora_controlnet$|controlnet_cond_embedding|input_hint_block|^control_model\.|"
     r"^controlnet_(?:down|mid)|zero_convs", "a ControlNet"),
    (r"^(?:image_proj|ip_adapter)\.", "an IP-Adapter"),
    (r"motion_modules|temporal_transformer", "a motion module (AnimateDiff)"),
    (r"^adapter\.(?:body|conv_in)|^body\.\d+\.(?:in_conv|resnets)", "a T2I-Adapter"),
)  # fmt: skip
_OTHER_MODELS: tuple[tuple[str, str], ...] = (
    (r"double_stream_blocks|llm_adapter|img_in\.|txt_in\.|txt_mlp", "a transformer model"),
    (r"double_blocks|single_blocks|single_transformer_blocks|guidance_in", "FLUX"),
    (r"joint_blocks|context_embedder|text_encoder_3|lora_te3_", "Stable Diffusion 3 or FLUX"),
    (r"(?:^|[._])blocks[._]\d+[._](?:cross_attn|self_attn)", "Wan"),
    (r"^transformer\.|_transformer_blocks_\d+_attn_|^diffusion_model\.(?:layers|blocks)",
     "a diffusion transformer (Stable Diffusion 3, Qwen-Image, …)"),
    (r"prior_", "a prior model (Stable Cascade, Kandinsky, …)"),
)  # fmt: skip
_OTHER_CHECKPOINTS: tuple[tuple[str, str], ...] = (
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL"),
    (r"^cond_stage_model\.model\.", "Stable Diffusion 2"),
    (r"^cond_stage_model\.", "Stable Diffusion 1.5"),
    (r"^model\.diffusion_model\.(?:double|joint)_blocks", "FLUX or SD3"),
    (r"^model\.diffusion_model\.(?:transformer_blocks|blocks|layers)\.", "a diffusion transformer"),
)
_WHOLE_MODELS: tuple[tuple[str, str], ...] = (
    (r"^conditioner\.embedders\.", "the text encoders of a checkpoint, without its UNet"),
    (r"^(?:input|output)_blocks\.\d+\.\d+\.", "a UNet under Stability's names"),
    (r"^first_stage_model\.|^(?:encoder|decoder)\.(?:down|up|mid)(?:_blocks?)?\.|"
     r"^post_quant_conv\.", "a VAE"),
    (r"^text_model\.(?:encoder|embeddings)|^transformer\.resblocks\.", "a text encoder"),
    (r"^(?:vision_model|visual)\.", "an image encoder"),
    (r"^(?:model\.)?layers\.\d+\.|^(?:encoder|decoder)\.block\.\d+\.", "a language model"),
    (r"^transformer_blocks\.\d+\.|^(?:double|joint)_blocks\.", "a diffusion transformer"),
)  # fmt: skip


def find_foreign_kind(keys: Iterable[str]) -> str | None:
    """What the tensors' names say they are, if it is a kind of adapter that we do not have."""
    return _first_match(_ADAPTER_KINDS, keys)


def find_other_model(keys: Iterable[str]) -> str | None:
    """For which model of another architecture an adapter is, by its tensors' names."""
    return _first_match(_OTHER_MODELS, keys)


def find_other_checkpoint(keys: Iterable[str]) -> str | None:
    """Of which model of another family this is a full checkpoint, by its tensors' names."""
    return _first_match(_OTHER_CHECKPOINTS, keys)


def find_whole_model(keys: Iterable[str]) -> str | None:
    """Which model, or part of one, the tensors' names belong to."""
    return _first_match(_WHOLE_MODELS, keys)


def _first_match(patterns: tuple[tuple[str, str], ...], keys: Iterable[str]) -> str | None:
    keys = list(keys)
    for pattern, what in patterns:
        if any(re.search(pattern, key) for key in keys):
            return what
    return None


# The width of the text that a UNet's cross-attention hears tells the families apart.
_FAMILY_OF_TEXT_WIDTH = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
}
_TEXT_INPUT = re.compile(r"attn2[._](?:processor\.)?to_[kv](?:_lora)?(?=[._])")
_DOWN = re.compile(r"(?:down|lora_A|to_[kv])(?:\.default)?\.weight$")


def guess_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Which models the tensors may be for, as the end of a sentence; empty if they do not tell."""
    for key, shape in shapes.items():
        if _TEXT_INPUT.search(key) and _DOWN.search(key) and len(shape) >= 2:
            width = shape[1]
            family = _FAMILY_OF_TEXT_WIDTH.get(width, "a model that we do not know")
            return f"; it seems to be for {family} (it hears text of width {width})"
    return ""
