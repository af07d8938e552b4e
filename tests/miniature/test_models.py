"""Every base model: the same numbers as stock diffusers at equal settings, in every mode."""

import copy
import functools

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save

from generation.base_models import BASE_MODELS, Architecture, GuidanceMode
from generation.errors import InvalidRequest
from generation.sizes import Margins
from tests.helpers.comparison import max_difference
from tests.miniature.reference_pipelines import (
    REFERENCE_SCHEDULERS,
    File,
    assert_same,
    for_inference,
    lora_file,
    rows,
    with_word,
)
from weights import cache
from weights.catalog import CATALOG, Edition
from weights.formats.types import ModelShapes
from weights.miniature.evaluate import FOLDER
from weights.miniature.world import place, render

MODELS = BASE_MODELS[Edition.MINIATURE]
SD = ["sd15", "sd21"]
FEW_STEPS = [name for name, spec in MODELS.items() if spec.steps]
STOCK_CLASS = {
    Architecture.SDXL: "StableDiffusionXLPipeline",
    Architecture.SD: "StableDiffusionPipeline",
}
KINDS = {"txt2img": "", "img2img": "Img2Img", "inpaint": "Inpaint"}  # in the classes' names
PROMPT, SEED, STEPS, GUIDANCE = "a large red circle on a blue background", 5, 8, 6.0
BOX = (32, 40, 96, 88)  # on the grid of 8x8 pixels that latents have


def merge(unet, name: str) -> None:
    """Add a miniature's LoRA to a UNet: W + up @ down, as its alphas are its ranks."""
    (file,) = cache.ensure(name, Edition.MINIATURE).glob("*.safetensors")
    tensors = load_file(file)
    modules = {path.replace(".", "_"): module for path, module in unet.named_modules()}
    keys = {key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    for key in keys:
        weight = modules[key.removeprefix("lora_unet_")].weight
        down, up = (tensors[f"{key}.lora_{half}.weight"].float() for half in ("down", "up"))
        assert tensors[f"{key}.alpha"] == len(down)
        weight.data += (up.flatten(1) @ down.flatten(1)).view_as(weight)


@pytest.fixture(scope="module")
def stock():
    """Return a function that builds the stock pipeline of a model, mode and scheduler."""
    vae = diffusers.AutoencoderKL.from_pretrained(
        FOLDER / "vae", variant="fp16", dtype=torch.float32
    )

    @functools.cache
    def load(name: str):
        spec = MODELS[name]
        pipeline = getattr(diffusers, STOCK_CLASS[spec.architecture]).from_pretrained(
            cache.ensure(spec.weights, Edition.MINIATURE),
            vae=vae,
            variant="fp16",
            dtype=torch.float32,
        )
        if spec.adapter:
            merge(pipeline.unet, spec.adapter)
        return pipeline

    def build(name: str, mode: str = "txt2img", scheduler: str | None = None):
        spec, components = MODELS[name], load(name).components
        scheduler_class, overrides = REFERENCE_SCHEDULERS[scheduler or spec.scheduler]
        config = type(components["scheduler"]).load_config(
            cache.ensure(spec.weights, Edition.MINIATURE) / "scheduler"
        )
        if spec.guidance is GuidanceMode.NONE:
            config["timestep_spacing"] = "trailing"  # as their authors recommend
        pipeline_class = STOCK_CLASS[spec.architecture].replace(
            "Pipeline", f"{KINDS[mode]}Pipeline"
        )
        pipeline = getattr(diffusers, pipeline_class)(
            **{**components, "scheduler": scheduler_class.from_config(config, **overrides)},
            **({"requires_safety_checker": False} if spec.architecture is Architecture.SD else {}),
        )
        return for_inference(pipeline)

    return build


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    scene = place("square", "yellow", "green", "medium", "center", np.random.default_rng(3))
    render(scene, 128, 128).save(folder / "image.png")
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((*BOX[:2], BOX[2] - 1, BOX[3] - 1), fill=255)
    mask.save(folder / "mask.png")
    return folder


def compare(stock, make, files, name: str, mode: str, scheduler: str | None, **settings):
    """Return the largest difference between the stock pipeline's latents and ours."""
    strength = 0.75
    request = {"prompt": PROMPT, "seed": SEED, "scheduler": scheduler, "model": name, **settings}
    arguments = {
        "prompt": PROMPT,
        "generator": [torch.Generator("cpu").manual_seed(SEED)],
        "output_type": "latent",
        **settings,
    }
    if mode != "img2img":
        arguments |= {"width": 128, "height": 128}
    if mode != "txt2img":
        image = Image.open(files / "image.png").convert("RGB")
        arguments |= {"image": image, "strength": strength}
        request |= {"image": files / "image.png", "prompt_strength": strength}
    if mode == "inpaint":
        arguments |= {"mask_image": Image.open(files / "mask.png")}
        # Without it the pipeline draws for an image that it never uses (test_parity_modes.py).
        arguments |= {"masked_image_latents": torch.zeros(1, 4, 16, 16)}
        request |= {"mask": files / "mask.png", "mask_blur": 0}
    latents = stock(name, mode, scheduler)(**arguments).images
    ours = make(**request).latents
    inside = np.s_[:, :, BOX[1] // 8 : BOX[3] // 8, BOX[0] // 8 : BOX[2] // 8]
    part = inside if mode == "inpaint" else ...
    return (ours[part] - latents[part]).abs().max()


@pytest.mark.parametrize("name", SD)
@pytest.mark.parametrize(
    ("mode", "scheduler"),
    [
        *(("txt2img", scheduler) for scheduler in ("DDIM", "PNDM", "K_EULER", "DPM++ 2M")),
        *((mode, None) for mode in ("img2img", "inpaint")),
    ],
)
def test_equal_to_the_stock_pipeline(stock, make, files, name, scheduler, mode):
    settings = {
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "negative_prompt": "green",
    }
    assert compare(stock, make, files, name, mode, scheduler, **settings) < 1e-4


@pytest.mark.parametrize("name", FEW_STEPS)
@pytest.mark.parametrize("mode", KINDS)
def test_distilled_models_are_equal_to_the_stock_pipeline(stock, make, files, name, mode):
    spec = MODELS[name]
    settings = {"num_inference_steps": 4, "guidance_scale": spec.guidance_scale}
    assert compare(stock, make, files, name, mode, None, **settings) < 1e-4


@pytest.mark.parametrize("name", ["sdxl-lcm", "sd15-lcm"])
@pytest.mark.parametrize("scheduler", ["LCM", "TCD"])
def test_a_little_guidance_with_lcm(stock, make, files, name, scheduler):
    settings = {"num_inference_steps": 3, "guidance_scale": 1.5, "negative_prompt": "green"}
    assert compare(stock, make, files, name, "txt2img", scheduler, **settings) < 1e-4


@pytest.mark.parametrize("name", ["sdxl-turbo", "sd-turbo"])
def test_one_step_of_turbo(stock, make, files, name):
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0}
    assert compare(stock, make, files, name, "txt2img", None, **settings) < 1e-4


def test_embedded_guidance_changes_the_image(make):
    low, high = (
        make(model="lcm-dreamshaper", num_inference_steps=4, guidance_scale=g).latents
        for g in (2.0, 14.0)
    )
    assert (low - high).abs().max() > 0.1


@pytest.mark.parametrize("name", SD)
def test_clip_skip_reads_an_earlier_layer_behind_the_last_norm(stock, make, name):
    """As the stock pipeline would, were its clip_skip compatible with transformers 5."""
    pipeline = stock(name, scheduler="K_EULER")
    texts = pipeline.tokenizer(
        [PROMPT, ""], padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    with torch.inference_mode():
        states = pipeline.text_encoder(texts, output_hidden_states=True).hidden_states[-2]
        states = pipeline.text_encoder.final_layer_norm(states)
    latents = pipeline(
        prompt_embeds=states[:1],
        negative_prompt_embeds=states[1:],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="latent",
    ).images
    request = {"model": name, "scheduler": "K_EULER", "num_inference_steps": STEPS, "seed": SEED}
    request |= {"prompt": PROMPT, "guidance_scale": GUIDANCE}
    assert (make(**request, clip_skip=2).latents - latents).abs().max() < 1e-4
    assert (make(**request).latents - latents).abs().max() > 0.1


def test_files_name_the_model(make):
    request = {"model": "sd15", "clip_skip": 2, "num_inference_steps": 2, "embed_parameters": True}
    parameters = make(**request).images[0].info["parameters"]
    assert "Sampler: Euler, CFG scale: 7.5, " in parameters
    assert "Model: sd15, Clip skip: 2, " in parameters


@pytest.mark.parametrize("name", SD)
def test_long_and_weighted_prompts(make, name):
    request = {"model": name, "seed": 1, "num_inference_steps": 4}
    plain = make(**request, prompt="a red circle").latents
    heavy = make(**request, prompt="a (red:1.4) circle").latents
    long = make(**request, prompt="a red circle, " + "very nice, " * 60).latents
    skipped = make(**request, prompt="a (red:1.4) circle", clip_skip=2).latents
    for other in (heavy, long, skipped):
        assert torch.isfinite(other).all()
        assert (other - plain).abs().max() > 0.01


def kohya_lora(pipeline) -> dict[str, torch.Tensor]:
    """Return a LoRA of the UNet's attention and the text encoder, with SD's key names."""
    generator = torch.Generator().manual_seed(3)
    parts = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    tensors = {}
    for name, (out, into, *_) in ModelShapes.of(parts).modules().items():
        part, path = name.split(".", 1)
        if name.endswith(("to_k", "to_out.0", "fc1")):
            key = f"lora_{'unet' if part == 'unet' else 'te'}_{path.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = 0.15 * torch.randn(4, into, generator=generator)
            tensors[f"{key}.lora_up.weight"] = 0.15 * torch.randn(out, 4, generator=generator)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    return tensors


@pytest.mark.parametrize("name", ["sd15", "sd15-lcm", "sd21", "sd-turbo"])
def test_a_users_lora_works_beside_the_models_lora(stock, make, name):
    spec = MODELS[name]
    pipeline = stock(name)
    # A copy: what is loaded into a stock pipeline stays in its modules.
    parts = {k: copy.deepcopy(v) if k != "vae" else v for k, v in pipeline.components.items()}
    pipeline = type(pipeline)(**parts, requires_safety_checker=False)
    pipeline = for_inference(pipeline)
    tensors = kohya_lora(pipeline)
    steps = 4 if spec.steps else STEPS
    arguments = {"num_inference_steps": steps, "guidance_scale": spec.guidance_scale}

    def draw():
        generator = torch.Generator("cpu").manual_seed(SEED)
        return pipeline(PROMPT, generator=generator, output_type="latent", **arguments).images

    without = draw()
    pipeline.load_lora_weights(dict(tensors), adapter_name="mine")
    pipeline.set_adapters("mine", 0.8)
    request = {"prompt": PROMPT, "model": name, "seed": SEED, "scheduler": None, **arguments}
    url = lora_file(tensors).url
    ours = make(**request, replicate_weights=url, lora_scale=0.8).latents
    assert_same(ours, draw(), without)
    assert (make(**request).latents - without).abs().max() < 1e-4
    assert (make(**request, loras=(url,), lora_scales=(0.8,)).latents - ours).abs().max() < 1e-4


def test_a_textual_inversion_for_a_model_of_one_text_encoder(stock, make):
    pipeline = stock("sd15", scheduler="K_EULER")
    parts = {k: copy.deepcopy(v) if k != "vae" else v for k, v in pipeline.components.items()}
    pipeline = type(pipeline)(**parts, requires_safety_checker=False)
    pipeline = for_inference(pipeline)
    vectors = rows(5)
    word = with_word("<thing>")
    arguments = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}

    def draw():
        generator = torch.Generator("cpu").manual_seed(SEED)
        return pipeline(word, generator=generator, output_type="latent", **arguments).images

    without = draw()
    pipeline.load_textual_inversion({"<thing>": vectors})
    request = {"model": "sd15", "seed": SEED, "scheduler": "K_EULER", **arguments}
    content = save({"emb_params": vectors})
    url = File("thing.safetensors", content).url
    ours = make(**request, prompt=with_word("thing"), replicate_weights=url).latents
    assert_same(ours, draw(), without)


@pytest.mark.parametrize("name", MODELS)
def test_every_mode_works(make, files, name):
    common = {"model": name, "num_inference_steps": 2}
    request = {**common, "image": files / "image.png"}
    assert make(**request).images[0].size == (128, 128)
    assert make(**request, mask=files / "mask.png").images[0].size == (128, 128)
    assert make(**request, outpaint=Margins(16, 0, 8, 0)).images[0].size == (152, 128)
    small = {"width": 64, "height": 64}
    assert make(**common, **small, hires_fix=1.5).images[0].size == (96, 96)


def test_sixteen_images_at_once_each_by_its_own_seed(make):
    request = {"prompt": PROMPT, "model": "sdxl-turbo", "num_inference_steps": 2}
    together = make(**request, num_outputs=16, seed=40)
    assert len(set(together.bytes)) == 16
    alone = make(**request, seed=55)
    assert max_difference(together.images[15], alone.images[0]) <= 1


def test_the_catalog_has_every_entry_of_the_models():
    for edition, models in BASE_MODELS.items():
        for name, spec in models.items():
            assert name == spec.name
            named = {spec.weights, *spec.components_from.values()} | ({spec.adapter} - {None})
            assert named <= set(CATALOG[edition])


def test_invalid_requests_are_rejected(make):
    with pytest.raises(InvalidRequest, match="model 'sd3' is not known; choose one of sdxl, sdx"):
        make(model="sd3")
    with pytest.raises(InvalidRequest, match="refine is base_image_refiner, but sd15 has no refin"):
        make(model="sd15", refine="base_image_refiner")
    with pytest.raises(InvalidRequest, match="clip_skip is 3; with sd15 it must be from 1 to 2"):
        make(model="sd15", clip_skip=3)
    with pytest.raises(InvalidRequest, match="clip_skip is 2; with sdxl it must be 1"):
        make(clip_skip=2)
