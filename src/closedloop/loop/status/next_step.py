"""The most urgent next step for a person: a reason, and a command that works as things stand."""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from closedloop.core.release.entries import Deployment

if TYPE_CHECKING:
    from closedloop.adapters.service import ServiceHealth
    from closedloop.loop.status.overview import Overview

CHECK_AGE_MAX = dt.timedelta(hours=26)
RUNNING_MAX = dt.timedelta(hours=2)
LABELLED_MIN = 0.5


class NextStep(NamedTuple):
    """A reason, and the words of a command of ours behind ``closedloop`` ("": there is nothing to type)."""

    text: str
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """The facts of a project that the operations store does not hold.

    Attributes
    ----------
    address
        The service's address.
    service
        What answers there; None: nothing listens.
    is_live
        Whether the data's clock is the wall's, as in production; else the data end at a date of the past.
    registered
        The version that the last run registered; None: there is none.
    stopped_by
        The gates that stopped the last run; "" for none.
    is_replayed
        Whether a replay ran here: its records are of a simulated clock.
    others
        The data sets that have results in workspaces of this project.
    missing
        The commands that cannot run here, each with the extras that it needs.
    """

    address: str
    service: ServiceHealth | None
    is_live: bool = True
    registered: str | None = None
    stopped_by: str = ""
    is_replayed: bool = False
    others: tuple[str, ...] = ()
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)


def find_next_step(view: Overview, around: Surroundings) -> NextStep:
    """The most urgent next step; it names the extra of a command that is not installed."""
    step = _find_step(view, around)
    extra = around.missing.get(step.command.partition(" ")[0])
    return step._replace(text=f"{step.text} (install closedloop[{extra}] first)") if extra else step


def _find_step(view: Overview, around: Surroundings) -> NextStep:
    if around.is_replayed:
        return NextStep("nothing is due: a replay has ended here, and loop.html tells it")
    if view.row is None:
        return _find_first_step(around)
    found = _find_step_of_service(view, view.row, around) or _find_step_of_retraining(view)
    if found is None and view.rollout:
        text = "learn what the release waits for; 'release step' moves it once its evidence is there"
        return NextStep(text, "release check")
    if found is None and view.waiting:
        return NextStep(
            f"release version {view.waiting}, which a retraining registered", f"release start {view.waiting}"
        )
    return found or _find_step_of_evidence(view, view.row, around)


def _find_first_step(around: Surroundings) -> NextStep:
    if around.registered:
        return NextStep("release the version that the last run registered", f"release promote {around.registered}")
    if around.stopped_by:
        return NextStep(f"the last run was stopped by {around.stopped_by}: correct data or parameters, then", "run")
    if around.others:
        name = around.others[0]
        return NextStep(f"nothing ran for this data set yet; {name} has results", f"--dataset {name} status")
    return NextStep("train a first model", "run")


def _find_step_of_service(view: Overview, row: Deployment, around: Surroundings) -> NextStep | None:
    found = around.service
    if found is None:  # a lower level has no service: scores come from files
        return None if "serve" in around.missing else NextStep("start the service", "serve")
    if is_foreign(view, found):
        port = int(around.address.rpartition(":")[2])
        text = f"port {port} is taken ({describe_foreign(found)}): serve on another one"
        return NextStep(text, f"serve --port {port + 1} --metrics-port {port + 2}")
    if not found.model_version:
        text = f"wait until the service has loaded version {row.champion_version}; if it never does, find out why"
        return NextStep(text, "doctor")
    if not is_champion(row, found):
        return NextStep(f"find out why the service does not follow to version {row.champion_version}", "doctor")
    return None


def is_foreign(view: Overview, found: ServiceHealth) -> bool:
    """Whether something else answers than a service of this model; one that names no model may be ours."""
    return found.model_version is None or found.model_name not in ("", view.model_name)


def describe_foreign(found: ServiceHealth) -> str:
    """The name of the service that answers instead."""
    return f"the service of {found.model_name}" if found.model_name else "another program"


def is_champion(row: Deployment, found: ServiceHealth) -> bool:
    """Whether a service answers with the released version: the same number, and where both are known, one digest."""
    released = row.digests.get(row.champion_version)
    same = not (found.folder_sha256 and released) or found.folder_sha256 == released
    return found.model_version == row.champion_version and same


def _find_step_of_retraining(view: Overview) -> NextStep | None:
    last = view.retraining
    if last is None:
        return None
    again = f"retrain --trigger-id {last.trigger_id}"
    if last.state == "failed":  # the same command would fail again while its cause remains
        cause = last.detail or "no cause is on record"
        return NextStep(f"the last retraining failed ({cause}): correct the cause, then", again)
    if last.state == "requested":
        return NextStep("run the retraining that was asked for", again)
    if last.state == "running" and view.now - last.updated_at > RUNNING_MAX:
        return NextStep("take the retraining up again, if its process was ended", again)
    if last.state == "running" and not view.rollout and not view.waiting:
        return NextStep(f"wait for the retraining {last.trigger_id}")
    return None


def _find_step_of_evidence(view: Overview, row: Deployment, around: Surroundings) -> NextStep:
    day, check = view.as_of.date(), view.check
    if view.predicted_at is None and "serve" in around.missing:
        return NextStep(f"nothing is due; to serve the model, install closedloop[{around.missing['serve']}]")
    if view.predicted_at is None:
        text = "no request by customer id was answered yet: "
        if around.is_live:
            return NextStep(f"{text}send some to {around.address}/predict")
        return NextStep(f"{text}send some, or a day of them at once, with a check", "demo")
    if _is_check_due(view, around):
        return NextStep(f"check the model on the predictions before {day}", f"monitor --as-of {day}")
    if check is None and not around.is_live:
        text = f"every prediction is newer than the data, which end before {day}: send a day of requests by their clock"
        return NextStep(text, "demo")
    if check is not None and check.verdict in ("alert", "retrain") and check.model_version == row.champion_version:
        return NextStep("judge the monitor's reasons: docs/runbook.md#modelsuspect")
    if view.labelled.whole and view.labelled.part < LABELLED_MIN * view.labelled.whole:
        if view.horizon_days is None:
            return NextStep(f"report to the service what became of the customers: POST {around.address}/outcomes")
        return NextStep("store the outcomes that have become known", f"outcomes --as-of {day}")
    if check is not None and check.verdict == "cannot tell" and check.model_version == row.champion_version:
        return NextStep("find out why the monitor has too little to judge by: docs/runbook.md#monitorblind")
    return NextStep("nothing is due")


def _is_check_due(view: Overview, around: Surroundings) -> bool:
    """Whether a check of today would see predictions that none saw, and find no check of the same day in its place."""
    check = view.check
    if view.unchecked_at is None or (check is not None and check.as_of.date() >= view.as_of.date()):
        return False
    return check is None or not around.is_live or view.now - check.recorded_at > CHECK_AGE_MAX
