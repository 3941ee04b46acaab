"""The Bento on real BentoML: what it holds, what it is refused for, and that it answers like `closedloop serve`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from closedloop.adapters.bentoml import (
    DIGEST_LABEL,
    MODEL_DIR,
    SERVICE,
    build_bento,
    create_service,
    digest_tree,
    open_bento,
)
from closedloop.contract import digest_folder
from closedloop.errors import ConfigError, DataError
from closedloop.processes import start_process
from closedloop.serving import bento
from closedloop.serving.config import CONFIG_VARIABLE
from closedloop.serving.worker import Worker
from tests.http_service import HttpService, run_service, wait_until
from tests.model_folders import ROWS, expected_score, write_model_folder

ROOT = Path(__file__).parents[2]
CHANGING = {"prediction_id", "request_id", "latency_ms", "total_latency_ms"}


# The service, in this process


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """What BentoML enters before it starts a Bento: its sources, with a small model."""
    monkeypatch.setenv("BENTOML_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(CONFIG_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    write_model_folder(tmp_path / MODEL_DIR)
    return tmp_path


def test_the_application_answers_at_its_own_addresses_and_two_probes_are_bentomls(sources):
    with TestClient(create_service(bento.start).to_asgi()) as client:
        answer = client.post("/predict", json={"features": ROWS[0]})
        assert (answer.status_code, answer.json()["prediction"]) == (200, 1)
        assert answer.json()["probability"] == pytest.approx(expected_score(ROWS[0]), abs=1e-6)
        assert client.get("/readyz").json() == {"status": "ready"}
        assert client.get("/health").json()["model_loaded"]
        assert [client.get(path).text for path in ("/livez", "/healthz")] == ["\n", "\n"]
        for path in ("/", "/metrics", "/docs.json", "/schema.json"):
            assert client.get(path).json()["error"]["code"] == "not_found"
    spools = list((sources / "home/closedloop/test_churn/spool").rglob("*"))
    assert any(b"prediction" in path.read_bytes() or path.stat().st_size > 100 for path in spools if path.is_file())


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CLOSEDLOOP_SERVING__TOKENS", '{"secret": ["predict"]}'),
        ("CLOSEDLOOP_SERVING", '{"tokens": {"secret": ["predict"]}}'),
    ],
)
def test_without_a_token_only_probes_answer_where_tokens_are_configured(sources, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with TestClient(create_service(bento.start).to_asgi()) as client:
        for path in ("/", "/metrics", "/model/info", "/docs", "/schema.json", "/assets/x"):
            assert client.get(path).status_code == 401, path
        assert client.get("/readyz").status_code == client.get("/livez").status_code == 200


def test_the_config_that_the_environment_names_counts_with_the_bentos_model(sources, monkeypatch):
    config = {"model_name": "test_churn", "state_dir": str(sources / "shared"), "settings": {"queue_max": 7}}
    (sources / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.setenv(CONFIG_VARIABLE, str(sources / "config.json"))
    found = bento.find_config()
    assert (found.state_dir, found.settings.queue_max) == (sources / "shared", 7)
    assert found.bundled_dir == sources / MODEL_DIR


def test_the_file_for_builds_by_hand_names_the_same_service():
    described = yaml.safe_load((ROOT / "bentofile.yaml").read_text(encoding="utf-8"))
    assert described["service"] == SERVICE
    assert f"{MODEL_DIR}/" in described["include"]


# Digests


def test_the_digest_follows_names_and_contents_alone(tmp_path):
    def write(name, files):
        folder = tmp_path / name
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        return digest_tree(folder)

    files = {"a/b": "1", "c": "2", "d": ""}
    digest = write("first", files)
    assert write("turned", dict(reversed(files.items()))) == digest
    assert write("built", {**files, "bentofile.yaml": "made by BentoML"}) == digest
    others = ({**files, "c": "3"}, {**files, "e": ""}, {"a/b": "1", "c": "2"}, {"a/c": "1", "c": "2", "d": ""})
    assert len({digest, *(write(f"other{number}", other) for number, other in enumerate(others))}) == 5


def write_bento(folder, digest):
    (folder / "bento.yaml").write_text(yaml.safe_dump({"labels": {DIGEST_LABEL: digest}}), encoding="utf-8")
    return folder


def test_a_bento_opens_when_its_model_is_the_one_that_it_is_labelled_with(tmp_path):
    model = write_model_folder(tmp_path / "src" / MODEL_DIR)
    assert open_bento(write_bento(tmp_path, digest_folder(model))) == model
    with pytest.raises(DataError, match=r"digest: .*candidate is .*, the registry says ffffffffffff"):
        open_bento(write_bento(tmp_path, "f" * 64))


@pytest.mark.parametrize("content", [None, "labels: [", "labels: {}", "just text"])
def test_what_is_no_bento_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "bento.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="is no Bento that 'closedloop package' built"):
        open_bento(tmp_path)


# The Bento, as processes


class BentoServer(HttpService):
    """`bentoml serve`, from a folder where nothing of the project is."""

    def start(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "BENTOML_HOME": str(self.root / "home"), **self.environment}
        command = [sys.executable, "-m", "bentoml", "serve", *self.arguments, "--port", str(self.port)]
        with (self.root / "service.log").open("ab") as log:
            self.process = start_process(command, cwd=self.root, env=environment, stdout=log, stderr=log)
        wait_until(self._is_ready, "readiness of bentoml serve")


@contextlib.contextmanager
def serve_bento(root, *arguments, **environment):
    server = BentoServer(root, environment, arguments)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def drop_changing(content):
    if isinstance(content, dict):
        return {name: drop_changing(value) for name, value in content.items() if name not in CHANGING}
    return [drop_changing(item) for item in content] if isinstance(content, list | tuple) else content


def ask_all(service, golden):
    rows = [row["features"] for row in golden]
    asked = [("POST", "/predict", {"features": row}) for row in rows]
    asked += [("POST", "/predict/batch", [{"features": row} for row in rows] + [{"features": {}}])]
    asked += [("POST", "/predict", {"features": {"nothing": 1}}), ("POST", "/predict", []), ("GET", "/predict", None)]
    asked += [("GET", path, None) for path in ("/health", "/readyz", "/model/info", "/openapi.json", "/nowhere")]
    return [(path, service.call(method, path, body)) for method, path, body in asked]


@pytest.mark.thorough
def test_bentoml_serve_answers_like_closedloop_serve(small_shop, project, tmp_path):
    built = small_shop.root / "models/bento"
    golden = json.loads((built / "src" / MODEL_DIR / "contract.json").read_text(encoding="utf-8"))["golden_rows"]
    with (
        serve_bento(tmp_path / "bentoml", str(built)) as by_hand,
        run_service(project.root, "--bento", str(built)) as ours,
    ):
        answers = [drop_changing(ask_all(service, golden)) for service in (by_hand, ours)]
        for service in (by_hand, ours):
            assert urllib.request.urlopen(f"http://127.0.0.1:{service.port}/docs").status == 200
    scores = [body["probability"] for path, (status, body) in answers[0] if path == "/predict" and status == 200]
    assert scores == pytest.approx([row["score"] for row in golden], abs=1e-6)
    for (path, (status, body)), (_, (our_status, our_body)) in zip(*answers, strict=True):
        assert (status, json.dumps(body)) == (our_status, json.dumps(our_body)), path
    bodies = {path: body for path, (_, body) in answers[0]}
    assert (bodies["/health"]["model_version"], bodies["/model/info"]["source"]) == ("1", "bundled")  # as registered
    log = by_hand.read_log()
    assert "Traceback" not in log
    assert "Completed async cleanup hook: stop" in log


@pytest.mark.thorough
def test_bentoml_builds_by_hand_what_serves_alone(small_shop, tmp_path):
    """From the repository's bentofile.yaml, by its tag and without building, as BentoML's documentation says."""
    folder = tmp_path / "project"
    (folder / "models").mkdir(parents=True)
    shutil.copy(ROOT / "bentofile.yaml", folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(small_shop.root / MODEL_DIR, folder / MODEL_DIR)
    home = {"BENTOML_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "bentoml", "build", "--version", "hand"]
    ran = subprocess.run(command, cwd=folder, env={**os.environ, **home}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    built = tmp_path / "home/bentos/closedloop/hand"
    assert digest_tree(built / "src/closedloop") == digest_tree(small_shop.root / "models/bento/src/closedloop")
    assert "onnxruntime==" in (built / "env/python/requirements.txt").read_text(encoding="utf-8")
    for number, identifier in enumerate(("closedloop:hand", str(folder))):
        with serve_bento(tmp_path / f"server{number}", identifier, **home) as server:
            assert server.call("GET", "/health")[1]["model_loaded"]
            assert server.call("POST", "/predict", {"features": {}})[0] == 400


WITHOUT_UV = """
import importlib.metadata as metadata, shutil
version, which = metadata.version, shutil.which
def hide(name):
    if name == "uv" and version(name) != "0":
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = hide
shutil.which = lambda program, *rest: which("no such program" if program == "uv" else program, *rest)
"""


@pytest.mark.thorough
def test_a_bento_is_built_where_no_installer_is_as_in_the_image(small_shop, tmp_path, monkeypatch):
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks/sitecustomize.py").write_text(WITHOUT_UV + "import sys; sys.modules['pip'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hooks"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what looks for one after all finds nothing
    source, built = small_shop.root / "models/bento", tmp_path / "built"
    info = yaml.safe_load((source / "bento.yaml").read_text(encoding="utf-8"))
    given = {name: info[name] for name in ("name", "version", "labels")}
    build_bento(source / "src", built, **given, created_at=info["creation_time"])
    assert digest_tree(built / "src") == digest_tree(source / "src")


@pytest.mark.thorough
def test_the_bento_imports_its_own_source(small_shop, tmp_path):
    """An installed package of the same name is not what serves."""
    copy = tmp_path / "bento"
    shutil.copytree(small_shop.root / "models/bento", copy)
    path = copy / "src/closedloop/serving/http/app.py"
    path.write_text(path.read_text(encoding="utf-8").replace('Ready("ready")', 'Ready("changed")'))
    with serve_bento(tmp_path / "server", str(copy)) as server:
        assert server.call("GET", "/readyz")[1] == {"status": "changed"}


@pytest.mark.thorough
def test_a_bento_that_was_changed_is_not_served(small_shop, project, tmp_path, monkeypatch):
    copy = tmp_path / "bento"
    shutil.copytree(small_shop.root / "models/bento", copy)
    path = copy / "src" / MODEL_DIR / "reference.parquet"
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setenv("CLOSEDLOOP_SERVING__STATE", str(tmp_path / "state"))
    monkeypatch.chdir(copy / "src")  # as BentoML does
    worker = Worker(bento.find_config())
    assert worker.slots.serving is None
    assert worker.slots.refused["1"].startswith("digest: ")
    assert "DataError: digest: " in project.run("serve", "--bento", str(copy), status=1).output
    both = project.run("serve", "--bento", str(copy), "--model", str(copy), status=1)
    assert "--model and --bento: give one of them" in both.output
