"""The faults of cog-sdxl's trainer, and what is done here; each names the test that shows it.

The numbers are those of the review of other trainers; B4 to B6 and B9 to B15 are about preparing
images.
"""

import ast
from pathlib import Path

import pytest

MECHANICS = "tests.miniature.test_training"
CONFIG = "tests.unit.test_training_config"
DATASET = "tests.unit.test_training_dataset"
LOSSES = "tests.unit.test_training_losses"
EXPORT = "tests.unit.test_training_export"

# fault → (what cog-sdxl does, what is done here, where it is shown)
FAULTS = {
    "B1": (
        "trains at 512 pixels whatever the resolution, and tells the UNet otherwise",
        "latents and time ids are the example's own",
        f"{MECHANICS}:test_the_unet_sees_the_images_size",
    ),
    "B2": (
        "a full fine-tuning changes nothing in the UNet",
        "changes all of its parameters",
        f"{MECHANICS}:test_method_full_changes_the_unet_and_textual_inversion_does_not",
    ),
    "B3": (
        "pools at the new word, deaf to what follows it",
        "pools at the end of the text",
        f"{MECHANICS}:test_words_behind_the_new_one_are_heard",
    ),
    "B3, in use": (
        "nothing says how weights were trained",
        "the archive's header does, and the reader follows",
        f"{EXPORT}:test_the_archive_is_cog_sdxl_s",
    ),
    "B7, steps": (
        "rounds max_train_steps up to whole epochs",
        "makes exactly as many",
        f"{MECHANICS}:test_exactly_the_steps_that_were_asked_for",
    ),
    "B7, pivot": (
        "a short training freezes the word before it has learnt anything",
        "the word learns in the first step at least",
        f"{CONFIG}:test_settled_values",
    ),
    "B8": (
        "TOK in TOKYO is replaced too",
        "words are replaced as a whole",
        f"{MECHANICS}:test_captions_are_read_as_predictions_read_them",
    ),
    "B9": (
        "trains on captions that lack the word, without a warning",
        "refuses them before it begins",
        f"{DATASET}:test_captions_without_the_word",
    ),
    "B15, seed 0": (
        "takes a seed of 0 for none",
        "0 is a seed as any other",
        f"{MECHANICS}:test_a_seed_reproduces_bit_for_bit",
    ),
    "B16": (
        "a small mask makes small gradients",
        "each picture's error is divided by its mask's area",
        f"{LOSSES}:test_a_small_subject_counts_as_much_as_a_large_one",
    ),
    "B17": (
        "rescales the new vectors twice a step, both by one factor, frozen ones too",
        "each vector's norm by itself, and only out of the vocabulary's range",
        f"{MECHANICS}:test_the_word_s_norms_stay_among_the_vocabulary_s",
    ),
    "B18": (
        "takes options that do nothing",
        "every setting changes the result",
        f"{MECHANICS}:test_every_setting_has_an_effect",
    ),
    "B19": (
        "one latent sample of each picture for the whole training",
        "a fresh one each time",
        f"{DATASET}:test_latents_are_sampled_anew",
    ),
    "B23": (
        "runs both encoders after the pivot, for what is constant",
        "computes each caption once",
        f"{MECHANICS}:test_captions_are_read_only_once_after_the_pivot",
    ),
    "Eden": (
        "normalises the mask after the batch was reduced, which does nothing",
        "normalises each picture ahead of the noise level's weight",
        f"{LOSSES}:test_each_image_has_its_own_mask_area",
    ),
    "diffusers, advanced": (
        "caches latents by step and pairs them with other pictures' captions",
        "caches by example",
        f"{DATASET}:test_captions_belong_to_their_latents",
    ),
    "diffusers, kohya export": (
        "writes alpha = rank whatever it was",
        "writes the alpha of the training",
        f"{EXPORT}:test_exchange_files",
    ),
}


@pytest.mark.parametrize("test", [where for _, _, where in FAULTS.values()], ids=FAULTS)
def test_the_test_that_shows_it_exists(test):
    module, _, name = test.partition(":")  # read and not imported, which takes seconds
    tree = ast.parse(Path(f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
