"""Start a campaign: score the active customers of a date, choose, deal out the arms, record, and write the list."""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import list_value_columns
from closedloop.config.params import Params
from closedloop.core.actions.arms import HELD_OUT, TREATED, choose_customers
from closedloop.core.evaluation.profit import expected_profit, read_kept
from closedloop.errors import ConfigError
from closedloop.files import write_json, write_text
from closedloop.loop.campaigns.ranking import Contracts, RankBy, rank_by_score, rank_by_uplift
from closedloop.records import digest_position
from closedloop.scoring.batch import BatchOptions, score_batch
from closedloop.stages.parts.online import CUSTOMER
from closedloop.stages.refresh import compute_newest
from closedloop.store.actions import Action, Actions, Campaign, name_campaign, require_same
from closedloop.tabular.row_tables import find_table, insert_rows, require_table
from closedloop.tabular.rows import require_file, require_suffix
from closedloop.tabular.tables import read_table, write_table

if TYPE_CHECKING:
    from closedloop.adapters.engines import Engine
    from closedloop.adapters.feast import Features
    from closedloop.contract import ModelContract
    from closedloop.serving.slots.slots import Slot

HORIZON_DAYS = 30  # where the data set's labels have none
TABLE_ROWS = 5_000
LIST_COLUMNS: dict[str, type] = {
    "action_id": str,
    "campaign": str,
    "customer_id": str,
    "place": int,
    "arm": str,
    "probability": float,
    "expected_value": float,
    "effect": float,
    "segment": str,
    "reasons": str,
}


class CampaignRules(NamedTuple):
    """How many customers can be called, which share of the chosen is left alone, and by what they shall be ranked."""

    capacity: int
    holdout: float
    rank_by: RankBy = "score"


def start_campaign(
    actions: Actions,
    params: Params,
    dataset: DatasetConfig,
    rules: CampaignRules,
    *,
    version: str,
    score: Callable[[], pd.DataFrame],
    read_contract: Callable[[str], ModelContract],
    now: dt.datetime,
) -> Campaign:
    """Record the campaign of ``params.as_of``, once; one that is recorded already is returned as it is.

    Customers of a campaign whose horizon is still open are not chosen again: one who was treated is not called twice,
    and one who is held out stays alone.

    Parameters
    ----------
    version
        The model's, by which ``score`` scores.
    score
        Gives what `score_customers` returns; called where nothing is recorded yet.
    read_contract
        Gives the contract of a version of the model, for what was logged by it.

    Raises
    ------
    DataError
        If a campaign of this date has other rules, or nobody is worth an offer.
    """
    name, as_of = dataset.model_name, params.as_of_at
    if stored := actions.find_campaign(name, as_of):
        return require_same(stored, rules.capacity, rules.holdout, rules.rank_by)
    scored, salt = score(), name_campaign(name, as_of)
    busy = actions.list_open_customers(name, as_of)
    candidates = _value(dataset, scored[~scored[CUSTOMER].isin(busy)])
    ranked = rank_by_score(candidates)
    if rules.rank_by == "uplift":
        ranked = rank_by_uplift(candidates, params, dataset.value, actions, Contracts(version, read_contract))
    chosen = choose_customers(ranked.candidates, capacity=rules.capacity, holdout=rules.holdout, salt=salt)
    arms = chosen["arm"].value_counts()
    campaign = Campaign(
        campaign_id=salt,
        model_name=name,
        model_version=version,
        as_of=as_of,
        horizon_days=dataset.horizon_days or HORIZON_DAYS,
        capacity=rules.capacity,
        holdout=rules.holdout,
        salt=salt,
        treated=int(arms.get(TREATED, 0)),
        held_out=int(arms.get(HELD_OUT, 0)),
        offer_cost=dataset.value.offer_cost if dataset.value else None,
        recorded_at=now,
        ranking=ranked.record,
    )
    rows = chosen.reindex(columns=list(Action._fields)).astype(object)
    records = rows.where(rows.notna(), None).itertuples(index=False, name=None)
    return actions.record_campaign(campaign, [Action(*row) for row in records])


def _value(dataset: DatasetConfig, people: pd.DataFrame) -> pd.DataFrame:
    """``expected_value`` of each customer; NaN where the data set's config says no value."""
    if dataset.value is None:
        return people.assign(kept_value=math.nan, expected_value=math.nan)
    expected = expected_profit(people["probability"], people["kept_value"], dataset.value)
    return people.assign(expected_value=expected)


def score_customers(
    params: Params,
    dataset: DatasetConfig,
    engine: Engine,
    features: Features,
    slot: Slot,
    options: BatchOptions,
    *,
    segment: str | None,
    work_dir: Path,
) -> pd.DataFrame:
    """Score the customers who are active at ``params.as_of``, from the tables as they are, with the model of ``slot``.

    Predictions are logged as ``options`` say, under this date: outcomes find them.

    Returns
    -------
    DataFrame
        ``customer_id``, ``prediction_id``, ``probability``, ``reasons`` (str), ``segment`` (the value of that column;
        None) and, with a value in the data set's config, ``kept_value``.

    Raises
    ------
    ConfigError
        If there is no such column.
    GateFailed
        If the data gate or the freshness gate says no.
    """
    folder, newest = compute_newest(params, dataset, features, engine, work_dir=work_dir)
    rows, target = folder / f"{newest:%Y-%m-%d}.parquet", work_dir / "scores.parquet"
    people = read_table(rows, made_by="closedloop features")
    if segment is not None and segment not in people:
        raise ConfigError(f"--segment {segment}: no such column; there are {', '.join(people.columns[2:])}")
    score_batch(str(rows), str(target), slot, options, state_dir=work_dir)
    scores = read_table(target, made_by="closedloop campaign start")
    # no feature under its own name: one may be called as a figure of the list is
    known = people[[CUSTOMER]].assign(segment=None if segment is None else people[segment].astype(object))
    if dataset.value is not None:
        known["kept_value"] = read_kept(dataset.value.kept, people, list_value_columns(params, dataset))
    scored = known.merge(scores.rename(columns={"score": "probability"}), on=CUSTOMER)
    return scored.assign(reasons=_describe_reasons(scored, options.reasons))


def _describe_reasons(scored: pd.DataFrame, count: int) -> pd.Series:
    """The reasons of each row in one text: what speaks most for or against churn, with the feature's value."""
    texts = pd.Series("", index=scored.index)
    for number in range(1, count + 1):
        name, value = scored[f"reason_{number}_feature"], scored[f"reason_{number}_value"].fillna("missing")
        sign = scored[f"reason_{number}_contribution"].map(lambda moved: "raises" if moved > 0 else "lowers")
        told = (sign + " the risk: " + name + " = " + value).fillna("")
        texts += told.where(told == "", ("; " if number > 1 else "") + told)
    return texts


def require_target(target: str) -> None:
    """See that a list can be written there, before anything is recorded.

    Raises
    ------
    ConfigError
        If it is a folder, the name of the file says no format, or the address of the table is none.
    DataError
        If the table has another shape.
    ServiceUnavailable
        If the database cannot be reached.
    """
    if (table := find_table(target)) is None:
        require_file(target)
    else:
        require_table(table, LIST_COLUMNS, "action_id")


def write_list(campaign: Campaign, actions: Sequence[Action], target: str) -> None:
    """Write a recorded campaign's list into a CSV or Parquet file, whole or not at all, or into a table.

    The same campaign gives the same bytes; a table gets the rows that it does not have yet.

    Raises
    ------
    ConfigError
        If the name of the file says no format.
    """
    table = find_table(target)
    frame = pd.DataFrame.from_records([action._asdict() for action in actions], columns=list(Action._fields))
    frame["campaign"] = f"{campaign.as_of:%Y-%m-%d}"
    frame["action_id"] = [digest_position(campaign.campaign_id, name) for name in frame[CUSTOMER]]
    frame = frame[list(LIST_COLUMNS)].astype({"expected_value": "float64", "effect": "float64", "place": "int64"})
    if table is not None:
        values = frame.astype(object).where(frame.notna(), None)
        rows = [dict(zip(LIST_COLUMNS, row, strict=True)) for row in values.itertuples(index=False, name=None)]
        parts = (rows[first : first + TABLE_ROWS] for first in range(0, len(rows), TABLE_ROWS))
        insert_rows(table, LIST_COLUMNS, "action_id", parts)
        return
    path = Path(target)
    if require_suffix(path) == ".parquet":
        write_table(path, frame)
        return
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def write_campaign(campaign: Campaign, actions: Sequence[Action], target: str) -> None:
    """Write the list, and beside a file its record: the campaign's rules, and what ranked its customers (JSON)."""
    write_list(campaign, actions, target)
    if find_table(target) is None:
        known = dataclasses.asdict(campaign) | {"as_of": f"{campaign.as_of:%Y-%m-%d}"}
        told = {name: value for name, value in known.items() if name not in ("salt", "recorded_at")}
        write_json(Path(target).with_suffix(".campaign.json"), told)
