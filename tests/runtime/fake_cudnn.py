"""cuDNN's frontend without a GPU: graphs of one convolution, computed by its numpy meaning in the fake driver's memory.

`FakeCudnn` has of the module `cudnn` what Ingot calls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from ingot.ir.ops import meaning
from ingot.runtime.cudnn_graphs import BIAS, RESIDUAL, RESULT, SCALE, VECTOR, WEIGHT, X
from tests.runtime.fake_cublaslt import at
from tests.runtime.fake_cuda import FakeDriver

_KINDS = ("FLOAT", "HALF", "BFLOAT16", "INT8", "INT32")
_NUMPY = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8"}


class Unsupported(Exception):
    """What the frontend raises."""


@dataclass
class Tensor:
    """What was said of a tensor."""

    uid: int
    shape: list[int]
    kind: str
    strides: list[int] = field(default_factory=list)

    def set_data_type(self, kind: str) -> Tensor:
        self.kind = kind
        return self

    def set_output(self, wanted: bool) -> Tensor:
        return self

    def set_dim(self, shape: list[int]) -> Tensor:
        self.shape = shape
        return self

    def set_stride(self, strides: list[int]) -> Tensor:
        self.strides = strides
        return self

    def set_uid(self, uid: int) -> Tensor:
        self.uid = uid
        return self


@dataclass
class Graph:
    """Records what is drawn as settings that travel as JSON; a plan is its number."""

    library: FakeCudnn
    settings: dict[str, Any] = field(default_factory=dict)
    plan: int | None = None
    attended: list[Tensor] = field(default_factory=list)

    def tensor(self, dim: list[int], stride: list[int], data_type: str, uid: int, name: str) -> Tensor:
        self.settings[str(uid)] = [dim, _NUMPY[data_type]]
        return Tensor(uid, dim, data_type, stride)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, generate_stats: bool, attn_scale: float, use_causal_mask: bool,
             name: str, bias: Tensor | None = None) -> tuple[Tensor, None]:  # fmt: skip
        self.settings |= {"scale": attn_scale, "causal": use_causal_mask}
        self.attended, self.made = [t for t in (q, k, v, bias) if t is not None], Tensor(0, [], q.kind)
        return self.made, None

    def conv_fprop(self, x: Tensor, weight: Tensor, pre_padding: list[int], post_padding: list[int], stride: list[int],
                   dilation: list[int], compute_data_type: str) -> Tensor:  # fmt: skip
        self.settings |= {"pads": [*pre_padding, *post_padding], "strides": stride, "dilations": dilation}
        self.made = Tensor(0, [], "FLOAT")
        return self.made

    def mul(self, y: Tensor, scale: Tensor) -> Tensor:
        return y

    def add(self, y: Tensor, bias: Tensor) -> Tensor:
        return y

    def swish(self, y: Tensor) -> Tensor:
        self.settings["silu"] = True
        return y

    def relu(self, y: Tensor) -> Tensor:
        self.settings["relu"] = True
        return y

    def validate(self) -> None:
        if self.library.refuses:
            raise Unsupported("no engine supports this graph")
        self.settings["result"] = _NUMPY[self.made.kind]
        if self.attended:
            places = [(t.uid, t.shape, t.strides) for t in (*self.attended, self.made)]
            self.settings["attention"] = places

    def build_operation_graph(self) -> None: ...

    def create_execution_plans(self, modes: list[str]) -> None: ...

    def check_support(self) -> None: ...

    def get_execution_plan_count(self) -> int:
        return 2

    def build_plan_at_index(self, index: int) -> None:
        self.plan = index

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 128 * index

    def serialize(self) -> list[int]:
        assert self.plan is not None, "no plan has been built"
        return list(json.dumps(self.settings).encode())

    def deserialize(self, handle: int, code: bytes) -> None:
        if self.library.forgetful:
            raise RuntimeError("CUDNN_STATUS_BAD_PARAM")
        self.settings = json.loads(code)

    def execute(self, addresses: dict[int, int], workspace: int, handle: int) -> None:
        driver = self.library.driver
        assert self.library.stream, "work needs a stream"
        if driver.recording is None:
            self._carry_out(addresses)
        else:
            driver.recording.append(lambda: self._carry_out(addresses))

    def _carry_out(self, addresses: dict[int, int]) -> None:
        compute = self._attend if "attention" in self.settings else self._convolve
        compute(addresses)

    def _convolve(self, addresses: dict[int, int]) -> None:
        s = self.settings
        self.library.convolutions += 1
        x, weight = (self._channels_last(addresses[uid], *s[str(uid)]) for uid in (X, WEIGHT))
        wide = np.int32 if x.dtype == np.int8 else np.float32
        window = {k: tuple(s[k]) for k in ("pads", "strides", "dilations")}
        group = x.shape[1] // weight.shape[1]
        sums = meaning("Conv")(x.astype(wide), weight.astype(wide), **window, group=group)[0].astype(np.float32)
        if str(SCALE) in s:
            sums = sums * at(addresses[SCALE], s[str(SCALE)][1], *s[str(SCALE)][0])
        for uid in (BIAS, VECTOR, RESIDUAL):
            if str(uid) in s:
                sums = sums + self._channels_last(addresses[uid], *s[str(uid)])
        y = np.maximum(sums, 0) if "relu" in s else sums / (1 + np.exp(-sums)) if "silu" in s else sums
        y = np.clip(np.rint(y), -128, 127) if s["result"] == "int8" else y
        batch, channels, height, width = y.shape
        at(addresses[RESULT], s["result"], batch, height, width, channels)[...] = np.moveaxis(y, 1, -1)

    def _attend(self, addresses: dict[int, int]) -> None:
        self.library.attentions += 1
        s = self.settings
        *given, result = (self._strided(addresses[uid], shape, strides) for uid, shape, strides in s["attention"])
        settings = {"scale": s["scale"], "causal": int(s["causal"]), "softcap": 0.0}
        result[...] = meaning("Attention")(*(x.astype(np.float32) for x in given), **settings)[0]

    @staticmethod
    def _strided(address: int, shape: list[int], strides: list[int]) -> Any:
        span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        flat = at(address, "float16", span)
        return np.lib.stride_tricks.as_strided(flat, shape, [2 * s for s in strides])

    @staticmethod
    def _channels_last(address: int, shape: list[int], dtype: str) -> Any:
        batch, channels, *rest = shape
        return np.moveaxis(at(address, dtype, batch, *rest, channels), -1, 1)


@dataclass
class FakeCudnn:
    """The module. `refuses`: it has no plan for anything; `forgetful`: it takes no plan that was kept."""

    driver: FakeDriver
    version: int = 91900
    refuses: bool = False
    forgetful: bool = False
    convolutions: int = 0
    attentions: int = 0
    stream: int = 0
    cudnnGraphNotSupportedError = Unsupported
    data_type = SimpleNamespace(**{kind: kind for kind in _KINDS})
    heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")

    def create_handle(self) -> int:
        return 1

    def backend_version(self) -> int:
        return self.version

    def set_stream(self, handle: int, stream: int) -> None:
        self.stream = stream

    def pygraph(self, **settings: Any) -> Graph:
        return Graph(self)
