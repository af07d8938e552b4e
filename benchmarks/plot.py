"""Draw JSON lines of `script/bench images` as bars of time relative to diffusers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.workloads import COG_SDXL, COMPILED, DIFFUSERS, OURS, OURS_FULL

LEFT, WIDTH, RIGHT = 160, 420, 120  # names, bars, figures; pixels
# Each of ours is below those that it stands beside.
ORDER = (DIFFUSERS, COMPILED, OURS, COG_SDXL, OURS_FULL)
BAR, GAP, HEAD = 16, 26, 64
# Of bars, in light and in dark mode: ours stand out.
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.workload, .title { font-weight: 600 }
.title { font-size: 15px }
.small { font-size: 12px; fill: #59636e }
.baseline { fill: #afb8c1 } .ours { fill: #0969da } .one { stroke: #59636e; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .small { fill: #9198a1 }
  .baseline { fill: #656c76 } .ours { fill: #4493f8 } .one { stroke: #9198a1 }
}
"""

Line = Mapping[str, Any]  # JSON, as `images` writes it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, help="files written by images --out")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/benchmarks.svg"))


def run(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Draw the newest line of each workload."""
    lines: list[Line] = []
    for file in arguments.files:
        try:
            text = file.read_text(encoding="utf-8")
            lines += [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        except (OSError, ValueError) as error:
            parser.error(f"{file}: {error}")
    rows = {line["workload"]: line for line in lines if "to_diffusers" in line}
    if not rows:
        parser.error("there is no workload in the files that was measured beside diffusers")
    place = ""
    for machine in (line for line in lines if "machine" in line):
        device = machine.get("gpu") or f"{machine['machine']}, {machine['threads']} thread(s)"
        torch = f"torch {machine['torch']}"
        place = "; ".join([machine["measured"], device, torch, machine["date"][:10]])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(draw(list(rows.values()), place), encoding="utf-8")
    print(f"wrote {arguments.out}")


def draw(rows: Sequence[Line], place: str) -> str:
    """Return the plot as SVG; `place` is what it was measured on."""
    longest = max(ratio["median"] for row in rows for ratio in row["to_diffusers"].values())
    scale = WIDTH / max(longest, 1.0)
    body, y = [], HEAD
    for row in rows:
        body.append(_text(0, y + 12, row["workload"], "workload"))
        y += BAR + 4
        for side in sorted(row["to_diffusers"], key=ORDER.index):
            ratio = row["to_diffusers"][side]["median"]
            kind = "ours" if side in (OURS, OURS_FULL) else "baseline"
            body.append(_text(12, y + 12, side))
            body.append(
                f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{scale * ratio:.1f}"'
                f' height="{BAR - 3}"/>'
            )
            figure = f"{ratio:.2f}, {1000 * row['sides'][side]['p50']:.0f} ms"
            body.append(_text(LEFT + WIDTH + 12, y + 11, figure, "small"))
            y += BAR
        y += GAP - BAR
    one = LEFT + scale
    line = f'<line class="one" x1="{one:.1f}" x2="{one:.1f}" y1="{HEAD - 4}" y2="{y - 6}"/>'
    title = _text(0, 18, "Time of a request relative to diffusers; shorter is faster", "title")
    width = LEFT + WIDTH + RIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}"'
        f' height="{y}" role="img"><title>Time of requests beside baselines</title>'
        f"<style>{STYLE}</style>\n{title}\n{_text(0, 38, place, 'small')}\n"
        + "\n".join([*body, line])
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    styled = f' class="{kind}"' if kind else ""
    return f'<text{styled} x="{x:.0f}" y="{y:.0f}">{escape(text, quote=False)}</text>'
