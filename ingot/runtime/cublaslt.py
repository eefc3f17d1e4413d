"""cuBLASLt through nvmath-python: products with bias, activation and residual in one call, by a chosen algorithm.

Matrices here are row-major; cuBLASLt's are column-major, so that what it computes is the transposed product:
resultᵀ[columns, rows] = weight[columns, depth] · x[rows, depth]ᵀ.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from ingot.errors import LibraryUnusable
from ingot.plan.extent import Extent, evaluate
from ingot.runtime import cuda

WORKSPACE = 32 << 20  # bytes an algorithm may ask for: what cuBLAS recommends for sm_90
_ALIGNED = 16  # bytes: what addresses are multiples of at least
_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14, "float8_e4m3fn": 28}  # of cudaDataType_t
_SUM_IN_FLOAT32 = 68  # of cublasComputeType_t
_ACTIVATIONS = {"": 1, "Relu": 2, "GeluTanh": 32}  # of cublasLtEpilogue_t
_BIAS = 4
_NO_EPILOGUE = 1
_ASKED = 32  # proposals among which an algorithm is looked for
_SOMEWHERE = 1 << 12  # an address while algorithms are looked for: that there is one decides which there are


@dataclass(frozen=True)
class Product:
    """outputs[i] = activation(scale · x[rows, depth] · weight[i, columns, depth]ᵀ + bias[i, columns] + residual).

    `factors` is the type of x and the weights, `results` that of the outputs, `others` of bias and residual. `count`
    outputs lie in places of their own, their weights and biases one after the other. `rescaled`: the results are
    multiplied by a float32 in the end. `fast`: sums of float8 stay in the tensor units, which add with 14 bits.
    Addresses are taken in the order x, weight, that number, bias, residual (where
    there are such), workspace, outputs.
    """

    factors: str
    results: str
    others: str
    rows: Extent
    columns: int
    depth: int
    count: int = 1
    scale: float = 1.0
    activation: str = ""
    bias: bool = False
    residual: bool = False
    rescaled: bool = False
    fast: bool = False

    @classmethod
    def of(cls, recipe: Mapping[str, Any], symbols: Mapping[str, int]) -> Product:
        """What a plan's recipe describes, at these sizes."""
        product = cls(**{name: recipe[name] for name in cls.__dataclass_fields__ if name in recipe})
        return replace(product, rows=evaluate(product.rows, symbols))


@dataclass(frozen=True)
class Algorithm:
    """One of cuBLASLt's ways: its 64 bytes, good for one version of the library, and the workspace it wants."""

    version: int
    workspace: int
    code: str

    def __str__(self) -> str:
        return f"{self.version}-{self.workspace}-{self.code}"

    @classmethod
    def parse(cls, text: str) -> Algorithm:
        """Of "130100-0-2a…"."""
        version, workspace, code = text.split("-")
        return cls(int(version), int(workspace), code)


def recipe_of(product: Product, algorithm: Algorithm) -> dict[str, Any]:
    """What a plan keeps."""
    return {**asdict(product), "algorithm": str(algorithm)}


def _library() -> Any:
    """The bindings; tests put their own in its place."""
    from nvmath.bindings import cublasLt

    return cublasLt


@cache
def _open(ordinal: int) -> tuple[Any, int]:
    """The bindings and a handle for the device, whose context is the thread's; for the life of the process."""
    try:
        lt = _library()
        return lt, int(lt.create())
    except (ImportError, RuntimeError) as error:  # the second: bindings without the library itself
        words = " ".join(str(error).split())
        raise LibraryUnusable(f"cuBLASLt is not here ({words}): pip install 'ingot[cuda-libraries]'") from None


class Matmul:
    """A product on a device, described to cuBLASLt."""

    def __init__(self, context: cuda.Context, product: Product) -> None:
        context.activate()
        self.product = product
        self._lt, self._handle = _open(context.device.ordinal)
        self._numbers = np.array([product.scale, float(product.residual)], np.float32)
        lt = self._lt
        self._description = lt.matmul_desc_create(_SUM_IN_FLOAT32, _TYPES["float32"])
        self._set_description()
        depth, rows, columns = product.depth, product.rows, product.columns
        shapes = ((product.factors, depth, columns), (product.factors, depth, rows), (product.others, columns, rows),
                  (product.results, columns, rows))  # fmt: skip
        self._layouts = [lt.matrix_layout_create(_TYPES[dtype], high, wide, high) for dtype, high, wide in shapes]
        weakref.finalize(self, _destroy, lt, self._description, self._layouts)

    def _set_description(self) -> None:
        attribute, product = self._lt.MatmulDescAttribute, self.product
        self._set(attribute.TRANSA, 1, np.int32)
        epilogue = _ACTIVATIONS[product.activation] | (_BIAS * product.bias)
        if epilogue != _NO_EPILOGUE:
            epilogue &= ~_NO_EPILOGUE
        self._set(attribute.EPILOGUE, epilogue, np.int32)
        if product.bias:
            self._set(attribute.BIAS_DATA_TYPE, _TYPES[product.others], np.int32)
            self._set(attribute.BIAS_POINTER, _SOMEWHERE, np.uint64)
        if product.rescaled:
            self._set(attribute.D_SCALE_POINTER, _SOMEWHERE, np.uint64)
        if product.fast:
            self._set(attribute.FAST_ACCUM, 1, np.int8)

    def _set(self, attribute: int, number: int, kind: type[np.generic]) -> None:
        held = np.array([number], kind)
        self._lt.matmul_desc_set_attribute(self._description, int(attribute), held.ctypes.data, held.nbytes)

    def algorithms(self, most: int) -> list[Algorithm]:
        """What cuBLASLt proposes, best first: where there is no workspace, as that is cleared in a launch of its own,
        and graphs with many of those take long to launch; then with one."""
        return list(dict.fromkeys((*self._proposed(most, 0), *self._proposed(most, WORKSPACE))))

    def _proposed(self, most: int, workspace: int) -> list[Algorithm]:
        """Proposals that take so many bytes at most; none where it has no way."""
        lt, found = self._lt, self._lt.MatmulHeuristicResult(most)
        count = np.zeros(1, np.int32)
        with _preference(lt, workspace) as preference:
            try:
                lt.matmul_algo_get_heuristic(*self._described(), preference, most, found.ptr, count.ctypes.data)
            except lt.cuBLASLtError:
                return []
        version = int(lt.get_version())
        results = _structures(lt, found, int(count[0]))
        return [Algorithm(version, size, code.hex()) for code, size, state in results if state == 0]

    def _described(self) -> tuple[int, ...]:
        return (self._handle, self._description, *self._layouts)

    def accepts(self, algorithm: Algorithm) -> str:
        """Why the algorithm cannot be used here; empty when it can."""
        lt = self._lt
        if int(lt.get_version()) != algorithm.version:
            return f"it was chosen with cuBLASLt {algorithm.version}, here is {int(lt.get_version())}"
        checked = lt.MatmulHeuristicResult(1)
        code = self._code(algorithm)
        try:
            lt.matmul_algo_check(*self._described(), code.ctypes.data, checked.ptr)
        except lt.cuBLASLtError as error:
            return f"cuBLASLt refuses its algorithm ({error})"
        ((_, size, _),) = _structures(lt, checked, 1)
        if size <= algorithm.workspace or algorithm in self._proposed(_ASKED, algorithm.workspace):
            return ""  # some want one, and do without
        return f"cuBLASLt wants {size} bytes for it, not {algorithm.workspace}"

    @staticmethod
    def _code(algorithm: Algorithm) -> Any:
        return np.frombuffer(bytes.fromhex(algorithm.code), np.uint8).copy()

    def run(self, algorithm: Algorithm, addresses: Sequence[int], stream: Any) -> None:
        """Put it on the stream."""
        product, code = self.product, self._code(algorithm)
        left = iter(addresses)
        x, weight = next(left), next(left)
        if product.rescaled:
            self._set(self._lt.MatmulDescAttribute.D_SCALE_POINTER, next(left), np.uint64)
        bias, residual = next(left) if product.bias else 0, next(left) if product.residual else 0
        workspace, *outputs = left
        weights, x_layout, others, results = self._layouts
        scale, keep = self._numbers.ctypes.data, self._numbers.ctypes.data + self._numbers.itemsize
        unread = x if product.others != product.results else 0  # where nothing is added; in place, types must be equal
        for number, output in enumerate(outputs):
            if product.bias:
                at = bias + number * product.columns * _size(product.others)
                self._set(self._lt.MatmulDescAttribute.BIAS_POINTER, at, np.uint64)
            part = weight + number * product.columns * product.depth * _size(product.factors)
            self._call(
                scale, part, weights, x, x_layout, keep, residual or unread or output, others, output, results,
                code.ctypes.data, workspace, algorithm.workspace, int(stream),
            )  # fmt: skip

    def _call(self, *arguments: int) -> None:
        try:
            self._lt.matmul(self._handle, self._description, *arguments)
        except self._lt.cuBLASLtError as error:
            raise LibraryUnusable(
                f"cuBLASLt failed on {self.product} ({error}): build with --tacticSources=-CUBLAS_LT"
            ) from None


def _size(dtype: str) -> int:
    return {"float32": 4, "float8_e4m3fn": 1}.get(dtype, 2)


def _structures(lt: Any, found: Any, count: int) -> Iterator[tuple[bytes, int, int]]:
    """(algorithm, workspace, status) of cublasLtMatmulHeuristicResult_t's."""
    kind = np.dtype(lt.matmul_heuristic_result_dtype)
    for one in np.frombuffer(ctypes.string_at(found.ptr, count * kind.itemsize), kind):
        yield one["algo"].tobytes(), int(one["workspace_size"]), int(one["state"])


@contextmanager
def _preference(lt: Any, workspace: int) -> Iterator[int]:
    """A description of what algorithms may use, while it is needed."""
    preference, attribute = lt.matmul_preference_create(), lt.MatmulPreferenceAttribute
    wanted = [(attribute.MAX_WORKSPACE_BYTES, np.array([workspace], np.uint64))]
    wanted += [(getattr(attribute, f"MIN_ALIGNMENT_{side}_BYTES"), np.array([_ALIGNED], np.uint32)) for side in "ABCD"]
    for name, held in wanted:
        lt.matmul_preference_set_attribute(preference, int(name), held.ctypes.data, held.nbytes)
    yield preference
    lt.matmul_preference_destroy(preference)


def _destroy(lt: Any, description: int, layouts: Sequence[int]) -> None:
    lt.matmul_desc_destroy(description)
    for layout in layouts:
        lt.matrix_layout_destroy(layout)


def prepare(
    context: cuda.Context, recipe: Mapping[str, Any], symbols: Mapping[str, int], code: bytes = b""
) -> Callable[..., None]:
    """What puts the recipe's product on a stream: (addresses, stream) -> None. LibraryUnusable when it cannot be."""
    matmul, algorithm = Matmul(context, Product.of(recipe, symbols)), Algorithm.parse(recipe["algorithm"])
    if refusal := matmul.accepts(algorithm):
        raise LibraryUnusable(refusal)
    return partial(matmul.run, algorithm)
