"""Cases of what reads places from tensors, searches, runs along an axis, or steps through time; of products that no
tile takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.kernels.cuda.case import Array, Case

ZERO_POINTS = {"x_zero_point": 0, "weight_zero_point": 0}
BIASED = "Add %0 %1 -> float32; Relu $0 -> float32"
REQUANTISED = "Cast %0 -> float32; Mul $0 0.002 -> float32; Quantize $1 0.05 3 -> uint8"


def indices_within(*sizes: int, position: int = 1, distinct: bool = False) -> Callable[..., Array]:
    """Draws numbers, and at `position` indices: the last axis has one of each size, negative ones too."""

    def draw(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
        if index != position:
            return rng.standard_normal(shape)
        if distinct:  # along the first axis
            columns = [rng.permutation(sizes[0])[: shape[0]] for _ in range(int(np.prod(shape[1:])))]
            return np.stack(columns, -1).reshape(shape) - sizes[0] * rng.integers(0, 2, shape)
        limits = np.array(sizes)
        return rng.integers(-limits, limits, (*shape[:-1], len(sizes)) if len(sizes) > 1 else shape)

    return draw


def _places() -> Iterator[Case]:
    data = (7, 5, 9)
    for axis, dtype in ((0, "float32"), (2, "float16")):
        yield Case(f"GatherElements {axis}", "GatherElements", [data, (4, 5, 6)], {"axis": axis}, dtype=dtype,
                   draw=indices_within(data[axis]))  # fmt: skip
    yield Case("GatherND", "GatherND", [(4, 5, 6), (3, 2, 2)], {"batch_dims": 0}, draw=indices_within(4, 5))
    yield Case("GatherND batch", "GatherND", [(4, 5, 6), (4, 3, 1)], {"batch_dims": 1}, draw=indices_within(5))
    yield Case("GatherND elements", "GatherND", [(4, 5), (11, 2)], {"batch_dims": 0}, dtype="float16",
               draw=indices_within(4, 5))  # fmt: skip
    yield Case("ScatterElements", "ScatterElements", [(7, 5), (4, 5), (4, 5)], {"axis": 0, "reduction": "none"},
               draw=indices_within(7, distinct=True))  # fmt: skip
    for reduction in ("add", "mul", "max", "min"):
        yield Case(f"ScatterElements {reduction}", "ScatterElements", [(4, 9, 3), (4, 12, 2), (4, 12, 2)],
                   {"axis": 1, "reduction": reduction}, draw=indices_within(9),
                   dtype="float16" if reduction == "max" else "float32")  # fmt: skip
        yield Case(f"ScatterND {reduction}", "ScatterND", [(4, 5, 6), (9, 2), (9, 6)], {"reduction": reduction},
                   draw=indices_within(4, 5))  # fmt: skip
    yield Case("ScatterND", "ScatterND", [(9, 6), (5, 1), (5, 6)], {"reduction": "none"},
               draw=indices_within(9, distinct=True))  # fmt: skip


def _coarse(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
    """Many equal ones, and some that are no number."""
    x = rng.integers(-9, 9, shape).astype(np.float32)
    x[rng.random(shape) < 0.02] = np.nan
    return x


def _searches() -> Iterator[Case]:
    for largest in (0, 1):
        yield Case(f"TopK {largest}", "TopK", [(3, 150)], {"k": 7, "axis": 1, "largest": largest, "sorted": 1},
                   draw=_coarse)  # fmt: skip
    yield Case("TopK middle", "TopK", [(2, 9, 5)], {"k": 4, "axis": 1, "largest": 1, "sorted": 1}, dtype="float16")
    yield Case("TopK integers", "TopK", [(4, 33)], {"k": 33, "axis": 1, "largest": 0, "sorted": 1}, dtype="int64",
               draw=lambda rng, index, shape: rng.integers(-9, 9, shape))  # fmt: skip
    yield Case("TopK of a vocabulary", "TopK", [(8, 32000)], {"k": 50, "axis": 1, "largest": 1, "sorted": 1},
               large=True)  # fmt: skip
    for kind in ("sum", "prod"):
        for exclusive, reverse in ((0, 0), (1, 0), (0, 1), (1, 1)):
            yield Case(f"CumSum {kind} {exclusive}{reverse}", "CumSum", [(3, 21, 4)],
                       {"axis": 1, "exclusive": exclusive, "reverse": reverse, "kind": kind},
                       dtype="float16" if exclusive < reverse else "float32")  # fmt: skip
    yield Case("CumSum long", "CumSum", [(2, 3000)], {"axis": 1, "exclusive": 1, "reverse": 0, "kind": "sum"},
               dtype="int64", draw=lambda rng, index, shape: rng.integers(-9, 9, shape))  # fmt: skip
    yield Case("Range", "Range", [], {"start": 3, "step": -2, "size": 300, "dtype": "int64"})
    yield Case("Range floats", "Range", [], {"start": 0, "step": 1, "size": 5, "dtype": "float32"})


_ACTIVATIONS = {"rnn": ("Tanh",), "gru": ("Sigmoid", "Tanh"), "lstm": ("Sigmoid", "Tanh", "Tanh")}
_GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def recurrent(name: str, kind: str, direction: str = "forward", sizes: tuple[int, int, int, int] = (5, 3, 12, 20),
              given: str = "b", dtype: str = "float32", **settings: Any) -> Case:  # fmt: skip
    """Steps, batch, inputs and hidden units; `given`: b(ias), l(engths), s(tates), p(eepholes)."""
    (steps, batch, inputs, hidden), gates = sizes, _GATES[kind]
    directions = 2 if direction == "bidirectional" else 1
    names = _ACTIVATIONS[kind] * directions
    state = (directions, batch, hidden)
    shapes = [
        (steps, batch, inputs), (directions, gates * hidden, inputs), (directions, gates * hidden, hidden),
        (directions, 2 * gates * hidden) if "b" in given else None, (batch,) if "l" in given else None,
        state if "s" in given else None, state if "s" in given and kind == "lstm" else None,
        (directions, 3 * hidden) if "p" in given else None,
    ]  # fmt: skip
    attributes = {
        "kind": kind, "direction": direction, "hidden": hidden, "activations": names, "alphas": (0.0,) * len(names),
        "betas": (0.0,) * len(names), "clip": float("inf"), "linear_before_reset": 0, "input_forget": 0, **settings,
    }  # fmt: skip

    def draw(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
        if index == 4:
            return np.arange(1, batch + 1).astype(np.int32) * steps // batch
        return rng.standard_normal(shape) * (0.3 if index in (1, 2) else 1.0)

    return Case(f"RNN {name}", "RNN", shapes, attributes, "", (), dtype, False, draw)


def _steps() -> Iterator[Case]:
    yield recurrent("plain", "rnn", "reverse", clip=0.7)
    yield recurrent("gru", "gru", given="bls")
    yield recurrent("gru linear", "gru", "bidirectional", given="bs", linear_before_reset=1)
    yield recurrent("gru bidirectional", "gru", "bidirectional", given="bl", dtype="float16")
    yield recurrent("lstm", "lstm", given="")
    yield recurrent("lstm all", "lstm", "bidirectional", (4, 18, 7, 33), "blsp", clip=2.0)
    yield recurrent("lstm coupled", "lstm", "reverse", given="bl", input_forget=1, dtype="float16")


def _transposed() -> Iterator[Case]:
    table = [  # name, channels, outputs a group, kernel, stride, pads, dilation, group, dtype
        ("2x2", 20, 12, 2, 2, 0, 1, 1, "float16"), ("4x4", 32, 40, 4, 2, 1, 1, 1, "float32"),
        ("gaps", 8, 5, 2, 3, 0, 1, 1, "float32"), ("groups", 12, 3, 3, 2, 1, 2, 2, "float32"),
        ("U-Net", 128, 64, 2, 2, 0, 1, 1, "float16"),
    ]  # fmt: skip
    for name, channels, outputs, kernel, stride, pad, dilation, group, dtype in table:
        attributes = {"strides": (stride,) * 2, "pads": (pad,) * 4, "dilations": (dilation,) * 2, "group": group,
                      "output_padding": (1 if name == "4x4" else 0,) * 2}  # fmt: skip
        large, extent = name == "U-Net", 64 if name == "U-Net" else 5
        shapes = [(2, channels, extent, extent), (channels, outputs, kernel, kernel), (outputs * group, 1, 1)]
        epilogue = BIASED if dtype == "float32" else ("Cast %0 -> float32; Cast %1 -> float32; Add $0 $1 -> float32; "
                                                      "Relu $2 -> float32; Cast $3 -> float16")  # fmt: skip
        constants = (2,) if name == "gaps" else (1, 2)
        yield Case(f"ConvTranspose {name}", "ConvTranspose", shapes, attributes, epilogue, constants, dtype, large)
    line = {"strides": (2,), "pads": (1, 0), "dilations": (1,), "group": 1, "output_padding": (0,)}
    yield Case("ConvTranspose 1d", "ConvTranspose", [(2, 6, 9), (6, 4, 3)], line, "", (1,))


def _bytes(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
    return rng.integers(0, 256, shape).astype(np.uint8)


def _signed(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
    return rng.integers(-128, 128, shape).astype(np.int8)


def _direct() -> Iterator[Case]:
    def conv(rank: int, group: int = 1, **zeros: int) -> dict[str, Any]:
        return {"strides": (2,) * rank, "pads": (1,) * 2 * rank, "dilations": (1,) * rank, "group": group,
                **ZERO_POINTS, **zeros}  # fmt: skip

    for channels, outputs, kernel in ((64, 40, 3), (3, 20, 7)):
        shapes = [(2, channels, 9, 9), (outputs, channels, kernel, kernel)]
        yield Case(f"Conv int8 {kernel}x{kernel}", "Conv", shapes, conv(2), "", (1,), "int8", draw=_signed)
    zeros = {"x_zero_point": 120, "weight_zero_point": 131}
    yield Case("Conv bytes", "Conv", [(2, 6, 7, 7), (10, 6, 3, 3)], conv(2, **zeros), REQUANTISED, (1,), "uint8",
               draw=_bytes)  # fmt: skip
    yield Case("Conv bytes depthwise", "Conv", [(1, 8, 7, 7), (16, 1, 3, 3)], conv(2, 8, **zeros), REQUANTISED, (1,),
               "uint8", draw=_bytes)  # fmt: skip
    yield Case("Conv that varies", "Conv", [(2, 6, 7, 7), (10, 3, 3, 3), (10, 1, 1)], conv(2, 2), BIASED)
    yield Case("Conv of doubles", "Conv", [(1, 4, 7, 5, 6), (3, 4, 3, 3, 3)], conv(3), "", (1,), "float64")
    yield Case("Linear tiny", "Linear", [(5, 3), (3, 4), (4,)], ZERO_POINTS, BIASED, (1, 2))
    yield Case("Linear bytes", "Linear", [(5, 70), (70, 6)], {**ZERO_POINTS, **zeros}, REQUANTISED, (1,), "uint8",
               draw=_bytes)  # fmt: skip
    turned = {"transpose_a": 1, "transpose_b": 1, **ZERO_POINTS}
    yield Case("MatMul tiny", "MatMul", [(2, 3, 7, 4), (3, 5, 7)], turned)
    yield Case("MatMul of doubles", "MatMul", [(6, 40), (40, 9)], {**turned, "transpose_a": 0, "transpose_b": 0}, "",
               (), "float64")  # fmt: skip


def _integers() -> Iterator[Case]:
    """What else there is for integers, and outputs and modes that are rare."""
    rows = {"axes": (1, 3), "keepdims": 1, "select_last_index": 0}
    mean = "Cast %0 -> float32; Mul $0 0.01 -> float32; Quantize $1 0.5 2 -> uint8"
    yield Case("Reduce bytes", "Reduce", [(2, 7, 5, 9)], {"kind": "sum", **rows}, mean, (), "uint8", draw=_bytes)
    for kind in ("max", "min"):
        yield Case(f"Reduce bytes {kind}", "Reduce", [(2, 7, 5, 9)], {"kind": kind, **rows}, draw=_bytes)
        yield Case(f"Reduce flags {kind}", "Reduce", [(2, 3, 5, 2)], {"kind": kind, **rows},
                   draw=lambda rng, index, shape: rng.random(shape) < 0.5)  # fmt: skip
    pool = {"kind": "max", "kernel": (3, 2), "strides": (2, 1), "pads": (1, 0, 1, 1), "dilations": (1, 2), "p": 2,
            "count_include_pad": 0}  # fmt: skip
    yield Case("Pool places", "Pool", [(2, 3, 8, 9)], {**pool, "indices": 1}, draw=_coarse_numbers)
    yield Case("Pool bytes", "Pool", [(2, 3, 8, 9)], {**pool, "indices": 0}, draw=_bytes)
    yield Case("Pointwise integers", "Pointwise", [(4, 5), (5,)], {}, "Pow %0 %1 -> int64",
               draw=lambda rng, index, shape: rng.integers(0, 6, shape))  # fmt: skip
    yield Case("Pointwise of a number", "Pointwise", [(), ()], {}, "Mod:fmod=0 %0 %1 -> float32")
    yield Case("Reduce everything", "Reduce", [(2, 7, 5)], {"kind": "mean", **rows, "axes": (0, 1, 2)})
    whole = {"kind": "layer", "axis": 0, "groups": 1, "epsilon": 1e-5}
    yield Case("Norm of everything", "Norm", [(2, 7, 5), (2, 7, 5), (2, 7, 5)], whole)
    yield Case("CumSum of a line", "CumSum", [(9,)], {"axis": 0, "exclusive": 1, "reverse": 1, "kind": "sum"})
    cut = {"sizes": (1, 2, 5, 6), "mode": "linear", "coordinate": "tf_crop_and_resize", "extrapolation": 7.0,
           "roi": (0.0, 0.0, -0.2, 0.3, 1.0, 1.0, 0.9, 1.4)}  # fmt: skip
    yield Case("Resize outside", "Resize", [(1, 2, 9, 8)], cut)


def _coarse_numbers(rng: np.random.Generator, index: int, shape: tuple[int, ...]) -> Array:
    return rng.integers(-3, 3, shape).astype(np.float32)


PLACES = (*_places(), *_searches(), *_steps(), *_transposed(), *_direct(), *_integers())
