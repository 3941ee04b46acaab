"""A check may say that it cannot tell."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
BEFORE = "verdict IN ('none', 'watch', 'alert', 'retrain')"
AFTER = "verdict IN ('none', 'watch', 'alert', 'retrain', 'cannot tell')"


def upgrade() -> None:
    """Allow the verdict; code of earlier revisions runs on, and writes none of it."""
    connection = op.get_bind()
    if connection.dialect.name == "sqlite":
        _write_table_anew(connection)
        return
    op.drop_constraint("known_verdict", "checks", type_="check")
    op.create_check_constraint("known_verdict", "checks", AFTER)


def _write_table_anew(connection: sa.Connection) -> None:
    """SQLite changes no constraint, and macOS' own refuses to have a table's stored definition edited."""
    run = connection.exec_driver_sql
    definition: str = run("SELECT sql FROM sqlite_master WHERE type = 'table' AND name = 'checks'").scalar_one()
    indexes = run("SELECT sql FROM sqlite_master WHERE type = 'index' AND tbl_name = 'checks' AND sql NOT NULL").all()
    # retrainings refer to checks: they are set aside while there is no such table
    run("CREATE TEMPORARY TABLE held AS SELECT * FROM retrainings")
    run("DELETE FROM retrainings")
    run(definition.replace("CREATE TABLE checks", "CREATE TABLE checks_anew").replace(BEFORE, AFTER))
    run("INSERT INTO checks_anew SELECT * FROM checks")
    run("DROP TABLE checks")
    run("ALTER TABLE checks_anew RENAME TO checks")
    for (index,) in indexes:
        run(index)
    run("INSERT INTO retrainings SELECT * FROM held")
    run("DROP TABLE held")
