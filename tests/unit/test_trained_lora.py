"""LoRA files in every naming that trainers use become the same deltas; unfit ones are refused."""

import json

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from tests.helpers.trained_files import (
    ATTN1,
    ATTN2,
    CONV,
    NAME,
    change,
    cog_lora_tensors,
    kohya_name,
    kohya_tensors,
    matrices,
    miniature_shapes,
    model_parts,
    read,
    read_tensors,
    sdxl_shapes,
)
from weights.errors import BadWeights
from weights.formats.key_map import build_key_map, to_sgm
from weights.formats.types import Pooling
from weights.miniature.architecture import build_text_encoders, build_unet

TO_Q = f"unet.{ATTN1}.to_q"


def expected(tensors, name, alpha, shape):
    down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
    flat = up.double().flatten(1) @ down.double().flatten(1)
    return (alpha / down.shape[0] * flat).reshape(shape)


@pytest.mark.parametrize("sgm", [True, False], ids=["sgm", "diffusers"])
def test_kohya_names_reach_every_module_of_the_three_parts(tmp_path, sgm):
    modules = miniature_shapes().modules()
    tensors = kohya_tensors(modules, sgm=sgm)
    weights = read_tensors(tmp_path, tensors)
    assert weights.lora.keys() == modules.keys()
    for module, delta in weights.lora.items():
        want = expected(tensors, kohya_name(module, sgm), 2.0, modules[module])
        torch.testing.assert_close(change(delta), want)
    style = "sgm" if sgm else "diffusers"
    assert weights.description == (
        f"kohya LoRA ({style} names), with convolutions, rank 4, {len(modules)} modules"
    )
    assert weights.pooling is Pooling.EOS
    assert not weights.parameters
    assert not weights.checkpoint
    assert not weights.embeddings


# From files in the wild (kohya's sd-scripts on SDXL; A1111's and ComfyUI's documentation).
KNOWN_NAMES = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
    "lora_unet_input_blocks_8_1_proj_in": "unet.down_blocks.2.attentions.1.proj_in",
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
        "unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj"
    ),
    "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
        "unet.up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0"
    ),
    "lora_unet_input_blocks_4_0_skip_connection": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_output_blocks_2_2_conv": "unet.up_blocks.0.upsamplers.0.conv",
    "lora_unet_output_blocks_8_0_emb_layers_1": "unet.up_blocks.2.resnets.2.time_emb_proj",
    "lora_unet_middle_block_2_out_layers_3": "unet.mid_block.resnets.1.conv2",
    "lora_unet_label_emb_0_2": "unet.add_embedding.linear_2",
    "lora_unet_out_2": "unet.conv_out",
    "lora_te1_text_model_encoder_layers_11_mlp_fc1": "text_encoder.encoder.layers.11.mlp.fc1",
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": (
        "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj"
    ),
    "lora_te2_text_projection": "text_encoder_2.text_projection",
    "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": (
        "text_encoder.encoder.layers.3.self_attn.q_proj"
    ),
    "text_encoder_2.text_model.encoder.layers.3.self_attn.to_out": (
        "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj"
    ),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out": (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    ),
    "base_model.model.mid_block.attentions.0.proj_out": "unet.mid_block.attentions.0.proj_out",
    "diffusion_model.middle_block.1.proj_in": "unet.mid_block.attentions.0.proj_in",
    "lycoris_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
}  # fmt: skip


def test_names_from_files_in_the_wild_on_the_real_sdxl():
    spellings = build_key_map(sdxl_shapes().modules())
    assert {name: spellings[name].module for name in KNOWN_NAMES} == KNOWN_NAMES


def test_the_real_sdxl_has_as_many_modules_as_kohya_trains():
    modules = sdxl_shapes().modules()
    transformer = [m for m in modules if m.startswith("unet.") and ".attentions." in m]
    assert len(transformer) == 722
    assert sum(m.startswith("text_encoder.encoder.layers") for m in modules) == 72
    assert sum(m.startswith("text_encoder_2.text_model.encoder.layers") for m in modules) == 192


def test_unet_names_agree_with_diffusers_converters_on_the_real_sdxl():
    modules = [m for m in sdxl_shapes().modules() if m.startswith("unet.")]

    class Config:
        layers_per_block = 2

    # One mistake of theirs: two modules under one wrong name, of which one is then lost.
    known = {False: {"unet.add.embedding.linear"}, True: set()}
    for sgm in (True, False):
        names = {m: m.removeprefix("unet.") for m in modules}
        tensors = {}
        for module, path in names.items():
            name = "lora_unet_" + (to_sgm(path, 2) if sgm else path).replace(".", "_")
            number = torch.tensor([[float(modules.index(module))]])
            tensors |= {f"{name}.lora_down.weight": number, f"{name}.lora_up.weight": number}
        converted, _ = _convert_non_diffusers_lora_to_diffusers(
            _maybe_map_sgm_blocks_to_diffusers(tensors, Config)
        )
        theirs = {
            key.split(".lora")[0]: modules[int(number)]
            for key, number in convert_unet_state_dict_to_peft(converted).items()
        }
        assert {key for key, module in theirs.items() if key != module} == known[sgm]


@pytest.fixture
def own_unet():
    torch.manual_seed(1)
    return build_unet()


def train_with_peft(model, **options):
    """Random matrices in a PEFT adapter; its own idea of each module's change."""
    model.add_adapter(LoraConfig(init_lora_weights=False, **options))
    return {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {})
    }


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]
CONFIGS = {
    "alpha is the rank": {"r": 4, "lora_alpha": 4},
    "alpha is half the rank": {"r": 4, "lora_alpha": 2},
    "rank-stabilised": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 4,
        "alpha_pattern": {"attn1.to_q": 1, f"{ATTN2}.to_k": 12},
        "rank_pattern": {"attn2.to_v": 2},
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("as_diffusers", [True, False], ids=["diffusers names", "PEFT names"])
def test_what_diffusers_saves_is_what_peft_computes(tmp_path, own_unet, config, as_diffusers):
    deltas = train_with_peft(own_unet, target_modules=ATTENTION, **config)
    state = get_peft_model_state_dict(own_unet)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(state) if as_diffusers else state,
        unet_lora_adapter_metadata=own_unet.peft_config["default"].to_dict(),
    )
    weights = read(tmp_path / "pytorch_lora_weights.safetensors")
    assert weights.lora.keys() == {f"unet.{name}" for name in deltas}
    for name, delta in deltas.items():
        torch.testing.assert_close(change(weights.lora[f"unet.{name}"]).float(), delta)


def test_text_encoders_that_diffusers_saved(tmp_path):
    torch.manual_seed(2)
    encoders = dict(zip(("text_encoder", "text_encoder_2"), build_text_encoders(100), strict=True))
    deltas, layers = {}, {}
    for part, encoder in encoders.items():
        found = train_with_peft(
            encoder,
            r=3,
            lora_alpha=6,
            target_modules=["q_proj", "out_proj", "fc1"],
            alpha_pattern={"layers.1.self_attn.q_proj": 1},
        )
        deltas |= {f"{part}.{name}": delta for name, delta in found.items()}
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(
            get_peft_model_state_dict(encoder)
        )
        layers[f"{part}_lora_adapter_metadata"] = encoder.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers)
    weights = read(tmp_path / "pytorch_lora_weights.safetensors")
    assert weights.lora.keys() == deltas.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(change(weights.lora[name]).float(), delta)


def test_a_unets_own_saver_writes_no_part(tmp_path, own_unet):
    deltas = train_with_peft(own_unet, r=2, lora_alpha=8, target_modules=["to_q"])
    own_unet.save_lora_adapter(tmp_path)
    weights = read(tmp_path / "pytorch_lora_weights.safetensors")
    for name, delta in deltas.items():
        torch.testing.assert_close(change(weights.lora[f"unet.{name}"]).float(), delta)


def test_without_a_header_alpha_is_the_rank(tmp_path):
    weights = read_tensors(tmp_path, kohya_tensors([TO_Q], rank=5, alpha=None))
    assert weights.lora[TO_Q].alpha == 5.0
    assert weights.lora[TO_Q].rank == 5


def test_a_file_from_cog_sdxl_is_what_diffusers_reads_too(tmp_path, own_unet):
    tensors = cog_lora_tensors()
    weights = read_tensors(tmp_path, tensors)
    assert weights.description == f"cog-sdxl LoRA, rank 4, {len(tensors) // 2} modules"
    own_unet.load_lora_adapter(dict(tensors), prefix=None, adapter_name="default")
    theirs = {
        f"unet.{name}": module.get_delta_weight("default")
        for name, module in own_unet.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    assert weights.lora.keys() == theirs.keys()
    for name, delta in theirs.items():
        torch.testing.assert_close(change(weights.lora[name]).float(), delta.detach())


def apply_dora(weight, delta):
    """LoraDelta's own words, for the whole weight."""
    merged = weight.double() + change(delta)
    over = [i for i, side in enumerate(delta.dora_scale.shape) if side == 1]
    return (
        merged
        / torch.linalg.vector_norm(merged, dim=over, keepdim=True)
        * delta.dora_scale.double()
    )


def test_dora_from_peft_merges_as_peft_does(tmp_path, own_unet):
    plain = {name: p.detach().clone() for name, p in own_unet.named_parameters()}
    own_unet.add_adapter(
        LoraConfig(r=4, lora_alpha=2, use_dora=True, init_lora_weights=False,
                   target_modules=["to_q", "conv1"])
    )  # fmt: skip
    for name, parameter in own_unet.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.5
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(own_unet),
        unet_lora_adapter_metadata=own_unet.peft_config["default"].to_dict(),
    )
    weights = read(tmp_path / "pytorch_lora_weights.safetensors")
    assert "DoRA" in weights.description
    for name, module in own_unet.named_modules():
        if hasattr(module, "get_delta_weight"):
            module.merge()
            ours = apply_dora(plain[f"{name}.weight"], weights.lora[f"unet.{name}"])
            torch.testing.assert_close(ours.float(), module.base_layer.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("module", [TO_Q, f"unet.{CONV}", f"unet.{ATTN2}.to_k"])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_doras_axis_is_told_by_its_shape(tmp_path, module, axis):
    out, in_, *sides = miniature_shapes().modules()[module]
    ones = (1,) * len(sides)
    shape = (out, 1, *ones) if axis == "output" else (1, in_, *ones)
    tensors = kohya_tensors([module])
    tensors[f"{kohya_name(module, True)}.dora_scale"] = torch.rand(shape) + 1
    delta = read_tensors(tmp_path, tensors).lora[module]
    assert tuple(delta.dora_scale.shape) == shape


def test_a_middle_matrix_is_folded_in(tmp_path):
    module = f"unet.{CONV}"
    out, in_, kh, kw = miniature_shapes().modules()[module]
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(4, in_, 1, 1, generator=generator)
    mid = torch.randn(4, 4, kh, kw, generator=generator)
    up = torch.randn(out, 4, 1, 1, generator=generator)
    name = kohya_name(module, True)
    weights = read_tensors(tmp_path, {
        f"{name}.lora_down.weight": down, f"{name}.lora_mid.weight": mid,
        f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(4.0),
    })  # fmt: skip
    conv = torch.nn.functional.conv2d
    image = torch.randn(1, in_, 8, 8, generator=generator)
    steps = conv(conv(conv(image, down), mid, padding=1), up)
    whole = conv(image, change(weights.lora[module]).float(), padding=1)
    torch.testing.assert_close(whole, steps, rtol=1e-3, atol=1e-3)


def test_a_linear_layer_saved_as_a_convolution_and_the_reverse(tmp_path):
    shortcut = "unet.down_blocks.1.resnets.0.conv_shortcut"
    tensors = kohya_tensors([TO_Q, shortcut])
    flat = {
        key: value.flatten(1) if kohya_name(shortcut, True) in key and value.ndim else value
        for key, value in tensors.items()
    }
    for key in list(flat):
        if kohya_name(TO_Q, True) in key and flat[key].ndim:
            flat[key] = flat[key][:, :, None, None]
    weights = read_tensors(tmp_path, flat)
    for module in (TO_Q, shortcut):
        want = expected(
            tensors, kohya_name(module, True), 2.0, miniature_shapes().modules()[module]
        )
        torch.testing.assert_close(change(weights.lora[module]), want)


def test_ranks_and_integer_alphas_may_differ_by_module(tmp_path):
    other = f"unet.{ATTN2}.to_k"
    tensors = kohya_tensors([TO_Q], rank=2) | kohya_tensors([other], rank=6, alpha=None)
    tensors[f"{kohya_name(other, True)}.alpha"] = torch.tensor(6, dtype=torch.int64)
    weights = read_tensors(tmp_path, tensors)
    assert {weights.lora[TO_Q].alpha, weights.lora[other].alpha} == {2.0, 6.0}
    assert "rank 2 to 6" in weights.description


def test_tensors_outlive_the_file_and_keep_its_dtype(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {key: value.half() for key, value in kohya_tensors([TO_Q]).items()}
    save_file(tensors, path)
    delta = read(path).lora[TO_Q]
    path.write_bytes(b"")
    assert delta.down.dtype is torch.float16
    assert torch.equal(delta.down, tensors[f"{kohya_name(TO_Q, True)}.lora_down.weight"])


# What is wrong → (tensors, a part of the message).
NAME_Q = kohya_name(TO_Q, True)
DOWN, UP = matrices(miniature_shapes().modules()[TO_Q], 4)


def lora(**tensors):
    """A LoRA of one module, with tensors replaced, added or (None) left out."""
    whole = {"lora_down_weight": DOWN, "lora_up_weight": UP, "alpha": torch.tensor(4.0), **tensors}
    return {
        f"{NAME_Q}.{key.replace('_weight', '.weight')}": value
        for key, value in whole.items()
        if value is not None
    }


def named(*names, suffix=".lora_down.weight"):
    return {f"{name}{suffix}": torch.ones(4, 8) for name in names} | {
        f"{name}{suffix.replace('down', 'up')}": torch.ones(8, 4) for name in names
    }


UNFIT = {
    "no up": (lora(lora_up_weight=None), "has no up matrix"),
    "no down": (lora(lora_down_weight=None), "has no down matrix"),
    "alpha alone": (lora(lora_up_weight=None, lora_down_weight=None), "has no down matrix"),
    "other ranks": (lora(lora_up_weight=UP[:, :3].contiguous()), "do not belong together"),
    "vector": (lora(lora_down_weight=torch.ones(4)), "do not belong together"),
    "scalar": (lora(lora_down_weight=torch.tensor(1.0)), "do not belong together"),
    "five dimensions": (lora(lora_down_weight=DOWN[..., None, None, None]), "belong together"),
    "wide alpha": (lora(alpha=torch.ones(2)), "2 values for alpha"),
    "integers": (lora(lora_down_weight=torch.ones(4, 64, dtype=torch.int32)), "of type I32"),
    "fp8": (lora(lora_down_weight=DOWN.to(torch.float8_e4m3fn)), "of type F8_E4M3"),
    "nan": (lora(lora_down_weight=DOWN * torch.nan), "not finite"),
    "nan alpha": (lora(alpha=torch.tensor(torch.nan)), "not finite"),
    "infinity": (lora(lora_up_weight=(UP / 0).bfloat16()), "not finite"),
    "empty": (lora(lora_down_weight=torch.ones(0, 64)), "is empty"),
    "wide input": (lora(lora_down_weight=torch.ones(4, 65)), "1 of 1 modules, the first"),
    "magnitude": (lora(dora_scale=torch.ones(5, 1)), "DoRA magnitude (5, 1)"),
    "magnitude scalar": (lora(dora_scale=torch.tensor(1.0)), "DoRA magnitude ()"),
    "middle": (lora(lora_mid_weight=torch.ones(4, 4, 3, 3)), "middle matrix"),
    "middle scalar": (lora(lora_mid_weight=torch.tensor(1.0)), "middle matrix"),
    "said twice": (
        lora() | {f"unet.{ATTN1}.to_q.lora_A.weight": DOWN},
        "two tensors for a matrix",
    ),
    "stray tensor": (lora() | {"strange": DOWN}, "a LoRA with other tensors in it: 'strange'"),
    "on embeddings": (
        named("lora_te1_text_model_embeddings_token_embedding"),
        "1 of 1 modules that this model lacks",
    ),
    "SD 1.5": (
        {
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
            f".lora_{side}.weight": torch.ones(shape)
            for side, shape in (("down", (4, 768)), ("up", (320, 4)))
        },
        "it seems to be for Stable Diffusion 1.5",
    ),
    "SDXL on the miniature": (
        {
            f"unet.{ATTN2}.to_k.lora_{side}.weight": torch.ones(shape)
            for side, shape in (("A", (4, 2048)), ("B", (640, 4)))
        },
        "it seems to be for Stable Diffusion XL",
    ),
    "FLUX, kohya": (named("lora_unet_double_blocks_0_img_attn_proj"), "FLUX"),
    "FLUX, diffusers": (
        named("transformer.single_transformer_blocks.0.attn.to_q", suffix=".lora.down.weight"),
        "FLUX",
    ),
    "SD 3": (named("lora_unet_joint_blocks_0_x_block_attn_qkv"), "Stable Diffusion 3"),
    "Qwen-Image": (
        named("transformer.transformer_blocks.0.attn.to_q", suffix=".lora.down.weight"),
        "a diffusion transformer",
    ),
    "Wan": (named("diffusion_model.blocks.0.cross_attn.k"), "Wan"),
    "LoHa": ({f"{NAME_Q}.hada_w1_a": DOWN, f"{NAME_Q}.alpha": torch.tensor(1.0)}, "LoHa"),
    "LoKr": ({f"{NAME_Q}.lokr_w1": DOWN, f"{NAME_Q}.lokr_w2_a": DOWN}, "LoKr"),
    "OFT": ({f"{NAME_Q}.oft_blocks": DOWN, f"{NAME_Q}.alpha": torch.tensor(1.0)}, "OFT"),
    "full difference": (lora() | {"lora_unet_out_0.diff_b": DOWN}, "full differences"),
    "ControlNet": (
        {"controlnet_cond_embedding.conv_in.weight": DOWN, "conv_in.weight": DOWN},
        "a ControlNet",
    ),
    "control-lora": ({"lora_controlnet": DOWN, "input_blocks.0.0.up": DOWN}, "a ControlNet"),
    "IP-Adapter": ({"image_proj.proj.weight": DOWN, "ip_adapter.1.x": DOWN}, "an IP-Adapter"),
    "VAE": ({"encoder.down_blocks.0.x": DOWN, "decoder.up_blocks.0.y": DOWN}, "is a VAE"),
    "FLUX": (
        {"double_blocks.0.img_attn.proj.weight": DOWN, "img_in.weight": DOWN},
        "is a diffusion transformer, and cannot be used here",
    ),
    "text encoder": (
        {"text_model.encoder.layers.0.x": DOWN, "text_model.embeddings.y": DOWN},
        "is a text encoder, and cannot be used here",
    ),
    "nothing known": ({"weight": DOWN, "bias": UP}, "tensors of no known kind: 'bias', 'weight'"),
}


@pytest.mark.parametrize(("tensors", "fault"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_named(tmp_path, tensors, fault):
    with pytest.raises(BadWeights) as caught:
        read_tensors(tmp_path, tensors)
    message = str(caught.value)
    assert message.startswith(NAME)
    assert fault in message
    assert message.endswith(".")
    assert str(tmp_path) not in message


PEFT_HEADERS = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "text alpha": json.dumps({"unet.lora_alpha": "4"}),
    "infinite alpha": '{"unet.lora_alpha": Infinity}',
    "huge alpha": json.dumps({"unet.lora_alpha": 10**400}),
    "patterns list": json.dumps({"unet.alpha_pattern": [1]}),
    "slow pattern": json.dumps({"unet.alpha_pattern": {"(a+)+$": 1}}),
}


@pytest.mark.parametrize("header", PEFT_HEADERS.values(), ids=PEFT_HEADERS)
def test_a_hostile_peft_header_is_refused(tmp_path, header):
    tensors = {f"unet.{ATTN1}.to_q.lora_A.weight": DOWN, f"unet.{ATTN1}.to_q.lora_B.weight": UP}
    with pytest.raises(BadWeights, match=f"{NAME}: header entry lora_adapter_metadata"):
        read_tensors(tmp_path, tensors, metadata={"lora_adapter_metadata": header})


def test_an_sdxl_lora_fits_sdxl_and_not_the_miniature(tmp_path):
    down, up = matrices(sdxl_shapes().modules()[f"unet.{ATTN2}.to_k"], 2)
    path = tmp_path / "x.safetensors"
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    weights = read(path, sdxl_shapes())
    assert weights.lora.keys() == {f"unet.{ATTN2}.to_k"}
    with pytest.raises(BadWeights, match="1 of 1 modules that this model lacks"):
        read(path, miniature_shapes())


def test_a_unet_may_be_whole_or_in_part(tmp_path):
    state = {key: value.half() for key, value in model_parts()["unet"].state_dict().items()}
    assert read_tensors(tmp_path, state).parameters.keys() == {f"unet.{key}" for key in state}
    part = {key: state[key] for key in list(state)[:7]}
    weights = read_tensors(tmp_path, part)
    assert all(torch.equal(weights.parameters[f"unet.{key}"], part[key]) for key in part)
    assert not weights.checkpoint
    assert weights.description == "UNet, 7 parameters"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"conv_in.bias": torch.ones(33)}, "1 of 2 parameters, the first 'conv_in.bias'"),
        ({"mid_block.strange": torch.ones(3)}, "1 of 3 parameters that this model lacks"),
        ({"conv_in.bias": torch.ones(32, dtype=torch.int64)}, "of type I64"),
        ({f"{ATTN2}.to_k.weight": torch.ones(640, 2048)}, "for Stable Diffusion XL"),
    ],
)
def test_a_unet_of_another_shape_is_refused(tmp_path, change, fault):
    state = model_parts()["unet"].state_dict()
    part = {key: state[key] for key in ("conv_in.weight", "conv_in.bias")} | change
    with pytest.raises(BadWeights, match=fault):
        read_tensors(tmp_path, part)
