"""Split a prompt into text and the syntax of weights: brackets, signs, numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass

SIGNS = {"+": 1.1, "-": 0.9}  # each of them
MAX_WEIGHT = 10.0  # of nested weights together; far above what still gives an image

NUMBER = r"(?:\d{1,4}(?:\.\d{1,8})?|\.\d{1,8})"


@dataclass
class Token:
    """`text` as it was typed; what it does otherwise if it turns out to be syntax."""

    text: str
    kind: str = "text"  # or "open", "close", "weight"
    factor: float | None = None
    partner: int | None = None  # of a bracket: the other one's place


_ESCAPABLE = '()[]"+-\\'
_OPERATOR = re.compile(
    rf"\.attend\(\s*(\++|-+|{NUMBER})\s*\)|(\++|-+)(?=[\s,.;:!?)\]\"]|$)|({NUMBER})(?![\w.])"
)
_WEIGHT = re.compile(rf":\s*({NUMBER})\s*(?=\))")
_QUOTED_WORDS = re.compile(r'"([^"()\[\]\\]+)"')


def _factor(operator: str) -> float:
    if operator[0] in SIGNS:
        return float(min(SIGNS[operator[0]] ** min(len(operator), 99), MAX_WEIGHT))
    return float(operator)


def scan(text: str) -> list[Token]:
    """Tokens; brackets are not yet known to have partners."""
    tokens: list[Token] = []
    pending: list[str] = []  # characters of plain text
    place = 0

    def flush() -> None:
        if pending:
            tokens.append(Token("".join(pending)))
            pending.clear()

    def group(words: str, typed: tuple[str, str], factor: float) -> None:
        tokens.extend((Token(typed[0], "open"), Token(words), Token(typed[1], "close", factor)))

    while place < len(text):
        character = text[place]
        end = place + 1
        if character == "\\" and text[end : end + 1] and text[end] in _ESCAPABLE:
            pending.append(text[end])
            end += 1
        elif character in "([":
            flush()
            tokens.append(Token(character, "open"))
        elif character in ")]":
            flush()
            operator = _OPERATOR.match(text, end) if character == ")" else None
            factor = _factor(operator[operator.lastindex or 0]) if operator else None
            end = operator.end() if operator else end
            tokens.append(Token(text[place:end], "close", factor))
        elif character == ":" and (weight := _WEIGHT.match(text, place)):
            flush()
            end = weight.end()
            tokens.append(Token(weight[0], "weight", float(weight[1])))
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


def pair_brackets(tokens: list[Token]) -> None:
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
