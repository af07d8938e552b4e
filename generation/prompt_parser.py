r"""What people write about weights in a prompt, read in one place: A1111's syntax and compel's.

    (word)  (word:1.3)  [word]          1.1, 1.3 and 1 / 1.1 times as strong; may be nested
    word++  (some words)--              1.1 for each plus, 0.9 for each minus
    (words)1.3  "words"1.3  (words).attend(1.3)
    ("one", "another").blend(0.7, 0.3)  a mixture of whole prompts
    ("one", "another").and()            each read by itself, one after the other;
    one BREAK another                   the same
    \( \) \[ \] \" \+ \- \\             the characters themselves

Sources: AUTOMATIC1111/stable-diffusion-webui, modules/prompt_parser.py: parse_prompt_attention;
damian0815/compel, doc/syntax.md. Where they differ, `(word)` is A1111's. Whatever does not fit is
taken literally, and a note says so. Reading takes time in proportion to the text's length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

STRONGER, WEAKER = 1.1, 1 / 1.1  # (word), [word]
SIGNS = {"+": 1.1, "-": 0.9}  # each of them
MAX_WEIGHT = 10.0  # of nested weights together; far beyond what still gives a picture
MAX_DOWNWEIGHTED = 24  # segments of a weight below 1: for each the text encoders run once more
MAX_SEGMENTS = 16  # in one blend or conjunction
_QUOTED = 60  # characters of the prompt in a note


@dataclass(frozen=True)
class Fragment:
    """Text, and how strongly it counts: from 0 to MAX_WEIGHT, 1 for as it is."""

    text: str
    weight: float


Segment = tuple[Fragment, ...]  # read together


@dataclass(frozen=True)
class Blend:
    """A mixture of what several segments mean."""

    segments: tuple[Segment, ...]
    weights: tuple[float, ...]
    normalized: bool  # whether weights are divided by their sum


@dataclass(frozen=True)
class ParsedPrompt:
    """Parts that are read one after the other, each with a weight."""

    parts: tuple[Segment | Blend, ...]
    weights: tuple[float, ...]
    notes: tuple[str, ...]  # what was taken literally, and why

    @property
    def plain(self) -> str:
        """The text without the syntax."""
        segments: list[Segment] = []
        for part in self.parts:
            segments += part.segments if isinstance(part, Blend) else (part,)
        return " ".join("".join(f.text for f in segment) for segment in segments)

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing but its text."""
        part = self.parts[0]
        return len(self.parts) == 1 and not isinstance(part, Blend) and part == _literal(self.plain)


def parse(prompt: str) -> ParsedPrompt:
    """Never fails: see the module's docstring."""
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

_NUMBER = r"(?:\d{1,4}(?:\.\d{1,8})?|\.\d{1,8})"
_CONJUNCTION = re.compile(r"\s*\((.*)\)\s*\.(blend|and|add)\(([^()]*)\)\s*", re.DOTALL)
_ITEM = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*(?:,|$)', re.DOTALL)
_CONJUNCTION_WEIGHT = re.compile(rf"-?{_NUMBER}")


def _parse_conjunction(match: re.Match[str], notes: list[str]) -> ParsedPrompt:
    inside, kind, options = match.groups()
    texts, end = [], 0
    while end < len(inside) and (item := _ITEM.match(inside, end)):
        texts.append(item[1])
        end = item.end()
    words = [word.strip() for word in options.split(",") if word.strip()]
    normalized = not (kind == "blend" and words[-1:] == ["no_normalize"])
    numbers = words if normalized else words[:-1]
    weights = tuple(float(n) for n in numbers if _CONJUNCTION_WEIGHT.fullmatch(n)) or (1.0,) * len(
        texts
    )
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


@dataclass
class _Token:
    """`text` as it was typed; what it does otherwise if it turns out to be syntax."""

    text: str
    kind: str = "text"  # or "open", "close", "weight"
    factor: float | None = None
    partner: int | None = None  # of a bracket: the other one's place


_ESCAPABLE = '()[]"+-\\'
_OPERATOR = re.compile(
    rf"\.attend\(\s*(\++|-+|{_NUMBER})\s*\)|(\++|-+)(?=[\s,.;:!?)\]\"]|$)|({_NUMBER})(?![\w.])"
)
_WEIGHT = re.compile(rf":\s*({_NUMBER})\s*(?=\))")
_EDITING = re.compile(rf":\s*{_NUMBER}\s*$|\|")
_QUOTED_WORDS = re.compile(r'"([^"()\[\]\\]+)"')
_BREAK = re.compile(r"(?:^|\s+)BREAK(?=\s|$)\s*")


def _factor(operator: str) -> float:
    if operator[0] in SIGNS:
        return float(min(SIGNS[operator[0]] ** min(len(operator), 99), MAX_WEIGHT))
    return float(operator)


def _scan(text: str) -> list[_Token]:
    """Tokens; brackets are not yet known to have partners."""
    tokens: list[_Token] = []
    pending: list[str] = []  # characters of plain text
    place = 0

    def flush() -> None:
        if pending:
            tokens.append(_Token("".join(pending)))
            pending.clear()

    def group(words: str, typed: tuple[str, str], factor: float) -> None:
        tokens.extend((_Token(typed[0], "open"), _Token(words), _Token(typed[1], "close", factor)))

    while place < len(text):
        character = text[place]
        end = place + 1
        if character == "\\" and text[end : end + 1] and text[end] in _ESCAPABLE:
            pending.append(text[end])
            end += 1
        elif character in "([":
            flush()
            tokens.append(_Token(character, "open"))
        elif character in ")]":
            flush()
            operator = _OPERATOR.match(text, end) if character == ")" else None
            factor = _factor(operator[operator.lastindex or 0]) if operator else None
            end = operator.end() if operator else end
            tokens.append(_Token(text[place:end], "close", factor))
        elif character == ":" and (weight := _WEIGHT.match(text, place)):
            flush()
            end = weight.end()
            tokens.append(_Token(weight[0], "weight", float(weight[1])))
        elif character == '"' and (quoted := _QUOTED_WORDS.match(text, place)):
            operator = _OPERATOR.match(text, quoted.end())
            if operator:
                flush()
                end = operator.end()
                factor = _factor(operator[operator.lastindex or 0])
                group(quoted[1], ('"', text[quoted.end() - 1 : end]), factor)
            else:
                pending.append(character)
        elif character in SIGNS and pending and _ends_a_word(pending[-1]):
            operator = _OPERATOR.match(text, place)
            if operator:
                word = _last_word(pending)
                flush()
                end = operator.end()
                group(word, ("", operator[0]), _factor(operator[0]))
            else:
                pending.append(character)
        else:
            pending.append(character)
        place = end
    flush()
    return tokens


def _ends_a_word(character: str) -> bool:
    return character.isalnum() or character == ">"  # a new word's tokens: <s0><s1>


def _last_word(pending: list[str]) -> str:
    """Take the last word away from the characters."""
    start = len(pending)
    while start and not pending[start - 1].isspace() and pending[start - 1] not in ',;"':
        start -= 1
    word = "".join(pending[start:])
    del pending[start:]
    return word


def _pair(tokens: list[_Token]) -> None:
    """Tell brackets their partners; those without become text."""
    opened: list[int] = []
    counts = {"(": 0, "[": 0, "": 0, '"': 0}
    for place, token in enumerate(tokens):
        if token.kind == "open":
            opened.append(place)
            counts[token.text] += 1
        elif token.kind == "close":
            wanted = {")": "(", "]": "[", '"': '"'}.get(token.text[0], "")
            if not counts[wanted]:
                continue
            while True:
                other = opened.pop()
                counts[tokens[other].text] -= 1
                if tokens[other].text == wanted:
                    break
            token.partner, tokens[other].partner = other, place


def _group_factor(tokens: list[_Token], first: int, last: int, notes: list[str]) -> float | None:
    """What a pair of brackets multiplies weights by; None if it is to be taken literally."""
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
    """A text's fragments, by the segments that BREAK makes of it."""
    tokens = _scan(text)
    _pair(tokens)
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
    return [_merge_adjacent(own) for own in fragments if any(t.strip() for t, _ in own)] or [
        _literal("")
    ]


def _merge_adjacent(fragments: Sequence[tuple[str, float]]) -> Segment:
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
