"""Metadata that records how an image was made, as other programs read it from the file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields

from generation.adapters import Adapter
from generation.base_models import BaseModelSpec
from generation.controlnets import NO_CONTROL
from generation.options import GenerationRequest, Refine, Upscale, Upscaler
from generation.plan import GenerationPlan, Mode
from generation.schedulers import A1111_SCHEDULE_NAMES, SCHEDULERS
from weights.user.parse import shown

PROGRAM = "cog-stable-diffusion"
MAX_PROMPT_CHARACTERS = 10_000  # of each prompt, in UTF-16: a JPEG has room for 32,000 in all
HASH_DIGITS = 10  # of a sha256, as A1111 and Civitai name files

_A1111_UPSCALERS = {Upscaler.SWINIR: "SwinIR 4x", Upscaler.REAL_ESRGAN: "R-ESRGAN 4x+"}

# Never written into files: secrets, the client's files, and what other fields of the metadata say.
_EXCLUDED_FROM_METADATA = {
    *("hf_api_token", "civitai_api_token", "image", "mask"),
    *("prompt", "negative_prompt", "seed", "num_outputs", "outpaint", "controls"),
    *("output_format", "output_quality", "embed_parameters"),
}


def describe(
    plan: GenerationPlan, spec: BaseModelSpec, adapters: Sequence[Adapter], number: int
) -> str:
    """Return A1111's "parameters" of image `number`: prompts, then settings with commas.

    AUTOMATIC1111/stable-diffusion-webui, modules/infotext_utils.py: parse_generation_parameters;
    Civitai and ComfyUI read the same. "Inputs" is this project's: the request's inputs as JSON.
    """
    request = plan.request
    sampler = f"{SCHEDULERS[plan.scheduler].a1111} {A1111_SCHEDULE_NAMES[plan.schedule_type]}"
    settings: dict[str, object] = {
        "Steps": plan.num_inference_steps,
        "Sampler": sampler.strip(),
        "CFG scale": f"{plan.guidance_scale:g}",
        "Seed": plan.seeds[number],
        "Size": f"{plan.width}x{plan.height}",
        "Model": spec.name,
    }
    if request.clip_skip > 1:
        settings["Clip skip"] = request.clip_skip
    if plan.mode is not Mode.TXT2IMG:
        settings["Denoising strength"] = f"{plan.strength:g}"
    if request.refine != Refine.NO_REFINER and spec.refiner is not None:
        settings["Refiner"] = spec.refiner.name
        settings["Refiner switch at"] = f"{request.high_noise_frac:g}"
    if request.hires_fix != 1:
        hires = plan.stages[-1]
        if plan.mode is Mode.TXT2IMG:  # there, it is that of the hires stage
            settings["Denoising strength"] = f"{hires.strength:g}"
        settings["Hires resize"] = f"{hires.size[0]}x{hires.size[1]}"
        settings["Hires upscaler"] = _A1111_UPSCALERS[Upscaler(request.upscaler)]
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
    if request.upscale != Upscale.OFF:
        settings["Postprocess upscale by"] = request.upscale
        settings["Postprocess upscaler"] = _A1111_UPSCALERS[Upscaler(request.upscaler)]
    hashes = [
        f"{a.weights.digest[:HASH_DIGITS]}: {a.scale:g}" for a in adapters if a.weights.digest
    ]
    if hashes:
        settings["Lora hashes"] = ", ".join(hashes)
    settings["Version"] = PROGRAM
    settings["Inputs"] = json.dumps(recorded_inputs(request))
    lines = [_shortened(request.prompt)]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {_shortened(request.negative_prompt)}")
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


def recorded_inputs(request: GenerationRequest) -> dict[str, object]:
    """Return the inputs to record beside the prompts; addresses without queries and content."""
    recorded: dict[str, object] = {
        entry.name: value
        for entry in fields(request)
        if entry.name not in _EXCLUDED_FROM_METADATA
        and (value := getattr(request, entry.name)) not in (None, "", ())
    }
    recorded |= {f"outpaint_{side}": margin for side, margin in vars(request.outpaint).items()}
    for k, control in enumerate(request.controls, 1):
        if control.control_type != NO_CONTROL:
            recorded[f"controlnet_{k}"] = control.control_type
            for name in ("conditioning_scale", "start", "end", "is_map"):
                recorded[f"controlnet_{k}_{name}"] = getattr(control, name)
    if request.replicate_weights:
        recorded["replicate_weights"] = shown(request.replicate_weights.strip())
    if request.loras:
        recorded["loras"] = [shown(reference) for reference in request.loras]
        recorded["lora_scales"] = list(request.lora_scales)
    return recorded
