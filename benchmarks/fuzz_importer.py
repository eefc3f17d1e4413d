"""Damaged models for the importer: python -m benchmarks.fuzz_importer [--count 10000] [--seed 0]

Each mutant of a small model is either refused with one IngotError, or accepted; then onnx.checker accepts it too and
shape inference finishes or refuses. Anything else (another exception, a crash, a hang) is a failure. Mutants are tried
in child processes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

import onnx

SEEDS = (
    "test_abs", "test_basic_conv_with_padding", "test_if", "test_loop11", "test_scan9_sum", "test_attention_4d",
    "test_sequence_map_add_2_sequences", "test_lstm_with_peepholes", "test_dequantizelinear_axis", "test_Conv2d",
    "test_optional_get_element_sequence", "test_string_concat", "test_cast_FLOAT_to_INT4", "test_reshape_negative_dim",
    "test_ai_onnx_ml_label_encoder_tensor_mapping", "test_gradient_of_add", "test_operator_basic",
    "test_nonzero_example", "test_strnorm_model_nostopwords_nochangecase", "test_layer_normalization_2d_axis0_expanded",
)  # fmt: skip
SECONDS = 10
BATCH = 100
Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def flip_bits(source: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """One to eight bits turned."""
    changed = bytearray(data)
    for _ in range(source.randint(1, 8)):
        changed[source.randrange(len(changed))] ^= 1 << source.randrange(8)
    return bytes(changed)


def truncate(source: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """The end is missing."""
    return data[: source.randrange(len(data))]


def splice(source: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A stretch replaced by one of another model."""
    donor = source.choice(others)
    at, start = source.randrange(len(data)), source.randrange(len(donor))
    return data[:at] + donor[start : start + source.randint(1, 64)] + data[at + source.randint(0, 64) :]


def noise(source: random.Random, _data: bytes, _others: Sequence[bytes]) -> bytes:
    """Nothing but random bytes."""
    return source.randbytes(source.randint(0, 300))


def rewire(source: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """A name replaced by another of the same model: cycles, duplicates, undefined names."""
    model = onnx.ModelProto.FromString(data)
    fields = [(node.input, i) for node in model.graph.node for i in range(len(node.input))]
    fields += [(node.output, i) for node in model.graph.node for i in range(len(node.output))]
    names = [place[i] for place, i in fields] + ["", "nowhere"]
    for _ in range(source.randint(1, 3)):
        place, index = source.choice(fields)
        place[index] = source.choice(names)
    return model.SerializeToString()


def restructure(source: random.Random, data: bytes, _others: Sequence[bytes]) -> bytes:
    """Nodes dropped, repeated or moved; attributes, inputs or outputs dropped; sizes, types and versions changed."""
    model = onnx.ModelProto.FromString(data)
    for _ in range(source.randint(1, 3)):
        source.choice(_STRUCTURAL)(source, model)
    return model.SerializeToString()


def _shuffle(source: random.Random, model: onnx.ModelProto) -> None:
    nodes = [source.choice(list(model.graph.node)) for _ in range(source.randint(1, len(model.graph.node) + 1))]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)


def _drop_attribute(source: random.Random, model: onnx.ModelProto) -> None:
    node = source.choice(list(model.graph.node) or [onnx.NodeProto()])
    if node.attribute:
        del node.attribute[source.randrange(len(node.attribute))]


def _change_attribute(source: random.Random, model: onnx.ModelProto) -> None:
    node = source.choice(list(model.graph.node) or [onnx.NodeProto()])
    for attribute in node.attribute:
        attribute.i = source.choice([-1, 0, 1, 2, 7, 1 << 40, -(1 << 62)])
        attribute.ints[:] = [source.choice([-1, 0, 1, 3, 1 << 33]) for _ in attribute.ints]


def _change_size(source: random.Random, model: onnx.ModelProto) -> None:
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if source.random() < 0.5:
                dim.dim_value = source.choice([-1, 0, 1, 3, 1 << 31, 1 << 62])
        for tensor in model.graph.initializer:
            tensor.dims[:] = [source.choice([size, -1, 0, 1 << 40]) for size in tensor.dims]


def _change_type(source: random.Random, model: onnx.ModelProto) -> None:
    value = source.choice([*model.graph.input, *model.graph.output, onnx.ValueInfoProto()])
    value.type.tensor_type.elem_type = source.randint(-1, 30)


def _change_version(source: random.Random, model: onnx.ModelProto) -> None:
    for entry in model.opset_import:
        entry.version = source.choice([-1, 0, 1, 5, 6, 7, 13, 28, 29, 1 << 40])
    model.ir_version = source.choice([0, 3, 8, 10, 99])


def _rename_operator(source: random.Random, model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.op_type = source.choice([node.op_type, "Add", "Loop", "NoSuchOperator", ""])
        node.domain = source.choice(["", "", "ai.onnx", "ai.onnx.ml", "com.microsoft", "ingot", "acme"])


_STRUCTURAL = (
    _shuffle, _drop_attribute, _change_attribute, _change_size, _change_type, _change_version, _rename_operator,
)  # fmt: skip
MUTATIONS: tuple[Mutation, ...] = (flip_bits, truncate, splice, noise, rewire, restructure)


@dataclass
class Tally:
    """What became of the mutants."""

    accepted: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


def seeds() -> list[bytes]:
    """Small models of every kind, from the backend suite."""
    from benchmarks.conformance import load_cases

    return [case.model.SerializeToString() for case in load_cases(f"^({'|'.join(SEEDS)})$")]


def mutant(index: int, seed: int, models: Sequence[bytes]) -> bytes:
    """The mutant with this number; the same for the same seed."""
    source = random.Random(f"{seed}.{index}")
    return source.choice(MUTATIONS)(source, source.choice(models), models)


def attempt(data: bytes) -> str:
    """ "accepted", "refused" or what went wrong."""
    from ingot.errors import IngotError
    from ingot.importers.onnx import load
    from ingot.ir import shapes

    accepted = False
    try:
        model = load(data)
        accepted = True
        shapes.infer(model)
    except IngotError as error:
        if not str(error) or "\n" in str(error):
            return f"a message that is not one line: {str(error)!r}"
        if not accepted:
            return "refused"
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return f"{type(error).__name__}: {error}"
    try:
        onnx.checker.check_model(data)
    except onnx.checker.ValidationError as error:
        return f"accepted, but onnx.checker says: {error}"
    return "accepted"


def _serve(connection: Connection, models: Sequence[bytes], seed: int) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while (index := connection.recv()) is not None:
        signal.alarm(SECONDS)  # a hang inside native code ends the process
        answer = attempt(mutant(index, seed, models))
        signal.alarm(0)
        connection.send((index, answer))


def run(count: int, seed: int, models: Sequence[bytes]) -> Tally:
    """Try `count` mutants in one child process, which is replaced when it dies."""
    context = multiprocessing.get_context("fork")
    result = Tally()
    index = 0
    while index < count:
        ours, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(theirs, models, seed), daemon=True)
        child.start()
        theirs.close()
        while index < count:
            try:
                ours.send(index)
                _, answer = ours.recv()
            except (EOFError, BrokenPipeError, ConnectionResetError):
                child.join()
                answer = f"the process ended with code {child.exitcode}"
            _count(result, index, seed, answer)
            index += 1
            if not child.is_alive():
                break
        else:
            ours.send(None)
        child.join()
    return result


def _count(result: Tally, index: int, seed: int, answer: str) -> None:
    if answer == "accepted":
        result.accepted += 1
    elif answer == "refused":
        result.refused += 1
    else:
        result.failures.append(f"mutant {index} of seed {seed}: {answer}")


def fuzz(count: int, seed: int) -> bool:
    """Try mutants, print the failures and a last line; whether there were none."""
    result = run(count, seed, seeds())
    for failure in result.failures[:50]:
        print(failure)
    counts = f"{result.refused:,} refused, {result.accepted:,} accepted, {len(result.failures):,} failed otherwise"
    print(f"importer: {count:,} mutants, {counts}")
    return not result.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return 0 if fuzz(options.count, options.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
