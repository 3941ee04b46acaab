"""By what a campaign was ranked and why, and the effect that was expected of an offer to each customer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the columns; code of earlier revisions runs on, and leaves them empty."""
    op.add_column("campaigns", sa.Column("ranking", sa.JSON))
    op.add_column("actions", sa.Column("effect", sa.Double))
