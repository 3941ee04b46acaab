"""Every alert, by Prometheus' own tool: it fires when it must, says what it should, and is silent when it must be."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import yaml

from tests.http_service import wait_until
from tests.programs import fetch, run_program
from tests.services import find_free_port, require

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "k8s/base/observability"
GROUPS = yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
SERVICE, EXPORTER = 'job="closedloop-service", instance="s"', 'job="closedloop-exporter", instance="e"'
OF_SERVICE, OF_EXPORTER = (dict(re.findall(r'(\w+)="(.*?)"', text)) for text in (SERVICE, EXPORTER))
JOB, MODEL = {"job": "closedloop-service"}, {"model_name": "shop_churn"}
SERVED, WATCHED = (f'{text}, model_name="shop_churn"' for text in (SERVICE, EXPORTER))


class Case(NamedTuple):
    """Series, a value a minute from 0 on, that fire at ``at``, and those that do not; labels and text of the alert."""

    at: str
    fires: dict[str, str]
    silent: dict[str, str]
    labels: dict[str, str]
    summary: str


def requests(status: str, values: str) -> dict[str, str]:
    return {f'closedloop_prediction_requests_total{{{SERVED}, status="{status}"}}': values}


def latency(slow: int) -> dict[str, str]:
    """100 requests a minute, so many of them between 0.25 and 0.5 s, the rest within 1 ms."""
    name = f"closedloop_prediction_request_latency_seconds_bucket{{{SERVED}, le="
    return {f'{name}"0.001"}}': f"0+{100 - slow}x30", f'{name}"0.25"}}': f"0+{100 - slow}x30"} | {
        f'{name}"{edge}"}}': "0+100x30" for edge in ("0.5", "+Inf")
    }


def of_loop(name: str, values: str, labels: str = "") -> dict[str, str]:
    return {f"{name}{{{WATCHED}{labels}}}": values}


def verdict(name: str) -> dict[str, str]:
    names = ("none", "watch", "alert", "retrain", "cannot tell")
    return {
        key: value
        for one in names
        for key, value in of_loop("closedloop_monitor_verdict", f"{int(one == name)}x9", f', verdict="{one}"').items()
    }


FAILED = f'closedloop_model_errors_total{{{SERVED}, model_version="4", variant="shadow"}}'
REFUSED = f'closedloop_models_refused_total{{{SERVED}, reason="digest"}}'
STORED = f"closedloop_prediction_rows_total{{{SERVED}, result="
NO_ALERT = "no alert about the model can fire"
AGE, STEP = "closedloop_model_release_step_age_seconds", "closedloop_model_release_step_info"
FIVE_DAYS = of_loop(AGE, "432000x90")
CASES: dict[str, list[Case]] = {
    "ServiceDown": [
        Case(
            "6m",
            {f"up{{{SERVICE}}}": "1x2 0x9"},
            {f"up{{{SERVICE}}}": "1 0 1x9"},
            OF_SERVICE,
            "closedloop-service s cannot be scraped",
        ),
        Case(
            "6m",
            {f"up{{{EXPORTER}}}": "1x9"},
            {f"up{{{SERVICE}}}": "1x9"},
            JOB,
            "closedloop-service  cannot be scraped",
        ),
        Case(
            "6m",
            {f"up{{{SERVICE}}}": "1x9", 'up{job="closedloop-stream", instance="w"}': "1x2 0x9"},
            {f"up{{{SERVICE}}}": "1x9", 'up{job="closedloop-other", instance="w"}': "0x9"},
            {"job": "closedloop-stream", "instance": "w"},
            "closedloop-stream w cannot be scraped",
        ),
    ],
    "NoModelServes": [
        Case(
            "3m",
            {
                f"up{{{SERVICE}}}": "1x9",
                f'closedloop_model_slot_info{{{SERVED}, variant="shadow", model_version="4"}}': "1x9",
            },
            {
                f"up{{{SERVICE}}}": "1x9",
                f'closedloop_model_slot_info{{{SERVED}, variant="champion", model_version="3"}}': "1x9",
            },
            JOB,
            "The service is up, but no worker has a champion",
        ),
        Case(
            "3m",
            {f"up{{{SERVICE}}}": "1x9"},
            {f"up{{{SERVICE}}}": "0x9"},
            JOB,
            "The service is up, but no worker has a champion",
        ),
    ],
    "RequestsFail": [
        Case(
            "15m",
            requests("200", "0+95x30") | requests("503", "0+5x30"),
            requests("200", "0+995x30") | requests("503", "0+5x30") | requests("429", "0+500x30"),
            JOB | MODEL,
            "5% of requests are answered with 5xx",
        )
    ],
    "RequestsShed": [
        Case(
            "20m",
            requests("200", "0+90x30") | requests("429", "0+10x30"),
            requests("200", "0+96x30") | requests("429", "0+4x30") | requests("500", "0+50x30"),
            JOB | MODEL,
            "10% of requests are turned away with 429",
        )
    ],
    "RequestsSlow": [Case("20m", latency(2), latency(0), JOB | MODEL, "One request in a hundred takes over 375ms")],
    "ModelFails": [
        Case(
            "25m",
            {FAILED: values},
            {FAILED: silent},
            JOB | MODEL | {"model_version": "4", "variant": "shadow"},
            "Version 4 (shadow) failed to answer rows",
        )
        for values, silent in (("0x20 1x20", "7x40"), ("_x20 1x20", "0x40"))
    ],
    "ModelRefused": [
        Case(
            "5m",
            {REFUSED: "_x3 1x9"},
            {REFUSED: "0x9"},
            JOB | MODEL | {"reason": "digest"},
            "A released version was refused: digest",
        ),
        Case(
            "30m",
            {REFUSED: "0x20 1x20"},
            {REFUSED: "0x2 1x40"},
            JOB | MODEL | {"reason": "digest"},
            "A released version was refused: digest",
        ),
    ],
    "PredictionsNotStored": [
        Case(
            "15m",
            {f"closedloop_spool_depth_bytes{{{SERVED}}}": "0 60000000x20"},
            {f"closedloop_spool_depth_bytes{{{SERVED}}}": "60000000x8 1000x20"},
            OF_SERVICE | MODEL,
            "57.22MiB wait for the operations store",
        )
    ],
    "StoreTooSlow": [
        Case(
            "5m",
            {f"closedloop_spool_drain_seconds{{{SERVED}}}": "0 30x20"},
            {f"closedloop_spool_drain_seconds{{{SERVED}}}": "30 2x20"},
            OF_SERVICE | MODEL,
            "The operations store needs 30s for what s has answered",
        )
    ],
    "PredictionsLost": [
        Case(
            "5m",
            {f'{STORED}"corrupt"}}': "0x3 2x9", f'{STORED}"stored"}}': "0+9x9"},
            {f'{STORED}"corrupt"}}': "0x9", f'{STORED}"stored"}}': "0+9x9", f'{STORED}"torn"}}': "0x3 1x9"},
            JOB | MODEL | {"result": "corrupt"},
            "Logged lines were corrupt and are not in the store",
        )
    ],
    "ExporterDown": [
        Case("6m", fires, {f"up{{{EXPORTER}}}": "0x3 1 0x9"}, labels, f"{who} cannot be scraped: {NO_ALERT}")
        for fires, labels, who in (
            ({f"up{{{EXPORTER}}}": "0x9"}, OF_EXPORTER, "closedloop-exporter e"),
            ({f"up{{{SERVICE}}}": "1x9"}, {"job": "closedloop-exporter"}, "closedloop-exporter "),
        )
    ],
    "OperationsStoreDown": [
        Case(
            "6m",
            of_loop("closedloop_operations_store_up", "0x9"),
            of_loop("closedloop_operations_store_up", "0x3 1x9"),
            OF_EXPORTER | MODEL,
            "The operations store cannot be read",
        )
    ],
    "MonitorSilent": [
        Case(
            "20m",
            of_loop("closedloop_monitor_check_age_seconds", "97200x30"),
            of_loop("closedloop_monitor_check_age_seconds", "90000x30"),
            OF_EXPORTER | MODEL,
            "The last check is 1d 3h 0m 0s old",
        )
    ],
    "MonitorNeverRan": [
        Case(
            "20m",
            of_loop("closedloop_model_champion_age_seconds", "97200x30"),
            of_loop("closedloop_model_champion_age_seconds", "97200x30")
            | of_loop("closedloop_monitor_check_age_seconds", "60x30"),
            OF_EXPORTER | MODEL,
            "A model serves since 1d 3h 0m 0s, and was never checked",
        ),
        Case(
            "20m",
            of_loop("closedloop_model_champion_age_seconds", "97200x30"),
            of_loop("closedloop_model_champion_age_seconds", "3600x30"),
            OF_EXPORTER | MODEL,
            "A model serves since 1d 3h 0m 0s, and was never checked",
        ),
    ],
    "MonitorBlind": [
        Case(
            "2m",
            verdict("cannot tell"),
            verdict("none"),
            OF_EXPORTER | MODEL | {"verdict": "cannot tell"},
            "For two horizons no check had enough predictions or outcomes to judge the champion by",
        )
    ],
    "ModelSuspect": [
        Case(
            "2m",
            verdict(loud),
            verdict(quiet),
            OF_EXPORTER | MODEL | {"verdict": loud},
            f"The monitor's verdict is {loud}",
        )
        for loud, quiet in (("alert", "none"), ("retrain", "watch"))
    ],
    "DataDrift": [
        Case(
            "2m",
            of_loop("closedloop_data_drift_alarm", "1x9", ', feature_name="age"'),
            of_loop("closedloop_data_drift_alarm", "0x9", ', feature_name="age"'),
            OF_EXPORTER | MODEL | {"feature_name": "age"},
            "age is distributed otherwise than in training",
        )
    ],
    "AccuracyLow": [
        Case(
            "70m",
            of_loop("closedloop_model_accuracy_rolling", "0.74x90")
            | of_loop("closedloop_model_accuracy_reference", "0.8x90"),
            of_loop("closedloop_model_accuracy_rolling", "0.76x90")
            | of_loop("closedloop_model_accuracy_reference", "0.8x90"),
            OF_EXPORTER | MODEL,
            "Of the last outcomes 74% were predicted rightly, 5 points below the reference",
        )
    ],
    "LabelsMissing": [
        Case(
            "25h",
            of_loop("closedloop_label_maturity_ratio", "0.25x1600"),
            of_loop("closedloop_label_maturity_ratio", "0.25x1300 0.6x300"),
            OF_EXPORTER | MODEL,
            "Outcomes are known of 25% of the predictions whose horizon has closed",
        )
    ],
    "FeaturesOld": [
        Case(
            "70m",
            of_loop("closedloop_feature_age_seconds", "259200x90"),
            of_loop("closedloop_feature_age_seconds", "86400x90"),
            OF_EXPORTER | MODEL,
            "The newest features served are 3d 0h 0m 0s old",
        )
    ],
    "RetrainingFailed": [
        Case(
            "2m",
            of_loop("closedloop_model_retraining_state", "1x9", ', state="failed"'),
            of_loop("closedloop_model_retraining_state", "0x9", ', state="failed"')
            | of_loop("closedloop_model_retraining_state", "1x9", ', state="refused"'),
            OF_EXPORTER | MODEL | {"state": "failed"},
            "The newest retraining failed",
        )
    ],
    "RetrainingStuck": [
        Case(
            "2m",
            of_loop("closedloop_model_retraining_open_age_seconds", "36000x9"),
            of_loop("closedloop_model_retraining_open_age_seconds", "7200x9"),
            OF_EXPORTER | MODEL,
            "A retraining has not moved for 10h 0m 0s",
        )
    ],
    "ReleaseStuck": [
        Case(
            "70m",
            FIVE_DAYS | of_loop(STEP, "1x90", ', model_version="4", step="canary_5"'),
            silent,
            OF_EXPORTER | MODEL,
            "A release is in the same step since 5d 0h 0m 0s",
        )
        for silent in (
            FIVE_DAYS | of_loop(STEP, "1x90", ', model_version="4", step="champion"'),
            of_loop(AGE, "86400x90") | of_loop(STEP, "1x90", ', model_version="4", step="canary_5"'),
        )
    ],
    "ReleaseUnwatched": [
        Case(
            "70m",
            of_loop("closedloop_model_release_look_age_seconds", "0+60x90"),
            of_loop("closedloop_model_release_look_age_seconds", "0+60x58 0+60x30"),  # it was away for almost an hour
            OF_EXPORTER | MODEL,
            "A release is under way, and no controller has judged it for 1h 10m 0s",
        )
    ],
}


def write_tests(folder: Path, name: str, cases: list[Case]) -> Path:
    rule = RULES[name]

    def write(case: Case, series: dict[str, str], expected: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "interval": "1m",
            "input_series": [{"series": key, "values": values} for key, values in series.items()],
            "alert_rule_test": [{"eval_time": case.at, "alertname": name, "exp_alerts": expected}],
        }

    tests = []
    for case in cases:
        annotations = {"summary": case.summary, "runbook_url": rule["annotations"]["runbook_url"]}
        expected = {"exp_labels": case.labels | rule["labels"], "exp_annotations": annotations}
        tests += [write(case, case.fires, [expected]), write(case, case.silent, [])]
    path = folder / "tests.yaml"
    content = {"rule_files": [str(FOLDER / "rules.yaml")], "evaluation_interval": "1m", "tests": tests}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(*command: str) -> str:
    require(shutil.which(command[0]), command[0])
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_every_alert_has_cases():
    assert list(CASES) == list(RULES)
    assert all(CASES.values())


@pytest.mark.parametrize("name", list(RULES))
def test_an_alert_fires_when_it_must_and_is_silent_when_it_must_be(name, tmp_path):
    run("promtool", "test", "rules", str(write_tests(tmp_path, name, CASES[name])))


def test_the_rules_are_valid():
    run("promtool", "check", "rules", str(FOLDER / "rules.yaml"))


@pytest.mark.parametrize(("severity", "receiver"), [("critical", "now"), ("warning", "today"), ("info", "known")])
def test_alerts_go_where_they_should(severity, receiver):
    config = str(FOLDER / "alertmanager.yaml")
    run(
        "amtool",
        "config",
        "routes",
        "test",
        f"--config.file={config}",
        f"--verify.receivers={receiver}",
        f"severity={severity}",
    )


def test_the_alertmanager_configuration_is_valid_and_holds_no_address():
    config = FOLDER / "alertmanager.yaml"
    run("amtool", "check-config", str(config))
    assert "https://" not in config.read_text(encoding="utf-8")


def test_composes_alertmanager_starts_by_the_same_file_and_keeps_alerts_without_slack(tmp_path):
    """By its own options, where the container's paths are the files that are mounted there; /dev/null is no address."""
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    service = compose["services"]["alertmanager"]
    mounted = {place: str(ROOT / host) for host, place, *_ in (one.split(":") for one in service["volumes"])}
    options = dict(option.split("=") for option in service["command"])
    config = mounted[options["--config.file"]]
    assert options["--storage.path"] in mounted
    run("amtool", "check-config", config)
    (secret,) = service["secrets"]
    text = Path(config).read_text(encoding="utf-8")
    assert f"slack_api_url_file: {secret['target']}\n" in text
    given = re.fullmatch(r"\$\{SLACK_URL_FILE:-(.*)\}", compose["secrets"][secret["source"]]["file"])
    (tmp_path / "config.yaml").write_text(text.replace(secret["target"], given[1]), encoding="utf-8")
    port = find_free_port()
    address, alert = f"http://127.0.0.1:{port}", "alertname=ServiceDown severity=critical"
    command = [
        "prometheus-alertmanager", f"--config.file={tmp_path / 'config.yaml'}", f"--storage.path={tmp_path / 'alerts'}",
        f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
    ]  # fmt: skip
    with run_program(tmp_path / "log", *command, cwd=tmp_path):
        wait_until(lambda: fetch(f"{address}/-/ready"), "readiness of the alertmanager")
        run("amtool", "alert", "add", f"--alertmanager.url={address}", *alert.split())
        wait_until(
            lambda: "ServiceDown" in run("amtool", "alert", "query", f"--alertmanager.url={address}"), "the alert"
        )


class PagerDuty(http.server.BaseHTTPRequestHandler):
    """Takes events as PagerDuty's Events API does."""

    taken: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.taken.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(202)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Mail(socketserver.StreamRequestHandler):
    """Takes mails as a server of SMTP does that asks for no password."""

    taken: ClassVar[list[str]] = []

    def handle(self) -> None:
        self.wfile.write(b"220 here\r\n")
        body: list[bytes] | None = None
        for line in self.rfile:
            if body is not None and line != b".\r\n":
                body.append(line)
                continue
            if body is not None:
                self.taken.append(b"".join(body).decode())
                body = None
            elif line.upper().startswith(b"DATA"):
                body = []
            self.wfile.write(b"354 go on\r\n" if body == [] else b"250 taken\r\n")


@contextlib.contextmanager
def run_receiver(kind: type[socketserver.ThreadingTCPServer], handler: Any) -> Iterator[str]:
    handler.taken.clear()
    with kind(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_pagerduty_and_mail_are_told_by_the_receivers_of_the_page(tmp_path):
    """A real Alertmanager with its routes; other are the addresses, the waits and the places of secrets alone."""
    page = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    added = yaml.safe_load(re.search(r"```yaml\n(receivers:.*?)```", page, re.DOTALL)[1])["receivers"]
    config = yaml.safe_load((FOLDER / "alertmanager.yaml").read_text(encoding="utf-8"))
    receivers = {one["name"]: one for one in config["receivers"]}
    for one in added:
        receivers[one["name"]] |= one
    config["route"]["group_wait"] = "1s"
    whole = tmp_path / "whole.yaml"
    whole.write_text(yaml.safe_dump(config), encoding="utf-8")
    run("amtool", "check-config", str(whole))
    with (
        run_receiver(http.server.ThreadingHTTPServer, PagerDuty) as duty,
        run_receiver(socketserver.ThreadingTCPServer, Mail) as mail,
    ):
        key = tmp_path / "key"
        key.write_text("r0ut1ng", encoding="utf-8")
        del config["global"]["slack_api_url_file"]
        for receiver in receivers.values():
            del receiver["slack_configs"]
        receivers["now"]["pagerduty_configs"][0] |= {"url": f"http://{duty}/v2/enqueue", "routing_key_file": str(key)}
        for name in ("auth_username", "auth_password_file"):
            del receivers["today"]["email_configs"][0][name]
        receivers["today"]["email_configs"][0] |= {"smarthost": mail, "require_tls": False}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        port = find_free_port()
        command = [
            "prometheus-alertmanager", f"--config.file={tmp_path / 'config.yaml'}",
            f"--storage.path={tmp_path / 'kept'}",
            f"--web.listen-address=127.0.0.1:{port}", "--cluster.listen-address=",
        ]  # fmt: skip
        with run_program(tmp_path / "log", *command, cwd=tmp_path):
            address = f"http://127.0.0.1:{port}"
            wait_until(lambda: fetch(f"{address}/-/ready"), "readiness of the alertmanager")
            for labels in ("alertname=ServiceDown severity=critical", "alertname=ModelSuspect severity=warning"):
                run("amtool", "alert", "add", f"--alertmanager.url={address}", *labels.split())
            wait_until(lambda: PagerDuty.taken and Mail.taken, "an event and a mail")
    assert PagerDuty.taken[0]["routing_key"] == "r0ut1ng"
    assert "ServiceDown" in json.dumps(PagerDuty.taken)
    assert "ModelSuspect" not in json.dumps(PagerDuty.taken)
    assert any("ModelSuspect" in one and "To: team@example.com" in one for one in Mail.taken)
