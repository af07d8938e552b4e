"""The report of a training: settings, examples, losses and previews.

One HTML file with its images inside, so that it can travel in an archive and be opened anywhere.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
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
SMOOTHING = 0.95  # of the exponential moving average that the chart shows
_FILES = ("input_images", "class_images")  # of the inputs: temporary ones

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
.sheet { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; width: min-content }
figure div { display: flex } img { vertical-align: top; outline: 1px solid #bbb }
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
    """Return the page; examples are beside their masks (white = full weight)."""
    settings = asdict(plan) | {"preview_prompts": " | ".join(plan.preview_prompts)}
    rows = [
        f"<tr><th>{escape(name)}<td>{escape(str(value))}</tr>"
        for name, value in settings.items()
        if value not in (None, "") and name not in _FILES
    ]
    sections = {
        "Settings": f"<table>{''.join(rows)}</table>",
        "Loss": _chart(history),
        "Examples": _sheet(_example(example) for example in examples),
        "Previews": "\n".join(
            f"<h3>Step {preview.step}</h3>"
            + _sheet(
                _figure([(image, prompt)], escape(prompt))
                for prompt, image in zip(preview.prompts, preview.images, strict=True)
            )
            for preview in previews
        ),
    }
    body = "\n".join(f"<h2>{title}</h2>\n{text}" for title, text in sections.items() if text)
    return _PAGE.substitute(word=escape(plan.token_string), sections=body)


def _sheet(figures: Iterable[str]) -> str:
    return f'<div class="sheet">{"".join(figures)}</div>'


def _example(example: Example) -> str:
    width, height = example.image.size
    top, left = example.crop_top_left
    original_height, original_width = example.original_size
    where = f"{width}×{height} from {left}, {top} of {original_width}×{original_height}"
    return _figure(
        [(example.image, example.caption), (example.mask, "its mask")],
        f"{escape(example.caption)}<small>{escape(example.name)}: {where}</small>",
    )


def _figure(images: Sequence[tuple[Image.Image, str]], caption: str) -> str:
    shown = "".join(_image(image, text) for image, text in images)
    return f"<figure><div>{shown}</div><figcaption>{caption}</figcaption></figure>"


def _image(image: Image.Image, text: str) -> str:
    """Return an <img> with a small JPEG as data: URL."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    content = BytesIO()
    small.save(content, "JPEG", quality=88)
    url = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode('ascii')}"
    return f'<img src="{url}" alt="{escape(text)}" width="{small.width}" height="{small.height}">'


def _chart(history: History) -> str:
    """Return an SVG of the smoothed loss, with held-out losses as dots and the pivot as a line."""
    if not history.steps:
        return ""
    width, height = CHART
    smooth = _moving_average(history.losses)
    values = [*smooth, *(loss for _, loss in history.held_out)]
    low, high, last = min(values), max(values), max(history.steps)

    def x(step: int) -> str:
        return f"{50 + (width - 60) * step / last:.1f}"

    def y(loss: float, below: int = 0) -> str:
        return f"{10 + (height - 40) * (1 - (loss - low) / ((high - low) or 1)) + below:.1f}"

    points = zip(history.steps, smooth, strict=True)
    line = " ".join(f"{x(step)},{y(loss)}" for step, loss in points)
    dots = "".join(
        f'<circle cx="{x(step)}" cy="{y(loss)}" r="3" fill="#c2410c"/>'
        for step, loss in history.held_out
    )
    legend, pivot = "smoothed loss" + ("; dots: held-out examples" if dots else ""), ""
    if history.pivot_step is not None:
        legend += "; grey line: end of the token embeddings' training"
        at = x(history.pivot_step)
        pivot = f'<line x1="{at}" y1="10" x2="{at}" y2="{height - 30}" stroke="#bbb"/>'
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{legend}">{pivot}'
        f'<polyline points="{line}" fill="none" stroke="#1d4ed8" stroke-width="1.5"/>{dots}'
        f'<text x="0" y="{y(high, 4)}">{high:.3g}</text>'
        f'<text x="0" y="{y(low, 4)}">{low:.3g}</text>'
        f'<text x="50" y="{height - 8}">step 1 to {last}: {legend}</text></svg>'
    )


def _moving_average(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average, bias-corrected (arXiv:1412.6980, section 3)."""
    mean, averages = 0.0, []
    for k, loss in enumerate(losses, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        averages.append(mean / (1 - SMOOTHING**k))
    return averages
