"""The log of every rollout, append-only, and what is derived from it; SQLite or PostgreSQL by URL.

An event is accepted at a sequence number of its model, once: who loses the race reads the new state and decides again.
Each row carries the digest of all before it, so that a log rewritten behind the store's back is found (`verify`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from ingot.release import events, rollout, windows
from ingot.release.rollout import State
from ingot.release.spec import ReleaseError
from ingot.release.windows import Observation

HEAD = "0001"  # the newest migration
KEPT_SECONDS = 3600.0  # of observations
METADATA = sql.MetaData()
EVENTS = sql.Table(
    "events", METADATA,
    sql.Column("id", sql.Integer, primary_key=True), sql.Column("model", sql.String(64), nullable=False),
    sql.Column("sequence", sql.Integer, nullable=False), sql.Column("time", sql.Float, nullable=False),
    sql.Column("actor", sql.String(128), nullable=False), sql.Column("body", sql.Text, nullable=False),
    sql.Column("digest", sql.String(64), nullable=False), sql.UniqueConstraint("model", "sequence", name="one_order"),
)  # fmt: skip
SNAPSHOTS = sql.Table(
    "snapshots", METADATA,
    sql.Column("model", sql.String(64), primary_key=True), sql.Column("sequence", sql.Integer, nullable=False),
    sql.Column("state", sql.Text, nullable=False),
)  # fmt: skip
OBSERVATIONS = sql.Table(
    "observations", METADATA,
    sql.Column("id", sql.Integer, primary_key=True), sql.Column("model", sql.String(64), nullable=False),
    sql.Column("time", sql.Float, nullable=False), sql.Column("body", sql.Text, nullable=False),
    sql.Index("observations_by_model", "model", "id"),
)  # fmt: skip
LEASES = sql.Table(
    "leases", METADATA,
    sql.Column("name", sql.String(64), primary_key=True), sql.Column("holder", sql.String(64), nullable=False),
    sql.Column("beat", sql.Integer, nullable=False),
)  # fmt: skip
KEYS = sql.Table(
    "keys", METADATA,
    sql.Column("digest", sql.String(64), primary_key=True), sql.Column("name", sql.String(64), nullable=False),
    sql.Column("role", sql.String(16), nullable=False),
)  # fmt: skip
CURSORS = sql.Table(
    "cursors", METADATA,
    sql.Column("name", sql.String(256), primary_key=True), sql.Column("position", sql.Integer, nullable=False),
)  # fmt: skip


class Unavailable(ReleaseError):
    """The database is locked or gone."""


class Conflict(ReleaseError):
    """Another writer was first."""


class Fenced(ReleaseError):
    """The lease has another holder by now: what this one wanted to write was not written."""


@dataclass(frozen=True)
class Entry:
    """One row of the log."""

    id: int
    model: str
    sequence: int
    time: float
    actor: str
    event: events.Event
    digest: str


@dataclass(frozen=True)
class Lease:
    """Who may act, and how often it has said so."""

    holder: str
    beat: int


class Store:
    """Safe for several threads; every method is one transaction."""

    def __init__(self, url: str, wait: float = 5.0) -> None:
        self.url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        lite = self.url.startswith("sqlite")
        arguments: dict[str, Any] = {"timeout": wait} if lite else {"connect_timeout": max(2, int(wait))}
        try:
            self.engine = sql.create_engine(self.url, connect_args=arguments, pool_pre_ping=not lite)
        except (SQLAlchemyError, ImportError) as error:
            raise ReleaseError(f"--store {url!r} is no database's URL: {error}") from error
        if lite:
            sql.event.listen(self.engine, "connect", _prepare_sqlite)
            sql.event.listen(self.engine, "begin", _begin_sqlite)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _transaction(self, write: bool = False) -> Iterator[Any]:
        try:
            with self.engine.connect().execution_options(write=write) as connection, connection.begin():
                yield connection
        except IntegrityError as error:
            raise Conflict(f"another writer was first: {error.orig}") from error
        except SQLAlchemyError as error:
            raise Unavailable(f"the store {self._shown} does not answer: {_first_line(error)}") from error

    @property
    def _shown(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    def migrate(self) -> None:
        """Bring the tables to the newest form; nothing to do is quick."""
        from ingot.release.migrations import upgrade

        with self._transaction() as connection:
            version = sql.inspect(connection).has_table("alembic_version")
            current = (
                connection.execute(sql.text("select version_num from alembic_version")).scalar() if version else None
            )
        if current != HEAD:
            with self._transaction(write=True) as connection:
                upgrade(connection)

    # -- the log ------------------------------------------------------------------------------------------------------
    def load(self, model: str) -> tuple[State | None, int]:
        """The state and its sequence number; (None, 0) for a model without rollouts."""
        with self._transaction() as connection:
            return _load(connection, model)

    def models(self) -> dict[str, int]:
        """model => newest sequence number"""
        with self._transaction() as connection:
            rows = connection.execute(sql.select(SNAPSHOTS.c.model, SNAPSHOTS.c.sequence).order_by(SNAPSHOTS.c.model))
            return {row.model: row.sequence for row in rows}

    def states(self, known: Mapping[str, int]) -> dict[str, tuple[int, str]]:
        """model => (sequence, state as text) of those that are not as known"""
        with self._transaction() as connection:
            rows = connection.execute(sql.select(SNAPSHOTS.c.model, SNAPSHOTS.c.sequence)).all()
            changed = [row.model for row in rows if known.get(row.model) != row.sequence]
            if not changed:
                return {}
            rows = connection.execute(sql.select(SNAPSHOTS).where(SNAPSHOTS.c.model.in_(changed)))
            return {row.model: (row.sequence, row.state) for row in rows}

    def submit(
        self, model: str, event: events.Event, actor: str, now: float | None = None, lease: str | None = None
    ) -> State:
        """Apply an event to the newest state and append it; nothing is appended if it changes nothing. Refused if it
        is not legal, Fenced if `lease` is not held (any more) by this holder."""
        now = time.time() if now is None else now
        for _ in range(50):
            with contextlib.suppress(Conflict), self._transaction(write=True) as connection:
                return _submitted(connection, model, event, actor, now, lease)
        raise Unavailable(f"fifty writers in a row were quicker at {model!r}")

    def history(self, model: str, after: int = 0, most: int = 1000) -> list[Entry]:
        """Entries in order, from a sequence number on."""
        query = sql.select(EVENTS).where(EVENTS.c.model == model, EVENTS.c.sequence > after)
        with self._transaction() as connection:
            return [_entry(row) for row in connection.execute(query.order_by(EVENTS.c.sequence).limit(most))]

    def since(self, position: int, most: int = 100) -> list[Entry]:
        """Entries of all models after a row, for notifications."""
        with self._transaction() as connection:
            rows = connection.execute(
                sql.select(EVENTS).where(EVENTS.c.id > position).order_by(EVENTS.c.id).limit(most)
            )
            return [_entry(row) for row in rows]

    def verify(self, model: str) -> str | None:
        """What is wrong with a model's log: a digest that does not follow, or a snapshot that replay does not give."""
        digest, state, sequence, after = "", None, 0, 0
        while entries := self.history(model, after):
            for entry in entries:
                body = events.encode(entry.event)
                digest = _digest(digest, model, entry.sequence, entry.time, entry.actor, body)
                if entry.sequence != sequence + 1 or digest != entry.digest:
                    return f"entry {entry.sequence} of {model!r} does not follow from those before it"
                sequence, (state, _) = entry.sequence, rollout.advance(state, entry.event, entry.time)
            after = sequence
        stored, at = self.load(model)
        return None if (stored, at) == (state, sequence) else f"the snapshot of {model!r} is not what its log says"

    # -- observations -------------------------------------------------------------------------------------------------
    def observe(self, rows: Mapping[str, Observation]) -> None:
        """One observation for each model, and no longer those an hour old."""
        if not rows:
            return
        values = [{"model": m, "time": o.time, "body": windows.encode(o)} for m, o in rows.items()]
        oldest = max(o.time for o in rows.values()) - KEPT_SECONDS
        with self._transaction(write=True) as connection:
            connection.execute(sql.insert(OBSERVATIONS), values)
            connection.execute(sql.delete(OBSERVATIONS).where(OBSERVATIONS.c.time < oldest))

    def observations(self, model: str, after: int = 0, most: int = 20_000) -> tuple[list[Observation], int]:
        """The newest after a row, and the row they reach to."""
        query = sql.select(OBSERVATIONS.c.id, OBSERVATIONS.c.body)
        query = query.where(OBSERVATIONS.c.model == model, OBSERVATIONS.c.id > after)
        with self._transaction() as connection:
            rows = connection.execute(query.order_by(OBSERVATIONS.c.id.desc()).limit(most)).all()[::-1]
        return [windows.decode(row.body) for row in rows], (rows[-1].id if rows else after)

    # -- lease, cursors, keys -----------------------------------------------------------------------------------------
    def lease(self, name: str) -> Lease | None:
        """Who holds it."""
        with self._transaction() as connection:
            row = connection.execute(sql.select(LEASES).where(LEASES.c.name == name)).first()
            return Lease(row.holder, row.beat) if row is not None else None

    def beat(self, name: str, holder: str, seen: Lease | None) -> bool:
        """Take the lease, or keep it, if it still is as it was seen."""
        with contextlib.suppress(Conflict), self._transaction(write=True) as connection:
            if seen is None:
                connection.execute(sql.insert(LEASES).values(name=name, holder=holder, beat=1))
                return True
            same = sql.and_(LEASES.c.name == name, LEASES.c.holder == seen.holder, LEASES.c.beat == seen.beat)
            done = connection.execute(sql.update(LEASES).where(same).values(holder=holder, beat=seen.beat + 1))
            return bool(done.rowcount == 1)
        return False

    def cursor(self, name: str) -> int:
        """How far somebody has read the log."""
        with self._transaction() as connection:
            return connection.execute(sql.select(CURSORS.c.position).where(CURSORS.c.name == name)).scalar() or 0

    def move_cursor(self, name: str, position: int) -> None:
        """It has read so far."""
        with self._transaction(write=True) as connection:
            done = connection.execute(sql.update(CURSORS).where(CURSORS.c.name == name).values(position=position))
            if not done.rowcount:
                connection.execute(sql.insert(CURSORS).values(name=name, position=position))

    def add_key(self, key: str, name: str, role: str) -> None:
        """Remember a key's digest."""
        with self._transaction(write=True) as connection:
            connection.execute(sql.insert(KEYS).values(digest=_key_digest(key), name=name, role=role))

    def remove_key(self, name: str) -> bool:
        """Forget a key; whether there was one."""
        with self._transaction(write=True) as connection:
            return bool(connection.execute(sql.delete(KEYS).where(KEYS.c.name == name)).rowcount)

    def key(self, key: str) -> tuple[str, str] | None:
        """(name, role) of a key; None if it is none."""
        with self._transaction() as connection:
            row = connection.execute(sql.select(KEYS).where(KEYS.c.digest == _key_digest(key))).first()
            return (row.name, row.role) if row is not None else None

    def has_keys(self) -> bool:
        """Whether any key was made; until then only this machine's own programs may talk to the API."""
        with self._transaction() as connection:
            return connection.execute(sql.select(KEYS.c.name).limit(1)).first() is not None


# -- inside a transaction ---------------------------------------------------------------------------------------------
def _load(connection: Any, model: str) -> tuple[State | None, int]:
    row = connection.execute(sql.select(SNAPSHOTS).where(SNAPSHOTS.c.model == model)).first()
    return (rollout.decode(row.state), row.sequence) if row is not None else (None, 0)


def _submitted(
    connection: Any, model: str, event: events.Event, actor: str, now: float, lease: str | None
) -> State:  # fmt: skip
    if lease is not None:
        query = sql.select(LEASES.c.holder).where(LEASES.c.name == "controller").with_for_update(read=True)
        holder = connection.execute(query).scalar()
        if holder != lease:
            raise Fenced(f"{holder} is the controller now")
    before, sequence = _load(connection, model)
    state, _ = rollout.advance(before, event, now)
    if state != before:
        _append(connection, model, sequence + 1, event, actor, state, now if before is None else max(now, before.time))
    return state


def _append(
    connection: Any, model: str, sequence: int, event: events.Event, actor: str, state: State, now: float
) -> None:
    same = sql.and_(EVENTS.c.model == model, EVENTS.c.sequence == sequence - 1)
    last = connection.execute(sql.select(EVENTS.c.digest).where(same)).scalar() or ""
    body = events.encode(event)
    row = {"model": model, "sequence": sequence, "time": now, "actor": actor, "body": body}
    digest = _digest(last, model, sequence, now, actor, body)
    connection.execute(sql.insert(EVENTS).values(**row, digest=digest))
    values = {"sequence": sequence, "state": rollout.encode(state)}
    done = connection.execute(sql.update(SNAPSHOTS).where(SNAPSHOTS.c.model == model).values(**values))
    if not done.rowcount:
        connection.execute(sql.insert(SNAPSHOTS).values(model=model, **values))


def _digest(last: str, model: str, sequence: int, now: float, actor: str, body: str) -> str:
    return hashlib.sha256(json.dumps([last, model, sequence, now, actor, body]).encode()).hexdigest()


def _key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _entry(row: Any) -> Entry:
    return Entry(row.id, row.model, row.sequence, row.time, row.actor, events.decode(row.body), row.digest)


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself
    connection.execute("pragma journal_mode=wal")
    connection.execute("pragma synchronous=full")


def _begin_sqlite(connection: Any) -> None:
    write = connection.get_execution_options().get("write")
    connection.exec_driver_sql("begin immediate" if write else "begin")
