"""How Ingot's pages look, and their one plot."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;color:#1c2330;background:#fff}
h1{font-size:1.5rem;margin-bottom:.2rem} h2{font-size:1.15rem;margin-top:2.2rem;border-bottom:1px solid #d9dee7}
table{border-collapse:collapse;width:100%;font-size:13px}
th,td{text-align:left;padding:.25rem .6rem;border-bottom:1px solid #edf0f5}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums} .bar{height:.7rem;border-radius:2px;display:inline-block}
.scroll{overflow:auto;max-height:560px;border:1px solid #d9dee7;border-radius:6px}
.two{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:1rem}
.muted{color:#657086} .good{color:#137a3f} .bad{color:#b3261e} svg text{font:11px system-ui,sans-serif}
.figures{display:flex;gap:2.5rem;flex-wrap:wrap;margin:1rem 0} .figures b{display:block;font-size:1.3rem}
"""

Point = tuple[float, float, str]
_MARGIN = 46


def line_svg(
    points: Sequence[Point], across: str, up: str, marks: Sequence[Point] = (), width: int = 1120, height: int = 260
) -> str:
    """Points (x, y, title) joined in order, `marks` as dots beside them, with the axes' ends written."""
    everything = [*points, *marks]
    if not everything:
        return '<p class="muted">Nothing to draw.</p>'
    left, right = _span([p[0] for p in everything])
    low, high = _span([p[1] for p in everything])

    def place(point: Point) -> tuple[float, float]:
        x = _MARGIN + (width - 2 * _MARGIN) * (point[0] - left) / (right - left)
        return x, height - _MARGIN / 2 - (height - _MARGIN) * (point[1] - low) / (high - low)

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
    dots = "".join(_dot(*place(p), p[2], "#2457c5") for p in points) + "".join(
        _dot(*place(p), p[2], "#b9c1ce") for p in marks
    )
    ends = (
        _text(_MARGIN, height - 6, f"{left:.4g}") + _text(width - _MARGIN, height - 6, f"{right:.4g} {across}", "end")
        + _text(2, height - _MARGIN / 2, f"{low:.4g}") + _text(2, 12, f"{high:.4g} {up}")
    )  # fmt: skip
    return (
        f'<svg viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="{escape(up)} by {escape(across)}">'
        f'<polyline points="{line}" fill="none" stroke="#2457c5" stroke-opacity=".5"/>{dots}{ends}</svg>'
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _dot(x: float, y: float, title: str, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(title)}</title></circle>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{escape(text)}</text>'
