"""The store's migrations, run by alembic on a connection that exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def upgrade(connection: Any, revision: str = "head") -> None:
    """Bring the tables to a revision."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
