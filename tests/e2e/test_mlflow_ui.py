"""The MLflow UI in a real browser: what a person sees after `mlflow ui`."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from closedloop.adapters.mlflow import Tracking
from closedloop.config.settings import Settings
from tests.browser import keep_pictures, open_browser, require_chromium
from tests.programs import run_mlflow_ui

pytestmark = pytest.mark.thorough

MAKEFILE = Path(__file__).parents[2] / "Makefile"
SEEN_MILLISECONDS = 120_000
READ_PICTURE = "async picture => Array.from(new Uint8Array(await (await fetch(picture.src)).arrayBuffer()))"
CHAMPION_RUN, CHALLENGER_RUN = "hist_gradient_boosting 2024-01-01", "logistic_regression 2024-01-01"
LINEAR_SEARCH = {
    "model": {"type": "logistic_regression"},
    "tuning": {
        "trials": 2,
        "folds": 2,
        "rows_max": 4_000,
        "space": {"logistic_regression": {"C": {"type": "float", "low": 0.1, "high": 10.0}}},
    },
}


@pytest.fixture(scope="module")
def chromium():
    return require_chromium()


@pytest.fixture(scope="module")
def challenged(small_shop, tmp_path_factory):
    """The small shop after a linear model, found by a search, did not beat its champion."""
    copied = small_shop.copy(tmp_path_factory.mktemp("challenged") / "project")
    copied.change_params(LINEAR_SEARCH)
    copied.run_stages("train", "evaluate", "register")
    return copied


@pytest.fixture(scope="module")
def address(chromium, challenged, tmp_path_factory):
    """Plain `mlflow ui` in the project's folder: it has to find mlflow.db there by itself."""
    with run_mlflow_ui(challenged.root, tmp_path_factory.mktemp("server") / "mlflow_ui.log") as found:
        yield found


@pytest.fixture(scope="module")
def browser(address):
    """Started after the stages have run: playwright leaves an event loop running in this thread."""
    with open_browser(loopback=True) as started:
        yield started


@pytest.fixture
def page(browser, address):
    """MLflow's start page in its mode for trained models; whatever is asked of anybody else fails the test."""
    expect.set_options(timeout=SEEN_MILLISECONDS)
    opened = browser.new_page(viewport={"width": 1600, "height": 1000})
    asked: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(address)
    opened.get_by_role("button", name="Model training", exact=True).click()
    yield opened
    opened.close()
    own = (f"{address}/", f"blob:{address}/", "data:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert any(url.startswith(own[0]) for url in asked)


@pytest.fixture
def kept(tmp_path):
    return keep_pictures(tmp_path)


def open_run(page: Page, name: str) -> None:
    page.get_by_role("link", name="shop_churn", exact=True).click()
    page.get_by_role("link", name=name, exact=True).click()
    expect(page.get_by_role("heading", name=name)).to_be_visible()


def find_row(page: Page, text: str) -> Locator:
    """The table row with a cell of exactly this text; a metric also heads a column of another table, which is none."""
    return page.get_by_role("row").filter(has=page.get_by_role("cell", name=text, exact=True))


def read_png_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, which stand at bytes 16 to 24 of a PNG file."""
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    return width, height


@pytest.mark.browser
def test_run_page_shows_every_metric(page, small_shop, kept):
    measured = small_shop.read_json("metrics/train_metrics.json")
    tested = small_shop.read_json("metrics/eval_metrics.json")
    parts = {"train": measured["train"], "validation": measured["validation"], "test": tested}
    expected = {
        f"{part}_{name}": float(value)
        for part, values in parts.items()
        for name, value in values.items()
        if not name.startswith("next_period_")
    }
    open_run(page, CHAMPION_RUN)
    expect(page.get_by_text(f"Metrics ({len(expected)})")).to_be_visible()
    shown = {}
    for name in expected:
        row = find_row(page, name)
        expect(row).to_be_visible()
        shown[name] = float(row.get_by_role("cell").nth(1).inner_text())
    assert shown == expected
    find_row(page, "test_roc_auc").scroll_into_view_if_needed()
    page.screenshot(path=kept / "mlflow_metrics.png")


@pytest.mark.browser
@pytest.mark.parametrize("folder", ["figures", "evaluation/figures"])
def test_run_page_shows_every_picture(page, small_shop, kept, folder):
    figures = sorted(small_shop.root.glob(f"state/mlflow/shop_churn/*/artifacts/{folder}/*.png"))
    names = {path.stem for path in figures}
    assert names >= {"roc", "precision_recall", "calibration", "confusion", "lift"}
    open_run(page, CHAMPION_RUN)
    page.get_by_role("tab", name="Artifacts").click()
    tree = page
    for part in folder.split("/"):
        tree.get_by_text(part, exact=True).click()
        tree = tree.get_by_role("listitem").filter(has=page.get_by_text(part, exact=True))
    source = ""
    for path in figures:
        tree.get_by_text(path.name, exact=True).click()
        picture = page.get_by_role("img", name=f"{folder}/{path.name}", exact=True)
        expect(picture).to_be_visible()
        expect(picture).not_to_have_attribute("src", source)  # the picture before
        width, height = read_png_size(path)
        expect(picture).to_have_js_property("naturalWidth", width)
        expect(picture).to_have_js_property("naturalHeight", height)
        assert bytes(picture.evaluate(READ_PICTURE)) == path.read_bytes()
        source = picture.get_attribute("src")
    page.screenshot(path=kept / f"mlflow_{folder.replace('/', '_')}.png")


@pytest.mark.browser
def test_registered_model_shows_versions_and_aliases(page, challenged, kept):
    assert challenged.read_json("metrics/registration.json")["alias"] == "challenger"
    page.get_by_role("link", name="Model registry").click()
    page.get_by_role("button", name="Try it now").click()  # MLflow introduces its registry once
    page.get_by_role("row").get_by_role("link", name="shop_churn", exact=True).click()
    expect(page.get_by_role("heading", name="shop_churn")).to_be_visible()
    for version, alias, other in (("Version 1", "champion", "challenger"), ("Version 2", "challenger", "champion")):
        row = find_row(page, version)
        expect(row).to_contain_text(alias)
        expect(row).not_to_contain_text(other)
    page.screenshot(path=kept / "mlflow_registered_model.png")
    page.get_by_role("link", name="Version 1", exact=True).click()
    expect(page.get_by_role("heading", name="Version 1")).to_be_visible()
    expect(find_row(page, "closedloop.gates")).to_contain_text("passed")
    page.screenshot(path=kept / "mlflow_version.png")
    page.get_by_role("link", name=CHAMPION_RUN).click()
    expect(page.get_by_role("heading", name=CHAMPION_RUN)).to_be_visible()


@pytest.mark.browser
def test_trials_are_nested_in_their_run(page, kept):
    page.get_by_role("link", name="shop_churn", exact=True).click()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=CHALLENGER_RUN))
    trials = page.get_by_role("link", name="trial ")
    expect(row).to_be_visible()
    expect(trials).to_have_count(0)
    row.get_by_role("button").click()
    expect(trials).to_have_text(["trial 1", "trial 0"])  # the newest first
    page.screenshot(path=kept / "mlflow_trials.png")
    trials.first.click()
    expect(find_row(page, "log_loss")).to_be_visible()
    expect(page.get_by_role("link", name=CHALLENGER_RUN)).to_be_visible()


@pytest.mark.parametrize(("given", "options"), [([], ""), (["PORT=5123"], "--port=5123")])
def test_make_ui_hands_the_port_on(tmp_path, given, options):
    command = tmp_path / ".venv/bin/closedloop"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    typed = subprocess.run(
        ["make", "--file", MAKEFILE, "--assume-old", "install", "ui", *given],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},  # neither a PORT nor the flags of the `make test` around this
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert typed.split() == ["ui", *options.split()]


def test_the_ui_is_that_of_the_projects_store(small_shop):
    """MLflow's own command line parser, given what `closedloop ui` starts."""
    from mlflow.cli import server

    tracking = Tracking(Settings(root=small_shop.root), "shop_churn")
    address, command = tracking.list_ui_command(5123)
    assert command is not None
    assert command[1:4] == ["-m", "mlflow", "ui"]
    parsed = server.make_context("ui", command[4:]).params
    assert (parsed["host"], parsed["port"], address) == ("127.0.0.1", 5123, "http://127.0.0.1:5123")
    assert parsed["backend_store_uri"] == f"sqlite:///{small_shop.root / 'mlflow.db'}"


@pytest.mark.browser
def test_the_address_that_is_told_opens_on_the_runs_which_are_described(browser, address, challenged, kept):
    expect.set_options(timeout=SEEN_MILLISECONDS)
    tracking = Tracking(Settings(root=challenged.root), "shop_churn")
    page = browser.new_page(viewport={"width": 1600, "height": 1000})
    page.goto(address + tracking.find_experiment_page())
    page.get_by_role("link", name=CHAMPION_RUN, exact=True).click()
    page.get_by_text("Show more", exact=True).click()
    expect(page.get_by_text("closedloop release start VERSION")).to_be_visible()
    for name in ("lift", "calibration"):  # MLflow leaves the alternative text out
        picture = page.locator(f"img[src$='path=evaluation/figures/{name}.png']")
        expect(picture).to_have_js_property(
            "naturalWidth", read_png_size(challenged.root / f"reports/test/{name}.png")[0]
        )
    page.screenshot(path=kept / "mlflow_run.png", full_page=True)
    page.close()
    described = [tracking.read_version(number).description for number in ("1", "2")]
    assert "No champion yet" in described[0]
    assert " version 1: " in described[1]
