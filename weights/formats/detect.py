"""Tell what a file is: its container by its first bytes, foreign weights by their tensors' names.

Only what people really send by mistake has a pattern here; anything else is refused with the names
of its first tensors.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from weights.errors import BadWeights
from weights.formats.archive import Container, find_archive

READABLE = (
    "Give a safetensors file (LoRA, textual inversion, UNet, checkpoint) or a trained_model.tar"
    " that holds one"
)
ANOTHER_MODEL = "Use one that was trained for this model"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
PICKLE_REFUSED = (
    "a pickle, which can run code when it is read, so it never is:"
    " convert it to safetensors where you trust it, or look for its .safetensors version"
)

# First bytes → what people call it.
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive"),
    (b"GGUF", "a GGUF model"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
)
# Protocols 2 to 5 say so; 0 and 1 begin with an object: "cos\nsystem\n", "(dp0\n".
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\(?(?:c[\w.]+\n[\w.]+\n|[dl]p?\d*\n)")

# Kinds of adapters that are not supported.
_ADAPTER_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.hada_w1", "a LoHa (LyCORIS) adapter"),
    (r"\.lokr_w[12]", "a LoKr (LyCORIS) adapter"),
    (r"\.(?:oft_blocks|oft_diag|oft_R\.)|_boft|\.on_input$|\.[ab][12]\.weight$|\.diff(?:_b)?$",
     "another LyCORIS adapter (OFT, (IA)³, GLoRA or full differences)"),
    (r"^lora_controlnet$|controlnet_cond_embedding|input_hint_block|^control_model\.|"
     r"^controlnet_(?:down|mid)|zero_convs", "a ControlNet"),
    (r"^(?:image_proj|ip_adapter)\.", "an IP-Adapter"),
)  # fmt: skip
# Models of another architecture, by an adapter's names.
_OTHER_MODELS: tuple[tuple[str, str], ...] = (
    (r"double_blocks|single_blocks|single_transformer_blocks|guidance_in", "FLUX"),
    (r"joint_blocks|context_embedder|lora_te3_|^transformer\.|_transformer_blocks_\d+_attn_|"
     r"^(?:diffusion_model\.)?(?:layers|blocks)\.|(?:^|_)blocks_\d+_(?:cross|self)_attn",
     "a diffusion transformer (Stable Diffusion 3, Wan, Qwen-Image, …)"),
)  # fmt: skip
_OTHER_CHECKPOINTS: tuple[tuple[str, str], ...] = (
    (r"^conditioner\.embedders\.0\.model\.", "the refiner of Stable Diffusion XL"),
    (r"^cond_stage_model\.model\.", "Stable Diffusion 2"),
    (r"^cond_stage_model\.", "Stable Diffusion 1.5"),
    (r"^model\.diffusion_model\.(?:double|joint|transformer)?_?(?:blocks|layers)\.",
     "a diffusion transformer (FLUX, Stable Diffusion 3, Wan, …)"),
)  # fmt: skip
_PARTS: tuple[tuple[str, str], ...] = (
    (r"^(?:input|output)_blocks\.\d+\.\d+\.", "a UNet under Stability's names"),
    (r"^first_stage_model\.|^(?:encoder|decoder)\.(?:down|up|mid)(?:_blocks?)?\.|"
     r"^post_quant_conv\.", "a VAE"),
    (r"^text_model\.(?:encoder|embeddings)|^transformer\.resblocks\.|^conditioner\.embedders\.",
     "a text encoder"),
    (r"^(?:transformer|double|joint)_blocks\.\d+\.", "a diffusion transformer"),
)  # fmt: skip

# The width of the text that a UNet's cross-attention, or a textual inversion, is made for.
_FAMILY_OF_TEXT_WIDTH = {
    768: "Stable Diffusion 1.5",
    1024: "Stable Diffusion 2",
    1280: "Stable Diffusion XL, or the refiner of Stable Diffusion XL",
    2048: "Stable Diffusion XL",
    4096: "a model with a T5 text encoder",
}
_TEXT_INPUT = re.compile(r"attn2[._](?:processor\.)?to_[kv](?:_lora)?(?=[._])")
_DOWN = re.compile(r"(?:down|lora_A|to_[kv])(?:\.default)?\.weight$")


def find_container(path: Path, suffix: str, name: str) -> Container | None:
    """Return which archive the file is, by content; None for a safetensors file.

    `suffix` is that of the file's original name, which the path of a cached copy may lack. Raises
    BadWeights, which says what any other file is.
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
        return None
    if packed is not None:
        return packed
    if _PICKLE.match(start):
        raise BadWeights(f"{name} is {PICKLE_REFUSED}.")
    what = describe(start) or "neither safetensors, tar nor zip"
    raise BadWeights(f"{name} is {what}. {READABLE}.")


def describe(start: bytes) -> str | None:
    """Return what a file that begins with `start` is; None if it is nothing that we recognize."""
    for signature, what in _SIGNATURES:
        if start.startswith(signature):
            return what
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page: its address may need a login, or lead to a page about the file"
    if text.startswith(b"version https://git-lfs"):
        return "a git LFS pointer, not the file it stands for"
    return "a JSON text" if text.startswith((b"{", b"[")) else None


def find_adapter_kind(keys: Iterable[str]) -> str | None:
    """Return which unsupported kind of adapter has tensors of these names; None for no such."""
    return _first_match(_ADAPTER_KINDS, keys)


def find_other_model(keys: Iterable[str]) -> str | None:
    """Return for which model of another architecture an adapter is; None for no such."""
    return _first_match(_OTHER_MODELS, keys)


def find_other_checkpoint(keys: Iterable[str]) -> str | None:
    """Return of which other model a file is the checkpoint; None for no such."""
    return _first_match(_OTHER_CHECKPOINTS, keys)


def find_part(keys: Iterable[str]) -> str | None:
    """Return which part of a model has tensors of these names; None for no such."""
    return _first_match(_PARTS, keys)


def guess_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return which model a UNet's or LoRA's tensors are for, as a sentence's end; or ""."""
    for key, shape in shapes.items():
        if _TEXT_INPUT.search(key) and _DOWN.search(key) and len(shape) >= 2:
            family = _FAMILY_OF_TEXT_WIDTH.get(shape[1], "a model that we do not know")
            return f"; it seems to be for {family} (its text is {shape[1]} wide)"
    return ""


def guess_embedding_family(width: int) -> str:
    """Return for which model a textual inversion of this width is, as a sentence's end; or ""."""
    family = _FAMILY_OF_TEXT_WIDTH.get(width)
    return f"; it seems to be for {family}" if family else ""


def _first_match(patterns: tuple[tuple[str, str], ...], keys: Iterable[str]) -> str | None:
    keys = list(keys)
    for pattern, what in patterns:
        if any(re.search(pattern, key) for key in keys):
            return what
    return None
