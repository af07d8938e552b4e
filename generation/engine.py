"""One request, from beginning to end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from generation import canvas, control, noise, outputs, parameters, prompts
from generation.adapters import Adapter, text_state
from generation.base_models import BASE_MODELS, DEFAULT_BASE_MODEL, BaseModelSpec
from generation.errors import InvalidRequest, OutOfDeviceMemory
from generation.finish import Finisher
from generation.options import GenerationRequest
from generation.painter import Studio
from generation.pipelines import LoadedModel, PipelineStore
from generation.plan import GenerationPlan, resolve_mode
from generation.replaceable import ReplaceableWeights, replace_all_trigger_words
from generation.resolve import resolve
from generation.stages import Stages
from preprocess.annotators import Detectors
from preprocess.images import SourceImage, read_image, read_mask
from weights import cache
from weights.catalog import Edition
from weights.edition import Device
from weights.user.parse import Source, Tokens, parse_operator_source


@dataclass(frozen=True)
class GenerationResult:
    """What came out, and what it took."""

    files: tuple[Path, ...]
    plan: GenerationPlan
    seconds: dict[str, float]  # stage → wall time
    peak_memory: int  # bytes: of the request on a GPU, of the process so far elsewhere


class Engine:
    """Makes pictures with the models of one edition on one device. One request at a time."""

    def __init__(
        self,
        edition: Edition,
        device: Device,
        store: PipelineStore | None = None,
        *,
        model: str = DEFAULT_BASE_MODEL,
        budget: int | None = None,
        compiles: bool = False,
    ) -> None:
        """`model` is that of requests that name none; the others see `PipelineStore`."""
        self.device = torch.device(device)
        # fp16 holds more of the published weights' precision than bf16 at the same speed; CPUs are
        # faster in fp32 than in either.
        self.dtype = torch.float32 if device == "cpu" else torch.float16
        self._edition = edition
        self._models = BASE_MODELS[edition]
        self._default = model
        self._store = store or PipelineStore(edition, self.device, self.dtype, budget, compiles)
        # Of the models in memory.
        self._replaceable: WeakKeyDictionary[LoadedModel, ReplaceableWeights] = WeakKeyDictionary()
        # For the default model, and those that are made of the same weights.
        self._operators: tuple[Source, Tokens] | None = None
        self._texts = prompts.EmbeddingCache()
        self._finisher = Finisher(edition, device, self.dtype)
        self._detectors = Detectors(edition, device)

    @torch.inference_mode()
    def load(self, weights: str | None = None, models: Sequence[str] = ()) -> None:
        """Load models (by default the default one) and the safety checker before any request.

        Also the operator's `weights` into the model: a path or anything that a request may name;
        HF_TOKEN and CIVITAI_API_TOKEN are used for them. Raises a WeightsError.
        """
        source = parse_operator_source(weights) if weights else None
        if source is not None:
            hub, civitai = (os.environ.get(f"{n}_TOKEN") for n in ("HF", "CIVITAI_API"))
            self._operators = source, Tokens(hub or None, civitai or None)
            self._store.drop(self._spec(None))  # it may share modules, which are to be changed
        for name in models or (self._default,):
            spec = self._spec(name)
            self._own(spec, self._load(spec))
        self._finisher.load_safety_checker()

    def _load(self, spec: BaseModelSpec) -> ReplaceableWeights:
        # Models share modules: what was cancelled in another one's would be taken for pristine.
        for others in self._replaceable.values():
            others.settle()
        weights = self._models[self._default].weights
        operators = self._operators if spec.weights == weights else None
        model = self._store.load(spec, alone=operators is not None)
        if model not in self._replaceable:
            replaceable = ReplaceableWeights(model.parts)
            if operators is not None:
                replaceable.set_up(*operators)
            self._replaceable[model] = replaceable
        return self._replaceable[model]

    def _own(self, spec: BaseModelSpec, replaceable: ReplaceableWeights) -> list[Adapter]:
        """The LoRA that is part of the model, if there is one."""
        if spec.adapter is None:
            return []
        folder = cache.ensure(spec.adapter, self._edition)
        (file,) = folder.glob("*.safetensors")
        return [replaceable.own(spec.adapter, file)]

    def _spec(self, name: str | None) -> BaseModelSpec:
        if name is None:
            return self._models[self._default]
        if name not in self._models:
            raise InvalidRequest(
                f"model {name!r} is not known; choose one of {', '.join(self._models)}"
            )
        return self._models[name]

    @torch.inference_mode()
    def generate(self, request: GenerationRequest, folder: Path) -> GenerationResult:
        """Make the pictures and write them into `folder`.

        Raises:
            InvalidRequest: before any model is loaded or changed.
            BadPicture: the same, for a picture that was sent.
            WeightsError: trained weights that are named cannot be had or used; nothing is changed.
            UnsafePictures: the safety check has left none.
            OutOfDeviceMemory: the models stay loaded and intact.
        """
        spec = self._spec(request.model)
        resolve_mode(request)  # before images are read: whether they add up to something
        image = read_image(request.image, "image") if request.image else None
        mask = read_mask(request.mask, "mask") if request.mask else None
        controls = _control_images(request)
        plan = resolve(
            request,
            spec,
            image.rgb.size if image else None,
            next((picture.rgb.size for picture in controls.values()), None),
        )
        source = canvas.fit(image, mask, plan) if image else None
        stages = Stages(self.device)
        maps = control.ControlMaps(
            plan.controlnets,
            plan.control_maps.annotators,
            {k: canvas.Covering(c.rgb, (plan.width, plan.height)) for k, c in controls.items()},
            self._detectors,
        )
        if plan.control_maps.only:
            return self._maps_alone(maps, plan, folder, stages)
        print(f"Using seed: {plan.seeds[0]}", flush=True)
        if plan.negative_prompt and not plan.do_classifier_free_guidance:
            print("negative_prompt has no effect: guidance_scale of up to 1 runs no guidance pass")
        guided = plan.do_classifier_free_guidance
        if (plan.guidance_start, plan.guidance_end) != (0, 1) and not guided:
            print("guidance_start and guidance_end have no effect: no guidance pass runs")
        with stages.time("load"):
            replaceable = self._load(spec)
            own_adapters = self._own(spec, replaceable)
            if plan.check_safety:
                self._finisher.load_safety_checker()
        with stages.time("weights"):
            adapters = replaceable.read(plan.weights, plan.tokens)
        with (
            self._explain_out_of_memory(plan),
            noise.drawn_in_fp32(self.device),
            stages.around("weights", replaceable.applied(adapters, own_adapters)) as own,
        ):
            texts = prompts.Texts(self._texts, (spec.weights, text_state(adapters)))
            studio = Studio(self._store, spec, own, texts, maps, self._finisher, stages)
            pictures = studio.draw(_in_words(plan, adapters), source)
        with self._explain_out_of_memory(plan):
            finished = self._finisher.finish(pictures, plan, stages)
        with stages.time("save"):
            told = {}
            if plan.output.parameters is not None:
                told = {
                    place: parameters.describe(plan, spec, adapters, plan.seeds[place])
                    for place in finished
                }
            files = outputs.save(finished, folder, plan.output, told)
            if plan.control_maps.returned:
                files = (*outputs.save_maps(maps.last, folder), *files)
        return GenerationResult(files, plan, stages.seconds, stages.peak_memory())

    def _maps_alone(
        self, maps: control.ControlMaps, plan: GenerationPlan, folder: Path, stages: Stages
    ) -> GenerationResult:
        """What the request's controls look like; no model of pictures is loaded."""
        size = (plan.width, plan.height)
        with self._explain_out_of_memory(plan), stages.time("control_maps"):
            drawn = maps.look(canvas.Frame.whole(size, size))
        with stages.time("save"):
            files = outputs.save_maps(drawn, folder)
        return GenerationResult(files, plan, stages.seconds, stages.peak_memory())

    @contextmanager
    def _explain_out_of_memory(self, plan: GenerationPlan) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            self._store.forget_passes()
            torch.cuda.empty_cache()
            raise OutOfDeviceMemory(
                f"the device's memory does not hold {len(plan.seeds)} picture(s) of "
                f"{plan.width}x{plan.height}; ask for fewer with num_outputs or for a smaller"
                " width, height and hires_fix"
            ) from error


def _control_images(request: GenerationRequest) -> dict[str, SourceImage]:
    """The pictures of the controls that there are, by the controls' inputs."""
    return {
        f"controlnet_{k}": read_image(asked.image, f"controlnet_{k}_image")
        for k, asked in enumerate(request.controls, 1)
        if asked.image is not None
    }


def _in_words(plan: GenerationPlan, adapters: Sequence[Adapter]) -> GenerationPlan:
    """The plan as the text encoders read it: trigger words are tokens of their own."""
    prompt, negative = (
        replace_all_trigger_words(text, adapters) for text in (plan.prompt, plan.negative_prompt)
    )
    return replace(plan, prompt=prompt, negative_prompt=negative)
