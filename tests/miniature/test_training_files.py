"""A training's files draw what the trained model itself drew: here, and in stock diffusers."""

from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file
from torch import Tensor

from generation.adapters import Adapter
from generation.lora import LoraMerger
from tests.helpers.archives import tar_members
from tests.miniature.pipeline_components import from_pipeline, to_pipeline
from tests.miniature.test_training import (
    CPU,
    QUICK,
    Recorder,
    small_examples,
    with_own_unet,
)
from training import export, loop
from training.config import TRAINABLE_MODELS, LoraFormat, Method
from training.model import TrainableModel, load
from weights.catalog import Edition
from weights.formats.read import read_trained
from weights.formats.types import ModelShapes
from weights.miniature.evaluate import FOLDER, load_pipeline
from weights.trigger_words import replace_trigger_words

PROMPT = "a red TOK on a blue background"
TOLERANCE = 1e-3  # of latents
STRONG = replace(QUICK, max_train_steps=3, lora_lr=0.02, ti_lr=0.02, lr_warmup_steps=0)
METHODS = {
    "lora": STRONG,
    "lora, half its rank as alpha": replace(STRONG, lora_alpha=2.0),
    "rsLoRA": replace(STRONG, use_rslora=True),
    "DoRA": replace(STRONG, use_dora=True, lora_format=LoraFormat.KOHYA),
    "text encoders": replace(STRONG, train_text_encoder=True, lora_format=LoraFormat.KOHYA),
    "word": replace(STRONG, method=Method.TEXTUAL_INVERSION, lora_rank=None),
    "full": replace(STRONG, method=Method.FULL, lora_rank=None, unet_learning_rate=1e-3),
}


@dataclass(frozen=True)
class Made:
    """A training's files, and what its own model drew at the end."""

    files: export.ExportedFiles
    latents: Tensor


@pytest.fixture(scope="module")
def model() -> TrainableModel:
    return load(TRAINABLE_MODELS[Edition.MINIATURE], Edition.MINIATURE, CPU, Method.LORA)


@pytest.fixture(scope="module", params=METHODS)
def made(request, model, tmp_path_factory) -> Made:
    """One training for each method, with what it drew itself."""
    folder = tmp_path_factory.mktemp("made")
    own = with_own_unet(model)
    drawn = []

    def generate(components, prompts):
        drawn.append(draw(to_pipeline(components), prompts[0]))
        return []

    config = replace(METHODS[request.param], exchange_files=True, preview_prompts=(PROMPT,))
    trained = loop.fit(small_examples(), (), config, own, folder, Recorder(), generate)
    return Made(export.write(trained, own, 4, folder), drawn[-1])


def draw(parts, prompt: str) -> Tensor:
    scheduler = EulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler")
    pipeline = StableDiffusionXLPipeline(**{**parts, "scheduler": scheduler}, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt,
        num_inference_steps=3,
        height=64,
        width=64,
        output_type="latent",
        generator=torch.Generator("cpu").manual_seed(3),
    ).images


@pytest.fixture(scope="module")
def stock() -> StableDiffusionXLPipeline:
    return load_pipeline(FOLDER)


def test_a_prediction_draws_what_the_training_drew(made, stock):
    components = from_pipeline(stock)
    shapes = ModelShapes.of(components.adaptable())
    weights = read_trained(made.files.archive, "replicate_weights", shapes)
    prompt = replace_trigger_words(PROMPT, weights.trigger_words)
    merger = LoraMerger(components)
    with torch.inference_mode():
        without = draw(stock.components, "a red circle on a blue background")
        with merger.applied([Adapter(weights, 1.0)]) as tokenizers:
            latents = draw(to_pipeline(components, tokenizers), prompt)
    tolerance = 5e-2 if weights.parameters else TOLERANCE  # a whole UNet is in fp16
    assert (latents - made.latents).abs().max() < tolerance
    assert (latents - without).abs().max() > 0.1


def test_stock_diffusers_draws_it_too(made, request):
    """With kohya's LoRA and clip_l/clip_g, and told to pool at the end token."""
    name = request.node.callspec.params["made"]
    if name in ("DoRA", "full"):
        pytest.skip("diffusers drops dora_scale; a whole UNet is in the archive alone")
    pipeline = load_pipeline(FOLDER)
    word, *loras = made.files.exchange
    vectors = load_file(word)
    tokens = ["<s0>", "<s1>"]
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            vectors[key],
            token=tokens,
            text_encoder=getattr(pipeline, f"text_encoder{number}"),
            tokenizer=getattr(pipeline, f"tokenizer{number}"),
        )
    for lora in loras:
        pipeline.load_lora_weights(str(lora))
    assert bool(loras) == (name != "word")
    pipeline.text_encoder_2.text_model.eos_token_id = pipeline.tokenizer_2.eos_token_id
    latents = draw(pipeline.components, PROMPT.replace("TOK", "".join(tokens)))
    assert (latents - made.latents).abs().max() < TOLERANCE


def test_diffusers_draws_from_the_archive_s_lora(made, stock, request):
    """Its names with "unet." before them: how cog-sdxl's files are loaded elsewhere."""
    if "lora" not in request.node.callspec.params["made"]:
        pytest.skip("for cog-sdxl's format")
    lora = tar_members(made.files.archive)["lora.safetensors"]
    state = {f"unet.{k}": v for k, v in load_tensors(lora).items()}
    components = from_pipeline(stock)
    shapes = ModelShapes.of(components.adaptable())
    weights = read_trained(made.files.archive, "replicate_weights", shapes)
    with torch.inference_mode(), LoraMerger(components).applied([Adapter(weights, 1.0)]):
        ours = draw(stock.components, "a red circle")
    pipeline = load_pipeline(FOLDER)
    pipeline.load_lora_weights(state)
    assert (draw(pipeline.components, "a red circle") - ours).abs().max() < TOLERANCE
