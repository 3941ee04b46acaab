"""The Grafana dashboards as code: `python k8s/dashboards/generate.py` writes them, the same bytes every time."""

from __future__ import annotations

import re
from pathlib import Path

from grafana_foundation_sdk.builders.common import ReduceDataOptions
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueColorMode, BigValueTextMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, VariableRefresh

FOLDER = Path(__file__).parents[1] / "base/observability/dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
GREEN, YELLOW, RED = "green", "yellow", "red"
RATE = "[$__rate_interval]"
SERVED = 'closedloop_model_predictions_total{variant=~"champion|canary"}'
METRIC = re.compile(r"(closedloop_\w+)(\{?)")
MODELS = 'label_values({__name__=~"closedloop_operations_store_up|closedloop_spool_depth_bytes"}, model_name)'
Queries = dict[str, str]  # {legend: expression}
Steps = dict[float | None, str]  # {from this value on: colour}


def ask(expression: str) -> Dataquery:
    """A query about the series of the model that is chosen in the dashboard."""
    return Dataquery().expr(
        METRIC.sub(lambda found: f'{found[1]}{{model_name="$model"{", " if found[2] else "}"}', expression)
    )


def draw(title: str, queries: Queries, *, unit: str = "short", about: str = "", width: int = 12) -> TimeSeries:
    """Lines over time."""
    panel = TimeSeries().title(title).description(about).datasource(SOURCE).unit(unit).span(width).height(8)
    for number, (legend, expression) in enumerate(queries.items()):
        query = ask(expression).legend_format(legend).ref_id(chr(ord("A") + number))
        panel = panel.with_target(query.datasource(SOURCE))
    return panel


def show(
    title: str, expression: str, *, unit: str = "short", steps: Steps | None = None, label: str = "", about: str = ""
) -> Stat:
    """One figure as it is now, or the value of a label."""
    query = ask(expression).instant().legend_format(f"{{{{{label}}}}}" if label else "").ref_id("A")
    colours = [Threshold(value, colour) for value, colour in (steps or {None: "text"}).items()]
    panel = Stat().title(title).description(about).datasource(SOURCE).unit(unit).span(4).height(4)
    if label:
        panel = panel.text_mode(BigValueTextMode.NAME).no_value("none")
    return (
        panel.with_target(query.datasource(SOURCE))
        .thresholds(ThresholdsConfig().steps(colours))
        .color_mode(BigValueColorMode.VALUE)
        .reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    )


def begin(name: str, title: str) -> Dashboard:
    """A dashboard in which data source and model are chosen."""
    source = DatasourceVariable("source").label("Prometheus").type("prometheus")
    model = QueryVariable("model").label("Model").datasource(SOURCE).query(MODELS)
    model = model.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    board = Dashboard(f"closedloop: {title}").uid(f"closedloop-{name}").tags(["closedloop"]).readonly()
    return board.with_variable(source).with_variable(model).refresh("1m").time("now-24h", "now").timezone("utc")


def build_serving() -> Dashboard:
    """What the service answers, and how fast."""
    requests = f"closedloop_prediction_requests_total{RATE}"
    quantile = "histogram_quantile({}, sum by (le) (rate({}_bucket" + RATE + ")))"
    spread = {
        f"p{share * 100:g}": quantile.format(share, "closedloop_prediction_request_latency_seconds")
        for share in (0.5, 0.95, 0.99)
    }
    failing = (
        f'(sum(rate(closedloop_prediction_requests_total{{status=~"5.."}}{RATE})) or vector(0)) / sum(rate({requests}))'
    )
    unstored = f'sum(rate(closedloop_prediction_rows_total{{result!="stored"}}{RATE}))'
    by_version = f"sum by (model_version, variant) (rate(closedloop_model_predictions_total{RATE}))"
    return (
        begin("serving", "serving")
        .with_row(Row("Now"))
        .with_panel(show("Champion", 'closedloop_model_slot_info{variant="champion"}', label="model_version"))
        .with_panel(show("Replicas up", 'sum(up{job="closedloop-service"})', steps={None: RED, 1: GREEN}))
        .with_panel(show("Requests", f"sum(rate({requests}))", unit="reqps"))
        .with_panel(show("Failing", failing, unit="percentunit", steps={None: GREEN, 0.001: YELLOW, 0.01: RED}))
        .with_panel(show("p99", spread["p99"], unit="s", steps={None: GREEN, 0.05: YELLOW, 0.1: RED}))
        .with_panel(
            show(
                "Waiting for the store",
                "sum(closedloop_spool_depth_bytes)",
                unit="bytes",
                steps={None: GREEN, 5e7: RED},
            )
        )
        .with_row(Row("Requests"))
        .with_panel(draw("Requests by status", {"{{status}}": f"sum by (status) (rate({requests}))"}, unit="reqps"))
        .with_panel(draw("Latency of requests", spread, unit="s"))
        .with_row(Row("Models"))
        .with_panel(draw("Rows scored, by version", {"{{model_version}} {{variant}}": by_version}, unit="reqps"))
        .with_panel(
            draw(
                "Time in the model, per row",
                {
                    f"p{q * 100:g}": quantile.format(q, "closedloop_model_prediction_latency_seconds")
                    for q in (0.5, 0.99)
                },
                unit="s",
            )
        )
        .with_panel(
            draw(
                "What went wrong",
                {
                    "rows that a model failed": f"sum(rate(closedloop_model_errors_total{RATE})) or vector(0)",
                    "versions refused": f"sum(rate(closedloop_models_refused_total{RATE})) or vector(0)",
                    "lines not stored": f"{unstored} or vector(0)",
                },
                unit="ops",
            )
        )
        .with_panel(
            draw(
                "Into the operations store",
                {
                    "predictions stored": f'sum(rate(closedloop_prediction_rows_total{{result="stored"}}{RATE}))',
                    "outcomes {{result}}": f"sum by (result) (rate(closedloop_outcomes_total{RATE}))",
                },
                unit="ops",
            )
        )
    )


def build_model_health() -> Dashboard:
    """Whether the model still holds."""
    churning = (
        f'sum(rate(closedloop_model_predictions_total{{variant=~"champion|canary", prediction_class="1"}}{RATE}))'
    )
    missing = f'sum by (feature_name) (rate(closedloop_feature_categories_total{{category="missing"}}{RATE}))'
    far = f'sum by (feature_name) (rate(closedloop_feature_distribution_bucket{{le="%s"}}{RATE}))'
    outside = f"1 - ({far % '3.0'} - {far % '-3.0'}) / {far % '+Inf'}"
    return (
        begin("model-health", "model health")
        .with_row(Row("Now"))
        .with_panel(show("Verdict", "closedloop_monitor_verdict == 1", label="verdict"))
        .with_panel(show("Accuracy, estimated", "closedloop_model_accuracy_estimated", unit="percentunit"))
        .with_panel(show("Accuracy, last outcomes", "closedloop_model_accuracy_rolling", unit="percentunit"))
        .with_panel(show("Accuracy, reference", "closedloop_model_accuracy_reference", unit="percentunit"))
        .with_panel(show("Drifted features", "sum(closedloop_data_drift_alarm)", steps={None: GREEN, 1: YELLOW}))
        .with_panel(
            show("Outcomes known", "closedloop_label_maturity_ratio", unit="percentunit", steps={None: RED, 0.5: GREEN})
        )
        .with_row(Row("Performance"))
        .with_panel(
            draw(
                "Accuracy",
                {
                    "estimated, before labels": "closedloop_model_accuracy_estimated",
                    "last 1,000 outcomes": "closedloop_model_accuracy_rolling",
                    "reference": "closedloop_model_accuracy_reference",
                },
                unit="percentunit",
            )
        )
        .with_panel(
            draw(
                "Brier score",
                {
                    "realised": "closedloop_model_brier_realised",
                    "expected of the same rows": "closedloop_model_brier_expected",
                },
                about="Both worse: harder customers. Only the realised one worse: the model is out of date.",
            )
        )
        .with_row(Row("Data"))
        .with_panel(draw("Drift, by feature", {"{{feature_name}}": "closedloop_data_drift_score"}))
        .with_panel(
            draw("Predicted to churn", {"share": f"{churning} / sum(rate({SERVED}{RATE}))"}, unit="percentunit")
        )
        .with_panel(draw("Beyond 3 standard deviations, by feature", {"{{feature_name}}": outside}, unit="percentunit"))
        .with_panel(draw("Missing values, by feature", {"{{feature_name}}": missing}, unit="ops"))
    )


def build_loop() -> Dashboard:
    """Whether the loop turns: checks, retrainings, releases."""
    day = 86400.0
    return (
        begin("loop", "loop")
        .with_row(Row("Now"))
        .with_panel(show("Champion", "closedloop_model_champion_info", label="model_version"))
        .with_panel(show("Serves since", "closedloop_model_champion_age_seconds", unit="s"))
        .with_panel(
            show(
                "Release", "closedloop_model_release_step_info", label="step", about="Empty: nothing is being released."
            )
        )
        .with_panel(
            show(
                "Last check",
                "closedloop_monitor_check_age_seconds",
                unit="s",
                steps={None: GREEN, day: YELLOW, 26 * 3600.0: RED},
            )
        )
        .with_panel(show("Newest retraining", "closedloop_model_retraining_state == 1", label="state"))
        .with_panel(show("Operations store", "closedloop_operations_store_up", steps={None: RED, 1: GREEN}))
        .with_row(Row("Monitor"))
        .with_panel(draw("Verdict", {"{{verdict}}": "closedloop_monitor_verdict"}))
        .with_panel(
            draw(
                "Ages",
                {
                    "check": "closedloop_monitor_check_age_seconds",
                    "too little to judge": "closedloop_monitor_judged_age_seconds",
                    "features": "closedloop_feature_age_seconds",
                    "open retraining": "closedloop_model_retraining_open_age_seconds",
                },
                unit="s",
            )
        )
        .with_panel(
            draw("Predictions in the newest check's window", {"predictions": "closedloop_monitor_check_predictions"})
        )
        .with_panel(
            draw("Outcomes known, of closed horizons", {"share": "closedloop_label_maturity_ratio"}, unit="percentunit")
        )
        .with_row(Row("Retraining and release"))
        .with_panel(draw("Retrainings by state", {"{{state}}": "closedloop_model_retrainings"}))
        .with_panel(
            draw("The challenger's share of answers", {"weight": "closedloop_model_release_weight"}, unit="percentunit")
        )
        .with_panel(
            draw(
                "Money, in the newest check's window",
                {
                    "at stake": "closedloop_money_at_stake",
                    "expected profit of the offers": "closedloop_money_expected_profit",
                },
                about="Empty where the data set's config has no value.",
                width=24,
            )
        )
    )


def render() -> dict[str, str]:
    """The dashboards as JSON, by file name."""
    boards = {"serving": build_serving(), "model-health": build_model_health(), "loop": build_loop()}
    encoder = JSONEncoder(sort_keys=True, indent=1)
    return {f"{name}.json": encoder.encode(board.build()) + "\n" for name, board in boards.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
