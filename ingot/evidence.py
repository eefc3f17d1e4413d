"""Every engine is compared with the reference on the imported, unrewritten model before anybody gets it.

The reference is the oracle (numpy meanings of ONNX operators). Inputs are the user's or drawn from a seed; shapes are
each
profile's smallest, typical and largest; batches above 8 are compared on their first 8 rows.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir

from ingot.compiler import Compiled, digest
from ingot.config import BuildConfig
from ingot.engine import Engine
from ingot.errors import BuildError, IngotError, InputError, VerificationFailed
from ingot.importers.onnx import nan_counts
from ingot.ir import expression as expressions
from ingot.ir.ops import meaning
from ingot.ir.oracle import compile_model
from ingot.kernels import Candidate
from ingot.kernels.cpu.isa import Isa
from ingot.kernels.cpu.standalone import Standalone
from ingot.kernels.node import Port
from ingot.plan.extent import evaluate, symbols_of
from ingot.plan.lower import Work
from ingot.plan.plan import TensorSpec
from ingot.report import BuildLog
from ingot.runtime.machine import cpu_features
from ingot.runtime.session import Session, features
from ingot.stepwise import compare_steps, without_rounding
from ingot.tune.binding import bind

Array = np.ndarray[Any, Any]
Attempt = Callable[[frozenset[str]], tuple[Engine, list[Compiled]]]
_BATCH_LIMIT = 8
_UNBOUNDED = (1, 3, 16, 64, 128, 512, 640)
# relative to the largest magnitude of the reference output; integers: largest difference allowed, and share of elements
_RELATIVE = {"float64": 1e-6, "float32": 2e-4, "float16": 2e-2, "bfloat16": 8e-2}
_COARSER = {"tf32": 2e-3, "fp16": 2e-2, "bf16": 8e-2}  # the same for float32 results of an engine of that precision
_INTEGER_SHARE = 2e-3
# Models that quantize what they compute: where a number lies within a rounding of the middle between two integers, the
# order of a sum decides, and a step more or less goes on from there. Two correct runtimes differ by this much.
_STEPPED_RELATIVE, _STEPPED_COSINE = 5e-2, 0.999
_REDRAWN_COSINE, _TWICE = 0.98, math.sqrt(2)
_QUANTIZERS = {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "QLinearAdd"}


@dataclass(frozen=True)
class Difference:
    """How far one output is from the reference at one set of shapes."""

    output: str
    shapes: Mapping[str, Sequence[int]]
    largest: float
    relative: float
    cosine: float
    passed: bool
    tolerance: float | None = None  # of `relative`; None where the user's, or an integer's, decided

    def as_json(self) -> dict[str, Any]:
        """Rounded to two digits, so that the same build gives the same bytes."""
        return {
            "output": self.output, "shapes": {k: list(v) for k, v in self.shapes.items()},
            "largest": _two(self.largest), "relative": _two(self.relative), "cosine": round(self.cosine, 6),
            "passed": self.passed, **({} if self.tolerance is None else {"tolerance": self.tolerance}),
        }  # fmt: skip


def _two(x: float) -> float:
    return float(f"{x:.1e}") if math.isfinite(x) else x


def verify(
    engine: Engine, source: onnx_ir.Model, config: BuildConfig, log: BuildLog, compiled: Sequence[Compiled] = ()
) -> Engine:
    """The engine with its evidence inside. VerificationFailed names the output and the figures; nothing is returned
    then. `compiled`: what its variants were made from; where roundings blur the outputs, each step is compared too."""
    if not _runnable(engine):
        log.note(
            "not verified", engine.source, "no variant of the engine runs on this machine", "verify it where it runs"
        )
        return replace(engine, details={**engine.details, "evidence": []})
    _refuse_what_does_not_fit(engine)
    with log.stage("verify"):
        reference = _Reference(source, config)
        evidence: list[Difference] = []
        for number, variant in enumerate(engine.variants):
            alone = replace(engine, variants=(variant,))
            if _runnable(alone):
                found, blurred = check(alone, reference, config, log)
                evidence += found
                if blurred is not None and compiled and all(d.passed for d in found):
                    _refuse_wrong_steps(compiled[number], source, blurred, config, log)
    failed = [d for d in evidence if not d.passed]
    if failed:
        raise VerificationFailed(_complaint(failed, config))
    return replace(engine, details={**engine.details, "evidence": [d.as_json() for d in evidence]})


def _refuse_what_does_not_fit(engine: Engine) -> None:
    planned = max((m.bytes for variant in engine.variants for m in variant.plan.memory), default=0)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if planned > present:
        raise BuildError(
            f"a run at the largest shapes needs {planned / 2**30:.1f} GiB for activations, this machine has "
            f"{present / 2**30:.1f} GiB: lower the profile's largest shapes, or build for another machine without the "
            "comparison (--no-verify)"
        )


def first_correct(attempt: Attempt, source: onnx_ir.Model, config: BuildConfig, log: BuildLog) -> Engine:
    """The first engine that agrees with the reference. Kernels found wrong are dropped, named in the log, and the
    engine is
    made again without them; VerificationFailed when the difference cannot be blamed on a kernel."""
    banned: frozenset[str] = frozenset()
    while True:
        engine, compiled = attempt(banned)
        try:
            return verify(engine, source, config, log, compiled)
        except VerificationFailed as failure:
            wrong = (failure.kernels or blame(compiled, config, log)) - banned
            if not wrong:
                raise failure from None
            banned |= wrong


def blame(compiled: Sequence[Compiled], config: BuildConfig, log: BuildLog) -> frozenset[str]:
    """Labels of chosen candidates that, run alone, differ from their op's numpy meaning."""
    wrong: set[str] = set()
    for made in compiled:
        if not isinstance(made.target, Isa) or not made.target.machine <= cpu_features():
            continue
        for work, candidate in made.choices.items():
            if candidate.label not in wrong and (reason := _fault(work, candidate, made.target, config)):
                wrong.add(candidate.label)
                log.note("dropped tactic", ", ".join(work.origins) or work.name, f"{candidate.label}: {reason}")
    return frozenset(wrong)


def _fault(work: Work, candidate: Candidate, isa: Isa, config: BuildConfig) -> str:
    """What is wrong with a candidate at typical sizes; empty when it is right."""
    assert work.node is not None
    node = bind(work.node, {})
    rng = np.random.default_rng(config.seed)
    feeds = [None if p is None else _feed(rng, p) for p in node.inputs]
    key = "expression" if node.op == "Pointwise" else "epilogue"
    stated = {**node.attributes, **({key: expressions.format(node.epilogue)} if node.epilogue else {})}
    wanted = meaning(node.op)(*feeds, **stated)
    mine = Standalone(node, candidate, isa)(*feeds)
    found = [compare("", a, b, {}, config) for a, b in zip(mine, wanted, strict=False)]
    worst = max(found, key=lambda d: d.relative)
    return "" if all(d.passed for d in found) else f"differs from {node.op}'s meaning by {worst.largest:.2e}"


def _feed(rng: np.random.Generator, port: Port) -> np.ndarray[Any, Any]:
    return draw(rng, port.dtype, tuple(int(d) for d in port.shape), 2) if port.constant is None else port.constant


def _runnable(engine: Engine) -> bool:
    return any(frozenset(v.requires) <= features(v.target) for v in engine.variants)


def _complaint(failed: Sequence[Difference], config: BuildConfig) -> str:
    worst = max(failed, key=lambda d: d.relative if d.relative == d.relative else math.inf)
    return (
        f"output {worst.output!r} differs from the reference by {worst.largest:.2e} ({worst.relative:.2e} of its "
        f"largest magnitude, cosine {worst.cosine:.6f}) at shapes {dict(worst.shapes)}; no engine was made. Find the "
        "layer with `ingot compare --bisect`, or widen the tolerance with --atol/--rtol if this is expected"
    )


def _refuse_wrong_steps(
    made: Compiled, source: onnx_ir.Model, feeds: Mapping[str, Any], config: BuildConfig, log: BuildLog
) -> None:
    """VerificationFailed where a step alone is wrong."""
    found = compare_steps(made, source, feeds, lambda dtype: _tolerance(dtype, config))
    if found is None:
        return
    log.figures["steps compared"] = found.compared
    for fault in found.faults:
        if fault.kernel is not None:
            log.note("dropped tactic", fault.nodes, f"{fault.kernel}: given the model's own numbers it {fault.reason}")
    if found.faults:
        worst = next((fault for fault in found.faults if fault.kernel is None), found.faults[0])
        raise VerificationFailed(
            f"{worst.nodes}: given the model's own numbers, what this step computes {worst.reason}; no engine was "
            "made. This is a bug in Ingot; a layer kept wide (--layerPrecisions) goes around it",
            frozenset(fault.kernel for fault in found.faults if fault.kernel is not None),
        )


def check(
    engine: Engine, reference: _Reference, config: BuildConfig, log: BuildLog
) -> tuple[list[Difference], Mapping[str, Any] | None]:
    """Differences of every output at every set of shapes, and inputs with which only what rounding may do explains
    them."""
    found: list[Difference] = []
    blurred: Mapping[str, Any] | None = None
    with Session(engine, device=engine.variants[0].target) as session:
        points = list(_answerable(engine.inputs, reference, config))
        if not points:
            log.note("not verified", engine.source, "the reference accepts none of the sizes tried", "give a profile")
        for number, (feeds, wanted) in enumerate(points):
            shapes = {name: x.shape for name, x in feeds.items() if isinstance(x, np.ndarray)}
            mine = _run(session, feeds, shapes)
            _refuse_nan(wanted, reference)
            names = [n for n in wanted if isinstance(mine[n], np.ndarray)]
            here = [compare(n, mine[n], wanted[n], shapes, config, reference.steps) for n in names]
            if reference.steps and blurred is None and not all(
                compare(n, mine[n], wanted[n], shapes, config).passed for n in names
            ):  # fmt: skip
                blurred = _sliced(feeds, engine.inputs)
            if reference.steps and not all(d.passed for d in here):
                wide = reference.unrounded(feeds, engine.inputs)
                here = [within_rounding(d, mine[d.output], wanted[d.output], wide[d.output], config) for d in here]
            found += here
            log.advance("verify", (number + 1) / len(points))
    return found, blurred


def _run(session: Session, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    try:
        return session.run(feeds)
    except MemoryError as error:
        raise BuildError(
            f"the engine cannot be run here at shapes {dict(shapes)} to verify it: out of memory ({error}); lower the "
            "profile's largest shapes, or build without the comparison (--no-verify)"
        ) from None


def _refuse_nan(wanted: Mapping[str, Any], reference: _Reference) -> None:
    """A model whose weights make its outputs NaN is broken: an engine of it could be compared with nothing."""
    arrays = {n: y for n, y in wanted.items() if isinstance(y, np.ndarray) and y.dtype.kind == "f"}
    broken = [name for name, y in arrays.items() if np.isnan(y).any()]
    if broken and (counts := reference.nan_weights):
        weight, count = next(iter(counts.items()))
        raise BuildError(
            f"output {broken[0]!r} is not a number, as initializer {weight!r} holds {count} NaN: training or export "
            "went wrong; to build an engine all the same, do without the comparison (--no-verify)"
        )


def _answerable(
    specs: Sequence[TensorSpec], reference: _Reference, config: BuildConfig
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Inputs with the reference's outputs. Without a profile sizes are tried until two are accepted: a network may need
    more samples than its window is long."""
    points, bounded = shape_points(specs, config)
    found = 0
    for symbols in points:
        feeds = make_inputs(specs, symbols, config, reference.limits)
        try:
            wanted = reference(feeds, specs)
        except IngotError:
            if bounded:
                raise
            continue
        yield feeds, wanted
        found += 1
        if found == 2 and not bounded:
            return


class _Reference:
    """The oracle on the model as it came, with its answers cached by digest of model and inputs."""

    def __init__(self, source: onnx_ir.Model, config: BuildConfig) -> None:
        self._source, self._run = source, None
        self._unrounded: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None
        self._digest = digest(source)
        self.limits = index_limits(source)
        self.nan_weights = nan_counts(source)
        self.steps = any(node.op_type in _QUANTIZERS for node in source.graph.all_nodes())

    def __call__(self, feeds: Mapping[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
        feeds = _sliced(feeds, specs)
        path = _cache_folder() / f"{_key(self._digest, feeds)}.npz"
        if path.exists():
            try:
                with np.load(path) as stored:
                    return {name: stored[name] for name in stored.files}
            except (OSError, ValueError):
                path.unlink(missing_ok=True)
        if self._run is None:
            self._run = compile_model(self._source)  # type: ignore[assignment]
        results = self._run(feeds)  # type: ignore[misc]
        _store(path, results)
        return results

    def unrounded(self, feeds: Mapping[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
        """What the model says without rounding what it computes to integers."""
        if self._unrounded is None:
            self._unrounded = compile_model(without_rounding(self._source))
        return self._unrounded(_sliced(feeds, specs))


def _sliced(feeds: Mapping[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """The first rows of a large batch, where every input has the same leading symbol and no other extent names it."""
    leading = {spec.shape[0] if spec.shape else None for spec in specs}
    symbol = next(iter(leading))
    elsewhere = (
        any(symbol in symbols_of(d) for spec in specs for d in spec.shape[1:]) if isinstance(symbol, str) else True
    )
    if len(leading) != 1 or elsewhere or not all(isinstance(x, np.ndarray) for x in feeds.values()):
        return dict(feeds)
    return {name: np.ascontiguousarray(x[:_BATCH_LIMIT]) for name, x in feeds.items()}


def _cache_folder() -> Path:
    root = os.environ.get("INGOT_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ingot" / "reference"


def _key(model: str, feeds: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(model.encode())
    for name, x in sorted(feeds.items()):
        array = np.asarray(x)
        sha.update(f"{name}:{array.dtype}:{array.shape}".encode())
        sha.update(array.tobytes() if array.dtype != object else repr(x).encode())
    return sha.hexdigest()


def _store(path: Path, results: Mapping[str, Any]) -> None:
    """Best effort: a cache that cannot be written costs time, nothing else."""
    if not all(isinstance(y, np.ndarray) and y.dtype.kind in "fiub" for y in results.values()):
        return
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, **dict(results))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)


def shape_points(specs: Sequence[TensorSpec], config: BuildConfig) -> tuple[list[dict[str, int]], bool]:
    """Bindings of the input symbols to check at, and whether a profile gave them: each profile's min, opt and max, or
    sizes to try."""
    symbols = sorted({s for spec in specs for d in spec.shape for s in symbols_of(d)})
    if not symbols:
        return [{}], True
    points: list[dict[str, int]] = []
    for corner in range(3):
        for profile in config.profiles:
            bound = dict.fromkeys(symbols, 1)
            for spec in specs:
                sizes = profile.shapes[spec.name][corner] if spec.name in profile.shapes else ()
                bound |= {
                    d: n for d, n in zip(spec.shape, sizes, strict=False) if isinstance(d, str) and d.isidentifier()
                }
            points.append(bound)
    if not points:
        return [dict.fromkeys(symbols, size) for size in _UNBOUNDED], False
    return [point for i, point in enumerate(points) if point not in points[:i]], True


def make_inputs(
    specs: Sequence[TensorSpec], symbols: Mapping[str, int], config: BuildConfig, limits: Mapping[str, int]
) -> dict[str, Any]:
    """The user's inputs where given, else drawn: floats from N(0, 1), integers below what they index."""
    rng = np.random.default_rng(config.seed)
    given = config.inputs or {}
    feeds: dict[str, Any] = {}
    for spec in specs:
        shape = tuple(evaluate(d, symbols) for d in spec.shape)
        known = given.get(spec.name)
        fits = isinstance(known, np.ndarray) and known.shape == shape
        feeds[spec.name] = known if fits else draw_input(rng, spec, shape, limits.get(spec.name, 2))
    return feeds


def draw_input(rng: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...], limit: int) -> Any:
    """`draw` for an input; InputError names it when this machine cannot hold that much."""
    try:
        return draw(rng, spec.dtype, shape, limit)
    except (MemoryError, ValueError) as error:  # numpy has either for what is too large
        raise InputError(
            f"input {spec.name!r} in shape {list(shape)} is too large for this machine ({error}); give smaller shapes, "
            "or build without the comparison (--no-verify)"
        ) from None


def draw(rng: np.random.Generator, dtype: str, shape: tuple[int, ...], limit: int) -> Any:
    """A plausible input of a dtype; integers are in [0, limit), 8-bit ones over their whole range."""
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype == "string":
        return np.full(shape, "ingot", object)
    if dtype == "object":
        return []
    from ingot.dtypes import numpy_dtype

    kind = numpy_dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        low, high = (info.min, info.max + 1) if kind.itemsize == 1 else (0, limit)
        return rng.integers(low, high, shape).astype(kind)
    return rng.standard_normal(shape).astype(kind)


def index_limits(model: onnx_ir.Model) -> dict[str, int]:
    """For integer inputs that feed a Gather: how many rows there are to index."""
    limits: dict[str, int] = {}
    for value in model.graph.inputs:
        for node, position in value.uses():
            data = node.inputs[0] if node.op_type == "Gather" and position == 1 else None
            if data is not None and data.shape is not None:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                rows = data.shape[axis]
                if isinstance(rows, int) and value.name:
                    limits[value.name] = min(rows, limits.get(value.name, rows))
    return limits


def compare(
    name: str, mine: Array, wanted: Any, shapes: Mapping[str, Sequence[int]], config: BuildConfig, steps: bool = False
) -> Difference:
    """One output beside the reference, by the tolerance of its dtype or the user's; `steps`: the model rounds what it
    computes to integers on the way."""
    wanted = np.asarray(wanted)
    mine = mine[: wanted.shape[0]] if wanted.ndim and mine.ndim == wanted.ndim else mine
    if mine.shape != wanted.shape or mine.dtype != wanted.dtype or mine.dtype == object:
        same = mine.shape == wanted.shape and mine.dtype == wanted.dtype and np.array_equal(mine, wanted)
        return Difference(name, shapes, 0.0 if same else math.inf, 0.0 if same else math.inf, float(same), same)
    a, b = mine.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
    with np.errstate(all="ignore"):
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        largest = float(gap.max(initial=0.0))
        scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
        cosine = 1.0 if largest == 0 else cosine_of(a, b)
    relative = largest / scale if scale else largest
    passed = _passes(mine.dtype, gap, b, relative, config)
    ours, floats = config.atol is None and config.rtol is None, mine.dtype.kind not in "iub"
    stated = _tolerance(mine.dtype, config) if ours and floats else None
    if steps and ours and not passed and cosine >= _STEPPED_COSINE and (floats or mine.dtype.itemsize == 1):
        stated = max(stated or 0.0, _STEPPED_RELATIVE)
        passed = relative <= stated
    return Difference(name, shapes, largest, relative, cosine, passed, stated)


def within_rounding(found: Difference, mine: Array, wanted: Array, unrounded: Array, config: BuildConfig) -> Difference:
    """In a deep model a step more or less changes the roundings behind it, until these are as good as drawn anew: what
    differs then may do so by the noise that rounding makes, twice drawn, of which `unrounded` tells."""
    if found.passed or mine.dtype.kind != "f" or config.atol is not None or config.rtol is not None:
        return found
    apart, noise = (np.abs(np.asarray(x, np.float64)[: len(wanted)] - wanted) for x in (mine, unrounded))
    scale = float(np.abs(wanted).max(initial=0.0))
    if not scale or not np.isfinite(apart).all() or found.cosine < _REDRAWN_COSINE:
        return found
    stated = _TWICE * float(noise.max()) / scale
    passed = found.relative <= stated and _root_mean(apart) <= _TWICE * _root_mean(noise)
    return replace(found, passed=passed, tolerance=stated)


def _root_mean(x: Array) -> float:
    return float(np.sqrt(np.square(x).mean()))


def cosine_of(a: Array, b: Array) -> float:
    """Cosine between the places where both are finite; 0 where one of them is all zero."""
    finite = np.isfinite(a) & np.isfinite(b)
    norms = float(np.linalg.norm(a[finite]) * np.linalg.norm(b[finite]))
    return float(np.dot(a[finite], b[finite]) / norms) if norms else 0.0


def _passes(dtype: Any, gap: Array, wanted: Array, relative: float, config: BuildConfig) -> bool:
    if not np.isfinite(gap).all():
        return False
    if config.atol is not None or config.rtol is not None:
        return bool((gap <= (config.atol or 0.0) + (config.rtol or 0.0) * np.abs(wanted)).all())
    if dtype.kind in "iub":
        return bool((gap > 0).mean() <= _INTEGER_SHARE) if dtype.itemsize > 1 else bool((gap <= 2).all())
    return relative <= _tolerance(dtype, config)


def _tolerance(dtype: Any, config: BuildConfig) -> float:
    """Of a difference relative to the output's largest magnitude; an engine's precision may be coarser than a result's
    type."""
    return max(_RELATIVE.get(dtype.name, 2e-1), _COARSER.get(config.precision, 0.0))
