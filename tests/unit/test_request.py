"""Every rule about a request, and what is filled in where it leaves a value open."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.base_models import BASE_MODELS, MINIATURE_SDXL, SDXL
from generation.errors import InvalidRequest
from generation.options import MAX_NUM_INFERENCE_STEPS, GenerationRequest, Refine
from generation.plan import Mode, StagePlan, WeightsUse
from generation.resolve import resolve, resolve_mode
from generation.schedulers import SCHEDULERS
from generation.sizes import (
    SIDE_MULTIPLE,
    AspectRatio,
    Margins,
    extended_size,
    nearest_valid_size,
    size_of_ratio,
)
from inputs import flatten
from preprocess.images import MAX_IMAGE_PIXELS
from tests.helpers.request import REQUEST as ANY_REQUEST
from weights.catalog import Edition
from weights.errors import InvalidSource
from weights.user.parse import HubRepository, WebFile

REQUEST = replace(ANY_REQUEST, seed=7)
IMAGE, MASK = Path("image.png"), Path("mask.png")  # never opened
IMG2IMG = replace(REQUEST, image=IMAGE)
INPAINT = replace(REQUEST, image=IMAGE, mask=MASK)


def test_open_values_take_the_models_own():
    plan = resolve(REQUEST, SDXL, None)
    assert (plan.width, plan.height) == (1024, 1024)
    assert (plan.scheduler, plan.num_inference_steps, plan.guidance_scale) == ("K_EULER", 50, 7.5)
    assert plan.mode is Mode.TXT2IMG
    small = resolve(REQUEST, MINIATURE_SDXL, None)
    assert (small.width, small.height, small.num_inference_steps) == (128, 128, 20)


def test_given_values_are_kept():
    asked = replace(
        REQUEST,
        width=512,
        height=768,
        scheduler="DDIM",
        num_inference_steps=3,
        guidance_scale=0.0,
        num_outputs=2,
    )
    plan = resolve(asked, SDXL, None)
    assert (plan.width, plan.height, plan.scheduler) == (512, 768, "DDIM")
    assert (plan.num_inference_steps, plan.guidance_scale, len(plan.seeds)) == (3, 0.0, 2)


@pytest.mark.parametrize(("scale", "guided"), [(0, False), (1, False), (1.01, True), (50, True)])
def test_a_guidance_scale_of_one_or_less_turns_guidance_off(scale, guided):
    plan = resolve(replace(REQUEST, guidance_scale=scale), SDXL, None)
    assert plan.do_classifier_free_guidance is guided


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"scheduler": "EULER"}, ["'EULER'", "K_EULER", "PNDM"]),
        ({"num_outputs": 0}, ["num_outputs is 0", "from 1 to 16"]),
        (
            {"num_outputs": 5},
            ["num_outputs is 5", "sdxl generates at most 4", "a distilled model"],
        ),
        ({"num_outputs": 17}, ["num_outputs is 17", "from 1 to 16"]),
        ({"num_inference_steps": 0}, ["num_inference_steps is 0", "from 1 to 500"]),
        ({"num_inference_steps": 501}, ["num_inference_steps is 501", "from 1 to 500"]),
        ({"guidance_scale": -0.1}, ["guidance_scale is -0.1", "from 0 to 50"]),
        ({"guidance_scale": math.nan}, ["guidance_scale is nan", "from 0 to 50"]),
        ({"seed": -1}, ["seed is -1", "from 0 to 4294967295"]),
        ({"seed": 2**32}, ["seed is 4294967296", "from 0 to 4294967295"]),
        ({"width": 1020}, ["width=1020", "multiple of 8", "width=1024 height=1024"]),
        ({"height": 100}, ["height=100", "from 256 to 2048", "width=1024 height=256"]),
        ({"width": 5000}, ["width=5000", "width=2048 height=1024"]),
        ({"width": 2048, "height": 2048}, ["2359296 pixels", "width=1536 height=1536"]),
    ],
)
def test_a_broken_rule_names_value_rule_and_remedy(change, fragments):
    with pytest.raises(InvalidRequest) as raised:
        resolve(replace(REQUEST, **change), SDXL, None)
    for fragment in fragments:
        assert fragment in str(raised.value)


@given(st.integers(-100, 10000), st.integers(-100, 10000), st.sampled_from([SDXL, MINIATURE_SDXL]))
def test_the_nearest_size_is_valid_and_is_itself_its_nearest(width, height, spec):
    w, h = nearest_valid_size(width, height, spec)
    for side in (w, h):
        assert side % SIDE_MULTIPLE == 0
        assert spec.min_side <= side <= spec.max_side
    assert w * h <= spec.max_pixels
    assert nearest_valid_size(w, h, spec) == (w, h)


def test_the_nearest_size_keeps_the_aspect_ratio_when_the_area_is_too_large():
    w, h = nearest_valid_size(2048, 1536, SDXL)
    assert w / h == pytest.approx(2048 / 1536, rel=0.01)


def test_picture_k_has_seed_plus_k_and_wraps_at_32_bits():
    assert resolve(replace(REQUEST, num_outputs=3), SDXL, None).seeds == (7, 8, 9)
    last = replace(REQUEST, seed=2**32 - 1, num_outputs=2)
    assert resolve(last, SDXL, None).seeds == (2**32 - 1, 0)


def test_an_open_seed_is_drawn_from_all_32_bits():
    seeds = {resolve(replace(REQUEST, seed=None), SDXL, None).seeds[0] for _ in range(200)}
    assert len(seeds) == 200
    assert max(seeds) > 2**31


MODELS = BASE_MODELS[Edition.FULL]


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            "sdxl-turbo",
            {"guidance_scale": 7.5},
            "guidance_scale is 7.5, and sdxl-turbo works without guidance; use 0 to 1, or leave it"
            " empty for 0",
        ),
        (
            "sd-turbo",
            {"negative_prompt": "blurry"},
            "negative_prompt is 'blurry', and sd-turbo does not use classifier-free guidance, so it"
            " would have no effect; leave it empty or choose another model",
        ),
        (
            "sdxl-turbo",
            {"num_inference_steps": 5},
            "num_inference_steps is 5; sdxl-turbo was distilled for 1 to 4 steps: use one of these,"
            " or leave it empty for 1",
        ),
        ("sdxl-lcm", {"num_inference_steps": 1}, "is 1; sdxl-lcm was distilled for 2 to 8 steps"),
        ("sdxl-lcm", {"num_inference_steps": 9}, "is 9; sdxl-lcm was distilled for 2 to 8 steps"),
        ("sd15-lcm", {"guidance_scale": 2.1}, "is 2.1, and sd15-lcm needs little guidance; use"),
        ("sd15-lcm", {"guidance_scale": 0.5}, "is 0.5, and sd15-lcm needs little guidance; use"),
        (
            "lcm-dreamshaper",
            {"guidance_scale": 16},
            "is 16, and lcm-dreamshaper supports guidance from 1 to 15; use 1 to 15, or leave",
        ),
        ("lcm-dreamshaper", {"negative_prompt": "blur"}, "lcm-dreamshaper does not use classifier"),
        ("sdxl-lcm", {"scheduler": "DDIM"}, "is DDIM, and sdxl-lcm works with LCM and TCD only"),
        ("sdxl-turbo", {"num_outputs": 17}, "num_outputs is 17; it must be from 1 to 16"),
        ("sd15", {"num_outputs": 5}, "num_outputs is 5, and sd15 generates at most 4 images"),
        *(
            (name, {"refine": "base_image_refiner"}, f"but {name} has no refiner")
            for name in MODELS
            if name != "sdxl"
        ),
        ("sdxl-turbo", {"hires_fix": 2.5}, "hires_fix is 2.5, which makes 1280x1280 of 512x512"),
        ("sd-turbo", {"width": 1024, "height": 1024}, "is not possible with sd-turbo"),
    ],
)
def test_a_models_own_limits(model, change, message):
    with pytest.raises(InvalidRequest) as raised:
        resolve(replace(REQUEST, **change), MODELS[model], None)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("sdxl-turbo", {"guidance_scale": 1.0, "num_inference_steps": 4, "num_outputs": 16}),
        ("sdxl-turbo", {"scheduler": "DPM++ SDE", "schedule_type": "karras"}),
        ("sdxl-lcm", {"guidance_scale": 2.0, "num_inference_steps": 8, "negative_prompt": "red"}),
        ("lcm-dreamshaper", {"guidance_scale": 15.0, "scheduler": "TCD"}),
    ],
)
def test_what_a_model_of_few_steps_takes(model, change):
    plan = resolve(replace(REQUEST, **change), MODELS[model], None)
    assert plan.num_inference_steps <= 8
    assert plan.do_classifier_free_guidance is (
        plan.guidance_scale > 1 and model != "lcm-dreamshaper"
    )


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.3, 0.8, 1.0])
def test_an_image_leaves_at_least_one_of_few_steps_and_no_more_than_there_are(strength):
    for spec in MODELS.values():
        if spec.steps is not None:
            asked = replace(IMG2IMG, prompt_strength=strength)
            plan = resolve(asked, spec, (512, 512))
            assert spec.steps[0] <= plan.num_inference_steps <= spec.steps[1]
            assert int(plan.num_inference_steps * plan.strength) >= 1


def test_a_second_pass_has_the_steps_that_were_asked_whatever_an_image_leaves():
    asked = replace(IMG2IMG, prompt_strength=0.01, num_inference_steps=10, hires_fix=1.5)
    plan = resolve(asked, SDXL, (1024, 1024))
    assert plan.num_inference_steps == 100
    assert [stage.num_inference_steps for stage in plan.stages] == [100, 10]


def test_the_defaults_of_every_model_are_valid():
    for models in BASE_MODELS.values():
        for name, spec in models.items():
            assert spec.name == name
            assert spec.scheduler in SCHEDULERS
            resolve(REQUEST, spec, None)


# Modes


def refusal(request: GenerationRequest, size: tuple[int, int] | None = None) -> str:
    with pytest.raises(InvalidRequest) as raised:
        resolve(request, SDXL, size)
    return str(raised.value)


MODES = {  # (image, mask, mask_from_alpha, outpaint)
    (False, False, False, False): Mode.TXT2IMG,
    (True, False, False, False): Mode.IMG2IMG,
    (True, True, False, False): Mode.INPAINT,
    (True, False, True, False): Mode.INPAINT,
    (True, False, False, True): Mode.OUTPAINT,
}


@pytest.mark.parametrize("given", list(product([False, True], repeat=4)), ids=str)
def test_the_images_decide_the_mode_or_do_not_add_up(given):
    image, mask, mask_from_alpha, outpaint = given
    request = replace(
        REQUEST,
        image=IMAGE if image else None,
        mask=MASK if mask else None,
        mask_from_alpha=mask_from_alpha,
        outpaint=Margins(0, 0, 8 * outpaint, 0),
    )
    if given in MODES:
        assert resolve_mode(request) is MODES[given]
    else:
        with pytest.raises(InvalidRequest):
            resolve_mode(request)


@pytest.mark.parametrize(
    ("request_", "fragments"),
    [
        (replace(REQUEST, mask=MASK), ["mask is given without an image", "give the image"]),
        (replace(REQUEST, mask_from_alpha=True), ["mask_from_alpha is given without an image"]),
        (replace(REQUEST, outpaint=Margins(8, 0, 0, 0)), ["outpaint_*", "without an image"]),
        (replace(INPAINT, mask_from_alpha=True), ["mask and mask_from_alpha", "one of them"]),
        (replace(INPAINT, outpaint=Margins(0, 8, 0, 0)), ["mask and outpaint_*", "two requests"]),
        (
            replace(IMG2IMG, mask_from_alpha=True, outpaint=Margins(0, 0, 0, 8)),
            ["mask_from_alpha and outpaint_*", "two requests"],
        ),
    ],
)
def test_images_that_do_not_add_up_are_named_with_the_remedy(request_, fragments):
    message = refusal(request_, (512, 512))
    for fragment in fragments:
        assert fragment in message


# Values


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"prompt_strength": -0.01}, ["prompt_strength is -0.01", "from 0 to 1"]),
        ({"prompt_strength": 1.01}, ["prompt_strength is 1.01", "from 0 to 1"]),
        ({"high_noise_frac": 2}, ["high_noise_frac is 2", "from 0 to 1"]),
        ({"mask_blur": -1}, ["mask_blur is -1", "from 0 to 128"]),
        ({"mask_blur": 129}, ["mask_blur is 129", "from 0 to 128"]),
        ({"inpaint_padding": -1}, ["inpaint_padding is -1", "from 0 to 1024"]),
        ({"inpaint_padding": 1025}, ["inpaint_padding is 1025", "from 0 to 1024"]),
        ({"guidance_start": -0.1}, ["guidance_start is -0.1", "from 0 to 1"]),
        ({"guidance_end": 1.1}, ["guidance_end is 1.1", "from 0 to 1"]),
        (
            {"guidance_start": 0.5, "guidance_end": 0.5},
            ["guidance_start is 0.5 and guidance_end 0.5", "guidance_scale 1"],
        ),
        ({"refine_steps": 0}, ["refine_steps is 0", "from 1 to 500"]),
        ({"refine_steps": 501}, ["refine_steps is 501", "from 1 to 500"]),
        ({"masked_content": "blur"}, ["masked_content 'blur'", "original, fill, noise"]),
        ({"inpaint_area": ""}, ["inpaint_area ''", "whole_picture, masked_region"]),
        ({"refine": "yes"}, ["refine 'yes'", "no_refiner, expert_ensemble_refiner"]),
    ],
)
def test_a_broken_rule_about_images_names_value_rule_and_remedy(change, fragments):
    message = refusal(replace(INPAINT, **change), (1024, 1024))
    for fragment in fragments:
        assert fragment in message


FLOATS = [
    entry.name
    for entry in flatten(GenerationRequest)
    if entry.type is float and not entry.is_list and not entry.name.startswith("controlnet_")
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_what_is_no_number_is_refused(name, value):
    assert f"{name} is {value}" in refusal(replace(INPAINT, **{name: value}), (1024, 1024))


def test_the_floats_are_found():
    assert {"guidance_scale", "prompt_strength", "lora_scale", "hires_fix"} <= set(FLOATS)


# Sizes


@pytest.mark.parametrize("ratio", AspectRatio)
@pytest.mark.parametrize("spec", [SDXL, MINIATURE_SDXL])
def test_an_aspect_ratio_is_a_size_of_the_models_own(ratio, spec):
    across, down = (int(side) for side in ratio.split(":"))
    for asked in (REQUEST, IMG2IMG, INPAINT):
        plan = resolve(replace(asked, aspect_ratio=ratio), spec, (640, 480))
        assert plan.width / plan.height == pytest.approx(across / down, rel=0.05)
        assert plan.width * plan.height == pytest.approx(spec.native_size**2, rel=0.04)
        assert nearest_valid_size(plan.width, plan.height, spec) == (plan.width, plan.height)


def test_sdxls_sizes_are_those_it_was_trained_at():
    found = {r: size_of_ratio(r, SDXL) for r in ("1:1", "3:2", "4:3", "16:9", "9:16")}
    assert found == {
        "1:1": (1024, 1024),
        "3:2": (1216, 832),
        "4:3": (1152, 896),
        "16:9": (1344, 768),
        "9:16": (768, 1344),
    }


def test_an_aspect_ratio_stands_alone():
    both = replace(REQUEST, aspect_ratio="3:2", height=512)
    assert "aspect_ratio=3:2 is given together with height; give" in refusal(both, None)
    outpaint = replace(IMG2IMG, aspect_ratio="3:2", outpaint=Margins(8, 0, 0, 0))
    assert "aspect_ratio=3:2 is given together with outpaint_*" in refusal(outpaint, (64, 64))
    assert "aspect_ratio '5:4' is not known; choose one of 1:1," in refusal(
        replace(REQUEST, aspect_ratio="5:4"), None
    )


@pytest.mark.parametrize("spec", [SDXL, MINIATURE_SDXL])
@pytest.mark.parametrize("size", [(4000, 3000), (300, 400), (777, 777), (160, 90), (64, 65)])
def test_image_to_image_keeps_the_aspect_at_the_area_the_model_knows(spec, size):
    plan = resolve(IMG2IMG, spec, size)
    assert nearest_valid_size(plan.width, plan.height, spec) == (plan.width, plan.height)
    assert plan.width / plan.height == pytest.approx(size[0] / size[1], rel=0.08)
    assert plan.width * plan.height == pytest.approx(spec.native_size**2, rel=0.08)


@given(st.integers(1, 9000), st.integers(1, 9000), st.sampled_from([SDXL, MINIATURE_SDXL]))
def test_image_to_image_has_a_valid_size_for_every_image(width, height, spec):
    plan = resolve(IMG2IMG, spec, (width, height))
    assert nearest_valid_size(plan.width, plan.height, spec) == (plan.width, plan.height)


@given(st.integers(1, 9000), st.integers(1, 9000))
def test_inpainting_keeps_the_images_own_size(width, height):
    plan = resolve(INPAINT, SDXL, (width, height))
    assert (plan.width, plan.height) == (width, height)
    alpha = resolve(replace(IMG2IMG, mask_from_alpha=True), SDXL, (width, height))
    assert (alpha.width, alpha.height) == (width, height)


@pytest.mark.parametrize("request_", [IMG2IMG, INPAINT])
@pytest.mark.parametrize(
    ("change", "size"),
    [
        ({"width": 512}, (512, 384)),
        ({"height": 768}, (1024, 768)),
        ({"width": 520}, (520, 392)),  # 390 is no multiple of 8
        ({"width": 640, "height": 640}, (640, 640)),
    ],
)
def test_the_other_side_follows_from_the_image(request_, change, size):
    plan = resolve(replace(request_, **change), SDXL, (2000, 1500))
    assert (plan.width, plan.height) == size


@pytest.mark.parametrize("request_", [IMG2IMG, INPAINT])
def test_a_side_that_makes_the_other_impossible_is_refused_with_the_nearest(request_):
    message = refusal(replace(request_, width=512), (3000, 300))
    assert "width=512 height=48 is not possible" in message
    assert "width=512 height=256" in message


@pytest.mark.parametrize("change", [{"width": 100}, {"height": 4096}, {"width": 8, "height": 8}])
@pytest.mark.parametrize("request_", [IMG2IMG, INPAINT])
def test_an_impossible_size_is_refused_with_an_image_too(request_, change):
    assert "is not possible with sdxl" in refusal(replace(request_, **change), (1024, 1024))


# Outpainting


def test_an_outpainted_picture_has_its_margins_added():
    plan = resolve(replace(IMG2IMG, outpaint=Margins(1, 20, 300, 0)), SDXL, (301, 77))
    assert (plan.mode, plan.width, plan.height) == (Mode.OUTPAINT, 602, 97)


@pytest.mark.parametrize("change", [{"width": 512}, {"height": 512}])
def test_a_size_with_outpainting_is_refused(change):
    request = replace(IMG2IMG, outpaint=Margins(8, 0, 0, 0), **change)
    (name,) = change
    assert f"so leave {name} out" in refusal(request, (512, 512))


@pytest.mark.parametrize(
    ("margins", "fragment"),
    [
        (Margins(301, 0, 0, 0), "outpaint_left is 301; it must be from 0 to 300"),
        (Margins(0, 201, 0, 0), "outpaint_top is 201; it must be from 0 to 200"),
        (Margins(0, 0, 301, 0), "outpaint_right is 301; it must be from 0 to 300"),
        (Margins(0, 0, 0, 201), "outpaint_bottom is 201; it must be from 0 to 200"),
    ],
)
def test_a_margin_is_at_most_the_images_side(margins, fragment):
    message = refusal(replace(IMG2IMG, outpaint=margins), (300, 200))
    assert fragment in message
    assert "second request" in message
    largest = replace(IMG2IMG, outpaint=Margins(300, 200, 300, 200))
    assert resolve(largest, SDXL, (300, 200)).width == 900


def test_an_extended_picture_of_too_many_pixels_is_refused():
    request = replace(IMG2IMG, outpaint=Margins(0, 0, 0, 8))
    side = math.isqrt(MAX_IMAGE_PIXELS)
    message = refusal(request, (side, side))
    assert f"would be {side}x{side + 8}" in message
    assert f"at most {MAX_IMAGE_PIXELS} pixels" in message
    assert resolve(request, SDXL, (side, side - 8)).height == side


# Steps


@given(st.integers(1, 500), st.floats(0, 1))
def test_at_least_one_step_runs_and_no_less_is_changed_than_was_asked(steps, strength):
    request = replace(IMG2IMG, num_inference_steps=steps, prompt_strength=strength)
    plan = resolve(request, SDXL, (1024, 1024))
    assert int(plan.num_inference_steps * plan.strength) >= 1
    assert strength <= plan.strength <= max(strength, 1 / MAX_NUM_INFERENCE_STEPS)
    assert steps <= plan.num_inference_steps <= MAX_NUM_INFERENCE_STEPS
    if int(steps * strength) >= 1:
        assert (plan.num_inference_steps, plan.strength) == (steps, strength)


def test_without_an_image_every_step_runs():
    plan = resolve(replace(REQUEST, prompt_strength=0.0, num_inference_steps=3), SDXL, None)
    assert (plan.num_inference_steps, plan.strength) == (3, 1.0)


# Stages


def stages(request: GenerationRequest, size: tuple[int, int] | None = None):
    return resolve(request, SDXL, size).stages


def test_most_requests_have_one_stage():
    assert stages(REQUEST) == (StagePlan(Mode.TXT2IMG, (1024, 1024), 1.0, 50, is_refined=False),)
    (img2img,) = stages(replace(IMG2IMG, refine="base_image_refiner"), (1024, 768))
    assert (img2img.mode, img2img.strength, img2img.is_refined) == (Mode.IMG2IMG, 0.8, True)
    (inpaint,) = stages(INPAINT, (300, 200))
    assert (inpaint.mode, inpaint.size, inpaint.margins) == (Mode.INPAINT, (300, 200), None)


def test_hires_is_a_last_stage_and_the_refiners():
    request = replace(REQUEST, hires_fix=1.5, hires_strength=0.4, num_inference_steps=10)
    first, last = stages(replace(request, refine="expert_ensemble_refiner"))
    assert first == StagePlan(Mode.TXT2IMG, (1024, 1024), 1.0, 10, is_refined=False)
    assert last == StagePlan(Mode.IMG2IMG, (1536, 1536), 0.4, 10, is_refined=True)


@given(
    st.tuples(st.integers(8, 999), st.integers(8, 999)),
    st.tuples(*[st.integers(0, 8)] * 4).filter(any),
    st.sampled_from(["no_refiner", "base_image_refiner"]),
)
def test_outpainting_stages_lead_to_the_final_image(size, margins, refine):
    request = replace(IMG2IMG, outpaint=Margins(*margins), refine=refine)
    plan = resolve(request, SDXL, size)
    place = margins[:2]  # of the image in the final one
    for stage in plan.stages:
        assert (stage.mode, stage.strength) == (Mode.INPAINT, request.prompt_strength)
        assert stage.is_refined is (refine != "no_refiner")
        size = extended_size(size, stage.margins)
        assert stage.size == size
        place = place[0] - stage.margins.left, place[1] - stage.margins.top
        assert stage.offset == place
    assert size == (plan.width, plan.height)
    assert place == (0, 0)


# Refining


def test_no_refiner_is_planned_unless_asked():
    assert not resolve(REQUEST, SDXL, None).stages[-1].is_refined


@pytest.mark.parametrize("style", [Refine.EXPERT_ENSEMBLE, Refine.BASE_IMAGE])
def test_refining_with_a_model_that_has_no_refiner_is_refused(style):
    lonely = replace(SDXL, name="lonely", refiner=None)
    with pytest.raises(InvalidRequest) as raised:
        resolve(replace(REQUEST, refine=style.value), lonely, None)
    assert f"refine is {style.value}, but lonely has no refiner" in str(raised.value)
    assert "use refine=no_refiner" in str(raised.value)
    assert not resolve(REQUEST, lonely, None).stages[-1].is_refined


@pytest.mark.parametrize(
    ("steps", "refine_steps", "planned"),
    [(None, None, 50), (10, None, 10), (10, 30, 30), (10, 4, 4), (10, 3, 4), (1, None, 4)],
)
def test_the_base_image_refiner_makes_as_many_steps_and_at_least_one(steps, refine_steps, planned):
    request = replace(REQUEST, num_inference_steps=steps, refine_steps=refine_steps)
    plan = resolve(replace(request, refine="base_image_refiner"), SDXL, None)
    assert plan.refine_steps == planned
    assert int(planned * 0.3) >= 1


# --- trained weights ------------------------------------------------------------------------------

LORA = "https://files.example/lora.safetensors"


def weights_of(**changes):
    return resolve(replace(REQUEST, **changes), SDXL, None).weights


def test_without_names_the_operators_weights_are_used():
    assert weights_of() == (WeightsUse("replicate_weights", None, 0.6),)


def test_every_lora_has_its_scale():
    uses = weights_of(
        replicate_weights=f" {LORA} ", lora_scale=-0.5, loras=("a/b", LORA), lora_scales=(2.0, 0.0)
    )
    assert [(use.name, use.scale) for use in uses] == [
        ("replicate_weights", -0.5),
        ("loras[0]", 2.0),
        ("loras[1]", 0.0),
    ]
    assert [type(use.source) for use in uses] == [WebFile, HubRepository, WebFile]
    assert [use.scale for use in weights_of(loras=("a/b", LORA))] == [0.6, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"lora_scale": 10.1}, ["lora_scale is 10.1", "from -10 to 10"]),
        ({"lora_scale": math.nan}, ["lora_scale is nan"]),
        ({"loras": ("a/b",), "lora_scales": (-11.0,)}, ["lora_scales[0] is -11.0"]),
        ({"loras": ("a/b",), "lora_scales": (1.0, 1.0)}, ["2 entries and loras 1", "or none"]),
        ({"lora_scales": (1.0,)}, ["1 entries and loras 0"]),
        ({"loras": ("a/b",) * 9}, ["names 9 files", "at most 8"]),
        ({"loras": ("a/b", "/etc/passwd")}, ["loras[1]='/etc/passwd'"]),
        ({"loras": ("",)}, ["loras[0]=''"]),
        ({"replicate_weights": "http://files.example/a"}, ["replicate_weights=", "https"]),
        ({"hf_api_token": "two words"}, ["hf_api_token is empty, or has a blank", "copy it again"]),
    ],
)
def test_wrong_weights_are_refused_before_anything_is_fetched(change, fragments):
    with pytest.raises((InvalidRequest, InvalidSource)) as raised:
        resolve(replace(REQUEST, **change), SDXL, None)
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_an_empty_token_is_none():
    tokens = resolve(replace(REQUEST, hf_api_token="", civitai_api_token="x"), SDXL, None).tokens
    assert (tokens.hub, tokens.civitai) == (None, "x")


def test_tokens_are_not_shown():
    request = replace(REQUEST, hf_api_token="hf_secret", civitai_api_token="civ_secret")
    assert "secret" not in repr(request) + repr(resolve(request, SDXL, None))
