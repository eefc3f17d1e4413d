"""The plans of the example models are golden texts: a refactor must not move them.

A change that is meant: `python -m tests.examples.test_plans` writes them anew, and the difference is read before it is
committed. Nothing is timed (level 0) and the instruction set is fixed, so that every machine makes the same plan.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

import ingot
from ingot.plan.plan import NativeSegment, Plan, Step

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "plans"
PROFILES = {
    "digits": ingot.Profile(image=((1, 1, 8, 8), (1, 1, 8, 8), (64, 1, 8, 8))),
    "tagger": ingot.Profile(ids=((1, 1), (1, 16), (16, 64))),
}


def describe_step(plan: Plan, step: Step) -> str:
    """operator kernel(tactic): inputs -> outputs with their types; nodes"""
    inputs = ", ".join(plan.values[index].name for index in step.inputs if index is not None)
    outputs = [plan.values[index] for index in step.outputs]
    tactic = " ".join(f"{key}={value}" for key, value in sorted(step.tactic.items()))
    results = ", ".join(f"{value.name} {value.dtype}{list(value.shape)} {value.layout}" for value in outputs)
    return f"{step.op} {step.kernel}({tactic}): {inputs} -> {results}; {', '.join(step.nodes)}"


def lines(plan: Plan) -> Iterator[str]:
    for segment in plan.segments:
        steps = segment.steps if isinstance(segment, NativeSegment) else (segment.step,)
        yield segment.kind
        yield from (f"  {describe_step(plan, step)}" for step in steps)
    for memory in plan.memory:
        yield f"arena for {dict(memory.bounds)}: {memory.bytes} bytes, lower bound {memory.lower_bound}"


def plan_text(name: str) -> str:
    config = ingot.BuildConfig(profiles=[PROFILES[name]], level=0, variants=["avx2"], threads=2, verify=False)
    engine = ingot.build(ROOT / "examples" / name / f"{name}.onnx", config)
    return "\n".join(lines(engine.variants[0].plan)) + "\n"


@pytest.mark.parametrize("name", PROFILES)
def test_plan_is_the_golden_one(name: str) -> None:
    assert plan_text(name) == (GOLDEN / f"{name}.txt").read_text()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for example in PROFILES:
        (GOLDEN / f"{example}.txt").write_text(plan_text(example))
