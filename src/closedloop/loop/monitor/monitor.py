"""One pass of the monitor: read bounded samples, measure, decide, and record check and retraining together."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closedloop.contract import REFERENCE_FILE, CategoricalFeature, ModelContract, read_contract
from closedloop.core.actions.untreated import describe_untreated, find_untreated
from closedloop.core.evaluation.profit import read_kept, weigh_stake
from closedloop.core.monitoring.evidence import Baseline, build_baseline, measure_outcomes, measure_window
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.monitoring.verdict import (
    Decision,
    PastCheck,
    PastRetraining,
    decide,
    describe_few,
    find_judged_at,
)
from closedloop.store.actions import Actions
from closedloop.store.checks import Check, Checks, Retraining, name_check
from closedloop.store.journal import Journal
from closedloop.tabular.tables import read_table

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.core.evaluation.value import CustomerValue
    from closedloop.serving.slots.slots import Slot
    from closedloop.store.samples import Sample, Samples

OLDEST = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def run_check(
    checks: Checks,
    samples: Samples,
    *,
    slot: Slot,
    as_of: dt.datetime,
    now: dt.datetime,
    policy: MonitoringPolicy,
    worth: ValueSource | None = None,
) -> tuple[Check, Retraining | None]:
    """Check a version as of a UTC midnight; return the recorded check if that moment already has one.

    With the data set's ``worth`` the check also says what is at stake in money.

    The window begins at the end of the last window that had enough rows to judge, and the window of the outcomes does
    the same. So rows that were too few for one check are part of the next.
    """
    model_dir, version = Path(slot.folder), slot.version
    contract = read_contract(model_dir)
    name = contract.model_name
    before = checks.list_checks(name, until=as_of, limit=500)
    if before and before[0].as_of == as_of:
        return checks.record_check(before[0])
    own = [check for check in before if check.model_version == version]
    measured = _measure(samples, contract, model_dir, own, version=version, as_of=as_of, policy=policy, worth=worth)
    retrainings = _recall_retrainings(checks, name, before, as_of)
    decision = _judge(measured, own, retrainings, contract, as_of=as_of, policy=policy)
    reasons = list(decision.reasons) or explain_no_alarm(measured.evidence, policy)
    reasons += describe_untreated(measured.evidence.get("actions", {}))
    check = Check(
        check_id=name_check(name, as_of),
        model_name=name,
        model_version=version,
        as_of=as_of,
        since=measured.since,
        until=as_of,
        predictions=measured.predictions,
        outcomes=measured.evidence["outcome_rows"],
        verdict=decision.verdict,
        evidence={**measured.evidence, "reasons": reasons},
        recorded_at=now,
    )
    return checks.record_check(check, _request(check, reasons, now) if decision.verdict == "retrain" else None)


class ValueSource(NamedTuple):
    """The worth of a kept customer, and the features that it is read from."""

    value: CustomerValue
    columns: tuple[str, ...]


class _Measured(NamedTuple):
    """The basis of a check: the window's start, its number of predictions, and what predictions and outcomes show."""

    since: dt.datetime
    predictions: int
    evidence: dict[str, Any]


def _measure(
    samples: Samples,
    contract: ModelContract,
    model_dir: Path,
    own: Sequence[Check],
    *,
    version: str,
    as_of: dt.datetime,
    policy: MonitoringPolicy,
    worth: ValueSource | None,
) -> _Measured:
    """Measure the predictions and outcomes since the earlier checks of this version (``own``, the newest first)."""
    baseline, rows_max = _read_baseline(contract, model_dir), policy.sample_rows_max
    last_days = dt.timedelta(days=policy.window_days_max)
    since = max([as_of - last_days, *(check.until for check in own if "drift" in check.evidence)])
    closed = as_of - dt.timedelta(days=contract.horizon_days or 0)
    judged = (dt.datetime.fromisoformat(c.evidence["outcomes_until"]) for c in own if "realised" in c.evidence)
    # as many checks as are needed: what was too little to judge is part of the next, however old it is
    after = max(judged, default=OLDEST)
    window = read_window(samples, contract, version, since=since, until=as_of, rows_max=rows_max)
    known, counts = read_outcomes(samples, contract.model_name, version, after=after, until=closed, rows_max=rows_max)
    evidence: dict[str, Any] = measure_window(baseline, window.rows, policy)
    evidence |= measure_outcomes(baseline, known, policy)
    if worth is not None and len(window.rows) and set(worth.columns) <= set(contract.feature_names):
        kept = read_kept(worth.value.kept, window.rows, worth.columns)
        evidence["money"] = weigh_stake(window.rows["score"], kept, worth.value)
    if "realised" in evidence:
        evidence["outcomes_until"] = closed.isoformat()
    evidence |= {"window_rows": len(window.rows), "outcome_rows": len(known), "outcomes_after": after.isoformat()}
    evidence |= {"actions": counts} if counts else {}
    before, horizon_days = [check.evidence for check in own], contract.horizon_days
    evidence["judged_at"] = find_judged_at(evidence, before, as_of=as_of, horizon_days=horizon_days).isoformat()
    return _Measured(since, window.predictions, evidence)


def _judge(
    measured: _Measured,
    own: Sequence[Check],
    retrainings: Sequence[PastRetraining],
    contract: ModelContract,
    *,
    as_of: dt.datetime,
    policy: MonitoringPolicy,
) -> Decision:
    return decide(
        measured.evidence,
        [PastCheck(check.since, check.evidence) for check in own],
        retrainings,
        policy,
        as_of=as_of,
        since=measured.since,
        model_as_of=dt.datetime.combine(contract.lineage.as_of, dt.time(), dt.UTC),
        horizon_days=contract.horizon_days,
    )


def _recall_retrainings(
    checks: Checks, model_name: str, before: Sequence[Check], as_of: dt.datetime
) -> list[PastRetraining]:
    """Earlier retrainings, with what became of their versions and what the checks that asked for them measured."""
    released = Journal(checks.database).list_released(model_name)
    gains = {check.check_id: check.evidence.get("realised", {}).get("gain", {}).get("mean") for check in before}
    return [
        PastRetraining(
            past.as_of,
            past.state,
            past.model_version is None or past.model_version in released,
            gains.get(past.check_id or ""),
            (past.detail or "").startswith("recalibration"),
            past.requested_by == "monitor",
        )
        for past in checks.list_retrainings(model_name, until=as_of)
    ]


def read_window(
    samples: Samples, contract: ModelContract, version: str, *, since: dt.datetime, until: dt.datetime, rows_max: int
) -> Sample:
    """The sample of a window with the contract's types."""
    names = contract.feature_names
    found = samples.sample_window(contract.model_name, version, names, since=since, until=until, rows_max=rows_max)
    numeric = {one.name: "float64" for one in contract.features if one.kind == "numeric"}
    return found._replace(rows=found.rows.astype(numeric))


def read_outcomes(
    samples: Samples, model_name: str, version: str, *, after: dt.datetime, until: dt.datetime, rows_max: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """The sample of known outcomes of untreated customers, and what actions left out of it (`Untreated.tell`).

    A customer who was held out is there as often as there are customers for whom this one stands (``repeats``).
    """
    rows = samples.sample_outcomes(model_name, version, after=after, until=until, rows_max=rows_max).rows
    if rows.empty:
        return rows, {}
    # names are compared as they stand: both sides have them in their one form
    actions = Actions(samples.database).read_touching(
        model_name,
        since=rows["snapshot_at"].min(),
        until=rows["snapshot_at"].max(),
        customers=set(rows["customer_id"].dropna()),
    )
    untreated = find_untreated(rows, actions, time="snapshot_at")
    return untreated.take(rows), untreated.tell()


def _read_baseline(contract: ModelContract, model_dir: Path) -> Baseline:
    reference = read_table(model_dir / REFERENCE_FILE, made_by="closedloop train")
    categories: Mapping[str, Any] = {
        one.name: one.categories if isinstance(one, CategoricalFeature) else None for one in contract.features
    }
    return build_baseline(reference, categories, contract.threshold)


def explain_no_alarm(evidence: Mapping[str, Any], policy: MonitoringPolicy) -> list[str]:
    """Why a check without an alarm says nothing more."""
    if "drift" in evidence:
        return ["nothing is beyond its limit"]
    return [describe_few(evidence, policy)[0], *(["outcomes are as expected"] if "realised" in evidence else [])]


def _request(check: Check, reasons: list[str], now: dt.datetime) -> Retraining:
    return Retraining(
        trigger_id=check.check_id,
        model_name=check.model_name,
        requested_by="monitor",
        reason="; ".join(reasons),
        as_of=check.as_of,
        updated_at=now,
        check_id=check.check_id,
    )
