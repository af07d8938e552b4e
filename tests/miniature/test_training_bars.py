"""A short training teaches something of the new word. How much it should, and what it may cost, are
the bars of `python -m tests.miniature.training_bars`, which the present recipe does not meet."""

from dataclasses import replace

import pytest
import torch

from tests.miniature import training_bars as bars
from tests.miniature.training_bars import Bench
from weights.miniature import evaluate
from weights.miniature.captions import held_out_captions

STEPS = 250
CAPTIONS = 16


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_the_judge_of_crescents():
    true, false = bars.judge_of_crescents()
    assert true >= 0.95
    assert false <= 0.05


def known(bench: Bench) -> float:
    captions = held_out_captions(CAPTIONS, evaluate.CAPTION_SEED)
    return evaluate.shares(evaluate.judge_captions(bench.pipeline, captions))["shape"]


@pytest.mark.slow
def test_a_short_training_teaches_the_word(bench):
    before = bars.share(bench.draw(None, count=8))
    knew = known(bench)
    weights = bars.train(replace(bars.CONFIG, max_train_steps=STEPS, verbose=False))
    after = bars.share(bench.draw(weights, count=8))
    with torch.inference_mode(), bench.wearing(weights):
        knows = known(bench)
    assert before <= 0.125
    assert after >= before + 0.25
    assert knows >= knew - 0.5
