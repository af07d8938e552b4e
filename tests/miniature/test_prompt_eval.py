"""Long, weighted and negative prompts have effects; all figures: `python -m tests.evals.prompt`."""

import pytest

from tests.evals import prompt as prompt_eval
from tests.evals.harness import Harness

PROMPTS, SEEDS, NEGATIVE_SEEDS = 8, 4, 12  # fewer than the command draws
ONE = 1 / prompt_eval.LONG_PROMPTS  # may turn out otherwise where kernels sum in another order


@pytest.fixture
def harness(engine, tmp_path) -> Harness:
    return Harness(engine, tmp_path)


def test_words_at_the_end_of_long_prompts_count(harness):
    assert prompt_eval.filler_tokens(harness) >= prompt_eval.FILLER_TOKENS
    assert prompt_eval.long_prompts(harness, count=PROMPTS) >= prompt_eval.LONG - ONE
    assert (
        prompt_eval.long_prompts(harness, prompt_eval.FILLER * 3, PROMPTS // 2)
        >= prompt_eval.LONG - 2 * ONE
    )


def test_more_weight_is_more_of_a_colour(harness):
    shares = prompt_eval.weighted(harness, 2, SEEDS)
    assert shares == sorted(shares)
    assert shares[-1] > 1.2 * shares[0]


def test_a_negative_prompt_takes_a_colour_away(harness):
    for without, named in prompt_eval.negative(harness, 1, NEGATIVE_SEEDS).values():
        assert named <= prompt_eval.HALVED * without
