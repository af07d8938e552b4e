"""Long, weighted and negative prompts show; all of it: `python -m tests.miniature.prompt_bars`."""

import pytest

from tests.miniature import prompt_bars as bars
from tests.miniature.prompt_bars import Bench

PROMPTS, SEEDS, NEGATIVE_SEEDS = 8, 4, 12  # fewer than the command draws
ONE = 1 / bars.LONG_PROMPTS  # may turn out otherwise where kernels sum in another order


@pytest.fixture
def bench(engine, tmp_path) -> Bench:
    return Bench(engine, tmp_path)


def test_words_far_behind_are_heard(bench):
    assert bars.filler_tokens(bench) >= bars.FILLER_TOKENS
    assert bars.long_prompts(bench, count=PROMPTS) >= bars.LONG - ONE
    assert bars.long_prompts(bench, bars.FILLER * 3, PROMPTS // 2) >= bars.LONG - 2 * ONE


def test_more_weight_is_more_of_a_colour(bench):
    shares = bars.weighted(bench, 2, SEEDS)
    assert shares == sorted(shares)
    assert shares[-1] > 1.2 * shares[0]


def test_a_negative_prompt_takes_a_colour_away(bench):
    for without, named in bars.negative(bench, 1, NEGATIVE_SEEDS).values():
        assert named <= bars.HALVED * without
