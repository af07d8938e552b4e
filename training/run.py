"""One training: archives of images → examples → trained weights → files."""

import os
from pathlib import Path

import torch

from preprocess.crop import BucketRules, Size, make_buckets
from preprocess.prepare import PreparedImage, PrepareSettings, prepare, prepare_class_images
from training import export, loop, model, optimizers
from training.config import TRAINABLE_MODELS, TrainConfig
from training.dataset import Example
from training.plan import TrainPlan, check_class_images, resolve
from training.progress import Event, Previews, Started
from training.report import render_report
from weights.catalog import Edition
from weights.edition import Device

BUCKETS_PER_SIDE = 16  # sides are multiples of this part of the native one: 64 pixels of 1024


def run(
    config: TrainConfig, edition: Edition, device: Device, folder: Path
) -> tuple[Path, Path | None]:
    """Write the archive, and the zip for other programs if there is one, into `folder`.

    Raises a PreprocessError, TrainingError or WeightsError.
    """
    spec = TRAINABLE_MODELS[edition]
    plan = resolve(config, spec, n_examples=2)  # every rule, before anything is read
    check_class_images(config.class_images is not None, config.prior_preservation)
    optimizers.check(config.optimizer, device)
    if config.compile_unet:
        model.check_compiler(device)
    settings = _prepare_settings(plan, _buckets(plan, spec.native_size))
    class_images = []
    if config.class_images is not None:  # first: it loads no model, so errors show at once
        class_images = prepare_class_images(config.class_images, settings.buckets, folder)
    images = prepare(config.input_images, settings, edition, device, folder)
    base = model.load(spec, edition, torch.device(device), plan.method)
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


def _prepare_settings(plan: TrainPlan, buckets: tuple[Size, ...]) -> PrepareSettings:
    return PrepareSettings(
        token_string=plan.token_string,
        caption_prefix=plan.caption_prefix,
        mask_target_prompts=plan.mask_target_prompts or "",
        clipseg_temperature=plan.clipseg_temperature,
        use_face_detection_instead=plan.use_face_detection_instead,
        crop_based_on_salience=plan.crop_based_on_salience,
        input_images_filetype=plan.input_images_filetype,
        buckets=buckets,
    )


def _buckets(plan: TrainPlan, native_size: int) -> tuple[Size, ...]:
    """Return the sizes to train at."""
    side = plan.resolution
    if not plan.aspect_ratio_buckets:
        return ((side, side),)  # as cog-sdxl (preprocess.py)
    return make_buckets(BucketRules(side, native_size // BUCKETS_PER_SIDE, side // 2, side * 2))


def _example(prepared: PreparedImage) -> Example:
    crop = prepared.crop
    height_width = (crop.original_size[1], crop.original_size[0])
    return Example(
        prepared.name, crop.image, crop.mask, prepared.caption, height_width, crop.crop_top_left
    )
