"""Metadata that records how an image was made, as other programs read it from the file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from generation.adapters import Adapter
from generation.base_models import BaseModelSpec
from generation.options import Upscaler
from generation.plan import GenerationPlan, Mode
from generation.schedulers import A1111_SCHEDULE_NAMES, SCHEDULERS

PROGRAM = "cog-stable-diffusion"
MAX_PROMPT_CHARACTERS = 10_000  # of each prompt, in UTF-16: a JPEG has room for 32,000 in all
HASH_DIGITS = 10  # of a sha256, as A1111 and Civitai name files

_A1111_UPSCALERS = {Upscaler.SWINIR: "SwinIR 4x", Upscaler.REAL_ESRGAN: "R-ESRGAN 4x+"}


def describe(
    plan: GenerationPlan, spec: BaseModelSpec, adapters: Sequence[Adapter], seed: int
) -> str:
    """Return A1111's "parameters" of one image: the prompts, then settings separated by commas.

    AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py: parse_generation_parameters;
    Civitai and ComfyUI read the same. "Inputs" is this project's: the request's inputs as JSON.
    """
    sampler = f"{SCHEDULERS[plan.scheduler].a1111} {A1111_SCHEDULE_NAMES[plan.schedule_type]}"
    settings: dict[str, object] = {
        "Steps": plan.num_inference_steps,
        "Sampler": sampler.strip(),
        "CFG scale": f"{plan.guidance_scale:g}",
        "Seed": seed,
        "Size": f"{plan.width}x{plan.height}",
        "Model": spec.name,
    }
    if plan.clip_skip > 1:
        settings["Clip skip"] = plan.clip_skip
    if plan.mode is not Mode.TXT2IMG:
        settings["Denoising strength"] = f"{plan.strength:g}"
    if plan.refine is not None and spec.refiner is not None:
        settings["Refiner"] = spec.refiner.name
        settings["Refiner switch at"] = f"{plan.refine.high_noise_frac:g}"
    if plan.hires is not None:
        if plan.mode is Mode.TXT2IMG:  # there, it is that of the hires stage
            settings["Denoising strength"] = f"{plan.hires.strength:g}"
        settings["Hires resize"] = f"{plan.hires.width}x{plan.hires.height}"
        settings["Hires upscaler"] = _A1111_UPSCALERS[plan.upscaler]
    for k, control in enumerate(plan.controlnets):
        values = {
            "Module": control.annotator or "none",
            "Model": control.weights,
            "Weight": f"{control.conditioning_scale:g}",
            "Guidance Start": f"{control.start:g}",
            "Guidance End": f"{control.end:g}",
        }
        settings[f"ControlNet {k}"] = ", ".join(
            f"{name}: {value}" for name, value in values.items()
        )
    if plan.upscale > 1:
        settings["Postprocess upscale by"] = plan.upscale
        settings["Postprocess upscaler"] = _A1111_UPSCALERS[plan.upscaler]
    hashes = [
        f"{a.weights.digest[:HASH_DIGITS]}: {a.scale:g}" for a in adapters if a.weights.digest
    ]
    if hashes:
        settings["Lora hashes"] = ", ".join(hashes)
    settings["Version"] = PROGRAM
    settings["Inputs"] = json.dumps(plan.output.parameters)
    lines = [_shortened(plan.prompt)]
    if plan.negative_prompt:
        lines.append(f"Negative prompt: {_shortened(plan.negative_prompt)}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def _shortened(text: str) -> str:
    """Replace what UTF-16 cannot hold, and cut what exceeds the room in a file."""
    text = re.sub("[\ud800-\udfff\0]", "\N{REPLACEMENT CHARACTER}", text)
    units = text.encode("utf-16-be")
    if len(units) <= 2 * MAX_PROMPT_CHARACTERS:
        return text
    return units[: 2 * MAX_PROMPT_CHARACTERS].decode("utf-16-be", "ignore") + "…"


def _quoted(text: str) -> str:
    """Quote as A1111 does: JSON where a comma, colon or line break would end the value."""
    return json.dumps(text) if re.search(r"[,:\n]", text) else text
