"""The report of a check, through the real store, Evidently and MLflow: once a check, whatever dies in between."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import Any

import pytest

from closedloop.adapters.mlflow import MONITOR_TAG, Tracking
from closedloop.config.settings import Settings
from closedloop.contract import REFERENCE_FILE
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.errors import ConfigError
from closedloop.loop.monitor.monitor import ValueSource, run_check
from closedloop.loop.monitor.report import keep_report, order_drift
from closedloop.records import Outcome, Prediction, digest_position
from closedloop.serving.slots.slots import Slot
from closedloop.store.checks import Check, Checks
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.store.samples import Samples
from tests.browser import keep_pictures, open_browser
from tests.integration.test_monitor import MODEL, NOW, make_rows
from tests.model_folders import write_model_folder

pytestmark = pytest.mark.thorough
DAY = dt.timedelta(days=1)
WORTH = ValueSource(CustomerValue(kept=KeptCustomer(column="age"), offer_cost=2, save_rate=0.2), ("age",))


class Loop:
    """A store with a window of shifted predictions, and with outcomes of older ones if they are given."""

    def __init__(self, folder: Path, labels: Any = None, rows: int = 1_000) -> None:
        self.folder = folder / "reports/2024-02-01"
        self.model_dir = write_model_folder(folder / "model")
        make_rows(1, (20, 70)).to_parquet(self.model_dir / REFERENCE_FILE)
        url = f"sqlite:///{folder / 'operations.db'}"
        self.store, self.checks, self.samples = (
            Predictions(Database(url)),
            Checks(Database(url)),
            Samples(Database(url)),
        )
        self.store.database.upgrade()
        self.tracking = Tracking(Settings(root=folder), MODEL)
        self.insert(make_rows(2, (45, 80)).head(rows), NOW - DAY / 2)
        if labels is not None:
            closed = make_rows(3, (20, 70))
            ids = self.insert(closed, NOW - 31 * DAY)
            known = [Outcome(one, int(label), NOW) for one, label in zip(ids, labels(closed), strict=True)]
            self.store.insert(known)

    def insert(self, rows: Any, at: dt.datetime) -> list[str]:
        fixed = ("r", MODEL, "7", "champion", "http", at)
        made = [
            Prediction(
                digest_position("row", at.isoformat(), n),
                *fixed,
                tuple(row[:3]),
                row.score,
                0,
                0.5,
                customer_id=f"c{n}",
                features_as_of=at.replace(hour=0),
            )
            for n, row in enumerate(rows.itertuples(index=False))
        ]
        self.store.insert(made)
        return [one.prediction_id for one in made]

    def check(self) -> Check:
        found, _ = run_check(
            self.checks,
            self.samples,
            slot=Slot("7", str(self.model_dir), ""),
            as_of=NOW,
            now=NOW,
            policy=MonitoringPolicy(),
            worth=WORTH,
        )
        return found

    def keep(self) -> str:
        return keep_report(
            self.tracking,
            self.samples,
            self.check(),
            [],
            model_dir=self.model_dir,
            folder=self.folder,
            rows_max=20_000,
        )

    def list_runs(self) -> list[Any]:
        experiment = self.tracking.client.get_experiment_by_name(MODEL)
        return list(self.tracking.client.search_runs([experiment.experiment_id])) if experiment else []

    def list_pages(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def test_without_evidently_a_report_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evidently", None)
    loop = Loop(tmp_path)
    with pytest.raises(
        ConfigError, match=r"a report needs the Python package evidently, .*install closedloop\[monitor\]"
    ):
        loop.keep()
    assert not loop.folder.exists()


def test_a_report_is_kept_once_and_shows_how_good_the_estimate_was(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lambda rows: rows["churned"])
    run_id = loop.keep()
    assert loop.list_pages() == ["data.html", "data_all.html", "outcomes.html", "report.html"]
    page = (loop.folder / "report.html").read_text(encoding="utf-8")
    realised = loop.check().evidence["realised"]
    for figures in (realised, realised["expected"]):
        for name in ("accuracy", "brier", "roc_auc", "churn_rate"):
            assert f"{figures[name]:.4f}" in page
    error = abs(realised["accuracy"] - realised["expected"]["accuracy"])
    assert f"<strong>{error:.4f}</strong>" in page
    money = loop.check().evidence["money"]
    kept = make_rows(3, (20, 70))  # of a customer's predictions in the window the first counts
    assert money["at_stake"] == pytest.approx(kept["score"] @ kept["age"])
    assert money["offers"] == int((0.2 * kept["score"] * kept["age"] > 2).sum()) > 0
    assert f"Money: {money['at_stake']:,.0f} is at stake with 1,000 customers" in page
    assert loop.keep() == run_id
    [run] = loop.list_runs()
    assert run.data.tags[MONITOR_TAG] == loop.check().check_id
    assert run.data.tags["closedloop.model_version"] == "7"
    kept = loop.tracking.client.list_artifacts(run_id, "monitoring")
    assert [Path(one.path).name for one in kept] == loop.list_pages()


@pytest.mark.browser
def test_every_page_opens_and_draws_its_figures_without_a_network(tmp_path: Path) -> None:
    loop, kept = Loop(tmp_path, lambda rows: rows["churned"]), keep_pictures(tmp_path)
    loop.keep()
    drift = loop.check().evidence["drift"]
    figures = {"data": len(drift["drifted"]) + 1, "data_all": 2 * len(drift["features"]), "outcomes": 4}
    asked, failed = list[str](), list[str]()
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: failed.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto((loop.folder / "report.html").as_uri())
        links = "drifted features and score", "all features, and the quality of their data"
        for link in (*links, "performance where outcomes are known"):
            page.screenshot(path=kept / "monitoring_report.png", full_page=True)
            page.get_by_role("link", name=link).click()
            name = Path(page.url).stem
            page.wait_for_function(
                f"document.querySelectorAll('.js-plotly-plot').length == {figures.pop(name)}", timeout=120_000
            )
            # the extent in pixels of what each figure draws inside its axes
            page.wait_for_function(
                """[...document.querySelectorAll('.js-plotly-plot')].every(plot =>
                    [...plot.querySelectorAll('.plot path, .plot image')].some(
                        mark => mark.getBBox().width + mark.getBBox().height > 100))""",
                timeout=120_000,
            )
            page.screenshot(path=kept / f"monitoring_{name}.png", full_page=True)
            page.go_back()
    assert figures == {}
    assert failed == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_a_run_that_was_begun_and_never_ended_is_gone_on_with(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with loop.tracking.start_run("monitor", tags={MONITOR_TAG: loop.check().check_id}) as begun:
        pass
    loop.tracking.client.update_run(begun, status="RUNNING")  # as a kill leaves it
    assert loop.keep() == begun
    [run] = loop.list_runs()
    assert run.info.status == "FINISHED"
    assert len(loop.tracking.client.list_artifacts(begun, "monitoring")) == 3


def test_without_outcomes_there_is_no_page_of_them_and_the_report_says_so(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.keep()
    assert loop.list_pages() == ["data.html", "data_all.html", "report.html"]
    page = (loop.folder / "report.html").read_text(encoding="utf-8")
    assert "no outcomes yet, or of one kind only" in page
    assert "No outcome has closed for this version yet." in page


def test_what_drifted_comes_first_with_its_picture_and_no_p_value_is_zero(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.keep()
    drift = loop.check().evidence["drift"]
    assert drift["drifted"] == ["age"]
    assert drift["features"]["age"]["p_value"] == 0
    page = (loop.folder / "report.html").read_text(encoding="utf-8").replace("<wbr>", "")
    table = page[page.index("<th>this monitor says</th>") :]
    assert page.index('aria-label="age: ') < page.index("<th>this monitor says</th>")
    assert page.index('aria-label="visits_30d: ') > page.index("<details>")
    names = [name for name, _ in order_drift(loop.check().evidence)]
    assert names[0] == "age"
    assert sorted(names, key=lambda name: table.index(f'<td class="name">{name}')) == names
    assert "&lt; .001</td>" in table
    assert "<strong>watch</strong></li>" in page


def test_outcomes_of_one_kind_have_figures_but_no_page(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lambda rows: rows["churned"] * 0)
    loop.keep()
    assert loop.list_pages() == ["data.html", "data_all.html", "report.html"]
    page = (loop.folder / "report.html").read_text(encoding="utf-8")
    assert f"{loop.check().evidence['realised']['accuracy']:.4f}" in page


def test_a_window_without_rows_has_a_report_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path, rows=0)
    loop.keep()
    assert loop.list_pages() == ["report.html"]
    assert "Too few customers in the window to judge." in (loop.folder / "report.html").read_text(encoding="utf-8")
