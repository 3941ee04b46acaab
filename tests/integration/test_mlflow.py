"""The tracking store and the registry on real MLflow: what a run holds, and who moves which alias."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import skops.io
import yaml
from mlflow.entities import Run
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from closedloop.adapters.mlflow import CHALLENGER, CHAMPION, DIGEST_TAG, GATES_TAG, Tracking
from closedloop.adapters.mlflow_file import create_store
from closedloop.adapters.skops import load_pipeline
from closedloop.bootstrap import build_tracking, load_run
from closedloop.config.settings import Settings
from closedloop.contract import digest_folder
from closedloop.core.training.deciding import DecidingModel
from closedloop.core.training.estimators import build_pipeline, describe_features
from closedloop.errors import DataError, ServiceUnavailable

MODEL = "shop_churn"
SECRET = "0pen-sesame"
SOURCES = Path(__file__).parents[2] / "src/closedloop"
PNG = b"\x89PNG\r\n\x1a\n"


def test_a_project_whose_name_has_a_space_gets_no_folder_beside_it(tmp_path):
    create_store(tmp_path / "my 店" / "mlflow.db", (tmp_path / "artifacts").as_uri())
    assert [path.name for path in tmp_path.iterdir()] == ["my 店"]


def open_tracking(shop: Any, model_name: str | None = None) -> Tracking:
    run = load_run(shop.root / "params.yaml", root=shop.root)
    return Tracking(run.settings, model_name) if model_name else build_tracking(run)


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")


def count_versions(tracking: Tracking) -> int:
    return len(tracking.client.search_model_versions(f"name = '{MODEL}'"))


@pytest.fixture(scope="module")
def logged(small_shop: Any) -> Run:
    """The run that made the small shop's model."""
    tracking = open_tracking(small_shop)
    run_id = tracking.find_run(digest_folder(small_shop.root / "models/candidate"))
    assert run_id == small_shop.read_json("models/run.json")["run_id"]
    return tracking.client.get_run(run_id)


@pytest.fixture
def artifacts(logged: Run) -> Path:
    return Path(logged.info.artifact_uri.removeprefix("file://"))


@pytest.mark.parametrize("kind", ["IMMEDIATE", pytest.param("EXCLUSIVE", marks=pytest.mark.thorough)])
def test_data_sets_of_one_folder_wait_for_each_others_writes(project: Any, kind: str) -> None:
    """Longer than SQLite's driver does by itself, which is 5 seconds: MLflow tells it to wait 20."""
    store, done = project.root / "mlflow.db", []
    run = load_run(project.root / "params.yaml", root=project.root)
    first = build_tracking(run)
    with first.start_run("a run") as run_id:
        pass

    def write(number: int) -> None:
        tracking = Tracking(run.settings, f"data_set_{number}")
        with tracking.start_run("a run"):
            tracking.set_tags({"a": "tag"})
        done.append(tracking.register(f"runs:/{run_id}/contract", run_id, {}).version)

    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute(f"BEGIN {kind}")
        others = [threading.Thread(target=write, args=(number,)) for number in range(2)]
        for one in others:
            one.start()
        time.sleep(7)
        assert done == []
        other.execute("COMMIT")
        for one in others:
            one.join()
    assert done == [1, 1]


def test_a_run_holds_every_parameter(small_shop: Any, logged: Run) -> None:
    found = logged.data.params
    for section, given in yaml.safe_load((small_shop.root / "params.yaml").read_text(encoding="utf-8")).items():
        for name, value in given.items() if isinstance(given, dict) else ():
            if name != "space":  # what a trial draws from it stands in the trial's run
                assert found[f"{section}.{name}"] == str(tuple(value) if isinstance(value, list) else value)
    assert (found["dataset"], found["as_of"], found["seed"]) == ("shop", "2024-01-01", "7")
    assert (found["model.type"], found["model.calibrate"]) == ("hist_gradient_boosting", "True")
    assert logged.info.status == "FINISHED"


def test_a_run_holds_the_hyper_parameters_of_the_size_that_was_taken(small_shop: Any, logged: Run) -> None:
    used = small_shop.read_json("models/pipeline/choices.json")["hyper_parameters"]
    assert used, "the small shop's rows choose the smaller model"
    for name, value in used.items():
        assert logged.data.params[f"hyper_parameters.{name}"] == str(value)


def test_a_run_holds_the_figures_of_every_part(small_shop: Any, logged: Run) -> None:
    trained = small_shop.read_json("metrics/train_metrics.json")
    tested = small_shop.read_json("metrics/eval_metrics.json")
    expected = {f"{part}_{name}": value for part in ("train", "validation") for name, value in trained[part].items()}
    expected |= {f"test_{name}": value for name, value in tested.items() if not name.startswith("next_period_")}
    assert {"train_roc_auc", "validation_log_loss", "test_accuracy"} <= set(expected)
    # a curve's points may stand beside them
    assert {name: logged.data.metrics[name] for name in expected} == pytest.approx(expected)


def test_a_run_names_its_data_by_digest(small_shop: Any, logged: Run) -> None:
    inputs = {given.dataset.name: given for given in logged.inputs.dataset_inputs}
    assert set(inputs) == {"train", "validation", "test"}
    for part, given in inputs.items():
        path = small_shop.root / f"data/training/{part}.parquet"
        assert given.dataset.digest == hashlib.md5(path.read_bytes()).hexdigest()  # noqa: S324  DVC's digest
        assert json.loads(given.dataset.source)["uri"] == f"data/training/{part}.parquet"
        assert {tag.key: tag.value for tag in given.tags}["mlflow.data.context"] == part
        columns = [column["name"] for column in json.loads(given.dataset.schema)["mlflow_colspec"]]
        assert columns == list(pd.read_parquet(path).columns)


def test_a_run_holds_contract_pictures_and_reports(small_shop: Any, artifacts: Path) -> None:
    assert digest_folder(artifacts / "contract") == digest_folder(small_shop.root / "models/candidate")
    for folder, report in (("figures", "train"), ("evaluation/figures", "test")):
        pictures = sorted((artifacts / folder).iterdir())
        originals = sorted((small_shop.root / "reports" / report).glob("*.png"))
        assert [path.name for path in pictures] == [path.name for path in originals]
        assert len(pictures) >= 5
        assert {path.read_bytes()[:8] for path in pictures} == {PNG}
    for logged_file, original in (
        ("data_quality.json", "metrics/data_quality.json"),
        ("metrics/train_metrics.json", "metrics/train_metrics.json"),
        ("gates/gates.json", "metrics/gates.json"),
        ("evaluation/model_card.html", "reports/model_card.html"),
    ):
        assert (artifacts / logged_file).read_bytes() == (small_shop.root / original).read_bytes()


def test_the_logged_model_has_a_signature_no_pickle_and_the_same_scores(small_shop: Any) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{small_shop.root}/mlflow.db")
    uri = small_shop.read_json("models/run.json")["model_uri"]
    model = mlflow.pyfunc.load_model(uri)
    names = [feature["name"] for feature in small_shop.read_json("models/candidate/contract.json")["features"]]
    signature = model.metadata.signature
    assert signature.inputs.input_names() == names
    assert {str(column.type) for column in signature.inputs.inputs if column.name != "segment"} == {"DataType.double"}
    rows = pd.read_parquet(small_shop.root / "data/training/test.parquet").head(50)
    pipeline = load_pipeline(small_shop.root / "models/pipeline/pipeline.skops", "hist_gradient_boosting")
    contract, answered = small_shop.read_json("models/candidate/contract.json"), model.predict(rows[names])
    assert list(answered) == signature.outputs.input_names() == ["probability", "prediction"]
    np.testing.assert_array_equal(answered["probability"], pipeline.predict_proba(rows)[:, 1])
    decided = [int(one >= contract["threshold"]) for one in answered["probability"]]
    assert answered["prediction"].tolist() == decided
    assert set(decided) == {0, 1}
    champion = open_tracking(small_shop).load_pipeline("1", "hist_gradient_boosting")
    np.testing.assert_array_equal(champion.predict_proba(rows), pipeline.predict_proba(rows))
    with pytest.raises(mlflow.MlflowException, match="missing inputs \\['age'\\]"):
        model.predict(rows[names].drop(columns="age"))
    flavor = model.metadata.flavors["sklearn"]
    assert flavor["serialization_format"] == "skops"
    folder = Path(model.metadata.get_model_info().artifact_path.removeprefix("file://"))
    assert [path.name for path in folder.iterdir() if path.suffix in (".pkl", ".cloudpickle", ".joblib")] == []
    code = sorted(str(path.relative_to(folder)) for path in (folder / "code").rglob("*.py"))
    assert [path for path in code if not path.endswith("__init__.py")] == [
        "code/closedloop/core/training/deciding.py",
        "code/closedloop/core/training/encoding.py",
        "code/closedloop/errors.py",
    ]


# as `mlflow models serve` does in an environment of its own
ISOLATED = """
import importlib.util, json, sys
assert importlib.util.find_spec("closedloop") is None
import mlflow, pandas as pd
from mlflow.pyfunc.scoring_server import predictions_to_json
predictions_to_json(mlflow.pyfunc.load_model(sys.argv[1]).predict(pd.read_parquet(sys.argv[2])), sys.stdout)
"""


def normalise(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def list_required(requirements: Path) -> set[str]:
    """What is installed of these requirements and of all that they require."""
    asked, known = requirements.read_text(encoding="utf-8").splitlines(), set()
    while asked:
        name = normalise(re.match(r"[\w.-]+", asked.pop())[0])  # type: ignore[index]
        if name not in known:
            known.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of another system
                asked += [one for one in importlib.metadata.requires(name) or [] if "extra ==" not in one]
    return known


def link_packages(folder: Path, required: set[str]) -> None:
    """Let a folder hold what of our environment belongs to these packages."""
    folder.mkdir()
    owners = importlib.metadata.packages_distributions()
    for place in Path(mlflow.__file__).parent.parent.iterdir():
        name = place.name.partition(".")[0]
        named = place.name.removesuffix(".dist-info").rpartition("-")[0] if place.suffix == ".dist-info" else name
        if required & {normalise(one) for one in (named, *owners.get(name, []))}:
            (folder / place.name).symlink_to(place)


@pytest.mark.thorough
@pytest.mark.parametrize("model_type", ["hist_gradient_boosting", "lightgbm", "xgboost"])
def test_a_logged_model_answers_the_same_without_this_package(model_type: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = pd.DataFrame({"spent": draw.gamma(2, 50, 600), "plan": draw.choice(np.array(["free", "paid", None]), 600)})
    rows.loc[draw.random(600) < 0.1, "spent"] = np.nan
    given = {"model_type": model_type, "model_params": {}, "normalize": True, "feature_selection": None, "seed": 0}
    pipeline = build_pipeline(describe_features(rows, ["spent"], ["plan"]), **given)
    pipeline.fit(rows, np.asarray(draw.random(600) < 1 / (1 + rows["spent"].fillna(0) / 50)))
    tracking = Tracking(Settings(root=tmp_path), "shop_churn")
    with tracking.start_run("a model"):
        tracking.log_pipeline(DecidingModel(pipeline, 0.3), rows.head(3), model_type)
    (folder,) = (path.parent for path in tmp_path.glob("state/mlflow/*/models/*/artifacts/MLmodel"))
    required, script = list_required(folder / "requirements.txt"), tmp_path / "isolated.py"
    assert "closedloop" not in required, "an index may have anything by this name"
    link_packages(tmp_path / "packages", required)
    script.write_text(ISOLATED, encoding="utf-8")
    rows.to_parquet(tmp_path / "rows.parquet")
    ran = subprocess.run(
        [str(Path(sys.base_prefix) / "bin/python3"), str(script), str(folder), str(tmp_path / "rows.parquet")],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "packages")}, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    expected = pipeline.predict_proba(rows)[:, 1]
    answered = json.loads(ran.stdout.splitlines()[-1])["predictions"]
    assert [one["prediction"] for one in answered] == (expected >= 0.3).astype(int).tolist()
    np.testing.assert_array_equal([one["probability"] for one in answered], expected)


def test_a_version_that_lists_its_own_types_and_code_is_refused(shop_copy: Any) -> None:
    """By one who can write artifacts: MLflow's loader trusts what the MLmodel file lists, and runs what lies beside."""
    (folder,) = (path.parent for path in shop_copy.root.glob("state/mlflow/*/models/*/artifacts/MLmodel"))
    evil = make_pipeline(FunctionTransformer(subprocess.getoutput))
    skops.io.dump(evil, folder / "model.skops")
    described = yaml.safe_load((folder / "MLmodel").read_text(encoding="utf-8"))
    described["flavors"]["sklearn"]["skops_trusted_types"].append("subprocess.getoutput")
    (folder / "MLmodel").write_text(yaml.safe_dump(described), encoding="utf-8")
    (folder / "code/json.py").write_text("raise SystemExit('taken over')\n", encoding="utf-8")
    before = list(sys.path)
    assert mlflow.sklearn.load_model(str(folder)).steps[-1][1].func is subprocess.getoutput
    sys.path[:] = before
    with pytest.raises(DataError, match="types that are not on the reviewed list"):
        open_tracking(shop_copy).load_pipeline("1", "hist_gradient_boosting")
    assert sys.path == before


def test_the_same_run_registered_again_is_still_one_version(shop_copy: Any) -> None:
    tracking = open_tracking(shop_copy)
    shop_copy.run("register")
    (shop_copy.root / "metrics/registration.json").unlink()
    shop_copy.run("register")
    assert count_versions(tracking) == 1
    version = tracking.find_version(digest_folder(shop_copy.root / "models/candidate"))
    assert version is not None
    assert version.run_id == shop_copy.read_json("models/run.json")["run_id"]
    assert version.source == shop_copy.read_json("models/run.json")["model_uri"]
    assert version.tags["closedloop.dataset"] == "shop"
    assert version.tags["closedloop.feature_service"].startswith("shop_churn_")


@pytest.fixture
def registry(shop_copy: Any) -> Tracking:
    """Version 1, the champion, and versions 2 (passed), 3 (passed) and 4 (failed) of the same logged model."""
    tracking, made = open_tracking(shop_copy), shop_copy.read_json("models/run.json")
    for number, gates in ((2, "passed"), (3, "passed"), (4, "failed")):
        tags = {DIGEST_TAG: f"{number}" * 64, GATES_TAG: gates}
        assert int(tracking.register(made["model_uri"], made["run_id"], tags).version) == number
    return tracking


def read_aliases(tracking: Tracking) -> dict[str, int]:
    found = {alias: tracking.read_alias(alias) for alias in (CHAMPION, CHALLENGER)}
    return {alias: int(version.version) for alias, version in found.items() if version is not None}


def test_aliases_move_and_a_version_never_has_both(registry: Tracking) -> None:
    assert read_aliases(registry) == {CHAMPION: 1}
    registry.set_challenger("2")
    registry.set_challenger("3")
    assert read_aliases(registry) == {CHAMPION: 1, CHALLENGER: 3}
    registry.move_champion("3")
    assert read_aliases(registry) == {CHAMPION: 3}
    registry.set_challenger("2")
    registry.move_champion("1")  # back, as a rollback does: the challenger is another one and stays
    assert read_aliases(registry) == {CHAMPION: 1, CHALLENGER: 2}


def test_a_version_that_failed_or_was_never_judged_cannot_become_champion(registry: Tracking) -> None:
    registry.set_challenger("4")
    with pytest.raises(DataError, match="shop_churn version 4: no passed evaluation is recorded"):
        registry.move_champion("4")
    registry.client.delete_model_version_tag(MODEL, "2", GATES_TAG)
    with pytest.raises(DataError, match="shop_churn version 2: no passed evaluation is recorded"):
        registry.move_champion("2")
    assert read_aliases(registry) == {CHAMPION: 1, CHALLENGER: 4}


def list_uses(names: set[str]) -> list[tuple[str, str, ast.AST]]:
    """Which function of the package uses which of these attributes."""
    return [
        (f"{path.stem}.{function.name}", node.attr, function)
        for path in SOURCES.rglob("*.py")
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and node.attr in names
    ]


def test_one_function_moves_the_champion() -> None:
    """Whatever changes an alias or a stage in the registry, by the function that calls it."""
    changing = {
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "transition_model_version_stage",
        "delete_model_version",
        "delete_registered_model",
        "rename_registered_model",
    }
    callers = {(place, name, "CHAMPION" in ast.dump(function)) for place, name, function in list_uses(changing)}
    assert callers == {
        ("mlflow.set_challenger", "set_registered_model_alias", False),
        ("mlflow.move_champion", "set_registered_model_alias", True),
        ("mlflow.move_champion", "delete_registered_model_alias", True),
        ("mlflow.reject", "delete_registered_model_alias", False),
    }
    steps = {"move_champion", "mirror_release", "append_entry"}
    assert {(place, name) for place, name, _ in list_uses(steps)} == {
        ("mlflow.mirror_release", "move_champion"),
        ("moves._mirror_in_registry", "mirror_release"),
        ("moves.move", "append_entry"),
        ("moves.note", "append_entry"),
    }


def test_versions_and_runs_are_found_by_digest_and_by_data_set_only(shop_copy: Any, registry: Tracking) -> None:
    digest = digest_folder(shop_copy.root / "models/candidate")
    for number, wanted in ((1, digest), (2, "2" * 64)):
        version = registry.find_version(wanted)
        assert version is not None
        assert int(version.version) == number
    assert registry.find_run(digest) is not None
    assert registry.find_version("0" * 64) is None
    assert registry.find_run("0" * 64) is None
    other = open_tracking(shop_copy, "bank_churn")
    assert (other.find_run(digest), other.find_version(digest), other.read_alias(CHAMPION)) == (None, None, None)
    with other.start_run("judged elsewhere", tags={DIGEST_TAG: digest}) as run_id:
        other.log_metrics({"loss": 0.5, "undefined": float("nan")})
    assert other.find_run(digest) == run_id != registry.find_run(digest)
    assert other.client.get_run(run_id).data.metrics == {"loss": 0.5}


def test_the_newest_run_of_a_digest_is_found(shop_copy: Any) -> None:
    tracking, digest = open_tracking(shop_copy), digest_folder(shop_copy.root / "models/candidate")
    with tracking.start_run("made again", tags={DIGEST_TAG: digest}) as run_id:
        pass
    assert tracking.find_run(digest) == run_id
    with tracking.start_run("", run_id=run_id) as again:
        tracking.set_tags({"opened": "again"})
    assert again == run_id
    run = tracking.client.get_run(run_id)
    assert (run.info.run_name, run.data.tags["opened"], run.info.status) == ("made again", "again", "FINISHED")


def test_a_run_of_another_model_folder_is_not_registered(shop_copy: Any) -> None:
    """The registry forgot the version, and models/run.json is of another folder than models/candidate."""
    tracking = open_tracking(shop_copy)
    tracking.client.delete_registered_model(MODEL)
    path = shop_copy.root / "models/run.json"
    change_json(path, folder_sha256="0" * 64)
    output = " ".join(shop_copy.run("register", status=1).output.split())
    assert "DataError: models/run.json is of another model than models/candidate" in output
    assert count_versions(tracking) == 0


@pytest.fixture
def rival(shop_copy: Any) -> Any:
    """The champion's model in a folder that is not the champion's: a space more in its contract."""
    path = shop_copy.root / "models/candidate/contract.json"
    path.write_bytes(path.read_bytes() + b" ")
    return shop_copy


def find_stored_contract(shop: Any) -> Path:
    (path,) = (shop.root / "state/mlflow").rglob("contract/contract.json")
    return Path(path)


def test_the_stored_champion_is_compared_with_another_folder(rival: Any) -> None:
    rival.run("evaluate")
    verdict = rival.read_json("metrics/gates.json")
    assert int(verdict["champion"]["version"]) == 1
    assert verdict["champion"]["folder_sha256"] == digest_folder(find_stored_contract(rival).parent)
    assert verdict["comparison"]["verdict"] == "inconclusive"


def test_a_stored_champion_that_was_changed_is_refused(rival: Any) -> None:
    """Model and contract agree with each other: only the registry's tag knows better."""
    change_json(find_stored_contract(rival), threshold=0.9)
    assert "DataError: " in rival.run("evaluate", status=1).output


def test_a_champion_whose_artifacts_are_gone_is_named(rival: Any, tmp_path: Path) -> None:
    find_stored_contract(rival).parent.rename(tmp_path / "elsewhere")
    output = " ".join(rival.run("evaluate", status=1).output.split())
    assert "ServiceUnavailable: shop_churn version 1: artifacts are not there" in output


def open_at(uri: str, root: Path) -> Tracking:
    return Tracking(Settings(root=root, tracking={"uri": uri}), MODEL)


@pytest.fixture
def without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.usefixtures("without_retries")
def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    tracking = open_at("http://127.0.0.1:1", tmp_path)
    with pytest.raises(ServiceUnavailable, match=r"MLflow at http://127\.0\.0\.1:1: "), tracking.start_run("never"):
        pass
    calls: list[Callable[[], Any]] = [
        lambda: tracking.read_alias(CHAMPION),
        lambda: tracking.find_run("a digest"),
        lambda: tracking.find_version("a digest"),
        lambda: tracking.register("models:/m-1", "a run", {}),
        lambda: tracking.set_challenger("1"),
        tracking.read_journal_mark,
    ]
    for call in calls:
        with pytest.raises(ServiceUnavailable, match=r"MLflow at http://127\.0\.0\.1:1: "):
            call()


def test_a_run_tells_what_mlflow_cannot_do_from_what_else_goes_wrong(tmp_path: Path) -> None:
    tracking = open_at("sqlite:///mlflow.db", tmp_path)
    with pytest.raises(ServiceUnavailable, match="MLflow at sqlite"), tracking.start_run("too long a name"):
        tracking.log_metrics({"m" * 1_000: 1.0})
    with pytest.raises(OSError, match="no room"), tracking.start_run("a full disk"):
        raise OSError("no room")
    runs = tracking.client.search_runs([tracking.client.get_experiment_by_name(MODEL).experiment_id])
    assert [run.info.status for run in runs] == ["FAILED", "FAILED"]


@pytest.mark.usefixtures("without_retries")
def test_a_server_that_does_not_answer_keeps_its_password(tmp_path: Path) -> None:
    with pytest.raises(ServiceUnavailable, match=r"http://\*\*\*@127\.0\.0\.1:1") as refused:
        open_at("http://reader:s3cr3t@127.0.0.1:1", tmp_path).read_alias(CHAMPION)
    assert "s3cr3t" not in str(refused.value)


def test_artifacts_lie_where_the_settings_say(tmp_path: Path) -> None:
    expected = {
        "mlflow-artifacts:/": "mlflow-artifacts:/model0",
        "mlflow-artifacts://mlflow:5000/": "mlflow-artifacts://mlflow:5000/model1",
        "s3://bucket/models": "s3://bucket/models/model2",
        "kept": f"file://{tmp_path}/kept/model3",
    }
    for index, (given, place) in enumerate(expected.items()):
        settings = Settings(root=tmp_path, tracking={"uri": "sqlite:///store.db", "artifacts": given})
        tracking = Tracking(settings, f"model{index}")
        with tracking.start_run("placed") as run_id:
            pass
        assert tracking.client.get_run(run_id).info.artifact_uri == f"{place}/{run_id}/artifacts"


@pytest.mark.thorough
def log_run(root: Path) -> tuple[Tracking, str]:
    tracking = Tracking(Settings(root=root), MODEL)
    (root / "note.txt").write_text("a note", encoding="utf-8")
    with tracking.start_run("train") as run_id:
        tracking.log_files({"notes": root / "note.txt"})
    return tracking, run_id


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree], ids=["moved", "copied"])
def test_a_store_finds_the_artifacts_that_came_along_with_it(tmp_path: Path, move: Callable[[Path, Path], Any]) -> None:
    before, after = tmp_path / "a b%2Fc", tmp_path / "it's 100%"
    before.mkdir()
    _, run_id = log_run(before)
    move(before, after)
    shutil.rmtree(before, ignore_errors=True)
    tracking = Tracking(Settings(root=after), MODEL)
    folder = Path(tracking.client.download_artifacts(run_id, "notes", str(tmp_path)))
    assert (folder / "note.txt").read_text(encoding="utf-8") == "a note"
    _, newer = log_run(after)
    assert (after / f"state/mlflow/{MODEL}/{newer}/artifacts/notes/note.txt").is_file()
    assert not before.exists()


def test_artifacts_that_did_not_come_along_stay_where_they_are(tmp_path: Path) -> None:
    _, run_id = log_run(tmp_path)
    settings = Settings(root=tmp_path, tracking={"artifacts": "elsewhere"})
    client = Tracking(settings, MODEL).client
    assert (Path(client.download_artifacts(run_id, "notes", str(tmp_path))) / "note.txt").is_file()


def test_no_secret_of_the_environment_reaches_a_run_or_a_result(
    shop_copy: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CLOSEDLOOP_OPERATIONS__URL", f"postgresql://app:{SECRET}@127.0.0.1:1/store")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("CLUB_DATABASE", f"postgresql://reader:{SECRET}@127.0.0.1:1/club")
    before = shop_copy.read_json("models/run.json")["run_id"]
    shown = [shop_copy.run(stage).output for stage in ("train", "evaluate")]
    shown += [
        shop_copy.run(*line, status=1).output for line in (["register"], ["status"], ["monitor"], ["store", "upgrade"])
    ]
    run_id = shop_copy.read_json("models/run.json")["run_id"]
    run = open_tracking(shop_copy).client.get_run(run_id)
    assert run_id != before
    assert run.data.params
    assert run.data.tags
    for text in (*shown, str(run.data.params), str(run.data.tags), caplog.text):
        assert SECRET not in text
    kept = [file for file in shop_copy.root.rglob("*") if file.is_file()]
    assert shop_copy.root / "mlflow.db" in kept
    assert [file for file in kept if SECRET.encode() in file.read_bytes()] == []


@pytest.fixture(scope="module")
def searched(small_shop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The small shop, trained again after a search of three small trials, with the mirror switched on."""
    shop = small_shop.copy(tmp_path_factory.mktemp("searched") / "project")
    shop.change_params({"tuning": {"trials": 3, "folds": 2, "rows_max": 3000}, "model": {"params": {"max_iter": 10}}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLOSEDLOOP_TRACKING__WANDB", "true")
        shop.run("train")
    return shop


def test_the_searchs_trials_are_nested_runs_of_the_training(searched: Any) -> None:
    tracking, parent = open_tracking(searched), searched.read_json("models/run.json")["run_id"]
    experiment = tracking.client.get_experiment_by_name(MODEL)
    trials = tracking.client.search_runs(
        [experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'", order_by=["start_time"]
    )
    assert [run.info.run_name for run in trials] == ["trial 0", "trial 1", "trial 2"]
    for run in trials:
        assert run.info.status == "FINISHED"
        assert set(run.data.params) == {"learning_rate", "max_leaf_nodes", "min_samples_leaf", "l2_regularization"}
        assert 7 <= int(run.data.params["max_leaf_nodes"]) <= 63
        assert 0 < run.data.metrics["log_loss"] < 1
        assert run.data.tags["state"] in ("COMPLETE", "PRUNED")
        assert DIGEST_TAG not in run.data.tags
    complete = [run for run in trials if run.data.tags["state"] == "COMPLETE"]
    best = min(complete, key=lambda run: run.data.metrics["log_loss"])
    used = searched.read_json("models/pipeline/choices.json")["hyper_parameters"]
    assert {name: str(value) for name, value in used.items()} == {"max_iter": "10", **best.data.params}
    assert tracking.client.get_run(parent).data.params["tuning.trials"] == "3"
    # the parent is not one of the trials, and its figures are its own
    assert "validation_log_loss" in tracking.client.get_run(parent).data.metrics


def test_the_searchs_trials_are_mirrored(searched: Any) -> None:
    assert len(list((searched.root / "wandb").glob("offline-run-*/run-*.wandb"))) == 3
