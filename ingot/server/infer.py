"""`ingot infer`: one request, or a load, to a server (HTTP or gRPC) or straight to an engine; files in, files out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ingot.client import Client, ClientError, unpacked
from ingot.dtypes import HOST_ONLY, numpy_dtype
from ingot.engine import Engine
from ingot.errors import ConfigError, InputError
from ingot.plan.extent import evaluate, symbols_of
from ingot.runtime.session import Session
from ingot.server import load
from ingot.server.request import BY_NAME
from ingot.tools import files
from ingot.tools.shapes import parse_shapes

Arrays = Mapping[str, Any]
Port = tuple[str, str, tuple[int, ...]]  # name, numpy's dtype, extents (-1: free)
_SHOWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    add = parser.add_argument
    add("target", help="http://host:8000/MODEL, grpc://host:8001/MODEL (…/MODEL/VERSION), or an engine file")
    add(
        "inputs", nargs="*", metavar="[NAME=]FILE",
        help=".npy or raw bytes by name; .npz, .json or - (JSON on standard input) with several; others are drawn",
    )  # fmt: skip
    add("--shapes", default="", help="of drawn inputs: x:1x3x224x224 (free extents are 1)")
    add("--save", type=Path, help="outputs: a .npz or .json file, or a folder of .npy files")
    add("--wait", type=float, default=0.0, metavar="SECONDS", help="until a server answers for the model")
    add("--key", default="", help="API key")
    add("--concurrency", type=int, default=0, help="closed loop: so many clients, each waits for its answer")
    add("--rate", type=float, default=0.0, help="open loop: requests a second; --concurrency bounds those that wait")
    add("--even", action="store_true", help="open loop: evenly spread, not at random")
    add("--duration", type=float, default=5.0, help="seconds of a load")
    add("--timeout-us", type=int, default=0, help="what the server is told of each request's deadline")
    add("--threads", type=int, help="of each session, where the target is an engine")
    add("--json", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Ask once, or for a while; 1 if everything was refused."""
    with _target(arguments) as target:
        given = read_inputs(arguments.inputs, sys.stdin.read)
        feeds = completed(given, patiently(target.inputs, arguments.wait), parse_shapes(arguments.shapes))
        if arguments.concurrency or arguments.rate:
            return _report(_loaded(target, feeds, arguments), arguments.json)
        outputs = target.infer(feeds)
    if arguments.save:
        save(arguments.save, outputs)
    print(json.dumps(_as_json(outputs)) if arguments.json else described(outputs))
    return 0


def patiently(ask: Callable[[], list[Port]], seconds: float) -> list[Port]:
    """The answer, asked for again and again for so long; the last refusal is the caller's."""
    until = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except ClientError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


# -- targets ----------------------------------------------------------------------------------------------------------
class Target(Protocol):
    """Something that infers; one for each client."""

    def inputs(self) -> list[Port]:
        """What it takes."""

    def infer(self, feeds: Arrays) -> Arrays:
        """Outputs by name."""

    def another(self) -> Target:
        """The same for another thread."""

    def __enter__(self) -> Target: ...
    def __exit__(self, *_: object) -> None: ...


def _target(arguments: argparse.Namespace) -> Target:
    scheme, found, rest = arguments.target.partition("://")
    if not found:
        engine = Engine.load(arguments.target)
        if "llm" in engine.details:
            raise ConfigError(f"{engine.source} is a language model: `ingot llm generate {engine.source}` asks it")
        return EngineTarget(engine, arguments.threads)
    address, _, path = rest.partition("/")
    model, _, version = path.strip("/").partition("/")
    if scheme not in ("http", "https", "grpc") or not model or (version and not version.isdigit()):
        raise ConfigError(f"{arguments.target!r} should read http://host:8000/MODEL or grpc://host:8001/MODEL/VERSION")
    parameters = {"timeout": arguments.timeout_us} if arguments.timeout_us else {}
    if scheme == "grpc":
        return GrpcTarget(address, model, version, arguments.key, parameters)
    return HttpTarget(f"{scheme}://{address}", model, int(version or 0), arguments.key, parameters)


class HttpTarget:
    """A server over HTTP."""

    def __init__(self, url: str, model: str, version: int, key: str, parameters: Mapping[str, Any]) -> None:
        self._again = (url, model, version, key, parameters)
        self._client, self._model, self._version, self._parameters = Client(url, key), model, version, parameters

    def inputs(self) -> list[Port]:
        """As the model's metadata says."""
        metadata = self._client.metadata(self._model, self._version)
        return [(item["name"], BY_NAME[item["datatype"]].numpy, tuple(item["shape"])) for item in metadata["inputs"]]

    def infer(self, feeds: Arrays) -> Arrays:
        """One request."""
        return self._client.infer(self._model, feeds, version=self._version, **self._parameters)

    def another(self) -> HttpTarget:
        """Another connection."""
        return HttpTarget(*self._again)

    def __enter__(self) -> HttpTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()


class GrpcTarget:
    """A server over gRPC."""

    def __init__(self, address: str, model: str, version: str, key: str, parameters: Mapping[str, Any]) -> None:
        import grpc

        self._again = (address, model, version, key, parameters)
        self._address, self._model, self._version, self._parameters = address, model, version, parameters
        self._metadata = [("x-api-key", key)] if key else []
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.insecure_channel(address, options=options)
        self._errors = grpc.RpcError

    def _ask(self, method: str, asked: Any, answer: str) -> Any:
        from ingot.server.schema import message

        call = self._channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}", type(asked).SerializeToString,
            message(f"inference.{answer}").FromString,
        )  # fmt: skip
        try:
            return call(asked, metadata=self._metadata, timeout=60)
        except self._errors as error:
            raise ClientError(f"grpc://{self._address}: {error.details()}") from error

    def inputs(self) -> list[Port]:
        """As the model's metadata says."""
        from ingot.server.schema import message

        asked = message("inference.ModelMetadataRequest")(name=self._model, version=self._version)
        metadata = self._ask("ModelMetadata", asked, "ModelMetadataResponse")
        return [(item.name, BY_NAME[item.datatype].numpy, tuple(item.shape)) for item in metadata.inputs]

    def infer(self, feeds: Arrays) -> Arrays:
        """One request."""
        answer = self._ask(
            "ModelInfer", _message(self._model, self._version, feeds, self._parameters), "ModelInferResponse"
        )
        return {
            item.name: unpacked(item.datatype, raw).reshape(tuple(item.shape))
            for item, raw in zip(answer.outputs, answer.raw_output_contents, strict=True)
        }

    def another(self) -> GrpcTarget:
        """Another channel."""
        return GrpcTarget(*self._again)

    def __enter__(self) -> GrpcTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()


def _message(model: str, version: str, feeds: Arrays, parameters: Mapping[str, Any]) -> Any:
    from ingot.client import packed
    from ingot.server.schema import message

    asked = message("inference.ModelInferRequest")(model_name=model, model_version=version)
    for name, array in feeds.items():
        datatype, raw = packed(name, np.asarray(array))
        asked.inputs.add(name=name, datatype=datatype, shape=np.shape(array))
        asked.raw_input_contents.append(raw)
    for name, value in parameters.items():
        asked.parameters[name].int64_param = value
    return asked


class EngineTarget:
    """An engine in this process: what it takes without a server."""

    def __init__(self, engine: Engine, threads: int | None) -> None:
        self._engine, self._threads = engine, threads
        self._session = Session(engine, threads=threads)

    def inputs(self) -> list[Port]:
        """With the profile's typical shapes."""
        return [(s.name, s.dtype, s.opt or tuple(_ones(extent) for extent in s.shape)) for s in self._engine.inputs]

    def infer(self, feeds: Arrays) -> Arrays:
        """One run."""
        return self._session.run(feeds)

    def another(self) -> EngineTarget:
        """Another session over the same weights."""
        return EngineTarget(self._engine, self._threads)

    def __enter__(self) -> EngineTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()


def _ones(extent: int | str) -> int:
    return int(evaluate(extent, dict.fromkeys(symbols_of(extent), 1)))


# -- inputs -----------------------------------------------------------------------------------------------------------
def read_inputs(words: Sequence[str], stdin: Callable[[], str]) -> dict[str, Any]:
    """Arrays, and where only a file is known its path, by name; JSON is {"name": nested lists}."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if equals:
            found[name] = Path(file)
        elif word == "-":
            found |= _parsed("standard input", stdin())
        else:
            found |= _several(Path(word))
    return found


def _several(path: Path) -> dict[str, Any]:
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except ValueError as error:
            raise InputError(f"cannot take {path}: {error}") from error
    if path.suffix == ".json":
        return _parsed(str(path), path.read_text())
    raise ConfigError(f"{path} holds one tensor: say whose, NAME={path}")


def _parsed(source: str, text: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f'{source} should hold {{"name": nested lists, …}}')
    return document


def completed(given: Mapping[str, Any], ports: Sequence[Port], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """An array for every input: given, read, or drawn; InputError for a name the model does not have."""
    names = [name for name, _, _ in ports]
    stray = [name for name in (*given, *shapes) if name not in names]
    if stray:
        raise InputError(f"there is no input {stray[0]!r}; the model has {', '.join(names)}")
    generator = np.random.default_rng(0)
    feeds = {}
    for name, dtype, dims in ports:
        shape = shapes.get(name, tuple(max(extent, 1) for extent in dims))
        if name not in given:
            feeds[name] = drawn(generator, dtype, shape)
        elif isinstance(given[name], Path):
            feeds[name] = files.load_array(given[name], dtype, shape)
        else:
            feeds[name] = _converted(name, dtype, given[name])
    return feeds


def drawn(generator: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Any:
    """Something that any model takes: numbers around 0, small integers, a word."""
    if dtype in HOST_ONLY:
        return np.full(shape, "ingot", object)
    kind = numpy_dtype(dtype)
    return (generator.integers(0, 2, shape) if kind.kind in "iub" else generator.standard_normal(shape)).astype(kind)


def _converted(name: str, dtype: str, value: Any) -> Any:
    try:
        return np.array(value, object if dtype in HOST_ONLY else numpy_dtype(dtype))
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"input {name!r} takes {dtype}: {error}") from error


# -- outputs ----------------------------------------------------------------------------------------------------------
def save(path: Path, outputs: Arrays) -> None:
    """A .npz or .json file, or a folder of .npy files."""
    if path.suffix == ".json":
        files.write(path, json.dumps(_as_json(outputs)))
    elif path.suffix == ".npz":
        np.savez(path, allow_pickle=False, **{name: _storable(array) for name, array in outputs.items()})
    else:
        path.mkdir(parents=True, exist_ok=True)
        for name, array in outputs.items():
            np.save(path / f"{name.replace('/', '_')}.npy", _storable(array), allow_pickle=False)


def _storable(array: Any) -> Any:
    return np.array(array.tolist()) if array.dtype == object else array


def _as_json(outputs: Arrays) -> dict[str, Any]:
    return {name: _plain(np.asarray(array).tolist()) for name, array in outputs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def described(outputs: Arrays) -> str:
    """A line an output: its shape, its type, its first elements."""
    lines = []
    for name, array in outputs.items():
        first = ", ".join(str(_plain(item))[:60] for item in np.asarray(array).ravel()[:_SHOWN].tolist())
        dtype = "text" if array.dtype == object else array.dtype.name
        lines.append(f"{name}  {dtype}{list(array.shape)}  {first}{', …' if array.size > _SHOWN else ''}")
    return "\n".join(lines)


# -- load -------------------------------------------------------------------------------------------------------------
def _loaded(target: Target, feeds: Arrays, arguments: argparse.Namespace) -> load.Load:
    count = arguments.concurrency or 64
    others = [target.another() for _ in range(count - 1)]
    asks = [lambda each=each: each.infer(feeds) for each in (target, *others)]
    try:
        if arguments.rate:
            return load.opened(asks, arguments.duration, arguments.rate, not arguments.even)
        return load.closed(asks, arguments.duration)
    finally:
        for each in others:
            each.__exit__()


def _report(result: load.Load, as_json: bool) -> int:
    content = result.as_plain()
    if as_json:
        print(json.dumps(content))
    else:
        offered = f" of {content['offered_per_second']:g} offered" if "offered_per_second" in content else ""
        counts = f"{content['answered']} answered, {content['refused']} refused"
        print(f"{content['per_second']:g} requests/s{offered}: {counts}")
        for name, value in content.get("latency_ms", {}).items():
            print(f"  {name:6} {value:10.3f} ms")
        for reason, number in content["errors"].items():
            print(f"  {number} × {reason}")
    return 0 if content["answered"] else 1
