"""DVC on the small shop: what `dvc repro`, `dvc exp`, `dvc metrics` and `dvc plots` do, as its documentation says."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from tests.browser import keep_pictures, open_browser

pytestmark = pytest.mark.thorough

DRAWN = ("ROC curve", "Precision and recall", "Calibration", "Confusion", "Training curve")


def run_dvc(root: Path, *arguments: str) -> str:
    ran = subprocess.run(["dvc", *arguments], cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"dvc {' '.join(arguments)}:\n{ran.stdout}{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def committed(dvc_shop):
    """The run's lock file committed, as a person does; experiments start from a commit."""
    identity = ["-c", "user.name=tester", "-c", "user.email=tester@example.com"]
    for arguments in (["add", "--all"], ["commit", "--quiet", "--message", "a run"]):
        subprocess.run(["git", *identity, *arguments], cwd=dvc_shop.root, check=True)
    return dvc_shop


def test_only_sources_and_the_lock_are_tracked(committed):
    listed = subprocess.run(["git", "ls-files"], cwd=committed.root, capture_output=True, text=True, check=True).stdout
    tops = {line.split("/")[0] for line in listed.splitlines()}
    assert tops == {".dvc", ".gitignore", "configs", "dvc.lock", "dvc.yaml", "feature_repo", "params.yaml", "src"}


def test_a_second_repro_runs_nothing(committed):
    before = (committed.root / "dvc.lock").read_bytes()
    output = run_dvc(committed.root, "repro")
    assert "Data and pipelines are up to date." in output
    assert "Running stage" not in output
    assert (committed.root / "dvc.lock").read_bytes() == before


def test_lineage_names_the_data_that_dvc_recorded(committed):
    lock = yaml.safe_load((committed.root / "dvc.lock").read_text(encoding="utf-8"))
    recorded = next(out["md5"] for out in lock["stages"]["training_set"]["outs"] if out["path"] == "data/training")
    listing = committed.root / ".dvc/cache/files/md5" / recorded[:2] / recorded[2:]
    by_file = {entry["relpath"]: entry["md5"] for entry in json.loads(listing.read_text(encoding="utf-8"))}
    lineage = committed.read_json("models/candidate/contract.json")["lineage"]
    assert lineage["data_md5"] == by_file
    assert set(by_file) == {"train.parquet", "validation.parquet", "test.parquet"}


def test_lineage_digests_the_parameters_whatever_their_order(committed):
    from closedloop.config.params import parse_params

    lineage = committed.read_json("models/candidate/contract.json")["lineage"]
    path = committed.root / "params.yaml"
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert lineage["params_md5"] == parse_params(given, "params").digest_md5()
    turned = dict(reversed(given.items()))
    assert parse_params(turned, "params").digest_md5() == lineage["params_md5"]
    assert parse_params({**turned, "seed": 8}, "params").digest_md5() != lineage["params_md5"]


def test_metrics_show_has_the_figures(committed):
    shown = json.loads(run_dvc(committed.root, "metrics", "show", "--json"))[""]["data"]
    figures = committed.read_json("metrics/eval_metrics.json")
    assert shown["metrics/eval_metrics.json"]["data"]["roc_auc"] == figures["roc_auc"]
    compared = {name: part["data"] for name, part in shown.items()}
    assert set(compared) == {"metrics/eval_metrics.json", "metrics/train_metrics.json"}
    assert {type(value) for value in walk(compared)} <= {int, float}, "sentences and digests are nothing to compare"


def walk(values):
    """All leaves of a tree of dicts and lists."""
    if not isinstance(values, dict | list):
        return [values]
    return [leaf for value in (values.values() if isinstance(values, dict) else values) for leaf in walk(value)]


def test_the_trained_model_is_an_artifact_of_dvc(committed):
    with Repo(str(committed.root)) as repo:
        (found,) = repo.artifacts.read()["dvc.yaml"].values()
    assert (found.path, found.type) == ("models/candidate", "model")


def test_plots_show_needs_no_template(committed, tmp_path):
    assert not (committed.root / ".dvc/plots_template.html").exists()
    run_dvc(committed.root, "plots", "show", "--out", str(tmp_path / "page"))
    assert (tmp_path / "page/index.html").is_file()


@pytest.mark.browser
def test_plots_open_without_a_network(committed, tmp_path):
    """Every plot is drawn, with marks, by a browser that can reach nothing."""
    kept = keep_pictures(tmp_path)
    committed.run("plots-template")
    assert (
        "?? "
        not in subprocess.run(
            ["git", "status", "--short"], cwd=committed.root, capture_output=True, text=True, check=True
        ).stdout
    )
    run_dvc(committed.root, "plots", "show", "--out", str(tmp_path / "page"))
    asked, errors = [], []
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1400})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "page/index.html").as_uri())
        page.wait_for_function(
            f"document.querySelectorAll('.vega-embed svg.marks').length == {len(DRAWN)}", timeout=120_000
        )
        titles = page.locator("h2").all_text_contents()
        # the extent in pixels of a plot's lines and rectangles
        drawn = page.eval_on_selector_all(
            ".vega-embed svg.marks",
            """all => all.map(svg => Math.max(0, ...[...svg.querySelectorAll(
                '.mark-line.role-mark path, .mark-rect.role-mark path'
            )].map(mark => mark.getBBox().width + mark.getBBox().height)))""",
        )
        pictures = page.eval_on_selector_all("img", "all => all.map(image => image.naturalWidth)")
        page.screenshot(path=kept / "dvc_plots.png", full_page=True)
    assert errors == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert set(DRAWN) <= set(titles)
    assert len(drawn) == len(DRAWN)
    assert min(drawn) > 100, f"pixels by plot: {drawn}"
    assert pictures
    assert min(pictures) > 100


def test_an_experiment_with_another_model_is_compared(committed):
    before = committed.read_json("metrics/eval_metrics.json")["roc_auc"]
    run_dvc(committed.root, "exp", "run", "--name", "linear", "--set-param", "model.type=logistic_regression")
    after = committed.read_json("metrics/eval_metrics.json")["roc_auc"]
    assert after != before
    compared = json.loads(run_dvc(committed.root, "metrics", "diff", "--json"))["metrics/eval_metrics.json"]["roc_auc"]
    assert (compared["old"], compared["new"]) == (before, after)
    table = list(csv.DictReader(io.StringIO(run_dvc(committed.root, "exp", "show", "--csv"))))
    shown = {row["Experiment"]: row for row in table}
    assert shown["linear"]["model.type"] == "logistic_regression"
    column = next(name for name in table[0] if (name.endswith("roc_auc") and "eval" in name) or name == "roc_auc")
    assert float(shown["linear"][column]) == pytest.approx(after)


def test_the_graph_reads_what_the_lock_holds(committed):
    """Each output in the lock has the digest of the file that is there."""
    lock = yaml.safe_load((committed.root / "dvc.lock").read_text(encoding="utf-8"))
    files = [out for stage in lock["stages"].values() for out in stage["outs"] if not out["md5"].endswith(".dir")]
    assert files
    for out in files:
        content = (committed.root / out["path"]).read_bytes()
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == out["md5"], out["path"]
