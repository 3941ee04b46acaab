"""Which client asked for a prediction, and who reported an outcome."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
# the label rule's outcomes are of a midnight, to the microsecond; a client's report is of the moment it came
OF_MIDNIGHT = {
    "sqlite": "strftime('%H:%M:%f', reported_at) = '00:00:00.000' AND reported_at NOT GLOB '*.*[1-9]*'",
    "postgresql": "date_trunc('day', reported_at AT TIME ZONE 'UTC') = reported_at AT TIME ZONE 'UTC'",
}


def upgrade() -> None:
    """Add columns that may be empty; code of earlier revisions runs on, and does not know them."""
    op.add_column("predictions", sa.Column("client", sa.Text))
    op.add_column("outcomes", sa.Column("reported_by", sa.Text))
    condition = OF_MIDNIGHT[op.get_bind().dialect.name]
    op.execute(f"UPDATE outcomes SET reported_by = 'label rule' WHERE {condition}")  # noqa: S608 - constants
