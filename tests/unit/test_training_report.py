"""The page that a training's archive carries."""

import re
from dataclasses import replace
from html.parser import HTMLParser

from PIL import Image

from tests.unit.test_training_config import MINIATURE_SDXL, plan
from training.dataset import Example
from training.progress import HeldOutLoss, History, Previews, StepDone, TokensFrozen
from training.report import render_report

PLAN = plan(8, MINIATURE_SDXL, seed=3, preview_prompts=("a <b>TOK</b>",))
EXAMPLE = Example(
    "cats/<1>.jpg",
    Image.new("RGB", (96, 64), "red"),
    Image.new("L", (96, 64), 128),
    'a TOK & a "dog"',
    (300, 400),
    (5, 7),
)


def history() -> History:
    course = History()
    for step in range(1, 41):
        course.record(StepDone(step, 1 / step, None, {"lora": 1e-3}))
    course.record(TokensFrozen(20))
    course.record(HeldOutLoss(40, 0.5))
    return course


class Tags(HTMLParser):
    """Which elements a page has, and whether they are closed in order."""

    OPEN_ENDED = ("meta", "img", "th", "td")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.OPEN_ENDED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(**changes) -> str:
    previews = [Previews(40, PLAN.preview_prompts, [Image.new("RGB", (128, 128))])]
    return render_report(replace(PLAN, **changes), [EXAMPLE], history(), previews)


def test_the_page_shows_everything_in_itself():
    tags = Tags()
    tags.feed(page())
    assert tags.open == []
    assert tags.seen.count("img") == 3  # the image, its mask, the preview
    assert tags.seen.count("circle") == 1
    assert tags.seen.count("h2") == 4
    assert not re.search(r'(src|href)="(?!data:)', page())


def test_what_people_wrote_is_text():
    text = page(token_string="<script>")
    assert "<script>" not in text
    assert "<b>" not in text
    assert "a TOK &amp; a &quot;dog&quot;" in text
    assert "cats/&lt;1&gt;.jpg: 96×64 from 7, 5 of 400×300" in text


def test_a_training_of_no_steps_has_no_chart():
    assert "<svg" not in render_report(PLAN, [EXAMPLE], History(), [])


def test_the_settings_are_those_of_the_plan():
    settings = dict(re.findall(r"<tr><th>([^<]+)<td>([^<]*)</tr>", page()))
    assert settings["seed"] == "3"
    assert settings["lora_rank"] == str(PLAN.lora_rank)
    assert "class_prompt" not in settings
