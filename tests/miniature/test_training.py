"""A training's mechanics: few steps of the real miniature at 64 pixels."""

from __future__ import annotations

import copy
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.evals import concept
from training import loop, lora
from training.config import (
    TRAINABLE_MODELS,
    LoraFormat,
    Method,
    Optimizer,
    Prior,
    Schedule,
    TrainConfig,
)
from training.dataset import TRAINING, Batch, encode, sample_batch
from training.errors import (
    DiskFull,
    InvalidTraining,
    MissingCompiler,
    MissingOptimizer,
    WrongCheckpoint,
)
from training.loop import Trained
from training.model import TrainableModel, load
from training.plan import resolve
from training.previews import generate_previews
from training.progress import (
    CheckpointSaved,
    Event,
    HeldOutLoss,
    Previews,
    Started,
    StepDone,
    TokensFrozen,
)
from training.trainables import attach_trainables
from weights.catalog import Edition
from weights.formats.types import Pooling

CPU = torch.device("cpu")
QUICK = TrainConfig(
    input_images=Path(),
    seed=0,
    max_train_steps=4,
    train_batch_size=2,
    lora_rank=4,
    resolution=64,
    caption_dropout=0.0,
    lr_scheduler=Schedule.CONSTANT,  # the same rates however many steps there are
    verbose=False,
)
ENCODER = "text_encoder_2"


@pytest.fixture(scope="module")
def model() -> TrainableModel:
    """Shared: all but method full leave it as it was, which a test here checks."""
    return load(TRAINABLE_MODELS[Edition.MINIATURE], Edition.MINIATURE, CPU, Method.LORA)


def small_examples(count: int = 4) -> list:
    examples = concept.examples(count)
    return [
        replace(e, image=e.image.resize((64, 64)), mask=e.mask.resize((64, 64))) for e in examples
    ]


class Recorder(list):
    """Events, and something to do at one of them."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind):
        return [event for event in self if isinstance(event, kind)]


@pytest.fixture
def train(model, tmp_path):
    def train(
        on_event=None, model=model, class_images=(), generate=generate_previews, n=4, **settings
    ) -> Trained:
        events = on_event if on_event is not None else Recorder()
        config = replace(QUICK, **settings)
        return loop.fit(small_examples(n), class_images, config, model, tmp_path, events, generate)

    return train


@pytest.fixture(scope="module")
def untouched() -> dict[int, dict[str, torch.Tensor]]:
    """What trainings without settings give, by the number of examples; made once."""
    return {}


def tensors_of(trained: Trained) -> dict[str, torch.Tensor]:
    weights = trained.weights
    tensors = {f"{m}.{k}": getattr(d, k) for m, d in weights.lora.items() for k in ("down", "up")}
    tensors |= weights.parameters
    return tensors | {f"word.{part}": v for part, v in weights.embeddings[0].vectors.items()}


def difference(one: Trained, other: Trained) -> float:
    first, second = tensors_of(one), tensors_of(other)
    assert first.keys() == second.keys()
    return max((first[k].float() - second[k].float()).abs().max().item() for k in first)


def state(model: TrainableModel) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part, module in model.components.adaptable().items()
        for name, value in module.state_dict().items()
    }


def with_own_unet(model: TrainableModel) -> TrainableModel:
    """The model with a copy of its UNet, which method full changes."""
    unet = copy.deepcopy(model.components.unet)
    return replace(model, components=replace(model.components, unet=unet))


def test_exactly_the_steps_that_were_asked_for(train):
    events = Recorder()
    trained = train(events, max_train_steps=5, gradient_accumulation_steps=2)
    assert [event.step for event in events.of(StepDone)] == [1, 2, 3, 4, 5]
    assert trained.history.steps == [1, 2, 3, 4, 5]
    (started,) = events.of(Started)
    assert (started.n_examples, started.step) == (4, 0)
    done = events.of(StepDone)
    assert [bool("tokens" in e.learning_rates) for e in done] == [True, True, False, False, False]
    assert all("lora" in e.learning_rates for e in done)
    assert [e.step for e in events.of(TokensFrozen)] == [2]
    assert json.dumps(trained.history.to_json())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_reproduces_bit_for_bit(train, seed):
    one, same = train(seed=seed), train(seed=seed)
    assert difference(one, same) == 0
    assert one.history.losses == same.history.losses
    assert difference(one, train(seed=seed + 5)) > 1e-3


def test_what_learns_and_what_stays(train, model):
    before = state(model)
    pooling = {
        part: _inner(encoder).eos_token_id
        for part, encoder in model.components.text_encoders.items()
    }
    trained = train()
    weights = trained.weights
    assert all(delta.up.abs().max() > 0 for delta in weights.lora.values())
    assert len(weights.lora) == sum(".attn" in n and ".to_q." in n for n in before) * 4
    assert weights.pooling is Pooling.EOS
    assert weights.trigger_words == {"TOK": "<s0><s1>"}
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(
        p.requires_grad for m in model.components.adaptable().values() for p in m.parameters()
    )
    for part, encoder in model.components.text_encoders.items():
        assert _inner(encoder).eos_token_id == pooling[part]


def _inner(encoder):
    return getattr(encoder, "text_model", encoder)


def test_after_the_pivot_the_word_stays(train):
    early, late = train(max_train_steps=2, pivot_fraction=1.0), train(max_train_steps=4)
    for part, vectors in early.weights.embeddings[0].vectors.items():
        assert torch.equal(vectors, late.weights.embeddings[0].vectors[part])
    modules = early.weights.lora
    assert any(not torch.equal(modules[m].up, late.weights.lora[m].up) for m in modules)


def test_captions_are_read_only_once_after_the_pivot(train, model):
    calls = []
    handle = model.components.text_encoders[ENCODER].register_forward_hook(
        lambda *_: calls.append(1)
    )
    try:
        train(max_train_steps=30, pivot_fraction=0.1)
    finally:
        handle.remove()
    assert len(calls) <= 3 + 4  # three steps before it, and four captions


def test_the_word_s_norms_stay_among_the_vocabulary_s(train, model):
    trained = train(method=Method.TEXTUAL_INVERSION, lora_rank=None, ti_lr=1.0)
    for part, vectors in trained.weights.embeddings[0].vectors.items():
        table = model.components.text_encoders[part].get_input_embeddings().weight
        low, high = torch.quantile(table.norm(dim=1), torch.tensor([0.01, 0.99])).tolist()
        norms = vectors.norm(dim=1)
        assert low * 0.999 <= norms.min()
        assert norms.max() <= high * 1.001
        assert len(norms) == 2


def test_words_behind_the_new_one_are_heard(model):
    """At the highest token id, the new word's, the pooled embedding ignores all that follows."""
    plan = resolve(QUICK, model.spec, 4)
    with attach_trainables(model, plan) as trainables, torch.no_grad():
        _, pooled = trainables.captions.encode(
            ["a TOK on a red background", "a TOK on a blue background"]
        )
    assert (pooled[0] - pooled[1]).abs().max() > 1e-2


def test_captions_are_read_as_predictions_read_them(model):
    """A word of the vocabulary keeps its embeddings, and TOKYO is no TOK."""
    plan = resolve(QUICK, model.spec, 4)
    captions = ["a red circle", "TOKYO"]
    with attach_trainables(model, plan) as trainables, torch.no_grad():
        embeds, pooled = trainables.captions.encode(captions)
        trainables.captions.freeze()
        again, _ = trainables.captions.encode(captions)
        ids = trainables.tokens.tokenizers[ENCODER](["TOKYO"]).input_ids[0]
    torch.testing.assert_close(embeds, again, rtol=1e-4, atol=1e-5)
    assert max(ids) < model.components.text_encoders[ENCODER].get_input_embeddings().num_embeddings
    states = []
    for part, encoder in model.components.text_encoders.items():
        ids = model.components.tokenizers[part](
            captions, padding="max_length", max_length=77, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
    torch.testing.assert_close(embeds, torch.cat(states, dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, output.text_embeds, rtol=1e-4, atol=1e-5)


def test_one_word_for_all_the_vectors_to_start_from(model):
    plan = resolve(replace(QUICK, token_initializer="circle", num_new_tokens=3), model.spec, 4)
    with attach_trainables(model, plan) as trainables:
        table = model.components.text_encoders[ENCODER].get_input_embeddings().frozen.weight
        (number,) = model.components.tokenizers[ENCODER](
            "circle", add_special_tokens=False
        ).input_ids
        similarity = torch.cosine_similarity(trainables.tokens.embeddings[ENCODER], table[[number]])
    assert len(similarity) == 3
    assert similarity.min() > 0.9
    plan = replace(plan, token_initializer="xylophonist")
    with pytest.raises(InvalidTraining, match=r"as \d+ tokens"), attach_trainables(model, plan):
        pass


def first_batch(model: TrainableModel, plan, captions: list[str]) -> Batch:
    items = encode(model.components.vae, small_examples(2), False)
    batch = sample_batch(items, TRAINING, 0, range(2), 2, plan, model.noise)
    return replace(batch, captions=captions)


def test_the_unet_sees_the_images_size(model):
    """cog-sdxl's latents are 512 pixels' whatever the resolution is said to be."""
    plan = resolve(QUICK, model.spec, 4)
    batch = first_batch(model, plan, ["a TOK"] * 2)
    assert batch.latents.shape == (2, 4, 8, 8)
    assert batch.time_ids.tolist() == [[128, 128, 0, 0, 64, 64]] * 2


def test_a_lora_begins_without_effect_and_goes_without_trace(model):
    plan = resolve(QUICK, model.spec, 4)
    batch = first_batch(model, plan, ["a red circle"] * 2)
    with (
        attach_trainables(model, replace(plan, method=Method.TEXTUAL_INVERSION)) as trainables,
        torch.no_grad(),
    ):
        without = trainables.loss(batch)
    with attach_trainables(model, plan) as trainables, torch.no_grad():
        assert trainables.loss(batch) == without
        for parameter in trainables.groups[1].parameters.values():
            parameter.add_(0.1)
        changed = trainables.loss(batch)
        assert changed != without
        with lora.disabled(model.components.unet):
            assert trainables.loss(batch) == without
        assert trainables.loss(batch) == changed


def test_the_teacher_is_the_base_model(model):
    """Nothing to unlearn at first, and something once the LoRA has moved."""
    plan = replace(
        resolve(QUICK, model.spec, 4), prior_preservation=Prior.TEACHER, class_prompt="circle"
    )
    batch = first_batch(model, plan, ["a red TOK"] * 2)
    with attach_trainables(model, plan) as trainables:
        assert trainables.teacher_loss(batch).item() == 0
        with torch.no_grad():
            for parameter in trainables.groups[1].parameters.values():
                parameter.add_(0.1)
        loss = trainables.teacher_loss(batch)
        assert loss.item() > 1e-5
        torch.autograd.backward(loss)
        assert not trainables.tokens.embeddings[
            ENCODER
        ].grad.any()  # the class has words of its own


def test_prior_by_teacher_and_by_class_images(train):
    class_images = [replace(e, caption="") for e in small_examples(3)]
    kinds = (
        {},
        {"prior_preservation": Prior.TEACHER, "class_prompt": "circle"},
        {
            "prior_preservation": Prior.CLASS_IMAGES,
            "class_prompt": "a circle",
            "class_images": class_images,
        },
    )
    events = [Recorder() for _ in kinds]
    off, teacher, images = (train(e, **kind) for e, kind in zip(events, kinds, strict=True))
    none, taught, pictured = ([e.prior_loss for e in recorder.of(StepDone)] for recorder in events)
    assert none == [None] * 4
    assert taught[0] == 0
    assert taught[-1] > 0
    assert min(pictured) > 0
    assert difference(off, teacher) > 1e-5
    assert difference(off, images) > 1e-5


def test_class_images_and_their_setting_belong_together(train):
    with pytest.raises(InvalidTraining, match="class_images is empty"):
        train(prior_preservation=Prior.CLASS_IMAGES, class_prompt="a circle")
    with pytest.raises(InvalidTraining, match="class_images is set"):
        train(class_images=small_examples(2))


def test_accumulated_batches_are_one_large_batch(train):
    whole = train(train_batch_size=4, max_train_steps=2)
    parts = train(train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=2)
    assert difference(whole, parts) < 2e-4
    assert whole.history.losses == pytest.approx(parts.history.losses, rel=1e-4)


def test_method_full_changes_the_unet_and_textual_inversion_does_not(train, model):
    own = with_own_unet(model)
    before = state(own)
    trained = train(model=own, method=Method.FULL, lora_rank=None)
    parameters = trained.weights.parameters
    assert parameters.keys() == {n for n in before if n.startswith("unet.")}
    changed = [n for n, v in parameters.items() if not torch.equal(v, before[n])]
    assert len(changed) > 0.99 * len(parameters)  # cog-sdxl: none
    word_only = train(method=Method.TEXTUAL_INVERSION, lora_rank=None).weights
    assert not word_only.parameters
    assert not word_only.lora


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 2.0},
        {"use_rslora": True},
        {"use_dora": True, "lora_format": LoraFormat.KOHYA},
        {"train_text_encoder": True, "lora_format": LoraFormat.KOHYA},
        {"text_encoder_lr": 1e-2, "train_text_encoder": True, "lora_format": LoraFormat.KOHYA},
        {"optimizer": Optimizer.PRODIGY},
        {"lr_scheduler": Schedule.LINEAR},
        {"lr_warmup_steps": 3},
        {"snr_gamma": 5.0},
        {"noise_offset": 0.5},
        {"caption_dropout": 0.9},
        {"random_flip": True},
        {"max_grad_norm": 1e-4, "optimizer": Optimizer.PRODIGY},
        {"ti_lr": 0.0},
        {"lora_lr": 1e-4},
        {"num_new_tokens": 1},
        {"pivot_fraction": 0.0},
        {"validation": False, "n": 8},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_setting_has_an_effect(train, untouched, settings):
    n = settings.get("n", 4)
    if n not in untouched:
        untouched[n] = tensors_of(train(n=n))
    plain, changed = untouched[n], tensors_of(train(**settings))
    if "text_encoder_lr" in settings:
        plain = tensors_of(train(**{**settings, "text_encoder_lr": None}))
    assert plain.keys() != changed.keys() or any(
        plain[k].shape != changed[k].shape or not torch.equal(plain[k], changed[k]) for k in plain
    )


def test_a_mask_has_an_effect_by_its_floor(model, tmp_path):
    def losses(floor: float) -> list[float]:
        examples = [
            replace(e, mask=Image.new("L", (64, 64)))
            if k % 2
            else replace(e, mask=Image.linear_gradient("L").resize((64, 64)))
            for k, e in enumerate(small_examples())
        ]
        config = replace(QUICK, mask_floor=floor)
        trained = loop.fit(examples, (), config, model, tmp_path, Recorder())
        return trained.history.losses

    assert losses(0.1) != losses(1.0)


def test_8_bit_adamw_needs_a_gpu(train):
    with pytest.raises(MissingOptimizer, match="needs a CUDA GPU, and the device is cpu; use adam"):
        train(optimizer=Optimizer.ADAMW_8BIT)


def test_adafactor(train, model):
    own = with_own_unet(model)
    trained = train(model=own, method=Method.FULL, lora_rank=None, optimizer=Optimizer.ADAFACTOR)
    assert all(loss < 10 for loss in trained.history.losses)


def test_gradient_checkpointing_recomputes_and_changes_nothing(train, model, monkeypatch):
    used = []
    enable = type(model.components.unet).enable_gradient_checkpointing
    monkeypatch.setattr(
        type(model.components.unet),
        "enable_gradient_checkpointing",
        lambda unet: (used.append(True), enable(unet)),
    )
    plain = train(gradient_checkpointing=False)
    assert used == []
    less_memory = train(gradient_checkpointing=True)
    assert used == [True]
    assert not model.components.unet.is_gradient_checkpointing
    assert difference(plain, less_memory) < 1e-5


def test_compiling_is_for_the_training_alone(train, model, cpp_compiler, monkeypatch):
    calls = []

    def compile_unet(unet):
        def call(*inputs, **named):
            calls.append(torch.is_grad_enabled())
            return unet(*inputs, **named)

        return call

    monkeypatch.setattr(torch, "compile", compile_unet)
    plain, compiled = train(), train(compile_unet=True)
    assert calls == [True] * 4
    assert difference(plain, compiled) == 0


@pytest.mark.slow
def test_a_compiled_unet_learns_the_same(train, model, cpp_compiler, monkeypatch):
    """With a backend that only traces: what is traced, and when, is the same."""
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda unet: compile_(unet, backend=backend))
    plain = train(n=8)
    compiled = train(n=8, compile_unet=True)  # of which one is held out, and measured at each step
    assert len(traced) == 2  # before and after the pivot
    assert difference(plain, compiled) < 1e-5
    assert compiled.history.held_out == [(s, pytest.approx(x)) for s, x in plain.history.held_out]


def test_compiling_needs_a_compiler(train, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(MissingCompiler, match=r"none was found; install g\+\+"):
        train(compile_unet=True)


def test_held_out_loss_is_always_the_same_measure(train):
    events = Recorder()
    trained = train(events, n=8, lora_lr=0.0, ti_lr=0.0)
    losses = [event.loss for event in events.of(HeldOutLoss)]
    assert len(losses) == 4
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    assert [loss for _, loss in trained.history.held_out] == losses
    assert events.of(Started)[0].n_examples == 7


def test_previews_are_drawn_with_the_new_word(train):
    seen = []

    def generate(components, prompts):
        seen.append(prompts)
        assert components.tokenizers["text_encoder"]("<s0>").input_ids[1] >= 700
        return [Image.new("RGB", (8, 8))] * len(prompts)

    events = Recorder()
    train(events, generate=generate, preview_prompts=("a TOK", "TOK, blue"), preview_steps=3)
    assert [event.step for event in events.of(Previews)] == [3, 4]
    assert seen == [["a <s0><s1>", "<s0><s1>, blue"]] * 2


class Stop(BaseException):
    """What Cog cancels with is none of Exception's either."""


class StopAt(Recorder):
    def __init__(self, kind: type, step: int) -> None:
        super().__init__()
        self.kind, self.step = kind, step

    def __call__(self, event: Event) -> None:
        self.append(event)
        if isinstance(event, self.kind) and event.step == self.step:
            raise Stop


def test_a_stopped_training_goes_on_where_its_checkpoint_is(train, tmp_path):
    settings = {"max_train_steps": 6, "n": 8}
    whole = train(**settings)
    with pytest.raises(Stop):
        train(StopAt(StepDone, 5), checkpointing_steps=2, **settings)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    events = Recorder()
    resumed = train(events, checkpointing_steps=2, **settings)
    assert events.of(Started)[0].step == 4
    assert [event.step for event in events.of(StepDone)] == [5, 6]
    assert difference(whole, resumed) < 1e-6  # kernels may round another way elsewhere in memory
    assert resumed.history.losses == pytest.approx(whole.history.losses, rel=1e-5)
    assert resumed.history.pivot_step == whole.history.pivot_step == 3
    assert resumed.history.held_out == [(s, pytest.approx(x)) for s, x in whole.history.held_out]


def test_a_full_disk_keeps_the_last_checkpoint(train, tmp_path, monkeypatch):
    def save(tensors, file):
        if any((tmp_path / "checkpoints").glob("step-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, file)

    plain = torch.save
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(DiskFull, match=r"the checkpoint of step 4 does not fit into .* free some"):
        train(checkpointing_steps=2)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_another_training_s_checkpoint_is_refused(train):
    with pytest.raises(Stop):
        train(StopAt(CheckpointSaved, 1), checkpointing_steps=1)
    with pytest.raises(WrongCheckpoint, match="other settings, another seed"):
        train(seed=1)


@pytest.mark.parametrize("kind", [Started, StepDone, TokensFrozen])
def test_a_cancelled_training_leaves_nothing(train, model, tmp_path, kind):
    before = state(model)
    with pytest.raises(Stop):
        train(StopAt(kind, {Started: 0, StepDone: 2, TokensFrozen: 2}[kind]))
    after = state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list(tmp_path.iterdir()) == []
    assert not lora.parameters(model.components.unet)


PROGRAM = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from tests.miniature.test_training import CPU, QUICK, small_examples, tensors_of
from training import loop
from training.config import TRAINABLE_MODELS, Method
from training.model import load
from training.progress import StepDone
from weights.catalog import Edition

def tell(event):
    if isinstance(event, StepDone):
        print(event.step, flush=True)

torch.set_num_threads(1)
model = load(TRAINABLE_MODELS[Edition.MINIATURE], Edition.MINIATURE, CPU, Method.LORA)
config = replace(QUICK, max_train_steps=int(sys.argv[2]), checkpointing_steps=2)
trained = loop.fit(small_examples(), (), config, model, Path(sys.argv[1]), tell)
torch.save(tensors_of(trained), Path(sys.argv[1]) / f"result-{trained.history.steps[-1]}.pt")
"""


def start(folder: Path, steps: int, *launcher: str) -> subprocess.Popen:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, str(program), str(folder), str(steps)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_a_killed_process_s_training_goes_on(train, tmp_path):
    process = start(tmp_path, 400)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 5:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    saved = [p.name for p in (tmp_path / "checkpoints").glob("step-*")]
    assert saved
    first = int(saved[-1].removeprefix("step-"))
    events = StopAt(StepDone, first + 2)
    with pytest.raises(Stop):
        train(events, max_train_steps=400)
    assert events.of(Started)[0].step == first
    whole = StopAt(StepDone, first + 2)
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    with pytest.raises(Stop):
        train(whole, max_train_steps=400)
    losses = [event.loss for event in whole.of(StepDone)][-2:]
    assert [event.loss for event in events.of(StepDone)] == pytest.approx(losses, rel=1e-4)


def test_two_processes_learn_what_one_does(train, tmp_path):
    process = start(
        tmp_path, 4, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2",
        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        f"--main_process_port={20000 + os.getpid() % 20000}",
    )  # fmt: skip
    began = time.monotonic()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert printed.split() == ["1", "2", "3", "4"]  # only the first process tells
    print(f"two processes: {time.monotonic() - began:.0f} s")
    (tmp_path / "checkpoints").rename(tmp_path / "aside")
    one = tensors_of(train(max_train_steps=4))
    two = torch.load(tmp_path / "result-4.pt", weights_only=True)
    assert one.keys() == two.keys()
    # Adam's first steps divide by the gradient's own size, so its rounding shows
    assert max((one[k] - two[k]).abs().max() for k in one) < 1e-3
