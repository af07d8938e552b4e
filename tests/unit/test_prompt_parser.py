"""Prompt weights in every syntax, and what the parser makes of them."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.prompt_parser import (
    MAX_DOWNWEIGHTED,
    MAX_SEGMENTS,
    MAX_WEIGHT,
    Blend,
    Fragment,
    parse,
)

UP, DOWN = 1.1, 1 / 1.1


def fragments(prompt: str) -> list[tuple[str, float]]:
    """Return the fragments of a prompt of one segment, with weights to five digits."""
    parsed = parse(prompt)
    (segment,) = parsed.parts
    assert parsed.weights == (1.0,)
    return [(f.text, round(f.weight, 5)) for f in segment]


def rounded(pairs):
    return [(text, round(weight, 5)) for text, weight in pairs]


A1111 = {
    "a red circle": [("a red circle", 1)],
    "a (red) circle": [("a ", 1), ("red", UP), (" circle", 1)],
    "a (red:1.3) circle": [("a ", 1), ("red", 1.3), (" circle", 1)],
    "(red: 1.3 )": [("red", 1.3)],
    "(red:.5)": [("red", 0.5)],
    "(red:0)": [("red", 0)],
    "[red] circle": [("red", DOWN), (" circle", 1)],
    "((red))": [("red", UP**2)],
    "[[red]]": [("red", DOWN**2)],
    "[(red)]": [("red", 1)],
    "(a (red:1.5) circle:0.5)": [("a ", 0.5), ("red", 0.75), (" circle", 0.5)],
    "(a, b:1.2), c": [("a, b", 1.2), (", c", 1)],
    r"a \(red\) circle": [("a (red) circle", 1)],
    r"\[red\] \\ \"": [('[red] \\ "', 1)],
    r"(smile \(big\):1.2)": [("smile (big)", 1.2)],
    "a: b (c: d)": [("a: b ", 1), ("c: d", UP)],
    "time 10:30": [("time 10:30", 1)],
    "": [("", 1)],
    "()": [("", 1)],
}
COMPEL = {
    "red++ circle": [("red", 1.1**2), (" circle", 1)],
    "red-- circle": [("red", 0.9**2), (" circle", 1)],
    "a red+": [("a ", 1), ("red", 1.1)],
    "red+, blue-": [("red", 1.1), (", ", 1), ("blue", 0.9)],
    "(a red circle)++ here": [("a red circle", 1.1**2), (" here", 1)],
    "(red)1.3 circle": [("red", 1.3), (" circle", 1)],
    '"a red circle"0.8 here': [("a red circle", 0.8), (" here", 1)],
    '"a red circle"-- here': [("a red circle", 0.81), (" here", 1)],
    "(red).attend(1.4) circle": [("red", 1.4), (" circle", 1)],
    "(red).attend(++) circle": [("red", 1.21), (" circle", 1)],
    "<s0><s1>++ dog": [("<s0><s1>", 1.21), (" dog", 1)],
    "(a red+ one)1.5": [("a ", 1.5), ("red", 1.65), (" one", 1.5)],
    r"C\+\+ code": [("C++ code", 1)],
}
LITERAL = {
    "well-known sci-fi": [("well-known sci-fi", 1)],
    "a -- b": [("a -- b", 1)],
    "1+1": [("1+1", 1)],
    'say "hi" now': [('say "hi" now', 1)],
    "end with a \\": [("end with a \\", 1)],
    "(2nd)2nd": [("2nd", UP), ("2nd", 1)],
}


@pytest.mark.parametrize("prompt", [*A1111, *COMPEL, *LITERAL])
def test_weights(prompt):
    wanted = {**A1111, **COMPEL, **LITERAL}[prompt]
    assert fragments(prompt) == rounded(wanted)
    assert parse(prompt).notes == ()
    assert parse(prompt).plain == "".join(text for text, _ in wanted)
    assert parse(prompt).is_plain == all(weight == 1 for _, weight in rounded(wanted))


MALFORMED = {  # each taken literally, with a note that says why
    "(red": ("(red", "bracket"),
    "red)": ("red)", "bracket"),
    "red:1.3)": ("red:1.3)", "bracket"),
    "[[((": ("[[((", "bracket"),
    "a ) b (": ("a ) b (", "bracket"),
    ":( and :)": (":( and :)", None),
    "[cat:dog:0.5]": ("[cat:dog:0.5]", "between steps"),
    "[cat|dog]": ("[cat|dog]", "between steps"),
    "(red:99)": ("(red:99)", "from 0 to 10"),
    '("a", b).blend(1, 1)': ('("a", b).blend(1, 1)', "double quotes"),
    '("a", "b").blend(1)': ('("a", "b").blend(1)', "2 texts and 1 weights"),
    '("a", "b").blend(1, x)': ('("a", "b").blend(1, x)', "2 texts and 2 weights"),
    '("a", "b").blend(1, -1)': ('("a", "b").blend(1, -1)', "add up to nothing"),
    '("a", "b").and(11, 1)': ('("a", "b").and(11, 1)', "-10 to 10"),
}


@pytest.mark.parametrize("prompt", [p for p in MALFORMED if MALFORMED[p][1]])
def test_malformed_syntax_is_taken_literally(prompt):
    text, reason = MALFORMED[prompt]
    parsed = parse(prompt)
    assert parsed.plain == text
    assert parsed.is_plain
    (note,) = parsed.notes
    assert reason in note


def test_crossing_brackets_lose_the_inner_one():
    parsed = parse("(a [b) c]")
    assert parsed.parts == ((Fragment("a [b", 1.1), Fragment(" c]", 1.0)),)
    assert parsed.notes == ("2 bracket(s) without a partner are taken literally",)


def test_blends():
    (blend,) = parse('("a red one", "a (blue:1.2) one").blend(0.7, 0.3)').parts
    assert blend == Blend(
        (
            (Fragment("a red one", 1.0),),
            (Fragment("a ", 1), Fragment("blue", 1.2), Fragment(" one", 1)),
        ),
        (0.7, 0.3),
        normalized=True,
    )
    (free,) = parse('("a","b").blend(1.5, -0.5, no_normalize)').parts
    assert (free.weights, free.normalized) == ((1.5, -0.5), False)
    (equal,) = parse('("a", "b").blend()').parts
    assert equal.weights == (1.0, 1.0)
    (escaped,) = parse(r'("say \"hi\"", "b").blend(1, 1)').parts
    assert escaped.segments[0] == (Fragment('say "hi"', 1.0),)


@pytest.mark.parametrize(
    ("prompt", "texts", "weights"),
    [
        ('("a", "b").and()', ["a", "b"], (1, 1)),
        ('("a", "b").and(1, 0.5)', ["a", "b"], (1, 0.5)),
        ('("a", "b").add(1, 0.5)', ["a", "b"], (1, 0.5)),
        ("a BREAK b", ["a", "b"], (1, 1)),
        ("a\nBREAK\nb, c BREAK d", ["a", "b, c", "d"], (1, 1, 1)),
        ("BREAK a BREAK", ["a"], (1,)),
    ],
)
def test_conjunctions(prompt, texts, weights):
    parsed = parse(prompt)
    assert ["".join(f.text for f in part) for part in parsed.parts] == texts
    assert parsed.weights == weights
    assert parsed.plain == " ".join(texts)
    assert parsed.is_plain == (len(texts) == 1)


def test_break_inside_brackets_or_words_is_a_word():
    assert fragments("(a BREAK b)") == rounded([("a BREAK b", UP)])
    assert fragments("a BREAKFAST") == [("a BREAKFAST", 1)]


def test_limits():
    nested = "(" * 40 + "red" + ")" * 40
    assert fragments(nested) == [("red", MAX_WEIGHT)]
    many = "[a] b " * MAX_DOWNWEIGHTED
    assert len(parse(many).parts[0]) > 2
    more = many + "[a]"
    assert parse(more).is_plain
    assert parse(more).plain == more
    assert "lowers the weight of 25 segments" in parse(more).notes[0]
    quoted = ", ".join(['"a"'] * (MAX_SEGMENTS + 1))
    assert f"{MAX_SEGMENTS} at most" in parse(f"({quoted}).and()").notes[0]


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 50000,
        "(" * 20000 + ")" * 20000,
        "[" * 20000 + ")" * 20000,
        "((a:1.1) " * 10000,
        ":" * 50000,
        '"' * 50000,
        "a++ " * 10000,
        "\\" * 50000,
        "(x).blend(" * 5000,
        "word " * 10000,
        " " * 50000 + "BREAK",
        '("' + "a" * 50000,
        "(a:" + "1" * 50000,
    ],
    ids=lambda prompt: prompt[:6],
)
def test_parsing_takes_time_in_proportion_to_the_text(prompt):
    began = time.process_time()
    parse(prompt)
    assert time.process_time() - began < 10  # what grew with the square took minutes


PIECES = st.sampled_from(
    [
        "(",
        ")",
        "[",
        "]",
        "\\",
        '"',
        ":1.3)",
        ":",
        "+",
        "-",
        "++",
        "--",
        "1.5",
        ".5",
        ",",
        " ",
        ".blend(1, 1)",
        ".and()",
        ".attend(",
        "BREAK",
        " BREAK ",
        "red",
        "a",
        "<s0>",
        "|",
        "é",
        "😀",
        "\x00",
        "\n",
        "\u202e",
        "\u200d",
        "�",
    ]
)


@pytest.mark.parametrize("examples", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_any_text_is_parsed(examples):
    settings(max_examples=examples, deadline=None)(_parsed)()


@given(st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join)))
def _parsed(prompt):
    parsed = parse(prompt)
    assert len(parsed.parts) == len(parsed.weights) >= 1
    for part in parsed.parts:
        for segment in part.segments if isinstance(part, Blend) else (part,):
            assert all(0 <= f.weight <= MAX_WEIGHT for f in segment)
    if not any(c in prompt for c in '()[]\\"+-') and "BREAK" not in prompt:
        assert parsed.plain == prompt or not prompt.strip()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_escaped_text_is_itself(text):
    escaped = "".join(f"\\{c}" if c in '()[]"+-\\' else c for c in text)
    parsed = parse(escaped)
    if "BREAK" not in text and text.strip():
        assert parsed.plain == text
        assert parsed.is_plain
        assert parsed.notes == ()
