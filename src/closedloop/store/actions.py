"""Campaigns and their actions in the operations store: who got an offer, and who was left alone."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import sqlalchemy as sa

from closedloop.core.actions.untreated import ACTION_COLUMNS
from closedloop.errors import DataError
from closedloop.records import digest_position
from closedloop.store.database import Database
from closedloop.store.migrations.tables import ACTIONS, CAMPAIGNS, PREDICTIONS
from closedloop.store.samples import select_first_outcome

if TYPE_CHECKING:
    import pandas as pd

CHUNK_ROWS = 5_000
OLDEST, LONGEST = dt.datetime(1970, 1, 1, tzinfo=dt.UTC), dt.timedelta(days=3_650)


@dataclasses.dataclass(frozen=True)
class Campaign:
    """The rules by which the customers of a model and a date were chosen; ``treated`` and ``held_out`` count them.

    ``offer_cost`` is what one offer costs; None where the data set's config does not say it. ``ranking`` says
    what ranked the customers and why (`closedloop.loop.campaigns.ranking`); None in campaigns of an earlier release.
    """

    campaign_id: str
    model_name: str
    model_version: str
    as_of: dt.datetime
    horizon_days: int
    capacity: int
    holdout: float
    salt: str
    treated: int
    held_out: int
    offer_cost: float | None
    recorded_at: dt.datetime
    ranking: dict[str, Any] | None = None

    @property
    def asked(self) -> str:
        """By what its customers were to be ranked."""
        return str((self.ranking or {}).get("asked", "score"))

    @property
    def closes_at(self) -> dt.datetime:
        """When the outcomes of its customers are known."""
        return self.as_of + dt.timedelta(days=self.horizon_days)

    @property
    def weight(self) -> float:
        """For how many of the chosen customers one who is held out stands; NaN: nobody is."""
        return (self.treated + self.held_out) / self.held_out if self.held_out else math.nan


class Action(NamedTuple):
    """The action on one customer of a campaign; its fields are the columns of the list."""

    customer_id: str
    place: int
    arm: str
    probability: float
    expected_value: float | None
    kept_value: float | None
    segment: str | None
    reasons: str
    effect: float | None = None


class Actions:
    """The actions on customers, by campaign."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def record_campaign(self, campaign: Campaign, actions: Sequence[Action]) -> Campaign:
        """Store a campaign with its actions, in one transaction; returns it as it is stored.

        A model has one campaign a date: of several that start at once the first to write is recorded, whole, and the
        others get what it wrote.

        Raises
        ------
        DataError
            If another one with other rules is recorded for this date.
        """
        rows = [{"campaign_id": campaign.campaign_id, **action._asdict()} for action in actions]
        with self.database.begin() as connection:
            insert = self.database.insert_into(CAMPAIGNS).values(dataclasses.asdict(campaign))
            if connection.execute(insert.on_conflict_do_nothing()).rowcount:
                connection.execute(sa.insert(ACTIONS), rows)
            row = connection.execute(_select(campaign.model_name, campaign.as_of)).one()
        return require_same(Campaign(**row._mapping), campaign.capacity, campaign.holdout, campaign.asked)

    def find_campaign(self, model_name: str, as_of: dt.datetime) -> Campaign | None:
        """The campaign of a date; None if there is none."""
        with self.database.begin(write=False) as connection:
            row = connection.execute(_select(model_name, as_of)).one_or_none()
        return None if row is None else Campaign(**row._mapping)

    def list_campaigns(self, model_name: str, *, until: dt.datetime) -> list[Campaign]:
        """Campaigns that started up to and including a time, the newest first."""
        query = sa.select(CAMPAIGNS).where(CAMPAIGNS.c.model_name == model_name, CAMPAIGNS.c.as_of <= until)
        with self.database.begin(write=False) as connection:
            return [Campaign(**row._mapping) for row in connection.execute(query.order_by(CAMPAIGNS.c.as_of.desc()))]

    def list_actions(self, campaign: Campaign) -> list[Action]:
        """Its actions, the best customer first."""
        query = sa.select(*[ACTIONS.c[name] for name in Action._fields])
        with self.database.begin(write=False) as connection:
            mine = query.where(ACTIONS.c.campaign_id == campaign.campaign_id).order_by(ACTIONS.c.place)
            return [Action(*row) for row in connection.execute(mine)]

    def list_open_customers(self, model_name: str, at: dt.datetime) -> set[str]:
        """Customers of campaigns that started before a time and whose horizon is open at it, of either arm."""
        open_ones = [one for one in self.list_campaigns(model_name, until=at) if one.as_of < at < one.closes_at]
        query = sa.select(ACTIONS.c.customer_id).where(
            ACTIONS.c.campaign_id.in_([one.campaign_id for one in open_ones])
        )
        with self.database.begin(write=False) as connection:
            return set(connection.scalars(query))

    def read_touching(
        self,
        model_name: str,
        *,
        until: dt.datetime,
        since: dt.datetime = OLDEST,
        customers: Collection[str] | None = None,
    ) -> pd.DataFrame:
        """Actions whose horizon overlaps that of a snapshot in [since, until], of these customers (None: of all).

        Returns
        -------
        DataFrame
            With `closedloop.core.actions.untreated.ACTION_COLUMNS`.
        """
        import pandas as pd

        found = self.list_campaigns(model_name, until=until + LONGEST)
        near = [one for one in found if _reaches(one, since, until)]
        mine = sa.select(ACTIONS.c.customer_id, ACTIONS.c.campaign_id, ACTIONS.c.arm)
        mine = mine.where(ACTIONS.c.campaign_id.in_([one.campaign_id for one in near]))
        parts = [mine]
        if customers is not None:
            ids = sorted(customers)
            chunks = [ids[first : first + CHUNK_ROWS] for first in range(0, len(ids), CHUNK_ROWS)]
            parts = [mine.where(ACTIONS.c.customer_id.in_(some)) for some in chunks]
        with self.database.begin(write=False) as connection:
            rows = [tuple(row) for part in parts for row in connection.execute(part)] if near else []
        frame = pd.DataFrame.from_records(rows, columns=["customer_id", "campaign_id", "arm"])
        described = {one.campaign_id: (pd.Timestamp(one.as_of), one.horizon_days, one.weight) for one in near}
        told = pd.DataFrame.from_dict(described, orient="index", columns=["acted_at", "horizon_days", "weight"])
        told = told.astype({"acted_at": "datetime64[us, UTC]", "horizon_days": "int64", "weight": "float64"})
        joined = frame.merge(told, left_on="campaign_id", right_index=True)
        return joined[list(ACTION_COLUMNS)].sort_values(["acted_at", "customer_id"], ignore_index=True)

    def read_results(self, campaign: Campaign) -> pd.DataFrame:
        """The outcome of each of its customers, by a prediction at its snapshot; the best customer first.

        Returns
        -------
        DataFrame
            The fields of `Action` but for the reasons, and ``outcome`` (1 churned, 0 stayed, NaN: not known).
        """
        import pandas as pd

        known = (
            sa.select(PREDICTIONS.c.customer_id, sa.func.max(select_first_outcome()).label("outcome"))
            .where(PREDICTIONS.c.model_name == campaign.model_name, PREDICTIONS.c.snapshot_at == campaign.as_of)
            .group_by(PREDICTIONS.c.customer_id)
            .subquery()
        )
        columns = [ACTIONS.c[name] for name in Action._fields if name != "reasons"]
        query = sa.select(*columns, known.c.outcome).outerjoin(known, known.c.customer_id == ACTIONS.c.customer_id)
        mine = query.where(ACTIONS.c.campaign_id == campaign.campaign_id).order_by(ACTIONS.c.place)
        with self.database.begin(write=False) as connection:
            rows = [tuple(row) for row in connection.execute(mine)]
        found = pd.DataFrame.from_records(rows, columns=[*(str(column.name) for column in columns), "outcome"])
        numbers = dict.fromkeys(("probability", "expected_value", "kept_value", "effect", "outcome"), "float64")
        return found.astype(numbers)

    def read_features(
        self,
        model_name: str,
        model_version: str,
        at: dt.datetime,
        names: Sequence[str],
        campaign_id: str | None = None,
        *,
        prediction_ids: Collection[str] | None = None,
    ) -> pd.DataFrame:
        """The features by which customers were scored for a campaign of this date, as they were logged.

        Parameters
        ----------
        names
            Of the features of this version, in its contract's order.
        campaign_id
            Read only the customers whom it chose, by the scores that chose them.
        prediction_ids
            Read only these. The same date may have been scored more than once, on tables that had changed.

        Returns
        -------
        DataFrame
            ``customer_id`` and the features, a row a customer; those whose prediction is no longer in the store are not
            there.
        """
        import pandas as pd

        taken = PREDICTIONS.c.customer_id, PREDICTIONS.c.features, PREDICTIONS.c.prediction_id
        query = sa.select(*taken).where(
            PREDICTIONS.c.model_name == model_name,
            PREDICTIONS.c.snapshot_at == at,
            PREDICTIONS.c.model_version == model_version,
            PREDICTIONS.c.source == "batch",
        )
        if campaign_id is not None:
            same = ACTIONS.c.customer_id == PREDICTIONS.c.customer_id, ACTIONS.c.probability == PREDICTIONS.c.score
            query = query.join(ACTIONS, sa.and_(ACTIONS.c.campaign_id == campaign_id, *same))
        with self.database.begin(write=False) as connection:
            ordered = query.order_by(PREDICTIONS.c.customer_id, PREDICTIONS.c.predicted_at, PREDICTIONS.c.prediction_id)
            rows = [
                (row.customer_id, *row.features)
                for row in connection.execute(ordered)
                if prediction_ids is None or row.prediction_id in prediction_ids
            ]
        return pd.DataFrame.from_records(rows, columns=["customer_id", *names]).drop_duplicates("customer_id")


def _reaches(campaign: Campaign, since: dt.datetime, until: dt.datetime) -> bool:
    reach = dt.timedelta(days=campaign.horizon_days)
    return since - reach < campaign.as_of < until + reach


def name_campaign(model_name: str, as_of: dt.datetime) -> str:
    """The id of a model's campaign of a date: 32 hexadecimal digits, from which its salt follows too."""
    return digest_position("campaign", model_name, as_of.astimezone(dt.UTC).isoformat())


def require_same(stored: Campaign, capacity: int, holdout: float, asked: str) -> Campaign:
    """The campaign, if these are its rules.

    Raises
    ------
    DataError
        If they are not: customers may have been called by its list already.
    """
    if (stored.capacity, stored.holdout, stored.asked) != (capacity, holdout, asked):
        raise DataError(
            f"the campaign of {stored.as_of:%Y-%m-%d} was started with --capacity {stored.capacity} --holdout "
            f"{stored.holdout:g} --rank-by {stored.asked}, found {capacity}, {holdout:g} and {asked}; give the same, "
            "or another date"
        )
    return stored


def _select(model_name: str, as_of: dt.datetime) -> sa.Select[Any]:
    return sa.select(CAMPAIGNS).where(CAMPAIGNS.c.model_name == model_name, CAMPAIGNS.c.as_of == as_of)
