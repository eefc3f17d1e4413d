"""What every CUDA kernel is checked on: interpreted and compiled everywhere, run where a GPU is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.kernels.cuda.case import Case
from tests.kernels.cuda.cases_mixture import MIXTURES
from tests.kernels.cuda.cases_places import PLACES
from tests.kernels.cuda.cases_projections import PROJECTIONS

ZERO_POINTS = {"x_zero_point": 0, "weight_zero_point": 0}
GATE = "Gelu %1 -> float32; Mul %0 $0 -> float32"
HALF_GATE = f"{GATE}; Cast $1 -> float16"
RESIDUAL = "Add %0 %1 -> float32; Add $0 %2 -> float32; Relu $1 -> float32"
HALF_RESIDUAL = (
    "Cast %0 -> float32; Cast %1 -> float32; Cast %2 -> float32; Add $0 $1 -> float32; Add $3 $2 -> float32; "
    "Relu $4 -> float32; Cast $5 -> float16"
)


def conv(kernel: int = 3, stride: int = 1, pad: int | None = None, group: int = 1, dilation: int = 1) -> dict[str, Any]:
    """Attributes of a square Conv."""
    border = kernel // 2 if pad is None else pad
    return {
        "strides": (stride,) * 2,
        "pads": (border,) * 4,
        "dilations": (dilation,) * 2,
        "group": group,
        **ZERO_POINTS,
    }


def _convolutions() -> Iterator[Case]:
    # name, channels, outputs, kernel, extent, attributes, dtype, large
    table = [
        ("3x3", 64, 40, 3, 9, conv(), "float32", False),
        ("3x3 stride 2", 64, 40, 3, 9, conv(stride=2), "float16", False),
        ("1x1", 64, 48, 1, 9, conv(1), "float16", False),
        ("1x1 stride 2", 64, 32, 1, 9, conv(1, 2), "float32", False),
        ("stem", 3, 20, 7, 23, conv(7, 2), "float16", False),
        ("odd channels", 24, 20, 3, 9, conv(pad=2, dilation=2), "float32", False),
        ("channels filled up", 40, 24, 3, 7, conv(), "float16", False),
        ("80 channels", 80, 80, 3, 20, conv(), "float16", True),
        ("groups", 64, 64, 3, 9, conv(group=2), "float16", False),
        ("depthwise", 40, 40, 3, 9, conv(group=40), "float16", False),
        ("depthwise 5x5", 40, 80, 5, 9, conv(5, 2, group=40), "float32", False),
        ("deep", 512, 64, 3, 3, conv(), "float16", False),
        ("ResNet 3x3", 256, 256, 3, 14, conv(), "float16", True),
        ("ResNet stem", 3, 64, 7, 224, conv(7, 2), "float16", True),
        ("ResNet expand", 64, 256, 1, 56, conv(1), "float16", True),
        ("float32 3x3", 128, 128, 3, 28, conv(), "float32", True),
    ]
    for name, channels, outputs, kernel, extent, attributes, dtype, large in table:
        slid = (extent + 2 * attributes["pads"][0] - attributes["dilations"][0] * (kernel - 1) - 1) // attributes[
            "strides"
        ][0] + 1
        shapes = [
            (2, channels, extent, extent),
            (outputs, channels // attributes["group"], kernel, kernel),
            (outputs, 1, 1),
            (2, outputs, slid, slid),
        ]
        epilogue = HALF_RESIDUAL if dtype == "float16" else RESIDUAL
        yield Case(f"Conv {name}", "Conv", shapes, attributes, epilogue, (1, 2), dtype, large)


def _divided() -> Iterator[Case]:
    silu = "Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; Sigmoid $2 -> float32; Mul $2 $3 -> float32"
    for kernel, sizes in ((1, (24, 24)), (3, (40, 8, 16))):
        shapes = [(2, 40, 6, 7), (sum(sizes), 40, kernel, kernel), (sum(sizes), 1, 1)]
        given = {k: v for k, v in conv(kernel).items() if k not in ZERO_POINTS}
        attributes = {**given, "sizes": sizes, "after": f"{silu}; Cast $4 -> float16"}
        yield Case(f"ParallelConv {kernel}x{kernel}", "ParallelConv", shapes, attributes, "", (1, 2), "float16")


def _products() -> Iterator[Case]:
    transposed = {"transpose_a": 1, "transpose_b": 1, **ZERO_POINTS}
    straight = {"transpose_a": 0, "transpose_b": 0, **ZERO_POINTS}
    for dtype, epilogue in (("float32", RESIDUAL), ("float16", HALF_RESIDUAL)):
        for rows, depth, columns, large in (
            (51, 70, 50, False),
            (1, 512, 96, False),
            (512, 768, 768, True),
            (8, 3072, 768, True),
        ):
            yield Case(
                f"Linear {rows}x{depth}x{columns} {dtype}",
                "Linear",
                [(rows, depth), (depth, columns), (columns,), (rows, columns)],
                ZERO_POINTS,
                epilogue,
                (1, 2),
                dtype,
                large,
            )
        yield Case(f"MatMul {dtype}", "MatMul", [(2, 3, 20, 40), (3, 40, 33)], straight, "", (), dtype)
        yield Case(f"MatMul transposed {dtype}", "MatMul", [(2, 40, 20), (2, 33, 40)], transposed, "", (), dtype)
    for dtype in ("float32", "float16"):
        yield Case(f"ParallelLinear {dtype}", "ParallelLinear", [(3, 17, 70), (70, 88), (88,)], {"sizes": (32, 40, 16)},
                   "", (1, 2), dtype)  # fmt: skip
        gate = HALF_GATE if dtype == "float16" else GATE
        yield Case(f"GatedLinear {dtype}", "GatedLinear", [(3, 17, 70), (70, 88), (88,)], {"after": gate}, "", (1, 2),
                   dtype)  # fmt: skip
    shapes = [(1, 4096, 320), (320, 2560), (2560,)]
    yield Case("GatedLinear U-Net", "GatedLinear", shapes, {"after": HALF_GATE}, "", (1, 2), "float16", True)
    for dtype, epilogue in (("float32", RESIDUAL), ("float16", HALF_RESIDUAL)):
        for kind, whole, rows, depth, columns in (("layer", 0, 17, 200, 88), ("rms", 1, 24, 64, 130)):
            shapes = [(rows, depth), (depth, columns), (columns,), (columns,), (columns,), (rows, columns)]
            attributes = {"inside": epilogue, "kind": kind, "epsilon": 1e-5, "whole": whole}
            yield Case(f"LinearNorm {kind} {dtype}", "LinearNorm", shapes, attributes, "", (1, 2, 3, 4), dtype)
    shapes = [(128, 3072), (3072, 768), (768,), (768,), (768,), (128, 768)]
    attributes = {"inside": HALF_RESIDUAL, "kind": "layer", "epsilon": 1e-12, "whole": 0}
    yield Case("LinearNorm BERT", "LinearNorm", shapes, attributes, "", (1, 2, 3, 4), "float16", True)
    yield Case(
        "Linear int8",
        "Linear",
        [(40, 64), (64, 32)],
        ZERO_POINTS,
        "",
        (1,),
        "int8",
        False,
        lambda rng, index, shape: rng.integers(-9, 9, shape).astype(np.int8),
    )


def _attention() -> Iterator[Case]:
    settings = {"scale": 0.125, "causal": 0, "softcap": 0.0}
    small = [(2, 4, 37, 48), (2, 2, 45, 48), (2, 2, 45, 32)]
    bert = [(2, 12, 128, 64)] * 3
    for dtype in ("float32", "float16"):
        yield Case(f"Attention {dtype}", "Attention", [*small, (2, 1, 1, 45)], settings, "", (), dtype)
        yield Case(f"Attention rows {dtype}", "Attention", [*small, (2, 1, 37, 45)], settings, "", (), dtype)
        yield Case(
            f"Attention causal {dtype}", "Attention", small, {**settings, "causal": 1, "softcap": 5.0}, "", (), dtype
        )
        long = [(1, 2, 20, 24), (1, 1, 300, 24), (1, 1, 300, 24)]
        yield Case(f"Attention of many keys {dtype}", "Attention", long, settings, "", (), dtype)
        unet = [(1, 2, 2048, 40)] * 3
        yield Case(f"Attention of a U-Net {dtype}", "Attention", unet, settings, "", (), dtype, True)
        yield Case(f"Attention of BERT {dtype}", "Attention", [*bert, (2, 1, 1, 128)], settings, "", (), dtype, True)


def _rows() -> Iterator[Case]:
    image, text = (2, 40, 5, 9), (2, 7, 96)
    for kind in ("sum", "mean", "max", "min", "prod", "l1", "l2", "logsumexp", "sumsquare", "argmax", "argmin"):
        axes = (2, 3) if not kind.startswith("arg") else (1,)
        yield Case(
            f"Reduce {kind}", "Reduce", [image], {"kind": kind, "axes": axes, "keepdims": 1, "select_last_index": 0}
        )
    yield Case(
        "Reduce outer", "Reduce", [image], {"kind": "mean", "axes": (0, 2), "keepdims": 0, "select_last_index": 0}
    )
    yield Case(
        "Reduce long", "Reduce", [(3, 9000)], {"kind": "sum", "axes": (1,), "keepdims": 0, "select_last_index": 0}
    )
    for dtype in ("float32", "float16"):
        for axis in (1, 3):
            yield Case(f"Softmax {axis} {dtype}", "Softmax", [image], {"axis": axis, "log": axis % 2}, "", (), dtype)
        yield Case(f"Softmax long {dtype}", "Softmax", [(3, 9000)], {"axis": 1, "log": 0}, "", (), dtype)
        for kind in ("layer", "rms"):
            yield Case(
                f"Norm {kind} {dtype}",
                "Norm",
                [text, (96,), (96,)],
                {"kind": kind, "axis": 2, "groups": 1, "epsilon": 1e-5},
                "",
                (),
                dtype,
            )
        for kind in ("instance", "group"):
            yield Case(
                f"Norm {kind} {dtype}",
                "Norm",
                [image, (40,), (40,)],
                {"kind": kind, "axis": 1, "groups": 8, "epsilon": 1e-5},
                "",
                (),
                dtype,
            )
    group = {"kind": "group", "axis": 1, "groups": 4, "epsilon": 1e-5}
    silu = "Sigmoid %0 -> float32; Mul $0 %0 -> float32; Add $1 %1 -> float32; Mul $2 %2 -> float32"
    for name, shape, large in (("small", (2, 24, 5, 7), False), ("of a U-Net", (2, 320, 64, 64), True)):
        shapes = [shape, (shape[1],), (shape[1],), shape, (shape[1], 1, 1)]
        yield Case(f"Norm groups and SiLU, {name}", "Norm", shapes, group, silu, large=large)
    yield Case("Norm long", "Norm", [(2, 9000)], {"kind": "layer", "axis": 1, "groups": 1, "epsilon": 1e-5})


POINTWISE = (
    "Add %0 %1 -> float32; Sigmoid $0 -> float32; Mul $0 $1 -> float32",
    "Mul %0 %1 -> float32; Gelu $0 -> float32",
    "Mul %0 %1 -> float32; GeluTanh $0 -> float32; Cast $1 -> float16",
    "Add %0 1.5 -> float32; Tanh $0 -> float32",
    "Max %0 %1 -> float32; Clip $0 0.0 6 -> float32; Sqrt $1 -> float32",
    "Less %0 %1 -> bool; Not $0 -> bool",
    "Abs %0 -> float32; Log $0 -> float32; Floor $1 -> float32",
    "Div %0 %1 -> float32; Round $0 -> float32; Cast $1 -> int32",
    "Mod %0 %1 -> float32; Softplus $0 -> float32; HardSwish $1 -> float32",
    "Sin %0 -> float32; Cos $0 -> float32; Neg $1 -> float32",
    "Elu:alpha=0.5 %0 -> float32; LeakyRelu:alpha=0.1 $0 -> float32; Sign $1 -> float32",
    "Exp %0 -> float32; Reciprocal $0 -> float32",
    "Quantize %0 0.05 3 -> int8",
    "Abs %0 -> float32; Pow $0 1.5 -> float32; Erf $1 -> float32",
)


def _elements() -> Iterator[Case]:
    image = (2, 70, 9, 13)
    for number, expression in enumerate(POINTWISE):
        count = 2 if "%1" in expression else 1
        yield Case(f"Pointwise {number}", "Pointwise", [(2, 5, 7, 3), (5, 1, 1)][:count], {}, expression)
    for perm in ((0, 2, 3, 1), (0, 3, 1, 2), (0, 2, 1, 3), (3, 2, 1, 0)):
        yield Case(f"Transpose {perm}", "Transpose", [image], {"perm": perm}, dtype="float16")
    for source, target in (("plain", "channels_last"), ("channels_last", "plain")):
        yield Case(
            f"Reorder {target}", "Reorder", [image], {"layout_from": source, "layout_to": target}, dtype="float16"
        )
    yield Case("Expand", "Expand", [(1, 70, 1, 13)], {"shape": image})
    yield Case("Tile", "Tile", [(2, 5, 3)], {"repeats": (2, 1, 3)})
    yield Case(
        "Slice",
        "Slice",
        [image],
        {"starts": (1, 69, 0, 2), "steps": (1, -2, 1, 3), "sizes": (1, 30, 9, 3)},
        dtype="float16",
    )
    yield Case("Concat channels", "Concat", [image, (2, 3, 9, 13)], {"axis": 1}, dtype="float16")
    yield Case("Concat last", "Concat", [image, image], {"axis": 3})
    yield Case("Split", "Split", [image], {"axis": 1, "sizes": (30, 40)}, dtype="float16")
    yield Case("Concat of one and many", "Concat", [(2, 1, 40), (2, 7, 40), (2, 300, 40)], {"axis": 1})
    for mode in ("constant", "reflect", "edge", "wrap"):
        yield Case(
            f"Pad {mode}",
            "Pad",
            [image],
            {"pads": (0, 0, 1, 2, 0, 3, 0, 4), "mode": mode, "value": 1.5 if mode == "constant" else 0},
        )
    yield Case(
        "Gather",
        "Gather",
        [(30, 24), (3, 4)],
        {"axis": 0},
        "",
        (),
        "float16",
        False,
        lambda rng, index, shape: rng.integers(-30, 30, shape) if index else rng.standard_normal(shape),
    )
    for mode, coordinate, sizes, dtype in (
        ("nearest", "asymmetric", (2, 6, 20, 22), "float16"),
        ("linear", "half_pixel", (2, 6, 25, 7), "float16"),
        ("cubic", "align_corners", (2, 6, 13, 11), "float32"),
    ):
        settings = {"sizes": sizes, "mode": mode, "coordinate": coordinate}
        yield Case(f"Resize {mode}", "Resize", [(2, 6, 10, 11)], settings, dtype=dtype)


def _pools() -> Iterator[Case]:
    pool = {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (1, 1), "p": 2, "indices": 0}
    for kind in ("max", "average", "lp"):
        yield Case(
            f"Pool {kind}", "Pool", [(2, 6, 10, 11)], {"kind": kind, "count_include_pad": 0, **pool}, dtype="float16"
        )
    for dtype in ("float32", "bfloat16"):
        yield Case(f"Pool max {dtype}", "Pool", [(2, 6, 10, 11)], {"kind": "max", "count_include_pad": 0, **pool},
                   dtype=dtype)  # fmt: skip
    apart = {"kind": "max", "count_include_pad": 0, **pool, "pads": (3, 1, 0, 2), "dilations": (1, 2)}
    yield Case("Pool max, windows with nothing inside", "Pool", [(2, 6, 10, 11)], apart, dtype="float16")
    yield Case("Pool max of what is no number", "Pool", [(2, 6, 10, 11)], apart, dtype="float16",
               draw=lambda rng, index, shape: np.where(rng.random(shape) < 0.1, np.nan, rng.random(shape)))  # fmt: skip


CASES = (*_elements(), *_pools(), *_rows(), *_products(), *_convolutions(), *_divided(), *_attention(), *PLACES,
         *PROJECTIONS, *MIXTURES)  # fmt: skip
