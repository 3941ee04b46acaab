"""`closedloop run`: workspaces for other data, results that the tracking store lost, and the summary."""

from __future__ import annotations

import configparser
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from closedloop.adapters.dvc import reproduce
from closedloop.adapters.mlflow import DIGEST_TAG
from closedloop.bootstrap import build_tracking, load_run
from closedloop.config.params import parse_params
from closedloop.config.settings import load_settings
from closedloop.errors import ConfigError, DataError
from closedloop.workflow import (
    GIVEN,
    describe_comparison,
    find_stale_stage,
    prepare_workspace,
    print_summary,
    recall_given,
    run_workflow,
)

SOURCE_ROOT = Path(__file__).parents[2]


def add_dvc(root: Path) -> None:
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text((SOURCE_ROOT / ".dvc/config").read_text(encoding="utf-8"), encoding="utf-8")


# Workspaces


@pytest.fixture
def root(project: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a project without results."""
    add_dvc(project.root)
    (project.root / "src").mkdir()
    monkeypatch.chdir(project.root)
    return Path()


def prepare(root: Path, **given: str | None) -> Path:
    return prepare_workspace(root, **{"dataset": None, "source": None, "as_of": None, **given})


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_a_hyper_parameter_that_no_model_has_is_refused_before_the_first_stage(root: Path, project: Any) -> None:
    project.change_params({"model": {"params": {"learning_rat": 0.1}}})
    with pytest.raises(ConfigError, match="learning_rat"):
        run_workflow(dataset=None, source=None, as_of=None)
    assert not (root / "data").exists()


def test_the_command_line_wins_over_the_data_set_and_that_over_params(root: Path, project: Any) -> None:
    project.change_params({"seed": 11, "preprocess": {"feature_selection": 5}})
    (root / "lines.csv").write_text("a\n1\n", encoding="utf-8")
    folder = prepare(root, dataset="online_retail", source="lines.csv")
    params = read(folder / "params.yaml")
    assert (params["dataset"], params["seed"]) == ("online_retail", 11)  # the command line's, and params.yaml's
    assert params["as_of"] == "2011-12-09"  # the data set's
    assert params["features"]["window_days"] == [30, 90, 180]
    assert params["preprocess"] == {"normalize": True, "feature_selection": 5}
    assert params["data"]["source"] == str(Path("lines.csv").absolute())
    folder = prepare(root, dataset="online_retail", source="lines.csv", as_of="2011-11-30")
    assert read(folder / "params.yaml")["as_of"] == "2011-11-30"
    parse_params(read(folder / "params.yaml"), "params.yaml")


def list_files(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Inode, time and content of each file; links are not followed."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    return {
        str(path.relative_to(folder)): (status.st_ino, status.st_mtime_ns, path.read_bytes())
        for path, status in files.items()
    }


def test_preparing_a_workspace_leaves_the_project_and_again_what_is_there(root: Path) -> None:
    outside = list_files(root)
    folder = prepare(root, as_of="2024-06-01")
    assert folder == Path("workspaces/shop")
    before = list_files(folder)
    assert {".dvc/config", "params.yaml", "dvc.yaml", "feature_repo/feature_store.yaml"} <= set(before)
    assert {name: found for name, found in list_files(root).items() if not name.startswith("workspaces/")} == outside
    prepare(root, as_of="2024-06-01")
    again = list_files(folder)
    # the feature repository is copied anew, with the same content
    assert {name: found[2] for name, found in again.items()} == {name: found[2] for name, found in before.items()}
    assert {name.split("/")[0] for name in again if again[name] != before[name]} <= {"feature_repo"}


def test_a_data_set_runs_again_by_what_its_last_run_was_given(root: Path, project: Any) -> None:
    assert recall_given("shop", None, None) == (None, None, None)  # the project's own has no workspace
    assert recall_given("shop", None, "2024-01-01") == (None, None, "2024-01-01")
    assert recall_given("telco", None, None) == ("telco", None, None)
    folder = root / "workspaces/telco"
    folder.mkdir(parents=True)
    (folder / GIVEN).write_text('{"source": "telco.csv", "as_of": null}', encoding="utf-8")
    assert recall_given("telco", None, None) == ("telco", "telco.csv", None)
    assert recall_given("telco", "newer.csv", "2024-01-01") == ("telco", "newer.csv", "2024-01-01")


def test_a_workspace_shares_code_configs_cache_and_stores(root: Path) -> None:
    folder = prepare(root, dataset="shop")
    for name in ("configs", "src"):
        assert (folder / name).is_symlink()
        assert (folder / name).resolve() == (root / name).resolve()
        assert not (folder / name).readlink().is_absolute()  # the project may be moved
    assert load_settings(folder=folder / "configs").root == root.resolve()
    config = configparser.ConfigParser()
    config.read(folder / ".dvc/config")
    assert config["core"]["no_scm"] == "true"
    assert config["core"]["analytics"] == "false"
    assert (folder / ".dvc" / config["cache"]["dir"]).resolve() == (root / ".dvc/cache").resolve()
    store, original = read(folder / "feature_repo/feature_store.yaml"), read(root / "feature_repo/feature_store.yaml")
    assert store["project"] == "shop_churn"
    for one, base in ((store, folder), (original, root)):
        registry = base / "feature_repo" / one["registry"]["path"].removeprefix("sqlite:///")
        assert registry.resolve() == (root / "state/feast/registry.db").resolve()
        assert (base / "feature_repo" / one["online_store"]["path"]).resolve() == (
            root / "state/feast/online.db"
        ).resolve()


def test_a_query_is_asked_each_time_and_a_simulator_never(root: Path) -> None:
    graph = read(prepare(root, dataset="shop") / "dvc.yaml")
    assert "always_changed" not in graph["stages"]["ingest"]
    config = read(root / "configs/datasets/telco.yaml")
    config |= {"name": "club", "model_name": "club", "source": {"type": "sql", "url_variable": "URL", "query": "x"}}
    (root / "configs/datasets/club.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    asked = read(prepare(root, dataset="club") / "dvc.yaml")["stages"]
    assert asked["ingest"].pop("always_changed") is True
    assert set(asked) == set(graph["stages"])
    assert not any("always_changed" in stage for stage in asked.values())


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"dataset": "nobody"}, ConfigError, "dataset 'nobody': "),
        ({"as_of": "yesterday"}, ConfigError, "as_of: "),
        ({"dataset": "telco", "source": "nowhere.csv"}, DataError, "nowhere.csv'"),
    ],
)
def test_a_wrong_request_is_refused(root: Path, given: dict[str, str], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        prepare(root, **given)


def open_registry(shop: Any) -> Any:
    return build_tracking(load_run(shop.root / "params.yaml", root=shop.root)).client


# The graph, by real DVC: three stages that only leave a trace stand for the training


@pytest.fixture
def traced(shop_copy: Any) -> Any:
    """The small shop's results, in a project whose stages are a matter of milliseconds."""
    add_dvc(shop_copy.root)
    path = shop_copy.root / ".dvc/config"
    path.write_text(path.read_text(encoding="utf-8") + "    no_scm = true\n", encoding="utf-8")
    write_graph(shop_copy, "true")
    return shop_copy


def write_graph(shop: Any, command: str) -> None:
    train = {"cmd": f"{command} && echo train >> ran.txt && cp ran.txt model.txt", "deps": ["params.yaml"]}
    evaluate = {"cmd": "echo evaluate >> ran.txt && cp ran.txt verdict.txt", "deps": ["model.txt"]}
    register = {"cmd": "echo register >> ran.txt", "deps": ["verdict.txt"]}
    stages = {"train": {**train, "outs": ["model.txt"]}, "evaluate": {**evaluate, "outs": ["verdict.txt"]}}
    graph = {"stages": {**stages, "register": register}}
    (shop.root / "dvc.yaml").write_text(yaml.safe_dump(graph), encoding="utf-8")


def list_ran(shop: Any) -> list[str]:
    path = shop.root / "ran.txt"
    return path.read_text(encoding="utf-8").split() if path.exists() else []


def test_what_is_up_to_date_does_not_run_and_what_the_store_lost_does(traced: Any) -> None:
    assert "3 stages ran in" in traced.run("run").output
    assert list_ran(traced) == ["train", "evaluate", "register"]
    again = traced.run("run").output
    assert "Nothing changed: all stages are up to date" in again
    assert "shop_churn version 1, alias champion" in again  # the summary, all the same
    open_registry(traced).delete_run(traced.read_json("models/run.json")["run_id"])
    lost = " ".join(traced.run("run").output.split())
    assert "The tracking store does not know this result; running again from 'train'" in lost
    assert "3 stages ran in" in lost
    assert "train, evaluate, register" in lost
    assert list_ran(traced) == ["train", "evaluate", "register"] * 2


def test_a_section_of_a_data_sets_config_runs_the_stages_that_read_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By real DVC, on the real graph, whose stages leave a trace."""
    graph = read(root / "dvc.yaml")
    for stage, body in graph["stages"].items():
        body["cmd"] = f"echo {stage} >> ran.txt && mkdir -p out && echo same > out/{stage}"
        body["deps"] = [dep for dep in body["deps"] if dep.startswith("configs/")]
        body["outs"] = [f"out/{stage}"]
        body.pop("metrics", None)
    (root / "dvc.yaml").write_text(yaml.safe_dump({"vars": graph["vars"], "stages": graph["stages"]}), encoding="utf-8")
    config, source = root / "configs/datasets/telco.yaml", root / "rows.csv"
    source.write_text("a\n1\n", encoding="utf-8")

    def run_again(**changes: Any) -> set[str]:
        config.write_text(yaml.safe_dump({**read(config), **changes}), encoding="utf-8")
        folder = prepare(root, dataset="telco", source=str(source))
        with monkeypatch.context() as inside:
            inside.chdir(folder)
            return set(reproduce(Path()))

    reading = {"ingest", "validate", "features", "training_set", "train", "evaluate"}
    assert run_again() >= reading
    assert run_again() == set()
    assert run_again(gates={"roc_auc_min": 0.6}) == {"evaluate"}
    assert run_again(expectations=[]) == {"validate"}
    assert run_again(value={"kept": 100, "offer_cost": 5, "save_rate": 0.2}) == {"train", "evaluate"}
    assert run_again(params={**read(config)["params"], "evaluation": {"bootstrap_samples": 300}}) == {"evaluate"}
    assert run_again(feature_max_age_days=12) == reading
    assert run_again() == set()


def make_another_champion(shop: Any) -> None:
    """What a promotion elsewhere leaves in the registry."""
    client = open_registry(shop)
    source = client.get_model_version("shop_churn", "1").source
    other = client.create_model_version("shop_churn", source, tags={DIGEST_TAG: "0" * 64})
    client.set_registered_model_alias("shop_churn", "champion", other.version)


def test_what_was_compared_with_a_former_champion_is_evaluated_again(traced: Any) -> None:
    traced.run("run")
    make_another_champion(traced)
    again = " ".join(traced.run("run").output.split())
    assert "This result was not compared with the present champion; running again from 'evaluate'" in again
    assert list_ran(traced) == ["train", "evaluate", "register", "evaluate", "register"]


@pytest.mark.parametrize(("command", "status", "kind"), [("exit 2", 2, "GateFailed"), ("exit 3", 1, "StageFailed")])
def test_a_stage_that_fails_stops_the_graph_with_its_meaning(traced: Any, command: str, status: int, kind: str) -> None:
    write_graph(traced, f"({command})")
    output = " ".join(traced.run("run", status=status).output.split())
    assert f"{kind}: failed to reproduce 'train'" in output
    assert ("; figures and pictures so far are in reports" in output) == (kind == "GateFailed")
    assert list_ran(traced) == []
    assert "Gates" not in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "magic"}}, "model.type"),
        ({"model": {"params": {"learning_rat": 0.1}}}, "model parameter learning_rat is not allowed"),
        ({"model": {"params": {"max_iter": 1.5}}}, "The 'max_iter' parameter"),
        ({"model": {"params": {"max_iter": "ten"}}}, "The 'max_iter' parameter"),
        (
            {
                "tuning": {
                    "trials": 3,
                    "space": {"hist_gradient_boosting": {"depth": {"type": "int", "low": 1, "high": 2}}},
                }
            },
            "model parameter depth is not allowed",
        ),
    ],
)
def test_a_wrong_parameter_is_told_before_the_first_stage(project: Any, change: Any, message: str) -> None:
    project.change_params(change)
    output = " ".join(project.run("run", status=1).output.split())
    assert "ConfigError: " in output
    assert message in output
    assert not (project.root / "data/raw").exists()


def test_outside_a_project_nothing_runs(project: Any) -> None:
    (project.root / "dvc.yaml").unlink()
    assert "there is no dvc.yaml; run this in the project's folder" in project.run("run", status=1).output


# Results that the tracking store lost or judges otherwise


def find_stale(shop: Any) -> str | None:
    """The stage to run from."""
    with contextlib.chdir(shop.root):
        found = find_stale_stage()
    return found[0] if found else None


def test_a_store_that_knows_the_result_lost_nothing(small_shop: Any) -> None:
    assert find_stale(small_shop) is None


def test_a_version_that_is_gone_is_registered_again(shop_copy: Any) -> None:
    open_registry(shop_copy).delete_model_version("shop_churn", "1")
    assert find_stale(shop_copy) == "register"


def test_a_run_that_is_gone_is_trained_again(shop_copy: Any) -> None:
    open_registry(shop_copy).delete_run(shop_copy.read_json("models/run.json")["run_id"])
    assert find_stale(shop_copy) == "train"


def test_a_challenger_is_stale_only_under_another_champion_than_its_own(shop_copy: Any) -> None:
    make_another_champion(shop_copy)
    assert find_stale(shop_copy) == "evaluate"
    path = shop_copy.root / "metrics/gates.json"
    judged = json.loads(path.read_text(encoding="utf-8")) | {"champion": {"version": "2", "folder_sha256": "0" * 64}}
    path.write_text(json.dumps(judged), encoding="utf-8")
    assert find_stale(shop_copy) is None


@pytest.mark.parametrize("text", [None, "{", "{}"])
def test_without_a_registration_there_is_nothing_to_lose(project: Any, text: str | None) -> None:
    if text is not None:
        (project.root / "metrics").mkdir()
        (project.root / "metrics/registration.json").write_text(text, encoding="utf-8")
    assert find_stale(project) is None
    assert not (project.root / "mlflow.db").exists()


# The summary


def summarise(shop: Any, folder: Path = Path()) -> list[str]:
    """The summary's lines, with runs of spaces made one."""
    console = Console(file=io.StringIO(), width=400, color_system=None)
    with contextlib.chdir(shop.root):
        print_summary(console, folder)
    return [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_summary_says_rows_gates_model_and_what_to_open(small_shop: Any) -> None:
    lines = summarise(small_shop, Path("workspaces/shop"))
    text = "\n".join(lines)
    ingested, parts = small_shop.read_json("metrics/ingest.json"), small_shop.read_json("metrics/training_set.json")
    gates = small_shop.read_json("metrics/gates.json")["gates"]
    rows = {name: f"{part['rows']:,}" for name, part in parts["parts"].items()}
    assert f"Rows {ingested['rows_read']:,} read, {ingested['rows_kept']:,} kept" in lines
    assert f"train {rows['train']}, validation {rows['validation']}, test {rows['test']}" in lines
    expectations = small_shop.read_json("metrics/data_quality.json")["expectations"]
    assert f"data │ passed │ {expectations} of {expectations} expectations hold, 0 warnings" in text
    assert "skew │ passed │ 1,000 customers online = offline; features of 2024-01-01" in text
    for name, gate in gates.items():
        (line,) = [line for line in lines if line.startswith(f"{name} │")]
        assert line.split(" │ ")[1] == ("passed" if gate["passed"] else "failed")
        assert line.split(" │ ")[2] == gate["sentence"].removeprefix(f"{name} ")
    assert "Model there was no champion to compare with" in lines
    assert "shop_churn version 1, alias champion" in lines
    assert lines[-6:] == [
        "Open workspaces/shop/reports/index.html, which links to the others",
        "MLflow closedloop --dataset shop ui",
        "Serve closedloop --dataset shop serve",
        "Score closedloop --dataset shop score --input workspaces/shop/data/features/2024-01-01.parquet "
        "--output workspaces/shop/data/scores.parquet",
        "Watch closedloop --dataset shop demo; closedloop --dataset shop status",
        "Release closedloop --dataset shop release history",
    ]


def test_whoever_came_by_make_is_told_targets_of_make(small_shop: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MAKELEVEL", "1")
    monkeypatch.setenv("CLOSEDLOOP_PROGRAM", ".venv/bin/closedloop")
    assert summarise(small_shop, Path("workspaces/shop"))[-5:] == [
        "MLflow make ui DATASET=shop",
        "Serve make serve DATASET=shop",
        "Score make score DATASET=shop INPUT=workspaces/shop/data/features/2024-01-01.parquet "
        "OUTPUT=workspaces/shop/data/scores.parquet",
        "Watch make demo DATASET=shop; make status DATASET=shop",
        "Release .venv/bin/closedloop --dataset shop release history",
    ]
    assert summarise(small_shop)[-4] == "Serve make serve"
    assert summarise(small_shop)[-1] == "Release .venv/bin/closedloop release history"


def test_the_summary_tells_dropped_rows_warnings_and_what_did_not_win(shop_copy: Any) -> None:
    def change_json(name: str, **values: Any) -> None:
        path = shop_copy.root / f"metrics/{name}.json"
        path.write_text(json.dumps({**shop_copy.read_json(f"metrics/{name}.json"), **values}), encoding="utf-8")

    dropped = [{"rule": "missing_id", "rows": 1500, "first_reason": 1200}]
    change_json("ingest", dropped=dropped, blank_values={"age": 1234, "[/b] [red]x": 5})
    change_json("data_quality", expectations=14, failed_warning=2)
    serving = {"snapshot": "2023-12-02", "materialized": False, "reason": "older than the store"}
    change_json("training_set", serving=serving)
    gates = shop_copy.read_json("metrics/gates.json")["gates"]
    gates["accuracy"]["sentence"] += " [/b]"
    gates["accuracy"]["passed"] = gates["champion_challenger"]["passed"] = False
    change_json("gates", gates=gates)
    text = "\n".join(summarise(shop_copy))
    assert "dropped for missing_id: 1,500 (1,200 for this first)" in text
    assert "blank age: 1,234" in text
    assert "blank [/b] [red]x: 5" in text  # the name of a column is no markup
    assert "data │ passed │ 12 of 14 expectations hold, 2 warnings" in text
    assert "skew │ passed │ not materialised: older than the store; features of 2023-12-02" in text
    assert "accuracy │ failed │" in text
    assert "champion_challenger │ no win │" in text
    assert "Open reports/index.html, which links to the others\nMLflow closedloop ui\nServe closedloop serve" in text


@pytest.mark.parametrize(
    ("champion", "comparison", "sentence"),
    [
        (None, None, "there was no champion to compare with"),
        ({"version": "3", "is_candidate": True}, None, "it is the champion, version 3"),
        ({"version": "3", "not_compared": "its rows are gone"}, None, "version 3: its rows are gone"),
        ({"version": "3"}, {"verdict": "lose", "reason": "it is worse"}, "champion version 3: lose (it is worse)"),
    ],
)
def test_the_comparison_in_one_sentence(champion: Any, comparison: Any, sentence: str) -> None:
    found = describe_comparison({"champion": champion, "comparison": comparison})
    assert found.endswith(sentence)
