"""Campaigns, and the actions that they took or left out, one a customer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Create the tables; code of earlier revisions runs on, and does not know them."""
    op.create_table(
        "campaigns",
        sa.Column("campaign_id", sa.Text, primary_key=True),
        sa.Column("model_name", sa.Text, nullable=False),
        sa.Column("model_version", sa.Text, nullable=False),
        sa.Column("as_of", sa.DateTime(timezone=True), nullable=False),
        sa.Column("horizon_days", sa.Integer, nullable=False),
        sa.Column("capacity", sa.BigInteger, nullable=False),
        sa.Column(
            "holdout", sa.Double, sa.CheckConstraint("holdout >= 0 AND holdout < 1", "holdout_range"), nullable=False
        ),
        sa.Column("salt", sa.Text, nullable=False),
        sa.Column("treated", sa.BigInteger, nullable=False),
        sa.Column("held_out", sa.BigInteger, nullable=False),
        sa.Column("offer_cost", sa.Double),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("model_name", "as_of", name="campaigns_once"),
    )
    op.create_table(
        "actions",
        sa.Column("campaign_id", sa.Text, sa.ForeignKey("campaigns.campaign_id"), primary_key=True),
        sa.Column("customer_id", sa.Text, primary_key=True),
        sa.Column("place", sa.BigInteger, nullable=False),
        sa.Column("arm", sa.Text, sa.CheckConstraint("arm IN ('treated', 'held_out')", "known_arm"), nullable=False),
        sa.Column("probability", sa.Double, nullable=False),
        sa.Column("expected_value", sa.Double),
        sa.Column("kept_value", sa.Double),
        sa.Column("segment", sa.Text),
        sa.Column("reasons", sa.Text, nullable=False),
    )
    op.create_index("actions_by_customer", "actions", ["customer_id"])
