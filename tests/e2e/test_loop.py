"""`closedloop replay` on a small shop: every part runs for real, and a bad challenger is stopped by what it answers."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SOURCE_ROOT, Project
from tests.lineage import check_some

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1800)]
# Nothing happens in it but that prices rise, which bears on nothing.
SHOP: dict[str, Any] = {
    "simulator": {"customers": 12_000, "covariate_at": "2030-01-01", "harmless_at": "2024-03-10"},
    "split": {"train_snapshots_max": 3},
    "features": {"window_days": [7, 30], "aggregations": ["count", "days", "sum", "mean"]},
    "evaluation": {"bootstrap_samples": 200},
    "model": {"params": {"max_iter": 60}},
}


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory, make_project: Any) -> Path:
    """The folder of a replay of three ticks."""
    made: Project = make_project(tmp_path_factory.mktemp("loop") / "project")
    made.change_params(SHOP)
    made.add_sources("src", ".dvc", "pipelines")
    shutil.copy(SOURCE_ROOT / "dvc.yaml", made.root / "dvc.yaml")
    made.run("replay", "--from", "2024-03-03", "--to", "2024-05-02", "--share", "1")
    return made.root / "workspaces/loop/shop"


@pytest.fixture(scope="module")
def report(replayed: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((replayed / "loop.json").read_text(encoding="utf-8"))
    return found


def test_no_request_failed(report):
    assert report["requests_failed"] == 0, report["failures"]
    assert report["requests_answered"] > 10_000


def test_outcomes_matured_and_were_judged(report):
    assert [tick["outcomes"] > 0 for tick in report["ticks"]] == [False, True, True]
    assert [tick.get("verdict") is not None for tick in report["ticks"]] == [False, True, True]
    assert {arm["snapshot"] for arm in report["arms"]} == {"2024-03-03", "2024-04-02"}


def test_the_harmless_change_is_seen_and_nothing_is_retrained(report):
    last = report["ticks"][-1]
    assert any(name.startswith("purchase_mean") for name in last["drifted"])
    assert last["outcomes_of"] == "2024-04-02"
    assert not last["realised"]["breach"]
    assert {tick.get("verdict") for tick in report["ticks"]} <= {None, "none", "watch"}
    kinds = [event["kind"] for event in report["events"] if event["kind"] != "watch"]
    assert kinds == ["first model", "campaign", "bad offered", "rolled back", "reported"]
    assert report["champion"] == "1"


def test_a_campaign_keeps_customers_and_asks_for_no_retraining(report, replayed):
    """The shop calls the customers on the list; what they do is no evidence of a wrong model."""
    campaign = report["campaign"]
    assert (campaign["at"], campaign["treated"], campaign["held_out"]) == ("2024-04-02", 1_000, 429)
    assert campaign["told"][0].startswith("kept: fewer of the treated left")
    assert any(line.startswith("net profit +") for line in campaign["told"])
    [reported] = [event for event in report["events"] if event["kind"] == "reported"]
    assert reported["at"] == "2024-05-02"
    assert report["ticks"][-1]["treated"] >= 1_000
    assert "The campaign" in (replayed / "loop.html").read_text(encoding="utf-8")


def test_the_bad_challenger_was_stopped_by_what_it_answered(report):
    [offered] = [event for event in report["events"] if event["kind"] == "bad offered"]
    version = offered["what"].split()[1].rstrip(":")
    stopped = [event for event in report["events"] if event["kind"] == "rolled back"]
    assert any(
        f"version {version};" in event["what"] and "apart from those that it was evaluated by" in event["why"]
        for event in stopped
    )
    assert report["champion"] != version


def test_every_answer_can_be_explained_and_computed_once_more(replayed, tmp_path):
    checked = check_some(replayed, tmp_path, count=200)
    assert len(checked) >= 2
    assert sum(checked.values()) >= 200


def test_the_page_needs_nothing_but_itself(replayed):
    class Links(HTMLParser):
        found: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = ("src", "href") if tag != "a" else ("src",)
            self.found += [value for name, value in attrs if name in names and value]

    links = Links()
    links.found = []
    links.feed((replayed / "loop.html").read_text(encoding="utf-8"))
    assert links.found
    assert all(link.startswith("data:") for link in links.found)
