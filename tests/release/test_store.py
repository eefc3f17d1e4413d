"""The log in SQLite and in a real PostgreSQL: order, races, fences, what cannot be rewritten."""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sql

from ingot.release import events
from ingot.release import store as stores
from ingot.release.lease import Keeper
from ingot.release.rollout import Refused
from ingot.release.spec import ReleaseError, parse
from ingot.release.store import METADATA, Fenced, Store, Unavailable
from ingot.release.windows import Counters, Observation
from tests.release.conftest import PostgresServer

SPEC = parse("""
model: digits
stable: v1
candidates: [v2]
versions: {v1: {endpoints: [{url: 'http://h:1'}]}, v2: {endpoints: [{url: 'http://h:2'}]}}
steps: [{setWeight: 5}, {pause: {}}]
""")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    made = Store(store_url)
    made.migrate()
    yield made
    made.close()


def begun(store: Store) -> None:
    store.submit("digits", events.Applied(SPEC), "ann", 100.0)
    store.submit("digits", events.Ready("v2"), "controller", 101.0)


def test_the_log_says_who_when_what_why(store: Store) -> None:
    begun(store)
    store.submit("digits", events.Abort(), "bob", 102.5)
    assert [(e.sequence, e.time, e.actor, type(e.event).__name__) for e in store.history("digits")] == [
        (1, 100.0, "ann", "Applied"), (2, 101.0, "controller", "Ready"), (3, 102.5, "bob", "Abort"),
    ]  # fmt: skip
    assert store.verify("digits") is None and store.models() == {"digits": 3}


def test_what_changes_nothing_is_not_written(store: Store) -> None:
    begun(store)
    store.submit("digits", events.Tick(), "controller", 500.0)
    store.submit("digits", events.Applied(SPEC), "ann", 501.0)
    assert store.models() == {"digits": 2}
    with pytest.raises(Refused):
        store.submit("digits", events.Retry(), "ann", 502.0)
    with pytest.raises(Refused, match="apply one first"):
        store.submit("unknown", events.Pause(), "ann", 502.0)


def test_a_clock_that_jumps_back_leaves_the_log_in_order(store: Store) -> None:
    begun(store)
    store.submit("digits", events.Abort(), "bob", -5000.0)
    assert [entry.time for entry in store.history("digits")] == [100.0, 101.0, 101.0]
    assert store.verify("digits") is None


def test_writers_race_and_nothing_is_lost(store: Store) -> None:
    begun(store)
    with ThreadPoolExecutor(8) as pool:
        weights = [events.SetWeight({"v2": float(n)}) for n in range(1, 41)]
        list(pool.map(lambda event: store.submit("digits", event, "many", 200.0), weights))
    entries = store.history("digits")
    assert [entry.sequence for entry in entries] == list(range(1, 43))
    assert store.verify("digits") is None


def test_the_log_can_only_grow(store: Store) -> None:
    begun(store)
    for statement in ("update events set actor = 'eve'", "delete from events"):
        with pytest.raises(sql.exc.SQLAlchemyError, match="only grow"), store.engine.begin() as connection:
            connection.execute(sql.text(statement))
    assert store.verify("digits") is None


def test_a_log_rewritten_behind_its_back_is_found(tmp_path: Path) -> None:
    made = Store(f"sqlite:///{tmp_path}/release.db")
    made.migrate()
    begun(made)
    with sqlite3.connect(tmp_path / "release.db") as connection:
        connection.execute("drop trigger events_update")
        connection.execute("update events set actor = 'eve' where sequence = 1")
    assert "entry 1 of 'digits'" in (made.verify("digits") or "")
    made.close()


def test_migrations_give_the_tables_that_the_program_uses(store: Store) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert context.get_current_revision() == stores.HEAD
        assert compare_metadata(context, METADATA) == []


def test_observations_come_in_order_and_go_after_an_hour(store: Store) -> None:
    for moment in (0.0, 10.0, 20.0):
        store.observe({"digits": Observation("g", moment, {"v1": Counters(requests=int(moment))})})
    rows, reached = store.observations("digits")
    assert [row.counters["v1"].requests for row in rows] == [0, 10, 20]
    assert store.observations("digits", reached) == ([], reached)
    store.observe({"digits": Observation("g", 4000.0, {})})
    assert len(store.observations("digits")[0]) == 1


def test_two_controllers_never_both_act(store: Store) -> None:
    """The second waits by its own clock for the first to fall silent; the first then writes nothing more."""
    first, second = Keeper(store, "first", 3.0), Keeper(store, "second", 3.0)
    assert first.hold(0.0) and not second.hold(1000.0)
    assert first.hold(1.5) and not second.hold(1002.0), "it was renewed"
    assert not second.hold(1004.9)
    assert second.hold(1005.1), "three seconds of silence"
    begun(store)
    with pytest.raises(Fenced, match="second is the controller now"):
        store.submit("digits", events.Abort(), "first", 200.0, lease="first")
    assert store.models() == {"digits": 2}
    assert not first.hold(2.6)
    store.submit("digits", events.Abort(), "second", 200.0, lease="second")


def test_a_wall_clock_is_no_part_of_the_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Keeper(store, "first", 3.0), Keeper(store, "second", 3.0)
    assert first.hold(0.0)
    monkeypatch.setattr("time.time", lambda: 1e12)
    assert not second.hold(5.0)


def test_keys_have_roles_and_are_kept_as_digests(store: Store) -> None:
    assert not store.has_keys()
    store.add_key("secret", "ann", "operator")
    assert store.key("secret") == ("ann", "operator") and store.key("other") is None and store.has_keys()
    with store.engine.connect() as connection:
        assert "secret" not in str(connection.execute(sql.text("select * from keys")).all())
    assert store.remove_key("ann") and not store.remove_key("ann")


# -- a database that is locked or gone --------------------------------------------------------------------------------
def test_a_locked_database_says_so(tmp_path: Path) -> None:
    made = Store(f"sqlite:///{tmp_path}/release.db", wait=0.2)
    made.migrate()
    begun(made)
    with sqlite3.connect(tmp_path / "release.db", isolation_level=None) as other:
        other.execute("begin exclusive")
        with pytest.raises(Unavailable, match="locked"):
            made.submit("digits", events.Abort(), "ann")
        other.execute("rollback")
    assert made.submit("digits", events.Abort(), "ann").stage == "aborted"
    made.close()


def test_a_database_that_waits_for_a_writer_is_not_gone(tmp_path: Path) -> None:
    made = Store(f"sqlite:///{tmp_path}/release.db", wait=5.0)
    made.migrate()
    begun(made)
    other = sqlite3.connect(tmp_path / "release.db", isolation_level=None, check_same_thread=False)
    other.execute("begin exclusive")
    threading.Timer(0.2, lambda: other.execute("rollback")).start()
    assert made.submit("digits", events.Abort(), "ann").stage == "aborted"
    other.close()
    made.close()


def test_a_postgresql_that_goes_and_comes_back(postgres: PostgresServer) -> None:
    made = Store(postgres.database(), wait=2.0)
    made.migrate()
    begun(made)
    postgres.stop()
    try:
        with pytest.raises(Unavailable):
            made.submit("digits", events.Abort(), "ann")
    finally:
        postgres.start()
    assert made.submit("digits", events.Abort(), "ann").stage == "aborted"
    assert made.verify("digits") is None
    made.close()


def test_a_url_of_no_database_is_refused() -> None:
    with pytest.raises(ReleaseError, match="no database's URL"):
        Store("release.db")
