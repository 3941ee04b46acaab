"""retrain: the training graph again, on recent data, once for each trigger; what passes becomes the challenger."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from closedloop.adapters.checks import RetrainingChanged
from closedloop.adapters.kfp import PipelineFailed
from closedloop.core.folds import choose_recent_days
from closedloop.dataset import DatasetConfig
from closedloop.errors import ConfigError
from closedloop.params import Params

if TYPE_CHECKING:
    from closedloop.adapters.checks import Checks, Retraining, State

logger = logging.getLogger(__name__)
ENDED = ("registered", "refused")


class Runner(Protocol):
    """What runs the pipeline: processes here, or a cluster.

    ``is_exclusive``: who holds it knows that whoever ran it before is dead.
    """

    is_exclusive: bool

    def hold(self) -> AbstractContextManager[bool]:
        """Keep others on this machine from retraining this model; False: another process is at it."""

    def run(self, name: str, arguments: Mapping[str, str]) -> None:
        """Run the pipeline to its end, or wait for the run of this name that is going on; an error if it fails."""


def name_trigger(params: Params, commit: str) -> str:
    """The id of a retraining by hand: the same code and parameters are the same retraining."""
    return f"by-hand-{commit[:12]}-{params.digest_md5()[:12]}"


def choose_dates(params: Params, dataset: DatasetConfig, *, window_days: int) -> Params:
    """The parameters with their missing dates: the last ``window_days`` of snapshots with closed labels.

    A data set without a label rule has no snapshots to choose from, and keeps its parameters.
    """
    rule = dataset.label
    if rule is None:
        return params
    start, end = choose_recent_days(
        params.as_of,
        window_days=window_days,
        horizon_days=rule.horizon_days,
        every_days=rule.snapshot_every_days,
        validation_snapshots=params.split.validation_snapshots,
        test_snapshots=params.split.test_snapshots,
    )
    last = params.data.end_date or end
    first = params.data.start_date or last - (end - start)
    return params.model_copy(update={"data": params.data.model_copy(update={"start_date": first, "end_date": last})})


def run_retraining(
    params: Params,
    dataset: DatasetConfig,
    checks: Checks,
    runner: Runner,
    trigger_id: str,
    *,
    window_days: int,
    now: Callable[[], dt.datetime],
) -> tuple[Retraining, bool]:
    """Run a retraining that was requested; returns what became of it, and whether this call ran it.

    One that has ended, or that another process here is running, is left as it is. One that failed or whose process
    was killed runs again from its start: the same data and parameters give the same model, which is registered once.

    Parameters
    ----------
    params
        The values of params.yaml; ``as_of`` and the dates come from the request.
    now
        Gives the time that a change of state is recorded with (UTC).

    Raises
    ------
    DataError
        If there is no such request.
    ConfigError
        If it is another model's.
    ServiceUnavailable
        If the store or the cluster cannot be reached; the retraining stays as it is.
    """
    found = checks.read_retraining(trigger_id)
    if found.model_name != dataset.model_name:
        raise ConfigError(f"retraining {trigger_id} is of {found.model_name}, not of {dataset.model_name}")
    with runner.hold() as is_mine:
        found = checks.read_retraining(trigger_id)  # it may have ended while another process held it
        if not is_mine or found.state in ENDED:
            return found, False
        days = {"start_date": found.data_start_date, "end_date": found.data_end_date}
        asked = {"as_of": found.as_of.date(), "data": params.data.model_copy(update=days)}
        planned = choose_dates(params.model_copy(update=asked), dataset, window_days=window_days)
        if found.state != "running" or runner.is_exclusive:
            try:
                found = checks.advance_retraining(found, "running", now=now())
            except RetrainingChanged:
                return checks.read_retraining(trigger_id), False
        logger.info("retraining %s on snapshots %s to %s", trigger_id, planned.data.start_date, planned.data.end_date)
        # as one text, since KFP makes 7.0 of a number 7; a retraining's dates stand in it
        arguments = {"params": planned.model_dump_json(), "model_name": dataset.model_name, "trigger_id": trigger_id}
        dates = {
            "as_of": planned.as_of,
            "data_start_date": planned.data.start_date,
            "data_end_date": planned.data.end_date,
        }
        arguments |= {name: str(day) for name, day in dates.items() if day}
        reason = "the pipeline ended without a word"
        try:
            runner.run(f"{dataset.model_name}-{trigger_id}", arguments)
        except PipelineFailed as error:
            reason = str(error)
        # the stages record what becomes of it; a process that was killed could not
        return record_end(checks, found.trigger_id, found.updated_at, "failed", now=now(), detail=reason), True


def override_dates(as_of: str | None, data_start_date: str | None, data_end_date: str | None) -> dict[str, Any]:
    """What these dates, where they are given, override in params.yaml."""
    days = {"start_date": data_start_date, "end_date": data_end_date}
    overrides: dict[str, Any] = {"data": {name: day for name, day in days.items() if day}}
    return overrides | ({"as_of": as_of} if as_of else {})


def record_end(
    checks: Checks,
    trigger_id: str,
    claimed_at: dt.datetime,
    state: State,
    *,
    now: dt.datetime,
    model_version: str | None = None,
    detail: str | None = None,
) -> Retraining:
    """Record how a retraining ended, unless somebody has, or has claimed it since ``claimed_at``.

    A stage outlives the process that started it: what becomes of it then says nothing about the run that took over.
    """
    found = checks.read_retraining(trigger_id)
    if found.state != "running" or found.updated_at != claimed_at:
        return found
    return checks.advance_retraining(found, state, now=now, model_version=model_version, detail=detail)
