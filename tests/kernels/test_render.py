"""Every instruction of the expression table, in vector code, against its numpy meaning."""

from dataclasses import replace

import numpy as np
import pytest

from ingot.dtypes import numpy_dtype
from ingot.ir.elementwise import INSTRUCTIONS
from ingot.ir.expression import parse
from ingot.kernels import Candidate, candidates
from ingot.kernels.cpu.build import KernelBuilder, PhaseFunction
from ingot.kernels.cpu.llvm import Value
from ingot.kernels.cpu.math import exp2_below
from ingot.kernels.cpu.render import MEMORY, can_render, renderers
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Node
from tests.kernels.harness import Array, check, isas, node_of

COUNT = 77
LIMITS = {  # where a function is defined or stays finite; others are tried on [-30, 30]
    "Log": (1e-3, 1e4), "Sqrt": (0, 100), "Asin": (-1, 1), "Acos": (-1, 1), "Acosh": (1, 50), "Atanh": (-0.99, 0.99),
    "Pow": (0.1, 6), "Sinh": (-9, 9), "Cosh": (-9, 9), "Exp": (-9, 9), "Tan": (-1.5, 1.5),
}  # fmt: skip
TOLERANCES = {"float32": 1e-6, "float64": 3e-14, "float16": 2e-3, "bfloat16": 1.6e-2}
FLOAT_TYPES = tuple(TOLERANCES)
INTEGER_TYPES = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
INTEGER_OPS = (
    "Neg Abs Sign Relu BitwiseNot Add Sub Mul Div Pow Min Max BitwiseAnd BitwiseOr BitwiseXor Mod Clip Equal Less "
    "LessOrEqual Greater GreaterOrEqual Where"
).split()
UNSIGNED_OPS = ("BitShift",)
BITS_ONLY = ("BitwiseNot", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "BitShift", "And", "Or", "Xor", "Not")
SPECIAL = ("Cast", "Quantize", "Dequantize")


def numbers(dtype: str, seed: int = 0, low: float = -30, high: float = 30) -> Array:
    """Seeded values of a type; integers over their whole range, with small ones among them."""
    draw = np.random.default_rng(seed)
    if dtype == "bool":
        return draw.integers(0, 2, COUNT).astype(bool)
    if dtype in INTEGER_TYPES:
        limits = np.iinfo(dtype)
        values = draw.integers(limits.min, limits.max, COUNT, dtype=dtype, endpoint=True)
        values[:40] = draw.integers(0, 9, 40)
        values[20:40] = -values[20:40] if limits.min < 0 else values[20:40]
        values[40:43] = limits.min, limits.max, limits.min
        return values
    values = draw.uniform(low, high, COUNT)
    return values.astype(numpy_dtype(dtype))


def float_ops() -> list[str]:
    return [op for op in INSTRUCTIONS if op not in (*BITS_ONLY, *SPECIAL)]


def operands_for(op: str, dtype: str) -> list[Array]:
    low, high = LIMITS.get(op, (-30, 30))
    operands = [numbers(dtype, seed, low, high) for seed in range(INSTRUCTIONS[op].arity)]
    if op == "Where":
        operands[0] = numbers("bool")
    if op == "Clip":
        operands[1:] = np.minimum(*operands[1:]), np.maximum(*operands[1:])
    if op == "BitShift" or (op == "Pow" and dtype in INTEGER_TYPES):
        operands[1] = np.random.default_rng(2).integers(0, 9, COUNT).astype(dtype)
    if op == "Div" and dtype in INTEGER_TYPES:  # by zero numpy's quotient rounds down once more
        operands[1][operands[1] == 0] = 1
        operands[1][(operands[1].astype(object) == -1) & (operands[0] == np.iinfo(dtype).min)] = 3
    if op == "Mod":
        operands[1][operands[1] == 0] = 1
    return operands


def expression_for(op: str, dtype: str) -> str:
    result = "bool" if INSTRUCTIONS[op].typing in ("compare", "logic") else dtype
    return f"{op} {' '.join(f'%{i}' for i in range(INSTRUCTIONS[op].arity))} -> {result}"


def run(op: str, dtype: str, suffix: str = "") -> None:
    operands = operands_for(op, dtype)
    node, expected = node_of("Pointwise", operands, {}, expression_for(op, dtype).replace(op, op + suffix, 1))
    tolerance = TOLERANCES.get(dtype, 0)
    check(node, operands, expected, rtol=tolerance, atol=tolerance)


def test_every_instruction_has_a_renderer() -> None:
    assert renderers().keys() == INSTRUCTIONS.keys()
    assert can_render(parse("Add %0 1 -> float32"), ["float32"])
    assert not can_render(parse("Add %0 1 -> complex64"), ["complex64"])


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_floats(dtype: str) -> None:
    for op in float_ops():
        run(op, dtype)


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_integers(dtype: str) -> None:
    for op in (*INTEGER_OPS, *(UNSIGNED_OPS if dtype.startswith("u") else ())):
        run(op, dtype)


def test_truth_values() -> None:
    for op in ("And", "Or", "Xor", "Not", "Equal", "Where"):
        run(op, "bool")


@pytest.mark.parametrize("op, suffix, dtype", [
    ("Mod", ":fmod=1", "float32"), ("Mod", ":fmod=1", "int32"), ("BitShift", ":direction=RIGHT", "uint8"),
    ("LeakyRelu", ":alpha=0.2", "float32"), ("Elu", ":alpha=1.5", "float32"),
    ("HardSigmoid", ":alpha=0.3,beta=0.4", "float32"),
])  # fmt: skip
def test_attributes(op: str, suffix: str, dtype: str) -> None:
    run(op, dtype, suffix)


SPECIALS = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1, 1, 0.5, 1.5, 2.5, -2.5, 88.8, -104, 1e38, -1e38],
                    np.float32)  # fmt: skip
EXACT = (
    "Exp Log Tanh Sigmoid Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Sqrt Round Floor Ceil Sign Relu"
).split()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values_of_functions(dtype: str) -> None:
    for op in EXACT:
        x = SPECIALS.astype(dtype)
        x = np.where(np.abs(x) < 1e9, x, 3).astype(dtype) if op in ("Sin", "Cos", "Tan") else x
        node, expected = node_of("Pointwise", [x], {}, expression_for(op, dtype))
        check(node, [x], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["Min", "Max", "Equal", "Less", "GreaterOrEqual", "Mod", "Pow", "Add", "Div"])
def test_special_values_of_pairs(op: str) -> None:
    a, b = (grid.ravel() for grid in np.meshgrid(SPECIALS, SPECIALS))
    if op == "Mod":  # exact while the quotient has at most 53 bits
        keep = (np.abs(a) < 1e9) & (np.abs(b) > 1e-9)
        a, b = a[keep], b[keep]
    node, expected = node_of("Pointwise", [a, b], {}, expression_for(op, "float32"))
    check(node, [a, b], expected, rtol=1e-6, atol=0)


def test_integer_division_never_traps() -> None:
    for dtype in ("int8", "int32", "int64", "uint64"):
        low = np.iinfo(dtype).min
        a, b = np.array([7, low, 0, low], dtype), np.array([0, 0, 0, np.array(-1).astype(dtype)], dtype)
        for op in ("Div", "Mod"):
            node, _ = node_of("Pointwise", [a, np.ones_like(b)], {}, expression_for(op, dtype))
            check(node, [a, np.ones_like(b)], [a // 1 if op == "Div" else a * 0])
            node, _ = node_of("Pointwise", [a, np.ones_like(b)], {}, expression_for(op, dtype))
            first = np.array([0, 0, 0], dtype)
            check(node_of("Pointwise", [a[:3], b[:3] + 1], {}, expression_for(op, dtype))[0], [a[:3], b[:3]], [first])


@pytest.mark.parametrize("exponent", ["2", "3", "4", "0.5", "-1", "-2", "-0.5", "1", "0", "2.5"])
def test_literal_exponents(exponent: str) -> None:
    x = numbers("float32", 0, 0.1, 5)
    node, expected = node_of("Pointwise", [x], {}, f"Pow %0 {exponent} -> float32")
    check(node, [x], expected, rtol=1e-6)


def test_powers_of_doubles() -> None:
    base, exponent = (grid.ravel() for grid in np.meshgrid(np.arange(0.1, 9), np.arange(-90.0, 90)))
    node, expected = node_of("Pointwise", [base, exponent], {}, "Pow %0 %1 -> float64")
    check(node, [base, exponent], expected, rtol=4.5e-16, atol=0)


def sample(dtype: str) -> Array:
    """Values of any storable type, in range for most others."""
    if dtype in INTEGER_TYPES or dtype == "bool":
        return numbers(dtype)
    draw = np.random.default_rng(4)
    if "int" in dtype:
        return draw.integers(0 if dtype.startswith("u") else -2, 2, COUNT).astype(np.int32).astype(numpy_dtype(dtype))
    values = np.concatenate([np.arange(-24, 24) / 4, draw.standard_normal(COUNT - 48) * 30])
    return np.abs(values + 0.01).astype(numpy_dtype(dtype)) if "e8m0" in dtype else values.astype(numpy_dtype(dtype))


@pytest.mark.parametrize("source", MEMORY)
def test_casts(source: str) -> None:
    x = sample(source)
    sparse = sorted(MEMORY)[sorted(MEMORY).index(source) % 3 :: 3] if source not in ("float32", "int64") else MEMORY
    for target in sparse:
        try:
            node, expected = node_of("Pointwise", [x], {}, f"Cast %0 -> {target}")
        except TypeError:  # ml_dtypes has no conversion between two of its small types
            continue
        check(node, [x], expected, rtol=0, atol=0)


def test_every_code_of_small_floats_survives() -> None:
    codes = np.arange(256, dtype=np.uint8)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"):
        x = codes.view(numpy_dtype(name))
        node, expected = node_of("Pointwise", [x], {}, "Cast %0 -> float32")
        check(node, [x], expected, rtol=0, atol=0)
        wide = np.nan_to_num(expected[0], posinf=1, neginf=-1)
        node, expected = node_of("Pointwise", [wide], {}, f"Cast %0 -> {name}")
        check(node, [wide], expected, rtol=0, atol=0)


@pytest.mark.parametrize("saturate", [0, 1])
@pytest.mark.parametrize("target", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float4_e2m1fn"])
def test_casts_to_small_floats_round_and_saturate(target: str, saturate: int) -> None:
    draw = np.random.default_rng(1)
    x = np.concatenate([SPECIALS[:4], draw.standard_normal(COUNT) * 10 ** draw.uniform(-4, 6, COUNT)]).astype("f4")
    node, expected = node_of("Pointwise", [x], {}, f"Cast:saturate={saturate} %0 -> {target}")
    check(node, [x], expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int4", "uint4"])
def test_quantize_and_back(dtype: str) -> None:
    draw = np.random.default_rng(3)
    x = (draw.standard_normal(COUNT) * 10 ** draw.uniform(-2, 5, COUNT)).astype(np.float32)
    x[:9] = np.arange(-4, 5) * 0.5 * 0.25  # ties
    scale, zero = np.float32([0.25]), np.array([3]).astype(numpy_dtype(dtype))
    node, expected = node_of("Pointwise", [x, scale, zero], {}, f"Quantize %0 %1 %2 -> {dtype}")
    check(node, [x, scale, zero], expected)
    inputs = [expected[0], scale, zero]
    node, expected = node_of("Pointwise", inputs, {}, "Dequantize %0 %1 %2 -> float32")
    check(node, inputs, expected, rtol=0, atol=0)


def test_literals_take_the_type_of_their_place() -> None:
    x = numbers("float16")
    chain = "Mul %0 0.1 -> float16; Less $0 0.3 -> bool; Where $1 -inf $0 -> float16"
    node, expected = node_of("Pointwise", [x], {}, chain)
    check(node, [x], expected, rtol=0, atol=0)
    small = numbers("uint8")
    node, expected = node_of("Pointwise", [small], {}, "Max %0 200 -> uint8; BitwiseXor $0 255 -> uint8")
    check(node, [small], expected)


def test_both_instruction_sets_are_tried() -> None:
    assert isas()[-1].name == "avx2"


def test_powers_of_two_below_one() -> None:
    """What attention in tiles takes for its exponential."""
    x = np.concatenate([-np.random.default_rng(0).uniform(0, 126, 300), [0, -0.5, -126, -1e30, -np.inf, np.nan, -1e-9]])
    x = np.resize(x.astype(np.float32), 320)
    node, _ = node_of("Pointwise", [x], {}, "Abs %0 -> float32")

    def generate(build: KernelBuilder, node: Node) -> None:
        def body(f: PhaseFunction, begin: Value, end: Value) -> None:
            source, target = f.pointer(build.input(0)), f.pointer(build.output())

            def some(i: Value) -> None:
                f.store(exp2_below(f, f.load("<8 x float>", source, i * 4)), target, i * 4)

            f.loop(0, x.size, some, step=8)

        build.phase(1, body)

    for isa in isas():
        kernel = replace(next(candidates(node, "cpu", isa)).kernel, generate=generate, name="powers")
        (found,) = Standalone(node, Candidate(kernel), isa, level=1)(x)
        expected = np.where(x < -126, 0, np.exp2(x.astype(np.float64)))
        assert np.allclose(found, expected, rtol=2.4e-7, atol=0, equal_nan=True)
        assert found[x == 0].tolist() == [1.0] * int((x == 0).sum())
