"""The base models: what each is made of, its defaults and its limits."""

from dataclasses import dataclass, replace
from enum import StrEnum

from weights.catalog import Edition


class Family(StrEnum):
    """Checkpoints of one family share an architecture, so pipelines are chosen by family."""

    SDXL = "sdxl"
    SDXL_REFINER = "sdxl-refiner"


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
    family: Family
    weights: str  # catalog entry: a folder in the hub's layout
    vae_weights: str | None  # catalog entry of a VAE that replaces the one in `weights`
    refiner: RefinerSpec | None
    native_size: int
    min_side: int
    max_side: int
    max_pixels: int
    max_hires_pixels: int  # of a second pass, which starts from a picture of the first
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    hires_strength: float  # of a second pass: as much as leaves what the first has composed


SDXL = BaseModelSpec(
    name="sdxl",
    family=Family.SDXL,
    weights="sdxl-base",
    # SDXL's own VAE overflows in fp16 (black pictures); this one is the same model, rescaled.
    vae_weights="sdxl-vae-fp16-fix",
    refiner=RefinerSpec("sdxl-refiner", Family.SDXL_REFINER, weights="sdxl-refiner"),
    native_size=1024,
    min_side=256,
    max_side=2048,
    max_pixels=1536 * 1536,  # beyond about twice its training area SDXL repeats the subject
    max_hires_pixels=2048 * 2048,
    scheduler="K_EULER",
    num_inference_steps=50,
    guidance_scale=7.5,
    hires_strength=0.35,
)

MINIATURE_SDXL = replace(
    SDXL,
    vae_weights=None,
    native_size=128,
    min_side=64,
    max_side=256,
    max_pixels=192 * 192,
    max_hires_pixels=256 * 256,
    num_inference_steps=20,
    hires_strength=0.1,  # its noise levels rise faster than SDXL's
)

BASE_MODELS: dict[Edition, dict[str, BaseModelSpec]] = {
    Edition.FULL: {"sdxl": SDXL},
    Edition.MINIATURE: {"sdxl": MINIATURE_SDXL},
}
DEFAULT_BASE_MODEL = "sdxl"
