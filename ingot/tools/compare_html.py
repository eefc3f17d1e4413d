"""The page of `ingot compare --layers --html`: a row a tensor, its error through the depth, histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ingot.tools.compare import Row
from ingot.tools.html_style import STYLE, line_svg

_FLOOR, _CEILING = -20.0, 160.0  # decibels shown
_WIDTH, _HEIGHT = 192, 36


@dataclass(frozen=True)
class Histogram:
    """Counts in equal bins: of both sides' values between low and high, of the differences between ±reach."""

    low: float
    high: float
    mine: tuple[int, ...]
    wanted: tuple[int, ...]
    reach: float
    gap: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A tensor inside: how close it is, which node made it, how its values lie."""

    row: Row
    node: str
    operator: str
    histogram: Histogram | None


def page(name: str, layers: Sequence[Layer]) -> str:
    """The whole document."""
    head = (
        '<tr><th class="n">#</th><th>tensor</th><th>node</th><th class="n">SNR dB</th><th class="n">cosine</th>'
        '<th class="n">largest</th><th>values: engine over reference</th><th>differences</th><th></th></tr>'
    )
    rows = "".join(_row(i, layer) for i, layer in enumerate(layers))
    title = f"{escape(name)}, layer by layer"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style><body>'
        f"<h1>{title}</h1><p>{_summary(layers)}</p><h2>Signal to noise through the depth</h2>{_depth(layers)}"
        f"<h2>Tensors</h2><table>{head}{rows}</table></body></html>\n"
    )


def _summary(layers: Sequence[Layer]) -> str:
    failed = [layer for layer in layers if not layer.row.passed]
    worst = min(layers, key=lambda layer: layer.row.statistics.signal_to_noise)
    return (
        f"{len(layers)} tensors, {len(failed)} outside the tolerance; the least signal to noise is "
        f"{worst.row.statistics.signal_to_noise:.1f} dB at <b>{escape(worst.row.output)}</b> of node "
        f"{escape(worst.node)} ({escape(worst.operator)})."
    )


def _depth(layers: Sequence[Layer]) -> str:
    points = [
        (float(i), min(max(layer.row.statistics.signal_to_noise, _FLOOR), _CEILING), layer.row.output)
        for i, layer in enumerate(layers)
    ]
    return line_svg(points, "tensor", "SNR dB")


def _row(index: int, layer: Layer) -> str:
    s, passed = layer.row.statistics, layer.row.passed
    shown = ("", "") if layer.histogram is None else _pictures(layer.histogram)
    return (
        f'<tr><td class="n">{index}</td><td>{escape(layer.row.output)}</td>'
        f'<td>{escape(layer.node)} <span class="muted">{escape(layer.operator)}</span></td>'
        f'<td class="n">{_decibels(s.signal_to_noise)}</td><td class="n">{s.cosine:.6f}</td>'
        f'<td class="n">{s.largest:.2e}</td><td>{shown[0]}</td><td>{shown[1]}</td>'
        f'<td class="{"good" if passed else "bad"}">{"passed" if passed else "FAILED"}</td></tr>'
    )


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal" if value > 0 else "−∞"


def _pictures(h: Histogram) -> tuple[str, str]:
    top = max(*h.mine, *h.wanted, 1)
    values = _bars(h.wanted, top, "#c6cedb") + _bars(h.mine, top, "none", "#2457c5")
    gaps = _bars(h.gap, max(*h.gap, 1), "#d9906f")
    return _svg(values, f"{h.low:.3g}", f"{h.high:.3g}"), _svg(gaps, f"{-h.reach:.1e}", f"{h.reach:.1e}")


def _bars(counts: Sequence[int], top: int, fill: str, stroke: str = "none") -> str:
    """Heights on a logarithmic scale, so that tails show."""
    width = _WIDTH / len(counts)
    heights = [(_HEIGHT - 12) * math.log1p(count) / math.log1p(top) for count in counts]
    if stroke != "none":
        points = " ".join(f"{(i + 0.5) * width:.1f},{_HEIGHT - 12 - h:.1f}" for i, h in enumerate(heights))
        return f'<polyline points="{points}" fill="none" stroke="{stroke}"/>'
    return "".join(
        f'<rect x="{i * width:.1f}" y="{_HEIGHT - 12 - h:.1f}" width="{width:.1f}" height="{h:.1f}" fill="{fill}"/>'
        for i, h in enumerate(heights)
        if h
    )


def _svg(content: str, low: str, high: str) -> str:
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="histogram {low} to {high}">{content}'
        f'<text x="0" y="{_HEIGHT - 1}" style="font-size:9px">{low}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT - 1}" text-anchor="end" style="font-size:9px">{high}</text></svg>'
    )
