"""Damaged models: refused in one line, or accepted together with onnx.checker."""

from benchmarks.fuzz_importer import MUTATIONS, mutant, run, seeds


def test_damaged_models_neither_crash_nor_hang():
    models = seeds()
    found = run(500, 2026, models)
    assert found.failures == []
    assert found.refused + found.accepted == 500
    assert found.accepted > 10, "mutants that everybody refuses at once test little"


def test_mutants_are_reproducible_and_differ():
    models = [bytes(range(200)) * 3]
    bytewise = [index for index in range(200) if _is_bytewise(index, models)]
    assert len({mutant(index, 7, models) for index in bytewise}) > len(bytewise) // 2
    assert [mutant(i, 7, models) for i in bytewise] == [mutant(i, 7, models) for i in bytewise]


def _is_bytewise(index, models):
    """Whether this mutant is made without parsing the (here meaningless) model."""
    import random

    return MUTATIONS.index(random.Random(f"7.{index}").choice(MUTATIONS)) < 4
