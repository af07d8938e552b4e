"""A training with no options teaches the new word, and leaves the other words alone.

The server's tests train once too, and look at fewer images. All methods and priors:
`python -m tests.evals.training`.
"""

import pytest
import torch

from tests.evals import training as training_eval
from tests.evals.training import TrainingHarness
from weights.miniature import evaluate
from weights.miniature.captions import held_out_captions

CAPTIONS = 24
LEFT = 2 / CAPTIONS  # the threshold is 5 % of 64; another CPU's rounding may turn one caption more


@pytest.fixture(scope="module")
def harness() -> TrainingHarness:
    return TrainingHarness()


def test_the_judge_of_houses():
    true, false = training_eval.judge_of_houses()
    assert true >= 0.95
    assert false <= 0.05


def known(harness: TrainingHarness) -> float:
    captions = held_out_captions(CAPTIONS, evaluate.CAPTION_SEED)
    return evaluate.shares(evaluate.judge_captions(harness.pipeline, captions))["shape"]


@pytest.mark.slow
def test_a_training_without_options_teaches_the_word(harness):
    before, knew = training_eval.share(harness.generate(None)), known(harness)
    weights = training_eval.train(training_eval.CONFIG)
    after = training_eval.share(harness.generate(weights))
    with torch.inference_mode(), harness.applied(weights):
        knows = known(harness)
    assert before <= training_eval.SHOWN_BEFORE
    assert after >= training_eval.SHOWN
    assert knows >= knew - LEFT
