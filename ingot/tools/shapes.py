"""Shapes on the command line, in trtexec's spelling: `x:1x3x224x224,y:8x10`, a range as `x:1..16x512`."""

from __future__ import annotations

from collections.abc import Mapping

from ingot.config import Profile
from ingot.errors import ConfigError

Triple = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """`x:1x3,y:2x4` → {"x": (1, 3), "y": (2, 4)}."""
    return {name: low for name, (low, _, _) in parse_ranges(text).items()}


def parse_ranges(text: str) -> dict[str, Triple]:
    """The same where an extent may be `low..high` (typical: the high end) or `low..typical..high`."""
    shapes: dict[str, Triple] = {}
    for part in filter(None, text.split(",")):
        name, colon, extents = part.rpartition(":")
        if not colon or not name:
            raise ConfigError(f"{part!r} is not a shape; write name:1x3x224x224")
        shapes[name.strip("'\"")] = _triple(part, extents)
    return shapes


def _triple(part: str, extents: str) -> Triple:
    columns = [_extent(part, e) for e in extents.split("x")] if extents not in ("", "scalar") else []
    low, typical, high = (tuple(c[i] for c in columns) for i in range(3))
    return low, typical, high


def _extent(part: str, text: str) -> tuple[int, int, int]:
    numbers = [int(n) if n.isdigit() else -1 for n in text.split("..")]
    if -1 in numbers or not 1 <= len(numbers) <= 3 or numbers != sorted(numbers):
        raise ConfigError(f"{text!r} in {part!r} is not an extent; write a number, low..high or low..typical..high")
    return numbers[0], numbers[-1] if len(numbers) < 3 else numbers[1], numbers[-1]


def profile_from(
    shapes: str | None, low: str | None = None, typical: str | None = None, high: str | None = None
) -> Profile | None:
    """The profile that --shapes, or --minShapes, --optShapes and --maxShapes, stand for; what is left out is the
    nearest given."""
    if shapes:
        return Profile(**parse_ranges(shapes))
    given = [parse_shapes(text) if text else {} for text in (low, typical, high)]
    names = dict.fromkeys(name for shapes_ in given for name in shapes_)
    if not names:
        return None
    return Profile(**{name: _filled(name, given) for name in names})


def _filled(name: str, given: list[dict[str, tuple[int, ...]]]) -> Triple:
    low, typical, high = (shapes.get(name) for shapes in given)
    middle = typical or high or low or ()
    return low or middle, middle, high or middle


def sizes_of(profile: Profile | None) -> Mapping[str, tuple[int, ...]]:
    """Typical shapes of a profile."""
    return {name: triple[1] for name, triple in profile.shapes.items()} if profile else {}
