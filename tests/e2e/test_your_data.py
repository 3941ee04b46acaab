"""Other people's data: the examples of docs/your-data.md run as they stand there, and two data sets never meet."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import sqlalchemy
import yaml
from pydantic import BaseModel
from rich.console import Console

from closedloop.bootstrap import build_features, load_run
from closedloop.config.dataset import DatasetConfig
from closedloop.core.evaluation.value import CustomerValue
from closedloop.workflow import prepare_workspace, print_summary
from tests.http_service import HttpService
from tests.online_rows import read_online

SOURCE_ROOT = Path(__file__).parents[2]
PAGE = (SOURCE_ROOT / "docs/your-data.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^```sh\n(.*?)\n```$", PAGE, re.DOTALL | re.MULTILINE)
STAGES = ("ingest", "validate", "features", "training-set", "train", "evaluate", "register")
FAST = {"evaluation": {"bootstrap_samples": 200}}


def enter(project, monkeypatch_context: pytest.MonkeyPatch, **given: str | None):
    """The workspace that `closedloop run` makes for these options, as a project of its own."""
    monkeypatch_context.chdir(project.root)
    options = {"dataset": None, "source": None, "as_of": None, **given}
    return type(project)(project.root / prepare_workspace(Path(), **options))


@pytest.fixture(scope="module")
def page_project(tmp_path_factory, make_project):
    """A project with the page's files: two generators run, and two configs added."""
    made = make_project(tmp_path_factory.mktemp("page") / "project")
    add_run_files(made.root)
    for title, text in BLOCKS.items():
        if title.startswith("configs/") or title.endswith(".py"):
            (made.root / title).write_text(text, encoding="utf-8")
    for name in ("make_coffee.py", "make_members.py"):
        subprocess.run([sys.executable, name], cwd=made.root, check=True)
    made.change_params(FAST)
    return made


def add_run_files(root: Path) -> None:
    """What `closedloop run` needs besides: the package's sources, on which the stages depend, and DVC's config."""
    (root / "src").symlink_to(SOURCE_ROOT / "src")
    (root / ".dvc").mkdir()
    (root / ".dvc/config").write_text((SOURCE_ROOT / ".dvc/config").read_text(encoding="utf-8"), encoding="utf-8")


@pytest.fixture(scope="module")
def trained(page_project):
    """Both data sets of the page, trained in one project; a dictionary of workspaces."""
    workspaces = {}
    with pytest.MonkeyPatch.context() as context:
        workspaces["coffee"] = enter(page_project, context, dataset="coffee")
        workspaces["members"] = enter(page_project, context, dataset="members", source="members.csv")
    for workspace in workspaces.values():
        workspace.run_stages(*STAGES)
    return workspaces


@pytest.mark.parametrize("name", ["coffee", "members"])
def test_the_pages_example_passes_its_gates_and_is_registered(trained, name):
    workspace = trained[name]
    assert workspace.read_json("metrics/gates.json")["passed"]
    registered = workspace.read_json("metrics/registration.json")
    assert (registered["model_name"], registered["version"], registered["alias"]) == (f"{name}_churn", 1, "champion")


def test_the_pages_commands_are_those_that_were_run():
    assert COMMANDS == ["closedloop run --dataset coffee", "closedloop run --dataset members --source members.csv"]


def test_the_pages_sample_lines_have_the_columns_of_the_generated_files(page_project):
    for title, text in BLOCKS.items():
        if title.endswith(".csv"):
            made = (page_project.root / title).read_text(encoding="utf-8")
            assert text.splitlines()[0] == made.splitlines()[0]
            assert all(len(line.split(",")) == len(text.splitlines()[0].split(",")) for line in text.splitlines())


def test_the_example_shows_every_kind_of_broken_rule(trained):
    report = trained["coffee"].read_json("metrics/ingest.json")
    hits = {entry["rule"]: entry["rows"] for entry in report["dropped"]}
    assert hits["missing_id"] == 1
    assert hits["cancellation"] == hits["quantity_not_positive"] > 100
    assert report["rows_dropped"] == sum(entry["first_reason"] for entry in report["dropped"])
    assert trained["members"].read_json("metrics/ingest.json")["blank_values"]["fee"] > 10
    assert trained["members"].read_json("metrics/data_quality.json")["failed_warning"] == 1


def list_keys(model: type[BaseModel], prefix: str = "") -> set[str]:
    """Every key of a config, with dots."""
    keys = set()
    for name, field in model.model_fields.items():
        keys.add(f"{prefix}{name}")
        kinds = [*get_args(field.annotation), field.annotation]
        nested = [part for kind in kinds for part in (*get_args(kind), kind)]
        if not prefix and name in ("columns", "cleaning", "label", "source"):
            for kind in nested:
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    keys |= list_keys(kind, f"{name}.")
    return keys


def test_every_key_of_a_config_is_explained_on_the_page():
    table = PAGE[PAGE.index("## Every key") : PAGE.index("Tables that expectations")]
    explained = set(
        re.findall(
            r"`([a-z_.]+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
        )
    )
    keys = list_keys(DatasetConfig) - {"source", "columns", "cleaning", "label", "value"}
    keys |= {f"value.{name}" for name in CustomerValue.model_fields}
    assert keys - explained == set()
    assert {key for key in explained if "." in key} - keys == set()


def read_events(workspace) -> dict[str, bytes]:
    files = sorted((workspace.root / "data/raw/events").glob("*.parquet"))
    return {path.name: path.read_bytes() for path in [*files, workspace.root / "data/raw/customers.parquet"]}


@pytest.fixture
def other_source(page_project, trained, tmp_path, monkeypatch):
    """Ingest the coffee orders from another source; the canonical tables must be byte for byte the same."""
    project = page_project
    config = project.root / "configs/datasets/coffee.yaml"
    original = config.read_text(encoding="utf-8")
    expected = read_events(trained["coffee"])

    def check(change: dict[str, Any], source: str | None = None) -> None:
        values = {**yaml.safe_load(original), **change, "name": "other", "model_name": "other_churn"}
        (project.root / "configs/datasets/other.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        workspace = enter(project, monkeypatch, dataset="other", source=source)
        workspace.run("ingest")
        assert read_events(workspace) == expected

    yield check
    (project.root / "configs/datasets/other.yaml").unlink()


@pytest.fixture(scope="module")
def lines(page_project) -> Path:
    """The orders split by year, as CSV and Parquet files in one folder."""
    folder = page_project.root / "coffee/lines"
    folder.mkdir()
    orders = pd.read_csv(page_project.root / "coffee/orders.csv", dtype=str)
    for year, rows in orders.groupby(orders["ordered_at"].str[:4]):
        rows.to_csv(folder / f"{year}-orders.csv", index=False)
        typed = rows.assign(
            ordered_at=pd.to_datetime(rows["ordered_at"]),
            customer=rows["customer"].astype(float),
            price=rows["price"].astype(float),
            quantity=rows["quantity"].astype(int),
        )
        typed.to_parquet(folder / f"{year}-orders.parquet")
    return folder


def test_a_folder_of_csv_files(other_source, lines):
    other_source({}, source="coffee/lines")


def test_a_pattern(other_source, lines):
    other_source({}, source="coffee/lines/202?-*.csv")


def test_parquet_files(other_source, lines):
    other_source(yaml.safe_load(BLOCKS["parquet"]))


def test_a_database_for_orders_and_customers(other_source, page_project, monkeypatch):
    path = page_project.root / "coffee/shop.db"
    # through SQLAlchemy: pandas' own writer changes how every SQLite connection of this process reads timestamps
    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    for name in ("orders", "customers"):
        pd.read_csv(page_project.root / f"coffee/{name}.csv").to_sql(name, engine, index=False)
    engine.dispose()
    monkeypatch.setenv("COFFEE_DATABASE_URL", f"sqlite:///{path}")
    other_source(yaml.safe_load(BLOCKS["sql"]))
    graph = yaml.safe_load((page_project.root / "workspaces/other/dvc.yaml").read_text(encoding="utf-8"))
    assert graph["stages"]["ingest"]["always_changed"]


def test_files_of_the_config_and_of_a_pattern_are_dependencies(page_project, lines, monkeypatch):
    workspace = enter(page_project, monkeypatch, dataset="coffee", source="coffee/lines/*.csv")
    dependencies = yaml.safe_load((workspace.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["ingest"]["deps"]
    root = page_project.root
    assert {str(lines / "2023-orders.csv"), str(lines / "2024-orders.csv"), str(root / "coffee/customers.csv")} <= set(
        dependencies
    )
    workspace = enter(page_project, monkeypatch, dataset="coffee")
    dependencies = yaml.safe_load((workspace.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["ingest"]["deps"]
    assert str(root / "coffee/orders.csv") in dependencies


def test_a_name_that_is_a_path_makes_no_workspace(page_project, monkeypatch):
    monkeypatch.chdir(page_project.root)
    before = sorted(path.name for path in page_project.root.parent.iterdir())
    assert "'../project'" in page_project.run("run", "--dataset", "../project", status=1).output
    assert sorted(path.name for path in page_project.root.parent.iterdir()) == before


# Two data sets in one registry and one store


def load(workspace, monkeypatch):
    monkeypatch.chdir(workspace.root)
    return load_run(Path("params.yaml"))


def test_each_has_its_own_experiment_model_and_aliases(trained, monkeypatch):
    import mlflow

    runs = {name: load(workspace, monkeypatch) for name, workspace in trained.items()}
    uris = {run.settings.locate_url(run.settings.tracking.uri) for run in runs.values()}
    assert len(uris) == 1  # one store for both
    uri = uris.pop()
    client = mlflow.MlflowClient(uri, uri)
    assert {model.name for model in client.search_registered_models()} == {"coffee_churn", "members_churn"}
    champions = {}
    for name in trained:
        experiment = client.get_experiment_by_name(f"{name}_churn")
        found = client.search_runs([experiment.experiment_id])
        assert {run.data.tags["closedloop.dataset"] for run in found} == {name}
        champions[name] = client.get_model_version_by_alias(f"{name}_churn", "champion")
        assert champions[name].run_id in {run.info.run_id for run in found}
        assert champions[name].tags["closedloop.dataset"] == name
    assert [int(version.version) for version in champions.values()] == [1, 1]


def test_the_second_is_never_compared_with_the_firsts_champion(trained):
    verdict = trained["members"].read_json("metrics/gates.json")
    assert verdict["champion"] is None
    assert verdict["comparison"] is None


def test_a_copied_config_cannot_reach_anothers_champion(page_project, monkeypatch):
    values = {**yaml.safe_load(BLOCKS["configs/datasets/coffee.yaml"]), "name": "thief"}
    path = page_project.root / "configs/datasets/thief.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        refusal = page_project.run("run", "--dataset", "thief", status=1).output
    finally:
        path.unlink()
    assert "model_name 'coffee_churn' belongs to coffee.yaml" in refusal


def read_newest(workspace) -> pd.DataFrame:
    """The newest snapshot's features, by customer."""
    newest = max((workspace.root / "data/features").glob("*.parquet"))
    return pd.read_parquet(newest).set_index("customer_id").drop(columns="event_timestamp")


def ask(workspace, ids: list[str], monkeypatch):
    run = load(workspace, monkeypatch)
    return read_online(build_features(run), ids, as_of=run.params.as_of_at)


def test_an_id_that_both_have_is_two_customers_online(trained, page_project, monkeypatch):
    coffee, members = trained["coffee"], trained["members"]
    both, stranger = read_newest(coffee).index[:2]
    before = ask(coffee, [both], monkeypatch).features
    csv = page_project.root / "members.csv"
    original = csv.read_text(encoding="utf-8")
    try:
        csv.write_text(original.replace("M-0017,", f"{both},"), encoding="utf-8")
        members.run_stages("ingest", "features", "training-set")
    finally:
        csv.write_text(original, encoding="utf-8")
    for workspace in (coffee, members):
        answer = ask(workspace, [both], monkeypatch)
        assert answer.state.tolist() == ["fresh"]
        expected = read_newest(workspace).loc[both].to_dict()
        assert answer.features.iloc[0].to_dict() == pytest.approx(expected, nan_ok=True)
    pd.testing.assert_frame_equal(ask(coffee, [both], monkeypatch).features, before)
    assert ask(members, [stranger], monkeypatch).state.tolist() == ["unknown"]


def test_each_has_its_own_project_in_one_feature_store(trained, monkeypatch):
    views = {}
    for name, workspace in trained.items():
        features = build_features(load(workspace, monkeypatch))
        store = features.open_store()
        assert store.project == f"{name}_churn"
        views[name] = {view.name for view in store.list_feature_views()}
        stored = yaml.safe_load((workspace.root / "feature_repo/feature_store.yaml").read_text(encoding="utf-8"))
        assert stored["project"] == f"{name}_churn"
    assert views["coffee"]
    assert views["members"]
    assert views["coffee"] & views["members"] == set()


def test_tracked_files_stay_as_they_were(trained, page_project):
    for name in ("dvc.yaml", "feature_repo/feature_store.yaml", "feature_repo/definitions.py"):
        assert (page_project.root / name).read_bytes() == (SOURCE_ROOT / name).read_bytes()
    assert not (page_project.root / "data").exists()
    assert not (page_project.root / "metrics").exists()


@pytest.mark.thorough
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["coffee", "members"])
def test_the_last_lines_of_a_run_name_commands_that_work_as_they_stand(trained, page_project, monkeypatch, name):
    """In the project's folder, in this order; the service of the first line goes on meanwhile."""
    console = Console(file=io.StringIO(), width=80)
    with contextlib.chdir(trained[name].root):
        print_summary(console, Path("workspaces") / name)
    lines = console.file.getvalue().splitlines()[-4:]
    calls = dict(line.split(maxsplit=1) for line in lines)
    assert list(calls) == ["Serve", "Score", "Watch", "Release"]
    program, *before, command = calls.pop("Serve").split()
    assert (program, command) == ("closedloop", "serve")
    service = HttpService(page_project.root, before=tuple(before))
    try:
        service.start()
        assert service.call("GET", "/health")[1]["model_name"] == f"{name}_churn"
        shown = {title: run_line(page_project.root, call) for title, call in calls.items()}
    finally:
        service.stop()
    scores = pd.read_parquet(trained[name].root / "data/scores.parquet")
    assert scores["score"].between(0, 1).all()
    assert len(scores) > 100
    assert f"{name}_churn" in shown["Watch"]
    assert "answers with version 1" in shown["Watch"]
    # a table's outcomes are reported; those of events close by themselves
    due = {"coffee": "nothing is due", "members": "report to the service what became of the customers"}
    assert f"Next: {due[name]}" in shown["Watch"]
    assert "promote: champion 1" in shown["Release"]


def run_line(root: Path, line: str) -> str:
    ran = subprocess.run(line, shell=True, cwd=root, capture_output=True, text=True, check=False, timeout=300)  # noqa: S602
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
