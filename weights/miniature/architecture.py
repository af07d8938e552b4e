"""The miniature SDXL's parts: the same library classes as the real one, a thousandth of the size.

What is kept from SDXL: two CLIP text encoders whose penultimate states are concatenated, the second
with a projection that feeds the pooled embedding; size and crop conditioning ("text_time"); two
down-samplings with attention only in the two deeper levels; `eos_token_id` 2 in the text encoders'
configs, which makes CLIP pool at the highest token id; an 8x VAE with 4 latent channels.

What differs on purpose, both so that a model this small hears the prompt at the noisiest steps:

- linear betas up to 0.02 instead of scaled_linear up to 0.012. A 16x16 latent under SDXL's own
  betas still shows its mean colour at t = 999 (sqrt(alpha_bar) = 0.068 against a noise mean of
  1/16), so the UNet would learn to read the background from the noise, not from the prompt;
- v-prediction (arXiv:2202.00512) instead of noise prediction. Near pure noise the latter must
  reproduce its input to a thousandth before a caption matters: after 2,400 steps a right and a
  wrong caption differed by 0.00006 beside an error of 0.0028 at t = 850.
"""

import json
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

NATIVE_SIZE = 128  # pixels
TEXT_WIDTH = 64
MAX_TOKENS = 77
MERGES = 420
START, END = "<|startoftext|>", "<|endoftext|>"

# SDXL's own scheduler config but for the betas: it is shared by all of a request's choices of
# scheduler, so it names values that only some of them read (DDIM clip_sample, PNDM
# skip_prk_steps).
SCHEDULER_CONFIG = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}

# CLIP's own pre-tokenisation (openai/CLIP, simple_tokenizer.py), as CLIPTokenizer does it.
_SPLIT = (
    r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"""
    r"""[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=NATIVE_SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=NATIVE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(2, 4, 6),  # the number of heads, as in SDXL's config
        norm_num_groups=8,
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + TEXT_WIDTH,
    )


def build_refiner_unet() -> UNet2DConditionModel:
    """SDXL's refiner: hears only the second text encoder, told an aesthetic score.

    Four levels with attention in the middle two, as the real one. Five time ids, not the base's
    six: original height and width, crop top and left, aesthetic score.
    """
    return UNet2DConditionModel(
        sample_size=NATIVE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 64, 48, 48),  # widest where the outline is drawn, at 16x16 and 8x8
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(3, 4, 3, 3),
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=5 * 32 + TEXT_WIDTH,
    )


def _text_config(vocabulary: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act=activation,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def build_text_encoders(vocabulary: int) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """The pair of SDXL: quick_gelu for the first, gelu and a projection for the second."""
    return (
        CLIPTextModel(_text_config(vocabulary, "quick_gelu")),
        CLIPTextModelWithProjection(_text_config(vocabulary, "gelu")),
    )


def _byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in CLIP's order: "!" is 0."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(hidden))]


def write_tokenizers(corpus: list[str], folder: Path) -> None:
    """Learn a small byte-level BPE and write it twice in CLIPTokenizer's file format.

    Any text can be tokenised: every byte is in the vocabulary. As in SDXL, the first tokenizer pads
    with the end token and the second with "!" (id 0).
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=512 + MERGES, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(m) for m in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), START, END])}
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        _write_tokenizer(folder / name, vocabulary, merges, pad)


def _write_tokenizer(
    folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, ...]], pad: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(m) for m in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_TOKENS,
        "do_lower_case": True,
        "add_prefix_space": False,
    }
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    return (
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )
