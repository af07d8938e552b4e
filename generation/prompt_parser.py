r"""Parse the weights in a prompt, in A1111's syntax and in compel's.

    (word)  (word:1.3)  [word]          1.1, 1.3 and 1 / 1.1 times as strong; may be nested
    word++  (some words)--              1.1 for each plus, 0.9 for each minus
    (words)1.3  "words"1.3  (words).attend(1.3)
    ("one", "another").blend(0.7, 0.3)  a mixture of whole prompts
    ("one", "another").and()            each encoded by itself, one after the other;
    one BREAK another                   the same
    \( \) \[ \] \" \+ \- \\             the characters themselves

Sources: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py: parse_prompt_attention;
damian0815/compel, doc/syntax.md. Where they differ, `(word)` is A1111's. Whatever does not fit is
taken literally, and a note says so. Parsing takes time in proportion to the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from generation.prompt_scanner import MAX_WEIGHT, NUMBER, Token, pair_brackets, scan

STRONGER, WEAKER = 1.1, 1 / 1.1  # (word), [word]
MAX_DOWNWEIGHTED = 24  # segments of a weight below 1: for each the text encoders run once more
MAX_SEGMENTS = 16  # in one blend or conjunction
_QUOTED = 60  # characters of the prompt in a note


@dataclass(frozen=True)
class Fragment:
    """Text with a weight from 0 to MAX_WEIGHT; 1 leaves it as it is."""

    text: str
    weight: float


Segment = tuple[Fragment, ...]  # encoded together


@dataclass(frozen=True)
class Blend:
    """A weighted mixture of segments' embeddings."""

    segments: tuple[Segment, ...]
    weights: tuple[float, ...]
    normalized: bool  # whether weights are divided by their sum


@dataclass(frozen=True)
class ParsedPrompt:
    """Parts that are encoded one after the other, each with a weight."""

    parts: tuple[Segment | Blend, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...]  # what was taken literally, and why

    @property
    def plain(self) -> str:
        """Return the text without the syntax."""
        segments: list[Segment] = []
        for part in self.parts:
            segments += part.segments if isinstance(part, Blend) else (part,)
        return " ".join("".join(f.text for f in segment) for segment in segments)

    @property
    def is_plain(self) -> bool:
        """Whether it has no weights."""
        part = self.parts[0]
        return len(self.parts) == 1 and not isinstance(part, Blend) and part == _literal(self.plain)


def parse(prompt: str) -> ParsedPrompt:
    """Parse a prompt. Never fails: syntax that does not fit is taken literally."""
    notes: list[str] = []
    if match := _CONJUNCTION.fullmatch(prompt):
        parsed = _parse_conjunction(match, notes)
    else:
        parts = tuple(_segments(prompt, notes))
        parsed = ParsedPrompt(parts, (1.0,) * len(parts), tuple(notes))
    downweighted = sum(_downweighted(part) for part in parsed.parts)
    if downweighted > MAX_DOWNWEIGHTED:
        note = (
            f"it lowers the weight of {downweighted} segments, more than {MAX_DOWNWEIGHTED}; all is"
            " taken literally"
        )
        return _all_literal(prompt, [*notes, note])
    return parsed


def _all_literal(prompt: str, notes: Sequence[str]) -> ParsedPrompt:
    return ParsedPrompt((_literal(prompt),), (1.0,), tuple(notes))


def _literal(text: str) -> Segment:
    return (Fragment(text, 1.0),)


def _downweighted(part: Segment | Blend) -> int:
    segments = part.segments if isinstance(part, Blend) else (part,)
    return sum(f.weight < 1 for segment in segments for f in segment)


# Whole prompts

_CONJUNCTION = re.compile(r"\s*\((.*)\)\s*\.(blend|and|add)\(([^()]*)\)\s*", re.DOTALL)
_ITEM = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)', re.DOTALL)
_CONJUNCTION_WEIGHT = re.compile(rf"-?{NUMBER}")


def _parse_conjunction(match: re.Match[str], notes: list[str]) -> ParsedPrompt:
    inside, kind, options = match.groups()
    texts, end = [], 0
    while end < len(inside) and (item := _ITEM.match(inside, end)):
        texts.append(item[1])
        end = item.end()
    words = [word.strip() for word in options.split(",") if word.strip()]
    normalized = not (kind == "blend" and words[-1:] == ["no_normalize"])
    numbers = words if normalized else words[:-1]
    weights = tuple(float(n) for n in numbers if _CONJUNCTION_WEIGHT.fullmatch(n))
    weights = weights or (1.0,) * len(texts)
    wrong = (
        "its texts must stand in double quotes, with commas between"
        if end < len(inside) or not texts
        else f"it has {len(texts)} texts; {MAX_SEGMENTS} at most"
        if len(texts) > MAX_SEGMENTS
        else f"it has {len(texts)} texts and {len(numbers)} weights"
        if len(weights) != len(texts) or len(numbers) not in (0, len(texts))
        else f"its weights may be from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}"
        if any(abs(weight) > MAX_WEIGHT for weight in weights)
        else "its weights add up to nothing"
        if kind == "blend" and normalized and abs(sum(weights)) < 1e-3
        else None
    )
    if wrong is not None:
        return _all_literal(match.string, [f".{kind}() is taken literally: {wrong}"])
    segments = tuple(_one_segment(text, notes) for text in texts)
    if kind == "blend":
        return ParsedPrompt((Blend(segments, weights, normalized),), (1.0,), tuple(notes))
    return ParsedPrompt(segments, weights, tuple(notes))


def _one_segment(text: str, notes: list[str]) -> Segment:
    fragments: list[Fragment] = []
    for segment in _segments(text, notes):
        fragments += segment
    return tuple(fragments)


# Weights inside one text

_EDITING = re.compile(rf":\s*{NUMBER}\s*$|\|")
_BREAK = re.compile(r"(?:^|\s+)BREAK(?=\s|$)\s*")


def _group_factor(tokens: list[Token], first: int, last: int, notes: list[str]) -> float | None:
    """Return the factor of a pair of brackets; None if they are to be taken literally."""
    before = tokens[last - 1]
    typed = "".join(t.text for t in tokens[first : min(last + 1, first + 9)])[:_QUOTED]
    if tokens[first].text == "[":
        if before.kind == "text" and _EDITING.search(before.text):
            notes.append(f"{typed!r} is taken literally: prompts do not change between steps here")
            return None
        return WEAKER
    factor = tokens[last].factor
    if before.kind == "weight" and before.factor is not None:
        factor = before.factor * (1.0 if factor is None else factor)
    if factor is None:
        return STRONGER
    if factor > MAX_WEIGHT:
        notes.append(f"{typed!r} is taken literally: weights go from 0 to {MAX_WEIGHT:g}")
        return None
    return factor


def _segments(text: str, notes: list[str]) -> list[Segment]:
    """Split a text at BREAK into segments of weighted fragments."""
    tokens = scan(text)
    pair_brackets(tokens)
    weights = [1.0]
    dropped: set[int] = set()  # places of syntax that is not part of the text
    fragments: list[list[tuple[str, float]]] = [[]]
    unmatched = 0
    for place, token in enumerate(tokens):
        if place in dropped:
            if token.kind == "close":
                weights.pop()
            continue
        if token.kind == "open" and token.partner is not None:
            factor = _group_factor(tokens, place, token.partner, notes)
            if factor is not None:
                weights.append(min(weights[-1] * factor, MAX_WEIGHT))
                dropped.add(token.partner)
                if tokens[token.partner - 1].kind == "weight":
                    dropped.add(token.partner - 1)
                continue
        unmatched += token.kind in ("open", "close") and token.partner is None
        pieces = _BREAK.split(token.text) if len(weights) == 1 else [token.text]
        fragments[-1].append((pieces[0], weights[-1]))
        fragments += [[(piece, weights[-1])] for piece in pieces[1:]]
    if unmatched:
        notes.append(f"{unmatched} bracket(s) without a partner are taken literally")
    segments = [_merge_adjacent(each) for each in fragments if any(t.strip() for t, _ in each)]
    return segments or [_literal("")]


def _merge_adjacent(fragments: Sequence[tuple[str, float]]) -> Segment:
    """Join neighbours of one weight."""
    merged: list[Fragment] = []
    for text, weight in fragments:
        if merged and merged[-1].weight == weight:
            merged[-1] = Fragment(merged[-1].text + text, weight)
        elif text.strip() or not merged:
            merged.append(Fragment(text, weight))
        else:  # white space alone: whose weight it has shows nowhere
            merged[-1] = Fragment(merged[-1].text + text, merged[-1].weight)
    if len(merged) > 1 and not merged[0].text.strip():
        merged[:2] = [Fragment(merged[0].text + merged[1].text, merged[1].weight)]
    return tuple(merged)
