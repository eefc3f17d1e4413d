"""What alembic runs: the migrations, on the connection it was given."""

from alembic import context

from ingot.release.store import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
