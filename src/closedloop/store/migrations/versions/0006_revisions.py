"""By which revision of the deployment row a prediction was answered."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add a column that may be empty; code of earlier revisions runs on, and does not know it."""
    op.add_column("predictions", sa.Column("revision", sa.BigInteger))
