"""Pictures of the report as SVG text: a layered graph, an arena over time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

Node = tuple[str, str, Sequence[int], int | None]
Box = tuple[str, int, int, int, int]
_ROW, _WIDTH, _HEIGHT, _GAP = 38, 220, 24, 14


def step_colour(index: int | None) -> str:
    """A colour per step; neighbours differ."""
    return "#e6e9ef" if index is None else f"hsl({index * 47 % 360} 55% 78%)"


def graph_svg(nodes: Sequence[Node]) -> str:
    """Nodes (name, label, positions of sources, step) in rows by their longest path from the inputs."""
    ranks: list[int] = []
    for _, _, sources, _ in nodes:
        ranks.append(max((ranks[s] + 1 for s in sources if s < len(ranks)), default=0))
    used: dict[int, int] = {}
    places = []
    for rank in ranks:
        places.append((8 + used.get(rank, 0) * (_WIDTH + _GAP), 8 + rank * _ROW))
        used[rank] = used.get(rank, 0) + 1
    edges = [
        _edge(places[s], places[i]) for i, (_, _, sources, _) in enumerate(nodes) for s in sources if s < len(places)
    ]
    boxes = [_box(place, node) for place, node in zip(places, nodes, strict=True)]
    width = 16 + max(used.values(), default=1) * (_WIDTH + _GAP)
    height = 16 + (max(ranks, default=0) + 1) * _ROW
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="graph">{"".join(edges)}{"".join(boxes)}</svg>'
    )


def _edge(start: tuple[int, int], end: tuple[int, int]) -> str:
    x1, y1 = start[0] + _WIDTH // 2, start[1] + _HEIGHT
    x2, y2 = end[0] + _WIDTH // 2, end[1]
    bend = (y2 - y1) // 2 + 6
    return f'<path d="M{x1} {y1} C{x1} {y1 + bend},{x2} {y2 - bend},{x2} {y2}" fill="none" stroke="#9aa4b5"/>'


def _box(place: tuple[int, int], node: Node) -> str:
    name, label, _, step = node
    text = label if len(label) <= 34 else label[:33] + "…"
    title = f"{name} ({label})" + ("" if step is None else f", step {step}")
    x, y = place
    return (
        f'<g><title>{escape(title)}</title><rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4" '
        f'fill="{step_colour(step)}" stroke="#7c879b"/><text x="{x + 8}" y="{y + 16}">{escape(text)}</text></g>'
    )


def memory_svg(boxes: Sequence[Box], steps: int, total: int, width: int = 1120, height: int = 300) -> str:
    """Buffers (name, first step, last step, offset, bytes) as rectangles over steps and bytes."""
    across, up = width / max(steps + 1, 1), height / max(total, 1)
    drawn = []
    for index, (name, first, last, offset, size) in enumerate(boxes):
        x, w = first * across, max((last - first + 1) * across - 1, 1)
        y, h = height - (offset + size) * up, max(size * up - 0.5, 0.5)
        drawn.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{step_colour(index)}" '
            f'stroke="#7c879b" stroke-width=".5">'
            f"<title>{escape(name)}: {size} bytes, steps {first} to {last}</title></rect>"
        )
    return f'<svg width="{width}" height="{height}" role="img" aria-label="memory over time">{"".join(drawn)}</svg>'
