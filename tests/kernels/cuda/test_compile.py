"""Representative kernels compile for sm_80 and sm_90 without a GPU; what they take of a processor is in resources.json.

A change that is meant: `python -m tests.kernels.cuda.test_compile` writes the table anew. Cubins are kept in build/.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ingot.kernels import Candidate
from ingot.kernels.cpu.workers import WorkerPool
from ingot.kernels.cuda.architecture import Architecture, architecture
from ingot.kernels.cuda.standalone import generate
from ingot.kernels.node import Node
from ingot.runtime.cpu import usable_threads
from ingot.tune.price import estimate
from tests.kernels.cuda.cases import CASES
from tests.kernels.cuda.picking import picked

ROOT = Path(__file__).parent.parent.parent.parent
TABLE = Path(__file__).parent / "resources.json"
ARCHITECTURES = ("sm_80", "sm_90")
CHOSEN = (
    "Pointwise 1", "Transpose (0, 2, 3, 1)", "Concat channels", "Gather", "Pad reflect", "Pool max", "Reduce mean",
    "Reduce prod", "Reduce argmax", "Softmax 1 float16", "Softmax long float32", "Norm layer float16",
    "Norm group float32", "Linear 512x768x768 float16", "Linear 8x3072x768 float16", "Linear 51x70x50 float32",
    "Linear int8", "MatMul float16", "Conv ResNet 3x3", "Conv ResNet stem", "Conv depthwise", "Conv groups",
    "Attention of BERT float16", "Attention of a U-Net float16",
    "Attention causal float32", "GatherElements 0", "GatherND batch", "ScatterElements",
    "ScatterND add", "TopK of a vocabulary", "CumSum sum 01", "Range", "RNN gru", "RNN lstm all", "ConvTranspose U-Net",
    "ConvTranspose 4x4", "Conv bytes", "Linear bytes", "Resize cubic",
    "Norm groups and SiLU, of a U-Net", "Conv 80 channels", "LinearNorm BERT",
    "GatedLinear U-Net", "QuantizedProjection 1 of 4 bits", "QuantizedProjection 24 of 4 bits",
    "QuantizedProjection 150 of 8 bits", "Projection 1 of int8", "Projection 24 of int8", "Mixture 1 of halves",
    "Mixture 300 of halves", "Mixture 40 of floats",
)  # fmt: skip
_MORE_REGISTERS = 16  # than in the table, before it is a change that somebody should look at
Resources = dict[str, list[int]]


def cheapest(node: Node, target: Architecture) -> Candidate:
    """What a build without a GPU takes, of the candidates a test picks."""
    return min(picked(node, target, 1000), key=lambda c: estimate(node, c, target))


def resources(name: str) -> Resources:
    """[registers, bytes spilled, bytes of shared memory] of every launch of the chosen cases."""
    target, waiting = architecture(name), {}
    with WorkerPool(usable_threads()) as pool:
        for case in CASES:
            if case.name in CHOSEN:
                node, *_ = case.node()
                units = dict.fromkeys(c.unit for c in generate(node, cheapest(node, target), target).launches)
                for number, unit in enumerate(units):
                    job = pool.submit("ingot.kernels.cuda.compile:compile_unit", unit, name)
                    waiting[f"{case.name} / {number}"] = job
        cubins = {what: job.result() for what, job in waiting.items()}
    return {what: [c.registers, c.spilled, c.shared] for what, c in cubins.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resources(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGOT_CACHE", str(ROOT / "build"))
    wanted, found = json.loads(TABLE.read_text())[name], resources(name)
    assert found.keys() == wanted.keys(), "write the table anew, see above"
    worse = [
        f"{what}: {found[what]} instead of {wanted[what]} (registers, spilled, shared)"
        for what in wanted
        if found[what][0] > wanted[what][0] + _MORE_REGISTERS or found[what][1] > wanted[what][1]
        or found[what][2] > wanted[what][2]
    ]  # fmt: skip
    assert not worse, "\n".join(worse)


if __name__ == "__main__":
    os.environ["INGOT_CACHE"] = str(ROOT / "build")
    TABLE.write_text(json.dumps({name: resources(name) for name in ARCHITECTURES}, indent=1) + "\n")
