"""Generate images for one request, from inputs to files."""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from PIL import Image

from generation import metadata, outputs
from generation.adapters import Adapter, replace_all_trigger_words
from generation.base_models import BASE_MODELS, DEFAULT_BASE_MODEL, BaseModelSpec
from generation.conditioning import PromptEncoder
from generation.controlnet import render_control_maps
from generation.crop import CoverFit, CropRegion
from generation.errors import InvalidRequest, OutOfDeviceMemory
from generation.input_images import read_inputs
from generation.latents import decode_latents
from generation.lora import AdapterManager, Tokenizers, text_encoder_cache_key
from generation.options import GenerationRequest, Refine
from generation.plan import GenerationPlan
from generation.postprocess import PostProcessor
from generation.resolve import resolve
from generation.stages import StageSampler, prepare_stage
from generation.timings import Timings
from models.cache import LoadedControlNet, LoadedModel, ModelCache
from preprocess.annotators import AnnotatorSettings, Detectors
from weights import cache
from weights.catalog import Edition
from weights.edition import Device
from weights.user.parse import Source, Tokens, parse_operator_source


@dataclass(frozen=True)
class GenerationResult:
    """The files that a request produced, its plan, and its cost."""

    files: tuple[Path, ...]
    plan: GenerationPlan
    seconds: dict[str, float]  # wall time by part
    peak_memory: int  # bytes: the request's on a GPU; on a CPU, the process's since its start


@dataclass(frozen=True)
class RequestModels:
    """The models that a request uses."""

    base: LoadedModel
    refiner: LoadedModel | None
    controlnets: Mapping[str, LoadedControlNet]  # by catalog entry
    adapters: AdapterManager
    model_adapters: Sequence[Adapter]  # a LoRA that belongs to the model, such as LCM's


class Engine:
    """Generates images with the models of one edition on one device, one request at a time."""

    def __init__(
        self,
        edition: Edition,
        device: Device,
        models: ModelCache | None = None,
        *,
        model: str = DEFAULT_BASE_MODEL,
        budget: int | None = None,
        compiles: bool = False,
    ) -> None:
        """Create an engine; nothing is loaded yet.

        `model` serves requests that name none. `budget` and `compiles` are `ModelCache`'s.
        """
        self.device = torch.device(device)
        # fp16 keeps more of the published weights' precision than bf16 at the same speed; CPUs are
        # faster in fp32 than in either.
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self._edition = edition
        self._specs = BASE_MODELS[edition]
        self._default = model
        if models is None:
            models = ModelCache(edition, self.device, self.dtype, budget, compiles)
        self._models = models
        self._adapters: WeakKeyDictionary[LoadedModel, AdapterManager] = WeakKeyDictionary()
        # Merged into the default model, and into all models made of the same weights.
        self._operator_weights: tuple[Source, Tokens] | None = None
        self._prompts = PromptEncoder()
        self._postprocessor = PostProcessor(edition, device, self.dtype)
        self._detectors = Detectors(edition, device)

    @torch.inference_mode()
    def load(self, weights: str | None = None, models: Sequence[str] = ()) -> None:
        """Load models (the default one if none is named) and the safety checker.

        The operator's `weights`, a path or anything that a request may name, are loaded with the
        default model; HF_TOKEN and CIVITAI_API_TOKEN are used for them. Raises a WeightsError.
        """
        source = parse_operator_source(weights) if weights else None
        if source is not None:
            hub, civitai = os.environ.get("HF_TOKEN"), os.environ.get("CIVITAI_API_TOKEN")
            self._operator_weights = source, Tokens(hub or None, civitai or None)
            # The default model may share networks with others, and these weights would change them.
            self._models.drop(self._spec(None).weights)
        for name in models or (self._default,):
            self._load_base(self._spec(name))
        self._postprocessor.load_safety_checker()

    @torch.inference_mode()
    def generate(self, request: GenerationRequest, folder: Path) -> GenerationResult:
        """Generate images and write them into `folder`.

        Raises:
            InvalidRequest: a rule is broken; no model was loaded or changed.
            BadImage: an input image cannot be read; no model was loaded or changed.
            WeightsError: trained weights cannot be downloaded or used; nothing is changed.
            UnsafeImages: the safety checker rejected all of them.
            OutOfDeviceMemory: the models stay loaded and intact.
        """
        spec = self._spec(request.model)
        inputs = read_inputs(request)
        plan = resolve(request, spec, inputs.image_size, inputs.control_size)
        images, mask = inputs.fit(plan) if inputs.image else ([], None)
        controls = inputs.fit_controls(plan) if inputs.controls else {}
        timings = Timings(self.device)
        if request.control_maps_only:
            return self._generate_control_maps(plan, controls, folder, timings)
        _log_request(plan)
        with timings.measure("load"):
            models = self._load(spec, plan)
        with timings.measure("weights"):
            adapters = models.adapters.read(plan.weights, plan.tokens)
        # In place while the block runs, then restored exactly, on errors and cancellation too.
        merge = models.adapters.applied(adapters, models.model_adapters)
        maps: dict[str, Image.Image] = {}
        with self._explain_out_of_memory(plan), timings.wrap("weights", merge) as tokenizers:
            sampler = self._stage_sampler(spec, plan, models, adapters, tokenizers, timings)
            for number, stage in enumerate(plan.stages):
                if number > 0 and not stage.margins and stage.size != images[0].size:
                    factor = max(
                        new / old for new, old in zip(stage.size, images[0].size, strict=True)
                    )
                    images = self._postprocessor.upscale(images, factor, request.upscaler, timings)
                stage_input = prepare_stage(stage, plan, spec, images, mask)
                if plan.controlnets:
                    maps = self._control_maps(plan, controls, stage_input.region, timings)
                latents = sampler.sample(stage, stage_input, maps)
                with timings.measure("decode"):
                    images = stage_input.merge(decode_latents(models.base, latents))
        with self._explain_out_of_memory(plan):
            processed = self._postprocessor.process(images, request, timings)
        with timings.measure("save"):
            texts: dict[int, str] = {}
            if request.embed_parameters:
                texts = {k: metadata.describe(plan, spec, adapters, k) for k in processed}
            file_format, quality = request.output_format, request.output_quality
            files = outputs.save(processed, folder, file_format, quality, texts)
            if maps and request.returns_control_maps:
                files = (*outputs.save_maps(maps, folder), *files)
        return GenerationResult(files, plan, timings.seconds, timings.peak_memory())

    def _spec(self, name: str | None) -> BaseModelSpec:
        if name is None:
            return self._specs[self._default]
        if name not in self._specs:
            raise InvalidRequest(
                f"model {name!r} is not known; choose one of {', '.join(self._specs)}"
            )
        return self._specs[name]

    def _load(self, spec: BaseModelSpec, plan: GenerationPlan) -> RequestModels:
        """Load what a plan needs. Raises a WeightsError."""
        base, adapters, model_adapters = self._load_base(spec)
        if not plan.request.disable_safety_checker:
            self._postprocessor.load_safety_checker()
        needed = sorted({c.weights for c in plan.controlnets if c.has_effect})
        keep = {spec.weights, *needed}
        controlnets = {weights: self._models.controlnet(weights, keep) for weights in needed}
        refiner = None
        if plan.request.refine != Refine.NO_REFINER and spec.refiner is not None:
            refiner = self._models.refiner(spec.refiner.weights, spec.weights, base)
        return RequestModels(base, refiner, controlnets, adapters, model_adapters)

    def _load_base(
        self, spec: BaseModelSpec
    ) -> tuple[LoadedModel, AdapterManager, Sequence[Adapter]]:
        """Load a base model, with the operator's weights, and the LoRA that is a part of it."""
        # A cancelled request may have left its adapters in a network that several models share:
        # restore it before another model takes its values for the original ones.
        for manager in self._adapters.values():
            manager.recover()
        is_default = spec.weights == self._specs[self._default].weights
        operator_weights = self._operator_weights if is_default else None
        model = self._models.base_model(
            spec.weights, spec.components_from, unshared=operator_weights is not None
        )
        if model not in self._adapters:
            adapters = AdapterManager(model.components)
            if operator_weights is not None:
                adapters.set_operator_weights(*operator_weights)
            self._adapters[model] = adapters
        adapters, model_adapters = self._adapters[model], []
        if spec.adapter is not None:
            (file,) = cache.ensure(spec.adapter, self._edition).glob("*.safetensors")
            model_adapters.append(adapters.model_adapter(spec.adapter, file))
        return model, adapters, model_adapters

    def _stage_sampler(
        self,
        spec: BaseModelSpec,
        plan: GenerationPlan,
        models: RequestModels,
        adapters: Sequence[Adapter],
        tokenizers: Tokenizers,
        timings: Timings,
    ) -> StageSampler:
        """Encode the prompts, and return what the stages share."""
        prompts = [plan.request.prompt, plan.request.negative_prompt]
        state: Hashable = ()
        if adapters:
            prompts = [replace_all_trigger_words(text, adapters) for text in prompts]
            state = text_encoder_cache_key(adapters)
        encode = functools.partial(
            self._prompts.encode,
            tokenizers=tokenizers,
            prompt=prompts[0],
            negative_prompt=prompts[1] if plan.do_classifier_free_guidance else None,
            clip_skip=plan.request.clip_skip,
            state=(spec.weights, state),
        )
        with timings.measure("text"):
            return StageSampler(
                plan=plan,
                spec=spec,
                base=models.base,
                refiner=models.refiner,
                controlnets=models.controlnets,
                prompts=encode(models.base.components),
                refiner_prompts=encode(models.refiner.components) if models.refiner else None,
                generators=[torch.Generator("cpu").manual_seed(seed) for seed in plan.seeds],
                timings=timings,
            )

    def _control_maps(
        self,
        plan: GenerationPlan,
        controls: Mapping[str, CoverFit],
        region: CropRegion,
        timings: Timings,
    ) -> dict[str, Image.Image]:
        """Return the control maps of a region, by input."""
        with timings.measure("control_maps"):
            request = plan.request
            settings = AnnotatorSettings(request.canny_low_threshold, request.canny_high_threshold)
            return render_control_maps(
                plan.controlnets, settings, controls, region, self._detectors
            )

    def _generate_control_maps(
        self,
        plan: GenerationPlan,
        controls: Mapping[str, CoverFit],
        folder: Path,
        timings: Timings,
    ) -> GenerationResult:
        """Write the control maps alone; no base model is loaded."""
        size = (plan.width, plan.height)
        with self._explain_out_of_memory(plan):
            maps = self._control_maps(plan, controls, CropRegion.whole(size, size), timings)
        with timings.measure("save"):
            files = outputs.save_maps(maps, folder)
        return GenerationResult(files, plan, timings.seconds, timings.peak_memory())

    @contextmanager
    def _explain_out_of_memory(self, plan: GenerationPlan) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._models.clear_graphs()
            torch.cuda.empty_cache()
            raise OutOfDeviceMemory(
                f"the device's memory does not hold {len(plan.seeds)} image(s) of "
                f"{plan.width}x{plan.height}; use a smaller num_outputs, width, height or hires_fix"
            ) from error


def _log_request(plan: GenerationPlan) -> None:
    """Log the seed, and the inputs that have no effect."""
    print(f"Using seed: {plan.seeds[0]}", flush=True)
    if plan.do_classifier_free_guidance:
        return
    if plan.request.negative_prompt:
        print(
            "negative_prompt has no effect: guidance_scale is at most 1, which turns guidance off"
        )
    if (plan.request.guidance_start, plan.request.guidance_end) != (0, 1):
        print("guidance_start and guidance_end have no effect: guidance is off")
