"""MLflow's pages of runs, files and versions whose every text is armed, opened in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from playwright.sync_api import Page

from closedloop.bootstrap import build_tracking, load_run
from tests.browser import keep_pictures, open_browser
from tests.integration.test_armed_pages import ANY, ARMED, FOUND, write_evidently, write_own, write_quality
from tests.programs import run_mlflow_ui

pytestmark = [pytest.mark.thorough, pytest.mark.browser, pytest.mark.timeout(1800)]

NAME = "shop_churn"


@pytest.fixture(scope="module")
def armed(make_project: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A project whose run, registered model and version say armed things; and the files of the run."""
    folder = tmp_path_factory.mktemp("armed")
    root: Path = make_project(folder / "project").root
    tracking = build_tracking(load_run(root / "params.yaml", root=root))
    pages = []
    for write in (write_quality, write_evidently, write_own):
        place = folder / write.__name__
        place.mkdir()
        pages += write(place)
    gates = folder / "gates.json"
    gates.write_text(json.dumps({"gates": {ANY: {"sentence": list(ARMED)}}}), encoding="utf-8")
    table = folder / "table.csv"
    pd.DataFrame({ANY: ARMED, "plan": ARMED}).to_csv(table, index=False)
    texts = {f"text {number}": text for number, text in enumerate(ARMED)}
    with tracking.start_run(ANY, tags=texts) as run_id:
        tracking.log_params(texts)
        tracking.log_metrics({"loss": 0.5})
        tracking.log_inputs({ANY: (pd.DataFrame({ANY: ARMED}), Path(ANY.replace("/", "")), ANY)})
        files = {str(number): page for number, page in enumerate(pages)} | {"gates": gates, "table": table}
        tracking.log_files(files)
    version = tracking.register(f"runs:/{run_id}/gates", run_id, texts)
    tracking.tag_version(version, {"closedloop.rejected": ANY})
    return root, run_id, [f"{place}/{path.name}" for place, path in files.items()]


@pytest.fixture(scope="module")
def address(armed: tuple[Path, str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with run_mlflow_ui(armed[0], tmp_path_factory.mktemp("server") / "mlflow_ui.log") as found:
        yield found


def find_runs(page: Page) -> list[str]:
    """What runs, or stands ready to, in the page and in every frame of it."""
    return [f"{frame.url[:80]}: {one}" for frame in page.frames for one in frame.evaluate(FOUND)]


def test_no_page_of_mlflow_runs_what_the_data_say(
    armed: tuple[Path, str, list[str]], address: str, tmp_path: Path
) -> None:
    root, run_id, files = armed
    experiment = build_tracking(load_run(root / "params.yaml", root=root)).client.get_run(run_id).info.experiment_id
    run = f"experiments/{experiment}/runs/{run_id}"
    # a page, and a text on it that shows that it was drawn with what is armed
    places = {f"experiments/{experiment}/runs": ANY, run: ANY, f"{run}/model-metrics": ANY}
    places |= {f"models/{NAME}": NAME, f"models/{NAME}/versions/1": ANY}
    places |= {f"{run}/artifacts/{file}": file.rpartition("/")[2] for file in files}
    found, pictures = {}, keep_pictures(tmp_path)
    with open_browser(loopback=True) as browser:
        for number, (place, text) in enumerate(places.items()):
            page = browser.new_page(viewport={"width": 1600, "height": 1200})
            page.on("dialog", lambda dialog: pytest.fail(dialog.message))
            page.goto(f"{address}/#/{place}")
            page.get_by_text(text).first.wait_for(timeout=120_000)
            page.wait_for_timeout(1_500)  # an artifact is fetched and drawn after the page
            found[place] = find_runs(page)
            page.screenshot(path=pictures / f"armed_mlflow_{number}.png")
            page.close()
    assert {place: one for place, one in found.items() if one} == {}
