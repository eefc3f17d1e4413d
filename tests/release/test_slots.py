"""Assignment: the same user stays, the fewest move, hashes fall evenly."""

import collections

from hypothesis import given
from hypothesis import strategies as st

from ingot.release.slots import Assignment, everything, reassigned, slot, weights
from ingot.release.spec import WHOLE


def owners(assignment: Assignment) -> list[str]:
    return [run.version for run in assignment for _ in range(run.start, run.stop)]


def as_weights(cuts: tuple[int, int]) -> dict[str, int]:
    low, high = sorted(cuts)
    return {"v1": low, "v2": high - low, "v3": WHOLE - high}


WEIGHTS = st.tuples(st.integers(0, WHOLE), st.integers(0, WHOLE)).map(as_weights)


@given(st.lists(WEIGHTS, min_size=1, max_size=6))
def test_the_fewest_users_move(course: list[dict[str, int]]) -> None:
    assignment = everything("v1")
    for wanted in course:
        before, have = owners(assignment), weights(assignment)
        assignment = reassigned(assignment, wanted)
        after = owners(assignment)
        moved = sum(a != b for a, b in zip(before, after, strict=True))
        assert moved == sum(max(0, wanted[v] - have.get(v, 0)) for v in wanted)
        assert dict(collections.Counter(after)) == {v: n for v, n in wanted.items() if n}


def test_stickiness_by_version() -> None:
    """flagger #1232, istio #19630: who has the canary keeps it as the weight grows; lowered, only those above
    it move."""
    assignment = everything("v1")
    users = {f"user{n}": slot("salt", f"user{n}") for n in range(3000)}
    before = set[str]()
    for weight in (100, 500, 2500, 5000, WHOLE):
        assignment = reassigned(assignment, {"v2": weight, "v1": WHOLE - weight})
        table = owners(assignment)
        canary = {user for user, place in users.items() if table[place] == "v2"}
        assert before <= canary
        before = canary
    assignment = reassigned(assignment, {"v2": 500, "v1": 9500})
    assert [run.version for run in assignment] == ["v2", "v1"] and assignment[0].stop == 500


def test_the_hash_is_even_and_salted() -> None:
    counts = collections.Counter(slot("a", str(n)) // 1000 for n in range(20_000))
    assert max(counts.values()) < 1.1 * min(counts.values())
    same = sum(slot("a", str(n)) == slot("b", str(n)) for n in range(20_000))
    assert same < 20
    assert slot("salt", "user") == 1632, "the same on every machine: users keep their version over an upgrade"
