"""Every input of a training, declared once, and the models' recipes. Nothing here imports torch."""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from inputs import REQUIRED, from_inputs, option
from preprocess.archive import Filetype
from training.errors import InvalidTraining
from weights.catalog import Edition

MAX_STEPS = 100_000


class Method(StrEnum):
    """What to train besides the token embeddings, which every method trains."""

    LORA = "lora"
    FULL = "full"  # the whole UNet
    TEXTUAL_INVERSION = "textual_inversion"  # the token embeddings alone


class Schedule(StrEnum):
    """Learning-rate schedules, as `diffusers.optimization` names them."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class Optimizer(StrEnum):
    """The optimizers in training/optimizers.py."""

    ADAMW = "adamw"
    ADAMW_8BIT = "adamw_8bit"
    PRODIGY = "prodigy"
    ADAFACTOR = "adafactor"


class Prior(StrEnum):
    """What the prior-preservation loss compares the model with."""

    OFF = "off"
    TEACHER = "teacher"  # the base model's predictions
    CLASS_IMAGES = "class_images"  # images of the class


class LoraFormat(StrEnum):
    """Key names of a LoRA file."""

    COG_SDXL = "cog_sdxl"
    KOHYA = "kohya"


@dataclass(frozen=True)
class TrainConfig:
    """The inputs of a training. `resolve` fills in a None from the model's recipe."""

    input_images: Path = option(
        REQUIRED,
        "zip, tar or tar.gz of 2 to 2000 images, with captions.csv, .txt files or neither.",
    )
    seed: int | None = option(
        None,
        "Random seed; the same seed gives the same weights. Empty: random, shown in the log.",
        ge=0,
        le=2**32 - 1,
    )
    resolution: int | None = option(
        None,
        "Train at about resolution x resolution pixels. Empty: the model's native size.",
        ge=64,
        le=2048,
    )
    train_batch_size: int | None = option(
        None, "Images per batch, on all GPUs together. Empty: the model's default.", ge=1, le=64
    )
    num_train_epochs: int | None = option(
        None, "Passes over all images. Ignored if max_train_steps is set.", ge=1, le=MAX_STEPS
    )
    max_train_steps: int | None = option(
        None, "Number of optimizer steps. Empty: the model's default.", ge=1, le=MAX_STEPS
    )
    is_lora: bool = option(True, "Train a LoRA. If false, train the whole UNet: more memory.")
    unet_learning_rate: float | None = option(
        None, "Learning rate of the UNet (method full). Empty: the model's default.", ge=0, le=10
    )
    ti_lr: float | None = option(
        None, "Learning rate of the token embeddings. Empty: the model's default.", ge=0, le=10
    )
    lora_lr: float | None = option(
        None, "Learning rate of the UNet's LoRA. Empty: the model's default.", ge=0, le=10
    )
    lora_rank: int | None = option(
        None, "Rank of the LoRA. Empty: the model's default.", ge=1, le=256
    )
    lr_scheduler: Schedule | None = option(
        None, "Learning-rate schedule after the warm-up. Empty: the model's default."
    )
    lr_warmup_steps: int | None = option(
        None,
        "Steps over which the learning rates rise from 0. Empty: the model's default.",
        ge=0,
        le=MAX_STEPS,
    )
    token_string: str = option("TOK", "Trigger word of the new concept in captions and prompts.")
    caption_prefix: str = option(
        "a photo of TOK, ", "Beginning of automatic captions. Must contain token_string."
    )
    mask_target_prompts: str | None = option(
        None, "Subjects to focus on, such as 'a face'. Other pixels get a low loss weight."
    )
    crop_based_on_salience: bool = option(
        True, "Crop around what the masks show. If false, crop around the center."
    )
    use_face_detection_instead: bool = option(
        False, "Mask by detected faces instead of mask_target_prompts."
    )
    clipseg_temperature: float = option(
        1.0,
        "Softness of mask_target_prompts' masks: above 1 softer, below 1 harder.",
        ge=0.01,
        le=1000,
    )
    verbose: bool = option(True, "Show a progress bar in the log.")
    checkpointing_steps: int | None = option(
        None,
        "Save a checkpoint every N steps to resume from (see TRAINING_CHECKPOINTS).",
        ge=1,
        le=MAX_STEPS * 10,
    )
    input_images_filetype: Filetype = option(
        Filetype.INFER, "Expected archive type; others are rejected. infer accepts each."
    )
    method: Method | None = option(
        None, "What to train besides the token embeddings. Empty: follow is_lora."
    )
    aspect_ratio_buckets: bool = option(
        True, "Train at sizes near each image's aspect ratio. If false, on squares."
    )
    lora_alpha: float | None = option(
        None, "LoRA alpha: updates are scaled by alpha / rank. Empty: the rank.", ge=0.001, le=2560
    )
    use_rslora: bool = option(False, "Rank-stabilized LoRA: scale updates by alpha / sqrt(rank).")
    use_dora: bool = option(
        False, "Weight-decomposed LoRA: train magnitudes too. Requires lora_format kohya."
    )
    train_text_encoder: bool = option(
        False, "Train a LoRA on the text encoders too. Requires lora_format kohya."
    )
    lora_format: LoraFormat = option(LoraFormat.COG_SDXL, "Key names of the archive's LoRA.")
    exchange_files: bool = option(
        False, "Also return a LoRA and an embedding for ComfyUI, A1111 and diffusers."
    )
    optimizer: Optimizer = option(
        Optimizer.ADAMW, "Optimizer. prodigy finds its learning rates by itself."
    )
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", ge=1, le=64)
    num_new_tokens: int | None = option(
        None, "Number of token embeddings of token_string. Empty: the model's default.", ge=1, le=8
    )
    token_initializer: str | None = option(
        None, "Word whose embedding the new ones start from. Empty: random ones."
    )
    pivot_fraction: float = option(
        0.5, "Fraction of the steps that train the token embeddings, from the first on.", ge=0, le=1
    )
    snr_gamma: float | None = option(
        None,
        "Min-SNR gamma of the loss; 0: equal weights. Empty: the model's default.",
        ge=0,
        le=1000,
    )
    noise_offset: float = option(
        0.0, "Strength of offset noise, for darker and brighter images.", ge=0, le=1
    )
    caption_dropout: float | None = option(
        None, "Fraction of captions to drop. Empty: the model's default.", ge=0, le=0.99
    )
    mask_floor: float = option(0.1, "Lowest loss weight of a masked pixel.", ge=0, le=1)
    random_flip: bool = option(
        False, "Mirror images half of the time. Not for faces, text or asymmetric things."
    )
    prior_preservation: Prior = option(
        Prior.OFF, "Preserve class_prompt as the base model or class_images show it."
    )
    class_prompt: str = option(
        "", "Class of the new concept for prior_preservation, such as 'a photo of a dog'."
    )
    class_images: Path | None = option(
        None, "Archive of images of the class, for prior_preservation class_images."
    )
    prior_loss_weight: float = option(1.0, "Weight of the prior-preservation loss.", ge=0, le=100)
    compile_unet: bool = option(
        False, "Compile the UNet first, which takes minutes; steps are then faster."
    )
    validation: bool = option(
        True, "With 8 images or more, hold out one in 8 and report the loss on them."
    )
    preview_prompts: tuple[str, ...] = option(
        (), "Prompts of the report's preview images, generated during training."
    )
    preview_steps: int | None = option(
        None, "Generate previews every N steps. Empty: at the end only.", ge=1, le=MAX_STEPS * 10
    )
    text_encoder_lr: float | None = option(
        None,
        "Learning rate of the text encoders' LoRA. Empty: the model's default.",
        ge=0,
        le=10,
    )
    max_grad_norm: float = option(1.0, "Norm to clip gradients to.", ge=1e-6, le=1e6)
    gradient_checkpointing: bool | None = option(
        None, "Recompute activations to save memory. Empty: only if the GPU needs it."
    )

    @classmethod
    def from_inputs(cls, **values: object) -> "TrainConfig":
        """Build the config from the arguments that Cog passes. Raises InvalidTraining."""
        return from_inputs(cls, values, InvalidTraining)


@dataclass(frozen=True)
class TrainableSpec:
    """A base model to train. Sides are in pixels."""

    name: str
    weights: str  # catalog entry: a folder in the hub's layout
    vae_weights: str | None  # catalog entry of a VAE that replaces the one in `weights`
    base_model_version: str  # in kohya's metadata
    min_side: int
    max_side: int
    recipes: dict[Method, TrainConfig]  # what an empty value means; learning rates are AdamW's

    @property
    def native_size(self) -> int:
        """The side of the square that the model was trained at."""
        size = self.recipes[Method.LORA].resolution
        assert size is not None
        return size


# replicate/cog-sdxl, train.py, but for the resolution, which it never used
_SDXL_RECIPE = TrainConfig(
    input_images=Path(),
    resolution=1024,
    train_batch_size=4,
    max_train_steps=1000,
    unet_learning_rate=1e-6,
    ti_lr=3e-4,
    lora_lr=1e-4,
    text_encoder_lr=1e-5,  # kohya-ss/sd-scripts, docs/train_SDXL-en.md
    lora_rank=32,
    lr_scheduler=Schedule.CONSTANT,
    lr_warmup_steps=100,
    num_new_tokens=2,
    snr_gamma=5.0,
    caption_dropout=0.05,
)
# More steps or higher rates draw the new shape no better and the others worse (docs/log.md).
_MINIATURE_RECIPE = TrainConfig(
    input_images=Path(),
    resolution=128,
    train_batch_size=8,
    max_train_steps=150,
    unet_learning_rate=2e-5,
    ti_lr=1e-2,
    lora_lr=3e-4,
    text_encoder_lr=5e-4,
    lora_rank=8,
    lr_scheduler=Schedule.COSINE,
    lr_warmup_steps=15,
    num_new_tokens=2,
    # Its noise schedule leaves an SNR of 0.1 at t = 500: min-SNR would pass over the noise levels
    # that decide on shapes. It was trained with equal weights too.
    snr_gamma=0.0,
    caption_dropout=0.1,
)

TRAINABLE_MODELS: dict[Edition, TrainableSpec] = {
    Edition.FULL: TrainableSpec(
        name="sdxl",
        weights="sdxl-base",
        vae_weights="sdxl-vae-fp16-fix",
        base_model_version="sdxl_base_v1-0",
        min_side=256,
        max_side=2048,
        recipes={
            Method.LORA: _SDXL_RECIPE,
            Method.FULL: _SDXL_RECIPE,
            # diffusers, textual_inversion_sdxl.py
            Method.TEXTUAL_INVERSION: replace(_SDXL_RECIPE, ti_lr=5e-4, lr_warmup_steps=0),
        },
    ),
    Edition.MINIATURE: TrainableSpec(
        name="sdxl",
        weights="sdxl-base",
        vae_weights=None,
        base_model_version="miniature",
        min_side=64,
        max_side=256,
        recipes={
            Method.LORA: _MINIATURE_RECIPE,
            Method.FULL: _MINIATURE_RECIPE,
            Method.TEXTUAL_INVERSION: replace(
                _MINIATURE_RECIPE, max_train_steps=200, lr_warmup_steps=20
            ),
        },
    ),
}
