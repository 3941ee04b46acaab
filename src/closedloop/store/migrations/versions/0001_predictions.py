"""Predictions, outcomes, the deployment row and how far each spool has been read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the first tables."""
    _create_predictions()
    op.create_table(
        "outcomes",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column(
            "prediction_id", sa.Text, sa.ForeignKey("predictions.prediction_id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("outcome", sa.SmallInteger, sa.CheckConstraint("outcome IN (0, 1)", "outcome_range"), nullable=False),
        sa.Column("reported_at", TIME, nullable=False),
        sa.UniqueConstraint("prediction_id", "reported_at", "outcome", name="outcomes_once"),
    )
    modes = sa.CheckConstraint("challenger_mode IN ('shadow', 'canary')", "known_mode")
    weights = sa.CheckConstraint("weight >= 0 AND weight <= 1", "weight_range")
    op.create_table(
        "deployments",
        sa.Column("model_name", sa.Text, primary_key=True),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("champion_version", sa.Text, nullable=False),
        sa.Column("challenger_version", sa.Text),
        sa.Column("challenger_mode", sa.Text, modes),
        sa.Column("weight", sa.Double, weights, nullable=False),
        sa.Column("salt", sa.Text, nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.CheckConstraint("(challenger_version IS NULL) = (challenger_mode IS NULL)", "mode_of_challenger"),
    )
    op.create_table(
        "spool_positions",
        sa.Column("model_name", sa.Text, primary_key=True),
        sa.Column("spool", sa.Text, primary_key=True),
        sa.Column("segment", sa.BigInteger, nullable=False),
        sa.Column("offset", sa.BigInteger, nullable=False),
    )


def _create_predictions() -> None:
    scores = sa.CheckConstraint("score >= 0 AND score <= 1", "score_range")
    decisions = sa.CheckConstraint("decision IN (0, 1)", "decision_range")
    op.create_table(
        "predictions",
        sa.Column("prediction_id", sa.Text, primary_key=True),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("model_name", sa.Text, nullable=False),
        sa.Column("model_version", sa.Text, nullable=False),
        sa.Column("variant", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("predicted_at", TIME, nullable=False),
        sa.Column("features", sa.JSON, nullable=False),
        sa.Column("score", sa.Double, scores, nullable=False),
        sa.Column("decision", sa.SmallInteger, decisions, nullable=False),
        sa.Column("latency_ms", sa.Double, nullable=False),
        sa.Column("customer_id", sa.Text),
        sa.Column("features_as_of", TIME),
        sa.Column("answered_id", sa.Text),
        sa.Column("forced", sa.Boolean, nullable=False),
        sa.Column("snapshot_at", TIME, nullable=False),
    )
    op.create_index("predictions_by_time", "predictions", ["model_name", "predicted_at"])
    op.create_index("predictions_by_customer", "predictions", ["customer_id"])
