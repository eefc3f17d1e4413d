"""A torch module with example inputs becomes a graph, through torch's own exporter; torch is imported only here."""

from __future__ import annotations

import contextlib
import inspect
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir

from ingot.errors import ConfigError, ImportFailure
from ingot.importers import onnx as onnx_importer

Dynamic = Mapping[str, Mapping[int, str]]


def load(module: Any, example_inputs: Any, dynamic: Dynamic | None = None) -> onnx_ir.Model:
    """Trace `module` on the example (a tensor or a tuple); `dynamic`, as {"x": {0: "N"}}, names the free dimensions."""
    torch = _torch()
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"expected (torch.nn.Module, example inputs), got a {type(module).__name__} first")
    inputs = tuple(example_inputs) if isinstance(example_inputs, list | tuple) else (example_inputs,)
    names = _input_names(module, inputs)
    shapes = _dynamic_shapes(names, dynamic) if dynamic else None
    return onnx_importer.load(_export(torch, module, inputs, names, shapes))


def _torch() -> Any:
    try:
        import onnxscript  # noqa: F401 - torch's exporter needs it
        import torch
    except ImportError as error:
        remedy = "pip install 'ingot[torch]'"
        raise ConfigError(f"importing a torch module needs torch and onnxscript ({error}): {remedy}") from None
    return torch


def _input_names(module: Any, inputs: Sequence[Any]) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    while variadic and len(names) < len(inputs):
        names.append(f"{variadic}_{len(names)}")
    if len(names) < len(inputs):
        raise ConfigError(f"{type(module).__name__}.forward takes {len(names)} inputs, {len(inputs)} were given")
    return names[: len(inputs)]


def _dynamic_shapes(names: Sequence[str], dynamic: Dynamic) -> tuple[dict[int, str] | None, ...]:
    unknown = dynamic.keys() - set(names)
    if unknown:
        raise ConfigError(f"dynamic names {sorted(unknown)}, but the module's inputs are {list(names)}")
    return tuple(dict(dynamic[name]) if name in dynamic else None for name in names)


def _export(torch: Any, module: Any, inputs: tuple[Any, ...], names: list[str], shapes: Any) -> onnx_ir.Model:
    """The exporter's model; its chatter is dropped, its reason is not."""
    training = module.training
    module.eval()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module, inputs, dynamo=True, input_names=names, dynamic_shapes=shapes, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:400]
        raise ImportFailure(f"torch cannot export {type(module).__name__}: {type(cause).__name__}: {reason}") from error
    finally:
        module.train(training)
    return program.model
