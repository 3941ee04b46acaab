"""retrain: run the training graph on recent data, once for each trigger; a model that passes becomes the challenger."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from closedloop.adapters.kfp import PipelineFailed
from closedloop.config.dataset import DatasetConfig
from closedloop.config.params import Params
from closedloop.core.training.splits import choose_recent_days
from closedloop.errors import ConfigError
from closedloop.store.checks import RetrainingChanged

if TYPE_CHECKING:
    from closedloop.store.checks import Checks, Retraining, RetrainingState

logger = logging.getLogger(__name__)
ENDED = ("registered", "refused")


class Runner(Protocol):
    """The runner of the pipeline: processes on this machine, or a cluster.

    ``is_exclusive``: whether a process that holds the runner can be sure that the earlier holder has died.
    """

    is_exclusive: bool

    def hold(self) -> AbstractContextManager[bool]:
        """Lock this model's retraining on this machine; yield False if another process holds the lock."""

    def run(self, name: str, arguments: Mapping[str, str]) -> None:
        """Run the pipeline to its end, or wait for the open run of this name; raise an error if it fails."""


def name_trigger(params: Params, commit: str) -> str:
    """The id of a retraining by hand; the same commit and parameters give the same id."""
    return f"by-hand-{commit[:12]}-{params.digest_md5()[:12]}"


def plan_retraining(
    params: Params,
    dataset: DatasetConfig,
    *,
    window_days: int | None,
    split: Literal["time", "customer"],
    champion: str | None = None,
    recalibrates_only: bool = False,
) -> Params:
    """The parameters of a retraining: how its rows are split, of which snapshots they are, and whom it recalibrates.

    A date that is missing is filled in from ``window_days``: the last so many days of snapshots with closed labels;
    with None a retraining uses as many as `closedloop run`. A table has its days in place of snapshots; one without a
    time column has nothing to choose from, and keeps its parameters.
    """
    rule = dataset.label
    if champion is not None:
        update = {"recalibrates": int(champion), "recalibrates_only": recalibrates_only}
        model = params.model.model_copy(update=update)
        params = params.model_copy(update={"model": model})
    if rule is None and dataset.columns.time is None:
        return params
    params = params.model_copy(update={"split": params.split.model_copy(update={"by": split})})
    if window_days is None:
        return params
    end = params.as_of - dt.timedelta(days=1)
    start = end - dt.timedelta(days=window_days - 1)
    if rule is not None:
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
    plan: Callable[[Params], Params],
    now: Callable[[], dt.datetime],
) -> tuple[Retraining, bool]:
    """Run a requested retraining; return its record, and whether this call ran it.

    This leaves a retraining alone that has ended or that another process here is running. A retraining that failed, or
    whose process was killed, runs again from its start: the same data and parameters give the same model, which is
    registered once.

    Parameters
    ----------
    params
        The values of params.yaml; ``as_of`` and the dates come from the request.
    plan
        Gives the parameters of a retraining (`plan_retraining`).
    now
        Gives the time that a change of state is recorded with (UTC).

    Raises
    ------
    DataError
        If there is no such request.
    ConfigError
        If the request is for another model.
    ServiceUnavailable
        If the store or the cluster cannot be reached; the retraining stays as it is.
    """
    found = checks.read_retraining(trigger_id)
    if found.model_name != dataset.model_name:
        raise ConfigError(f"retraining {trigger_id} belongs to {found.model_name}, not to {dataset.model_name}")
    with runner.hold() as is_mine:
        found = checks.read_retraining(trigger_id)  # it may have ended while another process held it
        if not is_mine or found.state in ENDED:
            return found, False
        days = {"start_date": found.data_start_date, "end_date": found.data_end_date}
        asked = {"as_of": found.as_of.date(), "data": params.data.model_copy(update=days)}
        planned = plan(params.model_copy(update=asked))
        if found.state != "running" or runner.is_exclusive:
            try:
                found = checks.advance_retraining(found, "running", now=now())
            except RetrainingChanged:
                return checks.read_retraining(trigger_id), False
        first, last = planned.data.start_date or "the first", planned.data.end_date or "the newest closed"
        logger.info("retraining %s on snapshots %s to %s", trigger_id, first, last)
        reason = _run_pipeline(runner, planned, dataset.model_name, trigger_id)
        # the stages record how the retraining ended, unless their process was killed
        return record_end(checks, found.trigger_id, found.updated_at, "failed", now=now(), detail=reason), True


def _run_pipeline(runner: Runner, planned: Params, model_name: str, trigger_id: str) -> str:
    """Run the pipeline; return why it failed, for the case that no stage recorded an end."""
    # all parameters as one text with the retraining's dates, since KFP turns the number 7 into 7.0
    arguments = {"params": planned.model_dump_json(), "model_name": model_name, "trigger_id": trigger_id}
    dates = {
        "as_of": planned.as_of,
        "data_start_date": planned.data.start_date,
        "data_end_date": planned.data.end_date,
    }
    arguments |= {name: str(day) for name, day in dates.items() if day}
    try:
        runner.run(f"{model_name}-{trigger_id}", arguments)
    except PipelineFailed as error:
        return str(error)
    return "the pipeline ended, but no stage recorded a result"


def override_dates(as_of: str | None, data_start_date: str | None, data_end_date: str | None) -> dict[str, Any]:
    """The overrides of params.yaml for those of these dates that are given."""
    days = {"start_date": data_start_date, "end_date": data_end_date}
    overrides: dict[str, Any] = {"data": {name: day for name, day in days.items() if day}}
    return overrides | ({"as_of": as_of} if as_of else {})


def record_end(
    checks: Checks,
    trigger_id: str,
    claimed_at: dt.datetime,
    state: RetrainingState,
    *,
    now: dt.datetime,
    model_version: str | None = None,
    detail: str | None = None,
) -> Retraining:
    """Record how a retraining ended, unless its end is on record or another process claimed it since ``claimed_at``.

    A stage can outlive the process that started it; its end then says nothing about the run that took over.
    """
    found = checks.read_retraining(trigger_id)
    if found.state != "running" or found.updated_at != claimed_at:
        return found
    return checks.advance_retraining(found, state, now=now, model_version=model_version, detail=detail)
