"""Ctrl-C in the middle of a build: nothing half-written, nobody left behind."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def layers(count: int) -> onnx.ModelProto:
    """Linear layers of as many shapes: each is a kernel to be tuned."""
    rng, nodes, weights = np.random.default_rng(0), [], []
    widths = [64 + 8 * i for i in range(count + 1)]
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
        weights.append(numpy_helper.from_array(rng.standard_normal((a, b)).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"], f"layer{i}"))
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [32, widths[i]]) for i in (0, count)]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def alive(pid: int) -> bool:
    """Whether the process is there and not only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/bin/ps").exists() and not Path("/usr/bin/ps").exists(), reason="needs ps")
def test_ctrl_c_during_a_build(tmp_path: Path) -> None:
    onnx.save(layers(40), tmp_path / "layers.onnx")
    target = tmp_path / "layers.engine"
    build = subprocess.Popen(
        [sys.executable, "-m", "ingot", "build", str(tmp_path / "layers.onnx"), "-o", str(target), "--level", "5"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert build.stderr is not None
    told = ""
    while "tune" not in told:
        line = build.stderr.readline()
        assert line, told
        told += line
    deadline = time.monotonic() + 30
    while not (workers := children(build.pid)) and time.monotonic() < deadline and build.poll() is None:
        os.sched_yield()
    os.killpg(build.pid, signal.SIGINT)
    rest = build.communicate(timeout=30)[1]
    assert build.returncode in (130, -signal.SIGINT)  # Python may end itself by the signal: 130 in a shell as well
    assert "interrupted; no file was left half-written" in rest
    assert "Traceback" not in told + rest
    assert not target.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["layers.onnx"]
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers and not [pid for pid in workers if alive(pid)]
