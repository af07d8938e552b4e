"""The registry of base models: parts, defaults and limits. To add one, add an entry."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from weights.catalog import Edition


class Architecture(StrEnum):
    """The classes that a checkpoint's networks have."""

    SDXL = "sdxl"
    SDXL_REFINER = "sdxl-refiner"
    SD = "sd"  # Stable Diffusion 1 and 2: one text encoder


class BaseModel(StrEnum):
    """The training that a checkpoint comes from; a ControlNet or LoRA of it fits all that do."""

    SDXL = "SDXL"
    SD15 = "SD 1.5"
    SD21 = "SD 2.1"


class GuidanceMode(StrEnum):
    """How a model takes its guidance scale."""

    CLASSIFIER_FREE = "classifier-free"  # a second, unconditional prediction (arXiv:2207.12598)
    EMBEDDED = "embedded"  # an embedding of the scale is an input of the UNet (arXiv:2210.03142)
    NONE = "none"  # it was distilled to need no guidance


@dataclass(frozen=True)
class RefinerSpec:
    """A model for the last, least noisy steps of another, whose VAE and encoder it uses."""

    name: str
    architecture: Architecture
    weights: str  # catalog entry: UNet and scheduler config in the hub's layout


@dataclass(frozen=True)
class BaseModelSpec:
    """One base model. Sides are in pixels; defaults apply where the request has None."""

    name: str
    description: str  # for those who choose, in the README
    architecture: Architecture
    base_model: BaseModel
    weights: str  # catalog entry: a folder in the hub's layout
    native_size: int
    max_side: int
    max_pixels: int
    max_hires_pixels: int  # of the hires stage, which starts from a composed image
    scheduler: str
    hires_strength: float  # as much as keeps the composition
    edition: Edition = Edition.FULL
    min_side: int = 256
    # Components from elsewhere: name → catalog entry, whose folder has it under that name or is it.
    components_from: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None  # catalog entry of a LoRA that makes the weights this model
    refiner: RefinerSpec | None = None
    schedulers: tuple[str, ...] = ()  # all that it works with; (): any
    scheduler_config: Mapping[str, object] = field(default_factory=dict)  # beside the model's own
    num_inference_steps: int = 50
    steps: tuple[int, int] | None = None  # fewest and most; None: no limits of the model
    guidance: GuidanceMode = GuidanceMode.CLASSIFIER_FREE
    guidance_scale: float = 7.5
    guidance_scales: tuple[float, float] | None = None  # lowest and highest; None: any
    max_clip_skip: int = 1  # layers of the text encoder, counted from its end
    max_num_outputs: int = 4

    @property
    def catalog_entries(self) -> tuple[str, ...]:
        """The catalog entries of the model without its refiner."""
        adapters = (self.adapter,) if self.adapter else ()
        return (self.weights, *adapters, *self.components_from.values())


SAFETY_ENTRIES = ("safety-checker", "nsfw-detection")  # which check every model's images

MAX_OUTPUTS_DISTILLED = 16  # a few steps of 16 images take as long as many of two


def _turbo(base: BaseModelSpec, name: str, description: str) -> BaseModelSpec:
    """Return a model distilled to one step (arXiv:2311.17042), with its authors' settings."""
    return replace(
        base,
        name=name,
        description=description,
        weights=name,
        refiner=None,
        native_size=512,
        max_side=1024,
        max_pixels=768 * 768,
        max_hires_pixels=1024 * 1024,
        hires_strength=0.5,
        scheduler="K_EULER_ANCESTRAL",
        scheduler_config={"timestep_spacing": "trailing"},
        num_inference_steps=1,
        steps=(1, 4),
        guidance=GuidanceMode.NONE,
        guidance_scale=0.0,
        guidance_scales=(0.0, 1.0),
        max_num_outputs=MAX_OUTPUTS_DISTILLED,
    )


def _lcm(base: BaseModelSpec, name: str, description: str) -> BaseModelSpec:
    """Return a latent consistency model (arXiv:2310.04378)."""
    return replace(
        base,
        name=name,
        description=description,
        refiner=None,
        hires_strength=0.5,
        scheduler="LCM",
        schedulers=("LCM", "TCD"),
        num_inference_steps=4,
        steps=(2, 8),
        guidance_scale=1.0,
        guidance_scales=(1.0, 2.0),
        max_num_outputs=MAX_OUTPUTS_DISTILLED,
    )


SDXL = BaseModelSpec(
    name="sdxl",
    description="best quality; has a refiner",
    architecture=Architecture.SDXL,
    base_model=BaseModel.SDXL,
    weights="sdxl-base",
    refiner=RefinerSpec("sdxl-refiner", Architecture.SDXL_REFINER, weights="sdxl-refiner"),
    native_size=1024,
    max_side=2048,
    max_pixels=1536 * 1536,  # beyond about twice its training area SDXL repeats the subject
    max_hires_pixels=2048 * 2048,
    scheduler="K_EULER",
    hires_strength=0.35,
    # SDXL's VAE overflows in fp16 (black images); this one is the same model, rescaled.
    components_from={"vae": "sdxl-vae-fp16-fix"},
)

SDXL_TURBO = _turbo(SDXL, "sdxl-turbo", "images in one step, for previews and experiments")

SDXL_LCM = replace(
    _lcm(SDXL, "sdxl-lcm", "SDXL in a few steps; shares its weights"),
    adapter="lcm-lora-sdxl",
)

SD15 = BaseModelSpec(
    name="sd15",
    description="largest choice of LoRAs; low memory use",
    architecture=Architecture.SD,
    base_model=BaseModel.SD15,
    weights="sd15",
    native_size=512,
    max_side=1024,
    max_pixels=768 * 768,
    max_hires_pixels=1024 * 1024,
    scheduler="K_EULER",
    hires_strength=0.5,
    max_clip_skip=11,
)

SD15_LCM = replace(
    _lcm(SD15, "sd15-lcm", "SD 1.5 in a few steps; shares its weights"),
    adapter="lcm-lora-sd15",
)

LCM_DREAMSHAPER = replace(
    _lcm(SD15, "lcm-dreamshaper", "painted and photographic styles in a few steps"),
    weights="lcm-dreamshaper",
    native_size=768,
    max_pixels=1024 * 1024,
    guidance=GuidanceMode.EMBEDDED,
    guidance_scale=8.0,
    guidance_scales=(1.0, 15.0),  # it was distilled at 3 to 15 (arXiv:2310.04378, section 5.1)
)

SD21 = replace(
    SD15,
    name="sd21",
    description="768 x 768 pixels with low memory use",
    base_model=BaseModel.SD21,
    weights="sd21",
    native_size=768,
    max_side=1536,
    max_pixels=1024 * 1024,
    max_hires_pixels=1536 * 1536,
    max_clip_skip=22,
)

SD_TURBO = _turbo(SD21, "sd-turbo", "smallest; images in one step")

_MODELS = (SDXL, SDXL_TURBO, SDXL_LCM, SD15, SD15_LCM, LCM_DREAMSHAPER, SD21, SD_TURBO)
# The miniature Turbo models are LoRAs of the models that they were distilled from.
_MINIATURE_WEIGHTS = {"sdxl-turbo": "sdxl-base", "sd-turbo": "sd21"}


def _miniature(spec: BaseModelSpec) -> BaseModelSpec:
    """Return the embedded model for `spec`; all of them generate 128 x 128 pixels."""
    weights = _MINIATURE_WEIGHTS.get(spec.weights, spec.weights)
    return replace(
        spec,
        edition=Edition.MINIATURE,
        weights=weights,
        adapter=spec.weights if weights != spec.weights else spec.adapter,
        native_size=128,
        min_side=64,
        max_side=256,
        max_pixels=192 * 192,
        max_hires_pixels=256 * 256,
        num_inference_steps=spec.num_inference_steps if spec.steps else 20,
        # Noise levels rise faster than SDXL's; of a few steps one has to fit in.
        hires_strength=spec.hires_strength if spec.steps else 0.1,
        components_from={} if spec.architecture is Architecture.SDXL else {"vae": "sdxl-base"},
        max_clip_skip=min(spec.max_clip_skip, 2),
    )


BASE_MODELS: dict[Edition, dict[str, BaseModelSpec]] = {
    Edition.FULL: {spec.name: spec for spec in _MODELS},
    Edition.MINIATURE: {spec.name: _miniature(spec) for spec in _MODELS},
}
MINIATURE_SDXL = BASE_MODELS[Edition.MINIATURE]["sdxl"]
DEFAULT_BASE_MODEL = "sdxl"
BASE_MODEL_NAMES = tuple(BASE_MODELS[Edition.FULL])
