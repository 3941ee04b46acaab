"""Which predictions and outcomes statistics count, so that no client steers them."""

from __future__ import annotations

import sqlalchemy as sa

from closedloop.records import LABEL_RULE
from closedloop.store.migrations.tables import OUTCOMES, PREDICTIONS

BY_REQUEST = ("http", "stream")  # the other sources are files, which operators name


def is_counted(table: sa.FromClause = PREDICTIONS, *, sent_features: bool) -> sa.ColumnElement[bool]:
    """Predictions of customers whose features were looked up: a client may send any features under any id.

    ``sent_features``: those that carried their features count too.
    """
    if sent_features:
        return sa.true()
    return sa.or_(table.c.source.not_in(BY_REQUEST), table.c.features_as_of.is_not(None))


def is_ruled(outcomes: sa.FromClause = OUTCOMES) -> sa.ColumnElement[bool]:
    """Outcomes that the data set's events show, rather than a client's report."""
    return outcomes.c.reported_by.is_not_distinct_from(LABEL_RULE)


def order_outcomes(outcomes: sa.FromClause = OUTCOMES) -> tuple[sa.ColumnElement[object], ...]:
    """The label rule's outcome of a prediction first, then the first report, since spools are drained in any order."""
    return sa.case((is_ruled(outcomes), 0), else_=1), outcomes.c.reported_at, outcomes.c.sequence
