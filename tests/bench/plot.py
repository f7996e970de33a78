"""Bars in an SVG file: what was measured, by name, with the range of its repeats."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

ROW, BAR, LEFT, WIDTH, RIGHT = 28, 16, 170, 460, 130
"""Pixels."""


def bars(path: Path, title: str, measured: Mapping[str, Sequence[float]], unit: str) -> None:
    """A bar for the median of each, a line from its least to its largest."""
    scale = WIDTH / max(map(max, measured.values()))
    drawn = [f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>']
    for number, (name, values) in enumerate(measured.items()):
        top = 36 + number * ROW
        middle, text = top + BAR / 2, top + BAR - 3
        median, low, high = statistics.median(values), min(values), max(values)
        drawn += [
            f'<text x="{LEFT - 8}" y="{text}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{median * scale:.1f}" height="{BAR}" '
            'fill="#4c78a8"/>',
            f'<line x1="{LEFT + low * scale:.1f}" x2="{LEFT + high * scale:.1f}" y1="{middle}" '
            f'y2="{middle}" stroke="#222" stroke-width="2"/>',
            f'<text x="{LEFT + high * scale + 8:.1f}" y="{text}">{median:,.1f} {unit}</text>',
        ]
    height = 44 + ROW * len(measured)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + RIGHT}" '
        f'height="{height}" font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="#fff"/>' + "".join(drawn) + "</svg>\n",
        encoding="utf-8",
    )
