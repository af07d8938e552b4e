"""Images with ControlNets: the same numbers as diffusers' ControlNet pipelines, to 1e-4 in fp32."""

import functools

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from generation.base_models import BASE_MODELS, Architecture
from generation.controlnets import CONTROLNETS, ControlRequest
from tests.miniature.reference_pipelines import REFERENCE_SCHEDULERS, for_inference
from weights import cache
from weights.catalog import Edition
from weights.miniature.controls import MAPS, Subject, random_pose
from weights.miniature.evaluate import FOLDER
from weights.miniature.world import place

MODELS = BASE_MODELS[Edition.MINIATURE]
PROMPT, SEED, STEPS, GUIDANCE = "a large red circle on a blue background", 5, 6, 6.0
SCENE = place("square", "yellow", "green", "medium", "center", np.random.default_rng(3))
SUBJECT = Subject(SCENE, None)
MAP_OF = {
    "edge_canny": "canny",
    "lineart": "lineart",
    "depth_midas": "depth",
    "scribble": "scribble",
    "segmentation": "segmentation",
    "normal_bae": "normal",
    "openpose": "openpose",
}
MODES = ("txt2img", "img2img", "inpaint")
NAMES = {"txt2img": "", "img2img": "Img2Img", "inpaint": "Inpaint"}  # in the classes' names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controls")
    SUBJECT.picture(128, 128).save(folder / "image.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[40:88, 32:96] = 255  # on the grid of 8x8 pixels that latents have
    Image.fromarray(mask).save(folder / "mask.png")
    for name, kind in MAP_OF.items():
        posed = Subject(SCENE, random_pose(np.random.default_rng(1)))
        pixels = MAPS[kind][0](posed if kind == "openpose" else SUBJECT, 128, 128)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def nets():
    @functools.cache
    def load(entry: str):
        union = "union" in entry
        net_class = diffusers.ControlNetUnionModel if union else diffusers.ControlNetModel
        folder = cache.ensure(entry, Edition.MINIATURE)
        net = net_class.from_pretrained(folder, variant="fp16", dtype=torch.float32)
        return net.requires_grad_(False)

    return load


@pytest.fixture(scope="module")
def stock(nets):
    """Return a function of settings to stock latents; `controls` are type, scale, start and end."""
    vae = diffusers.AutoencoderKL.from_pretrained(
        FOLDER / "vae", variant="fp16", dtype=torch.float32
    )

    @functools.cache
    def base(model: str):
        spec = MODELS[model]
        name = "StableDiffusionXL" if spec.architecture is Architecture.SDXL else "StableDiffusion"
        return getattr(diffusers, f"{name}Pipeline").from_pretrained(
            cache.ensure(spec.weights, Edition.MINIATURE),
            vae=vae,
            variant="fp16",
            dtype=torch.float32,
        )

    def draw(folder, model, mode, scheduler, controls, **changes):
        spec = MODELS[model]
        xl = spec.architecture is Architecture.SDXL
        entries = [CONTROLNETS[kind].weights[spec.base_model] for kind, *_ in controls]
        chosen = [nets(entry) for entry in entries]
        maps = [Image.open(folder / f"{kind}.png") for kind, *_ in controls]
        scales, starts, ends = ([control[k] for control in controls] for k in (1, 2, 3))
        if len(controls) == 1:
            scales, starts, ends = scales[0], starts[0], ends[0]
        given = maps[0] if len(maps) == 1 else maps
        arguments = {"control_guidance_start": starts, "control_guidance_end": ends}
        arguments |= {"controlnet_conditioning_scale": scales}
        net = chosen[0] if len(chosen) == 1 else diffusers.MultiControlNetModel(chosen)
        if xl:
            arguments["control_mode"] = [CONTROLNETS[kind].union_index for kind, *_ in controls]
            given = maps
            if len(maps) > 1:
                net = diffusers.models.MultiControlNetUnionModel(chosen)
        arguments |= {"control_image" if xl or mode != "txt2img" else "image": given}
        if mode != "txt2img":
            arguments |= {"image": Image.open(folder / "image.png"), "strength": 0.6}
        if mode == "inpaint":
            arguments |= {"mask_image": Image.open(folder / "mask.png")}
        if mode != "img2img":
            arguments |= {"width": 128, "height": 128}
        name = "StableDiffusionXLControlNetUnion" if xl else "StableDiffusionControlNet"
        components = {k: v for k, v in base(model).components.items() if k != "image_encoder"}
        pipeline_class = getattr(diffusers, f"{name}{NAMES[mode]}Pipeline")
        scheduler_class, overrides = REFERENCE_SCHEDULERS[scheduler]
        config = base(model).scheduler.config
        components["scheduler"] = scheduler_class.from_config(config, **overrides)
        settings = {"requires_safety_checker": False} if not xl else {}
        pipeline = pipeline_class(**components, controlnet=net, **settings)
        return for_inference(pipeline)(
            prompt=PROMPT,
            negative_prompt="",
            generator=torch.Generator("cpu").manual_seed(SEED),
            num_inference_steps=STEPS,
            output_type="latent",
            **{"guidance_scale": GUIDANCE, **arguments, **changes},
        ).images

    return draw


@pytest.fixture
def ours(make, folder):
    def draw(model, mode, scheduler, controls, **changes):
        requests = [
            ControlRequest(kind, folder / f"{kind}.png", scale, start, end, is_map=True)
            for kind, scale, start, end in controls
        ]
        if mode != "txt2img":
            changes |= {"image": folder / "image.png", "prompt_strength": 0.6}
        if mode == "inpaint":
            changes |= {"mask": folder / "mask.png", "mask_blur": 0}
        return make(
            model=model,
            prompt=PROMPT,
            seed=SEED,
            scheduler=scheduler,
            num_inference_steps=STEPS,
            **{"guidance_scale": GUIDANCE, **changes},
            controls=tuple(requests),
        ).latents

    return draw


def assert_same(ours: torch.Tensor, stock: torch.Tensor, without: torch.Tensor) -> None:
    assert ours.shape == stock.shape
    assert (ours - stock).abs().max() <= 1e-4
    assert (ours - without).abs().max() > 0.05  # the control has an effect


@pytest.mark.parametrize(
    ("mode", "scheduler"),
    [*((mode, "K_EULER") for mode in MODES), ("txt2img", "HeunDiscrete"), ("img2img", "PNDM")],
)
@pytest.mark.parametrize(
    ("model", "kind"),
    [("sdxl", "edge_canny"), ("sdxl", "depth_midas"), ("sd15", "edge_canny"), ("sd21", "scribble")],
)
def test_one_control(ours, stock, folder, model, kind, mode, scheduler):
    controls = [(kind, 0.8, 0.0, 1.0)]
    made = ours(model, mode, scheduler, controls)
    without = ours(model, mode, scheduler, [])
    assert_same(made, stock(folder, model, mode, scheduler, controls), without)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("model", "kinds"),
    [
        ("sdxl", ("segmentation", "normal_bae")),
        ("sdxl", ("edge_canny", "lineart")),  # of one index
        ("sd15", ("depth_midas", "segmentation")),
    ],
)
def test_two_controls_for_parts_of_the_steps(ours, stock, folder, model, kinds, mode):
    controls = [(kinds[0], 0.7, 0.0, 0.6), (kinds[1], 0.5, 0.2, 1.0)]
    made = ours(model, mode, "K_EULER", controls)
    without = ours(model, mode, "K_EULER", [])
    assert_same(made, stock(folder, model, mode, "K_EULER", controls), without)


@pytest.mark.parametrize("kind", ["scribble", "segmentation", "openpose"])
def test_every_index_of_the_union(ours, stock, folder, kind):
    controls = [(kind, 1.0, 0.0, 0.5)]
    made = ours("sdxl", "txt2img", "K_EULER", controls, guidance_scale=1.0)
    without = ours("sdxl", "txt2img", "K_EULER", [], guidance_scale=1.0)
    theirs = stock(folder, "sdxl", "txt2img", "K_EULER", controls, guidance_scale=1.0)
    assert_same(made, theirs, without)
