"""Every rule about a training, and what an empty setting means."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from training.config import (
    TRAINABLE_MODELS,
    LoraFormat,
    Method,
    Optimizer,
    Prior,
    Schedule,
    TrainConfig,
)
from training.errors import InvalidTraining
from training.optimizers import build_lr_scheduler
from training.plan import TrainPlan, resolve
from weights.catalog import Edition

SDXL, MINIATURE_SDXL = TRAINABLE_MODELS[Edition.FULL], TRAINABLE_MODELS[Edition.MINIATURE]


def plan(n_examples: int = 8, spec=SDXL, **settings) -> TrainPlan:
    return resolve(TrainConfig(Path(), **settings), spec, n_examples)


MAY_BE_EMPTY = {
    "num_train_epochs",
    "mask_target_prompts",
    "token_initializer",
    "class_images",
    "gradient_checkpointing",
    "checkpointing_steps",
    "preview_steps",
}


@pytest.mark.parametrize("spec", [SDXL, MINIATURE_SDXL], ids=["full", "miniature"])
@pytest.mark.parametrize("method", Method)
def test_no_setting_is_needed(spec, method):
    made = plan(spec=spec, method=method)
    assert made.resolution == spec.native_size
    assert made.max_train_steps == spec.recipes[method].max_train_steps
    assert made.ti_lr == spec.recipes[method].ti_lr
    assert made.is_lora == (method is Method.LORA)
    assert 0 <= made.lr_warmup_steps < made.max_train_steps
    for name in (f.name for f in fields(TrainPlan)):
        assert getattr(made, name) is not None or name in MAY_BE_EMPTY, name


BROKEN = {
    "seed": ({"seed": -1}, "seed is -1", "from 0 to 4294967295"),
    "resolution": ({"resolution": 64}, "resolution is 64", "from 256 to 2048"),
    "multiple of 8": ({"resolution": 770}, "resolution is 770", "multiple of 8, such as 768"),
    "batch": ({"train_batch_size": 0}, "train_batch_size is 0", "from 1"),
    "no number": ({"lora_lr": float("nan")}, "lora_lr is nan", "from 0 to 10"),
    "steps": ({"max_train_steps": 0}, "max_train_steps is 0", "from 1"),
    "warm-up": (
        {"max_train_steps": 5, "lr_warmup_steps": 5},
        "lr_warmup_steps is 5, and there are 5 steps",
        "must be less",
    ),
    "two words": ({"token_string": "my cat"}, "token_string is 'my cat'", "one word"),
    "comma": ({"token_string": "a,b"}, "token_string is 'a,b'", "comma, colon"),
    "slash": ({"token_string": "../x"}, "token_string is '../x'", "slashes"),
    "empty word": ({"token_string": ""}, "token_string is ''", "as TOK"),
    "placeholder": ({"token_string": "x<s0>"}, "token_string is 'x<s0>'", "take a word"),
    "rank without LoRA": (
        {"method": Method.FULL, "lora_rank": 4},
        "lora_rank is set, and method is full",
        "use method lora",
    ),
    "DoRA in cog-sdxl's format": ({"use_dora": True}, "use_dora is set", "lora_format to kohya"),
    "text encoders in it": (
        {"train_text_encoder": True},
        "train_text_encoder is set",
        "lora_format to kohya",
    ),
    "rate of text encoders that stay": (
        {"text_encoder_lr": 1e-5},
        "text_encoder_lr is 1e-05",
        "set train_text_encoder",
    ),
    "method and is_lora": (
        {"method": Method.LORA, "is_lora": False},
        "method is lora and is_lora false",
        "leave one of them out",
    ),
    "adafactor": ({"optimizer": Optimizer.ADAFACTOR}, "optimizer is adafactor", "use adamw"),
    "prodigy's rate": (
        {"optimizer": Optimizer.PRODIGY, "lora_lr": 1e-4},
        "lora_lr is 0.0001",
        "leave it empty",
    ),
    "nothing learns": (
        {"method": Method.TEXTUAL_INVERSION, "ti_lr": 0},
        "ti_lr is 0",
        "trains nothing else",
    ),
    "class prompt without use": ({"class_prompt": "a dog"}, "class_prompt is 'a dog'", "teacher"),
    "prior without class": (
        {"prior_preservation": Prior.TEACHER},
        "class_prompt empty",
        "such as 'a dog'",
    ),
    "prior with the word": (
        {"prior_preservation": Prior.TEACHER, "class_prompt": "a TOK"},
        "class_prompt 'a TOK'",
        "words that the model knows",
    ),
    "prior without effect": (
        {
            "method": Method.TEXTUAL_INVERSION,
            "prior_preservation": Prior.TEACHER,
            "class_prompt": "a dog",
        },
        "prior_preservation is teacher",
        "leave it off",
    ),
    "previews of nothing": ({"preview_steps": 5}, "preview_steps is 5", "give preview_prompts"),
}


@pytest.mark.parametrize(("settings", "value", "remedy"), BROKEN.values(), ids=BROKEN)
def test_a_broken_rule_is_told_with_value_and_remedy(settings, value, remedy):
    with pytest.raises(InvalidTraining) as caught:
        plan(**settings)
    assert value in str(caught.value)
    assert remedy in str(caught.value)


def test_no_examples():
    with pytest.raises(InvalidTraining, match="at least one image"):
        plan(n_examples=0)


@pytest.mark.parametrize(
    ("settings", "field", "value"),
    [
        ({"seed": 0}, "seed", 0),  # cog-sdxl takes 0 for none
        ({"max_train_steps": 7}, "max_train_steps", 7),
        ({"max_train_steps": 7, "num_train_epochs": 2}, "max_train_steps", 7),
        # 7 examples learn (one is held out), 4 a batch: 10 epochs are 70 examples
        ({"num_train_epochs": 10, "train_batch_size": 4}, "max_train_steps", 18),
        (
            {"num_train_epochs": 10, "train_batch_size": 4, "gradient_accumulation_steps": 2},
            "max_train_steps",
            9,
        ),
        ({"max_train_steps": 1}, "pivot_step", 1),  # cog-sdxl's word never learns then
        ({"max_train_steps": 40}, "pivot_step", 20),
        ({"max_train_steps": 40, "pivot_fraction": 0.25}, "pivot_step", 10),
        ({"max_train_steps": 40, "pivot_fraction": 0.0}, "pivot_step", 0),
        ({"max_train_steps": 40, "method": Method.TEXTUAL_INVERSION}, "pivot_step", 40),
        ({"max_train_steps": 20}, "lr_warmup_steps", 2),
        ({"validation": False}, "held_out", 0),
        ({"optimizer": Optimizer.PRODIGY}, "lora_lr", 1.0),
        ({"optimizer": Optimizer.PRODIGY}, "ti_lr", 1.0),
        ({"use_dora": True, "lora_format": LoraFormat.KOHYA}, "max_train_steps", 1000),
    ],
)
def test_settled_values(settings, field, value):
    assert getattr(plan(**settings), field) == value


@pytest.mark.parametrize(("examples", "held_out"), [(1, 0), (7, 0), (8, 1), (16, 2), (100, 4)])
def test_held_out_examples(examples, held_out):
    made = plan(n_examples=examples)
    assert made.held_out == held_out
    assert (made.validation_steps is None) == (held_out == 0)


def test_an_open_seed_is_drawn():
    assert plan().seed != plan().seed


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"lora_rank": 16}, 1.0),
        ({"lora_rank": 16, "lora_alpha": 8}, 0.5),
        ({"lora_rank": 16, "lora_alpha": 8, "use_rslora": True}, 2.0),
    ],
)
def test_the_lora_s_scale(settings, scaling):
    assert plan(**settings).lora_scaling == scaling


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        (Schedule.CONSTANT, 0, 0.2),  # cog-sdxl's constant rate has no warm-up
        (Schedule.CONSTANT, 3, 0.8),
        (Schedule.CONSTANT, 4, 1.0),
        (Schedule.CONSTANT, 23, 1.0),
        (Schedule.LINEAR, 4, 1.0),
        (Schedule.LINEAR, 14, 0.5),
        (Schedule.COSINE, 14, 0.5),
        (Schedule.COSINE, 4, 1.0),
    ],
)
def test_learning_rates(schedule, step, factor):
    """Step by step, and resumed at that step."""
    made = plan(max_train_steps=24, lr_warmup_steps=4, lr_scheduler=schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    stepwise = build_lr_scheduler(made, 0.1, optimizer, 0)
    for _ in range(step):
        optimizer.step()
        stepwise.step()
    assert stepwise.get_last_lr() == pytest.approx([0.1 * factor])
    resumed = build_lr_scheduler(made, 0.1, torch.optim.SGD([torch.zeros(1)], lr=1.0), step)
    assert resumed.get_last_lr() == stepwise.get_last_lr()


def test_the_rules_need_no_torch():
    code = "import sys, training.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
