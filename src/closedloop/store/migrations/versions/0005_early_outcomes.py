"""Outcomes may come before their prediction, which another replica's spool may still hold: no foreign key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Drop the key; code of earlier revisions runs on, and stores outcomes of predictions that it finds."""
    if op.get_bind().dialect.name != "sqlite":
        op.drop_constraint("outcomes_prediction_id_fkey", "outcomes", type_="foreignkey")
        return
    op.rename_table("outcomes", "outcomes_before")  # SQLite drops no constraint
    op.create_table(
        "outcomes",
        sa.Column("sequence", sa.Integer, primary_key=True),
        sa.Column("prediction_id", sa.Text, nullable=False),
        sa.Column("outcome", sa.SmallInteger, sa.CheckConstraint("outcome IN (0, 1)", "outcome_range"), nullable=False),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reported_by", sa.Text),
        sa.UniqueConstraint("prediction_id", "reported_at", "outcome", name="outcomes_once"),
    )
    columns = "sequence, prediction_id, outcome, reported_at, reported_by"
    op.execute(f"INSERT INTO outcomes ({columns}) SELECT {columns} FROM outcomes_before")  # noqa: S608
    op.drop_table("outcomes_before")
