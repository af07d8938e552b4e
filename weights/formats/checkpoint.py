"""Read a whole SDXL model from one safetensors file, as civitai and Stability publish it.

The names are those of Stability-AI/generative-models, whose second text encoder is OpenCLIP's. As
with LoRAs, the table of names is made from the model itself: diffusers' converters
(loaders/single_file_utils.py) are private, and leave out silently what they do not find.

The VAE in the file is not used: all of SDXL shares one latent space, and the container's own VAE is
the one that keeps within fp16. Copies for training (model_ema) and noise tables are ignored too.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from weights.errors import BadWeights
from weights.formats.detect import ANOTHER_MODEL, guess_family
from weights.formats.key_map import layers_per_block, to_sgm
from weights.formats.safetensors_checks import SafetensorsFile
from weights.formats.types import TEXT_ENCODERS, UNET, ModelShapes
from weights.messages import quote

_UNET_PREFIX = "model.diffusion_model."
_ENCODERS_PREFIX = "conditioner.embedders."
_CLIP_PREFIX = "conditioner.embedders.0.transformer.text_model."
_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."
_PROJECTION = "text_projection.weight"
_FIRST_CONVOLUTION = ("unet.conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight")

# transformers' names → OpenCLIP's, in this order (open_clip, src/open_clip/transformer.py).
_OPEN_CLIP_NAMES = (
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm.", "ln_final."),
    ("encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".self_attn.q_proj.", ".attn.in_proj_"),
)
_PURPOSE_OF_CHANNELS = {8: "editing images by instructions", 9: "inpainting"}
# Tensors and header entries by which ComfyUI knows (comfy/supported_models.py, SDXL.model_type).
_OTHER_PREDICTIONS = {
    "v_pred": "v-prediction",
    "edm_vpred.sigma_max": "v-prediction on EDM noise (CosXL)",
    "edm_mean": "EDM noise (Playground 2.5)",
}
_PREDICTION_HEADERS = ("modelspec.prediction_type", "modelspec.predict_key")


@dataclass(frozen=True)
class Target:
    """The parameters of the model that a tensor of the file holds."""

    parameters: tuple[str, ...]  # several: the tensor is theirs one above the other
    transposed: bool

    def shape(self, shapes: ModelShapes) -> tuple[int, ...]:
        """Return the shape that the tensor has in a file."""
        first, *rest = shapes.parameters[self.parameters[0]]
        return (*rest, first) if self.transposed else (len(self.parameters) * first, *rest)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters' names and values, which are views of the tensor."""
        values = (tensor.T,) if self.transposed else tensor.chunk(len(self.parameters))
        return zip(self.parameters, values, strict=True)


def is_checkpoint(keys: Iterable[str]) -> bool:
    """Return whether the tensors' names are those of a checkpoint, or of its UNet alone."""
    return any(key.startswith(_UNET_PREFIX) for key in keys)


def read_checkpoint(file: SafetensorsFile, shapes: ModelShapes) -> dict[str, Tensor]:
    """Return the parameters of the UNet and, if the file has any text encoder, of both.

    Raises BadWeights unless they are exactly the model's. The header decides, before a tensor is
    read; only NaN and infinity are found later.
    """
    _refuse_other_purpose(file, shapes)
    targets = build_checkpoint_key_map(shapes, file.tensors)
    _check(file, targets, shapes)
    tensors = file.read(targets)
    return {
        name: value for key, target in targets.items() for name, value in target.split(tensors[key])
    }


def build_checkpoint_key_map(shapes: ModelShapes, keys: Iterable[str]) -> dict[str, Target]:
    """Return the names that a file with `keys` must have for this model → their parameters."""
    keys = set(keys)
    encoders = any(key.startswith(_ENCODERS_PREFIX) for key in keys)
    layers = layers_per_block(shapes.parameters)
    targets: dict[str, Target] = {}
    for name in shapes.parameters:
        part, path = name.split(".", 1)
        if part == UNET:
            module, _, kind = path.rpartition(".")
            key, target = f"{_UNET_PREFIX}{to_sgm(module, layers)}.{kind}", Target((name,), False)
        elif not encoders:
            continue
        elif part == TEXT_ENCODERS[0]:
            key, target = _CLIP_PREFIX + path.removeprefix("text_model."), Target((name,), False)
        elif ".k_proj." in path or ".v_proj." in path:  # in one tensor with q_proj
            continue
        else:
            key, target = _open_clip_target(name, keys)
        assert key not in targets, f"{key} is both {targets[key].parameters} and {name}"
        targets[key] = target
    return targets


def _open_clip_target(name: str, keys: set[str]) -> tuple[str, Target]:
    path = name.split(".", 1)[1].removeprefix("text_model.")
    if path == _PROJECTION:
        # As a linear layer's, in files by diffusers' script convert_diffusers_to_original_sdxl.py.
        if (linear := _OPEN_CLIP_PREFIX + _PROJECTION) in keys:
            return linear, Target((name,), False)
        return linear.removesuffix(".weight"), Target((name,), True)
    for ours, theirs in _OPEN_CLIP_NAMES:
        path = path.replace(ours, theirs)
    fused = ("q_proj", "k_proj", "v_proj") if ".q_proj." in name else ("",)
    names = tuple(name.replace("q_proj", each) for each in fused)
    return _OPEN_CLIP_PREFIX + path, Target(names, False)


def _refuse_other_purpose(file: SafetensorsFile, shapes: ModelShapes) -> None:
    """Refuse what has the model's tensors, or nearly, but is sampled in another way."""
    ours, theirs = _FIRST_CONVOLUTION
    expected = shapes.parameters[ours][1]
    info = file.tensors.get(theirs)
    channels = info.shape[1] if info and len(info.shape) == 4 else expected
    if channels != expected and channels in _PURPOSE_OF_CHANNELS:
        raise BadWeights(
            f"{file.subject} is a checkpoint for {_PURPOSE_OF_CHANNELS[channels]}: its UNet has"
            f" {channels} input channels, and this model {expected}. Use one for text to image."
        )
    prediction = next((what for key, what in _OTHER_PREDICTIONS.items() if key in file.tensors), "")
    if any(file.metadata.get(key, "").startswith("v") for key in _PREDICTION_HEADERS):
        prediction = prediction or _OTHER_PREDICTIONS["v_pred"]
    if prediction:
        raise BadWeights(
            f"{file.subject} is a checkpoint with {prediction}, where Stable Diffusion XL predicts"
            " noise: its images would be wrong. Use one with noise prediction (epsilon)."
        )


def _check(file: SafetensorsFile, targets: Mapping[str, Target], shapes: ModelShapes) -> None:
    """Raise BadWeights unless the UNet has these tensors alone, and all are there and fit."""
    unet = [key for key in file.tensors if key.startswith(_UNET_PREFIX)]
    unknown = [key for key in unet if key not in targets]
    if unknown:
        raise BadWeights(
            f"{file.subject} is a checkpoint with {len(unknown)} of {len(unet)} tensors of the UNet"
            f" that this model lacks, the first {quote(unknown[0])}{guess_family(file.shapes)}."
            f" {ANOTHER_MODEL}."
        )
    missing = [key for key in targets if key not in file.tensors]
    if missing:
        raise BadWeights(
            f"{file.subject} is a checkpoint without {len(missing)} of the {len(targets)} tensors"
            f" that this model needs, the first {quote(missing[0])}. It is of a smaller model, or"
            " was saved in part: use the whole checkpoint."
        )
    expected = {key: target.shape(shapes) for key, target in targets.items()}
    bad = [key for key, shape in expected.items() if file.tensors[key].shape != shape]
    if bad:
        raise BadWeights(
            f"{file.subject} is a checkpoint that does not fit this model: {len(bad)} of"
            f" {len(targets)} tensors, the first {quote(bad[0])} with {file.tensors[bad[0]].shape}"
            f" for {expected[bad[0]]}{guess_family(file.shapes)}. {ANOTHER_MODEL}."
        )
