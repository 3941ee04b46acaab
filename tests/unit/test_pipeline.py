"""The Kubeflow pipeline is dvc.yaml: the same stages, edges, outputs and parameters."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from closedloop import component
from closedloop.adapters.kfp import compile_pipeline
from closedloop.config.layout import list_paths
from closedloop.config.params import Params
from closedloop.config.settings import RetrainingSettings
from pipelines import retrain

ROOT = Path(__file__).parents[2]
GRAPH: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
SETTINGS = RetrainingSettings(
    base_image="registry.example.com/jobs-python:7",
    environment={"CLOSEDLOOP_PROFILE": "production"},
    secret="closedloop",
    secret_keys=("CLOSEDLOOP_TRACKING__URI",),
)
Edge = tuple[str, str, str]  # who writes, the path in dvc.yaml, who reads


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(compile_pipeline(ROOT / "pipelines/retrain.py", SETTINGS)))


@pytest.fixture
def spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return copy.deepcopy(documents[0])


def list_defaults(stage: str) -> dict[str, str]:
    """Where a stage's command reads and writes if nothing else is said, by option."""
    return {name: str(path) for name, path in list_paths(stage.replace("-", "_")).items()}


def name_outputs(stage: str) -> list[str]:
    body = GRAPH[stage]
    entries = body.get("outs", []) + body.get("metrics", [])
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def list_dvc_edges() -> set[Edge]:
    made = {path: stage for stage in GRAPH for path in name_outputs(stage)}
    return {(made[path], path, stage) for stage, body in GRAPH.items() for path in body["deps"] if path in made}


def list_tasks(spec: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): task for name, task in spec["root"]["dag"]["tasks"].items()}


def list_kfp_edges(spec: dict[str, Any]) -> set[Edge]:
    edges = set()
    for stage, task in list_tasks(spec).items():
        for given in task["inputs"].get("artifacts", {}).values():
            producer = given["taskOutputArtifact"]["producerTask"].replace("-", "_")
            edges.add((producer, list_defaults(producer)[given["taskOutputArtifact"]["outputArtifactKey"]], stage))
    return edges


def find_unplanned(spec: dict[str, Any]) -> list[str]:
    """Stages that do not work by what was planned."""
    planned = {"taskOutputParameter": {"outputParameterKey": "Output", "producerTask": "plan"}}
    tasks = list_tasks(spec)
    return [stage for stage in GRAPH if tasks[stage]["inputs"].get("parameters") != {"run": planned}]


def find_unused(spec: dict[str, Any]) -> list[str]:
    """The pipeline's parameters that do not reach the plan under their own names."""
    given = list_tasks(spec)["plan"]["inputs"]["parameters"]
    names = spec["root"]["inputDefinitions"]["parameters"]
    return [name for name in names if given.get(name) != {"componentInputParameter": name}]


def test_the_stages_are_those_of_dvc(spec):
    assert set(list_tasks(spec)) == {"plan", *GRAPH}


def test_the_edges_are_those_of_dvc(spec):
    assert list_kfp_edges(spec) == list_dvc_edges()


@pytest.mark.parametrize("edge", sorted(list_dvc_edges()))
def test_an_edge_that_is_missing_is_noticed(spec, edge):
    producer, path, stage = edge
    artifacts = list_tasks(spec)[stage]["inputs"]["artifacts"]
    lost = [
        name
        for name, given in artifacts.items()
        if given["taskOutputArtifact"]["producerTask"].replace("-", "_") == producer
        and list_defaults(producer)[given["taskOutputArtifact"]["outputArtifactKey"]] == path
    ]
    assert len(lost) == 1
    del artifacts[lost[0]]
    assert list_dvc_edges() - list_kfp_edges(spec) == {edge}


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_writes_what_it_writes_under_dvc(spec, stage):
    declared = spec["components"][f"comp-{stage.replace('_', '-')}"]["outputDefinitions"]["artifacts"]
    assert sorted(list_defaults(stage)[name] for name in declared) == sorted(name_outputs(stage))


@pytest.mark.parametrize("stage", GRAPH)
def test_a_stage_takes_every_parameter_that_it_takes_under_dvc(spec, stage):
    assert find_unplanned(spec) == []
    for key in GRAPH[stage].get("params", []):  # the plan is all of params.yaml, so each must be a key of it
        fields: Any = Params.model_fields
        *sections, last = key.split(".")
        for section in sections:
            fields = fields[section].annotation.model_fields
        assert last in fields
    list_tasks(spec)[stage]["inputs"]["parameters"] = {"run": {"runtimeValue": {"constant": ""}}}
    assert find_unplanned(spec) == [stage]


@pytest.mark.parametrize("name", ["params", "as_of", "data_start_date", "data_end_date", "model_name", "trigger_id"])
def test_every_parameter_of_the_pipeline_reaches_the_plan(spec, name):
    assert name in spec["root"]["inputDefinitions"]["parameters"]
    assert find_unused(spec) == []
    list_tasks(spec)["plan"]["inputs"]["parameters"][name] = {"runtimeValue": {"constant": ""}}
    assert find_unused(spec) == [name]


@pytest.mark.parametrize("stage", GRAPH)
def test_a_component_is_its_command_and_its_artifacts_are_options(monkeypatch, stage):
    called: dict[str, Any] = {}
    monkeypatch.setattr(component, "run_stage", lambda command, given: called.update(given, command=command))
    function = getattr(retrain, stage)
    names = inspect.signature(function).parameters
    function(**{name: SimpleNamespace(path=f"/a/{name}") for name in names})
    assert called["command"] == stage.replace("_", "-")
    assert set(names) <= set(called)
    # what a stage only waits for is no option of its command
    assert set(names) - set(list_defaults(stage)) == {"run"} | ({"data_quality"} if stage == "features" else set())


def test_a_file_is_read_under_the_name_that_it_was_written_under(spec):
    for stage, task in list_tasks(spec).items():
        for name, given in task["inputs"].get("artifacts", {}).items():
            written = given["taskOutputArtifact"]
            made = Path(list_defaults(written["producerTask"])[written["outputArtifactKey"]])
            read = Path(list_defaults(stage).get(name, made))
            assert (read.suffix, read.suffix and read.name) == (made.suffix, made.suffix and made.name)


def test_no_task_runs_on_a_condition(spec):
    assert [name for name, task in list_tasks(spec).items() if "triggerPolicy" in task] == []


def test_every_pod_runs_our_image_with_its_environment_and_its_secret(documents):
    spec, platform = documents
    executors = spec["deploymentSpec"]["executors"]
    assert len(executors) == len(GRAPH) + 1
    for executor in executors.values():
        assert executor["container"]["image"] == SETTINGS.base_image
        assert executor["container"]["env"] == [{"name": "CLOSEDLOOP_PROFILE", "value": "production"}]
        assert "pip install" not in str(executor["container"]["command"])
    variable = dict.fromkeys(("secretKey", "envVar"), SETTINGS.secret_keys[0])
    secret = [{"secretName": "closedloop", "keyToEnv": [variable]}]
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert pods == {name: {"secretAsEnv": secret} for name in executors}


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        (
            {"cpu_request": "500m", "memory_request": "4Gi"},
            {"resourceCpuRequest": "500m", "resourceMemoryRequest": "4Gi"},
        ),
        ({"memory_request": "1500M"}, {"resourceMemoryRequest": "1500M"}),
        ({}, {}),
    ],
)
def test_every_pod_requests_what_the_settings_say(requests, expected):
    settings = SETTINGS.model_copy(update=requests)
    spec = next(yaml.safe_load_all(compile_pipeline(ROOT / "pipelines/retrain.py", settings)))
    found = [one["container"].get("resources", {}) for one in spec["deploymentSpec"]["executors"].values()]
    texts = [{name: value for name, value in one.items() if name.startswith("resource")} for one in found]
    assert texts == [expected] * (len(GRAPH) + 1)  # beside them stand the same as numbers, for older servers


@pytest.mark.parametrize(("name", "value"), [("cpu_request", "two"), ("memory_request", "4 GB")])
def test_a_request_that_kubernetes_does_not_read_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        RetrainingSettings(**{name: value})


def test_nothing_is_taken_from_a_cache(spec):
    assert all(not task["cachingOptions"] for task in list_tasks(spec).values())


def test_it_compiles_to_the_same_bytes_again():
    texts = {compile_pipeline(ROOT / "pipelines/retrain.py", SETTINGS) for _ in range(2)}
    assert len(texts) == 1
