"""Arena packing: buffers live at once never overlap, and the peak stays near the bound."""

import random

from hypothesis import given
from hypothesis import strategies as st

from ingot.plan.packing import Interval, align, lower_bound, pack

INTERVALS = st.lists(
    st.builds(lambda b, f, n: Interval(b, f, f + n), st.integers(0, 5000), st.integers(0, 12), st.integers(0, 6)),
    max_size=24,
)


@given(INTERVALS)
def test_live_buffers_never_overlap(intervals: list[Interval]) -> None:
    offsets, total = pack(intervals)
    for i, a in enumerate(intervals):
        assert offsets[i] % 256 == 0 and offsets[i] + a.bytes <= total
        for j, b in enumerate(intervals[:i]):
            if a.first <= b.last and b.first <= a.last and a.bytes and b.bytes:
                assert offsets[i] + a.bytes <= offsets[j] or offsets[j] + b.bytes <= offsets[i]


@given(INTERVALS)
def test_no_packing_beats_the_lower_bound(intervals: list[Interval]) -> None:
    assert pack(intervals)[1] >= lower_bound(intervals)


def test_a_chain_needs_no_more_than_its_bound() -> None:
    rng = random.Random(0)
    chain = [Interval(rng.randrange(1, 100_000), i, i + 1) for i in range(60)]
    assert pack(chain)[1] <= 1.10 * lower_bound(chain)


def test_residual_blocks_stay_within_ten_percent() -> None:
    blocks: list[Interval] = []
    for i in range(16):
        size = 800_000 // (1 + i // 4)
        blocks += [
            Interval(size, 4 * i, 4 * i + 4),
            Interval(size // 4, 4 * i + 1, 4 * i + 2),
            Interval(size // 4, 4 * i + 2, 4 * i + 3),
        ]
    assert pack(blocks)[1] <= 1.10 * lower_bound(blocks)


def test_align() -> None:
    assert [align(n) for n in (0, 1, 256, 257)] == [0, 256, 256, 512]
