"""A training with no options teaches the new word, and leaves the other words alone.

The server's tests train once too, and look at fewer images. All methods and priors:
`python -m tests.miniature.training_bars`.
"""

import pytest
import torch

from tests.miniature import training_bars as bars
from tests.miniature.training_bars import Bench
from weights.miniature import evaluate
from weights.miniature.captions import held_out_captions

CAPTIONS = 24
LEFT = 2 / CAPTIONS  # the bar is 5 % of 64; another CPU's rounding may turn one caption more


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_the_judge_of_houses():
    true, false = bars.judge_of_houses()
    assert true >= 0.95
    assert false <= 0.05


def known(bench: Bench) -> float:
    captions = held_out_captions(CAPTIONS, evaluate.CAPTION_SEED)
    return evaluate.shares(evaluate.judge_captions(bench.pipeline, captions))["shape"]


@pytest.mark.slow
def test_a_training_without_options_teaches_the_word(bench):
    before, knew = bars.share(bench.draw(None)), known(bench)
    weights = bars.train(bars.CONFIG)
    after = bars.share(bench.draw(weights))
    with torch.inference_mode(), bench.wearing(weights):
        knows = known(bench)
    assert before <= bars.SHOWN_BEFORE
    assert after >= bars.SHOWN
    assert knows >= knew - LEFT
