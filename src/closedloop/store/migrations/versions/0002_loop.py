"""Monitoring checks, retraining decisions, and the journal of releases."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the tables; the columns of revision 0001 stay as they are, so that its code runs on."""
    compatibility = op.create_table("schema_compatibility", sa.Column("oldest_revision", sa.Text, primary_key=True))
    op.bulk_insert(compatibility, [{"oldest_revision": "0001"}])
    op.drop_index("predictions_by_time", "predictions")
    op.create_index("predictions_by_time", "predictions", ["model_name", "predicted_at", "prediction_id"])
    op.create_index("predictions_by_snapshot", "predictions", ["model_name", "snapshot_at", "prediction_id"])
    verdicts = sa.CheckConstraint("verdict IN ('none', 'watch', 'alert', 'retrain')", "known_verdict")
    op.create_table(
        "checks",
        sa.Column("check_id", sa.Text, primary_key=True),
        sa.Column("model_name", sa.Text, nullable=False),
        sa.Column("model_version", sa.Text, nullable=False),
        sa.Column("as_of", TIME, nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.Column("until", TIME, nullable=False),
        sa.Column("predictions", sa.BigInteger, nullable=False),
        sa.Column("outcomes", sa.BigInteger, nullable=False),
        sa.Column("verdict", sa.Text, verdicts, nullable=False),
        sa.Column("evidence", sa.JSON, nullable=False),
        sa.Column("recorded_at", TIME, nullable=False),
        sa.UniqueConstraint("model_name", "as_of", name="checks_once"),
    )
    states = sa.CheckConstraint("state IN ('requested', 'running', 'registered', 'refused', 'failed')", "known_state")
    op.create_table(
        "retrainings",
        sa.Column("trigger_id", sa.Text, primary_key=True),
        sa.Column("model_name", sa.Text, nullable=False),
        sa.Column("check_id", sa.Text, sa.ForeignKey("checks.check_id")),
        sa.Column("requested_by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("as_of", TIME, nullable=False),
        sa.Column("data_start_date", sa.Date),
        sa.Column("data_end_date", sa.Date),
        sa.Column("state", sa.Text, states, nullable=False),
        sa.Column("model_version", sa.Text),
        sa.Column("detail", sa.Text),
        sa.Column("updated_at", TIME, nullable=False),
    )
    op.create_index("retrainings_by_time", "retrainings", ["model_name", "as_of"])
    op.create_table(
        "journal",
        sa.Column("model_name", sa.Text, primary_key=True),
        sa.Column("sequence", sa.BigInteger, primary_key=True),
        sa.Column("entry", sa.Text, nullable=False),
        sa.Column("previous_hash", sa.Text, nullable=False),
        sa.Column("hash", sa.Text, nullable=False, unique=True),
    )
