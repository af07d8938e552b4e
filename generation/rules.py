"""The rules of a request beyond single ranges: what goes together, and what the model can do."""

from generation.base_models import BaseModelSpec, GuidanceMode
from generation.controlnets import (
    CONTROLNETS,
    NO_CONTROL,
    ControlNetPlan,
    ControlRequest,
    control_types_of,
)
from generation.errors import InvalidRequest
from generation.options import GenerationRequest, Refine
from generation.schedulers import SCHEDULERS
from inputs import check
from preprocess.annotators import ANNOTATORS
from weights.catalog import CATALOG

MAX_LORAS = 8


def check_request(request: GenerationRequest, spec: BaseModelSpec) -> None:
    """Check every rule that takes no image sizes. Raises InvalidRequest."""
    check(request, InvalidRequest)
    if request.guidance_start >= request.guidance_end:
        raise InvalidRequest(
            f"guidance_start is {request.guidance_start:g} and guidance_end"
            f" {request.guidance_end:g}: guidance would never act; start before the end, or use"
            " guidance_scale 1 to turn it off"
        )
    count, scales = len(request.loras), request.lora_scales
    if count > MAX_LORAS:
        raise InvalidRequest(f"loras names {count} files; at most {MAX_LORAS} can be combined")
    if scales and len(scales) != count:
        raise InvalidRequest(
            f"lora_scales has {len(scales)} entries and loras {count}; give one for each, or none"
        )
    _check_limits(request, spec)
    _check_guidance(request, spec)
    _check_scheduler(request, spec)
    if request.refine != Refine.NO_REFINER and spec.refiner is None:
        raise InvalidRequest(
            f"refine is {request.refine}, but {spec.name} has no refiner; use"
            f" refine={Refine.NO_REFINER}"
        )


def _check_limits(request: GenerationRequest, spec: BaseModelSpec) -> None:
    if request.num_outputs > spec.max_num_outputs:
        raise InvalidRequest(
            f"num_outputs is {request.num_outputs}, and {spec.name} generates at most"
            f" {spec.max_num_outputs} images at once; ask for fewer, or use a distilled model"
            " (Turbo or LCM)"
        )
    steps = request.num_inference_steps
    if spec.steps and steps is not None and not spec.steps[0] <= steps <= spec.steps[1]:
        raise InvalidRequest(
            f"num_inference_steps is {steps}; {spec.name} was distilled for {spec.steps[0]} to"
            f" {spec.steps[1]} steps: use one of these, or leave it empty for"
            f" {spec.num_inference_steps}"
        )
    if request.clip_skip > spec.max_clip_skip:
        possible = f"from 1 to {spec.max_clip_skip}" if spec.max_clip_skip > 1 else "1"
        raise InvalidRequest(
            f"clip_skip is {request.clip_skip}; with {spec.name} it must be {possible}"
        )


def _check_guidance(request: GenerationRequest, spec: BaseModelSpec) -> None:
    name, scale = spec.name, request.guidance_scale
    if spec.guidance_scales and scale is not None:
        low, high = spec.guidance_scales
        if not low <= scale <= high:
            why = {
                GuidanceMode.CLASSIFIER_FREE: "needs little guidance",
                GuidanceMode.EMBEDDED: f"supports guidance from {low:g} to {high:g}",
                GuidanceMode.NONE: "works without guidance",
            }[spec.guidance]
            raise InvalidRequest(
                f"guidance_scale is {scale:g}, and {name} {why}; use {low:g} to {high:g}, or leave"
                f" it empty for {spec.guidance_scale:g}"
            )
    if spec.guidance is not GuidanceMode.CLASSIFIER_FREE and request.negative_prompt.strip():
        raise InvalidRequest(
            f"negative_prompt is {request.negative_prompt[:80]!r}, and {name} does not use"
            " classifier-free guidance, so it would have no effect; leave it empty or choose"
            " another model"
        )


def _check_scheduler(request: GenerationRequest, spec: BaseModelSpec) -> None:
    if spec.schedulers and request.scheduler not in (None, *spec.schedulers):
        raise InvalidRequest(
            f"scheduler is {request.scheduler}, and {spec.name} works with"
            f" {' and '.join(spec.schedulers)} only; use one of them, or leave it empty"
        )
    name = request.scheduler or spec.scheduler
    scheduler = SCHEDULERS[name]
    if request.schedule_type not in scheduler.schedule_types:
        raise InvalidRequest(
            f"schedule_type is {request.schedule_type}, and scheduler {name} has only"
            f" {', '.join(scheduler.schedule_types)}; use one of those, or another scheduler"
        )
    steps = request.num_inference_steps or spec.num_inference_steps
    named = {"num_inference_steps": steps}
    if request.refine != Refine.NO_REFINER:
        named["refine_steps"] = request.refine_steps or steps
    for input_name, count in named.items():
        if scheduler.max_steps is not None and count > scheduler.max_steps:
            raise InvalidRequest(
                f"{input_name} is {count}, and scheduler {name} has at most {scheduler.max_steps};"
                " use fewer, or another scheduler"
            )


def resolve_controlnets(
    request: GenerationRequest, spec: BaseModelSpec
) -> tuple[ControlNetPlan, ...]:
    """Check every rule about ControlNets; return those whose maps are needed, in order.

    Raises:
        InvalidRequest: naming the value, the rule and the remedy.
    """
    plans = []
    for n, control in enumerate(request.controls, 1):
        name = f"controlnet_{n}"
        if control != ControlRequest():
            _check_control(name, control)
        if control.control_type != NO_CONTROL:
            plans.append(_control_plan(name, control, spec))
    low, high = request.canny_low_threshold, request.canny_high_threshold
    if low >= high:
        raise InvalidRequest(
            f"canny_low_threshold is {low} and canny_high_threshold {high}; the first must be below"
            " the second"
        )
    for name in ("return_control_maps", "control_maps_only"):
        if getattr(request, name) and not plans:
            raise InvalidRequest(
                f"{name} is on, but there is no ControlNet whose map could be returned; choose"
                " controlnet_1 and send controlnet_1_image"
            )
    if plans and not request.returns_control_maps:
        plans = [plan for plan in plans if plan.has_effect]
    return tuple(plans)


def _check_control(name: str, request: ControlRequest) -> None:
    if request.start >= request.end:
        raise InvalidRequest(
            f"{name}_start is {request.start:g} and {name}_end {request.end:g}; a control ends"
            " after it starts: use a start below the end, such as 0 and 1 for all steps"
        )
    if request.control_type == NO_CONTROL and request.image is not None:
        raise InvalidRequest(
            f"{name}_image is given, but {name} is {NO_CONTROL!r}; choose its control type:"
            f" one of {', '.join(CONTROLNETS)}"
        )
    if request.control_type != NO_CONTROL and request.image is None:
        raise InvalidRequest(
            f"{name} is {request.control_type}, but {name}_image is missing; send the image that"
            f" it is taken from, or a ready-made map and {name}_is_map=true"
        )


def _control_plan(name: str, request: ControlRequest, model: BaseModelSpec) -> ControlNetPlan:
    spec, entries = CONTROLNETS[request.control_type], CATALOG[model.edition]
    weights = spec.weights.get(model.base_model)
    if weights is None or weights not in entries:
        possible = ", ".join(control_types_of(model))
        why = "exists" if weights is None else f"is among the {model.edition} weights"
        raise InvalidRequest(
            f"{name} is {spec.name}, and no ControlNet of that type {why} for {model.name}"
            f" ({model.base_model}); use one of {possible}, or another model"
        )
    annotator = None if request.is_map else spec.annotator
    detector = ANNOTATORS[annotator].weights if annotator is not None else None
    if detector is not None and detector not in entries:
        raise InvalidRequest(
            f"{name} is {spec.name}, and the {model.edition} weights have no annotator that makes"
            f" such a map; send a ready-made map and {name}_is_map=true, or set"
            " WEIGHTS_EDITION=full"
        )
    return ControlNetPlan(
        name,
        spec,
        weights,
        request.conditioning_scale,
        request.start,
        request.end,
        annotator,
    )
