"""The report of a check, through the real store, Evidently and MLflow: once a check, whatever dies in between."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest

from closedloop.adapters.checks import Check, Checks
from closedloop.adapters.mlflow import MONITOR_TAG, Tracking
from closedloop.adapters.samples import Samples
from closedloop.adapters.store import Store
from closedloop.contract import REFERENCE_FILE
from closedloop.loop.monitor import Rules, run_check
from closedloop.loop.report import keep_report
from closedloop.records import Outcome, Prediction, digest_position
from closedloop.settings import Settings
from tests.browser import keep_pictures, open_browser
from tests.integration.test_monitor import MODEL, NOW, make_rows
from tests.model_folders import write_model_folder

pytestmark = pytest.mark.thorough
DAY = dt.timedelta(days=1)


class Loop:
    """A store with a window of shifted predictions, and with outcomes of older ones if they are given."""

    def __init__(self, folder: Path, labels: Any = None, rows: int = 1_000) -> None:
        self.folder = folder / "reports/2024-02-01"
        self.model_dir = write_model_folder(folder / "model")
        make_rows(1, (20, 70)).to_parquet(self.model_dir / REFERENCE_FILE)
        url = f"sqlite:///{folder / 'operations.db'}"
        self.store, self.checks, self.samples = Store(url), Checks(url), Samples(url)
        self.store.upgrade()
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
            model_dir=self.model_dir,
            version="7",
            as_of=NOW,
            now=NOW,
            rules=Rules(),
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


def test_a_report_is_kept_once_and_shows_how_good_the_estimate_was(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lambda rows: rows["churned"])
    run_id = loop.keep()
    assert loop.list_pages() == ["data.html", "outcomes.html", "report.html"]
    page = (loop.folder / "report.html").read_text(encoding="utf-8")
    realised = loop.check().evidence["realised"]
    for figures in (realised, realised["expected"]):
        for name in ("accuracy", "brier", "roc_auc", "churn_rate"):
            assert f"{figures[name]:.4f}" in page
    error = abs(realised["accuracy"] - realised["expected"]["accuracy"])
    assert f"<strong>{error:.4f}</strong>" in page
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
    figures = {"data": 2 * len(loop.check().evidence["drift"]["features"]), "outcomes": 4}
    asked, failed = list[str](), list[str]()
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.on("request", lambda request: asked.append(request.url))
        page.on("requestfailed", lambda request: failed.append(request.url))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.goto((loop.folder / "report.html").as_uri())
        for link in ("drift of features and score, data quality", "performance where outcomes are known"):
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
    assert len(loop.tracking.client.list_artifacts(begun, "monitoring")) == 2


def test_without_outcomes_there_is_no_page_of_them_and_the_report_says_so(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.keep()
    assert loop.list_pages() == ["data.html", "report.html"]
    page = (loop.folder / "report.html").read_text(encoding="utf-8")
    assert "no outcomes yet, or of one kind only" in page
    assert "Too few outcomes have closed for this version to say." in page


def test_outcomes_of_one_kind_have_figures_but_no_page(tmp_path: Path) -> None:
    loop = Loop(tmp_path, lambda rows: rows["churned"] * 0)
    loop.keep()
    assert loop.list_pages() == ["data.html", "report.html"]
    page = (loop.folder / "report.html").read_text(encoding="utf-8")
    assert f"{loop.check().evidence['realised']['accuracy']:.4f}" in page


def test_a_window_without_rows_has_a_report_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path, rows=0)
    loop.keep()
    assert loop.list_pages() == ["report.html"]
    assert "Too few customers in the window to judge." in (loop.folder / "report.html").read_text(encoding="utf-8")
