"""The Grafana dashboards as code: `python k8s/dashboards/generate.py` writes them, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders.common import ReduceDataOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable, Row, ThresholdsConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.stat import Panel as Stat
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueColorMode, BigValueTextMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold

FOLDER = Path(__file__).parents[1] / "base/observability/dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
GREEN, YELLOW, RED = "green", "yellow", "red"
RATE = "[$__rate_interval]"
SERVED = 'model_predictions_total{variant=~"champion|canary"}'
Queries = dict[str, str]  # {legend: expression}
Steps = dict[float | None, str]  # {from this value on: colour}


def draw(title: str, queries: Queries, *, unit: str = "short", about: str = "", width: int = 12) -> TimeSeries:
    """Lines over time."""
    panel = TimeSeries().title(title).description(about).datasource(SOURCE).unit(unit).span(width).height(8)
    for number, (legend, expression) in enumerate(queries.items()):
        query = Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
        panel = panel.with_target(query.datasource(SOURCE))
    return panel


def show(
    title: str, expression: str, *, unit: str = "short", steps: Steps | None = None, label: str = "", about: str = ""
) -> Stat:
    """One figure as it is now, or the value of a label."""
    query = Dataquery().expr(expression).instant().legend_format(f"{{{{{label}}}}}" if label else "").ref_id("A")
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
    """A dashboard whose data source is chosen in it."""
    variable = DatasourceVariable("source").label("Prometheus").type("prometheus")
    board = Dashboard(f"closedloop: {title}").uid(f"closedloop-{name}").tags(["closedloop"]).readonly()
    return board.with_variable(variable).refresh("1m").time("now-24h", "now").timezone("utc")


def build_serving() -> Dashboard:
    """What the service answers, and how fast."""
    requests = f"prediction_requests_total{RATE}"
    quantile = "histogram_quantile({}, sum by (le) (rate({}_bucket" + RATE + ")))"
    spread = {
        f"p{share * 100:g}": quantile.format(share, "prediction_request_latency_seconds") for share in (0.5, 0.95, 0.99)
    }
    failing = f'(sum(rate(prediction_requests_total{{status=~"5.."}}{RATE})) or vector(0)) / sum(rate({requests}))'
    by_version = f"sum by (model_version, variant) (rate(model_predictions_total{RATE}))"
    return (
        begin("serving", "serving")
        .with_row(Row("Now"))
        .with_panel(show("Champion", 'model_slot_info{variant="champion"}', label="model_version"))
        .with_panel(show("Replicas up", 'sum(up{job="closedloop-service"})', steps={None: RED, 1: GREEN}))
        .with_panel(show("Requests", f"sum(rate({requests}))", unit="reqps"))
        .with_panel(show("Failing", failing, unit="percentunit", steps={None: GREEN, 0.001: YELLOW, 0.01: RED}))
        .with_panel(show("p99", spread["p99"], unit="s", steps={None: GREEN, 0.05: YELLOW, 0.1: RED}))
        .with_panel(
            show("Waiting for the store", "sum(spool_depth_bytes)", unit="bytes", steps={None: GREEN, 5e7: RED})
        )
        .with_row(Row("Requests"))
        .with_panel(draw("Requests by status", {"{{status}}": f"sum by (status) (rate({requests}))"}, unit="reqps"))
        .with_panel(draw("Latency of requests", spread, unit="s"))
        .with_row(Row("Models"))
        .with_panel(draw("Rows scored, by version", {"{{model_version}} {{variant}}": by_version}, unit="reqps"))
        .with_panel(
            draw(
                "Time in the model, per row",
                {f"p{q * 100:g}": quantile.format(q, "model_prediction_latency_seconds") for q in (0.5, 0.99)},
                unit="s",
            )
        )
        .with_panel(
            draw(
                "What went wrong",
                {
                    "rows that a model failed": f"sum(rate(model_errors_total{RATE})) or vector(0)",
                    "versions refused": f"sum(rate(models_refused_total{RATE})) or vector(0)",
                    "lines not stored": f'sum(rate(prediction_rows_total{{result!="stored"}}{RATE})) or vector(0)',
                },
                unit="ops",
            )
        )
        .with_panel(
            draw(
                "Into the operations store",
                {
                    "predictions stored": f'sum(rate(prediction_rows_total{{result="stored"}}{RATE}))',
                    "outcomes {{result}}": f"sum by (result) (rate(outcomes_total{RATE}))",
                },
                unit="ops",
            )
        )
    )


def build_model_health() -> Dashboard:
    """Whether the model still holds."""
    churning = f'sum(rate(model_predictions_total{{variant=~"champion|canary", prediction_class="1"}}{RATE}))'
    missing = f'sum by (feature_name) (rate(feature_categories_total{{category="missing"}}{RATE}))'
    far = f'sum by (feature_name) (rate(feature_distribution_bucket{{le="%s"}}{RATE}))'
    outside = f"1 - ({far % '3.0'} - {far % '-3.0'}) / {far % '+Inf'}"
    return (
        begin("model-health", "model health")
        .with_row(Row("Now"))
        .with_panel(show("Verdict", "monitor_verdict == 1", label="verdict"))
        .with_panel(show("Accuracy, estimated", "model_accuracy_estimated", unit="percentunit"))
        .with_panel(show("Accuracy, last outcomes", "model_accuracy_rolling", unit="percentunit"))
        .with_panel(show("Accuracy, reference", "model_accuracy_reference", unit="percentunit"))
        .with_panel(show("Drifted features", "sum(data_drift_alarm)", steps={None: GREEN, 1: YELLOW}))
        .with_panel(show("Outcomes known", "label_maturity_ratio", unit="percentunit", steps={None: RED, 0.5: GREEN}))
        .with_row(Row("Performance"))
        .with_panel(
            draw(
                "Accuracy",
                {
                    "estimated, before labels": "model_accuracy_estimated",
                    "last 1,000 outcomes": "model_accuracy_rolling",
                    "reference": "model_accuracy_reference",
                },
                unit="percentunit",
            )
        )
        .with_panel(
            draw(
                "Brier score",
                {"realised": "model_brier_realised", "expected of the same rows": "model_brier_expected"},
                about="Both worse: harder customers. Only the realised one worse: the model is out of date.",
            )
        )
        .with_row(Row("Data"))
        .with_panel(draw("Drift, by feature", {"{{feature_name}}": "data_drift_score"}))
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
        .with_panel(show("Champion", "model_champion_info", label="model_version"))
        .with_panel(show("Serves since", "model_champion_age_seconds", unit="s"))
        .with_panel(show("Release", "model_release_step_info", label="step", about="Empty: nothing is being released."))
        .with_panel(
            show(
                "Last check", "monitor_check_age_seconds", unit="s", steps={None: GREEN, day: YELLOW, 26 * 3600.0: RED}
            )
        )
        .with_panel(show("Newest retraining", "model_retraining_state == 1", label="state"))
        .with_panel(show("Operations store", "operations_store_up", steps={None: RED, 1: GREEN}))
        .with_row(Row("Monitor"))
        .with_panel(draw("Verdict", {"{{verdict}}": "monitor_verdict"}))
        .with_panel(
            draw(
                "Ages",
                {
                    "check": "monitor_check_age_seconds",
                    "too little to judge": "monitor_judged_age_seconds",
                    "features": "feature_age_seconds",
                    "open retraining": "model_retraining_open_age_seconds",
                },
                unit="s",
            )
        )
        .with_panel(draw("Predictions in the newest check's window", {"predictions": "monitor_check_predictions"}))
        .with_panel(draw("Outcomes known, of closed horizons", {"share": "label_maturity_ratio"}, unit="percentunit"))
        .with_row(Row("Retraining and release"))
        .with_panel(draw("Retrainings by state", {"{{state}}": "model_retrainings"}))
        .with_panel(draw("The challenger's share of answers", {"weight": "model_release_weight"}, unit="percentunit"))
        .with_panel(
            draw(
                "Money, in the newest check's window",
                {"at stake": "money_at_stake", "expected profit of the offers": "money_expected_profit"},
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
