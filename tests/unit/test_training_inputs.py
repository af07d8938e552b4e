"""Every input of a training reaches its settings: through script/train's flags and train.py."""

import tempfile

import pytest

import train as boundary
from script.tools.arguments import as_cog_gives_them, parse_inputs
from script.tools.openapi import document
from script.tools.train import COMPONENT, ROOT
from training import run

SCHEMA = document(ROOT)
# name → what it is set to, and what that takes beside it
INPUTS: dict[str, tuple[str, ...]] = {
    "seed": ("5",),
    "resolution": ("96",),
    "train_batch_size": ("3",),
    "num_train_epochs": ("7",),
    "max_train_steps": ("9",),
    "is_lora": ("false",),
    "unet_learning_rate": ("0.5",),
    "ti_lr": ("0.5",),
    "lora_lr": ("0.5",),
    "lora_rank": ("5",),
    "lr_scheduler": ("linear",),
    "lr_warmup_steps": ("3",),
    "token_string": ("CAT",),
    "caption_prefix": ("TOK: ",),
    "mask_target_prompts": ("a face",),
    "crop_based_on_salience": ("false",),
    "use_face_detection_instead": ("true",),
    "clipseg_temperature": ("2",),
    "verbose": ("false",),
    "checkpointing_steps": ("3",),
    "input_images_filetype": ("tar",),
    "method": ("textual_inversion",),
    "aspect_ratio_buckets": ("false",),
    "lora_alpha": ("3",),
    "use_rslora": ("true",),
    "use_dora": ("true", "lora_format=kohya"),
    "train_text_encoder": ("true", "lora_format=kohya"),
    "lora_format": ("kohya",),
    "exchange_files": ("true",),
    "optimizer": ("prodigy",),
    "gradient_accumulation_steps": ("2",),
    "num_new_tokens": ("3",),
    "token_initializer": ("circle",),
    "pivot_fraction": ("0.25",),
    "snr_gamma": ("4",),
    "noise_offset": ("0.25",),
    "caption_dropout": ("0.25",),
    "mask_floor": ("0.25",),
    "random_flip": ("true",),
    "prior_preservation": ("teacher", "class_prompt=a dog"),
    "class_prompt": ("a dog", "prior_preservation=teacher"),
    "prior_loss_weight": ("2",),
    "compile_unet": ("true",),
    "validation": ("false",),
    "preview_prompts": ('["a TOK"]',),
    "text_encoder_lr": ("0.5", "train_text_encoder=true", "lora_format=kohya"),
    "max_grad_norm": ("0.5",),
    "gradient_checkpointing": ("true",),
    "preview_steps": ("3", 'preview_prompts=["a TOK"]'),
}


class Reached(Exception):
    """The settings are made; nothing of the training is needed."""


@pytest.fixture
def settings(tmp_path, monkeypatch, cpp_compiler):
    """What train.py makes of inputs, for the trainer and for the photos."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "photos.zip").touch()

    def make(*flags: str) -> list[object]:
        made: list[object] = []
        resolve = boundary.resolve

        def note(config, spec, n_examples):
            made.append(config)
            return resolve(config, spec, n_examples)

        def stop(path, settings, *_):
            made.append(settings)
            raise Reached

        with monkeypatch.context() as patch:
            patch.setattr(boundary, "resolve", note)
            patch.setattr(run, "prepare", stop)
            inputs = parse_inputs(["input_images=@photos.zip", *flags], SCHEMA, COMPONENT, tmp_path)
            with pytest.raises(Reached):
                boundary.train(**as_cog_gives_them(inputs, SCHEMA, COMPONENT))
        return made

    return make


def test_the_table_has_every_input():
    named = set(SCHEMA["components"]["schemas"][COMPONENT]["properties"])
    assert named - {"input_images", "class_images"} == set(INPUTS)


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_reaches_the_settings(settings, name):
    value, *beside = INPUTS[name]
    # These two cannot be without each other.
    without = {"class_prompt": [*beside, "class_prompt=a cat"], "prior_preservation": []}.get(
        name, beside
    )
    assert settings(f"{name}={value}", *beside) != settings(*without)
