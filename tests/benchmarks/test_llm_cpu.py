"""What the comparison with llama.cpp rests on: the checkpoint's size and order, and what its figures are made of."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import llm_cpu, llm_cpu_checkpoint
from ingot.llm.formats import Format


def test_the_model_has_as_many_weights_as_its_name_says() -> None:
    assert 1.0e9 < llm_cpu_checkpoint.parameters() < 1.1e9
    names = [name for name, _, _ in llm_cpu_checkpoint.shapes()]
    assert len(set(names)) == len(names) == 22 * 9 + 3


def test_a_checkpoint_reads_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32}
    monkeypatch.setattr(llm_cpu_checkpoint, "CONFIG", llm_cpu_checkpoint.CONFIG | small | {"num_attention_heads": 2,
                                                                                           "num_key_value_heads": 1})
    llm_cpu_checkpoint.write_checkpoint(tmp_path)
    found = {name: array for name, _, array in llm_cpu_checkpoint.read_checkpoint(tmp_path)}
    bits = llm_cpu_checkpoint.drawn("lm_head.weight", (32, 128))
    assert np.array_equal(found["lm_head.weight"].view(np.uint32) >> 16, bits)
    assert np.array_equal(found["model.norm.weight"], np.ones(128, np.float32))


def test_rows_that_rotate_together_lie_side_by_side() -> None:
    depth = llm_cpu_checkpoint.DEPTH
    rows = np.arange(2 * depth, dtype=np.float32)[:, None]
    paired = llm_cpu_checkpoint._paired(rows)[:, 0]
    assert paired[:4].tolist() == [0, depth // 2, 1, depth // 2 + 1] and paired[depth] == depth


def test_figures() -> None:
    measured = llm_cpu.Measured()
    for ours, theirs in ((0.5, 1.0), (0.4, 1.2), (0.6, 0.9)):
        for work in ("prefill", "decode"):
            measured.add("ingot", work, ours)
            measured.add("llama.cpp", work, theirs)
    measured.bandwidth += [20_000.0, 10_000.0, 30_000.0]
    found = llm_cpu.row("int8", measured, 1.0, 0.25e9)
    assert found["decode tokens/s"] == 48 and found["decode times"] == 2 and found["share of bandwidth"] == 0.6
    assert not llm_cpu.holds(found)
    assert llm_cpu.holds(found | {"prefill times": 3.0, "share of bandwidth": 0.8})
    every = Format("int8", 8, 128, 8, 8)
    assert llm_cpu.bytes_of_matrices(every) == llm_cpu_checkpoint.parameters() * (1 + 2 / 128)
