"""What is known of a model's speed: straight lines between what was measured, cold first runs forgotten."""

from ingot.server.latency import LatencyTable


def test_between_and_beyond_what_was_measured() -> None:
    table = LatencyTable()
    assert table("s", 4) == 0
    for rows, ns in ((2, 200), (8, 500)):
        table.observe("s", rows, ns)
    assert [table("s", rows) for rows in (1, 2, 4, 8, 16)] == [200, 200, 300, 500, 1000]
    assert table("other", 2) == 0


def test_the_first_run_of_a_size_does_not_count() -> None:
    table = LatencyTable()
    table.observe("s", 4, 9000)
    assert table("s", 4) == 9000 and not table.warm("s", 4)
    table.observe("s", 4, 1000)
    assert table("s", 4) == 1000 and table.warm("s", 4)
    table.observe("s", 4, 2000)
    assert table("s", 4) == 1200


def test_an_estimate_that_refuses_requests_is_lowered() -> None:
    table = LatencyTable()
    table.observe("s", 1, 1000)
    table.relax("s")
    assert table("s", 1) == 980
