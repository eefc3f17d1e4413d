"""QuantizedLinear's kernels against numpy: every kernel and ISA, drawn shapes, groups, zero points, run-time rows.

How far a result may be off follows from the formats (`allowed`), not from what was seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.config import BFLOAT16_ERROR, SPLIT_ERROR
from ingot.ir.expression import parse
from ingot.ir.ops import meaning
from ingot.kernels import Candidate, candidates
from ingot.kernels.cpu.gemm_tiles import HALVED
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.cpu.weight_only import split_dot
from ingot.kernels.cpu.weight_only_bytes import BLOCK
from ingot.kernels.cpu.weight_only_pack import weights_of
from ingot.kernels.node import Node, Port
from tests.kernels.harness import isas

Array = np.ndarray[Any, Any]
FEW = settings(max_examples=8, deadline=None, derandomize=True)
BIAS = "Add %0 %1 -> float32"
MOST = 2  # candidates of a kernel
SUMS_ERROR = 2.0**-20  # of float32 sums in any order, relative to the magnitudes


@dataclass(frozen=True, eq=False)
class Case:
    """A product: x[..., K] by weights of `bits` bits in groups of `group` along K."""

    x: Array
    weight_KN: Array
    scale_GN: Array
    zero_GN: Array | None
    bits: int
    group: int
    bias: Array | None = None
    symbols: dict[str, int] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Array | None]:
        return [self.x, self.weight_KN, self.scale_GN, self.zero_GN, *([] if self.bias is None else [self.bias])]

    @property
    def node(self) -> Node:
        rows: tuple[int | str, ...] = (*self.symbols, *self.x.shape[len(self.symbols) :])
        constants = [None if v is None else Port(v.dtype.name, v.shape, v) for v in self.inputs[1:]]
        output = Port("float32", (*rows[:-1], self.weight_KN.shape[1]))
        epilogue = parse("" if self.bias is None else BIAS)
        attributes = {"bits": self.bits, "group": self.group}
        return Node("QuantizedLinear", (Port("float32", rows), *constants), (output,), attributes, epilogue, "tested")


def drawn(seed: int, shape: tuple[int, ...], columns: int, bits: int, group: int, zeros: str = "none",
          signed: bool = True, half: bool = True) -> Case:  # fmt: skip
    """Every weight that `bits` bits can hold; scales exactly float16 if `half`; zero points none, one or varied."""
    random, depth = np.random.default_rng(seed), shape[-1]
    low = -(1 << (bits - 1)) if signed else 0
    dtype, limits = np.dtype("int8" if signed else "uint8"), (low, low + (1 << bits))
    groups = (-(-depth // group), columns)
    scale = random.uniform(0.01, 0.1, groups).astype(np.float16 if half else np.float32).astype(np.float32)
    zero = None
    if zeros != "none":
        zero = random.integers(*limits, groups).astype(dtype)
        zero = np.full_like(zero, zero.flat[0]) if zeros == "one" else zero
    x = (random.standard_normal(shape) * np.exp(random.uniform(-3, 3, (*shape[:-1], 1)))).astype(np.float32)
    return Case(x, random.integers(*limits, (depth, columns)).astype(dtype), scale, zero, bits, group)


def allowed(case: Case, tolerance: float, streamed: bool) -> Array:
    """How far results may be off.

    Streamed: x is rounded to integers, 2^-15 of the largest number of its block (weights_of says what a block is). By
    tiles: `tolerance` of the magnitudes multiplied, and what a float32 scale times its zero point is rounded by. In
    bytes (a tolerance of BFLOAT16_ERROR): see rounding_to_bytes.
    """
    rows = np.abs(case.x.reshape(-1, case.x.shape[-1]).astype(np.float64))
    of_depth = np.arange(rows.shape[1]) // case.group
    steps_KN = case.scale_GN.astype(np.float64)[of_depth]
    zeros = 0 if case.zero_GN is None else case.zero_GN.astype(np.float64)[of_depth]
    weights_KN = np.abs((case.weight_KN - zeros) * steps_KN)
    largest = rows
    if streamed:
        starts = np.arange(0, rows.shape[1], weights_of(case.node).block)
        largest = np.maximum.reduceat(rows, starts, axis=1)[:, np.arange(rows.shape[1]) // weights_of(case.node).block]
    bias = 0 if case.bias is None else np.abs(case.bias)
    sums = rows @ weights_KN + bias
    bound = largest @ weights_KN * (2.0**-15 if streamed else tolerance) + sums * SUMS_ERROR
    if not streamed and tolerance == BFLOAT16_ERROR:
        bound = rounding_to_bytes(case, rows, weights_KN) + sums * SUMS_ERROR
    return (bound + rows @ steps_KN * 2.0**-15).reshape(*case.x.shape[:-1], sums.shape[1])


def rounding_to_bytes(case: Case, rows: Array, weights_KN: Array) -> Array:
    """x is off by half of a 127th of the largest number of 128, weights by half a unit of a byte, whose units are as
    large as the block's largest scale wants them; weights that a byte holds in whole units are exact."""
    weights = weights_of(case.node)
    most = (1 << case.bits) - 1
    widest = most if weights.zero_GN is not None else max(weights.zero, most - weights.zero)
    units = 127 // widest if widest <= 127 else 127 / widest
    one_scale = case.group >= rows.shape[1] or case.group % BLOCK == 0
    whole = one_scale and (case.bits == 4 or (weights.zero_GN is None and weights.zero == 128))
    steps_KN = np.abs(case.scale_GN.astype(np.float64))[np.arange(rows.shape[1]) // case.group]
    off_x, off_weights = (_by_block(rows, 1) / 254, _by_block(steps_KN, 0) * (0 if whole else 0.51 / units))
    return np.asarray(off_x @ weights_KN + (rows + off_x) @ off_weights)


def _by_block(magnitudes: Array, axis: int) -> Array:
    """Each number's largest one among the 128 of its block."""
    places = np.arange(magnitudes.shape[axis])
    largest = np.maximum.reduceat(magnitudes, places[::BLOCK], axis=axis)
    return np.asarray(np.take(largest, places // BLOCK, axis=axis))


def runs(case: Case) -> Iterator[tuple[str, Candidate, Isa, Array]]:
    """Some candidates of every kernel on every ISA: what each makes of the case in one and three chunks."""
    node = case.node
    for isa in isas():
        found: dict[str, list[Candidate]] = {}
        for candidate in candidates(node, "cpu", isa):
            found.setdefault(candidate.kernel.name, []).append(candidate)
        found |= {name: several[:1] for name, several in found.items() if "restored" in name}  # Linear's, tested there
        assert "weight_only" in found or "weight_only_split" in found, f"no kernel on {isa.name}"
        for candidate in (c for several in found.values() for c in several[:: max(len(several) // MOST, 1)][:MOST]):
            alone = Standalone(node, candidate, isa, case.symbols, level=1)
            for chunks in (1, 3):
                (mine,) = alone(*case.inputs, chunks=chunks)
                yield f"{candidate.label} on {isa.name}, {chunks} chunks", candidate, isa, mine


def check(case: Case) -> set[str]:
    """Every kernel within what its format allows; the kernels that ran."""
    stated = {"bits": case.bits, "group": case.group, **({} if case.bias is None else {"epilogue": BIAS})}
    (expected,) = meaning("QuantizedLinear")(*case.inputs, **stated)
    rows, ran = int(np.prod(case.x.shape[:-1])), set()
    for what, candidate, _, mine in runs(case):
        tiles = candidate.kernel.name != "weight_only" and rows > 8
        bound = allowed(case, candidate.kernel.tolerance, not tiles)
        wrong = np.abs(mine.astype(np.float64) - expected) - bound
        assert wrong.size == 0 or wrong.max() <= 0, f"{what}: {wrong.max():.3g} over {bound.max():.3g}"
        ran.add(candidate.kernel.name)
    return ran


GROUPS = st.sampled_from([8, 16, 32, 40, 64, 128, 256, 4096])
ZEROS = st.sampled_from(["none", "one", "varied"])


@FEW
@given(st.integers(1, 20), st.integers(1, 300), st.integers(1, 90), st.sampled_from([4, 8]), GROUPS, ZEROS,
       st.booleans(), st.booleans())  # fmt: skip
def test_drawn(rows: int, depth: int, columns: int, bits: int, group: int, zeros: str, signed: bool,
               half: bool) -> None:  # fmt: skip
    case = drawn(rows * depth + columns, (rows, depth), columns, bits, group, zeros, signed, half)
    assert "weight_only" in check(case)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 33])
def test_as_language_models_have_them(rows: int, bits: int) -> None:
    check(drawn(rows, (rows, 256), 96, bits, 32))


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 3, 48), (2, 0, 48)])
def test_ranks_and_empty_extents(shape: tuple[int, ...]) -> None:
    check(drawn(1, shape, 20, 4, 16))


@pytest.mark.parametrize("zeros", ["none", "varied"])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 40])
def test_rows_that_only_the_run_knows(rows: int, zeros: str) -> None:
    case = drawn(rows, (rows, 96), 50, 4, 32, zeros)
    check(replace(case, symbols={"T": rows}))


def test_an_epilogue() -> None:
    for rows in (2, 20):
        case = drawn(5, (rows, 100), 70, 8, 4096)
        bias = np.linspace(-9, 9, 70, dtype=np.float32)
        check(replace(case, bias=bias))


def test_the_largest_sums_that_there_are() -> None:
    """Integers hold what the largest weights and the largest numbers make in a block."""
    for bits, group in ((8, 4096), (4, 128)):
        case = drawn(0, (2, 1024), 33, bits, group)
        weight = np.full_like(case.weight_KN, -(1 << (bits - 1)))
        x = np.repeat(np.array([[3.0], [-3.0]], np.float32), 1024, axis=1)
        check(Case(x, weight, case.scale_GN, None, bits, group))


def test_zeros_and_small_numbers_stay() -> None:
    case = drawn(2, (3, 64), 24, 4, 32)
    x = case.x.copy()
    x[0], x[1] = 0, x[1] * np.float32(1e-30)
    check(Case(x, case.weight_KN, case.scale_GN, None, 4, 32))
    for what, _, _, mine in runs(Case(x, case.weight_KN, case.scale_GN, None, 4, 32)):
        assert not mine[0].any(), what


@pytest.mark.parametrize("rows", [3, 20])
def test_infinity_and_nan_are_seen(rows: int) -> None:
    case = drawn(4, (rows, 64), 24, 8, 32)
    case.x[1, 2], case.x[2, 40] = np.inf, np.nan
    for what, _, _, mine in runs(case):
        assert np.isfinite(mine[0]).all() and not np.isfinite(mine[1:3]).any(), what


@pytest.mark.parametrize("zeros", ["none", "one", "varied"])
@pytest.mark.parametrize(
    ("bits", "group"), [(4, 8), (4, 32), (4, 96), (4, 256), (8, 64), (8, 128), (4, 4096), (8, 4096)]
)
def test_many_rows_group_by_group(bits: int, group: int, zeros: str) -> None:
    """Several parts of K, the last of which ends within a group, and rows that end within a tile."""
    check(drawn(group, (77, 1000), 150, bits, group, zeros, signed=zeros != "one", half=bits == 4))


def test_integers_are_multiplied_as_they_are_where_a_tile_has_one_scale() -> None:
    exact = {
        group: split_dot(drawn(0, (40, 96), 8, 4, group).node) is HALVED for group in (8, 16, 32, 40, 64, 96, 4096)
    }
    assert exact == {8: False, 16: False, 32: True, 40: False, 64: True, 96: True, 4096: True}
    for isa in isas():
        for group in exact:
            ran = {c.kernel.name for c in candidates(drawn(0, (40, 96), 32, 4, group).node, "cpu", isa)}
            assert ("weight_only_restored_split" in ran) == (isa.has("amx_bf16") and not exact[group])


def test_tiles_and_restored_weights_are_there_for_many_rows() -> None:
    case = drawn(6, (40, 128), 64, 4, 32, "varied")
    ran = check(replace(case, bias=np.linspace(-9, 9, 64, dtype=np.float32)))
    assert "weight_only_restored" in ran
    tiled = {"weight_only_split", "weight_only_rounded"}
    assert tiled <= ran or not any(isa.has("amx_bf16") for isa in isas())
    assert (SPLIT_ERROR, BFLOAT16_ERROR) == (2.0**-15, 2.0**-8)


def in_bytes(case: Case) -> Array | None:
    """What the kernel for bytes makes of the case, where this machine has it."""
    found = (alone[3] for alone in runs(case) if alone[1].kernel.name == "weight_only_rounded")
    return next(found, None)


@pytest.mark.parametrize("columns", [32, 33])
def test_what_stands_out_costs_the_others_no_bits(columns: int) -> None:
    """Where a number has more than three quarters of its block's squares, what eight bits leave is multiplied too."""
    case = drawn(7, (40, 300), columns, 8, 128)
    x = np.random.default_rng(7).standard_normal((40, 300)).astype(np.float32)
    x[3, 5], x[3, 130], x[35, 299] = 1000.0, -1000.0, 1000.0
    case = replace(case, x=x)
    mine = in_bytes(case)
    if mine is None:
        pytest.skip("this machine has no tile registers for bytes")
    exact = x.astype(np.float64) @ (case.weight_KN * case.scale_GN.astype(np.float64)[np.arange(300) // 128])
    weights_KN = np.abs(case.weight_KN * case.scale_GN[np.arange(300) // 128])
    bound = _by_block(np.abs(x), 1) @ weights_KN
    assert (np.abs(mine - exact)[[3]] <= bound[[3]] * 2.0**-14).all()
    assert (np.abs(mine - exact) <= bound / 250).all()


def test_a_row_has_the_same_bits_in_any_company() -> None:
    case = drawn(8, (33, 384), 48, 8, 128)
    case.x[20, 200] = 1e4
    both = in_bytes(case)
    if both is None:
        pytest.skip("this machine has no tile registers for bytes")
    calm = case.x.copy()
    calm[20] = 1
    alone = in_bytes(replace(case, x=calm))
    fewer = in_bytes(replace(case, x=np.ascontiguousarray(case.x[:12])))
    assert alone is not None and fewer is not None
    others = np.arange(33) != 20
    assert (both[others] == alone[others]).all() and (both[:12] == fewer).all() and (both[20] != alone[20]).any()
