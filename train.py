"""The boundary to Cog's trainings: inputs become a TrainConfig, files a TrainingOutput.

Cog reads this file without running it, and silently drops what it cannot read: literals only, one
plain string per description (`script/sync` writes and checks this).
"""

import os
import shutil
import tempfile
from pathlib import Path as LocalPath
from typing import List, Optional  # noqa: UP035  the spelling that every version of Cog's parser reads

# Imported here, although only trainings use it. Cog runs each training on a new thread, made outside
# Python. pybind11 remembers the thread state of whoever first imports an extension built with it,
# which would then be one that is gone: a later training would wait for the GIL forever
# (pybind/pybind11#2888). torch, torchvision, triton and scipy share that memory: one is enough.
import torch  # noqa: F401
from cog import BaseModel, Input, Path

from training.config import TRAINABLE_MODELS, TrainConfig
from training.plan import check_class_images, resolve
from weights.edition import resolve_device, resolve_edition


class TrainingOutput(BaseModel):  # type: ignore[misc]  # cog has no types for it
    """`weights` is for predictions: replicate_weights or COG_WEIGHTS."""

    weights: Path
    exchange: Optional[Path] = None  # a zip of files for other programs


def train(
    # script/sync: begin
    input_images: Path = Input(
        description="zip, tar or tar.gz of 2 to 2000 images, with captions.csv, .txt files or neither",
    ),
    seed: Optional[int] = Input(
        default=None,
        description="Random seed; the same seed gives the same weights. Empty: random, shown in the log",
        ge=0,
        le=4294967295,
    ),
    resolution: Optional[int] = Input(
        default=None,
        description="Train at about resolution x resolution pixels. Empty: the model's native size",
        ge=64,
        le=2048,
    ),
    train_batch_size: Optional[int] = Input(
        default=None,
        description="Images per batch, on all GPUs together. Empty: the model's default",
        ge=1,
        le=64,
    ),
    num_train_epochs: Optional[int] = Input(
        default=None,
        description="Passes over all images. Ignored if max_train_steps is set",
        ge=1,
        le=100000,
    ),
    max_train_steps: Optional[int] = Input(
        default=None,
        description="Number of optimizer steps. Empty: the model's default",
        ge=1,
        le=100000,
    ),
    is_lora: bool = Input(
        default=True, description="Train a LoRA. If false, train the whole UNet: more memory"
    ),
    unet_learning_rate: Optional[float] = Input(
        default=None,
        description="Learning rate of the UNet (method full). Empty: the model's default",
        ge=0,
        le=10,
    ),
    ti_lr: Optional[float] = Input(
        default=None,
        description="Learning rate of the token embeddings. Empty: the model's default",
        ge=0,
        le=10,
    ),
    lora_lr: Optional[float] = Input(
        default=None,
        description="Learning rate of the UNet's LoRA. Empty: the model's default",
        ge=0,
        le=10,
    ),
    lora_rank: Optional[int] = Input(
        default=None, description="Rank of the LoRA. Empty: the model's default", ge=1, le=256
    ),
    lr_scheduler: Optional[str] = Input(
        default=None,
        description="Learning-rate schedule after the warm-up. Empty: the model's default",
        choices=["constant", "linear", "cosine"],
    ),
    lr_warmup_steps: Optional[int] = Input(
        default=None,
        description="Steps over which the learning rates rise from 0. Empty: the model's default",
        ge=0,
        le=100000,
    ),
    token_string: str = Input(
        default="TOK", description="Trigger word of the new concept in captions and prompts"
    ),
    caption_prefix: str = Input(
        default="a photo of TOK, ",
        description="Beginning of automatic captions. Must contain token_string",
    ),
    mask_target_prompts: Optional[str] = Input(
        default=None,
        description="Subjects to focus on, such as 'a face'. Other pixels get a low loss weight",
    ),
    crop_based_on_salience: bool = Input(
        default=True,
        description="Crop around what the masks show. If false, crop around the center",
    ),
    use_face_detection_instead: bool = Input(
        default=False, description="Mask by detected faces instead of mask_target_prompts"
    ),
    clipseg_temperature: float = Input(
        default=1.0,
        description="Softness of mask_target_prompts' masks: above 1 softer, below 1 harder",
        ge=0.01,
        le=1000,
    ),
    verbose: bool = Input(default=True, description="Show a progress bar in the log"),
    checkpointing_steps: Optional[int] = Input(
        default=None,
        description="Save a checkpoint every N steps to resume from (see TRAINING_CHECKPOINTS)",
        ge=1,
        le=1000000,
    ),
    input_images_filetype: str = Input(
        default="infer",
        description="Expected archive type; others are rejected. infer accepts each",
        choices=["infer", "zip", "tar"],
    ),
    method: Optional[str] = Input(
        default=None,
        description="What to train besides the token embeddings. Empty: follow is_lora",
        choices=["lora", "full", "textual_inversion"],
    ),
    aspect_ratio_buckets: bool = Input(
        default=True,
        description="Train at sizes near each image's aspect ratio. If false, on squares",
    ),
    lora_alpha: Optional[float] = Input(
        default=None,
        description="LoRA alpha: updates are scaled by alpha / rank. Empty: the rank",
        ge=0.001,
        le=2560,
    ),
    use_rslora: bool = Input(
        default=False, description="Rank-stabilized LoRA: scale updates by alpha / sqrt(rank)"
    ),
    use_dora: bool = Input(
        default=False,
        description="Weight-decomposed LoRA: train magnitudes too. Requires lora_format kohya",
    ),
    train_text_encoder: bool = Input(
        default=False,
        description="Train a LoRA on the text encoders too. Requires lora_format kohya",
    ),
    lora_format: str = Input(
        default="cog_sdxl",
        description="Key names of the archive's LoRA",
        choices=["cog_sdxl", "kohya"],
    ),
    exchange_files: bool = Input(
        default=False,
        description="Also return a LoRA and an embedding for ComfyUI, A1111 and diffusers",
    ),
    optimizer: str = Input(
        default="adamw",
        description="Optimizer. prodigy finds its learning rates by itself",
        choices=["adamw", "adamw_8bit", "prodigy", "adafactor"],
    ),
    gradient_accumulation_steps: int = Input(
        default=1, description="Batches per optimizer step", ge=1, le=64
    ),
    num_new_tokens: Optional[int] = Input(
        default=None,
        description="Number of token embeddings of token_string. Empty: the model's default",
        ge=1,
        le=8,
    ),
    token_initializer: Optional[str] = Input(
        default=None, description="Word whose embedding the new ones start from. Empty: random ones"
    ),
    pivot_fraction: float = Input(
        default=0.5,
        description="Fraction of the steps that train the token embeddings, from the first on",
        ge=0,
        le=1,
    ),
    snr_gamma: Optional[float] = Input(
        default=None,
        description="Min-SNR gamma of the loss; 0: equal weights. Empty: the model's default",
        ge=0,
        le=1000,
    ),
    noise_offset: float = Input(
        default=0.0,
        description="Strength of offset noise, for darker and brighter images",
        ge=0,
        le=1,
    ),
    caption_dropout: Optional[float] = Input(
        default=None,
        description="Fraction of captions to drop. Empty: the model's default",
        ge=0,
        le=0.99,
    ),
    mask_floor: float = Input(
        default=0.1, description="Lowest loss weight of a masked pixel", ge=0, le=1
    ),
    random_flip: bool = Input(
        default=False,
        description="Mirror images half of the time. Not for faces, text or asymmetric things",
    ),
    prior_preservation: str = Input(
        default="off",
        description="Preserve class_prompt as the base model or class_images show it",
        choices=["off", "teacher", "class_images"],
    ),
    class_prompt: str = Input(
        default="",
        description="Class of the new concept for prior_preservation, such as 'a photo of a dog'",
    ),
    class_images: Optional[Path] = Input(
        default=None,
        description="Archive of images of the class, for prior_preservation class_images",
    ),
    prior_loss_weight: float = Input(
        default=1.0, description="Weight of the prior-preservation loss", ge=0, le=100
    ),
    compile_unet: bool = Input(
        default=False,
        description="Compile the UNet first, which takes minutes; steps are then faster",
    ),
    validation: bool = Input(
        default=True,
        description="With 8 images or more, hold out one in 8 and report the loss on them",
    ),
    preview_prompts: List[str] = Input(
        default=[], description="Prompts of the report's preview images, generated during training"
    ),
    preview_steps: Optional[int] = Input(
        default=None,
        description="Generate previews every N steps. Empty: at the end only",
        ge=1,
        le=1000000,
    ),
    text_encoder_lr: Optional[float] = Input(
        default=None,
        description="Learning rate of the text encoders' LoRA. Empty: the model's default",
        ge=0,
        le=10,
    ),
    max_grad_norm: float = Input(
        default=1.0, description="Norm to clip gradients to", ge=1e-06, le=1000000.0
    ),
    gradient_checkpointing: Optional[bool] = Input(
        default=None,
        description="Recompute activations to save memory. Empty: only if the GPU needs it",
    ),
    # script/sync: end
) -> TrainingOutput:
    """Train a model on images of a new concept, which token_string stands for in prompts."""
    config = TrainConfig.from_inputs(**locals())
    device = resolve_device()
    edition = resolve_edition(cuda_available=device == "cuda")
    resolve(config, TRAINABLE_MODELS[edition], n_examples=2)  # every rule, before anything is read
    check_class_images(config.class_images is not None, config.prior_preservation)

    from training.run import run

    folder = _empty_folder()
    try:
        archive, exchange = run(config, edition, device, folder)
    except BaseException:  # a cancellation too
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return TrainingOutput(weights=Path(archive), exchange=exchange and Path(exchange))


def _empty_folder() -> LocalPath:
    """Make this process's folder, without what an earlier training left in it."""
    folder = LocalPath(tempfile.gettempdir(), f"cog-stable-diffusion-training-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


if __name__ == "__main__":  # `accelerate launch train.py -i input_images=@photos.zip`
    import runpy

    runpy.run_module("script.tools.train", run_name="__main__")
