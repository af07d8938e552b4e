"""Image to image, inpainting, outpainting and refining: every input works, in every combination."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from scipy import ndimage

import generation.stages
from generation.base_models import MINIATURE_SDXL
from generation.engine import Engine
from generation.errors import InvalidRequest
from generation.sampling import build_scheduler
from generation.schedulers import SCHEDULERS
from generation.sizes import Margins
from tests.helpers.comparison import max_difference, nearly_equal
from tests.helpers.engines import base_model, refiner
from tests.miniature.reference_pipelines import DISTINCT
from weights.catalog import Edition
from weights.miniature.world import place, render

EXPERT, BASE_IMAGE = "expert_ensemble_refiner", "base_image_refiner"
STYLES = (EXPERT, BASE_IMAGE)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name → path: two scenes, one of odd size, masks, and a scene with a transparent part."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(3)
    scene = place("square", "yellow", "green", "medium", "center", rng)
    image = render(scene, 128, 128)
    box, other_box = (40, 40, 88, 88), (8, 8, 56, 72)
    masks = {"mask": Image.new("L", (128, 128)), "other_mask": Image.new("L", (128, 128))}
    for mask, area in zip(masks.values(), (box, other_box), strict=True):
        ImageDraw.Draw(mask).rectangle(area, fill=255)
    odd_mask = Image.new("L", (101, 77))
    ImageDraw.Draw(odd_mask).ellipse((50, 20, 80, 60), fill=255)
    large_mask = Image.new("L", (401, 300))
    ImageDraw.Draw(large_mask).rectangle((300, 100, 400, 200), fill=255)
    transparent = image.convert("RGBA")
    transparent.putalpha(masks["mask"].point(lambda v: 255 - v))
    images = {
        "image": image,
        "other": render(place("star", "red", "blue", "large", "left", rng), 128, 128),
        "wide": render(scene, 160, 112),
        "odd": render(scene, 101, 77),
        "large": render(scene, 401, 300),
        "odd_mask": odd_mask,
        "grey": Image.new("L", (128, 128), 128),
        "large_mask": large_mask,
        "transparent": transparent,
        **masks,
    }
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in images}


MODES = {
    "txt2img": {},
    "img2img": {"image": "image", "prompt_strength": 0.6},
    "inpaint": {"image": "image", "mask": "mask"},
    "alpha": {"image": "transparent"},
    "region": {"image": "image", "mask": "mask", "inpaint_area": "masked_region"},
    "outpaint": {"image": "image", "outpaint": Margins(16, 0, 0, 0)},
    "expert": {"refine": EXPERT},
    "base_image": {"refine": BASE_IMAGE},
}


@pytest.fixture
def run(make, files):
    """`run("inpaint", seed=3)`: the result of a request of that mode; images by their names."""

    def run(mode: str, **changes: object):
        settings = {**MODES[mode], **changes}
        images = {k: files[settings[k]] for k in ("image", "mask") if settings.get(k)}
        return make(**{"num_inference_steps": 5, **settings, **images})

    return run


@pytest.fixture(scope="module")
def plain_results():
    return {}


@pytest.fixture
def plain(run, plain_results):
    """`plain("inpaint")`: the mode's request with nothing changed, made once."""

    def plain(mode: str):
        if mode not in plain_results:
            plain_results[mode] = run(mode)
        return plain_results[mode]

    return plain


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=int)


def different(first, second) -> bool:
    """Whether images differ by more than rounding, somewhere, or of another size."""
    if first.images[0].size != second.images[0].size:
        return True
    return np.abs(pixels(first.images[0]) - pixels(second.images[0])).max() > 2


# Every input changes the image


@pytest.mark.parametrize("mode", ["img2img", "inpaint", "outpaint"])
@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a small green star on a yellow background"},
        {"negative_prompt": "red circle"},
        {"num_inference_steps": 9},
        {"guidance_scale": 1.0},
        {"scheduler": "DPMSolverMultistep"},
        {"seed": 2},
        {"image": "other"},
        {"prompt_strength": 0.3},
        {"prompt_strength": 1.0},
        {"refine": EXPERT, "high_noise_frac": 0.4},
        {"refine": BASE_IMAGE},
    ],
    ids=str,
)
def test_every_input_changes_the_image_in_every_mode(run, plain, mode, change):
    assert different(plain(mode), run(mode, **change))


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("txt2img", {"image": "image"}),
        ("img2img", {"mask": "mask"}),
        ("img2img", {"width": 136}),
        ("img2img", {"height": 136}),
        ("inpaint", {"width": 136, "height": 136}),
        ("inpaint", {"mask": "other_mask"}),
        ("inpaint", {"mask_blur": 0}),
        ("inpaint", {"mask_blur": 24}),
        ("inpaint", {"mask_invert": True}),
        ("inpaint", {"masked_content": "fill"}),
        ("inpaint", {"masked_content": "noise"}),
        ("inpaint", {"inpaint_area": "masked_region", "inpaint_padding": 8}),
        ("region", {"inpaint_padding": 0}),
        ("alpha", {"mask_from_alpha": True}),
        ("alpha", {"mask_from_alpha": True, "mask_invert": True}),
        ("outpaint", {"outpaint": Margins(16, 16, 0, 0)}),
        ("outpaint", {"outpaint": Margins(16, 0, 16, 0)}),
        ("outpaint", {"outpaint": Margins(16, 0, 0, 16)}),
        ("outpaint", {"outpaint": Margins(0, 0, 16, 0)}),
        ("outpaint", {"mask_blur": 24}),
        ("txt2img", {"refine": EXPERT, "high_noise_frac": 0.4}),
        ("txt2img", {"refine": BASE_IMAGE}),
        ("expert", {"refine": BASE_IMAGE}),
        ("expert", {"high_noise_frac": 0.4}),
        ("base_image", {"refine_steps": 20}),
    ],
    ids=str,
)
def test_every_input_of_a_mode_changes_its_image(run, plain, mode, change):
    assert different(plain(mode), run(mode, **change))


def test_fill_and_noise_differ(run):
    assert different(run("inpaint", masked_content="fill"), run("inpaint", masked_content="noise"))


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("txt2img", {"prompt_strength": 0.1, "mask_blur": 0, "mask_invert": True}),
        ("txt2img", {"masked_content": "noise", "inpaint_area": "masked_region"}),
        ("txt2img", {"high_noise_frac": 0.1, "refine_steps": 3}),
        ("img2img", {"mask_blur": 0, "masked_content": "fill", "inpaint_area": "masked_region"}),
        ("inpaint", {"inpaint_padding": 0}),
        ("outpaint", {"mask_invert": True}),
        ("expert", {"refine_steps": 3}),
        ("base_image", {"high_noise_frac": 0.1}),
    ],
    ids=str,
)
def test_an_input_of_another_mode_changes_nothing(run, plain, mode, change):
    assert run(mode, **change).bytes == plain(mode).bytes


def test_a_small_strength_keeps_the_image_and_full_strength_does_not(run, files):
    source = pixels(Image.open(files["image"]))
    distance = [
        np.abs(pixels(run("img2img", prompt_strength=s).images[0]) - source).mean()
        for s in (0.0, 0.5, 1.0)
    ]
    assert distance[0] < 8
    assert distance == sorted(distance)


# Sizes


@pytest.mark.parametrize(
    ("mode", "change", "size"),
    [
        ("img2img", {}, (128, 128)),
        ("img2img", {"image": "wide"}, (152, 104)),  # 160:112 at the area of 128x128
        ("img2img", {"image": "large"}, (144, 112)),
        ("img2img", {"image": "wide", "width": 96, "height": 160}, (96, 160)),
        ("inpaint", {"image": "odd", "mask": "odd_mask"}, (101, 77)),
        ("region", {"image": "odd", "mask": "odd_mask"}, (101, 77)),
        ("inpaint", {"image": "large", "mask": "large_mask"}, (401, 300)),
        ("inpaint", {"width": 144, "height": 96}, (144, 96)),
        ("outpaint", {"image": "odd", "outpaint": Margins(3, 5, 20, 11)}, (124, 93)),
        ("outpaint", {"image": "large", "outpaint": Margins(0, 0, 40, 0)}, (441, 300)),
        ("expert", {"width": 96, "height": 64}, (96, 64)),
    ],
    ids=str,
)
def test_the_images_size(run, mode, change, size):
    made = run(mode, **change, num_outputs=2, num_inference_steps=2)
    assert [image.size for image in made.images] == [size, size]
    assert (made.result.plan.width, made.result.plan.height) == size


# Batches


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("img2img", {}),
        ("img2img", {"scheduler": "K_EULER_ANCESTRAL", "guidance_scale": 1.0}),
        ("inpaint", {"prompt_strength": 1.0}),
        ("inpaint", {"masked_content": "noise", "scheduler": "K_EULER_ANCESTRAL"}),
        ("region", {"masked_content": "fill"}),
        ("outpaint", {"outpaint": Margins(50, 0, 0, 0)}),  # two stages
        ("img2img", {"refine": EXPERT, "scheduler": "K_EULER_ANCESTRAL"}),
        ("inpaint", {"refine": EXPERT}),
        ("inpaint", {"refine": BASE_IMAGE}),
        ("outpaint", {"refine": BASE_IMAGE, "outpaint": Margins(50, 0, 0, 0)}),
    ],
    ids=str,
)
def test_an_image_of_a_batch_equals_the_one_made_alone(run, mode, change):
    batch = run(mode, **change, num_outputs=2, seed=40)
    for k in range(2):
        alone = run(mode, **change, seed=40 + k)
        assert max_difference(batch.images[k], alone.images[0]) <= 1
        if "outpaint" not in change:  # after the first stage, such values are in the second's input
            assert torch.allclose(batch.latents[k], alone.latents[0], atol=1e-4, rtol=0)


# What must not change


@pytest.mark.parametrize("refine", ["no_refiner", *STYLES])
@pytest.mark.parametrize("mode", ["inpaint", "region"])
def test_inpainting_keeps_what_lies_outside_the_feathered_mask(run, files, mode, refine):
    made = run(mode, refine=refine, num_outputs=2)
    mask = np.asarray(Image.open(files["mask"]))
    outside = ndimage.distance_transform_cdt(mask == 0, metric="chessboard") > 8
    source = pixels(Image.open(files["image"]))
    for image in made.images:
        assert (pixels(image)[outside] == source[outside]).all()
        assert np.abs(pixels(image)[mask > 0] - source[mask > 0]).max() > 8


@pytest.mark.parametrize("refine", STYLES)
def test_refining_keeps_what_the_base_model_has_repainted_under_grey(run, files, refine):
    settings = {"mask": "grey", "mask_blur": 0, "prompt_strength": 1.0, "num_inference_steps": 10}
    source = pixels(Image.open(files["image"]))
    alone, refined = (
        np.abs(pixels(run("inpaint", **settings, refine=style).images[0]) - source).mean()
        for style in ("no_refiner", refine)
    )
    assert refined > 0.7 * alone > 20


@pytest.mark.parametrize("refine", ["no_refiner", *STYLES])
@pytest.mark.parametrize("margins", [Margins(24, 0, 0, 16), Margins(0, 60, 9, 0)], ids=str)
def test_outpainting_keeps_the_image_but_for_the_feather_at_its_edges(run, files, margins, refine):
    made = run("outpaint", outpaint=margins, refine=refine, num_inference_steps=3)
    source = pixels(Image.open(files["image"]))
    left, top = margins.left, margins.top
    kept = pixels(made.images[0])[top : top + 128, left : left + 128]
    inner = np.s_[8:-8, 8:-8]
    assert (kept[inner] == source[inner]).all()
    free = np.s_[8 * (top > 0) : 128 - 8 * (margins.bottom > 0), 8 * (left > 0) : 128 - 9]
    assert (kept[free] == source[free]).all()


def test_a_tiny_image_can_be_extended(make, tmp_path):
    folder = tmp_path / "sources"
    folder.mkdir()
    Image.new("RGB", (2, 3), "red").save(folder / "tiny.png")
    for area in ("whole_picture", "masked_region"):
        made = make(
            image=folder / "tiny.png",
            outpaint=Margins(1, 0, 2, 3),
            inpaint_area=area,
            num_inference_steps=2,
        )
        assert made.images[0].size == (5, 6)


# The refiner


@pytest.fixture
def timesteps(engine):
    """Record which model ran at which timestep: [("base", 951.0), ...]."""
    seen: list[tuple[str, float]] = []

    def watch(name: str, unet: torch.nn.Module):
        return unet.register_forward_pre_hook(lambda _, args: seen.append((name, float(args[1]))))

    handles = [
        watch("base", base_model(engine).components.unet),
        watch("refiner", refiner(engine).components.unet),
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("scheduler", "mode"),
    [
        *((scheduler, "txt2img") for scheduler in DISTINCT),
        *itertools.product(("DDIM", "Heun", "PNDM", "DPM2 a"), ("img2img", "inpaint")),
    ],
)
def test_the_expert_ensemble_makes_the_whole_schedule_however_short(
    run, engine, timesteps, scheduler, mode
):
    for steps, share, strength in [(1, 0.8, 0.05), (2, 0.0, 1.0), (2, 1.0, 0.9), (6, 0.7, 0.6)]:
        timesteps.clear()
        made = run(
            mode,
            scheduler=scheduler,
            refine=EXPERT,
            num_inference_steps=steps,
            high_noise_frac=share,
            prompt_strength=strength,
            guidance_scale=1.0,
            width=64,
            height=64,
        )
        assert torch.isfinite(made.latents).all()
        plan = made.result.plan
        config = base_model(engine).components.scheduler_config
        schedule = build_scheduler(plan.scheduler, plan.schedule_type, config)
        schedule.set_timesteps(plan.num_inference_steps)
        run_steps = int(plan.num_inference_steps * plan.strength)
        first = (plan.num_inference_steps - run_steps) * schedule.order
        visited = [t for _, t in timesteps]
        if schedule.order == 2:  # at the handover diffusers repeats half a step
            again = [("base", t) in timesteps and name == "refiner" for name, t in timesteps]
            visited = [t for t, repeated in zip(visited, again, strict=True) if not repeated]
        assert visited == [float(t) for t in schedule.timesteps[first:]]
        assert timesteps == sorted(timesteps, key=lambda visit: visit[0])  # base, then refiner


@pytest.mark.parametrize(("share", "base_steps"), [(0.0, 1), (0.5, 4), (0.8, 6), (1.0, 8)])
def test_high_noise_frac_is_the_base_models_share(run, timesteps, capsys, share, base_steps):
    run("expert", high_noise_frac=share, num_inference_steps=8)
    models = [name for name, _ in timesteps]
    assert models == ["base"] * base_steps + ["refiner"] * (8 - base_steps)
    is_logged = "refine has no effect" in capsys.readouterr().out
    assert is_logged is (base_steps == 8)


def test_an_expert_ensemble_without_steps_for_the_refiner_equals_the_base_alone(run):
    expert, alone = run("expert", high_noise_frac=1.0), run("txt2img")
    assert nearly_equal(expert.images, alone.images)


@pytest.mark.parametrize(("refine_steps", "made"), [(None, 1), (10, 3), (1, 1)])
def test_the_base_image_refiner_makes_the_last_30_percent_of_its_steps(
    run, timesteps, refine_steps, made
):
    run("base_image", refine_steps=refine_steps, num_inference_steps=5)
    assert [name for name, _ in timesteps] == ["base"] * 5 + ["refiner"] * made


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scheduler", DISTINCT)
def test_the_refiner_has_a_scheduler_of_the_requested_class(run, monkeypatch, scheduler, style):
    built = []
    build = generation.stages.build_scheduler

    def watched_build(*arguments):
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(generation.stages, "build_scheduler", watched_build)
    run("txt2img", refine=style, scheduler=scheduler, num_inference_steps=2, width=64, height=64)
    first, second = built[0], built[-1]
    scheduler_class = getattr(diffusers, SCHEDULERS[scheduler].class_name)
    assert isinstance(first, scheduler_class)
    assert isinstance(second, scheduler_class)
    assert first is not second
    for key, value in SCHEDULERS[scheduler].overrides.items():
        assert second.config[key] == value
    assert second.config.get("use_karras_sigmas", False) is (scheduler == "KarrasDPM")


def test_the_refiner_shares_the_base_models_components_and_is_loaded_once(make):
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load()
    make(engine, num_inference_steps=1)
    assert MINIATURE_SDXL.refiner.weights not in engine._models._entries
    make(engine, num_inference_steps=2, refine=EXPERT)
    base, refined = base_model(engine).components, refiner(engine)
    make(engine, num_inference_steps=2, refine=BASE_IMAGE)
    assert refiner(engine) is refined
    parts = refined.components
    assert parts.vae is base.vae
    assert parts.unet is not base.unet
    (name,) = parts.text_encoders
    assert parts.text_encoders[name] is base.text_encoders[name]
    assert parts.tokenizers[name] is base.tokenizers[name]
    assert name == "text_encoder_2"
    assert parts.requires_aesthetics_score


# Timings and invalid requests


@pytest.mark.parametrize(
    ("mode", "stages"),
    [
        ("img2img", {"encode"}),
        ("inpaint", {"encode"}),
        ("outpaint", {"encode"}),
        ("expert", {"refine"}),
        ("base_image", {"refine"}),
    ],
)
def test_every_stage_is_measured(run, mode, stages):
    measured = run(mode).result.seconds
    assert set(measured) == {"load", "weights", "text", "denoise", "decode", "save"} | stages
    assert all(seconds > 0 for seconds in measured.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": "mask"}, "mask is given without an image"),
        ({"image": "image", "mask_from_alpha": True}, "the image is opaque everywhere"),
        ({"image": "wide", "mask": "mask"}, "aspect ratios differ"),
        ({"image": "image", "outpaint": Margins(129, 0, 0, 0)}, "outpaint_left is 129"),
    ],
    ids=str,
)
def test_invalid_images_are_rejected_before_anything_runs(run, timesteps, change, message):
    with pytest.raises(InvalidRequest, match=message):
        run("txt2img", **change)
    assert timesteps == []
