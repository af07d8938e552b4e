"""Which diffusers pipeline does which work, and the store that loads a model's parts once."""

from __future__ import annotations

import functools
import gc
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from generation.base_models import Architecture, BaseModelSpec, RefinerSpec
from generation.host_schedule import on_the_host
from generation.passes import Passes, acceleration
from generation.plan import GenerationPlan, Mode
from generation.schedulers import build_scheduler
from weights import cache
from weights.catalog import Edition

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

# By name, so that a class is imported when it is first needed: importing all of diffusers'
# pipelines takes longer than many a request.
PIPELINE_CLASSES: dict[tuple[Architecture, Mode], str] = {
    (Architecture.SDXL, Mode.TXT2IMG): "StableDiffusionXLPipeline",
    (Architecture.SDXL, Mode.IMG2IMG): "StableDiffusionXLImg2ImgPipeline",
    (Architecture.SDXL, Mode.INPAINT): "StableDiffusionXLInpaintPipeline",
    (Architecture.SDXL, Mode.OUTPAINT): "StableDiffusionXLInpaintPipeline",
    (Architecture.SD, Mode.TXT2IMG): "StableDiffusionPipeline",
    (Architecture.SD, Mode.IMG2IMG): "StableDiffusionImg2ImgPipeline",
    (Architecture.SD, Mode.INPAINT): "StableDiffusionInpaintPipeline",
    (Architecture.SD, Mode.OUTPAINT): "StableDiffusionInpaintPipeline",
    # Whatever the request's mode: it goes on from latents, and generation/refine.py keeps the mask.
    (Architecture.SDXL_REFINER, Mode.IMG2IMG): "StableDiffusionXLImg2ImgPipeline",
}

# What the pipelines of a family are told beside their parts: safety and marking are ours.
SETTINGS: dict[Architecture, Mapping[str, object]] = {
    Architecture.SDXL: {"add_watermarker": False},
    Architecture.SD: {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    },
}

_SHARED_PARTS = ("text_encoder", "text_encoder_2", "vae")


@dataclass(frozen=True, eq=False)  # each is itself: what belongs to one ends with it
class LoadedModel:
    """A model's shared parts, and the scheduler config exactly as it came."""

    parts: Mapping[str, object]  # component name → module, tokenizer or pipeline setting
    scheduler_config: Mapping[str, object]

    def modules(self) -> list[nn.Module]:
        """Those that hold values."""
        return [part for part in self.parts.values() if isinstance(part, nn.Module)]


def _bytes(models: Iterable[LoadedModel]) -> int:
    """Of the values in all of them; what some share counts once."""
    modules = {id(module): module for model in models for module in model.modules()}
    return sum(
        tensor.nbytes
        for module in modules.values()
        for tensor in (*module.parameters(), *module.buffers())
    )


class PipelineStore:
    """Loads base models; hands out a new pipeline around the shared parts per request.

    Models of the same weights are one; text encoders and VAEs of the same content are one module in
    several of them. They stay as long as they fit into `budget` bytes together; those used last
    stay longest. A model is read whole before another has to go, so one that cannot be read changes
    nothing.

    A pipeline object keeps state of its call (guidance, scheduler, progress bar); making one takes
    about a millisecond, and a new one per request leaves nothing for the next request to inherit.
    """

    def __init__(
        self,
        edition: Edition,
        device: torch.device,
        dtype: torch.dtype,
        budget: int | None = None,
        compiles: bool = False,
    ) -> None:
        self._edition = edition
        self._device = device
        self._dtype = dtype
        self._budget = budget
        self._loaded: OrderedDict[str, LoadedModel] = OrderedDict()  # used last: last
        self._shared: WeakValueDictionary[Hashable, nn.Module] = WeakValueDictionary()
        self.acceleration = acceleration(device, compiles)
        self._passes: WeakKeyDictionary[LoadedModel, Passes] = WeakKeyDictionary()

    def load(self, spec: BaseModelSpec, alone: bool = False) -> LoadedModel:
        """The model's parts on the device; read from disk (and fetched) if they are not there.

        `alone`: one that is read now shares nothing, because it will be changed for good.
        """
        return self._get(spec.weights, lambda: self._read(spec, alone))

    def drop(self, spec: BaseModelSpec) -> None:
        """Let go of the model: the next `load` reads it."""
        self._loaded.pop(spec.weights, None)

    def load_refiner(self, spec: BaseModelSpec) -> LoadedModel:
        """The parts of the model's refiner: a UNet of its own, the rest is the model's."""
        refiner, base = spec.refiner, self.load(spec)
        assert refiner is not None
        known = self._loaded.get(refiner.weights)
        if known is not None and known.parts["tokenizer_2"] is not base.parts["tokenizer_2"]:
            # It has parts of a base that was dropped: by budget, a refiner leaves before.
            del self._loaded[refiner.weights]
        return self._get(refiner.weights, lambda: self._read_refiner(refiner, base), [spec.weights])

    def load_controlnet(self, weights: str, beside: Collection[str]) -> LoadedModel:
        """The ControlNet of this catalog entry; what `beside` names stays in memory for it."""
        return self._get(weights, lambda: self._read_controlnet(weights), beside)

    def passes(self, model: LoadedModel) -> Passes:
        """The forward passes of a model's modules, made fast; they end with it."""
        return self._passes.setdefault(model, Passes(self.acceleration))

    def forget_passes(self) -> None:
        """Give back the memory of all that was recorded."""
        for passes in self._passes.values():
            passes.forget()

    def _get(
        self, weights: str, read: Callable[[], LoadedModel], beside: Collection[str] = ()
    ) -> LoadedModel:
        """What is loaded of these weights, or read now; `beside` must stay for it."""
        if weights not in self._loaded:
            model = read()
            self._make_room(model, beside)
            for module in model.modules():
                module.to(self._device)
            self._loaded[weights] = model
        self._loaded.move_to_end(weights)
        return self._loaded[weights]

    def _make_room(self, model: LoadedModel, beside: Collection[str]) -> None:
        """Let go of the models that were used longest ago until this one fits in."""
        for weights in list(self._loaded):
            if self._budget is None or _bytes([model, *self._loaded.values()]) <= self._budget:
                break
            if weights not in beside:
                print(f"{weights} leaves the memory, for MAX_MODEL_GB", flush=True)
                del self._loaded[weights]
                gc.collect()
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()

    def pipeline(
        self, spec: BaseModelSpec, plan: GenerationPlan, own: Mapping[str, object]
    ) -> DiffusionPipeline:
        """A pipeline for one request, with a scheduler of its own, and its `own` parts."""
        model = self.load(spec)
        scheduler = scheduler_of(spec, plan, model)
        pipeline_class = PIPELINE_CLASSES[spec.architecture, plan.mode]
        return self._build(pipeline_class, model, scheduler, own)

    def refiner_pipeline(
        self, spec: BaseModelSpec, plan: GenerationPlan, own: Mapping[str, object]
    ) -> DiffusionPipeline:
        """The refiner's pipeline for one request; of its `own` parts, those that a refiner has."""
        assert spec.refiner is not None
        pipeline_class = PIPELINE_CLASSES[spec.refiner.architecture, Mode.IMG2IMG]
        model = self.load_refiner(spec)
        own = {name: part for name, part in own.items() if model.parts[name] is not None}
        scheduler = build_scheduler(
            plan.scheduler, plan.schedule_type, model.scheduler_config, plan.seeds
        )
        return self._build(pipeline_class, model, scheduler, own)

    def _build(
        self,
        class_name: str,
        model: LoadedModel,
        scheduler: SchedulerMixin,
        own: Mapping[str, object],
    ) -> DiffusionPipeline:
        pipeline_class = _known_to_be_on(class_name, self._device)
        return pipeline_class(**{**model.parts, **own}, scheduler=on_the_host(scheduler))

    def _read(self, spec: BaseModelSpec, alone: bool) -> LoadedModel:
        import diffusers
        from transformers.utils import logging as transformers_logging

        # Their bars count parts of a model, several at once; ours are for downloads and denoising.
        diffusers.utils.logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        folder = cache.ensure(spec.weights, self._edition)
        settings = SETTINGS[spec.architecture]
        class_name = PIPELINE_CLASSES[spec.architecture, Mode.TXT2IMG]
        contents = {name: _content(folder, name) for name in _SHARED_PARTS}
        shared = {
            name: self._shared[content]
            for name, content in contents.items()
            if not alone and content in self._shared
        }
        borrowed = {name: self._borrow(name, spec, alone) for name in spec.components_from}
        pipeline = getattr(diffusers, class_name).from_pretrained(
            folder,
            **{**shared, **borrowed},
            variant=_variant(folder),
            dtype=self._dtype,
            use_safetensors=True,
            local_files_only=True,
            **settings,
        )
        parts = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
        for name, content in contents.items():
            if content is not None and not alone and name not in borrowed:
                self._shared[content] = parts[name]
        return LoadedModel({**parts, **settings}, _scheduler_config(folder))

    def _borrow(self, name: str, spec: BaseModelSpec, alone: bool) -> nn.Module:
        """A component that is another entry of the catalog, or part of one."""
        import diffusers

        assert name == "vae", f"no model borrows a {name}"
        folder = cache.ensure(spec.components_from[name], self._edition)
        content = _content(folder, name) or _content(folder, "")
        part = None if alone else self._shared.get(content)
        if part is None:
            folder = folder / name if (folder / name).is_dir() else folder
            part = diffusers.AutoencoderKL.from_pretrained(
                folder, variant=_variant(folder), dtype=self._dtype, use_safetensors=True
            )
            if not alone:
                self._shared[content] = part
        return part

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
            "unet": unet,
            "text_encoder": None,
            "tokenizer": None,
            **{name: index[name] for name in settings},
        }
        return LoadedModel(parts, _scheduler_config(folder))

    def _read_controlnet(self, weights: str) -> LoadedModel:
        import diffusers

        (described,) = cache.ensure(weights, self._edition).rglob("config.json")
        folder = described.parent
        config = json.loads(described.read_text(encoding="utf-8"))
        # Some were published as pickles only, of which diffusers reads nothing but the weights.
        safe = any(folder.glob("*.safetensors"))
        net = getattr(diffusers, config["_class_name"]).from_pretrained(
            folder, variant=_variant(folder), dtype=self._dtype, use_safetensors=safe
        )
        return LoadedModel({"controlnet": net.eval()}, {})


def _scheduler_config(folder: Path) -> Mapping[str, object]:
    config: dict[str, object] = json.loads(
        (folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8")
    )
    return config


def _content(folder: Path, part: str) -> Hashable | None:
    """Equal for parts that are equal: hashes of its weights' files, and what its config says.

    None where the folder has no such part.
    """
    weights = cache.digests(folder, part)
    if not weights:
        return None
    config = json.loads((folder / part / "config.json").read_text(encoding="utf-8"))
    told = {key: value for key, value in config.items() if not key.startswith("_")}
    for irrelevant in ("architectures", "dtype", "torch_dtype", "transformers_version"):
        told.pop(irrelevant, None)
    return weights, json.dumps(told, sort_keys=True)


def _variant(folder: Path) -> str | None:
    return "fp16" if any(folder.rglob("*.fp16.safetensors")) else None


def scheduler_of(spec: BaseModelSpec, plan: GenerationPlan, model: LoadedModel) -> SchedulerMixin:
    """A new scheduler for the plan, from the config that the model came with."""
    config = {**model.scheduler_config, **spec.scheduler_config}
    return build_scheduler(plan.scheduler, plan.schedule_type, config, plan.seeds)


@functools.cache
def _known_to_be_on(class_name: str, device: torch.device) -> type[DiffusionPipeline]:
    """diffusers' pipeline class, told where its parts are.

    By itself it looks at each of their modules at each call, in case one is offloaded: SDXL has
    2,700, which takes longer than a single step on a GPU.
    """
    import diffusers

    stock: type[DiffusionPipeline] = getattr(diffusers, class_name)
    return type(class_name, (stock,), {"_execution_device": device})
