"""validate: the data gate; a critical expectation that fails stops the run."""

from __future__ import annotations

import datetime as dt
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from closedloop.adapters.jinja import render_page
from closedloop.config.dataset import DatasetConfig, ExpectationConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.core.features.identifiers import ROWS_MIN, is_identifier
from closedloop.errors import GateFailed
from closedloop.files import read_json, replace_folder, write_json, write_text
from closedloop.tabular.tables import read_table

logger = logging.getLogger(__name__)
VALUES = "expect_column_unique_value_count_to_be_between"
SHARE = "expect_column_proportion_of_unique_values_to_be_between"
IDENTIFIER_SHARE = 0.9
ADVICE = {
    VALUES: "; a column with the same value for every customer carries no information: remove it from the config",
    SHARE: "; an identifier is no feature: remove it from columns.categorical or columns.numeric, or give this "
    "expectation another limit",
}
ROW_IDS = {
    "customers": ["customer_id"],
    "events": ["customer_id", "time"],
    "days": ["day"],
    "freshness": ["newest_event_at"],
}


def validate(params: Params, dataset: DatasetConfig, layout: Layout) -> dict[str, Any]:
    """Check the canonical tables; writes the Data Docs, a page and the report whatever the outcome.

    Raises
    ------
    GateFailed
        If a critical expectation fails; the message has one line for each, with column, figure and limit.
    """
    from closedloop.adapters.gx import run_expectations

    tables = read_tables(params, dataset, layout.raw)
    for name, frame in tables.items():
        logger.info("checking %s, rows: %d", name, len(frame))
    expectations = list_expectations(dataset, tables["customers"])
    with replace_folder(layout.data_docs) as folder:
        findings = run_expectations(tables, expectations, row_ids=ROW_IDS, docs_dir=folder, as_of=params.as_of_at)
    failed = [finding for finding in findings if not finding.success]
    critical = [finding for finding in failed if finding.severity == "critical"]
    for finding in failed:
        if finding not in critical:
            logger.warning("%s%s", finding.sentence(), ADVICE.get(finding.expectation, ""))
    report = {
        "expectations": len(findings),
        "failed_critical": len(critical),
        "failed_warning": len(failed) - len(critical),
        "rows": {name: len(frame) for name, frame in tables.items()},
        "findings": [asdict(finding) for finding in findings],
    }
    write_page(params, dataset, report, layout)
    write_json(layout.data_quality, report)
    if critical:
        lines = "\n  ".join(finding.sentence() + ADVICE.get(finding.expectation, "") for finding in critical)
        raise GateFailed(f"data gate: failed critical expectations: {len(critical)} of {len(findings)}:\n  {lines}")
    return report


def list_expectations(dataset: DatasetConfig, customers: pd.DataFrame) -> tuple[ExpectationConfig, ...]:
    """The config's expectations, and two default ones for columns that have no expectation of that type.

    A column that describes customers should have at least two values (else a warning). A category must not have its
    own value for nearly every customer: such a column is an identifier, not a feature; so is a numeric column that
    `is_identifier` finds.
    """
    columns = dataset.columns
    described = [*columns.attributes, *([columns.sensitive] if columns.sensitive else [])]
    wanted: list[tuple[str, str, Literal["critical", "warning"], dict[str, float]]] = [
        (VALUES, name, "warning", {"min_value": 2}) for name in described
    ]
    numeric = [name for name in columns.numeric if name in customers and is_identifier(customers[name])]
    if len(customers) >= ROWS_MIN:
        found = (*columns.categorical, *numeric)
        wanted += [(SHARE, name, "critical", {"max_value": IDENTIFIER_SHARE}) for name in found]
    own = {(one.type, one.kwargs.get("column")) for one in dataset.expectations}
    added = [
        ExpectationConfig(table="customers", type=type_, severity=severity, kwargs={"column": name, **limits})
        for type_, name, severity, limits in wanted
        if (type_, name) not in own
    ]
    return (*dataset.expectations, *added)


def write_page(params: Params, dataset: DatasetConfig, report: dict[str, Any], layout: Layout) -> None:
    """Write the findings and dropped rows to one page that opens offline, with links into the Data Docs."""
    path, validations = layout.data_quality_page, layout.data_docs / "validations"
    pages = sorted(validations.rglob("*.html"))
    links = {page.relative_to(validations).parts[0]: os.path.relpath(page, path.parent) for page in pages}
    ingested = read_json(layout.raw / "ingest.json", made_by="closedloop ingest")
    write_text(
        path,
        render_page("data_quality.html", params=params, dataset=dataset, report=report, ingested=ingested, links=links),
    )


def read_tables(params: Params, dataset: DatasetConfig, raw_dir: Path) -> dict[str, pd.DataFrame]:
    """Read the canonical tables, and derive two from the events: ``days`` and ``freshness``.

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
    """Build the tables ``days`` and ``freshness`` from event times."""
    counts = times.dt.floor("D").value_counts().sort_index()
    day = pd.Series(counts.index)
    days = pd.DataFrame({"day": day, "events": counts.to_numpy(), "gap_days": day.diff().dt.days.fillna(1).astype(int)})
    newest = times.max()
    age_days = (pd.Timestamp(as_of) - newest) / pd.Timedelta(days=1)
    return {"days": days, "freshness": pd.DataFrame({"newest_event_at": [newest], "age_days": [float(age_days)]})}
