"""Trigger words: what people type for the placeholder tokens of a trained word."""

import re
from collections.abc import Iterable, Mapping

MAX_TRIGGER_CHARACTERS = 100


def can_be_typed(word: str) -> bool:
    """Whether people can write this word into a prompt."""
    return bool(word.strip()) and word.isprintable() and len(word) <= MAX_TRIGGER_CHARACTERS


def has_trigger_word(text: str, word: str) -> bool:
    """Whether a text holds the word as a whole, its case as typed: TOK, but not TOKYO nor tok."""
    return _whole_words([word]).search(text) is not None


def replace_trigger_words(prompt: str, words: Mapping[str, str]) -> str:
    """Trigger words to their placeholder tokens, at word boundaries: TOK, but not TOKYO."""
    if not words:
        return prompt
    return _whole_words(words).sub(lambda match: words[match[0]], prompt)


def _whole_words(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(re.escape(word) for word in longest_first)
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")
