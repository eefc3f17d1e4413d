"""The log, what is derived from it, observations, lease, keys; the log can only grow."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None

_REFUSE_SQLITE = """
create trigger events_{0} before {0} on events begin select raise(abort, 'the log can only grow'); end
"""
_REFUSE_POSTGRESQL = """
create or replace function only_grow() returns trigger language plpgsql as
$$ begin raise exception 'the log can only grow'; end $$;
create trigger events_frozen before update or delete or truncate on events execute function only_grow()
"""


def upgrade() -> None:
    """Make the tables."""
    text, number = sql.String(64), sql.Integer
    op.create_table(
        "events", sql.Column("id", number, primary_key=True), sql.Column("model", text, nullable=False),
        sql.Column("sequence", number, nullable=False), sql.Column("time", sql.Float, nullable=False),
        sql.Column("actor", sql.String(128), nullable=False), sql.Column("body", sql.Text, nullable=False),
        sql.Column("digest", text, nullable=False), sql.UniqueConstraint("model", "sequence", name="one_order"),
    )  # fmt: skip
    op.create_table(
        "snapshots", sql.Column("model", text, primary_key=True), sql.Column("sequence", number, nullable=False),
        sql.Column("state", sql.Text, nullable=False),
    )  # fmt: skip
    op.create_table(
        "observations", sql.Column("id", number, primary_key=True), sql.Column("model", text, nullable=False),
        sql.Column("time", sql.Float, nullable=False), sql.Column("body", sql.Text, nullable=False),
    )  # fmt: skip
    op.create_index("observations_by_model", "observations", ["model", "id"])
    op.create_table(
        "leases", sql.Column("name", text, primary_key=True), sql.Column("holder", text, nullable=False),
        sql.Column("beat", number, nullable=False),
    )  # fmt: skip
    op.create_table(
        "keys", sql.Column("digest", text, primary_key=True), sql.Column("name", text, nullable=False),
        sql.Column("role", sql.String(16), nullable=False),
    )  # fmt: skip
    op.create_table(
        "cursors", sql.Column("name", sql.String(256), primary_key=True), sql.Column("position", number, nullable=False)
    )
    freeze()


def freeze() -> None:
    """No row of the log is changed or removed, by whomever."""
    if op.get_bind().dialect.name == "sqlite":
        for action in ("update", "delete"):
            op.execute(_REFUSE_SQLITE.format(action))
    else:
        op.execute(_REFUSE_POSTGRESQL)


def downgrade() -> None:
    """There is nothing before."""
    raise NotImplementedError("this is the first migration")
