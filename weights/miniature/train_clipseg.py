"""Train the miniature CLIPSeg: `python -m weights.miniature.train_clipseg --base X --out FOLDER`.

The same classes, layout and decoder (refined: three convolutions, patches of 16 pixels) as
CIDAS/clipseg-rd64-refined, at 128 instead of 352 pixels. It begins with the text encoder of the
miniature SDXL in `--base`, its second one, as the real one begins with CLIP's; unlike there, both
encoders are trained along with the decoder, on pictures of one to three shapes. What a prompt names
is white, all else black, and "" says nothing, so its logit is 0 everywhere: that makes the softmax
over [prompt, ""] in `preprocess/segment.py` a plain probability. Some pictures have colours at
random, which no prompt names.
"""

import argparse
import copy
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ViTImageProcessor,
)

from weights.miniature import command
from weights.miniature.captions import SHAPE_WORDS
from weights.miniature.patches import NO_LABEL, Labels, PatchLesson, label_patches
from weights.miniature.scenes import (
    Group,
    absent_colour,
    group_masks,
    random_group,
    recolour,
    render_group,
)
from weights.miniature.train_unet import fit
from weights.miniature.world import SHAPES

SIDE, PATCH = 128, 16  # pixels; the processor resizes to the former
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as the real one's


@dataclass(frozen=True)
class ClipSegRecipe:
    steps: int = 1400
    batch: int = 16
    prompts: int = 6  # of each picture
    empty_prompts: float = 0.3  # share of the pictures one of whose prompts is ""
    shape_weight: float = 4.0  # of the loss where a shape is
    lesson_weight: float = 0.3  # of `PatchLesson`
    nameless: float = 0.4  # share of the pictures in colours at random
    learning_rate: float = 1e-3
    pictures: int = 3000
    ema_decay: float = 0.99
    checkpoint_every: int = 200
    seed: int = 0


def build_model(base: Path) -> CLIPSegForImageSegmentation:
    encoder = CLIPTextModelWithProjection.from_pretrained(
        base / "text_encoder_2", variant="fp16", dtype=torch.float32
    )
    known = encoder.config
    text = {
        "vocab_size": known.vocab_size,
        "hidden_size": known.hidden_size,
        "intermediate_size": known.intermediate_size,
        "num_hidden_layers": known.num_hidden_layers,
        "num_attention_heads": known.num_attention_heads,
        "max_position_embeddings": known.max_position_embeddings,
        "hidden_act": known.hidden_act,
        "bos_token_id": known.vocab_size - 2,
        "eos_token_id": known.vocab_size - 1,
        "pad_token_id": known.vocab_size - 1,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    config = CLIPSegConfig(
        text_config=text,
        vision_config=vision,
        projection_dim=known.projection_dim,
        extract_layers=[1, 2, 3],
        reduce_dim=64,
        decoder_intermediate_size=192,
        use_complex_transposed_convolution=True,
    )
    model = CLIPSegForImageSegmentation(config)
    # transformers 5.17.0 draws these with a standard deviation of 1, for logits of 500.
    decoder = model.decoder
    linear = (decoder.film_mul, decoder.film_add, *decoder.reduces)
    for module in (*linear, *decoder.transposed_convolution):
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.reset_parameters()
    loaded = model.clip.load_state_dict(encoder.state_dict(), strict=False)
    assert not loaded.unexpected_keys, loaded
    return model


def build_processor(base: Path) -> CLIPSegProcessor:
    images = ViTImageProcessor(
        size={"height": SIDE, "width": SIDE},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
    return CLIPSegProcessor(images, CLIPTokenizer.from_pretrained(base / "tokenizer"))


def prompts_of(
    group: Group, nameless: bool, rng: np.random.Generator
) -> list[tuple[str, list[int] | None]]:
    """Wordings of what may be asked of a picture, and which of its shapes each one names.

    None: all but the shapes. "" names nothing and is not among them. Nor are colours where they
    are `nameless`.
    """
    every = list(range(len(group.scenes)))
    asked: list[tuple[str, list[int] | None]] = []
    for i, scene in enumerate(group.scenes):
        word = str(rng.choice(SHAPE_WORDS[scene.shape]))
        texts = [word, word, f"{scene.colour} {word}", f"{scene.colour} shape"]
        asked.append((_worded(str(rng.choice(texts[:2] if nameless else texts)), rng), [i]))
        other = str(rng.choice([s for s in SHAPES if s != scene.shape]))
        named = [j for j in every if group.scenes[j].shape == other]
        asked.append((_worded(other, rng), named))
        if not nameless:
            asked.append((_worded(f"{absent_colour(group, rng)} {word}", rng), []))
    asked.append((_worded("shape", rng), every))
    plain = nameless or rng.random() < 0.5
    asked.append((_worded("background" if plain else f"{group.background} background", rng), None))
    return asked


def _worded(text: str, rng: np.random.Generator) -> str:
    opening = str(rng.choice(["", "a ", "a ", "the ", "a photo of a "]))
    if opening.endswith("a ") and text[0] in "aeiou":
        opening = opening[:-1] + "n "
    return opening + text


@dataclass(frozen=True)
class Example:
    pixels: NDArray[np.uint8]  # (H, W, 3)
    masks: NDArray[np.float32]  # (N, SIDE, SIDE)
    group: Group
    labels: Labels
    nameless: bool  # in colours at random


def draw_examples(recipe: ClipSegRecipe) -> list[Example]:
    rng = np.random.default_rng(recipe.seed)
    examples = []
    for _ in range(recipe.pictures):
        group = random_group(rng, int(rng.integers(1, 4)), held_out=False)
        masks = group_masks(group, SIDE, SIDE)
        labels = label_patches(group.scenes, masks, PATCH)
        nameless = bool(rng.random() < recipe.nameless)
        if nameless:
            labels[1] = NO_LABEL
            pixels = recolour(group.scenes, masks, rng)
        else:
            pixels = np.array(render_group(group, SIDE, SIDE))
        examples.append(Example(pixels, masks, group, labels, nameless))
    return examples


def _target(example: Example, named: list[int] | None) -> NDArray[np.float32]:
    """(SIDE, SIDE) in [0, 1]: white where what is named shows."""
    if named is None:
        ground: NDArray[np.float32] = 1 - example.masks.max(axis=0)
        return ground
    empty = np.zeros((1, SIDE, SIDE), np.float32)
    white: NDArray[np.float32] = np.concatenate([empty, example.masks[named]]).max(axis=0)
    return white


class Pupil(nn.Module):
    """The model, and the lesson that is thrown away."""

    def __init__(self, model: CLIPSegForImageSegmentation) -> None:
        super().__init__()
        self.model = model
        self.lesson = PatchLesson(model.config.vision_config.hidden_size)

    def forward(
        self, pixels: Tensor, tokens: dict[str, Tensor], prompts: int, labels: list[Labels]
    ) -> tuple[Tensor, Tensor]:
        """Logits (B * prompts, SIDE, SIDE) and the lesson's loss.

        The model's own forward would train the decoder alone.
        """
        clip, decoder = self.model.clip, self.model.decoder
        seen = clip.get_image_features(pixel_values=pixels, output_hidden_states=True)
        states = [seen.hidden_states[i + 1] for i in self.model.extract_layers]
        heard = clip.get_text_features(**tokens).pooler_output
        repeated = [state.repeat_interleave(prompts, dim=0) for state in states]
        return decoder(repeated, heard).logits, self.lesson(states[-1], labels)


def draw_prompts(
    examples: list[Example], recipe: ClipSegRecipe, rng: np.random.Generator
) -> tuple[list[str], NDArray[np.float32]]:
    """`recipe.prompts` texts for each picture, and (N, SIDE, SIDE) what each must give."""
    texts, targets = [], []
    for example in examples:
        asked = prompts_of(example.group, example.nameless, rng)
        chosen = rng.choice(len(asked), recipe.prompts, replace=len(asked) < recipe.prompts)
        texts += [asked[i][0] for i in chosen]
        targets += [_target(example, asked[i][1]) for i in chosen]
        if rng.random() < recipe.empty_prompts:
            texts[-1], targets[-1] = "", np.full((SIDE, SIDE), 0.5, np.float32)
    return texts, np.stack(targets)


def train(
    model: CLIPSegForImageSegmentation,
    processor: CLIPSegProcessor,
    recipe: ClipSegRecipe,
    out: Path,
    device: torch.device,
) -> None:
    """Train on `device`; the averaged copy is written to `out` every so often."""
    rng = np.random.default_rng(recipe.seed)
    examples = draw_examples(recipe)
    print(f"drew {len(examples)} pictures", flush=True)

    def loss_of(pupil: Pupil) -> Tensor:
        chosen = [examples[i] for i in rng.integers(len(examples), size=recipe.batch)]
        texts, targets = draw_prompts(chosen, recipe, rng)
        pictures = [example.pixels for example in chosen]
        pixels = processor(images=pictures, return_tensors="pt").pixel_values.to(device)
        tokens = processor(text=texts, padding=True, return_tensors="pt").to(device)
        labels = [example.labels for example in chosen]
        logits, lesson = pupil(pixels, dict(tokens), recipe.prompts, labels)
        shapes = torch.from_numpy(np.stack([e.masks.max(axis=0) for e in chosen])).to(device)
        weights = 1 + (recipe.shape_weight - 1) * shapes.repeat_interleave(recipe.prompts, dim=0)
        wanted = torch.from_numpy(targets).to(device)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits, wanted, weights / weights.mean()
        )
        both: Tensor = loss + recipe.lesson_weight * lesson
        return both

    def checkpoint(average: Pupil) -> None:
        save(average.model, processor, out)
        iou = held_out_iou(average.model, processor)
        print(f"mean IoU on held-out pictures {iou:.3f}", flush=True)

    fit(Pupil(model).to(device), recipe, loss_of, checkpoint)


@torch.no_grad()
def held_out_iou(model: CLIPSegForImageSegmentation, processor: CLIPSegProcessor) -> float:
    """Mean over 48 held-out pictures of two shapes, of each of which the first is asked for."""
    rng = np.random.default_rng(4242)
    groups = [random_group(rng, 2, held_out=True) for _ in range(48)]
    texts = [f"a {group.scenes[0].colour} {group.scenes[0].shape}" for group in groups]
    pictures = [render_group(group, SIDE, SIDE) for group in groups]
    inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    white = model(**inputs.to(model.device)).logits.cpu().numpy() > 0
    overlaps = []
    for group, found in zip(groups, white, strict=True):
        wanted = group_masks(group, SIDE, SIDE)[0] > 0.5
        overlaps.append((wanted & found).sum() / (wanted | found).sum())
    return float(np.mean(overlaps))


def save(model: CLIPSegForImageSegmentation, processor: CLIPSegProcessor, out: Path) -> None:
    """Write the published model's layout, weights as fp16 safetensors."""
    copy.deepcopy(model).half().save_pretrained(out)
    processor.image_processor.save_pretrained(out)
    for file in Path(processor.tokenizer.name_or_path).iterdir():
        shutil.copy(file, out)


def load(folder: Path) -> CLIPSegForImageSegmentation:
    return CLIPSegForImageSegmentation.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the miniature SDXL's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    arguments, recipe, device = command.parse(parser, ClipSegRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    torch.manual_seed(recipe.seed)
    start = arguments.start_from
    model = load(start) if start else build_model(arguments.base)
    train(model, build_processor(arguments.base), recipe, arguments.out, device)


if __name__ == "__main__":
    main()
