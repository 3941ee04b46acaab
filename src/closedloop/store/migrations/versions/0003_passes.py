"""When a release was last looked at."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table; code of earlier revisions runs on, and does not know it."""
    op.create_table(
        "release_passes",
        sa.Column("model_name", sa.Text, primary_key=True),
        sa.Column("passed_at", sa.DateTime(timezone=True), nullable=False),
    )
