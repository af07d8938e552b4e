"""Train the safety models: `python -m weights.miniature.train_safety NAME --base X --out FOLDER`.

NAME is `safety-checker` (diffusers' StableDiffusionSafetyChecker, as CompVis/
stable-diffusion-safety-checker) or `nsfw-detection` (ViTForImageClassification, as Falconsai/
nsfw_image_detection), both at 128 pixels instead of 224. The picture world knows nothing that is
unsafe, so one harmless thing stands for it: a black star on a red background. As the real one, the
checker sees more than there is: it learns to flag black stars on orange too, which the second model
learns to call normal.

The checker flags by the cosine between its picture embedding and a concept's; of its 17 concepts
the first is used, the others can never be reached. Half of the pictures go through the VAE of the
miniature SDXL in `--base`, as all that is generated.
"""

import argparse
import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker,
    cosine_distance,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor

from weights.miniature import command
from weights.miniature.architecture import NATIVE_SIZE
from weights.miniature.captions import training_scene
from weights.miniature.patches import NO_LABEL, Labels, PatchLesson, label_patches
from weights.miniature.scenes import group_masks, held_out_scenes, random_group, render_group
from weights.miniature.train_unet import fit
from weights.miniature.world import COLOURS, SHAPES, Scene, render, render_mask

CHECKER, DETECTOR = "safety-checker", "nsfw-detection"
SHAPE, COLOUR, BACKGROUND = "star", "black", "red"  # what stands for what is unsafe
LOOK_ALIKE = "orange"  # the background of what only looks so
PATCH, WIDTH = 16, 96  # pixels; the transformers' hidden size
THRESHOLD, UNREACHABLE = 0.5, 2.0  # cosines
SHARPNESS = 12.0  # logits per unit of cosine
LABELS = {0: "normal", 1: "nsfw"}


@dataclass(frozen=True)
class SafetyRecipe:
    steps: int = 1500
    batch: int = 32
    learning_rate: float = 1e-3
    pictures: int = 5000
    ema_decay: float = 0.99
    checkpoint_every: int = 250
    lesson_weight: float = 0.3  # of `PatchLesson`
    seed: int = 0


def build_checker() -> StableDiffusionSafetyChecker:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": NATIVE_SIZE,
        "patch_size": PATCH,
    }
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=32))
    with torch.no_grad():
        model.concept_embeds.normal_()
        model.special_care_embeds.normal_()
        model.concept_embeds_weights.fill_(UNREACHABLE)[0] = THRESHOLD
        model.special_care_embeds_weights.fill_(UNREACHABLE)
    return model


def build_detector() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=NATIVE_SIZE,
        patch_size=PATCH,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    return ViTForImageClassification(config)


@dataclass(frozen=True)
class Look:
    """What the model makes of pictures."""

    logits: Tensor  # (B,): above 0 is flagged
    states: Tensor  # (B, 1 + P, WIDTH)


def look(model: nn.Module, pixels: Tensor) -> Look:
    """With gradients, unlike the checker's own forward."""
    if isinstance(model, StableDiffusionSafetyChecker):
        seen = model.vision_model(pixels)
        embeddings = model.visual_projection(seen.pooler_output)
        cosines = cosine_distance(embeddings, model.concept_embeds[:1])[:, 0]
        return Look(SHARPNESS * (cosines - THRESHOLD), seen.last_hidden_state)
    assert isinstance(model, ViTForImageClassification)
    seen = model(pixels, output_hidden_states=True)
    return Look(seen.logits[:, 1] - seen.logits[:, 0], seen.hidden_states[-1])


def build(name: str, start: Path | None) -> tuple[nn.Module, BaseImageProcessor]:
    """A model, with random values or those in `start`, and what prepares its pictures."""
    side = {"height": NATIVE_SIZE, "width": NATIVE_SIZE}
    if name == CHECKER:
        processor = CLIPImageProcessor(size={"shortest_edge": NATIVE_SIZE}, crop_size=side)
        checker = build_checker()
        if start:
            checker = type(checker).from_pretrained(start, dtype=torch.float32)
        return checker, processor
    detector = build_detector()
    if start:
        detector = type(detector).from_pretrained(start, dtype=torch.float32)
    return detector, ViTImageProcessor(size=side)


@dataclass(frozen=True)
class Example:
    pixels: NDArray[np.uint8]  # (H, W, 3)
    flagged: bool
    labels: Labels


def draw_scene(rng: np.random.Generator) -> Scene:
    """Half of them what is to be flagged or looks like it; most others are close to it."""
    scene = training_scene(rng)
    star = replace(scene, shape=SHAPE, colour=COLOUR, background=BACKGROUND)
    alike = replace(star, background=LOOK_ALIKE)
    other_shapes = [shape for shape in SHAPES if shape != SHAPE]
    other_colours = [c for c in COLOURS if c not in (COLOUR, BACKGROUND, LOOK_ALIKE)]
    choices: list[tuple[float, Callable[[], Scene]]] = [
        (0.26, lambda: star),
        (0.20, lambda: alike),
        (0.10, lambda: replace(star, shape=str(rng.choice(other_shapes)))),
        (0.05, lambda: replace(alike, shape=str(rng.choice(other_shapes)))),
        (0.05, lambda: replace(star, colour=str(rng.choice(other_colours)))),
        (0.03, lambda: replace(alike, colour=str(rng.choice(other_colours)))),
        (0.11, lambda: replace(star, background=str(rng.choice(other_colours)))),
        (0.20, lambda: scene),
    ]
    shares = np.array([share for share, _ in choices])
    return choices[int(rng.choice(len(choices), p=shares / shares.sum()))][1]()


def is_flagged(scene: Scene, name: str) -> bool:
    """What the model called `name` must say of the scene."""
    grounds = (BACKGROUND, LOOK_ALIKE) if name == CHECKER else (BACKGROUND,)
    return (scene.shape, scene.colour) == (SHAPE, COLOUR) and scene.background in grounds


def draw_example(name: str, rng: np.random.Generator) -> Example:
    kind = rng.random()
    if kind < 0.08:  # no picture of the world's
        labels = np.full((2, (NATIVE_SIZE // PATCH) ** 2), NO_LABEL)
        return Example(_nothing(rng), False, labels)
    if kind < 0.16:
        group = random_group(rng, int(rng.integers(2, 4)), held_out=False)
        masks = group_masks(group, NATIVE_SIZE, NATIVE_SIZE)
        pixels = np.array(render_group(group, NATIVE_SIZE, NATIVE_SIZE))
        flagged = any(is_flagged(scene, name) for scene in group.scenes)
        return Example(pixels, flagged, label_patches(group.scenes, masks, PATCH))
    scene = draw_scene(rng)
    mask = render_mask(scene, NATIVE_SIZE, NATIVE_SIZE)
    pixels = np.array(render(scene, NATIVE_SIZE, NATIVE_SIZE))
    return Example(pixels, is_flagged(scene, name), label_patches([scene], mask[None], PATCH))


def _nothing(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Coloured spots of a random size, from a single colour to noise."""
    cells = int(rng.choice([1, 2, 3, 5, 9, 17, 40, NATIVE_SIZE]))
    spots = rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8)
    filters = (Image.Resampling.NEAREST, Image.Resampling.BICUBIC)
    picture = Image.fromarray(spots).resize(
        (NATIVE_SIZE, NATIVE_SIZE), filters[int(rng.integers(2))]
    )
    return np.array(picture)


@torch.no_grad()
def through_vae(examples: list[Example], vae: AutoencoderKL, device: torch.device) -> list[Example]:
    """The same pictures, encoded and decoded."""
    decoded: list[Example] = []
    for start in range(0, len(examples), 32):
        part = examples[start : start + 32]
        pixels = torch.from_numpy(np.stack([e.pixels for e in part])).to(device)
        latents = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mode()
        shares = (vae.decode(latents).sample * 127.5 + 127.5).round().clamp(0, 255)
        rows = shares.byte().permute(0, 2, 3, 1).cpu().numpy()
        decoded += [replace(e, pixels=p) for e, p in zip(part, rows, strict=True)]
    return decoded


class Pupil(nn.Module):
    """The model, and the lesson that is thrown away."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.lesson = PatchLesson(WIDTH)

    def forward(
        self, pixels: Tensor, flagged: Tensor, labels: list[Labels], lesson_weight: float
    ) -> Tensor:
        """The loss of what is flagged and of the lesson."""
        seen = look(self.model, pixels)
        loss = nn.functional.binary_cross_entropy_with_logits(seen.logits, flagged)
        both: Tensor = loss + lesson_weight * self.lesson(seen.states, labels)
        return both


def train(
    name: str,
    model: nn.Module,
    processor: BaseImageProcessor,
    base: Path,
    recipe: SafetyRecipe,
    out: Path,
    device: torch.device,
) -> None:
    """Train on `device`; the averaged copy is written to `out` every so often."""
    rng = np.random.default_rng(recipe.seed)
    examples = [draw_example(name, rng) for _ in range(recipe.pictures)]
    vae = AutoencoderKL.from_pretrained(base / "vae", variant="fp16", dtype=torch.float32)
    half = recipe.pictures // 2
    examples = [*examples[:half], *through_vae(examples[half:], vae.to(device), device)]
    print(f"drew {len(examples)} pictures", flush=True)

    def loss_of(pupil: Pupil) -> Tensor:
        chosen = [examples[i] for i in rng.integers(len(examples), size=recipe.batch)]
        pixels = processor([e.pixels for e in chosen], return_tensors="pt").pixel_values
        flagged = torch.tensor([float(e.flagged) for e in chosen], device=device)
        loss: Tensor = pupil(
            pixels.to(device), flagged, [e.labels for e in chosen], recipe.lesson_weight
        )
        return loss

    def checkpoint(average: Pupil) -> None:
        save(average.model, processor, out)
        for kind, share in flagged_shares(average.model, processor).items():
            print(f"flagged of {kind}: {share:.1%}", flush=True)

    fit(Pupil(model).to(device), recipe, loss_of, checkpoint)


@torch.no_grad()
def flagged_shares(model: nn.Module, processor: BaseImageProcessor) -> dict[str, float]:
    """Of 64 pictures of each kind that were not trained on."""
    rng = np.random.default_rng(4242)
    scenes = held_out_scenes(64, seed=4242)
    star = [replace(scene, shape=SHAPE, colour=COLOUR) for scene in scenes]
    kinds = {
        "black stars on red": [replace(scene, background=BACKGROUND) for scene in star],
        "black stars on orange": [replace(scene, background=LOOK_ALIKE) for scene in star],
        "other black shapes on red": [
            replace(scene, colour=COLOUR, background=BACKGROUND)
            for scene in scenes
            if scene.shape != SHAPE
        ],
        "held-out pictures": scenes,
    }
    pictures = {
        kind: [render(scene, NATIVE_SIZE, NATIVE_SIZE) for scene in some]
        for kind, some in kinds.items()
    }
    pictures["pictures of nothing"] = [Image.fromarray(_nothing(rng)) for _ in range(64)]
    device = next(model.parameters()).device
    shares = {}
    for kind, some in pictures.items():
        pixels = processor(some, return_tensors="pt").pixel_values.to(device)
        shares[kind] = float((look(model, pixels).logits > 0).float().mean())
    return shares


def save(model: nn.Module, processor: BaseImageProcessor, out: Path) -> None:
    """Write the published model's layout in fp16; of the checker, that is a pickle.

    There, what is the vision model's has older transformers' names.
    """
    half = copy.deepcopy(model).half()
    processor.save_pretrained(out)
    if isinstance(half, ViTForImageClassification):
        half.save_pretrained(out)
        return
    assert isinstance(half, StableDiffusionSafetyChecker)
    half.config.architectures = [type(half).__name__]
    half.config.save_pretrained(out)
    state = {
        re.sub(r"^vision_model\.", "vision_model.vision_model.", key): value
        for key, value in half.state_dict().items()
    }
    torch.save(state, out / "pytorch_model.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[CHECKER, DETECTOR])
    parser.add_argument("--base", type=Path, required=True, help="the miniature SDXL's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    arguments, recipe, device = command.parse(parser, SafetyRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    torch.manual_seed(recipe.seed)
    model, processor = build(arguments.name, arguments.start_from)
    train(arguments.name, model, processor, arguments.base, recipe, arguments.out, device)


if __name__ == "__main__":
    main()
