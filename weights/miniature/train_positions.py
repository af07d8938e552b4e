"""Teach the text encoders to read captions anywhere: `... -m weights.miniature.train_positions`.

Captions of the picture world are short, so words beyond the first dozen tokens meant nothing: after
twelve tokens of other text, colours came out at random. Here the encoders learn from themselves.
What a caption's tokens mean further back, behind words that say nothing, is to be what they mean at
the start; those words are to mean what an empty text does; and what captions mean as they are is
to stay. The UNet does not change, nor does it notice. About ten minutes on one CPU core.
"""

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from weights.miniature import command
from weights.miniature.architecture import MAX_TOKENS, load_tokenizers
from weights.miniature.captions import describe, training_scene

# Words that say nothing in the picture world; some are in most prompts that people write.
_WORDS = (
    "and then some more about nothing in particular very the of with it is was just this that here"
    " there detailed quality best sharp masterpiece trending intricate beautiful high resolution"
    " photograph cinematic mood by an artist for you as well also really quite too so but or if"
    " when while over under between near far from into at to , , , . a a picture photo drawing"
)
AS_IT_IS, EMPTY = 0.3, 0.1  # shares of a batch: captions without other text, other text alone
FILLER_COUNTS = 0.3  # of an error in what other text means
KINDS = ("text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class PositionsRecipe:
    steps: int = 2500
    batch: int = 64
    learning_rate: float = 1e-3
    pictures: int = 6000  # whose captions are read
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Ids as they are read, (B, 77), and where each token's meaning is to be found."""

    shifted: Tensor  # ids, with other text around the caption
    plain: Tensor  # ids of the caption alone
    source: Tensor  # (B, 77): the place in the plain text; -1: in the empty text, at the same place
    weights: Tensor  # (B, 77)


def draw(
    captions: list[list[int]],
    filler: list[list[int]],
    pad: int,
    batch: int,
    rng: np.random.Generator,
) -> Batch:
    """Captions with other text before and after them; `filler` are the words' ids."""
    first, last = captions[0][0], captions[0][-1]
    shifted = torch.full((batch, MAX_TOKENS), pad)
    plain = shifted.clone()
    source = torch.arange(MAX_TOKENS).repeat(batch, 1)
    weights = torch.ones(batch, MAX_TOKENS)
    for row in range(batch):
        kind = rng.random()
        caption = captions[int(rng.integers(1, len(captions)))][1:-1]
        if kind < EMPTY:
            caption = []
        room = MAX_TOKENS - 2 - len(caption)
        before, after = 0, 0
        if kind < EMPTY or kind >= EMPTY + AS_IT_IS:
            before = int(rng.integers(0, room + 1))
            after = int(rng.integers(0, room - before + 1)) if rng.random() < 0.4 else 0
        words: list[int] = []
        while len(words) < before + after:
            words += filler[int(rng.integers(len(filler)))]
        ids = [first, *words[:before], *caption, *words[before : before + after], last]
        shifted[row, : len(ids)] = torch.tensor(ids)
        own = [first, *caption, last]
        plain[row, : len(own)] = torch.tensor(own)
        source[row, 1 : 1 + before] = -1
        start = 1 + before
        source[row, start : start + len(caption)] = torch.arange(1, 1 + len(caption))
        weights[row, 1 : 1 + before] = FILLER_COUNTS
        weights[row, start + len(caption) : start + len(caption) + after] = FILLER_COUNTS
    return Batch(shifted, plain, source, weights)


def _read(encoder: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2], getattr(output, "text_embeds", None)


def loss_of(student: nn.Module, teacher: nn.Module, batch: Batch, empty: Tensor) -> Tensor:
    """Error of each token's and of the pooled meaning, in shares of how much those vary."""
    with torch.no_grad():
        states, pooled = _read(teacher, batch.plain)
        nothing, _ = _read(teacher, empty)
        places = batch.source.clamp(min=0)[..., None].expand_as(states)
        wanted = torch.where(batch.source[..., None] < 0, nothing, states.gather(1, places))
    found, found_pooled = _read(student, batch.shifted)
    error = (found - wanted).square().mean(dim=-1) / states.var()
    loss = (error * batch.weights).mean()
    if pooled is not None and found_pooled is not None:
        loss = loss + (found_pooled - pooled).square().mean() / pooled.var()
    return loss


def train(
    folder: Path, recipe: PositionsRecipe, device: torch.device
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    tokenizers = load_tokenizers(folder)
    texts = ["", *(describe(training_scene(rng), rng) for _ in range(recipe.pictures))]
    captions = [tokenizers[0](text).input_ids for text in texts]
    filler = [tokenizers[0](word, add_special_tokens=False).input_ids for word in _WORDS.split()]
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    students = [
        kind.from_pretrained(folder / name, variant="fp16", dtype=torch.float32).to(device)
        for name, kind in zip(KINDS, classes, strict=True)
    ]
    teachers = [copy.deepcopy(student).eval().requires_grad_(False) for student in students]
    parameters = [p for student in students for p in student.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    started = time.monotonic()
    for step in range(recipe.steps):
        losses = []
        for tokenizer, student, teacher in zip(tokenizers, students, teachers, strict=True):
            batch = draw(captions, filler, tokenizer.pad_token_id, recipe.batch, rng)
            batch = Batch(*(t.to(device) for t in vars(batch).values()))
            empty = tokenizer(
                "", padding="max_length", max_length=MAX_TOKENS, return_tensors="pt"
            ).input_ids.to(device)
            losses.append(loss_of(student, teacher, batch, empty))
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(torch.stack(losses).sum())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.steps - 1:
            each = " ".join(f"{loss.item():.4f}" for loss in losses)
            print(f"step {step} loss {each} {time.monotonic() - started:.0f} s", flush=True)
    return students[0].eval(), students[1].eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="a trained model, changed")
    arguments, recipe, device = command.parse(parser, PositionsRecipe())
    print(json.dumps(asdict(recipe)), flush=True)
    for name, encoder in zip(KINDS, train(arguments.folder, recipe, device), strict=True):
        encoder.half().save_pretrained(arguments.folder / name, variant="fp16")


if __name__ == "__main__":
    main()
