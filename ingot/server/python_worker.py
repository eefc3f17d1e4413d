"""The process of a model.py: `python -m ingot.server.python_worker ARGUMENTS HANDLE`, one for each instance."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ingot.server import logs, pb_utils
from ingot.server.request import Array, ServerError, invalid
from ingot.server.worker import LONGEST_MESSAGE, Back, serve_lines

FACTS, ANSWERS = "#requests", "#responses"  # object arrays of JSON, one element a request


def tensor_name(number: int, name: str) -> str:
    """What a request's tensor is called on its way; names without # are controls, a row for each request."""
    return f"#{number}:{name}"


class PythonInstance:
    """A TritonPythonModel; each request is handed to it as it came, none is joined with another."""

    def __init__(self, model: Any, decoupled: bool, back: Back) -> None:
        self._model, self._decoupled, self._back = model, decoupled, back

    def run(self, feeds: Mapping[str, Array]) -> Mapping[str, Array]:
        """One `execute`; the inputs are copies, because models keep what they were given."""
        pb_utils.connect(self._back.ask)
        facts = [json.loads(item) for item in feeds[FACTS]]
        if self._decoupled:
            return self._run_decoupled(feeds, facts)
        requests = [
            pb_utils.InferenceRequest(inputs=_inputs(feeds, number), facts=fact) for number, fact in enumerate(facts)
        ]
        return _packed(_checked(self._executed(requests), len(requests)))

    def _run_decoupled(self, feeds: Mapping[str, Array], facts: Sequence[Mapping[str, Any]]) -> Mapping[str, Array]:
        """Until every request has had its last response, from whichever thread."""
        sent = [pb_utils.Sent(number) for number in range(len(facts))]
        requests = [
            pb_utils.InferenceRequest(inputs=_inputs(feeds, number), facts=fact, sender=pb_utils.ResponseSender(one))
            for number, (one, fact) in enumerate(zip(sent, facts, strict=True))
        ]
        try:
            if self._executed(requests) is not None:
                raise TypeError("execute of a decoupled model must return None: its senders answer")
            requests.clear()  # a sender that nobody has any more is at its end
            for one in sent:
                one.over.wait()
        finally:
            for one in sent:
                one.over.set()
        return _packed([pb_utils.InferenceResponse(error=one.abandoned) for one in sent])

    def _executed(self, requests: list[pb_utils.InferenceRequest]) -> Any:
        returned = self._model.execute(requests)
        return asyncio.run(returned) if inspect.iscoroutine(returned) else returned

    def close(self) -> None:
        """Its line has ended; the process may be given another one."""


def _inputs(feeds: Mapping[str, Array], number: int) -> list[pb_utils.Tensor]:
    prefix = tensor_name(number, "")
    own = [(name.removeprefix(prefix), array.copy()) for name, array in feeds.items() if name.startswith(prefix)]
    controls = [(name, array[number : number + 1].copy()) for name, array in feeds.items() if not name.startswith("#")]
    return [pb_utils.Tensor(name, array) for name, array in own + controls]


def _checked(responses: Any, count: int) -> Sequence[pb_utils.InferenceResponse]:
    if not isinstance(responses, list) or len(responses) != count:
        found = f"{len(responses)} of them" if isinstance(responses, list) else type(responses).__name__
        raise TypeError(f"execute must return a list of {count} InferenceResponse, one for each request, not {found}")
    for response in responses:
        if not isinstance(response, pb_utils.InferenceResponse):
            raise TypeError(f"execute must return InferenceResponse objects, not {type(response).__name__}")
    return responses


def _packed(responses: Sequence[pb_utils.InferenceResponse]) -> Mapping[str, Array]:
    answers = np.empty(len(responses), object)
    outputs: dict[str, Array] = {ANSWERS: answers}
    for number, response in enumerate(responses):
        error = response.error()
        answers[number] = json.dumps({"error": error.message(), "code": error.code()} if error else {}).encode()
        for tensor in response.output_tensors() if error is None else ():
            outputs[tensor_name(number, tensor.name())] = pb_utils.as_sent(tensor.as_numpy())
    return outputs


# -- loading ----------------------------------------------------------------------------------------------------------
def load_class(file: Path) -> Any:
    """TritonPythonModel of a model.py, which may import what lies beside it."""
    sys.dont_write_bytecode = True  # repositories may be read-only, and are not ours
    sys.modules["triton_python_backend_utils"] = pb_utils
    sys.path[:0] = [str(file.parent), str(file.parent.parent)]
    pb_utils.place(file.parent)
    spec = importlib.util.spec_from_file_location("model", file)
    if spec is None or spec.loader is None:
        raise invalid(f"{file.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module
    spec.loader.exec_module(module)
    found = getattr(module, "TritonPythonModel", None)
    if found is None or not hasattr(found, "execute"):
        raise invalid(f"{file.name} needs a class TritonPythonModel with a method execute")
    return found


def loaded(file: Path, arguments: Mapping[str, str]) -> Any:
    """A model that has been initialised."""
    model = load_class(file)()
    if hasattr(model, "initialize"):
        model.initialize(dict(arguments))
    return model


def completed(file: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration as the model's own `auto_complete_config` completes it."""
    kind = load_class(file)
    if not hasattr(kind, "auto_complete_config"):
        return config
    result = kind.auto_complete_config(pb_utils.ModelConfig(config))
    if not isinstance(result, pb_utils.ModelConfig):
        raise invalid(f"auto_complete_config must return the configuration, not {type(result).__name__}")
    return result.as_dict()


def reason_of(error: BaseException) -> str:
    """What went wrong in a model's own code, and where: its last line of the traceback."""
    if isinstance(error, ServerError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def serve(arguments: Mapping[str, str], control: socket.socket) -> None:
    """Load the model, say so, and run what the front sends until it is gone."""
    file = Path(arguments["file"])
    try:
        if "complete" in arguments:
            config = completed(file, json.loads(arguments["model_config"]))
            control.send(b"config " + json.dumps(config).encode())
            return
        model = loaded(file, {name: arguments[name] for name in arguments if name != "file"})
    except BaseException as error:  # noqa: BLE001 - whatever a model's file does, SystemExit too, is told to the front
        control.send(reason_of(error).encode()[:LONGEST_MESSAGE])
        return
    control.send(b"ready")
    config = json.loads(arguments["model_config"])
    decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
    serve_lines(control, lambda back: PythonInstance(model, decoupled, back))
    if hasattr(model, "finalize"):
        model.finalize()


def main(arguments: list[str]) -> None:
    """JSON of the arguments, file descriptor of the control line."""
    given, handle = arguments
    os.set_inheritable(int(handle), False)
    words = json.loads(given)
    form, verbose = words.pop("log").split()
    logs.configure(form, verbose == "1")
    serve(words, socket.socket(fileno=int(handle)))


if __name__ == "__main__":
    main(sys.argv[1:])
