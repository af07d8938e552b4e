"""The base models: what each is made of, its defaults and its limits. To add one, add an entry."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from weights.catalog import Edition


class Family(StrEnum):
    """Checkpoints of one family share an architecture, so pipelines are chosen by family."""

    SDXL = "sdxl"
    SDXL_REFINER = "sdxl-refiner"
    SD = "sd"  # Stable Diffusion 1 and 2: one text encoder


class Lineage(StrEnum):
    """Models of one lineage come from one training, so a ControlNet of it fits all of them."""

    SDXL = "SDXL"
    SD15 = "SD 1.5"
    SD21 = "SD 2.1"


class Guidance(StrEnum):
    """How a model follows the prompt more closely than it would by itself."""

    SECOND_PASS = "second pass"  # without the prompt, or with a negative one (arXiv:2207.12598)
    INPUT = "input"  # the UNet is told the scale (arXiv:2210.03142)
    NONE = "none"  # it was distilled to need none


@dataclass(frozen=True)
class RefinerSpec:
    """A model for the last, least noisy steps of another; it borrows that one's VAE and encoder."""

    name: str
    family: Family
    weights: str  # catalog entry: UNet and scheduler config in the hub's layout


@dataclass(frozen=True)
class BaseModelSpec:
    """One base model. Sides are in pixels; defaults apply where the request leaves a value open."""

    name: str
    good_for: str  # to people who choose
    family: Family
    lineage: Lineage
    weights: str  # catalog entry: a folder in the hub's layout
    native_size: int
    max_side: int
    max_pixels: int
    max_hires_pixels: int  # of a second pass, which starts from a picture of the first
    scheduler: str
    hires_strength: float  # of a second pass: as much as leaves what the first has composed
    edition: Edition = Edition.FULL
    min_side: int = 256
    # Parts that come from elsewhere: component → catalog entry, whose folder has it under that name
    # or is it.
    borrowed: Mapping[str, str] = field(default_factory=dict)
    adapter: str | None = None  # catalog entry of a LoRA that makes the weights this model
    refiner: RefinerSpec | None = None
    schedulers: tuple[str, ...] = ()  # all that it works with; (): any
    scheduler_config: Mapping[str, object] = field(default_factory=dict)  # beside the model's own
    num_inference_steps: int = 50
    steps: tuple[int, int] | None = None  # fewest and most; None: as many as anybody may ask for
    guidance: Guidance = Guidance.SECOND_PASS
    guidance_scale: float = 7.5
    guidance_scales: tuple[float, float] | None = None  # lowest and highest; None: any
    max_clip_skip: int = 1  # layers of the text encoder, counted from its end, that can be read
    max_num_outputs: int = 4

    @property
    def entries(self) -> tuple[str, ...]:
        """The catalog entries that make the model, but for its refiner."""
        own = (self.weights, self.adapter) if self.adapter else (self.weights,)
        return (*own, *self.borrowed.values())


SAFETY_ENTRIES = ("safety-checker", "nsfw-detection")  # what looks at every model's pictures

FEW_STEPS_OUTPUTS = 16  # a few steps of sixteen pictures take no longer than many of two


def _turbo(base: BaseModelSpec, name: str, good_for: str) -> BaseModelSpec:
    """Distilled to one step (arXiv:2311.17042), with its authors' settings."""
    return replace(
        base,
        name=name,
        good_for=good_for,
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
        guidance=Guidance.NONE,
        guidance_scale=0.0,
        guidance_scales=(0.0, 1.0),
        max_num_outputs=FEW_STEPS_OUTPUTS,
    )


def _lcm(base: BaseModelSpec, name: str, good_for: str) -> BaseModelSpec:
    """A latent consistency model (arXiv:2310.04378)."""
    return replace(
        base,
        name=name,
        good_for=good_for,
        refiner=None,
        hires_strength=0.5,
        scheduler="LCM",
        schedulers=("LCM", "TCD"),
        num_inference_steps=4,
        steps=(2, 8),
        guidance_scale=1.0,
        guidance_scales=(1.0, 2.0),
        max_num_outputs=FEW_STEPS_OUTPUTS,
    )


SDXL = BaseModelSpec(
    name="sdxl",
    good_for="the best pictures; with a refiner",
    family=Family.SDXL,
    lineage=Lineage.SDXL,
    weights="sdxl-base",
    refiner=RefinerSpec("sdxl-refiner", Family.SDXL_REFINER, weights="sdxl-refiner"),
    native_size=1024,
    max_side=2048,
    max_pixels=1536 * 1536,  # beyond about twice its training area SDXL repeats the subject
    max_hires_pixels=2048 * 2048,
    scheduler="K_EULER",
    hires_strength=0.35,
    # SDXL's own VAE overflows in fp16 (black pictures); this one is the same model, rescaled.
    borrowed={"vae": "sdxl-vae-fp16-fix"},
)

SDXL_TURBO = _turbo(SDXL, "sdxl-turbo", "a picture in one step, for looking and trying")

SDXL_LCM = replace(
    _lcm(SDXL, "sdxl-lcm", "SDXL in a few steps; shares its weights"),
    adapter="lcm-lora-sdxl",
)

SD15 = BaseModelSpec(
    name="sd15",
    good_for="the largest choice of LoRAs; little memory",
    family=Family.SD,
    lineage=Lineage.SD15,
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
    guidance=Guidance.INPUT,
    guidance_scale=8.0,
    guidance_scales=(1.0, 15.0),  # it was distilled at 3 to 15 (arXiv:2310.04378, section 5.1)
)

SD21 = replace(
    SD15,
    name="sd21",
    good_for="768 x 768 pixels with little memory",
    lineage=Lineage.SD21,
    weights="sd21",
    native_size=768,
    max_side=1536,
    max_pixels=1024 * 1024,
    max_hires_pixels=1536 * 1536,
    max_clip_skip=22,
)

SD_TURBO = _turbo(SD21, "sd-turbo", "the smallest: a picture in one step")

_MODELS = (SDXL, SDXL_TURBO, SDXL_LCM, SD15, SD15_LCM, LCM_DREAMSHAPER, SD21, SD_TURBO)
# The miniature Turbo models are LoRAs of the models that they were distilled from.
_MINIATURE_WEIGHTS = {"sdxl-turbo": "sdxl-base", "sd-turbo": "sd21"}


def _miniature(spec: BaseModelSpec) -> BaseModelSpec:
    """The embedded model that stands for `spec`; all of them draw 128 x 128 pixels."""
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
        borrowed={} if spec.family is Family.SDXL else {"vae": "sdxl-base"},
        max_clip_skip=min(spec.max_clip_skip, 2),
    )


BASE_MODELS: dict[Edition, dict[str, BaseModelSpec]] = {
    Edition.FULL: {spec.name: spec for spec in _MODELS},
    Edition.MINIATURE: {spec.name: _miniature(spec) for spec in _MODELS},
}
MINIATURE_SDXL = BASE_MODELS[Edition.MINIATURE]["sdxl"]
DEFAULT_BASE_MODEL = "sdxl"
NAMES = tuple(BASE_MODELS[Edition.FULL])
