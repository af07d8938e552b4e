"""The boundary to Cog's predictions: the signature becomes a request, the result becomes paths.

Cog reads this file without running it, and silently drops what it cannot read: literals only, one
plain string per description (`script/schema --check` holds this).
"""

import time
import traceback
from typing import List, Optional  # noqa: UP035  the spelling that every version of Cog's parser reads

from cog import BasePredictor, Input, Path

from generation.outputs import OutputFolders
from generation.request import GenerationRequest

# script/sync: generation.schedulers.SCHEDULERS
SCHEDULER_CHOICES = [
    "DDIM",
    "DPMSolverMultistep",
    "HeunDiscrete",
    "KarrasDPM",
    "K_EULER_ANCESTRAL",
    "K_EULER",
    "PNDM",
]


class Predictor(BasePredictor):
    def setup(self) -> None:
        """Choose edition and device, load the models; a failure prints its own traceback."""
        try:
            from generation.engine import Engine
            from weights.edition import resolve_device, resolve_edition

            device = resolve_device()
            edition = resolve_edition(cuda_available=device == "cuda")
            self.folders = OutputFolders()
            self.engine = Engine(edition, device)
            self.engine.load()
        except Exception:
            traceback.print_exc()  # Cog's server reports the message alone, and having heard it
            time.sleep(1)  # drops the lines that are still on their way to its log
            raise

    def predict(
        self,
        prompt: str = Input(
            default="An astronaut riding a rainbow unicorn", description="What the picture shows"
        ),
        negative_prompt: str = Input(
            default="", description="What the picture must not show; works with guidance only"
        ),
        width: Optional[int] = Input(
            default=None,
            description="Width in pixels, a multiple of 8; empty for the native size of the model",
            ge=8,
            le=8192,
        ),
        height: Optional[int] = Input(
            default=None,
            description="Height in pixels, a multiple of 8; empty for the native size of the model",
            ge=8,
            le=8192,
        ),
        num_outputs: int = Input(
            default=1,
            description="Number of pictures; picture k has the seed of the first plus k",
            ge=1,
            le=4,
        ),
        scheduler: Optional[str] = Input(
            default=None,
            description="How noise is taken away; empty for the default of the model",
            choices=SCHEDULER_CHOICES,
        ),
        num_inference_steps: Optional[int] = Input(
            default=None,
            description="Number of denoising steps; empty for the default of the model",
            ge=1,
            le=500,
        ),
        guidance_scale: Optional[float] = Input(
            default=None,
            description="How closely to follow the prompt; up to 1 skips the guidance pass",
            ge=0,
            le=50,
        ),
        seed: Optional[int] = Input(
            default=None,
            description="Same seed, same picture; empty for a random one, which the log names",
            ge=0,
            le=4294967295,
        ),
    ) -> List[Path]:
        """Make pictures from a prompt."""
        request = GenerationRequest(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=_whole(width),
            height=_whole(height),
            num_outputs=int(num_outputs),
            scheduler=scheduler,
            num_inference_steps=_whole(num_inference_steps),
            guidance_scale=guidance_scale,
            seed=_whole(seed),
        )
        result = self.engine.generate(request, self.folders.fresh())
        self.record_metric("seed", result.plan.seeds[0])
        self.record_metric("num_inference_steps", result.plan.num_inference_steps)
        self.record_metric("peak_memory_bytes", result.peak_memory)
        for stage, seconds in result.seconds.items():
            self.record_metric(f"seconds.{stage}", seconds)
        return [Path(file) for file in result.files]


def _whole(value: Optional[float]) -> Optional[int]:
    """JSON has one number type: 2.0 passes the schema's "integer" and arrives as a float."""
    return None if value is None else int(value)
