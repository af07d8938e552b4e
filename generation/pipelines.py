"""Which diffusers pipeline does which work, and the store that loads a model's parts once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from generation.base_models import BaseModelSpec, Family, RefinerSpec
from generation.request import GenerationPlan, Mode
from generation.schedulers import build_scheduler
from weights import cache
from weights.catalog import Edition

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

# By name, so that a class is imported when it is first needed: importing all of diffusers'
# pipelines takes longer than many a request.
PIPELINE_CLASSES: dict[tuple[Family, Mode], str] = {
    (Family.SDXL, Mode.TXT2IMG): "StableDiffusionXLPipeline",
    (Family.SDXL, Mode.IMG2IMG): "StableDiffusionXLImg2ImgPipeline",
    (Family.SDXL, Mode.INPAINT): "StableDiffusionXLInpaintPipeline",
    (Family.SDXL, Mode.OUTPAINT): "StableDiffusionXLInpaintPipeline",
    # Whatever the request's mode: it goes on from latents, and generation/refine.py keeps the mask.
    (Family.SDXL_REFINER, Mode.IMG2IMG): "StableDiffusionXLImg2ImgPipeline",
}


@dataclass(frozen=True)
class LoadedModel:
    """A model's shared parts, and the scheduler config exactly as it came."""

    parts: Mapping[str, object]  # component name → module, tokenizer or pipeline setting
    scheduler_config: Mapping[str, object]


class PipelineStore:
    """Loads each base model once; hands out a new pipeline around the shared parts per request.

    A pipeline object keeps state of its call (guidance, scheduler, progress bar); making one takes
    about a millisecond, and a new one per request leaves nothing for the next request to inherit.
    """

    def __init__(self, edition: Edition, device: torch.device, dtype: torch.dtype) -> None:
        self._edition = edition
        self._device = device
        self._dtype = dtype
        self._loaded: dict[str, LoadedModel] = {}

    def load(self, spec: BaseModelSpec) -> LoadedModel:
        """The model's parts on the device; read from disk (and fetched) on first use only."""
        if spec.name not in self._loaded:
            self._loaded[spec.name] = self._read(spec)
        return self._loaded[spec.name]

    def load_refiner(self, spec: BaseModelSpec) -> LoadedModel:
        """The parts of the model's refiner: a UNet of its own, the rest is the model's."""
        assert spec.refiner is not None
        if spec.refiner.name not in self._loaded:
            self._loaded[spec.refiner.name] = self._read_refiner(spec.refiner, self.load(spec))
        return self._loaded[spec.refiner.name]

    def pipeline(
        self, spec: BaseModelSpec, plan: GenerationPlan, own: Mapping[str, object]
    ) -> DiffusionPipeline:
        """A pipeline for one request, with a scheduler of its own, and its `own` parts."""
        return _build(PIPELINE_CLASSES[spec.family, plan.mode], self.load(spec), plan, own)

    def refiner_pipeline(
        self, spec: BaseModelSpec, plan: GenerationPlan, own: Mapping[str, object]
    ) -> DiffusionPipeline:
        """The refiner's pipeline for one request; of its `own` parts, those that a refiner has."""
        assert spec.refiner is not None
        pipeline_class = PIPELINE_CLASSES[spec.refiner.family, Mode.IMG2IMG]
        model = self.load_refiner(spec)
        own = {name: part for name, part in own.items() if model.parts[name] is not None}
        return _build(pipeline_class, model, plan, own)

    def _read(self, spec: BaseModelSpec) -> LoadedModel:
        import diffusers
        from transformers.utils import logging as transformers_logging

        # Their bars count parts of a model, several at once; ours are for downloads and denoising.
        diffusers.utils.logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        folder = cache.ensure(spec.weights, self._edition)
        vae_folder = (
            cache.ensure(spec.vae_weights, self._edition) if spec.vae_weights else folder / "vae"
        )
        vae = diffusers.AutoencoderKL.from_pretrained(
            vae_folder,
            variant=None if spec.vae_weights else "fp16",
            dtype=self._dtype,
            use_safetensors=True,
        )
        pipeline_class = getattr(diffusers, PIPELINE_CLASSES[spec.family, Mode.TXT2IMG])
        pipeline = pipeline_class.from_pretrained(
            folder,
            vae=vae,
            variant="fp16",
            dtype=self._dtype,
            use_safetensors=True,
            add_watermarker=False,
            local_files_only=True,
        ).to(self._device)
        parts = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
        return LoadedModel(parts, _scheduler_config(folder))

    def _read_refiner(self, spec: RefinerSpec, base: LoadedModel) -> LoadedModel:
        import diffusers

        folder = cache.ensure(spec.weights, self._edition)
        unet = diffusers.UNet2DConditionModel.from_pretrained(
            folder / "unet", variant="fp16", dtype=self._dtype, use_safetensors=True
        )
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        settings = ("requires_aesthetics_score", "force_zeros_for_empty_prompt")
        parts = {
            **base.parts,
            "unet": unet.to(self._device),
            "text_encoder": None,
            "tokenizer": None,
            **{name: index[name] for name in settings},
        }
        return LoadedModel(parts, _scheduler_config(folder))


def _scheduler_config(folder: Path) -> Mapping[str, object]:
    config: dict[str, object] = json.loads(
        (folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    )
    return config


def scheduler_of(plan: GenerationPlan, model: LoadedModel) -> SchedulerMixin:
    """A new scheduler for the plan, from the config that the model came with."""
    return build_scheduler(plan.scheduler, plan.schedule_type, model.scheduler_config, plan.seeds)


def _build(
    class_name: str, model: LoadedModel, plan: GenerationPlan, own: Mapping[str, object]
) -> DiffusionPipeline:
    import diffusers

    pipeline: DiffusionPipeline = getattr(diffusers, class_name)(
        **{**model.parts, **own},
        scheduler=scheduler_of(plan, model),
        add_watermarker=False,
    )
    return pipeline
