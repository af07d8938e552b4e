"""Train the miniature BLIP: `python -m weights.miniature.train_blip --out FOLDER`.

The classes and layout of Salesforce/blip-image-captioning-large, at 128 instead of 384 pixels. All
captions have one form, "a picture of a large red circle on a blue background at the top": what
varies is what the picture shows, so everything that is learnt is seeing. As in the real one,
captions are learnt behind a prompt (salesforce/BLIP, models/blip.py), the decoder starts from a
token ([DEC]) that the tokenizer does not know, and ends with [SEP].

Some pictures have colours at random, which are not asked for. Without them it learnt which
combinations never occur, the held-out ones, and named another shape there (docs/log.md).
"""

import argparse
import copy
import json
import string
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from weights.miniature import command
from weights.miniature.architecture import NATIVE_SIZE
from weights.miniature.captions import POSITION_WORDS, SIZE_WORDS, training_scene
from weights.miniature.patches import NO_LABEL, Labels, PatchLesson, label_patches
from weights.miniature.scenes import held_out_scenes, recolour
from weights.miniature.train_unet import fit
from weights.miniature.world import COLOURS, SHAPES, Scene, render, render_mask

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PROMPT = "a picture of"
MAX_CAPTION = 64  # tokens
PATCH = 16  # pixels
COLOUR_AT, BACKGROUND_AT = 6, 10  # tokens of every caption, behind [DEC]


@dataclass(frozen=True)
class BlipRecipe:
    steps: int = 1400
    batch: int = 48
    learning_rate: float = 1e-3
    pictures: int = 7000
    ema_decay: float = 0.99
    checkpoint_every: int = 200
    lesson_weight: float = 0.3  # of `PatchLesson`
    nameless: float = 0.4  # share of the pictures in colours at random
    seed: int = 0


def caption_of(scene: Scene) -> str:
    where = POSITION_WORDS[scene.position][0]
    size = SIZE_WORDS[scene.size][0]
    figure = f"a {size} {scene.colour} {scene.shape}"
    return f"{PROMPT} {figure} on a {scene.background} background {where}"


def vocabulary() -> list[str]:
    """Special tokens, every word of a caption, and letters, so that any other word can be spelt."""
    words = {*SHAPES, *COLOURS, *PROMPT.split(), "on", "background"}
    for texts in (*SIZE_WORDS.values(), *POSITION_WORDS.values()):
        words |= {word for text in texts for word in text.split()}
    signs = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [f"##{sign}" for sign in (*string.ascii_lowercase, *string.digits)]
    return [*SPECIAL, *signs, *pieces, *sorted(words - set(signs))]


def write_vocabulary(folder: Path) -> None:
    """BertTokenizer's own files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    special = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    config = {**special, "tokenizer_class": "BertTokenizer", "do_lower_case": True}
    config["model_max_length"] = MAX_CAPTION
    for name, content in (("special_tokens_map.json", special), ("tokenizer_config.json", config)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build_processor(folder: Path) -> BlipProcessor:
    """The vocabulary is written into `folder`."""
    write_vocabulary(folder)
    tokenizer = BertTokenizer.from_pretrained(folder)
    size = {"height": NATIVE_SIZE, "width": NATIVE_SIZE}
    return BlipProcessor(BlipImageProcessor(size=size), tokenizer)


def build_model(tokenizer: BertTokenizer) -> BlipForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer) + 1,  # and [DEC]
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_CAPTION,
        "projection_dim": 128,
        "bos_token_id": len(tokenizer),
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": NATIVE_SIZE,
        "patch_size": PATCH,
        "projection_dim": 128,
        "initializer_range": 0.02,
    }
    config = BlipConfig(
        text_config=text, vision_config=vision, projection_dim=128, image_text_hidden_size=128
    )
    return BlipForConditionalGeneration(config)


class Pupil(nn.Module):
    """The model, and the lesson that is thrown away."""

    def __init__(self, model: BlipForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.lesson = PatchLesson(model.config.vision_config.hidden_size)

    def forward(
        self, pixels: Tensor, tokens: dict[str, Tensor], labels: list[Labels]
    ) -> tuple[Tensor, Tensor]:
        """The losses of the captions and of the lesson."""
        said = self.model(pixels, **tokens)
        return said.loss, self.lesson(said.image_embeds, labels)


@dataclass(frozen=True)
class Example:
    scene: Scene
    pixels: NDArray[np.uint8]  # (H, W, 3)
    labels: Labels
    nameless: bool


def draw_examples(recipe: BlipRecipe) -> list[Example]:
    rng = np.random.default_rng(recipe.seed)
    examples = []
    for _ in range(recipe.pictures):
        scene = training_scene(rng)
        mask = render_mask(scene, NATIVE_SIZE, NATIVE_SIZE)
        labels = label_patches([scene], mask[None], PATCH)
        nameless = bool(rng.random() < recipe.nameless)
        if nameless:
            labels[1] = NO_LABEL
            pixels = recolour([scene], mask[None], rng)
        else:
            pixels = np.asarray(render(scene, NATIVE_SIZE, NATIVE_SIZE))
        examples.append(Example(scene, pixels, labels, nameless))
    return examples


def train(recipe: BlipRecipe, start_from: Path | None, out: Path, device: torch.device) -> None:
    """Train anew or from a trained folder; the averaged copy goes to `out` every so often."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    processor = build_processor(out)
    examples = draw_examples(recipe)
    print(f"drew {len(examples)} pictures", flush=True)
    model = load(start_from) if start_from else build_model(processor.tokenizer)

    def loss_of(pupil: Pupil) -> Tensor:
        chosen = [examples[i] for i in rng.integers(len(examples), size=recipe.batch)]
        pictures = [example.pixels for example in chosen]
        pixels = processor.image_processor(pictures, return_tensors="pt").pixel_values
        tokens = tokenize(chosen, processor.tokenizer, rng)
        tokens["input_ids"][:, 0] = model.config.text_config.bos_token_id
        given = {name: value.to(device) for name, value in tokens.items()}
        captions, lesson = pupil(pixels.to(device), given, [e.labels for e in chosen])
        loss: Tensor = captions + recipe.lesson_weight * lesson
        return loss

    def checkpoint(average: Pupil) -> None:
        save(average.model, processor, out)
        share = held_out_share(average.model, processor)
        print(f"colour and shape right {share:.1%}", flush=True)

    fit(Pupil(model).to(device), recipe, loss_of, checkpoint)


def tokenize(
    examples: list[Example], tokenizer: BertTokenizer, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Captions as `input_ids`, `attention_mask` and `labels`, (B, N) each.

    Colours without a name are read as any colours, and are no answers.
    """
    texts = []
    for example in examples:
        colours = rng.choice(list(COLOURS), 2)
        named = replace(example.scene, colour=str(colours[0]), background=str(colours[1]))
        texts.append(caption_of(named if example.nameless else example.scene))
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, NO_LABEL)
    nameless = torch.tensor([example.nameless for example in examples])
    for place in (COLOUR_AT, BACKGROUND_AT):
        labels[nameless, place] = NO_LABEL
    return {
        "input_ids": tokens.input_ids,
        "attention_mask": tokens.attention_mask,
        "labels": labels,
    }


def held_out_share(model: BlipForConditionalGeneration, processor: BlipProcessor) -> float:
    """The share of 64 held-out pictures whose greedy caption names the right colour and shape."""
    scenes = held_out_scenes(64, seed=4242)
    pictures = [render(scene, NATIVE_SIZE, NATIVE_SIZE) for scene in scenes]
    inputs = processor(images=pictures, text=[PROMPT] * len(pictures), return_tensors="pt")
    ids = model.generate(**inputs.to(model.device), max_new_tokens=24, do_sample=False)
    captions = processor.batch_decode(ids, skip_special_tokens=True)
    wanted = [f"{scene.colour} {scene.shape} on" for scene in scenes]
    right = [named in text for named, text in zip(wanted, captions, strict=True)]
    return sum(right) / len(right)


def save(model: BlipForConditionalGeneration, processor: BlipProcessor, out: Path) -> None:
    """Write the published model's layout, weights as fp16 safetensors."""
    copy.deepcopy(model).half().save_pretrained(out)
    (out / "generation_config.json").unlink()
    processor.image_processor.save_pretrained(out)
    processor.tokenizer.save_pretrained(out)
    write_vocabulary(out)


def load(folder: Path) -> BlipForConditionalGeneration:
    return BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start-from", type=Path, help="a trained folder to continue from")
    arguments, recipe, device = command.parse(parser, BlipRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    train(recipe, arguments.start_from, arguments.out, device)


if __name__ == "__main__":
    main()
