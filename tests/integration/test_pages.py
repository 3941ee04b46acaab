"""Every page that people look at: fits a telephone, prints, opens offline, and passes axe-core, in a real browser."""

from __future__ import annotations

import contextlib
import datetime as dt
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from closedloop.loop.start_page import write_start_page
from closedloop.loop.status.overview import Sources, gather
from closedloop.replay.page import write_page
from closedloop.store.checks import Checks
from closedloop.store.database import Database
from closedloop.store.journal import Journal
from closedloop.store.status_queries import StatusQueries
from tests.browser import install_axe, keep_pictures, open_browser
from tests.conftest import Project
from tests.http_service import HttpService, run_service
from tests.integration.test_attach import CONFIG, make_rows
from tests.integration.test_report import Loop
from tests.loops import HORIZON_DAYS, NAME, fill

pytestmark = [pytest.mark.thorough, pytest.mark.browser, pytest.mark.timeout(900)]
NAMES = ("start", "model_card", "data_quality", "monitoring", "attached", "loop", "plots", "docs")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# What is wider than the window and stands in no box that scrolls by itself.
TOO_WIDE = """() => [...document.querySelectorAll('main *')].filter(one =>
    !one.closest('.scroll') && one.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map(one => one.outerHTML.slice(0, 120))"""
UNSCROLLED = "() => [...document.querySelectorAll('table')].filter(one => !one.closest('.scroll')).length"

VIOLATIONS = """async () => (await axe.run()).violations.flatMap(one => one.nodes.map(node =>
    [one.id, node.html.slice(0, 200), node.failureSummary.slice(0, 300)]))"""


def tell_story() -> dict[str, Any]:
    """A replay's report: a change, a promotion between two snapshots, a bad version and a refusal."""
    figures = [("2024-05-02", 0.30, 0.30), ("2024-06-01", 0.38, 0.38), ("2024-07-01", 0.31, 0.39)]
    arms = [
        {"snapshot": day, "customers": 900, "churn_rate": 0.2, "constant_log_loss": 0.5004,
         "closed": {"log_loss": closed, "roc_auc": 0.9}, "frozen": {"log_loss": frozen, "roc_auc": 0.85}}
        for day, closed, frozen in figures
    ]  # fmt: skip
    realised = {"brier": 0.1, "churn_rate": 0.2, "expected": {"brier": 0.1, "churn_rate": 0.2}, "breach": False}
    check = {
        "model_version": "1",
        "verdict": "watch",
        "drift": 0.2,
        "drifted": {"purchase_mean_90d": 0.2},
        "treated": 90,
    }
    ticks = [
        {"at": "2024-05-02", "customers": 900, "outcomes": 0},
        {**check, "at": "2024-06-01", "outcome_rows": 0},
        {**check, "at": "2024-07-01", "outcome_rows": 12},
        {**check, "at": "2024-07-31", "outcome_rows": 900, "outcomes_of": "2024-05-02", "realised": realised},
    ]
    events = [
        {"at": day, "kind": kind, "what": what, "why": "a reason " * 30}
        for day, kind, what in (
            ("2024-05-02", "first model", "version 1 serves"),
            ("2024-06-01", "bad offered", "version 2"),
            ("2024-06-02", "rolled back", "version 2"),
            ("2024-06-10", "retrain", "the monitor says retrain"),
            ("2024-06-10", "refused", "version 3 does not become challenger"),
            ("2024-06-20", "promoted", "version 4 serves every customer"),
        )
    ]
    harm = {"list_share": 0.2, "since": "2024-06-01", "noticed_days": 9, "mended_days": 19,
            "found": {"customers": 1800, "leavers": 360, "closed": 250, "frozen": 210},
            "bad": {"version": "2", "customers": 0, "days": 1}}  # fmt: skip
    changes = [{"at": "2024-06-01", "kind": "concept", "what": "customers leave for another reason"}]
    campaign = {"at": "2024-05-02", "treated": 900, "held_out": 100, "told": ["undecided: the interval spans zero"]}
    return {"dataset": "shop", "days": [tick["at"] for tick in ticks], "requests_answered": 2_700, "requests_failed": 0,
            "champion": "4", "conclusion": "The closed loop is better.", "harm": harm, "drift_limit": 0.1,
            "outcome_rows_min": 500, "regime_changes": changes, "arms": arms, "ticks": ticks,
            "events": events, "campaign": campaign}  # fmt: skip


@pytest.fixture(scope="module")
def service(small_shop: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpService]:
    """The real service with the small shop's model, without a token."""
    copied = small_shop.copy(tmp_path_factory.mktemp("service") / "project")
    with run_service(copied.root, "--model", "models/candidate") as started:
        yield started


def write_start(root: Path, monitoring: Path, folder: Path) -> None:
    """The start page of a loop that has been running, with what to type next."""
    now = dt.datetime(2024, 3, 1, 12, tzinfo=dt.UTC)
    fill(f"sqlite:///{folder / 'operations.db'}", now)
    database = Database(f"sqlite:///{folder / 'operations.db'}")
    sources = Sources(Journal(database), Checks(database), StatusQueries(database))
    view = gather(sources, NAME, horizon_days=HORIZON_DAYS, now=now, as_of=now)
    with contextlib.chdir(root):
        write_start_page(
            view, root=root, monitoring=monitoring.parent, replay=folder / "loop.html", tracking=root / "mlflow.db"
        )
    database.close()


def attach_theirs(folder: Path) -> Path:
    """The report on a model that somebody else serves, whose customers have changed."""
    folder.mkdir()
    make_rows(4000, 1).to_parquet(folder / "reference.parquet", index=False)
    make_rows(2000, 3, shift=-0.7).to_csv(folder / "window.csv", index=False)
    (folder / "theirs.yaml").write_text(CONFIG, encoding="utf-8")
    Project(folder).run("attach", "theirs.yaml", "--as-of", "2024-04-01")
    return folder / "attached/theirs/report.html"


@pytest.fixture(scope="module")
def addresses(small_shop: Project, service: HttpService, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where each page is, each made by the code that makes it for people."""
    folder = tmp_path_factory.mktemp("pages")
    loop = Loop(folder / "monitoring", lambda rows: rows["churned"])
    loop.keep()
    write_page(folder / "loop.html", tell_story())
    plotted = small_shop.copy(folder / "plotted")
    plotted.add_sources(".dvc")
    plotted.run("plots-template")
    subprocess.run(["git", "init", "--quiet"], cwd=plotted.root, check=True)
    drawn = subprocess.run(["dvc", "plots", "show"], cwd=plotted.root, capture_output=True, text=True, check=False)
    assert drawn.returncode == 0, drawn.stderr
    write_start(small_shop.root, loop.folder, folder)
    files = {
        "start": small_shop.root / "reports/index.html",
        "attached": attach_theirs(folder / "attached"),
        "model_card": small_shop.root / "reports/model_card.html",
        "data_quality": small_shop.root / "reports/data_quality.html",
        "monitoring": loop.folder / "report.html",
        "loop": folder / "loop.html",
        "plots": plotted.root / "dvc_plots/index.html",
    }
    docs = f"http://127.0.0.1:{service.port}/docs"
    return {name: path.as_uri() for name, path in files.items()} | {"docs": docs}


@pytest.fixture(scope="module")
def browser(addresses: dict[str, str]) -> Iterator[Browser]:
    """Started after the pages are made: playwright leaves an event loop running in this thread."""
    with open_browser(loopback=True) as started:
        yield started


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install_axe(tmp_path_factory.mktemp("axe"))


def open_page(page: Page, address: str) -> None:
    """Open a page and every fold of it, and wait for what its scripts draw."""
    page.goto(address)
    if address.endswith("/docs"):
        page.locator("section").nth(6).wait_for()
    if address.endswith("dvc_plots/index.html"):
        page.locator("svg.marks").nth(4).wait_for()
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_fits_a_telephone_and_asks_nobody_for_anything(
    browser: Browser, addresses: dict[str, str], tmp_path: Path, name: str
) -> None:
    kept, asked, errors = keep_pictures(tmp_path), list[str](), list[str]()
    for size in (WIDE, NARROW):
        page = browser.new_page(viewport=size)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        open_page(page, addresses[name])
        page.screenshot(path=kept / f"{name}_{size['width']}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate(UNSCROLLED) == 0
        page.close()
    own = ("file:", "data:", "blob:", addresses["docs"].removesuffix("docs"))
    assert [url for url in asked if not url.startswith(own)] == []
    assert errors == []


@pytest.mark.parametrize("name", NAMES)
def test_a_page_passes_axe(browser: Browser, addresses: dict[str, str], axe: Path, name: str) -> None:
    for size in (WIDE, NARROW):
        page = browser.new_page(viewport=size)
        open_page(page, addresses[name])
        page.add_script_tag(path=str(axe))
        found = page.evaluate(VIOLATIONS)
        page.close()
        assert found == []


@pytest.mark.parametrize("name", NAMES)
def test_a_page_prints_without_what_only_a_screen_has(browser: Browser, addresses: dict[str, str], name: str) -> None:
    page = browser.new_page(viewport=WIDE)
    open_page(page, addresses[name])
    for media, margin in (("screen", "32px"), ("print", "0px")):
        page.emulate_media(media=media)
        assert page.evaluate("getComputedStyle(document.body).marginTop") == margin
        flows = set(page.eval_on_selector_all(".scroll", "all => all.map(one => getComputedStyle(one).overflowX)"))
        assert flows <= {"auto" if media == "screen" else "visible"}
        shown = page.eval_on_selector_all("button, .screen", "all => all.filter(one => one.offsetParent).length")
        assert media == "screen" or shown == 0
    page.close()


def test_the_services_page_sends_a_real_request_and_reports_its_outcome(
    browser: Browser, addresses: dict[str, str]
) -> None:
    page = browser.new_page(viewport=WIDE)
    open_page(page, addresses["docs"])
    for route, status in (("POST /predict", "200"), ("POST /predict/batch", "200"), ("POST /outcomes", "202")):
        form = page.locator("form").filter(has=page.get_by_role("button", name=f"Send {route}", exact=True))
        form.get_by_role("button").click()
        form.locator("pre").filter(has_text=status).wait_for()
    command = page.locator("section pre").first.text_content() or ""
    page.close()
    answered = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert '"probability"' in answered.stdout
