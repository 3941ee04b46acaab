"""Great Expectations: run a data set's expectations on its tables and build the Data Docs."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from closedloop.adapters.jinja import disarm
from closedloop.config.dataset import ExpectationConfig
from closedloop.errors import ConfigError, count_noun

ROWS_SHOWN = 20
SITE = "local"
SITE_INDEX = {"class_name": "DefaultSiteIndexBuilder"}


@dataclass(frozen=True)
class ExpectationResult:
    """One expectation's outcome; ``rows`` are at most 20 failing rows by id."""

    table: str
    expectation: str
    column: str | None
    severity: str
    success: bool
    observed: Any
    limit: dict[str, Any]
    failing: int
    checked: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def sentence(self) -> str:
        """The finding in one line: table, column, rule, figure and limit."""
        limit = ", ".join(f"{name}={value}" for name, value in self.limit.items()) or "-"
        place = self.table if self.column is None else f"{self.table}.{self.column}"
        counted = (
            f"{self.failing} of {count_noun(self.checked, 'value')} fail" if self.checked else f"found {self.observed}"
        )
        shown = "; ".join(" ".join(f"{name}={value}" for name, value in row.items()) for row in self.rows[:3])
        shown = f"; such as {shown}" if shown else ""
        return f"{place}: {self.expectation} ({limit}): {counted}{shown}"


def run_expectations(
    tables: dict[str, pd.DataFrame],
    expectations: tuple[ExpectationConfig, ...],
    *,
    row_ids: dict[str, list[str]],
    docs_dir: Path,
    as_of: dt.datetime,
) -> list[ExpectationResult]:
    """Check each table against its expectations and write the Data Docs to ``docs_dir``.

    Parameters
    ----------
    tables
        Frames by name.
    expectations
        Great Expectations' own types and keyword arguments.
    row_ids
        For each table, the columns that identify a row in the findings.
    docs_dir
        An existing, empty folder.
    as_of
        Recorded as the time of the run, so that the same data give the same page addresses.

    Raises
    ------
    ConfigError
        If an expectation does not exist or its arguments do not fit.
    """
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.base import ProgressBarsConfig

    with _quiet():
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        source = context.data_sources.add_pandas("tables")
        findings: list[ExpectationResult] = []
        outcomes: dict[Any, Any] = {}
        for name, frame in tables.items():
            wanted = [expectation for expectation in expectations if expectation.table == name]
            if not wanted:
                continue
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(_build_suite(gx, name, wanted))
            definition = context.validation_definitions.add(gx.ValidationDefinition(name=name, data=batch, suite=suite))
            format_: dict[str, Any] = {
                "result_format": "SUMMARY",
                "unexpected_index_column_names": row_ids[name],
                "partial_unexpected_count": ROWS_SHOWN,
            }
            checkpoint = context.checkpoints.add(
                gx.Checkpoint(name=name, validation_definitions=[definition], result_format=format_)
            )
            outcome = checkpoint.run(batch_parameters={"dataframe": frame}, run_id=RunIdentifier(run_time=as_of))
            for run in outcome.run_results.values():
                findings += [_read_result(name, result) for result in run.results]
            outcomes |= outcome.run_results
        _write_docs(gx, outcomes, docs_dir)
    return findings


def _build_suite(gx: Any, table: str, wanted: list[ExpectationConfig]) -> Any:
    suite = gx.ExpectationSuite(name=table)
    for item in wanted:
        name = "".join(part.capitalize() for part in item.type.split("_"))
        kind = getattr(gx.expectations, name, None)
        if kind is None:
            raise ConfigError(f"expectations: {item.type!r} is not an expectation of Great Expectations")
        try:
            suite.add_expectation(kind(severity=item.severity, **item.kwargs))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"expectations: {item.type} on {table}: {' '.join(str(error).split()):.300}") from error
    return suite


def _write_docs(gx: Any, outcomes: dict[Any, Any], docs_dir: Path) -> None:
    """Build the Data Docs after replacing markup characters: Great Expectations writes values unescaped."""
    from great_expectations.core import expectation_validation_result as validated

    context = gx.get_context(mode="ephemeral")
    backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs_dir.resolve())}
    site = {"class_name": "SiteBuilder", "store_backend": backend, "site_index_builder": SITE_INDEX}
    context.add_data_docs_site(site_name=SITE, site_config=site)
    for key, outcome in outcomes.items():
        shown = disarm(outcome.to_json_dict())
        expectations = [result["expectation_config"] for result in shown["results"]]
        context.suites.add(gx.ExpectationSuite(name=shown["suite_name"], expectations=expectations))
        context.validation_results_store.set(key, validated.expectationSuiteValidationResultSchema.load(shown))
    context.build_data_docs(site_names=[SITE])


def _read_result(table: str, result: Any) -> ExpectationResult:
    content = result.to_json_dict()
    config, figures = content["expectation_config"], content.get("result") or {}
    kwargs = {name: value for name, value in config["kwargs"].items() if name not in ("batch_id", "column")}
    failing = int(figures.get("unexpected_count") or 0)
    errors = [info.get("exception_message") for info in _exceptions(content.get("exception_info"))]
    observed = figures.get("observed_value", figures.get("unexpected_percent"))
    success, rows = bool(content["success"]), int(figures.get("element_count") or 0)
    if (
        rows and figures.get("missing_count") == rows
    ):  # Great Expectations skips missing values, and passes a column that has no others
        success, failing, observed = False, rows, f"no value: all {rows} are missing"
    return ExpectationResult(
        table=table,
        expectation=config["type"],
        column=config["kwargs"].get("column"),
        severity=str(config.get("severity", "critical")),
        success=success,
        observed=errors[0] if errors and not content["success"] else observed,
        limit=kwargs,
        failing=failing,
        checked=rows if "unexpected_count" in figures else 0,
        rows=[_plain(row) for row in (figures.get("partial_unexpected_index_list") or [])[:ROWS_SHOWN]],
    )


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """NumPy scalars as Python's own, so that the finding can be written as JSON."""
    plain = {name: value.item() if hasattr(value, "item") else value for name, value in row.items()}
    return {name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in plain.items()}


def _exceptions(info: Any) -> list[dict[str, Any]]:
    if not isinstance(info, dict):
        return []
    nested = [value for value in info.values() if isinstance(value, dict) and value.get("exception_message")]
    return nested or ([info] if info.get("exception_message") else [])


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of single metrics; the stage reports the outcome."""
    # the second logger sets its own level, to announce a temporary folder
    names = ("great_expectations", "great_expectations.data_context.types.base")
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
