"""RNN: all three kinds, directions, lengths, states, peepholes, clips, activations; batches that fill no group."""

import numpy as np
import pytest

from ingot.ir.ops_rnn import ACTIVATIONS, GATES
from ingot.kernels import candidates
from ingot.kernels.cpu.isa import AVX2
from tests.kernels.harness import check, node_of
from tests.kernels.symbolic import check_symbolic

CONSTANTS = (1, 2, 3, 7)


def case(kind, steps, batch, inputs, hidden, direction="forward", bias=True, lengths=False, initial=True,
         peephole=False, activations=None, **settings):  # fmt: skip
    """Operands and attributes."""
    random = np.random.default_rng(steps + hidden)
    directions, gates = (2 if direction == "bidirectional" else 1), GATES[kind]

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32) * 0.4

    functions = activations or ACTIVATIONS[kind] * directions
    operands = [
        draw(steps, batch, inputs), draw(directions, gates * hidden, inputs), draw(directions, gates * hidden, hidden),
        draw(directions, 2 * gates * hidden) if bias else None,
        random.integers(0, steps + 1, batch).astype(np.int32) if lengths else None,
        draw(directions, batch, hidden) if initial else None,
        draw(directions, batch, hidden) if initial and kind == "lstm" else None,
        draw(directions, 3 * hidden) if peephole else None,
    ]  # fmt: skip
    stated = {"kind": kind, "direction": direction, "hidden": hidden, "activations": functions}
    return operands, {**stated, "alphas": (0.3,) * len(functions), "betas": (0.4,) * len(functions), **settings}


def run(*sizes, **options):
    operands, attributes = case(*sizes, **options)
    node, expected = node_of("RNN", operands, attributes, constants=CONSTANTS)
    return check(node, operands, expected)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", list(GATES))
def test_kinds_and_directions(kind, direction):
    run(kind, 3, 1, 5, 16, direction=direction)
    run(kind, 4, 5, 8, 20, direction=direction, lengths=True)
    run(kind, 1, 2, 3, 64, direction=direction, bias=False, initial=False)


@pytest.mark.parametrize("kind", list(GATES))
def test_settings(kind):
    run(kind, 4, 3, 6, 9, clip=0.2, linear_before_reset=1, input_forget=1, peephole=kind == "lstm")
    run(kind, 4, 3, 6, 9, direction="bidirectional", linear_before_reset=1, lengths=True, peephole=kind == "lstm")


@pytest.mark.parametrize("batch", [2, 7, 8])
def test_batches(batch):
    assert len({c.tactic["rows"] for c in run("lstm", 3, batch, 4, 33)}) > 1


@pytest.mark.parametrize("name", ["Relu", "Sigmoid", "Affine", "LeakyRelu", "ThresholdedRelu", "ScaledTanh",
                                  "HardSigmoid", "Elu", "Softsign", "Softplus"])  # fmt: skip
def test_activations(name):
    run("rnn", 3, 2, 4, 5, activations=(name,))


@pytest.mark.parametrize("kind", list(GATES))
def test_symbols(kind):
    for steps, batch in ((4, 1), (3, 9)):
        operands, attributes = case(kind, steps, batch, 6, 24, lengths=True)
        shapes = [("T", "B", 6), None, None, None, ("B",), (1, "B", 24), (1, "B", 24) if kind == "lstm" else None, None]
        check_symbolic("RNN", operands, shapes, {"T": steps, "B": batch}, **attributes)


def test_no_steps_keep_the_states():
    run("gru", 0, 2, 4, 5)


def test_weights_that_vary_have_no_kernel():
    operands, attributes = case("lstm", 2, 1, 4, 8)
    node, _ = node_of("RNN", operands, attributes)
    assert not list(candidates(node, "cpu", AVX2))
