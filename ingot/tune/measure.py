"""What runs in the child processes of a build: compiling candidates, and timing them with cold weights, warm
activations, in interleaved rounds."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ingot.dtypes import numpy_dtype
from ingot.errors import BuildError
from ingot.kernels import Candidate, Ports, kernels_for
from ingot.kernels.cpu.isa import BY_NAME, Isa
from ingot.kernels.cpu.standalone import Compiled, Standalone, compiled, generate
from ingot.kernels.node import Node, Port
from ingot.kernels.target import Target
from ingot.tune import cold

Array = np.ndarray[Any, Any]
Description = tuple[str, str, Mapping[str, Any], Ports]  # module, kernel, tactic, layouts
_LARGE = 4096
_TILED = 1 << 22  # elements; more repeat themselves
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 40
_CLOSE = 1.15  # candidates this many times slower than the best of their layout are not timed any further


def describe(candidate: Candidate) -> Description:
    """A candidate as something a pipe carries."""
    return (candidate.kernel.generate.__module__, candidate.kernel.name, dict(candidate.tactic), candidate.ports)


def without_weights(node: Node) -> Node:
    """The node with large constants replaced by an empty array of their dtype: the child draws its own."""

    def light(port: Port | None) -> Port | None:
        if port is None or port.constant is None or port.constant.size < _LARGE:
            return port
        return replace(port, constant=np.empty(0, port.constant.dtype))

    return replace(node, inputs=tuple(light(p) for p in node.inputs))


def compile_candidate(node: Node, described: Description, isa_name: str) -> Compiled:
    """The candidate's code."""
    isa = BY_NAME[isa_name]
    drawn = with_drawn_weights(node)
    return compiled(generate(drawn, candidate_of(drawn, described, isa), isa))


def candidate_of(node: Node, described: Description, target: Target) -> Candidate:
    """What `describe` described."""
    module, name, tactic, ports = described
    kernels_for(node, target.target, target)  # Ingot's own are registered
    if module != "__main__":
        importlib.import_module(module)  # a user's
    entry = next((k for k in kernels_for(node, target.target, target) if k.name == name), None)
    if entry is None:
        raise BuildError(f"importing {module} registers no kernel {name} for {node.op}: it cannot be timed")
    return Candidate(entry, tactic, ports)


@dataclass(eq=False)
class _Runner:
    """A candidate being timed."""

    alone: Standalone
    ports: Ports
    distant: bool  # its weights come from memory
    seconds: list[float] = field(default_factory=list)

    def once(self) -> None:
        cold.sweep()
        if self.distant:
            cold.evict(self.alone.constants)
        self.alone.warm_inputs()
        start = time.thread_time()  # not what others took of the core meanwhile
        self.alone.run()
        self.seconds.append(time.thread_time() - start)

    @property
    def typical(self) -> float:
        """The lower quartile: interruptions only ever add time."""
        return sorted(self.seconds)[len(self.seconds) // 4]


def time_candidates(
    node: Node, ready: Sequence[tuple[Description, Compiled]], isa_name: str, budget: float, share: float
) -> list[float]:
    """Microseconds of each candidate on one thread. `budget`: seconds of running to spend on the whole set; `share`:
    how many times a candidate's form of the weights the model has, which come from memory where they take more than
    stays in the last level of cache."""
    isa = BY_NAME[isa_name]
    node = with_drawn_weights(node)
    feeds = [None if p is None else draw(p) for p in node.inputs]
    runners = [_runner(node, described, code, isa, feeds, share) for described, code in ready]
    start = time.perf_counter()
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _FEWEST_ROUNDS and time.perf_counter() - start > budget:
            break
        for runner in _promising(runners) if rounds >= _FEWEST_ROUNDS else runners:
            runner.once()
    return [runner.typical * 1e6 for runner in runners]


def _runner(node: Node, described: Description, code: Compiled, isa: Isa, feeds: Sequence[Array | None],
            share: float) -> _Runner:  # fmt: skip
    alone = Standalone(node, candidate_of(node, described, isa), isa, ready=code)
    alone.bind(feeds)
    alone.run()  # pages touched, tables read
    own = sum(array.nbytes for array in alone.constants)
    return _Runner(alone, described[-1], own * share > cold.CACHED)


def _promising(runners: Sequence[_Runner]) -> list[_Runner]:
    """Those that may still turn out the best of their layout."""
    best: dict[Ports, float] = {}
    for runner in runners:
        best[runner.ports] = min(best.get(runner.ports, np.inf), *runner.seconds)
    return [runner for runner in runners if min(runner.seconds) <= _CLOSE * best[runner.ports]]


def with_drawn_weights(node: Node, numbers: Callable[[Node, int], Array] | None = None) -> Node:
    """The node with weights in the places that `without_weights` emptied; `numbers`: those of an input, else `draw`."""

    def drawn(index: int, port: Port | None) -> Port | None:
        if port is None or port.constant is None or port.constant.shape == port.shape:
            return port
        return replace(port, constant=numbers(node, index) if numbers else draw(port))

    return replace(node, inputs=tuple(drawn(k, p) for k, p in enumerate(node.inputs)))


def draw(port: Port) -> Array:
    """Numbers nothing goes wrong with: integers are legal indices, floats neither overflow nor become denormal."""
    rng = np.random.default_rng(1)
    shape = tuple(int(d) for d in port.shape)
    dtype = numpy_dtype(port.dtype)
    if dtype.kind in "iu" and dtype.itemsize > 1:
        return np.zeros(shape, dtype)
    if dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(dtype)
    if np.prod(shape, dtype=np.int64) > _TILED:
        return np.resize(rng.uniform(0.25, 1.0, _TILED).astype(dtype), shape)
    return rng.uniform(0.25, 1.0, shape).astype(np.float32).astype(dtype)
