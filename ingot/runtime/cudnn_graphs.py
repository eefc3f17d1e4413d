"""What Ingot asks cuDNN for: convolutions with what follows them, and attention, drawn with its frontend's graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

_TYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BFLOAT16", "int8": "INT8"}  # of cudnn.data_type
X, WEIGHT, SCALE, BIAS, VECTOR, RESIDUAL, QUERY, KEY, VALUE, MASK = range(1, 11)  # names of the graphs' tensors
RESULT = 20
Kinds = Mapping[str, Any]


@dataclass(frozen=True)
class Convolution:
    """y[N, *, O] = activation(scale[O] · conv(x[N, H, W, C], weight[O, *, C / group]) + bias[O] + vector[O] +
    residual[N, *, O]), channels last.

    `shape` is N, C, H, W of x, `filter` O, C / group and the kernel's sizes. Scale, bias, the vector that a run gives
    and the residual are there where `scaled`, `bias`, `vector` and `residual` say so; scale and bias have the type
    `vectors`, the others that of the results. Addresses are taken in this order, then the workspace and y.
    """

    factors: str
    vectors: str
    results: str
    shape: tuple[int, ...]
    filter: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    scaled: bool
    bias: bool
    activation: str = ""
    vector: bool = False
    residual: bool = False

    @property
    def tensors(self) -> tuple[int, ...]:
        """Names of what it reads."""
        added = [BIAS] * self.bias + [VECTOR] * self.vector + [RESIDUAL] * self.residual
        return (X, WEIGHT, *[SCALE] * self.scaled, *added)

    @property
    def compiled(self) -> bool:
        """Whether cuDNN compiles a kernel of its own for it."""
        return self.vector or self.residual or self.activation == "Silu"


@dataclass(frozen=True)
class Attention:
    """y = softmax(scale · query keyᵀ + mask) value, each [batch, heads, positions, depth] with strides of its own;
    `causal`: a query sees no key after its position. Addresses: query, key, value, mask (where it has strides), then
    the workspace and y."""

    dtype: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    result: tuple[int, ...]
    query_strides: tuple[int, ...]
    key_strides: tuple[int, ...]
    value_strides: tuple[int, ...]
    result_strides: tuple[int, ...]
    scale: float
    causal: bool = False
    mask: tuple[int, ...] = ()
    mask_strides: tuple[int, ...] = ()

    @property
    def tensors(self) -> tuple[int, ...]:
        """Names of what it reads."""
        return (QUERY, KEY, VALUE, *[MASK] * bool(self.mask))

    @property
    def compiled(self) -> bool:
        """It always is."""
        return True


Wanted = Convolution | Attention


def _tensor(graph: Any, uid: int, shape: Sequence[int], strides: Sequence[int], dtype: Any) -> Any:
    return graph.tensor(dim=list(shape), stride=list(strides), data_type=dtype, uid=uid, name=f"tensor{uid}")


def _draw_convolution(cudnn: Any, graph: Any, wanted: Convolution, kinds: Kinds) -> None:
    def tensor(uid: int, shape: Sequence[int], dtype: str) -> Any:
        _, channels, height, width = shape
        strides = (channels * height * width, 1, width * channels, channels)
        return _tensor(graph, uid, shape, strides, kinds[dtype])

    x, weight = tensor(X, wanted.shape, wanted.factors), tensor(WEIGHT, wanted.filter, wanted.factors)
    exact = cudnn.data_type.INT32 if wanted.factors == "int8" else cudnn.data_type.FLOAT
    half = len(wanted.pads) // 2
    y = graph.conv_fprop(x, weight, pre_padding=list(wanted.pads[:half]), post_padding=list(wanted.pads[half:]),
                         stride=list(wanted.strides), dilation=list(wanted.dilations),
                         compute_data_type=exact)  # fmt: skip
    if wanted.factors == "int8":
        y.set_data_type(exact)
    vector = (1, wanted.filter[0], 1, 1)
    if wanted.scaled:
        y = graph.mul(y, tensor(SCALE, vector, wanted.vectors))
    if wanted.bias:
        y = graph.add(y, tensor(BIAS, vector, wanted.vectors))
    if wanted.vector:
        y = graph.add(y, tensor(VECTOR, vector, wanted.results))
    if wanted.residual:
        y = graph.add(y, tensor(RESIDUAL, _positions(wanted), wanted.results))
    y = {"": lambda y: y, "Relu": graph.relu, "Silu": graph.swish}[wanted.activation](y)
    y.set_output(True).set_data_type(kinds[wanted.results]).set_uid(RESULT)


def _positions(wanted: Convolution) -> tuple[int, ...]:
    """The result's shape."""
    begins, ends = wanted.pads[: len(wanted.strides)], wanted.pads[len(wanted.strides) :]
    spans = (d * (k - 1) + 1 for d, k in zip(wanted.dilations, wanted.filter[2:], strict=True))
    rest = zip(wanted.shape[2:], begins, ends, spans, wanted.strides, strict=True)
    return (wanted.shape[0], wanted.filter[0], *((n + b + e - span) // s + 1 for n, b, e, span, s in rest))


def _draw_attention(cudnn: Any, graph: Any, wanted: Attention, kinds: Kinds) -> None:
    kind = kinds[wanted.dtype]
    query, key, value = (
        _tensor(graph, uid, shape, strides, kind)
        for uid, shape, strides in ((QUERY, wanted.query, wanted.query_strides), (KEY, wanted.key, wanted.key_strides),
                                    (VALUE, wanted.value, wanted.value_strides))
    )  # fmt: skip
    masked = {"bias": _tensor(graph, MASK, wanted.mask, wanted.mask_strides, kind)} if wanted.mask else {}
    y, _ = graph.sdpa(q=query, k=key, v=value, generate_stats=False, attn_scale=wanted.scale,
                      use_causal_mask=wanted.causal, name="attention", **masked)  # fmt: skip
    y.set_output(True).set_dim(list(wanted.result)).set_stride(list(wanted.result_strides))
    y.set_data_type(kind).set_uid(RESULT)


_DRAWINGS: Mapping[type[Any], Callable[[Any, Any, Any, Kinds], None]] = {
    Convolution: _draw_convolution, Attention: _draw_attention,
}  # fmt: skip


def draw(cudnn: Any, wanted: Wanted, handle: Any) -> Any:
    """The frontend's graph of what is wanted."""
    kinds = {name: getattr(cudnn.data_type, kind) for name, kind in _TYPES.items()}
    io = kinds[wanted.factors if isinstance(wanted, Convolution) else wanted.dtype]
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=cudnn.data_type.FLOAT,
                          compute_data_type=cudnn.data_type.FLOAT, handle=handle)  # fmt: skip
    _DRAWINGS[type(wanted)](cudnn, graph, wanted, kinds)
    return graph


def recipe_of(wanted: Wanted, version: int) -> dict[str, Any]:
    """What an engine keeps beside a plan's bytes: what it computes, and which cuDNN takes it."""
    return {"graph": type(wanted).__name__, **asdict(wanted), "version": version}


def wanted_of(recipe: Mapping[str, Any]) -> Wanted:
    """What a recipe describes."""
    kind = next(k for k in _DRAWINGS if k.__name__ == recipe["graph"])
    made: Wanted = kind(**{f.name: recipe[f.name] for f in fields(kind)})
    return made
