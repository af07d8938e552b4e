"""A whole SDXL model in one safetensors file, as civitai and Stability give it.

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
from weights.lora_names import layers_per_block, to_sgm
from weights.recognise import guess_family, quote
from weights.safe_file import SafeFile
from weights.trained_types import TEXT_ENCODERS, UNET, ModelShapes

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
_PURPOSE_OF_CHANNELS = {8: "changing pictures by instructions", 9: "inpainting"}
# Tensors and header entries by which ComfyUI knows (comfy/supported_models.py, SDXL.model_type).
_OTHER_PREDICTIONS = {
    "v_pred": "v-prediction",
    "edm_vpred.sigma_max": "v-prediction on EDM noise (CosXL)",
    "edm_mean": "EDM noise (Playground 2.5)",
}
_PREDICTION_HEADERS = ("modelspec.prediction_type", "modelspec.predict_key")


@dataclass(frozen=True)
class Place:
    """What a tensor of the file is in the model."""

    parameters: tuple[str, ...]  # several: the tensor is theirs one above the other
    transposed: bool

    def shape(self, shapes: ModelShapes) -> tuple[int, ...]:
        """The shape that the tensor has in a file."""
        first, *rest = shapes.parameters[self.parameters[0]]
        return (*rest, first) if self.transposed else (len(self.parameters) * first, *rest)

    def split(self, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parameters' names and values, which are views of the tensor."""
        values = (tensor.T,) if self.transposed else tensor.chunk(len(self.parameters))
        return zip(self.parameters, values, strict=True)


def is_checkpoint(keys: Iterable[str]) -> bool:
    """Whether the tensors' names are those of a checkpoint, or of its UNet alone."""
    return any(key.startswith(_UNET_PREFIX) for key in keys)


def read_checkpoint(file: SafeFile, shapes: ModelShapes) -> dict[str, Tensor]:
    """The parameters of the UNet and, if the file has any text encoder, of both.

    Raises BadWeights unless they are exactly the model's; known from the header, before a tensor is
    read, but for values that do not count.
    """
    _refuse_other_work(file, shapes)
    places = spell_checkpoint(shapes, file.tensors)
    _check(file, places, shapes)
    tensors = file.read(places)
    return {
        name: value for key, place in places.items() for name, value in place.split(tensors[key])
    }


def spell_checkpoint(shapes: ModelShapes, keys: Iterable[str]) -> dict[str, Place]:
    """The names that a file with `keys` has to have for this model → what they are in it."""
    keys = set(keys)
    encoders = any(key.startswith(_ENCODERS_PREFIX) for key in keys)
    layers = layers_per_block(shapes.parameters)
    places: dict[str, Place] = {}
    for name in shapes.parameters:
        part, path = name.split(".", 1)
        if part == UNET:
            module, _, kind = path.rpartition(".")
            key, place = f"{_UNET_PREFIX}{to_sgm(module, layers)}.{kind}", Place((name,), False)
        elif not encoders:
            continue
        elif part == TEXT_ENCODERS[0]:
            key, place = _CLIP_PREFIX + path.removeprefix("text_model."), Place((name,), False)
        elif ".k_proj." in path or ".v_proj." in path:  # in one tensor with q_proj
            continue
        else:
            key, place = _spell_open_clip(name, keys)
        assert key not in places, f"{key} is both {places[key].parameters} and {name}"
        places[key] = place
    return places


def _spell_open_clip(name: str, keys: set[str]) -> tuple[str, Place]:
    path = name.split(".", 1)[1].removeprefix("text_model.")
    if path == _PROJECTION:
        # As a linear layer's, in files by diffusers' script convert_diffusers_to_original_sdxl.py.
        if (linear := _OPEN_CLIP_PREFIX + _PROJECTION) in keys:
            return linear, Place((name,), False)
        return linear.removesuffix(".weight"), Place((name,), True)
    for ours, theirs in _OPEN_CLIP_NAMES:
        path = path.replace(ours, theirs)
    fused = ("q_proj", "k_proj", "v_proj") if ".q_proj." in name else ("",)
    names = tuple(name.replace("q_proj", each) for each in fused)
    return _OPEN_CLIP_PREFIX + path, Place(names, False)


def _refuse_other_work(file: SafeFile, shapes: ModelShapes) -> None:
    """Refuse what has the model's tensors, or nearly, but has to be used otherwise."""
    ours, theirs = _FIRST_CONVOLUTION
    own = shapes.parameters[ours][1]
    info = file.tensors.get(theirs)
    channels = info.shape[1] if info and len(info.shape) == 4 else own
    if channels != own and channels in _PURPOSE_OF_CHANNELS:
        raise BadWeights(
            f"{file.subject} is a checkpoint for {_PURPOSE_OF_CHANNELS[channels]}: its UNet has"
            f" {channels} input channels, and this model {own}. Use one for text to image."
        )
    prediction = next((what for key, what in _OTHER_PREDICTIONS.items() if key in file.tensors), "")
    if any(file.metadata.get(key, "").startswith("v") for key in _PREDICTION_HEADERS):
        prediction = prediction or _OTHER_PREDICTIONS["v_pred"]
    if prediction:
        raise BadWeights(
            f"{file.subject} is a checkpoint with {prediction}, where Stable Diffusion XL predicts"
            " noise: its pictures would be wrong. Use one with noise prediction (epsilon)."
        )


def _check(file: SafeFile, places: Mapping[str, Place], shapes: ModelShapes) -> None:
    """Raise BadWeights unless the UNet has these tensors alone, and all are there and fit."""
    unet = [key for key in file.tensors if key.startswith(_UNET_PREFIX)]
    unknown = [key for key in unet if key not in places]
    if unknown:
        raise BadWeights(
            f"{file.subject} is a checkpoint with {len(unknown)} of {len(unet)} tensors of the UNet"
            f" that this model has not, the first {quote(unknown[0])}{guess_family(file.shapes)}."
            " Use one that was made for this model."
        )
    missing = [key for key in places if key not in file.tensors]
    if missing:
        raise BadWeights(
            f"{file.subject} is a checkpoint without {len(missing)} of the {len(places)} tensors"
            f" that this model needs, the first {quote(missing[0])}. It is of a smaller model, or"
            " was saved in part: use the whole checkpoint."
        )
    bad = [key for key, place in places.items() if file.tensors[key].shape != place.shape(shapes)]
    if bad:
        raise BadWeights(
            f"{file.subject} is a checkpoint that does not fit this model: {len(bad)} of"
            f" {len(places)} tensors, the first {quote(bad[0])} with {file.tensors[bad[0]].shape}"
            f" for {places[bad[0]].shape(shapes)}{guess_family(file.shapes)}. Use one that was made"
            " for this model."
        )
