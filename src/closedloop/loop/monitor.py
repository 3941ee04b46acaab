"""One pass of the monitor: read bounded samples, measure, decide, and record check and retraining together."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closedloop.adapters.checks import Check, Checks, Retraining, name_check
from closedloop.adapters.tables import read_table
from closedloop.contract import REFERENCE_FILE, CategoricalFeature, ModelContract, read_contract
from closedloop.core.monitoring import (
    AlarmLimits,
    Baseline,
    PastCheck,
    PastRetraining,
    Policy,
    build_baseline,
    decide,
    measure_outcomes,
    measure_window,
)

if TYPE_CHECKING:
    from closedloop.adapters.samples import Sample, Samples


class Rules(NamedTuple):
    """How much the monitor reads, when a figure is an alarm, and when alarms retrain; the settings say it by name."""

    limits: AlarmLimits = AlarmLimits()
    policy: Policy = Policy()
    window_days_max: int = 31
    sample_rows_max: int = 20_000


def run_check(
    checks: Checks,
    samples: Samples,
    *,
    model_dir: Path,
    version: str,
    as_of: dt.datetime,
    now: dt.datetime,
    rules: Rules,
) -> tuple[Check, Retraining | None]:
    """Check a version as of a UTC midnight; a check of that moment that is there already is returned as it is.

    The window goes on from where the last one that could be judged ended, and so does that of the outcomes: too few
    rows are looked at again, with those that came meanwhile.
    """
    contract = read_contract(model_dir)
    name, limits, rows_max = contract.model_name, rules.limits, rules.sample_rows_max
    before = checks.list_checks(name, until=as_of, limit=500)
    if before and before[0].as_of == as_of:
        return checks.record_check(before[0])
    own = [check for check in before if check.model_version == version]
    baseline = _read_baseline(contract, model_dir)
    last_days = dt.timedelta(days=rules.window_days_max)
    since = max([as_of - last_days, *(check.until for check in own if "drift" in check.evidence)])
    closed = as_of - dt.timedelta(days=contract.horizon_days or 0)
    judged = (dt.datetime.fromisoformat(c.evidence["outcomes_until"]) for c in own if "realised" in c.evidence)
    after = max([closed - last_days, *judged])
    window = read_window(samples, contract, version, since=since, until=as_of, rows_max=rows_max)
    known = samples.sample_outcomes(name, version, after=after, until=closed, rows_max=rows_max)
    evidence: dict[str, Any] = measure_window(baseline, window.rows, limits) | measure_outcomes(
        baseline, known.rows, limits
    )
    if "realised" in evidence:
        evidence["outcomes_until"] = closed.isoformat()
    evidence |= {"window_rows": len(window.rows), "outcome_rows": len(known.rows), "outcomes_after": after.isoformat()}
    retrainings = checks.list_retrainings(name, until=as_of)
    trained_at = dt.datetime.combine(contract.lineage.as_of, dt.time(), dt.UTC)
    decision = decide(
        evidence,
        [PastCheck(check.since, check.evidence) for check in own],
        [PastRetraining(past.as_of, past.state) for past in retrainings],
        rules.policy,
        as_of=as_of,
        since=since,
        model_as_of=trained_at,
    )
    reasons = list(decision.reasons) or _explain_quiet(evidence, limits)
    check = Check(
        check_id=name_check(name, as_of),
        model_name=name,
        model_version=version,
        as_of=as_of,
        since=since,
        until=as_of,
        predictions=window.predictions,
        outcomes=len(known.rows),
        verdict=decision.verdict,
        evidence={**evidence, "reasons": reasons},
        recorded_at=now,
    )
    wanted = decision.verdict == "retrain"
    return checks.record_check(check, _ask(check, reasons, now) if wanted else None)


def read_window(
    samples: Samples, contract: ModelContract, version: str, *, since: dt.datetime, until: dt.datetime, rows_max: int
) -> Sample:
    """The sample of a window with the contract's types."""
    names = contract.feature_names
    found = samples.sample_window(contract.model_name, version, names, since=since, until=until, rows_max=rows_max)
    numeric = {one.name: "float64" for one in contract.features if one.kind == "numeric"}
    return found._replace(rows=found.rows.astype(numeric))


def _read_baseline(contract: ModelContract, model_dir: Path) -> Baseline:
    reference = read_table(model_dir / REFERENCE_FILE, made_by="closedloop train")
    categories: Mapping[str, Any] = {
        one.name: one.categories if isinstance(one, CategoricalFeature) else None for one in contract.features
    }
    return build_baseline(reference, categories, contract.threshold)


def _explain_quiet(evidence: Mapping[str, Any], limits: AlarmLimits) -> list[str]:
    if "drift" in evidence:
        return ["nothing is beyond its limit"]
    few = f"{evidence['window_rows']} customers since the last window, {limits.window_rows_min} are needed"
    return [few, *(["outcomes are as expected"] if "realised" in evidence else [])]


def _ask(check: Check, reasons: list[str], now: dt.datetime) -> Retraining:
    return Retraining(
        trigger_id=check.check_id,
        model_name=check.model_name,
        requested_by="monitor",
        reason="; ".join(reasons),
        as_of=check.as_of,
        updated_at=now,
        check_id=check.check_id,
    )
