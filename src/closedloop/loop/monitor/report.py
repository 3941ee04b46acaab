"""A check's report for people: its verdict, the error of the estimates, and Evidently's figures; kept in MLflow."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closedloop.adapters.evidently import PSI_MAX, write_data_reports, write_outcome_report
from closedloop.adapters.jinja import render_page
from closedloop.adapters.mlflow import MONITOR_TAG
from closedloop.contract import REFERENCE_FILE, read_contract
from closedloop.core.monitoring.shapes import tabulate_shape
from closedloop.extras import explain_missing
from closedloop.files import hold_lock, replace_folder, write_text
from closedloop.loop.monitor.monitor import read_outcomes, read_window
from closedloop.loop.status.status import describe_money
from closedloop.tabular.tables import read_table

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.adapters.mlflow import Tracking
    from closedloop.store.checks import Check
    from closedloop.store.samples import Samples

SHOWN = ("accuracy", "brier", "roc_auc", "churn_rate")
DATA_FILE, ALL_FILE, OUTCOME_FILE, REPORT_FILE = "data.html", "data_all.html", "outcomes.html", "report.html"
CHECKS_SHOWN = 24


def keep_report(
    tracking: Tracking,
    samples: Samples,
    check: Check,
    earlier: Sequence[Check],
    *,
    model_dir: Path,
    folder: Path,
    rows_max: int,
) -> str:
    """Write a recorded check's report to ``folder`` and log it to MLflow, once; return the run's id.

    The samples are drawn in the same way as for the check, so that the next pass can write the report of a pass that
    died. An MLflow run that such a pass left open is continued.

    Raises
    ------
    ConfigError
        If Evidently is not installed; the verdict needs no extra.
    """
    tags = {MONITOR_TAG: check.check_id, "closedloop.model_version": check.model_version}
    with hold_lock(folder.with_name(f".{folder.name}.lock")):
        done = tracking.find_run(check.check_id, MONITOR_TAG, finished=True)
        if done is not None and (folder / REPORT_FILE).exists():
            return done
        try:
            with replace_folder(folder) as beside:
                write_report(beside, samples, check, earlier, model_dir=model_dir, rows_max=rows_max)
        except ModuleNotFoundError as error:
            raise explain_missing(error, "a report") from None
        if done is not None:
            return done
        begun = tracking.find_run(check.check_id, MONITOR_TAG)
        with tracking.start_run(f"monitor {check.as_of:%Y-%m-%d}", run_id=begun, tags=tags) as run_id:
            tracking.set_tags({**tags, "closedloop.monitor_verdict": check.verdict})
            tracking.log_files({"monitoring": folder})
    return run_id


def write_report(
    folder: Path, samples: Samples, check: Check, earlier: Sequence[Check], *, model_dir: Path, rows_max: int
) -> None:
    """Write the pages of a check whose rows are in the operations store."""
    contract, version = read_contract(model_dir), check.model_version
    reference = read_table(model_dir / REFERENCE_FILE, made_by="closedloop train")
    reference = reference.sample(min(len(reference), rows_max), random_state=0)
    window = read_window(samples, contract, version, since=check.since, until=check.until, rows_max=rows_max).rows
    after = dt.datetime.fromisoformat(check.evidence["outcomes_after"])
    closed = check.until - dt.timedelta(days=contract.horizon_days or 0)
    known, _ = read_outcomes(samples, check.model_name, version, after=after, until=closed, rows_max=rows_max)
    features = {one.name: None if one.kind == "numeric" else one.categories for one in contract.features}
    write_pages(folder, check, earlier, Pages(reference, window, known, features, contract.threshold))


class Pages(NamedTuple):
    """The content of a check's pages: its rows, and the features as `build_baseline` takes them."""

    reference: pd.DataFrame
    window: pd.DataFrame
    known: pd.DataFrame
    features: Mapping[str, Sequence[str] | None]
    threshold: float


def write_pages(folder: Path, check: Check, earlier: Sequence[Check], rows: Pages) -> None:
    """Write ``report.html``, and beside it Evidently's pages of the window and of the closed outcomes."""
    reference, window, version = rows.reference, rows.window, check.model_version
    drift = order_drift(check.evidence)
    stability, shapes = dict[str, float](), dict[str, list[dict[str, Any]]]()
    if len(window):
        numeric = [name for name, categories in rows.features.items() if categories is None] + ["score"]
        columns = [*rows.features, "score"]
        first = [*check.evidence.get("drift", {}).get("drifted", ()), "score"]
        stability = write_data_reports(
            folder / DATA_FILE, folder / ALL_FILE, window, reference[columns], numeric=numeric, first=first
        )
        shapes = {name: tabulate_shape(reference[name], window[name]) for name, _ in drift}
    if len(rows.known):
        write_outcome_report(folder / OUTCOME_FILE, rows.known, reference, rows.threshold)
    own = [one for one in (check, *earlier) if one.model_version == version and "realised" in one.evidence]
    page = render_page(
        "monitoring.html",
        check=check,
        evidence=check.evidence,
        shown=SHOWN,
        money=describe_money(check.evidence["money"]) if "money" in check.evidence else "",
        drift=drift,
        shapes=shapes,
        verdicts=[*reversed(earlier[: CHECKS_SHOWN - 1]), check],
        stability=stability,
        psi_max=PSI_MAX,
        links={name: (folder / name).exists() for name in (DATA_FILE, OUTCOME_FILE)},
        history=own,
    )
    write_text(folder / REPORT_FILE, page)


def order_drift(evidence: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every feature's shift: those that drifted, in the order of the evidence, then the others, the largest first."""
    drift = evidence.get("drift", {"features": {}, "drifted": ()})
    others = sorted(drift["features"], key=lambda name: (-drift["features"][name]["effect"], name))
    ordered = dict.fromkeys([*drift["drifted"], *others])
    return [(name, drift["features"][name]) for name in ordered]
