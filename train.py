"""The boundary to Cog's trainings: inputs become a TrainConfig, files a TrainingOutput.

Cog reads this file without running it, and silently drops what it cannot read: literals only, one
plain string per description (`script/schema --check` holds this).
"""

import os
import shutil
import tempfile
from pathlib import Path as LocalPath
from typing import List, Optional  # noqa: UP035  the spelling that every version of Cog's parser reads

from cog import BaseModel, Input, Path

from training.config import TrainConfig

# Imports torch when this file is loaded. Cog runs each training on its own thread, made outside of
# Python. pybind11 keeps the thread state of whoever first imports an extension built with it, and
# would be left with one that is gone: a later training then waits for the GIL forever
# (pybind/pybind11#2888). torch, torchvision, triton and scipy share that memory, so one is enough.
from training.run import run
from weights.edition import resolve_device, resolve_edition

# script/sync: preprocess.archive.Filetype
FILETYPE_CHOICES = ["infer", "zip", "tar"]
# script/sync: training.config.Method
METHOD_CHOICES = ["lora", "full", "textual_inversion"]
# script/sync: training.config.Schedule
LR_SCHEDULER_CHOICES = ["constant", "linear", "cosine"]
# script/sync: training.config.Optimizer
OPTIMIZER_CHOICES = ["adamw", "adamw_8bit", "prodigy", "adafactor"]
# script/sync: training.config.Prior
PRIOR_CHOICES = ["off", "teacher", "class_images"]
# script/sync: training.config.LoraFormat
LORA_FORMAT_CHOICES = ["cog_sdxl", "kohya"]


class TrainingOutput(BaseModel):  # type: ignore[misc]  # cog has no types for it
    """`weights` is for predictions: replicate_weights or COG_WEIGHTS."""

    weights: Path
    exchange: Optional[Path] = None  # a zip of files for other programs


def train(
    input_images: Path = Input(
        description="zip, tar or tar.gz of 2 to 2000 photos; with captions.csv, .txt files, or none"
    ),
    seed: Optional[int] = Input(
        default=None,
        description="Same seed, same weights; empty for a random one, which the log names",
        ge=0,
        le=4294967295,
    ),
    resolution: Optional[int] = Input(
        default=None,
        description="Side in pixels of the square whose area photos are trained at; empty: native",
        ge=64,
        le=2048,
    ),
    train_batch_size: Optional[int] = Input(
        default=None, description="Photos in a batch; empty for the model's own", ge=1, le=64
    ),
    num_train_epochs: Optional[int] = Input(
        default=None,
        description="Times that every photo is seen; not used where max_train_steps is given",
        ge=1,
        le=100000,
    ),
    max_train_steps: Optional[int] = Input(
        default=None, description="Steps, exactly; empty for the model's own", ge=1, le=100000
    ),
    is_lora: bool = Input(
        default=True, description="Train a LoRA; without it the whole UNet, which takes more memory"
    ),
    unet_learning_rate: Optional[float] = Input(
        default=None,
        description="Learning rate of the UNet if all of it is trained",
        ge=0,
        le=10,
    ),
    ti_lr: Optional[float] = Input(
        default=None, description="Learning rate of the new word's vectors", ge=0, le=10
    ),
    lora_lr: Optional[float] = Input(
        default=None, description="Learning rate of the LoRA", ge=0, le=10
    ),
    lora_rank: Optional[int] = Input(
        default=None, description="Rank of the LoRA; empty for the model's own", ge=1, le=256
    ),
    lr_scheduler: Optional[str] = Input(
        default=None,
        description="How the learning rates go on after the warm-up; empty: the model's own",
        choices=LR_SCHEDULER_CHOICES,
    ),
    lr_warmup_steps: Optional[int] = Input(
        default=None,
        description="Steps over which the learning rates rise from 0; empty for the model's own",
        ge=0,
        le=100000,
    ),
    token_string: str = Input(
        default="TOK", description="The new word, as captions and prompts spell it"
    ),
    caption_prefix: str = Input(
        default="a photo of TOK, ",
        description="Beginning of captions that are made automatically; has to hold the new word",
    ),
    mask_target_prompts: Optional[str] = Input(
        default=None,
        description="What photos are to be learnt for, such as a face; all else counts little",
    ),
    crop_based_on_salience: bool = Input(
        default=True, description="Cut photos around what the masks show rather than the centre"
    ),
    use_face_detection_instead: bool = Input(
        default=False, description="Mask by the faces in the photos, not by mask_target_prompts"
    ),
    clipseg_temperature: float = Input(
        default=1.0,
        description="How soft the masks of mask_target_prompts are: above 1 softer, below harder",
        ge=0.01,
        le=1000,
    ),
    verbose: bool = Input(default=True, description="Show a progress bar in the log"),
    checkpointing_steps: Optional[int] = Input(
        default=None,
        description="Save the state so often, to go on after a stop; see TRAINING_CHECKPOINTS",
        ge=1,
        le=1000000,
    ),
    input_images_filetype: str = Input(
        default="infer",
        description="Refuse an archive of another type; infer takes all three",
        choices=FILETYPE_CHOICES,
    ),
    method: Optional[str] = Input(
        default=None,
        description="What learns beside the new word; empty: as is_lora says",
        choices=METHOD_CHOICES,
    ),
    aspect_ratio_buckets: bool = Input(
        default=True, description="Train at sizes near the photos' shapes; without it, on squares"
    ),
    lora_alpha: Optional[float] = Input(
        default=None, description="The LoRA's alpha; empty: its rank", ge=0.001, le=2560
    ),
    use_rslora: bool = Input(default=False, description="Divide alpha by the root of the rank"),
    use_dora: bool = Input(
        default=False, description="Learn magnitudes too (DoRA); needs lora_format kohya"
    ),
    train_text_encoder: bool = Input(
        default=False, description="A LoRA on the text encoders too; needs lora_format kohya"
    ),
    lora_format: str = Input(
        default="cog_sdxl",
        description="Whose names the LoRA in the archive has",
        choices=LORA_FORMAT_CHOICES,
    ),
    exchange_files: bool = Input(
        default=False,
        description="Add a LoRA and an embedding that ComfyUI, A1111 and diffusers read",
    ),
    optimizer: str = Input(
        default="adamw",
        description="How parameters are moved; prodigy finds learning rates itself",
        choices=OPTIMIZER_CHOICES,
    ),
    gradient_accumulation_steps: int = Input(
        default=1, description="Batches that make one step", ge=1, le=64
    ),
    num_new_tokens: Optional[int] = Input(
        default=None,
        description="Vectors of the new word; empty: the model's own",
        ge=1,
        le=8,
    ),
    token_initializer: Optional[str] = Input(
        default=None, description="A word whose meaning the new one starts from"
    ),
    pivot_fraction: float = Input(
        default=0.5,
        description="Share of the steps in which the new word learns; then it stays",
        ge=0,
        le=1,
    ),
    snr_gamma: Optional[float] = Input(
        default=None,
        description="Weight noise levels by min-SNR; 0: all the same; empty: the model's own",
        ge=0,
        le=1000,
    ),
    noise_offset: float = Input(
        default=0.0, description="Noise of a picture as a whole, for darks and lights", ge=0, le=1
    ),
    caption_dropout: Optional[float] = Input(
        default=None,
        description="Share of captions that are left out; empty: the model's own",
        ge=0,
        le=0.99,
    ),
    mask_floor: float = Input(
        default=0.1, description="What pixels outside of a mask count", ge=0, le=1
    ),
    random_flip: bool = Input(
        default=False, description="Show photos mirrored half of the time; not for faces or text"
    ),
    prior_preservation: str = Input(
        default="off",
        description="Keep what the model knows of class_prompt, by itself or by class_images",
        choices=PRIOR_CHOICES,
    ),
    class_prompt: str = Input(
        default="", description="What the new word is one of, such as: a photo of a dog"
    ),
    class_images: Optional[Path] = Input(
        default=None, description="Archive of photos of the class, for prior_preservation"
    ),
    prior_loss_weight: float = Input(
        default=1.0, description="What prior preservation counts beside the photos", ge=0, le=100
    ),
    compile_unet: bool = Input(
        default=False,
        description="Compile the UNet first: minutes at the start, then faster steps",
    ),
    validation: bool = Input(
        default=True, description="With 8 photos or more, hold one in 8 out and measure on it"
    ),
    preview_prompts: List[str] = Input(
        default=[], description="Prompts to draw while training, for the report"
    ),
    preview_steps: Optional[int] = Input(
        default=None,
        description="Draw them so often; empty: at the end only",
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
        default=1.0, description="Norm to clip gradients to", ge=1e-06, le=1000000
    ),
    gradient_checkpointing: Optional[bool] = Input(
        default=None,
        description="Recompute activations to save memory. Empty: only if the GPU needs it",
    ),
) -> TrainingOutput:
    """Train a model on images of a new concept, which token_string stands for in prompts."""
    config = TrainConfig.from_inputs(**locals())
    device = resolve_device()
    edition = resolve_edition(cuda_available=device == "cuda")
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
