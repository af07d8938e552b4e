"""Adapters combined, in every mode and on a checkpoint: equal to stock diffusers."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_open_clip_checkpoint,
)
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save, save_file

from generation.base_models import MINIATURE_SDXL
from generation.engine import Engine
from tests.helpers.trained_files import checkpoint_tensors, kohya_tensors, tar_bytes
from tests.miniature.reference_pipelines import (
    COG_ARCHIVE,
    COG_LORA,
    COG_MEMBERS,
    KOHYA_TEXT,
    KOHYA_UNET,
    PARTS,
    READ,
    TOKENS,
    TYPED,
    File,
    assert_same,
    copy_of,
    draw,
    for_inference,
    load_cog,
    load_words,
    lora_file,
    pool_at_the_end,
    rows,
    seeded,
    weak,
    with_word,
)
from weights import cache
from weights.catalog import Edition
from weights.miniature.evaluate import FOLDER
from weights.miniature.world import place, render

KOHYA = weak(kohya_tensors(KOHYA_UNET + KOHYA_TEXT))

# Several at once


def test_two_loras(stock, adapted, plain):
    other = {f"unet.{name}": value for name, value in COG_LORA.items()}
    stock.load_lora_weights(KOHYA, adapter_name="first")
    stock.load_lora_weights(other, adapter_name="second")
    stock.set_adapters(["first", "second"], [0.7, -0.4])
    expected = draw(stock)
    first, second = lora_file(KOHYA), lora_file(other)
    made = adapted(first, 0.7, loras=(second.url,), lora_scales=(-0.4,))
    assert_same(made, expected, plain())
    made = adapted(None, loras=(first.url, second.url), lora_scales=(0.7, -0.4))
    assert_same(made, expected, plain())


def test_a_lora_and_a_textual_inversion(stock, adapted, plain):
    first, second = rows(10), rows(11)
    stock.load_lora_weights(KOHYA)
    load_words(stock, first, second, TOKENS)
    pool_at_the_end(stock)
    words = File("cat.safetensors", save({"clip_l": first, "clip_g": second}))
    typed = with_word("cat")
    made = adapted(None, loras=(lora_file(KOHYA).url, words.url), prompt=typed)
    assert_same(made, draw(stock, READ), plain(typed))


def test_two_archives_with_words(stock, adapted, plain):
    """Both files call their tokens <s0> and <s1>."""
    load_cog(stock, 0.8)
    words = {"text_encoders_0": rows(14), "text_encoders_1": rows(15)}
    load_words(stock, *words.values(), ["<t0>", "<t1>"])
    members = COG_MEMBERS | {
        "lora.safetensors": save({name: value * 0 for name, value in COG_LORA.items()}),
        "embeddings.pti": save(words),
        "special_params.json": b'{"ZWX": "<s0><s1>"}',
    }
    other = File("trained_model.tar", tar_bytes(members))
    typed = "a large TOK circle on a ZWX background"
    expected = draw(stock, "a large <s0><s1> circle on a <t0><t1> background")
    assert_same(adapted(COG_ARCHIVE, 0.8, loras=(other.url,), prompt=typed), expected, plain(typed))


# Other modes: they use the extended tokenizers and the merged weights too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    scene = place("square", "yellow", "green", "medium", "center", np.random.default_rng(3))
    render(scene, 64, 64).save(folder / "small.png")
    render(scene, 128, 128).save(folder / "native.png")
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((32, 40, 95, 87), fill=255)  # on the 8x8 pixels of a latent
    mask.save(folder / "mask.png")
    return folder


def test_image_to_image(stock, pristine, adapted, folder):
    load_cog(stock, 0.8)
    path = folder / "small.png"

    def repaint(pipeline, prompt):
        pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**pipeline.components)
        image = Image.open(path).convert("RGB")
        return draw(
            for_inference(pipeline), prompt, image=image, strength=0.8, num_inference_steps=4
        )

    source = {"image": path, "prompt_strength": 0.8, "num_inference_steps": 4}
    made = adapted(COG_ARCHIVE, 0.8, **source, prompt=TYPED)
    assert_same(made, repaint(stock, READ), repaint(pristine, TYPED))


def test_inpainting(stock, pristine, adapted, folder):
    load_cog(stock, 0.8)
    path, mask = folder / "native.png", folder / "mask.png"
    settings = {"width": 128, "height": 128, "num_inference_steps": 4}

    def repaint(pipeline, prompt):
        pipeline = diffusers.StableDiffusionXLInpaintPipeline(**pipeline.components)
        images = {"image": Image.open(path).convert("RGB"), "mask_image": Image.open(mask)}
        return draw(for_inference(pipeline), prompt, **images, **settings, strength=0.8)

    source = {"image": path, "mask": mask, "mask_blur": 0, "prompt_strength": 0.8}
    made = adapted(COG_ARCHIVE, 0.8, **source, **settings, prompt=TYPED)
    assert_same(made, repaint(stock, READ), repaint(pristine, TYPED))


def test_refiner(stock, pristine, adapted):
    load_cog(stock, 0.8)
    weights = cache.ensure(MINIATURE_SDXL.refiner.weights, Edition.MINIATURE)

    def draw_and_refine(pipeline, prompt):
        refiner = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(
            weights,
            vae=pipeline.vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=pipeline.text_encoder_2,
            tokenizer_2=pipeline.tokenizer_2,
            variant="fp16",
            dtype=torch.float32,
            add_watermarker=False,
        )
        settings = {"generator": seeded(), "num_inference_steps": 5}
        latents = draw(pipeline, prompt, denoising_end=0.6, **settings)
        return draw(for_inference(refiner), prompt, image=latents, denoising_start=0.6, **settings)

    refine = {"refine": "expert_ensemble_refiner", "high_noise_frac": 0.6, "num_inference_steps": 5}
    made = adapted(COG_ARCHIVE, 0.8, **refine, prompt=TYPED)
    assert_same(made, draw_and_refine(stock, READ), draw_and_refine(pristine, TYPED))


# A whole checkpoint


@pytest.fixture(scope="module")
def checkpoint(pristine, tmp_path_factory):
    """Another model in a single file; the stock pipeline that diffusers' converters make of it."""
    other = copy_of(pristine)
    generator = torch.Generator().manual_seed(6)
    for part in PARTS:
        for parameter in getattr(other, part).parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    path = tmp_path_factory.mktemp("checkpoint") / "another model.safetensors"
    save_file(checkpoint_tensors({part: getattr(other, part) for part in PARTS}), path)
    stock = copy_of(pristine)
    stock.unet = diffusers.UNet2DConditionModel.from_single_file(
        str(path), config=str(FOLDER), subfolder="unet", dtype=torch.float32, local_files_only=True
    )
    # from_single_file of a text encoder knows the file's two by their widths, here the same.
    tensors = load_file(path)
    first = convert_ldm_clip_checkpoint(tensors)
    del first["text_model.embeddings.position_ids"]  # a buffer in older versions of transformers
    first = {name.removeprefix("text_model."): value for name, value in first.items()}
    stock.text_encoder.load_state_dict(first)
    prefix = "conditioner.embedders.1.model."
    second = convert_open_clip_checkpoint(stock.text_encoder_2, tensors, prefix)
    stock.text_encoder_2.load_state_dict(second)
    return path, stock


def test_a_checkpoint_in_a_request(checkpoint, adapted, plain):
    path, base = checkpoint
    file = File(path.name, path.read_bytes())
    assert_same(adapted(file), draw(base), plain())
    on_top = copy_of(base)
    on_top.load_lora_weights(KOHYA)
    assert_same(adapted(file, loras=(lora_file(KOHYA).url,)), draw(on_top), draw(base))


def test_a_checkpoint_of_the_operator(checkpoint, adapted, plain):
    path, base = checkpoint
    engine = Engine(Edition.MINIATURE, "cpu")
    engine.load(str(path))
    assert_same(adapted(None, engine=engine), draw(base), plain())
    on_top = copy_of(base)
    load_cog(on_top, 0.8)
    made = adapted(COG_ARCHIVE, 0.8, engine=engine, prompt=TYPED)
    assert_same(made, draw(on_top, READ), draw(base, TYPED))
    assert_same(adapted(None, engine=engine), draw(base), plain())  # and nothing is left of that
