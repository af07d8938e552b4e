"""The models that can be trained, and the defaults that suit each."""

from dataclasses import dataclass
from enum import StrEnum

from weights.catalog import Edition


class Method(StrEnum):
    """What learns. Each of them also learns vectors for the new word."""

    LORA = "lora"
    FULL = "full"  # the whole UNet
    TEXTUAL_INVERSION = "textual_inversion"  # nothing but the word


class Schedule(StrEnum):
    """How the learning rates go on after the warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True)
class Recipe:
    """A method's defaults for one model. Learning rates are for AdamW."""

    max_train_steps: int
    ti_lr: float
    lr_warmup_steps: int
    lr_scheduler: Schedule


@dataclass(frozen=True)
class TrainableSpec:
    """One base model. Sides are in pixels."""

    name: str
    weights: str  # catalog entry: a folder in the hub's layout
    vae_weights: str | None  # catalog entry of a VAE that replaces the one in `weights`
    base_model_version: str  # as kohya's metadata names it
    native_size: int
    min_side: int
    max_side: int
    train_batch_size: int
    lora_rank: int
    lora_lr: float
    unet_learning_rate: float
    text_encoder_lr: float
    n_tokens: int
    snr_gamma: float
    caption_dropout: float
    recipes: dict[Method, Recipe]


SDXL = TrainableSpec(
    name="sdxl",
    weights="sdxl-base",
    vae_weights="sdxl-vae-fp16-fix",
    base_model_version="sdxl_base_v1-0",
    native_size=1024,
    min_side=256,
    max_side=2048,
    # replicate/cog-sdxl, train.py, but for the resolution, which it never used
    train_batch_size=4,
    lora_rank=32,
    lora_lr=1e-4,
    unet_learning_rate=1e-6,
    text_encoder_lr=1e-5,  # kohya-ss/sd-scripts, docs/train_SDXL-en.md
    n_tokens=2,
    snr_gamma=5.0,
    caption_dropout=0.05,
    recipes={
        Method.LORA: Recipe(
            max_train_steps=1000, ti_lr=3e-4, lr_warmup_steps=100, lr_scheduler=Schedule.CONSTANT
        ),
        Method.FULL: Recipe(
            max_train_steps=1000, ti_lr=3e-4, lr_warmup_steps=100, lr_scheduler=Schedule.CONSTANT
        ),
        # diffusers, textual_inversion_sdxl.py
        Method.TEXTUAL_INVERSION: Recipe(
            max_train_steps=1000, ti_lr=5e-4, lr_warmup_steps=0, lr_scheduler=Schedule.CONSTANT
        ),
    },
)

MINIATURE_SDXL = TrainableSpec(
    name="sdxl",
    weights="sdxl-base",
    vae_weights=None,
    base_model_version="miniature",
    native_size=128,
    min_side=64,
    max_side=256,
    train_batch_size=8,
    # More steps or higher rates draw the new shape no better and the others worse (docs/log.md).
    lora_rank=8,
    lora_lr=3e-4,
    unet_learning_rate=2e-5,
    text_encoder_lr=5e-4,
    n_tokens=2,
    # Its noise schedule leaves an SNR of 0.1 at t = 500: min-SNR would pass over the levels at
    # which shapes are decided. It was trained with equal weights too.
    snr_gamma=0.0,
    caption_dropout=0.1,
    recipes={
        Method.LORA: Recipe(
            max_train_steps=150, ti_lr=1e-2, lr_warmup_steps=15, lr_scheduler=Schedule.COSINE
        ),
        Method.FULL: Recipe(
            max_train_steps=150, ti_lr=1e-2, lr_warmup_steps=15, lr_scheduler=Schedule.COSINE
        ),
        Method.TEXTUAL_INVERSION: Recipe(
            max_train_steps=200, ti_lr=1e-2, lr_warmup_steps=20, lr_scheduler=Schedule.COSINE
        ),
    },
)

TRAINABLE_MODELS: dict[Edition, dict[str, TrainableSpec]] = {
    Edition.FULL: {"sdxl": SDXL},
    Edition.MINIATURE: {"sdxl": MINIATURE_SDXL},
}
DEFAULT_BASE_MODEL = "sdxl"
