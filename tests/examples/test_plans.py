"""The plans of the example models are golden texts: a refactor must not move them.

A change that is meant: `python -m tests.examples.test_plans` writes them anew, and the difference is read before it is
committed. Nothing is timed (level 0) and the instruction set is fixed, so that every machine makes the same plan.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

import ingot
from ingot.plan.plan import Plan, Step, Value, steps_of

ROOT = Path(__file__).parent.parent.parent
GOLDEN = Path(__file__).parent / "plans"
PROFILES = {
    "digits": ingot.Profile(image=((1, 1, 8, 8), (1, 1, 8, 8), (64, 1, 8, 8))),
    "tagger": ingot.Profile(ids=((1, 1), (1, 16), (16, 64))),
}


def describe_value(value: Value) -> str:
    """name dtype[shape], and the layout where it is not the plain one"""
    shape = ",".join(map(str, value.shape))
    return f"{plain_name(value.name)} {value.dtype}[{shape}]" + f" {value.layout}" * (value.layout != "plain")


def plain_name(name: str) -> str:
    return name.removesuffix(":0")


def describe_step(plan: Plan, step: Step) -> str:
    """operator kernel(tactic): inputs -> outputs with their types; the nodes it came from"""
    inputs = ", ".join(plain_name(plan.values[index].name) for index in step.inputs if index is not None)
    results = ", ".join(describe_value(plan.values[index]) for index in step.outputs)
    tactic = " ".join(f"{key}={value}" for key, value in sorted(step.tactic.items()))
    nodes = " ".join(step.nodes)
    return f"{step.op} {step.kernel}({tactic}): {inputs} -> {results}" + f"; {nodes}" * bool(nodes)


def lines(plan: Plan) -> Iterator[str]:
    for segment in plan.segments:
        steps = steps_of(segment)
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
    text = plan_text(name)
    assert text == (GOLDEN / f"{name}.txt").read_text()
    assert "host" not in text.split()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for example in PROFILES:
        (GOLDEN / f"{example}.txt").write_text(plan_text(example))
