"""A training on one page: settings, what was learnt from, the course of the loss, previews.

One HTML file with its pictures inside, so that it can travel in an archive and be opened anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from io import BytesIO
from string import Template

from PIL import Image

from training.dataset import Example
from training.plan import TrainPlan
from training.progress import History, Previews

THUMBNAIL = 192  # pixels, the longer side
CHART = (720, 240)  # width and height in SVG units
SMOOTHING = 0.95  # of the exponential mean that the chart draws

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training of $word</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
th { font-weight: 600 } tr { border-bottom: 1px solid #ddd }
.sheet { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; width: ${double}px }
figure.one { width: ${single}px } img { vertical-align: top; outline: 1px solid #bbb }
figcaption { font-size: 13px; overflow-wrap: anywhere }
figcaption small { color: #666; display: block }
svg { width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #666 }
</style>
<h1>Training of $word</h1>
$sections
</html>
""")


def render_report(
    plan: TrainPlan,
    examples: Sequence[Example],
    history: History,
    previews: Sequence[Previews],
) -> str:
    """The page. `examples` as they were learnt from, each beside its mask (white counts)."""
    sections = [
        ("Settings", _table(_settings(plan))),
        ("Loss", _chart(history)),
        ("What was learnt from", _sheet(examples)),
        ("Previews", _previews(previews)),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{content}" for title, content in sections if content)
    return _PAGE.substitute(
        word=escape(plan.token_string), sections=body, single=THUMBNAIL, double=2 * THUMBNAIL
    )


def _settings(plan: TrainPlan) -> dict[str, object]:
    """Those that are set, the LoRA's among the others."""
    values = asdict(plan)
    values |= {"input_images": None, "class_images": None}  # temporary files
    values["preview_prompts"] = " | ".join(plan.preview_prompts)
    return {name: value for name, value in values.items() if value not in (None, "")}


def _table(settings: Mapping[str, object]) -> str:
    rows = [
        f"<tr><th>{escape(name)}<td>{escape(str(value))}</tr>" for name, value in settings.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _sheet(examples: Sequence[Example]) -> str:
    figures = []
    for example in examples:
        width, height = example.image.size
        top, left = example.crop_top_left
        original = example.original_size
        where = f"{width}×{height} from {left}, {top} of {original[1]}×{original[0]}"
        figures.append(
            f"<figure>{_image(example.image, example.caption)}"
            f"{_image(example.mask, 'its mask')}<figcaption>{escape(example.caption)}"
            f"<small>{escape(example.name)}: {where}</small></figcaption></figure>"
        )
    return f'<div class="sheet">{"".join(figures)}</div>'


def _previews(previews: Sequence[Previews]) -> str:
    parts = []
    for preview in previews:
        figures = "".join(
            f'<figure class="one">{_image(image, prompt)}'
            f"<figcaption>{escape(prompt)}</figcaption></figure>"
            for prompt, image in zip(preview.prompts, preview.images, strict=True)
        )
        parts.append(f'<h3>Step {preview.step}</h3><div class="sheet">{figures}</div>')
    return "\n".join(parts)


def _image(image: Image.Image, text: str) -> str:
    """As a JPEG data: URL, small enough for a contact sheet."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    content = BytesIO()
    small.save(content, "JPEG", quality=88)
    url = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    width, height = small.size
    return f'<img src="{url}" alt="{escape(text)}" width="{width}" height="{height}">'


def _chart(history: History) -> str:
    """The smoothed loss over the steps, the held-out loss as dots, the pivot as a line."""
    if not history.steps:
        return ""
    width, height = CHART
    smooth = _smoothed(history.losses)
    values = [*smooth, *(loss for _, loss in history.held_out)]
    low, high = min(values), max(values)
    last = max(history.steps)

    def x(step: int) -> float:
        return 50 + (width - 60) * step / last

    def y(loss: float) -> float:
        return 10 + (height - 40) * (1 - (loss - low) / ((high - low) or 1))

    points = zip(history.steps, smooth, strict=True)
    line = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
    dots = "".join(
        f'<circle cx="{x(step):.1f}" cy="{y(loss):.1f}" r="3" fill="#c2410c"/>'
        for step, loss in history.held_out
    )
    pivot = ""
    if history.pivot_step is not None:
        at = x(history.pivot_step)
        pivot = f'<line x1="{at:.1f}" y1="10" x2="{at:.1f}" y2="{height - 30}" stroke="#bbb"/>'
    words = "smoothed loss" + ("; dots: held-out examples" if dots else "")
    words += "; grey line: from here on the word's vectors stay" if pivot else ""
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{words}">{pivot}'
        f'<polyline points="{line}" fill="none" stroke="#1d4ed8" stroke-width="1.5"/>{dots}'
        f'<text x="0" y="{y(high) + 4:.1f}">{high:.3g}</text>'
        f'<text x="0" y="{y(low) + 4:.1f}">{low:.3g}</text>'
        f'<text x="50" y="{height - 8}">step 1 to {last}: {words}</text></svg>'
    )


def _smoothed(losses: Sequence[float]) -> list[float]:
    """The exponential mean, without the bias towards its start (arXiv:1412.6980, section 3)."""
    mean, smooth = 0.0, []
    for k, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smooth.append(mean / (1 - SMOOTHING**k))
    return smooth
