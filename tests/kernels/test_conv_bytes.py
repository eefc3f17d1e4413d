"""Conv of bytes by vectors against numpy, on every instruction set below tiles: with VNNI, without, on AVX2."""

from __future__ import annotations

import pytest

from ingot.kernels import candidates
from ingot.kernels.cpu.isa import AVX2, AVX512, AVX512_VNNI, Isa
from ingot.kernels.cpu.standalone import Standalone
from ingot.runtime.machine import cpu_features
from tests.kernels.harness import _compare
from tests.kernels.test_conv import Case
from tests.kernels.test_conv_tiles import BYTES_CASES, DEPTHWISE, FAR, STEMS, Bytes

FORMS = {
    **BYTES_CASES,
    "pictures": STEMS["pictures"],
    "far from the zero point": Bytes(Case((1, 70, 9, 9), 24, (3, 3), pads=(1, 1, 1, 1)), **FAR),
    "one position": Bytes(Case((1, 40, 1, 1), 24, (1, 1)), ("int8", "int8"), (-3, 0)),
    "signal": Bytes(Case((2, 19, 70), 40, (3,), 2, (1, 1))),
    "signal of one channel": Bytes(Case((1, 1, 200), 24, (16,), 8), ("int8", "int8"), (-3, 0)),
    "dilated": Bytes(Case((2, 19, 12, 13), 20, (3, 2), 2, (2, 1, 2, 1), 2)),
}
SETS = [AVX512_VNNI, AVX512, AVX2]


def check_on(form: Bytes, isa: Isa, kernel: str) -> None:
    """A few of the kernel's candidates, exactly."""
    if not isa.machine <= cpu_features():
        pytest.skip(f"this machine has no {isa.name}")
    node, inputs, expected = form.build()
    found = [c for c in candidates(node, "cpu", isa) if c.kernel.name == kernel]
    assert found
    for candidate in found[:: max(len(found) // 3, 1)]:
        alone = Standalone(node, candidate, isa, level=1)
        for chunks in (1, 3):
            _compare(alone(*inputs, chunks=chunks)[0], expected[0], 0, 0, f"{candidate.label}, {chunks} chunks")


@pytest.mark.parametrize("isa", SETS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", FORMS)
def test_direct(name: str, isa: Isa) -> None:
    check_on(FORMS[name], isa, "conv_direct_bytes")


@pytest.mark.parametrize("isa", SETS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", DEPTHWISE)
def test_lanewise(name: str, isa: Isa) -> None:
    check_on(DEPTHWISE[name], isa, "conv_lanewise_bytes")
