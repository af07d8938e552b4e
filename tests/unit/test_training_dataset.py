"""Examples → latents → batches."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.unit.test_training_config import plan
from training import dataset
from training.dataset import (
    BucketBatchSampler,
    CachedExample,
    Example,
    LatentView,
    NoiseSettings,
)
from training.errors import InvalidTraining

EXAMPLE = Example(
    "a.png", Image.new("RGB", (64, 48)), Image.new("L", (64, 48), 255), "a TOK", (100, 120), (3, 4)
)


def latents(caption: str, size: tuple[int, int] = (2, 3), views: int = 1) -> CachedExample:
    view = LatentView(torch.zeros(4, *size), torch.zeros(4, *size), torch.ones(1, *size))
    return CachedExample((view,) * views, torch.arange(6.0), caption)


NOISE = NoiseSettings(latent_scale=2.0, n_timesteps=1000)
DATA = [latents(f"caption {i} of a TOK") for i in range(6)]


def sample(slots: range, number: int = 0, data=DATA, **settings):
    made = plan(**{"seed": 1, "caption_dropout": 0.0, **settings})
    items = [data[slot] for slot in slots]
    kind = dataset.TRAINING
    return dataset.sample_batch(items, kind, number, slots, len(data), made, NOISE)


@pytest.mark.parametrize(
    "changes",
    [
        {"image": Image.new("RGBA", (64, 48))},
        {"mask": Image.new("L", (64, 64))},
        {"image": Image.new("RGB", (60, 48)), "mask": Image.new("L", (60, 48))},
    ],
    ids=["mode", "mask's size", "sides"],
)
def test_images_that_cannot_be_trained_on(changes):
    with pytest.raises(AssertionError, match=r"a\.png"):
        replace(EXAMPLE, **changes)


@pytest.mark.parametrize("caption", ["a dog", "a TOKYO street", "a tok", ""])
def test_captions_without_the_word(caption):
    with pytest.raises(InvalidTraining, match="no caption has the word 'TOK'"):
        dataset.check_captions([replace(EXAMPLE, caption=caption)], plan())


def test_one_caption_with_the_word_is_enough():
    dataset.check_captions([replace(EXAMPLE, caption="a dog"), EXAMPLE], plan())


def test_some_are_held_out_by_the_seed():
    examples = [replace(EXAMPLE, name=str(i)) for i in range(16)]
    kept, held_out = dataset.split(examples, plan(16, seed=3))
    assert (len(kept), len(held_out)) == (14, 2)
    assert {e.name for e in kept} | {e.name for e in held_out} == {str(i) for i in range(16)}
    assert dataset.split(examples, plan(16, seed=3)) == (kept, held_out)
    assert dataset.split(examples, plan(16, seed=4)) != (kept, held_out)


class FakeVae:
    """Latents whose mean is each 8x8 cell's red, in [-1, 1]."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pixels):
        mean = torch.nn.functional.avg_pool2d(pixels[:, :1], 8).expand(-1, 4, -1, -1)
        return type("Output", (), {"latent_dist": type("D", (), {"mean": mean, "std": mean * 0})})


def half_red() -> Example:
    """The left half red and masked."""
    image, mask = Image.new("RGB", (64, 48)), Image.new("L", (64, 48))
    image.paste((255, 0, 0), (0, 0, 32, 48))
    mask.paste(255, (0, 0, 32, 48))
    return replace(EXAMPLE, image=image, mask=mask)


def test_latents_know_mean_mask_and_sizes():
    (item,) = dataset.encode(FakeVae(), [half_red()], flip=False)
    assert item.size == (6, 8)
    assert item.time_ids.tolist() == [100, 120, 3, 4, 48, 64]  # the example's own, not the square's
    assert item.views[0].mean[0, 0].tolist() == [1] * 4 + [-1] * 4
    assert item.views[0].mask[0, 0].tolist() == [1] * 4 + [0] * 4


def test_mirrored_images_have_mirrored_masks():
    (item,) = dataset.encode(FakeVae(), [half_red()], flip=True)
    straight, mirrored = item.views
    assert torch.equal(mirrored.mean, straight.mean.flip(-1))
    assert torch.equal(mirrored.mask, straight.mask.flip(-1))


def take(sizes, batch: int, count: int, seed: int = 0) -> list[list[int]]:
    return list(itertools.islice(BucketBatchSampler(sizes, batch, seed), count))


def test_every_example_comes_once_a_round():
    batches = take([(2, 2)] * 6, 2, 6)
    rounds = [sorted(itertools.chain(*batches[k : k + 3])) for k in (0, 3)]
    assert rounds == [list(range(6))] * 2
    assert batches[:3] != batches[3:]  # shuffled anew


def test_a_batch_has_one_size_and_sizes_have_their_share():
    sizes = [(2, 2)] * 6 + [(2, 3)] * 3 + [(3, 2)]
    batches = take(sizes, 4, 100)
    assert all(len({sizes[i] for i in batch}) == 1 for batch in batches)
    counts = Counter(i for batch in batches for i in batch)
    assert all(abs(counts[i] - 40) <= 4 for i in range(10)), counts


def test_a_batch_larger_than_the_set_is_filled_up():
    assert Counter(take([(2, 2)] * 3, 7, 1)[0]).most_common()[0][1] == 3


def test_the_order_is_the_seed_s():
    assert take([(2, 2)] * 9, 3, 5, seed=1) == take([(2, 2)] * 9, 3, 5, seed=1)
    assert take([(2, 2)] * 9, 3, 5, seed=1) != take([(2, 2)] * 9, 3, 5, seed=2)


def test_a_batch_is_the_same_however_it_is_shared():
    whole, first, second = sample(range(6)), sample(range(3)), sample(range(3, 6))
    for name in ("latents", "noise", "timesteps", "time_ids", "mask"):
        parts = torch.cat([getattr(first, name), getattr(second, name)])
        assert torch.equal(parts, getattr(whole, name)), name
    assert whole.captions == first.captions + second.captions


def test_captions_belong_to_their_latents():
    """diffusers' advanced trainer caches by step and pairs them with other images' captions."""
    data = [latents(str(i), views=1) for i in range(4)]
    data = [
        replace(d, views=(replace(d.views[0], mean=d.views[0].mean + i),))
        for i, d in enumerate(data)
    ]
    items = [data[i] for i in (2, 0, 3)]
    made = plan(seed=1, caption_dropout=0.0)
    batch = dataset.sample_batch(items, dataset.TRAINING, 0, range(3), 3, made, NOISE)
    assert batch.captions == ["2", "0", "3"]
    assert batch.latents[:, 0, 0, 0].tolist() == [4, 0, 6]  # scaled by 2


def test_noise_is_new_in_each_step_and_place():
    batches = [sample(range(6), number) for number in (0, 1)]
    assert len({tuple(row.flatten().tolist()) for b in batches for row in b.noise}) == 12


def test_latents_are_sampled_anew():
    view = replace(DATA[0].views[0], std=torch.ones(4, 2, 3))
    data = [replace(DATA[0], views=(view,))]
    first, second = (sample(range(1), number, data).latents for number in (0, 1))
    assert not torch.equal(first, second)
    assert first.std() > 0.3


def test_timesteps_cover_the_range():
    for number in range(20):
        steps = sample(range(6), number).timesteps
        assert all(abs(s * 6 / 1000 - k - 0.5) < 0.51 for k, s in enumerate(steps.tolist()))


def test_caption_dropout_drops_its_share():
    dropped = [
        c == "" for n in range(100) for c in sample(range(6), n, caption_dropout=0.3).captions
    ]
    assert sum(dropped) / len(dropped) == pytest.approx(0.3, abs=0.06)


def test_noise_offset_moves_whole_channels():
    plain, moved = (sample(range(6), noise_offset=o).noise for o in (0.0, 0.5))
    shift = (moved - plain).flatten(2)
    assert shift.std(dim=2).max() < 1e-6
    assert shift.mean(dim=2).std() == pytest.approx(0.5, rel=0.5)


def test_mirrored_views_are_shown_half_of_the_time():
    views = tuple(replace(DATA[0].views[0], mean=torch.full((4, 2, 3), float(k))) for k in (0, 1))
    data = [replace(DATA[0], views=views)]
    seen = [sample(range(1), n, data).latents.mean().item() / 2 for n in range(200)]
    assert 0.35 < sum(seen) / len(seen) < 0.65


def test_a_step_is_the_same_however_many_processes_share_it():
    settings = {"seed": 1, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    made = plan(caption_dropout=0.0, **settings)

    def steps(first_step: int, *process: int) -> list[list[dataset.Batch]]:
        batches = dataset.step_batches(DATA, dataset.TRAINING, first_step, made, NOISE, *process)
        return list(itertools.islice(batches, 2))

    whole, halves = steps(0), (steps(0, 0, 2), steps(0, 1, 2))
    for step, batches in enumerate(whole):
        for number, batch in enumerate(batches):
            shares = [half[step][number] for half in halves]
            assert torch.equal(batch.noise, torch.cat([share.noise for share in shares]))
            assert torch.equal(batch.timesteps, torch.cat([s.timesteps for s in shares]))
            assert batch.captions == [c for share in shares for c in share.captions]
    (resumed, _), (_, second) = steps(1), whole
    assert all(torch.equal(a.noise, b.noise) for a, b in zip(resumed, second, strict=True))
    assert next(dataset.step_batches([], dataset.TRAINING, 0, made, NOISE)) == []
