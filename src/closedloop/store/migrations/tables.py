"""The tables of the operations store, the same on SQLite and PostgreSQL.

A change here needs a file in ``versions/``, written by hand, that does the same to a store that exists.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

import sqlalchemy as sa


class UtcDateTime(sa.TypeDecorator[dt.datetime]):
    """An instant to the microsecond; SQLite keeps no zone and PostgreSQL gives the session's, so UTC in and out."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, _dialect: sa.Dialect) -> dt.datetime | None:
        """Convert to UTC; a time without a zone is refused."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"a time without a zone: {value}")
        return value if value is None else value.astimezone(dt.UTC)

    def process_result_value(self, value: dt.datetime | None, _dialect: sa.Dialect) -> dt.datetime | None:
        """Say that it is UTC, or convert to it."""
        if value is None:
            return None
        return value.replace(tzinfo=dt.UTC) if value.tzinfo is None else value.astimezone(dt.UTC)


class FeatureValues(sa.TypeDecorator[tuple[float | str | None, ...]]):
    """The values of one row of features, as a JSON list."""

    impl = sa.JSON
    cache_ok = True

    def process_result_value(self, value: list[Any] | None, _dialect: sa.Dialect) -> tuple[Any, ...] | None:
        """Give a tuple, as it went in."""
        return None if value is None else tuple(value)


METADATA = sa.MetaData()

# One row: the oldest revision whose code runs on these tables, for older releases that meet them.
SCHEMA_COMPATIBILITY = sa.Table(
    "schema_compatibility", METADATA, sa.Column("oldest_revision", sa.Text, primary_key=True)
)

VERDICTS = ("none", "watch", "alert", "retrain", "cannot tell")
RETRAINING_STATES = ("requested", "running", "registered", "refused", "failed")

PREDICTIONS = sa.Table(
    "predictions",
    METADATA,
    sa.Column("prediction_id", sa.Text, primary_key=True),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("model_version", sa.Text, nullable=False),
    sa.Column("variant", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("predicted_at", UtcDateTime, nullable=False),
    sa.Column("features", FeatureValues, nullable=False),
    sa.Column("score", sa.Double, sa.CheckConstraint("score >= 0 AND score <= 1", "score_range"), nullable=False),
    sa.Column("decision", sa.SmallInteger, sa.CheckConstraint("decision IN (0, 1)", "decision_range"), nullable=False),
    sa.Column("latency_ms", sa.Double, nullable=False),
    sa.Column("customer_id", sa.Text),
    sa.Column("features_as_of", UtcDateTime),
    sa.Column("answered_id", sa.Text),
    sa.Column("forced", sa.Boolean, nullable=False),
    # from which the horizon counts: features_as_of, else the midnight before predicted_at
    sa.Column("snapshot_at", UtcDateTime, nullable=False),
    sa.Column("client", sa.Text),
    sa.Column("revision", sa.BigInteger),
    # with the id, so that a window is counted and sampled without its rows being read
    sa.Index("predictions_by_time", "model_name", "predicted_at", "prediction_id"),
    sa.Index("predictions_by_snapshot", "model_name", "snapshot_at", "prediction_id"),
    sa.Index("predictions_by_customer", "customer_id"),
)

OUTCOMES = sa.Table(
    "outcomes",
    METADATA,
    # the order of arrival, which is not that of reports: each worker has a spool of its own
    sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    # no foreign key: an outcome may come before its prediction, which a spool may still hold
    sa.Column("prediction_id", sa.Text, nullable=False),
    sa.Column("outcome", sa.SmallInteger, sa.CheckConstraint("outcome IN (0, 1)", "outcome_range"), nullable=False),
    sa.Column("reported_at", UtcDateTime, nullable=False),
    sa.Column("reported_by", sa.Text),
    # the same report, read twice, is one
    sa.UniqueConstraint("prediction_id", "reported_at", "outcome", name="outcomes_once"),
)

DEPLOYMENTS = sa.Table(
    "deployments",
    METADATA,
    sa.Column("model_name", sa.Text, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("champion_version", sa.Text, nullable=False),
    sa.Column("challenger_version", sa.Text),
    sa.Column("challenger_mode", sa.Text, sa.CheckConstraint("challenger_mode IN ('shadow', 'canary')", "known_mode")),
    sa.Column("weight", sa.Double, sa.CheckConstraint("weight >= 0 AND weight <= 1", "weight_range"), nullable=False),
    sa.Column("salt", sa.Text, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("(challenger_version IS NULL) = (challenger_mode IS NULL)", "mode_of_challenger"),
)

SPOOL_POSITIONS = sa.Table(
    "spool_positions",
    METADATA,
    sa.Column("model_name", sa.Text, primary_key=True),
    sa.Column("spool", sa.Text, primary_key=True),
    sa.Column("segment", sa.BigInteger, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),
)

CHECKS = sa.Table(
    "checks",
    METADATA,
    sa.Column("check_id", sa.Text, primary_key=True),
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("model_version", sa.Text, nullable=False),
    # the clock of the pass, and the window [since, until) of predictions that it looked at
    sa.Column("as_of", UtcDateTime, nullable=False),
    sa.Column("since", UtcDateTime, nullable=False),
    sa.Column("until", UtcDateTime, nullable=False),
    sa.Column("predictions", sa.BigInteger, nullable=False),
    sa.Column("outcomes", sa.BigInteger, nullable=False),
    sa.Column("verdict", sa.Text, sa.CheckConstraint(f"verdict IN {VERDICTS}", "known_verdict"), nullable=False),
    sa.Column("evidence", sa.JSON, nullable=False),
    sa.Column("recorded_at", UtcDateTime, nullable=False),
    # monitors that run at the same moment record one
    sa.UniqueConstraint("model_name", "as_of", name="checks_once"),
)

RETRAININGS = sa.Table(
    "retrainings",
    METADATA,
    sa.Column("trigger_id", sa.Text, primary_key=True),
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("check_id", sa.ForeignKey("checks.check_id")),
    sa.Column("requested_by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("as_of", UtcDateTime, nullable=False),
    sa.Column("data_start_date", sa.Date),
    sa.Column("data_end_date", sa.Date),
    sa.Column("state", sa.Text, sa.CheckConstraint(f"state IN {RETRAINING_STATES}", "known_state"), nullable=False),
    sa.Column("model_version", sa.Text),
    sa.Column("detail", sa.Text),
    sa.Column("updated_at", UtcDateTime, nullable=False),
    sa.Index("retrainings_by_time", "model_name", "as_of"),
)

JOURNAL = sa.Table(
    "journal",
    METADATA,
    sa.Column("model_name", sa.Text, primary_key=True),
    sa.Column("sequence", sa.BigInteger, primary_key=True),
    # who did what, when and on what evidence: canonical JSON, as text, since the hash is over its bytes
    sa.Column("entry", sa.Text, nullable=False),
    sa.Column("previous_hash", sa.Text, nullable=False),
    sa.Column("hash", sa.Text, nullable=False, unique=True),
)

# that a release was looked at, which leaves no entry where it holds
RELEASE_PASSES = sa.Table(
    "release_passes",
    METADATA,
    sa.Column("model_name", sa.Text, primary_key=True),
    sa.Column("passed_at", UtcDateTime, nullable=False),
)

ARMS = ("treated", "held_out")

# One of a model and a date: its rules, by which the arms were dealt.
CAMPAIGNS = sa.Table(
    "campaigns",
    METADATA,
    sa.Column("campaign_id", sa.Text, primary_key=True),
    sa.Column("model_name", sa.Text, nullable=False),
    sa.Column("model_version", sa.Text, nullable=False),
    sa.Column("as_of", UtcDateTime, nullable=False),
    sa.Column("horizon_days", sa.Integer, nullable=False),
    sa.Column("capacity", sa.BigInteger, nullable=False),
    sa.Column(
        "holdout", sa.Double, sa.CheckConstraint("holdout >= 0 AND holdout < 1", "holdout_range"), nullable=False
    ),
    sa.Column("salt", sa.Text, nullable=False),
    # how many there were when it began: erasing a customer changes no weight
    sa.Column("treated", sa.BigInteger, nullable=False),
    sa.Column("held_out", sa.BigInteger, nullable=False),
    sa.Column("offer_cost", sa.Double),
    sa.Column("recorded_at", UtcDateTime, nullable=False),
    # what ranked its customers, and why; none in rows of revisions before 0009
    sa.Column("ranking", sa.JSON(none_as_null=True)),
    # two that start at once make one
    sa.UniqueConstraint("model_name", "as_of", name="campaigns_once"),
)

ACTIONS = sa.Table(
    "actions",
    METADATA,
    sa.Column("campaign_id", sa.ForeignKey("campaigns.campaign_id"), primary_key=True),
    sa.Column("customer_id", sa.Text, primary_key=True),
    sa.Column("place", sa.BigInteger, nullable=False),
    sa.Column("arm", sa.Text, sa.CheckConstraint(f"arm IN {ARMS}", "known_arm"), nullable=False),
    sa.Column("probability", sa.Double, nullable=False),
    sa.Column("expected_value", sa.Double),
    sa.Column("kept_value", sa.Double),
    sa.Column("segment", sa.Text),
    sa.Column("reasons", sa.Text, nullable=False),
    sa.Column("effect", sa.Double),
    sa.Index("actions_by_customer", "customer_id"),
)
