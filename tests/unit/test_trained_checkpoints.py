"""Whole models in one file: read as stock diffusers reads them, or refused with what they are."""

import math

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.helpers.trained_files import (
    NAME,
    checkpoint_tensors,
    raw_safetensors,
    read,
    sdxl_shapes,
    small_lora,
    tar_bytes,
)
from weights.errors import BadWeights
from weights.formats.checkpoint import build_checkpoint_key_map
from weights.formats.types import ModelShapes
from weights.miniature.architecture import build_vae, load_tokenizers
from weights.miniature.evaluate import FOLDER

UNET = "model.diffusion_model."
CLIP = "conditioner.embedders.0.transformer.text_model."
OPEN_CLIP = "conditioner.embedders.1.model."
FIRST = f"{UNET}input_blocks.0.0.weight"
WHOLE = [f"{CLIP}x"]  # one key of a text encoder is enough to ask for both


@pytest.fixture(scope="module")
def parts():
    """The miniature, changed a little in every parameter."""
    kinds = {
        "unet": UNet2DConditionModel,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    found = {
        part: kind.from_pretrained(FOLDER / part, variant="fp16", dtype=torch.float32)
        for part, kind in kinds.items()
    }
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for part in found.values():
            for parameter in part.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return found


@pytest.fixture(scope="module")
def shapes(parts):
    return ModelShapes.of(parts)


@pytest.fixture(scope="module")
def tensors(parts):
    return {key: value.contiguous() for key, value in checkpoint_tensors(parts).items()}


@pytest.fixture
def read_file(tmp_path, shapes):
    def read_file(tensors, metadata=None):
        path = tmp_path / "file.safetensors"
        save_file(tensors, path, metadata=metadata)
        return read(path, shapes)

    return read_file


def by_name(parts):
    return {
        f"{part}.{name}": parameter.detach()
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
    }


def assert_same(parameters, expected):
    assert parameters.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(parameters[key], expected[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_parameter_is_read(parts, tensors, read_file, dtype):
    weights = read_file(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    )
    expected = by_name(parts)
    assert_same(weights.parameters, {key: value.to(dtype) for key, value in expected.items()})
    assert weights.checkpoint
    assert not weights.lora
    assert not weights.embeddings
    assert weights.description == f"checkpoint, {len(expected)} parameters"


def test_it_differs_from_the_base_everywhere(parts):
    base = UNet2DConditionModel.from_pretrained(FOLDER / "unet", variant="fp16")
    changed = dict(parts["unet"].named_parameters())
    assert not any(torch.equal(value, changed[name]) for name, value in base.named_parameters())


def test_stock_diffusers_reads_the_same(tmp_path):
    """It tells the text encoders apart by their widths, which the miniature has equal."""
    torch.manual_seed(3)
    config = UNet2DConditionModel.load_config(FOLDER / "unet")
    config |= {"cross_attention_dim": 64 + 96, "projection_class_embeddings_input_dim": 6 * 32 + 96}
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 711}
    parts = {
        "unet": UNet2DConditionModel.from_config(config),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(hidden_size=64, intermediate_size=256, projection_dim=64, **sizes)
        ),
        "text_encoder_2": CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=96, intermediate_size=384, projection_dim=96, **sizes)
        ),
    }
    first, second = load_tokenizers(FOLDER)
    vae = build_vae()
    scheduler = EulerDiscreteScheduler.from_pretrained(FOLDER / "scheduler")
    stock = StableDiffusionXLPipeline(
        vae, tokenizer=first, tokenizer_2=second, scheduler=scheduler, **parts
    )
    stock.save_pretrained(tmp_path / "config")
    path = tmp_path / "file.safetensors"
    save_file({k: v.contiguous() for k, v in checkpoint_tensors(parts).items()}, path)
    loaded = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(tmp_path / "config"), local_files_only=True, vae=vae
    )
    theirs = by_name({part: getattr(loaded, part) for part in parts})
    assert_same(read(path, ModelShapes.of(parts)).parameters, theirs)
    assert_same(theirs, by_name(parts))


def sdxl_tensors():
    """What a file of the real model holds, without values."""
    places = build_checkpoint_key_map(sdxl_shapes(), WHOLE)
    return {
        key: torch.empty(place.shape(sdxl_shapes()), device="meta") for key, place in places.items()
    }


def test_the_real_models_names_are_those_of_diffusers_converters():
    tensors = sdxl_tensors()
    places = build_checkpoint_key_map(sdxl_shapes(), WHOLE)
    # sd_xl_base_1.0.safetensors has 2,515: 248 of the VAE, position_ids and logit_scale.
    assert len(tensors) == 2515 - 248 - 2
    config = {"layers_per_block": 2, "addition_embed_type": "text_time"}
    theirs = {
        "unet": single_file_utils.convert_ldm_unet_checkpoint(tensors, config),
        "text_encoder": single_file_utils.convert_ldm_clip_checkpoint(tensors),
        "text_encoder_2": single_file_utils.convert_open_clip_checkpoint(None, tensors, OPEN_CLIP),
    }
    theirs["text_encoder"] = {
        key.removeprefix("text_model."): value for key, value in theirs["text_encoder"].items()
    }
    found = {
        f"{part}.{name}": value for part, state in theirs.items() for name, value in state.items()
    }
    assert {key: tuple(value.shape) for key, value in found.items()} == sdxl_shapes().parameters
    for key, place in places.items():
        if len(place.parameters) == 1 and not place.transposed:
            assert found[place.parameters[0]] is tensors[key]


# From the header of sd_xl_base_1.0.safetensors.
REAL_NAMES = {
    f"{UNET}input_blocks.0.0.weight": "unet.conv_in.weight",
    f"{UNET}time_embed.2.bias": "unet.time_embedding.linear_2.bias",
    f"{UNET}label_emb.0.0.weight": "unet.add_embedding.linear_1.weight",
    f"{UNET}input_blocks.1.0.in_layers.0.weight": "unet.down_blocks.0.resnets.0.norm1.weight",
    f"{UNET}input_blocks.2.0.out_layers.3.bias": "unet.down_blocks.0.resnets.1.conv2.bias",
    f"{UNET}input_blocks.3.0.op.weight": "unet.down_blocks.0.downsamplers.0.conv.weight",
    f"{UNET}input_blocks.4.0.skip_connection.weight": (
        "unet.down_blocks.1.resnets.0.conv_shortcut.weight"
    ),
    f"{UNET}input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k.weight"
    ),
    f"{UNET}input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight": (
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight"
    ),
    f"{UNET}middle_block.1.norm.weight": "unet.mid_block.attentions.0.norm.weight",
    f"{UNET}middle_block.2.emb_layers.1.weight": "unet.mid_block.resnets.1.time_emb_proj.weight",
    f"{UNET}output_blocks.0.1.proj_in.weight": "unet.up_blocks.0.attentions.0.proj_in.weight",
    f"{UNET}output_blocks.2.2.conv.weight": "unet.up_blocks.0.upsamplers.0.conv.weight",
    f"{UNET}output_blocks.5.1.transformer_blocks.0.norm3.bias": (
        "unet.up_blocks.1.attentions.2.transformer_blocks.0.norm3.bias"
    ),
    f"{UNET}output_blocks.8.0.out_layers.0.weight": "unet.up_blocks.2.resnets.2.norm2.weight",
    f"{UNET}out.0.weight": "unet.conv_norm_out.weight",
    f"{UNET}out.2.bias": "unet.conv_out.bias",
    f"{CLIP}embeddings.token_embedding.weight": "text_encoder.embeddings.token_embedding.weight",
    f"{CLIP}encoder.layers.11.self_attn.k_proj.bias": (
        "text_encoder.encoder.layers.11.self_attn.k_proj.bias"
    ),
    f"{CLIP}final_layer_norm.weight": "text_encoder.final_layer_norm.weight",
    f"{OPEN_CLIP}positional_embedding": (
        "text_encoder_2.text_model.embeddings.position_embedding.weight"
    ),
    f"{OPEN_CLIP}token_embedding.weight": (
        "text_encoder_2.text_model.embeddings.token_embedding.weight"
    ),
    f"{OPEN_CLIP}transformer.resblocks.31.ln_1.weight": (
        "text_encoder_2.text_model.encoder.layers.31.layer_norm1.weight"
    ),
    f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_proj.bias": (
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2.bias"
    ),
    f"{OPEN_CLIP}transformer.resblocks.7.attn.out_proj.weight": (
        "text_encoder_2.text_model.encoder.layers.7.self_attn.out_proj.weight"
    ),
    f"{OPEN_CLIP}ln_final.bias": "text_encoder_2.text_model.final_layer_norm.bias",
    f"{OPEN_CLIP}text_projection": "text_encoder_2.text_projection.weight",
}


def test_real_names_are_known():
    places = build_checkpoint_key_map(sdxl_shapes(), WHOLE)
    assert {key: places[key].parameters for key in REAL_NAMES} == {
        key: (name,) for key, name in REAL_NAMES.items()
    }
    layer = "text_encoder_2.text_model.encoder.layers.31.self_attn"
    fused = places[f"{OPEN_CLIP}transformer.resblocks.31.attn.in_proj_weight"]
    assert fused.parameters == tuple(f"{layer}.{letter}_proj.weight" for letter in "qkv")
    assert fused.shape(sdxl_shapes()) == (3840, 1280)


def test_a_unet_alone_is_a_checkpoint_too(parts, tensors, read_file):
    weights = read_file({key: value for key, value in tensors.items() if key.startswith(UNET)})
    assert_same(weights.parameters, by_name({"unet": parts["unet"]}))
    assert weights.checkpoint
    assert weights.description == f"UNet of a checkpoint, {len(weights.parameters)} parameters"


def test_the_projection_may_be_a_linear_layers(parts, tensors, read_file):
    changed = dict(tensors)
    changed[f"{OPEN_CLIP}text_projection.weight"] = changed.pop(
        f"{OPEN_CLIP}text_projection"
    ).T.contiguous()
    assert_same(read_file(changed).parameters, by_name(parts))


def test_a_checkpoint_may_come_in_an_archive(tmp_path, tensors, shapes):
    path = tmp_path / "x.tar"
    members = {"model.safetensors": save(tensors)}
    path.write_bytes(tar_bytes(members))
    assert read(path, shapes).checkpoint
    path.write_bytes(tar_bytes(members | {"a.safetensors": small_lora()}))
    with pytest.raises(BadWeights, match="is the second LoRA, UNet or checkpoint"):
        read(path, shapes)


NINE = torch.zeros(32, 9, 3, 3)
NAN = torch.tensor([[float("nan")]])
REFUSED = {
    "a tensor missing": (
        {f"{UNET}out.0.bias": None},
        "without 1 of the 423 tensors that this model needs, the first"
        f" '{UNET}out.0.bias'. It is of a smaller model, or was saved in part",
    ),
    "a fused tensor missing": (
        {f"{OPEN_CLIP}transformer.resblocks.2.attn.in_proj_bias": None},
        "without 1 of the 423 tensors",
    ),
    "another shape": (
        {f"{CLIP}final_layer_norm.bias": torch.zeros(65)},
        "does not fit this model: 1 of 423 tensors, the first"
        f" '{CLIP}final_layer_norm.bias' with (65,) for (64,); it seems to be for a model that we"
        " do not know (its text is 128 wide)",
    ),
    "another fused shape": (
        {f"{OPEN_CLIP}transformer.resblocks.0.attn.in_proj_weight": torch.zeros(64, 64)},
        "with (64, 64) for (192, 64)",
    ),
    "another UNet": (
        {f"{UNET}time_embed.cond_proj.weight": torch.zeros(2, 2)},
        f"tensors of the UNet that this model lacks, the first '{UNET}time_embed.cond_proj",
    ),
    "inpainting": ({FIRST: NINE}, "a checkpoint for inpainting: its UNet has 9 input channels"),
    "instructions": ({FIRST: NINE[:, :8].clone()}, "for editing images by instructions"),
    "three channels": ({FIRST: NINE[:, :3].clone()}, "with (32, 3, 3, 3) for (32, 4, 3, 3)"),
    "v-prediction": (
        {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])},
        "a checkpoint with v-prediction, where Stable Diffusion XL predicts noise",
    ),
    "CosXL": ({"edm_vpred.sigma_max": torch.tensor(120.0)}, "v-prediction on EDM noise (CosXL)"),
    "Playground": ({"edm_mean": torch.zeros(4)}, "with EDM noise (Playground 2.5)"),
    "NaN": ({f"{CLIP}final_layer_norm.bias": NAN.expand(1, 64)[0].clone()}, "not finite"),
    "fp8": ({f"{UNET}out.2.bias": torch.zeros(4).to(torch.float8_e4m3fn)}, "of type F8_E4M3"),
    "refiner": (
        {f"conditioner.embedders.0.model.{name}": torch.zeros(2) for name in ("x", "logit_scale")},
        "a full checkpoint of the refiner of Stable Diffusion XL, of another family than this"
        " model, and cannot be used here",
    ),
}  # fmt: skip


def refusal(read_file, *content) -> str:
    with pytest.raises(BadWeights) as caught:
        read_file(*content)
    message = str(caught.value)
    assert message.startswith(NAME)
    assert message.endswith(".")
    return message


@pytest.mark.parametrize(("change", "fault"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_is_named(tensors, read_file, change, fault):
    changed = {key: value for key, value in (tensors | change).items() if value is not None}
    assert fault in refusal(read_file, changed)


@pytest.mark.parametrize("header", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_a_header_may_tell_v_prediction(tensors, read_file, header):
    assert "with v-prediction" in refusal(read_file, tensors, {header: "v"})
    assert read_file(tensors, {header: "epsilon"}).checkpoint


def test_a_marker_of_the_schedule_alone_is_no_v_prediction(tensors, read_file):
    assert read_file(tensors | {"ztsnr": torch.tensor([])}).checkpoint


def test_a_text_encoder_missing_is_all_of_it(tensors, read_file):
    changed = {key: value for key, value in tensors.items() if not key.startswith(OPEN_CLIP)}
    assert f"without 41 of the 423 tensors that this model needs, the first '{OPEN_CLIP}" in (
        refusal(read_file, changed)
    )


def small(*keys, shape=(4, 4)):
    return {key: torch.zeros(shape) for key in keys}


OTHERS = {
    "SD 1.5": (
        small("cond_stage_model.transformer.text_model.x", f"{UNET}out.2.weight"),
        "is a full checkpoint of Stable Diffusion 1.5, of another family than this model, and"
        " cannot be used here. Give a safetensors file",
    ),
    "SD 2": (small("cond_stage_model.model.x", f"{UNET}out.2.weight"), "of Stable Diffusion 2"),
    "SD 1.5's UNet": (
        small(f"{UNET}input_blocks.1.1.x.attn2.to_k.weight", f"{UNET}out.2.x", shape=(320, 768)),
        "it seems to be for Stable Diffusion 1.5 (its text is 768 wide)",
    ),
    "refiner's UNet": (
        small(f"{UNET}input_blocks.9.1.x.attn2.to_k.weight", f"{UNET}out.2.x", shape=(8, 1280)),
        "or the refiner of Stable Diffusion XL (its text is 1280 wide)",
    ),
    "FLUX": (
        small(f"{UNET}double_blocks.0.img_attn.proj.weight", "x"),
        "of a diffusion transformer (FLUX",
    ),
    "SD 3": (
        small(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight", "x"),
        "of a diffusion transformer (FLUX",
    ),
    "Wan": (small(f"{UNET}blocks.0.cross_attn.k.weight", "x"), "of a diffusion transformer"),
    "ControlNet": (small("control_model.x", f"{UNET}out.2.weight"), "is a ControlNet"),
    "text encoders": (small(f"{CLIP}x", f"{OPEN_CLIP}y"), "is a text encoder, and cannot be used"),
    "VAE": (small("first_stage_model.x", "first_stage_model.y"), "is a VAE"),
}


@pytest.mark.parametrize(("tensors", "fault"), OTHERS.values(), ids=OTHERS)
def test_other_models_are_named(read_file, tensors, fault):
    with pytest.raises(BadWeights) as caught:
        read_file(tensors)
    assert str(caught.value).startswith(NAME)
    assert fault in str(caught.value)


def sparse_file(path, tensors):
    """A file of these shapes in fp16 that takes no room on the disk."""
    header, end = {}, 0
    for key, value in tensors.items():
        size = 2 * math.prod(value.shape)
        header[key] = {
            "dtype": "F16",
            "shape": list(value.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    start = raw_safetensors(header)
    with path.open("wb") as file:
        file.write(start)
        file.truncate(len(start) + end)
    return path


def test_a_large_file_is_refused_by_its_header(tmp_path, shapes, monkeypatch):
    monkeypatch.setattr(
        "weights.formats.safetensors_checks.safe_open", lambda *_, **__: pytest.fail("it was read")
    )
    tensors = sdxl_tensors()
    path = sparse_file(tmp_path / "x.safetensors", tensors)
    with pytest.raises(BadWeights, match="it seems to be for Stable Diffusion XL"):
        read(path, shapes)
    del tensors[f"{UNET}out.0.bias"]
    path = sparse_file(tmp_path / "y.safetensors", tensors)
    with pytest.raises(BadWeights, match="without 1 of the 2265 tensors"):
        read(path, sdxl_shapes())


def test_the_miniatures_checkpoint_is_none_of_sdxl(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    with pytest.raises(BadWeights, match="tensors of the UNet that this model lacks"):
        read(path, sdxl_shapes())


def test_one_copy_is_held(tensors, read_file):
    """The parts of a fused tensor, and the projection, lie in what was read."""
    parameters = read_file(tensors).parameters
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn"
    q, k = (parameters[f"{layer}.{letter}_proj.weight"] for letter in "qk")
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
