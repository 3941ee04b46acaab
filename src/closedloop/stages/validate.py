"""validate: the data gate; a critical expectation that fails stops the line."""

from __future__ import annotations

import datetime as dt
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from closedloop.adapters.pages import render_page
from closedloop.adapters.tables import read_table
from closedloop.dataset import DatasetConfig
from closedloop.errors import GateFailed
from closedloop.files import read_json, replace_folder, write_json, write_text
from closedloop.params import Params

logger = logging.getLogger(__name__)
ROW_IDS = {
    "customers": ["customer_id"],
    "events": ["customer_id", "time"],
    "days": ["day"],
    "freshness": ["newest_event_at"],
}


def validate(
    params: Params, dataset: DatasetConfig, *, raw_dir: Path, docs_dir: Path, page_path: Path, metrics_path: Path
) -> dict[str, Any]:
    """Check the canonical tables; writes the Data Docs, a page and ``metrics_path`` whatever the outcome.

    Raises
    ------
    GateFailed
        If a critical expectation fails; one line each, with column, figure and limit.
    """
    from closedloop.adapters.gx import run_expectations

    tables = read_tables(params, dataset, raw_dir)
    for name, frame in tables.items():
        logger.info("checking %s: %d rows", name, len(frame))
    with replace_folder(docs_dir) as folder:
        findings = run_expectations(
            tables, dataset.expectations, row_ids=ROW_IDS, docs_dir=folder, as_of=params.as_of_at
        )
    failed = [finding for finding in findings if not finding.success]
    critical = [finding for finding in failed if finding.severity == "critical"]
    report = {
        "expectations": len(findings),
        "failed_critical": len(critical),
        "failed_warning": len(failed) - len(critical),
        "rows": {name: len(frame) for name, frame in tables.items()},
        "findings": [asdict(finding) for finding in findings],
    }
    write_page(page_path, params, dataset, report, raw_dir=raw_dir, docs_dir=docs_dir)
    write_json(metrics_path, report)
    if critical:
        lines = "\n  ".join(finding.sentence() for finding in critical)
        raise GateFailed(f"data gate: {len(critical)} critical expectations of {len(findings)} failed:\n  {lines}")
    return report


def write_page(
    path: Path, params: Params, dataset: DatasetConfig, report: dict[str, Any], *, raw_dir: Path, docs_dir: Path
) -> None:
    """The findings and the dropped rows on one page that opens offline, with links into the Data Docs."""
    pages = sorted((docs_dir / "validations").rglob("*.html"))
    links = {page.relative_to(docs_dir / "validations").parts[0]: os.path.relpath(page, path.parent) for page in pages}
    ingested = read_json(raw_dir / "ingest.json", made_by="closedloop ingest")
    write_text(
        path,
        render_page("data_quality.html", params=params, dataset=dataset, report=report, ingested=ingested, links=links),
    )


def read_tables(params: Params, dataset: DatasetConfig, raw_dir: Path) -> dict[str, pd.DataFrame]:
    """The canonical tables, and two derived from the events: ``days`` and ``freshness``.

    ``events`` gains ``known_customer`` (bool); ``days`` has one row a UTC day with events: ``day``, ``events``,
    ``gap_days`` since the day before with events; ``freshness`` has one row: ``newest_event_at`` and ``age_days``,
    its age at as_of.
    """
    customers = read_table(raw_dir / "customers.parquet", made_by="closedloop ingest")
    if dataset.kind == "table":
        return {"customers": customers}
    events = read_table(raw_dir / "events", made_by="closedloop ingest")
    events["known_customer"] = events["customer_id"].isin(customers["customer_id"])
    return {"customers": customers, "events": events, **describe_days(events["time"], as_of=params.as_of_at)}


def describe_days(times: pd.Series, *, as_of: dt.datetime) -> dict[str, pd.DataFrame]:
    """The tables ``days`` and ``freshness`` of event times."""
    counts = times.dt.floor("D").value_counts().sort_index()
    day = pd.Series(counts.index)
    days = pd.DataFrame({"day": day, "events": counts.to_numpy(), "gap_days": day.diff().dt.days.fillna(1).astype(int)})
    newest = times.max()
    age_days = (pd.Timestamp(as_of) - newest) / pd.Timedelta(days=1)
    return {"days": days, "freshness": pd.DataFrame({"newest_event_at": [newest], "age_days": [float(age_days)]})}
