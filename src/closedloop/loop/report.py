"""What a person reads of a check: its verdict, how good the estimates were, and Evidently's figures; kept in MLflow."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.adapters.evidently import PSI_MAX, write_data_report, write_outcome_report
from closedloop.adapters.mlflow import MONITOR_TAG
from closedloop.adapters.pages import render_page
from closedloop.adapters.tables import read_table
from closedloop.contract import REFERENCE_FILE, read_contract
from closedloop.files import hold_lock, replace_folder, write_text
from closedloop.loop.monitor import read_window

if TYPE_CHECKING:
    from closedloop.adapters.checks import Check
    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.samples import Samples

SHOWN = ("accuracy", "brier", "roc_auc", "churn_rate")
DATA_FILE, OUTCOME_FILE, REPORT_FILE = "data.html", "outcomes.html", "report.html"


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
    """Write a recorded check's report to ``folder`` and log it to MLflow, once; returns the run's id.

    The samples are drawn as they were for the check, so that a pass that died before its report is made good by the
    next; a run that was begun and did not end is gone on with.
    """
    tags = {MONITOR_TAG: check.check_id, "closedloop.model_version": check.model_version}
    with hold_lock(folder.with_name(f".{folder.name}.lock")):
        done = tracking.find_run(check.check_id, MONITOR_TAG, finished=True)
        if done is not None and (folder / REPORT_FILE).exists():
            return done
        with replace_folder(folder) as beside:
            write_report(beside, samples, check, earlier, model_dir=model_dir, rows_max=rows_max)
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
    """Write ``report.html``, and beside it Evidently's pages of the window and of the closed outcomes."""
    contract, version = read_contract(model_dir), check.model_version
    reference = read_table(model_dir / REFERENCE_FILE, made_by="closedloop train")
    reference = reference.sample(min(len(reference), rows_max), random_state=0)
    window = read_window(samples, contract, version, since=check.since, until=check.until, rows_max=rows_max).rows
    stability: dict[str, float] = {}
    if len(window):
        numeric = [one.name for one in contract.features if one.kind == "numeric"] + ["score"]
        columns = [*contract.feature_names, "score"]
        stability = write_data_report(folder / DATA_FILE, window, reference[columns], numeric=numeric)
    after = dt.datetime.fromisoformat(check.evidence["outcomes_after"])
    closed = check.until - dt.timedelta(days=contract.horizon_days or 0)
    known = samples.sample_outcomes(check.model_name, version, after=after, until=closed, rows_max=rows_max).rows
    if len(known):
        write_outcome_report(folder / OUTCOME_FILE, known, reference, contract.threshold)
    own = [one for one in (check, *earlier) if one.model_version == version and "realised" in one.evidence]
    page = render_page(
        "monitoring.html",
        check=check,
        evidence=check.evidence,
        shown=SHOWN,
        stability=stability,
        psi_max=PSI_MAX,
        links={name: (folder / name).exists() for name in (DATA_FILE, OUTCOME_FILE)},
        history=own,
    )
    write_text(folder / REPORT_FILE, page)
