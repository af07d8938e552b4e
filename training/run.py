"""One training: archives of images → examples → trained weights → files."""

import os
from pathlib import Path

import torch

from preprocess.crop import BucketRules, Size, make_buckets
from preprocess.prepare import PreparedImage, PrepareSettings, prepare, prepare_class_images
from training import export, loop, model, optimizers
from training.config import TRAINABLE_MODELS, Method, TrainConfig
from training.dataset import Example
from training.progress import Event, Previews, Started
from training.report import render_report
from weights.catalog import Edition
from weights.edition import Device

BUCKETS_PER_SIDE = 16  # sides are multiples of this part of the native one: 64 pixels of 1024


def run(
    config: TrainConfig, edition: Edition, device: Device, folder: Path
) -> tuple[Path, Path | None]:
    """Train as a config says that `resolve` accepts; write the archive and the zip for others.

    Both are written into `folder`. Raises a PreprocessError, TrainingError or WeightsError.
    """
    spec = TRAINABLE_MODELS[edition]
    optimizers.check(config.optimizer, device)
    if config.compile_unet:
        model.check_compiler(device)
    settings = _prepare_settings(config, _buckets(config, spec.native_size))
    class_images = []
    if config.class_images is not None:  # first: it loads no model, so errors show at once
        class_images = prepare_class_images(config.class_images, settings.buckets, folder)
    images = prepare(config.input_images, settings, edition, device, folder)
    method = config.method or (Method.LORA if config.is_lora else Method.FULL)
    base = model.load(spec, edition, torch.device(device), method)
    examples = [_example(image) for image in images]
    previews: list[Previews] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Started):
            print(f"Using seed: {event.plan.seed}", flush=True)
        elif isinstance(event, Previews):
            previews.append(event)

    trained = loop.fit(
        examples,
        [_example(image) for image in class_images],
        config,
        base,
        Path(os.environ.get("TRAINING_CHECKPOINTS") or folder),
        on_event,
    )
    report = render_report(trained.plan, examples, trained.history, previews)
    files = export.write(trained, base, len(examples), folder, report)
    return files.archive, export.bundle(files, folder)


def _prepare_settings(config: TrainConfig, buckets: tuple[Size, ...]) -> PrepareSettings:
    return PrepareSettings(
        token_string=config.token_string,
        caption_prefix=config.caption_prefix,
        mask_target_prompts=config.mask_target_prompts or "",
        clipseg_temperature=config.clipseg_temperature,
        use_face_detection_instead=config.use_face_detection_instead,
        crop_based_on_salience=config.crop_based_on_salience,
        input_images_filetype=config.input_images_filetype,
        buckets=buckets,
    )


def _buckets(config: TrainConfig, native_size: int) -> tuple[Size, ...]:
    """Return the sizes to train at."""
    side = config.resolution or native_size
    if not config.aspect_ratio_buckets:
        return ((side, side),)  # as cog-sdxl (preprocess.py)
    return make_buckets(BucketRules(side, native_size // BUCKETS_PER_SIDE, side // 2, side * 2))


def _example(prepared: PreparedImage) -> Example:
    crop = prepared.crop
    height_width = (crop.original_size[1], crop.original_size[0])
    return Example(
        prepared.name, crop.image, crop.mask, prepared.caption, height_width, crop.crop_top_left
    )
