"""No page that is made here runs what the data say: ids, categories and names that are code, in a real browser."""

from __future__ import annotations

import datetime as dt
import functools
import http.server
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from playwright.sync_api import Page

from closedloop.adapters.evidently import write_data_reports
from closedloop.adapters.jinja import FOLDER, render_page
from closedloop.config.dataset import ExpectationConfig
from closedloop.config.layout import Layout
from closedloop.core.reasons.explainer import Reason
from closedloop.errors import GateFailed
from closedloop.serving.http.openapi import PAGE
from closedloop.stages.parts.measure import Example
from closedloop.stages.validate import validate
from tests.browser import open_browser

pytestmark = [pytest.mark.thorough, pytest.mark.browser, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
ARMED = (
    "<script>window.ran = 1</script>",
    '<img src=x onerror="window.ran = 1">',
    '"><svg onload="window.ran = 1">',
    "</script><script>window.ran = 1</script>",
    "'); window.ran = 1; ('",
    "javascript:window.ran = 1",
    "${window.ran = 1}{{constructor.constructor('window.ran = 1')()}}",
)
ANY, DAY = ARMED[1], dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
# What the browser finds: something ran, or stands ready to.
FOUND = """() => [window.ran, ...document.querySelectorAll(
    'img[src="x"], [onerror], svg[onload], a[href^="javascript:"]:not([href*="void"])')].filter(Boolean).map(String)"""


def write_quality(folder: Path) -> list[Path]:
    """The data gate's page and Great Expectations' Data Docs, of a table whose every text is armed."""
    layout = Layout(raw=folder / "raw", data_docs=folder / "docs", data_quality_page=folder / "quality.html",
                    data_quality=folder / "quality.json")  # fmt: skip
    layout.raw.mkdir()
    frame = pd.DataFrame({"customer_id": ARMED, "plan": ARMED, ANY: ARMED})
    frame.to_parquet(layout.raw / "customers.parquet")
    dropped = {"rule": ANY, "rows": 1, "first_reason": 1, "also": {ANY: 1}}
    ingested = {"rows_read": 9, "rows_kept": 8, "rows_dropped": 1, "dropped": [dropped], "blank_values": {ANY: 1}}
    (layout.raw / "ingest.json").write_text(json.dumps(ingested), encoding="utf-8")
    asked = [
        ("expect_column_values_to_be_in_set", {"column": "plan", "value_set": list(ARMED[:2])}),
        ("expect_column_values_to_be_in_set", {"column": ANY, "value_set": ["a"]}),
        ("expect_column_values_to_match_regex", {"column": "plan", "regex": ANY}),
        ("expect_column_distinct_values_to_equal_set", {"column": "plan", "value_set": ["a"]}),
        ("expect_column_most_common_value_to_be_in_set", {"column": "plan", "value_set": ["a"]}),
        ("expect_column_to_exist", {"column": ARMED[3]}),
        ("expect_column_values_to_be_unique", {"column": "plan"}),
    ]
    expectations = tuple(
        ExpectationConfig(table="customers", type=kind, kwargs=given, severity="critical") for kind, given in asked
    )
    columns = SimpleNamespace(attributes=["plan", ANY], sensitive=None, categorical=["plan", ANY], numeric=[])
    dataset = SimpleNamespace(name=ANY, kind="table", expectations=expectations, columns=columns)
    with pytest.raises(GateFailed):
        validate(SimpleNamespace(as_of=ANY, as_of_at=DAY), dataset, layout)
    return [layout.data_quality_page, *layout.data_docs.rglob("*.html")]


def write_evidently(folder: Path) -> list[Path]:
    """Drift and quality of columns and categories that are armed."""
    rng = np.random.default_rng(3)
    frames = [
        pd.DataFrame({ANY: rng.choice(ARMED, 500), "plan": rng.choice(ARMED, 500), ARMED[2]: rng.random(500)})
        for _ in range(2)
    ]
    pages = [folder / "data.html", folder / "data_all.html"]
    found = write_data_reports(*pages, *frames, numeric=[ARMED[2]], first=[ANY, ARMED[2]])
    assert set(found) == {ANY, "plan", ARMED[2]}
    return pages


def write_own(folder: Path) -> list[Path]:
    """The templates of this package, each text of theirs armed."""
    group = {"group": ANY, "enough_rows": False, "rows": 9, **dict.fromkeys(("accuracy", "roc_auc", "churn_rate"), 0.5)}
    group["predicted_rate"] = 0.5
    lineage = SimpleNamespace(
        **{f"{part}_snapshots": [ANY] for part in ("train", "validation", "test")},
        git_commit=ANY, git_dirty=True, params_md5=ANY, data_md5={ANY: ANY},
    )  # fmt: skip
    baseline = {"model_type": ANY, "figures": {ANY: 0.5}, "verdict": "lose", "log_loss_difference": 0.1,
                "log_loss_interval": (0.0, 0.2)}  # fmt: skip
    limits = {"single_column_auc_max": 0.95, "single_column_allowed": [ANY]}
    gates = {ANY: {"passed": False, "blocking": True, "sentence": f"{ANY} {ARMED[0]}", "remedy": ANY}}
    figures = dict.fromkeys(("profit", "profit_at_threshold", "profit_of_all"), 0.5)
    money = SimpleNamespace(capacity=9, offers=3, figures=figures, interval=SimpleNamespace(low=0.1, high=0.9))
    card = {
        "params": SimpleNamespace(as_of=ANY, evaluation=SimpleNamespace(level=0.9, bootstrap_samples=9)),
        "dataset": {"description": ANY, "label": None, "kind": "table", "gates": limits,
                    "value": {"offer_cost": 2, "save_rate": 0.3},
                    "columns": {"label": {"column": ANY, "churned": ANY}, "sensitive": ANY, "time": None}},
        "contract": SimpleNamespace(model_name=ANY, model_type=ANY, threshold=0.5, features=[], feature_service=ANY,
                                    lineage=lineage),
        "next_period": {"why": ANY},
        "verdict": {"passed": False, "judges": "today", "gates": gates, "columns": {ANY: 0.5},
                    "champion": {"version": ANY, "not_compared": ANY}, "comparison": {"verdict": ANY, "reason": ANY}},
        "measured": SimpleNamespace(figures={ANY: 0.5}, intervals={}, groups=pd.DataFrame([group]), baseline=baseline,
                                    money=money),
        "pictures": [("", ANY, ANY)], "rows": {}, "draw": None, "standing": ANY, "compared": ANY,
        "found": {"customers": 9, "leavers": 3, "alarms": 2, "right": 1, "tenth": 0.1, "fifth": 0.2},
        "importance": [{"feature": ANY, "mean": 0.1, "direction": "raises"}], "lists": [],
        "examples": [Example(ANY, 0.5, True, [Reason(ANY, f"{ANY} of it", ANY, 0.5)])],
    }  # fmt: skip
    drift = {"features": {ANY: {"effect": 0.5, "p_value": 0.5}}, "drifted": [ANY], "beyond_limits": [ANY]}
    check = {"model_name": ANY, "model_version": ANY, "check_id": ANY, "verdict": ANY, "as_of": DAY, "since": DAY,
             "until": DAY, "predictions": 9}  # fmt: skip
    bars = [{"name": ANY, "reference": 0.5, "window": 0.5}]
    monitoring = {
        "check": check, "shown": (), "drift": [(ANY, drift["features"][ANY])], "shapes": {ANY: bars},
        "verdicts": [check], "stability": {ANY: 0.5}, "psi_max": 0.2, "history": [], "money": ANY,
        "evidence": {"reasons": ARMED, "window_rows": 9, "outcome_rows": 9, "drift": drift},
        "links": {"data.html": True, "outcomes.html": True},
    }  # fmt: skip
    event = {"at": ANY, "kind": ANY, "what": ANY, "why": ANY * 9}
    tick = {"at": ANY, "model_version": ANY, "verdict": "none", "drifted": {ANY: 0.5}, "outcome_rows": 0, "money": ANY,
            "treated": 9}  # fmt: skip
    campaign = {"at": ANY, "treated": 9, "held_out": 9, "told": ARMED}
    report = defaultdict(list, dataset=ANY, days=[ANY], requests_answered=9, requests_failed=0, champion=ANY,
                         conclusion=ANY, events=[event], ticks=[tick], regime_changes=[event],
                         campaign=campaign)  # fmt: skip
    link = SimpleNamespace(title=ANY, href="loop.html", text=ANY)
    index = {"model_name": ANY, "told": ANY, "links": [link], "has_tracking": True, "calls": dict.fromkeys(ARMED, ANY)}
    written = {"model_card": card, "monitoring": monitoring, "loop": {"report": report, "image": ""}, "index": index}
    others = {"base", "head", "macros", "data_quality", "dvc_plots", "openapi"}  # parts, and the other tests' pages
    assert {path.stem for path in FOLDER.glob("*.html")} == others | set(written)
    for name, values in written.items():
        (folder / f"{name}.html").write_text(render_page(f"{name}.html", **values), encoding="utf-8")
    return [folder / f"{name}.html" for name in written]


def list_findings(page: Page, address: str) -> list[str]:
    """What a page runs, or offers to run, once it has been opened and every fold of it."""
    page.goto(address)
    page.wait_for_timeout(1_000)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for link in page.locator("a[href^='javascript:window']").all():
        link.click()
    return list(page.evaluate(FOUND))


@pytest.mark.parametrize("write", [write_quality, write_evidently, write_own])
def test_no_page_runs_what_the_data_say(tmp_path: Path, write: Callable[[Path], list[Path]]) -> None:
    pages = write(tmp_path)
    control = tmp_path / "control.html"
    with open_browser() as browser:
        page = browser.new_page()
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        found = {path.name: list_findings(page, path.as_uri()) for path in pages}
        for text in ARMED[:4]:  # these run where a page writes them as they are
            control.write_text(f"<p>{text}</p>" if text != ARMED[3] else f"<script>'{text}'</script>", encoding="utf-8")
            assert list_findings(page, control.as_uri()), text
    assert {name: one for name, one in found.items() if one} == {}


def test_the_services_own_page_shows_its_document_as_text(tmp_path: Path) -> None:
    (tmp_path / "openapi.html").write_bytes(PAGE)
    schema = {"$ref": f"#/components/schemas/{ANY}"}
    content = {"application/json": {"schema": schema, "example": {ANY: ANY}}}
    operation = {
        "summary": ANY,
        "requestBody": {"content": content},
        "responses": {ANY: {"description": ANY, "content": content}},
    }
    document = {"info": {"title": ANY, "description": ANY}, "paths": {ANY: {ANY: operation}},
                "components": {"schemas": {ANY: {"description": ANY}}}}  # fmt: skip
    (tmp_path / "openapi.json").write_text(json.dumps(document), encoding="utf-8")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, open_browser(loopback=True) as browser:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        assert list_findings(page, f"http://127.0.0.1:{server.server_port}/openapi.html") == []
        assert page.locator("#title").text_content() == ANY
        server.shutdown()


def test_dvcs_plots_hold_numbers_and_words_of_ours_alone(small_shop: Any) -> None:
    """DVC writes what it plots into a script of its page as it stands."""
    files = {
        name
        for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
        if isinstance(entry, dict)
        for plot in entry.values()
        for name in plot["y"]
    }
    assert len(files) == 5
    for name in files:
        for column in pd.read_csv(small_shop.root / name).items():
            numeric = np.issubdtype(column[1].dtype, np.number)
            assert numeric or set(column[1]) <= {"churned", "stayed"}, (name, column[0])  # words of ours
