"""Every format of trained weights, through the whole engine: equal to stock diffusers with it.

The files are written by diffusers and PEFT themselves, or built by hand as their trainers write
them. Latents before decoding are compared.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.trained_files import (
    WIDTH,
    cog_lora_tensors,
    kohya_name,
    kohya_tensors,
    tar_bytes,
    zip_bytes,
)
from tests.miniature.reference_pipelines import (
    KOHYA_CONVOLUTIONS,
    KOHYA_TEXT,
    KOHYA_UNET,
    PARTS,
    File,
    assert_same,
    copy_of,
    draw,
    lora_file,
    modules_of,
    weak,
)

# LoRAs that diffusers saved

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *ATTENTION,
    *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def train(model: nn.Module, **options: object) -> None:
    """Leave a LoRA in the model as a training does, but a random one; `options` are PEFT's."""
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 4, **options}))
    randomise(model)


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand(parameter.shape, generator=generator)


def save_with_diffusers(pipeline, folder: Path, rename: bool, header: bool) -> File:
    """As diffusers' training scripts do at their end; PEFT's options go into the header."""
    layers = {}
    for part in PARTS:
        module = getattr(pipeline, part)
        if not hasattr(module, "peft_config"):
            continue
        state = get_peft_model_state_dict(module, adapter_name="default")
        layers[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(state) if rename else state
        if header:
            layers[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(folder, **layers)
    name = "pytorch_lora_weights.safetensors"
    return File(name, (folder / name).read_bytes())


UNET_ONLY = {"unet": {"target_modules": ATTENTION}}
ALL_PARTS = {
    "unet": {
        "target_modules": ATTENTION,
        "lora_alpha": 6,
        "rank_pattern": {"attn2.to_k": 2, "attn1.to_v": 3},
        "alpha_pattern": {"attn1.to_q": 1},
    },
    "text_encoder": {"target_modules": TEXT, "lora_alpha": 8},
    "text_encoder_2": {"target_modules": [*TEXT, "fc1"], "r": 3, "lora_alpha": 1},
}
DORA = {"unet": {"target_modules": ATTENTION, "use_dora": True, "lora_alpha": 6}}
SAVED = {  # options by part, whether diffusers renames, whether the header has the options
    "UNet": (UNET_ONLY, True, False),
    "UNet, PEFT names": (UNET_ONLY, False, False),
    "ranks": (
        {"unet": {"target_modules": ATTENTION, "rank_pattern": {"attn2.to_k": 2}}},
        *(True, False),
    ),
    "alpha": ({"unet": {"target_modules": ATTENTION, "lora_alpha": 10}}, True, True),
    "rank-stabilised": ({"unet": {"target_modules": ATTENTION, "use_rslora": True}}, True, True),
    "DoRA": (DORA, True, True),
    "all parts": (ALL_PARTS, True, True),
    "all parts, PEFT names": (ALL_PARTS, False, True),
}


@pytest.mark.parametrize(("options", "rename", "header"), SAVED.values(), ids=SAVED)
def test_saved_by_diffusers(
    stock, pristine, adapted, plain, tmp_path_factory, options, rename, header
):
    folder = tmp_path_factory.mktemp("lora")
    trained = copy_of(pristine)
    for part, peft_options in options.items():
        train(getattr(trained, part), **peft_options)
    file = save_with_diffusers(trained, folder, rename, header)
    stock.load_lora_weights(folder, adapter_name="x")
    stock.set_adapters("x", 0.7)
    assert_same(adapted(file, 0.7), draw(stock), plain())


def test_two_namings_in_one_file_of_diffusers(stock, adapted, plain, tmp_path_factory):
    """convert_state_dict_to_diffusers renames the attention's matrices alone.

    load_lora_weights tells the naming by the first tensor and drops those of the other, so the
    reference is the model that was saved.
    """
    train(stock.unet, target_modules=EVERYTHING)
    folder = tmp_path_factory.mktemp("lora")
    file = save_with_diffusers(stock, folder, rename=True, header=False)
    names = load_file(folder / file.name)
    for end in ("attn1.to_q.lora.down.weight", "proj_in.lora_A.weight"):
        assert any(name.endswith(end) for name in names)
    assert_same(adapted(file), draw(stock), plain())


def old_names() -> dict[str, Tensor]:
    """diffusers until 0.20: attention of the UNet and of both text encoders."""
    tensors = {f"unet.{key}": value for key, value in cog_lora_tensors().items()}
    generator = torch.Generator().manual_seed(1)
    for part in PARTS[1:]:
        for layer in range(3):
            for matrix in ("to_q", "to_k", "to_v", "to_out"):
                key = f"{part}.text_model.encoder.layers.{layer}.self_attn.{matrix}_lora"
                tensors[f"{key}.down.weight"] = torch.randn(4, WIDTH, generator=generator)
                tensors[f"{key}.up.weight"] = torch.randn(WIDTH, 4, generator=generator)
    return weak(tensors)


def test_diffusers_old_names(stock, adapted, plain):
    tensors = old_names()
    stock.load_lora_weights(tensors, adapter_name="x")
    stock.set_adapters("x", 0.8)
    assert_same(adapted(lora_file(tensors), 0.8), draw(stock), plain())


# PEFT's folder, packed

PEFT = {
    "alpha": {"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2}, "rank_pattern": {"to_v": 2}},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 6},
    "DoRA": {"use_dora": True, "target_modules": EVERYTHING, "lora_alpha": 2},
}


@pytest.mark.parametrize(("scale", "pack"), [(1.0, zip_bytes), (-0.6, tar_bytes)])
@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT)
def test_pefts_folder(stock, pristine, adapted, plain, tmp_path_factory, options, scale, pack):
    """Stock is PEFT itself: diffusers does not read its folder."""
    folder = tmp_path_factory.mktemp("peft")
    config = LoraConfig(**{"r": 4, "target_modules": ATTENTION, **options})
    trained = get_peft_model(copy.deepcopy(pristine.unet), config)
    randomise(trained)
    trained.save_pretrained(folder)
    members = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= members.keys()
    PeftModel.from_pretrained(stock.unet, folder)  # in place
    with rescale_adapter_scale(stock.unet, scale):
        expected = draw(stock)
    assert_same(adapted(File("adapter", pack(members)), scale), expected, plain())


# kohya

LOCON = KOHYA_UNET + KOHYA_CONVOLUTIONS
KOHYA = {  # modules, alpha, sgm names
    "UNet": (KOHYA_UNET, 2.0, True),
    "no alpha": (KOHYA_UNET, None, True),
    "all parts": (KOHYA_UNET + KOHYA_TEXT, 2.0, True),
    "all parts, diffusers names": (KOHYA_UNET + KOHYA_TEXT, 2.0, False),
    "LoCon": (LOCON, 3.0, True),
    "LoCon, diffusers names": (LOCON, 3.0, False),
}


@pytest.mark.parametrize(("modules", "alpha", "sgm"), KOHYA.values(), ids=KOHYA)
def test_kohya(stock, adapted, plain, modules, alpha, sgm):
    tensors = weak(kohya_tensors(modules, alpha=alpha, sgm=sgm))
    stock.load_lora_weights(tensors)
    assert_same(adapted(lora_file(tensors)), draw(stock), plain())


@pytest.mark.parametrize("scale", [0.35, -0.5, 2.0])
def test_kohya_at_any_scale(stock, adapted, plain, scale):
    tensors = weak(kohya_tensors(KOHYA_UNET + KOHYA_TEXT))
    stock.load_lora_weights(tensors, adapter_name="x")
    stock.set_adapters("x", scale)
    assert_same(adapted(lora_file(tensors), scale), draw(stock), plain())


def test_kohyas_dora(stock, adapted, plain):
    """diffusers leaves `dora_scale` out, but reads the same numbers under PEFT's names."""
    tensors = weak(kohya_tensors(LOCON, alpha=None))
    state = {}
    for module in LOCON:
        name = kohya_name(module, sgm=True)
        weight = stock.unet.get_submodule(module.removeprefix("unet.")).weight.detach()
        magnitude = 1.2 * weight.flatten(1).norm(dim=1)
        tensors[f"{name}.dora_scale"] = magnitude.view(-1, *(1,) * (weight.ndim - 1))
        state |= {
            f"{module}.lora_A.weight": tensors[f"{name}.lora_down.weight"],
            f"{module}.lora_B.weight": tensors[f"{name}.lora_up.weight"],
            f"{module}.lora_magnitude_vector": (
                magnitude if weight.ndim == 2 else magnitude.view(1, -1, 1, 1)
            ),
        }
    stock.load_lora_weights(state)
    assert_same(adapted(lora_file(tensors)), draw(stock), plain())


def test_lycoris_middle_matrices(stock, adapted, plain):
    """diffusers cannot read them: the convolutions are run one after another, as LyCORIS does."""
    tensors = {}
    generator = torch.Generator().manual_seed(4)
    for module in modules_of("conv1", "conv2"):
        convolution = stock.unet.get_submodule(module.removeprefix("unet."))
        out, in_ = convolution.weight.shape[:2]
        down, mid, up = (
            0.15 * torch.randn(shape, generator=generator)
            for shape in ((4, in_, 1, 1), (4, 4, 3, 3), (out, 4, 1, 1))
        )
        name = kohya_name(module, sgm=True)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_mid.weight": mid,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(8.0),
        }
        convolution.register_forward_hook(_one_after_another(down, mid, up, 8 / 4))
    assert_same(adapted(lora_file(tensors)), draw(stock), plain())


def _one_after_another(down: Tensor, mid: Tensor, up: Tensor, factor: float) -> Callable:
    convolve = nn.functional.conv2d

    def hook(module, inputs, output):
        return output + factor * convolve(convolve(convolve(inputs[0], down), mid, padding=1), up)

    return hook
