"""`mlops-pipeline.yml`, every command as it stands there, on one machine: a change of parameters is released or not."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import re
import subprocess
from urllib.parse import urlencode

import pytest
import yaml
from playwright.sync_api import Error, expect

from tests.browser import keep_pictures, open_browser
from tests.deployment import CLOSED, run_place
from tests.http_service import Load, wait_until
from tests.manifests import ROOT
from tests.production import BUCKETS, commit

pytestmark = [pytest.mark.thorough, pytest.mark.long, pytest.mark.timeout(3600)]

WORKFLOW = "mlops-pipeline.yml"
JOBS = ("train", "images", "register", "release")
DEFAULT = {"model": {"params": {"max_iter": 100, "max_leaf_nodes": 31}}}
STEPS = ["shadow", "canary_5", "canary_25", "canary_50", "champion"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with run_place(tmp_path_factory.mktemp("pipeline")) as made:
        yield made


def list_commands():
    """Every command of a push to the main branch, in the order of the file."""
    said = yaml.safe_load((ROOT / ".github/workflows" / WORKFLOW).read_text(encoding="utf-8"))["jobs"]
    return [step["run"] for job in JOBS for step in said[job]["steps"] if "run" in step]


@contextlib.contextmanager
def ask_mlflow(place):
    """A client that is let in."""
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(name, place.production.environment[name])
        yield MlflowClient(place.production.mlflow.url)


def read_alias(place, alias):
    """Which version MLflow's server says it is."""
    with ask_mlflow(place) as client:
        return str(client.get_model_version_by_alias("shop_churn", alias).version)


def check_monitor(place):
    """What the champion answered today, and what became of customers whose horizon has closed: both are as expected."""
    tomorrow = (dt.datetime.now(dt.UTC) + dt.timedelta(days=1)).date().isoformat()
    for today in (CLOSED, tomorrow):
        said = place.run_job("monitor", today)
        assert f"none: version 1 as of {today}, " in said, said
        assert "report: " in said, said
    statement = "SELECT outcomes, predictions, evidence FROM checks ORDER BY as_of"
    outcomes, predictions = place.query(statement)
    assert outcomes[0] > 500
    assert "realised" in outcomes[2]
    assert predictions[1] > 5_000
    assert "drift" in predictions[2]
    stored = place.production.bucket.client().list_objects_v2(Bucket=BUCKETS[1])["Contents"]
    assert sum(one["Key"].endswith("/report.html") for one in stored) == 2


def release_on_evidence(place, version):
    """As the controller does, step by step, on what customers asked and on what became of them."""
    place.send(5_000, version, "shadow")
    place.run_job("outcomes")
    check_monitor(place)
    for step in STEPS[1:]:
        place.take_step()
        assert place.read_entries()[-1]["action"] == step, place.read_entries()[-1]["reason"]
        if step != "champion":
            place.send(250, version, "canary")


def test_a_change_of_parameters_becomes_the_champion(place):
    place.origin.change_params(DEFAULT)
    commit(place.origin.root, "a better model")
    steps = place.runner.run(WORKFLOW)
    for step in steps:
        assert step.status == 0, f"{step.command}:\n{step.output}"
    assert [step.command for step in steps] == list_commands()[:-1]  # the last one is the rollback
    said = {step.command: step.output for step in steps}
    assert "Stage 'ingest' didn't change, skipping" in said[".venv/bin/dvc repro validate"]
    assert "Running stage 'train'" in said[".venv/bin/dvc repro evaluate"]
    table = (place.runner.folder / "train/checkout/artifacts/metrics-diff.md").read_text(encoding="utf-8")
    assert re.search(r"max_iter +\| 8 +\| 100 ", table)
    assert place.read_row() == ("1", "2", "shadow")
    assert [entry["action"] for entry in place.read_entries()] == ["promote", "shadow"]
    release_on_evidence(place, "2")
    entries = place.read_entries()
    assert [entry["action"] for entry in entries] == ["promote", *STEPS]
    assert all(entry["actor"] == "controller" for entry in entries[2:])
    assert "it must not be proved worse" in entries[2]["reason"]  # by outcomes that have closed
    wait_until(lambda: place.count_versions(100) == {"2": 100}, "the service's new model")
    assert read_alias(place, "champion") == "2"
    assert "the journal holds: 6 entries" in place.verify()
    commit_id = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], cwd=place.origin.root, capture_output=True, text=True, check=True
    ).stdout.strip()
    [job] = place.cluster.folder.glob("jobs/retrain-*/job.json")
    assert f'/closedloop-jobs:{commit_id}"' in job.read_text(encoding="utf-8")


def test_a_candidate_whose_canary_is_unlike_what_it_was_evaluated_by_is_taken_back(place, tmp_path):
    """In canary only customers ask whom it thinks likely to leave."""
    place.production.run(place.origin.root, "closedloop", "release", "promote", "1")
    place.origin.change_params({"model": {"params": {"max_iter": 120}}})
    commit(place.origin.root, "another model")

    def act(step):
        if step == "release check":
            place.send(5_000, "3", "shadow")
            place.take_step()
            place.send(250, "3", "canary")
            place.take_step()
            assert place.read_row() == ("1", "3", "canary")
            place.send(1_000, "3", "canary", place.list_likely(share=0.2))

    steps = dataclasses.replace(place.runner, folder=tmp_path).run(WORKFLOW, act)
    *before, check, rollback = steps
    assert [step.command for step in steps] == list_commands()
    for step in (*before, rollback):
        assert step.status == 0, f"{step.command}:\n{step.output}"
    assert check.status != 0
    assert "apart from those that it was evaluated by" in check.output
    assert "GateFailed: version 3 would be taken back" in " ".join(check.output.split())
    assert place.read_row() == ("1", None, None)
    actions = [entry["action"] for entry in place.read_entries()]
    assert actions[-6:] == ["promote", "routed", "shadow", "canary_5", "canary_25", "roll_back"]
    last = place.read_entries()[-1]
    assert (last["rejected"], last["reason"]) == ("3", "the release check failed")
    assert read_alias(place, "champion") == "1"
    wait_until(lambda: place.count_versions(100) == {"1": 100}, "the champion alone")

    place.run_job("release-stop")  # the controller was faster: the champion stays
    assert len(place.read_entries()) == len(actions)
    assert f"the journal holds: {len(actions)} entries" in place.verify()


@pytest.fixture
def browser():
    """Started after all else: playwright leaves an event loop running in this thread."""
    with open_browser(loopback=True) as started:
        yield started


@pytest.fixture
def page(browser, place):
    """A person who knows MLflow's password; what is asked of others than this machine fails the test."""
    given = place.production.environment
    known = {"username": given["MLFLOW_TRACKING_USERNAME"], "password": given["MLFLOW_TRACKING_PASSWORD"]}
    opened = browser.new_page(viewport={"width": 1600, "height": 1000}, http_credentials=known)
    asked = []
    opened.on("request", lambda request: asked.append(request.url))
    expect.set_options(timeout=120_000)
    yield opened
    assert asked
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:http://127.0.0.1:"))] == []


@pytest.mark.browser
def test_mlflow_shows_the_model_and_its_versions_to_whom_it_knows(place, browser, page, tmp_path):
    stranger = browser.new_page()
    with pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"):  # it asks, and nobody answers
        stranger.goto(place.production.mlflow.url)
    stranger.close()
    page.goto(place.production.mlflow.url)
    page.get_by_role("button", name="Model training", exact=True).click()
    page.get_by_role("link", name="Model registry").click()
    page.get_by_role("button", name="Try it now").click()  # MLflow introduces its registry once
    page.get_by_role("row").get_by_role("link", name="shop_churn", exact=True).click()
    expect(page.get_by_role("heading", name="shop_churn")).to_be_visible()
    champion = read_alias(place, "champion")
    with ask_mlflow(place) as client:
        versions = [str(one.version) for one in client.search_model_versions("name = 'shop_churn'")]
    for version in versions:
        row = page.get_by_role("row").filter(has=page.get_by_role("cell", name=f"Version {version}", exact=True))
        (expect(row).to_contain_text if version == champion else expect(row).not_to_contain_text)("champion")
    page.screenshot(path=keep_pictures(tmp_path) / "production_mlflow.png")


@pytest.mark.browser
def test_the_services_page_shows_its_routes(place, page, tmp_path):
    page.goto(f"http://127.0.0.1:{place.service.port}/docs")
    routes = place.service.call("GET", "/openapi.json")[1]["paths"]
    assert {"/predict", "/predict/batch", "/outcomes", "/health"} <= set(routes)
    expect(page.get_by_role("heading", level=2)).to_have_count(len(routes))
    for route, said in routes.items():
        [(verb, operation)] = said.items()
        heading = page.get_by_role("heading", name=f"{verb.upper()} {route} ")
        expect(heading.filter(has_text=operation["summary"])).to_have_count(1)
    page.screenshot(path=keep_pictures(tmp_path) / "production_docs.png", full_page=True)


@pytest.mark.browser
def test_prometheus_shows_a_panels_query_and_the_alerts(place, page, tmp_path):
    folder, kept = ROOT / "k8s/base/observability", keep_pictures(tmp_path)
    panels = json.loads((folder / "dashboards/serving.json").read_text(encoding="utf-8"))["panels"]
    [panel] = [panel for panel in panels if panel["title"] == "Rows scored, by version"]
    expression = panel["targets"][0]["expr"].replace("$__rate_interval", "1m")
    version = place.read_row()[0]
    with Load(place.service, keep=False, customers=place.list_customers()) as load:
        load.wait_for(500)
        address = f"{place.prometheus}/classic/graph?{urlencode({'g0.expr': expression, 'g0.range_input': '5m'})}"

        def is_shown():
            page.goto(f"{address}&g0.tab=1")
            page.get_by_text("Load time:").wait_for()
            return page.get_by_text(f'{{model_version="{version}",variant="champion"}}').count()

        wait_until(is_shown, "rows of the champion")
        page.screenshot(path=kept / "production_prometheus_table.png")
        page.goto(f"{address}&g0.tab=0")
        expect(page.locator(".graph svg path").first).to_be_visible()
        page.screenshot(path=kept / "production_prometheus_graph.png")
    page.goto(f"{place.prometheus}/classic/alerts")
    groups = yaml.safe_load((folder / "rules.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in [rule["alert"] for group in groups for rule in group["rules"]]:
        expect(page.get_by_text(rule, exact=False).first).to_be_visible()
    page.screenshot(path=kept / "production_prometheus_alerts.png", full_page=True)
