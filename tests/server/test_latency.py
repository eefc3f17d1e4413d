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
    table.observe("s", 4, 1100)
    assert table("s", 4) == 1020


def test_a_stall_says_little_and_a_change_is_followed() -> None:
    table = LatencyTable()
    for ns in (1000, 1000, 90_000):
        table.observe("s", 1, ns)
    assert table("s", 1) == 1040 and table.bound("s", 1) < 1150
    for wanted in (3000, 1000):
        for _ in range(40):
            table.observe("s", 1, wanted)
        assert abs(table("s", 1) - wanted) < 30 and table.bound("s", 1) < 1.1 * wanted


def test_an_estimate_that_refuses_all_requests_is_lowered() -> None:
    table = LatencyTable()
    table.observe("s", 1, 1000)
    table.relax("s")
    assert table("s", 1) == 1000  # something has run
    table.relax("s")
    assert table("s", 1) == 980


def test_the_bound_grows_with_the_deviation_and_shrinks_again() -> None:
    table = LatencyTable()
    for _ in range(20):
        table.observe("s", 1, 1000)
    assert table.bound("s", 1) == 1000
    for ns in (1500, 500) * 20:
        table.observe("s", 1, ns)
    assert 900 < table("s", 1) < 1100 and table.bound("s", 1) > 1.3 * table("s", 1)
    for _ in range(50):
        table.observe("s", 1, 1000)
    assert table.bound("s", 1) < 1100


def test_one_slow_execution_does_not_keep_a_size_from_being_tried() -> None:
    table = LatencyTable()
    table.observe("s", 2, 90_000)  # cold: not believed once a size is known better
    for rows, ns in ((1, 1000), (8, 4000), (4, 80_000), (16, 80_000)):
        table.observe("s", rows, ns)
        table.observe("s", rows, ns)
    assert table("s", 2) <= 4000 and table("s", 4) == 4000
    assert 8000 <= table("s", 16) <= 10_000
