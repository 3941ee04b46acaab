"""The images, built from the unchanged Dockerfile by a real engine, run as production runs them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from closedloop.config.params import merge_values
from tests.compose import run_compose
from tests.conftest import SMALL_SHOP
from tests.docker_engine import run_engine
from tests.docs.test_docs import read_commands
from tests.http_service import HttpService, Load, OpenRequests, wait_until
from tests.model_folders import ROWS, expected_score, write_model_folder

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1500)]  # the first test waits for both builds

ROOT = Path(__file__).parents[2]
USER = 10001
# What a pod's security context asks for; /tmp and the volume /state are all that can be written.
HARDENED = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--pids-limit=200")
SERVING_BYTES_MAX = 600_000_000
# None of these serves; each is what an image grows by without being noticed.
TRAINING_ONLY = ("bentoml", "duckdb", "dvc", "evidently", "feast", "great_expectations", "pandas", "scipy", "sklearn")
# What Feast's client and all that it needs take in the jobs image, without the distributions that are named.
CLIENT = """
import importlib.metadata, importlib.util, re, sys
def clean(name): return re.sub("[-_.]+", "-", name).lower()
left, seen, size = ["feast"], {clean(name) for name in sys.argv[1:]}, 0
while left:
    name = clean(left.pop())
    if name in seen: continue
    seen.add(name)
    try: found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError: continue
    left += [re.match(r"[\\w.-]+", one)[0] for one in found.requires or [] if "extra ==" not in one]
    for file in found.files or []:
        places = [file.locate()]
        if file.suffix == ".py": places.append(type(places[0])(importlib.util.cache_from_source(str(places[0]))))
        size += sum(place.stat().st_size for place in places if place.is_file())
print(size)
"""
LEFT_OVERS = """
for tool in gcc cc g++ c++ make ld uv hatchling; do command -v $tool; done
find / -xdev \\( -name '*.deb' -o -path '*/.cache/*' -o -name '*.whl' -path '*/wheels/*' \\) 2>/dev/null
find / -xdev -perm -0002 -type f -not -path '/proc/*' -not -path '/sys/*' -not -path '/dev/*' 2>/dev/null
touch /app/x 2>/dev/null && echo the root file system can be written
test "$(id -u)" = 0 && echo root
true
"""


@pytest.fixture(scope="module")
def engine():
    """Stopped at the end of this page, whose time is printed: it is to be below 8 minutes."""
    began = time.monotonic()
    with run_engine() as engine:
        yield engine
    tell("image-seconds.txt", f"the images' tests took {time.monotonic() - began:.0f} s\n")


@pytest.fixture(scope="module")
def images(engine):
    """Both targets, by name; sizes are printed."""
    sizes = {}
    for target in ("serving", "jobs"):
        engine.run(
            "build", f"--target={target}", "--build-arg=VERSION=1.2.3", "--build-arg=COMMIT=abc123",
            f"--tag=closedloop-{target}", str(ROOT),
        )  # fmt: skip
        sizes[target] = int(engine.run("inspect", "--format={{.Size}}", f"closedloop-{target}"))
    lines = [f"closedloop-{name}: {size / 1e6:.0f} MB unpacked\n" for name, size in sizes.items()]
    client = int(run_once(engine, "closedloop-jobs", "-c", CLIENT, *list_serving(), options=["--entrypoint=python"]))
    lines.append(f"closedloop-serving with Feast's client: {(sizes['serving'] + client) / 1e6:.0f} MB\n")
    tell("image-sizes.txt", "".join(lines))
    return sizes


def list_serving():
    """The distributions that the serving image has."""
    return re.findall(r"^([\w.-]+)==", (ROOT / "docker/serving.lock").read_text(encoding="utf-8"), re.MULTILINE)


def tell(name, lines):
    print(f"\n{lines}", file=sys.__stdout__)
    keep(name).write_text(lines, encoding="utf-8")


def keep(name):
    folder = Path(os.environ.get("CLOSEDLOOP_ARTIFACTS", ROOT / "artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def run_once(engine, image, *arguments, options=(), status=0):
    return engine.run("run", "--rm", "--memory=1g", *HARDENED, *options, image, *arguments, status=status)


@pytest.mark.parametrize("target", ["serving", "jobs"])
def test_an_image_holds_no_tools_no_caches_and_says_what_it_is(engine, images, target):
    found = json.loads(engine.run("inspect", f"closedloop-{target}"))[0]["Config"]
    assert found["User"] == f"{USER}:{USER}"
    assert found["Labels"]["org.opencontainers.image.version"] == "1.2.3"
    assert found["Labels"]["org.opencontainers.image.revision"] == "abc123"
    assert run_once(engine, f"closedloop-{target}", "-c", LEFT_OVERS, options=["--entrypoint=sh"]) == ""
    assert "monitor and retrain a churn model" in run_once(engine, f"closedloop-{target}", "--help")


def test_the_serving_image_holds_what_serving_imports_alone(engine, images):
    assert images["serving"] <= SERVING_BYTES_MAX
    look = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    options = ["--entrypoint=python"]
    assert run_once(engine, "closedloop-serving", "-c", look, *TRAINING_ONLY, options=options).strip() == "[]"
    assert run_once(engine, "closedloop-jobs", "-c", look, *TRAINING_ONLY, options=options).strip() == str(
        list(TRAINING_ONLY)
    )


@contextlib.contextmanager
def run_container(engine, folder):
    """The serving image over a model and a state folder; yields a service to ask, and ends it."""
    state = folder / "state"
    state.mkdir(exist_ok=True)
    os.chown(state, USER, USER)
    service = HttpService(folder)
    engine.run(
        "run", "--detach", "--name=served", "--memory=512m", *HARDENED, f"--publish=127.0.0.1:{service.port}:3000",
        "--health-interval=1s", f"--volume={folder / 'model'}:/model:ro", f"--volume={state}:/state",
        "closedloop-serving", "serve", "--model", "/model",
    )  # fmt: skip
    try:
        wait_until(lambda: read_state(engine)["Health"]["Status"] == "healthy", "health of the container")
        yield service
    finally:
        keep("serving-container.log").write_text(engine.run("logs", "served"), encoding="utf-8")
        engine.run("rm", "--force", "served")


def read_state(engine):
    return json.loads(engine.run("inspect", "--format={{json .State}}", "served"))


def read_stored(state):
    path = state / "operations.db"
    if not path.is_file():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
        try:
            return [request for (request,) in store.execute("SELECT request_id FROM predictions")]
        except sqlite3.OperationalError:  # not made yet
            return []


@pytest.fixture
def place():
    """A folder that another user can enter, as pytest's cannot be."""
    with tempfile.TemporaryDirectory(prefix="closedloop-image-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_the_container_answers_is_healthy_and_drains_without_a_failed_request_or_a_lost_row(engine, images, place):
    write_model_folder(place / "model", model_name="shop_churn")
    with run_container(engine, place) as service:
        status, answer = service.call("POST", "/predict", {"features": ROWS[0]})
        assert (status, answer["probability"]) == (200, pytest.approx(expected_score(ROWS[0]), abs=1e-6))
        with Load(service) as load:
            load.wait_for(300)
            requests = OpenRequests(service)
            engine.run("kill", "--signal=TERM", "served")  # as `stop` begins
            wait_until(lambda: "Waiting for" in engine.run("logs", "--tail=50", "served"), "the server's end")
            finished = requests.finish()
            engine.run("wait", "served")
        ended = read_state(engine)
    assert (ended["ExitCode"], ended["OOMKilled"]) == (0, False)
    # an idle connection may be closed on a client that is about to use it; what was taken is answered
    assert not [failure for failure in load.failures if failure[0].isdigit() or "IncompleteRead" in failure]
    answered = {found["request_id"] for found in load.answers} | {answer["request_id"], *finished}
    assert len(answered) > 300
    with run_container(engine, place):  # whatever the agent had not stored yet waited in the spool
        wait_until(lambda: answered <= set(read_stored(place / "state")), "all answers in the store")
    stored = read_stored(place / "state")
    assert len(stored) == len(set(stored))


def test_the_jobs_image_works_as_nobody_on_a_read_only_root(engine, images, tmp_path):
    options = ["--volume=/state", "--memory=2g"]
    assert "is up to date" in run_once(engine, "closedloop-jobs", "store", "upgrade", options=options)
    command = ["ingest", "--raw=/state/raw", "--ingest-metrics=/state/ingest.json"]
    assert "rows read" in run_once(engine, "closedloop-jobs", *command, options=options)


@pytest.fixture
def params(place):
    """The small shop's parameters, where a container's user can read them."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    (place / "params.yaml").write_text(yaml.safe_dump(merge_values(values, SMALL_SHOP)), encoding="utf-8")
    return place / "params.yaml"


@pytest.mark.long
def test_composes_own_containers_retrain_release_and_serve(engine, images, place, params):
    """compose.yaml's services of our images, as it says; a first version comes in by the runbook's lines."""
    day = SMALL_SHOP["as_of"]
    with run_compose(engine, place) as compose:
        compose.start("mlflow")
        wait_until(lambda: compose.ask("mlflow", "http://127.0.0.1:5000/health"), "start of MLflow", seconds=300)
        assert "is up to date" in compose.run("migrate", options=("--rm",))
        compose.start("serving")
        compose.start("exporter")
        small = ("--memory=4g", f"--volume={params}:/app/params.yaml:ro")
        # the small shop's last day is today: the clock of a container cannot be set
        commands = read_commands("On one machine")["a first version"].replace('"$(date -u +%F)"', day)
        told = compose.follow(commands.replace("migrate retrain\n", f"migrate retrain --as-of {day}\n"), options=small)
        assert "is registered, version 1" in told
        here = "http://127.0.0.1:3000"
        wait_until(lambda: compose.ask("serving", f"{here}/readyz"), "the released version", seconds=300)
        contract = json.loads(compose.ask("serving", f"{here}/model/info"))["contract"]
        row = {one["name"]: one.get("categories", [1.0])[0] for one in contract["features"]}
        answer = json.loads(compose.ask("serving", f"{here}/predict", json.dumps({"features": row})))
        assert (answer["model_version"], 0 <= answer["probability"] <= 1) == ("1", True)
        shown = 'closedloop_model_champion_info{model_name="shop_churn",model_version="1"} 1.0'
        wait_until(lambda: shown in compose.ask("exporter", "http://127.0.0.1:8002/metrics"), "the exporter's figures")


def run_tool(*command, **environment):
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("target", ["serving", "jobs"])
def test_an_image_has_a_bill_of_materials_and_no_secret(engine, images, target):
    address = {"DOCKER_HOST": f"unix://{engine.socket}"}
    scan = ["trivy", "image", "--quiet", "--image-src=docker"]
    sbom = keep(f"sbom-{target}.json")
    run_tool(*scan, "--scanners=license", "--format=cyclonedx", f"--output={sbom}", f"closedloop-{target}", **address)
    names = {component["name"] for component in json.loads(sbom.read_text(encoding="utf-8"))["components"]}
    assert {"closedloop", "onnxruntime", "libc6"} <= names
    if target == "serving":  # the same scan of the larger image takes minutes
        run_tool(*scan, "--scanners=secret", "--exit-code=1", "closedloop-serving", **address)


def test_what_images_are_made_of_is_clean():
    run_tool("hadolint", "Dockerfile")
    run_tool("trivy", "config", "--quiet", "--skip-check-update", "--exit-code=1", "Dockerfile")
    skipped = [f"--skip-dirs={name}" for name in (".venv", ".git", ".dvc", "artifacts", "workspaces", "state")]
    run_tool("trivy", "fs", "--quiet", "--scanners=secret", "--exit-code=1", *skipped, ".")


@pytest.mark.parametrize(
    ("command", "fault", "words"),
    [
        (("hadolint",), "FROM python\nRUN cd /tmp && apt-get install gcc\n", "DL3008"),
        (
            ("trivy", "config", "--quiet", "--skip-check-update", "--exit-code=1"),
            "FROM python:3.11\nUSER root\n",
            "root",
        ),
    ],
)
def test_the_scans_find_what_they_look_for(tmp_path, command, fault, words):
    (tmp_path / "Dockerfile").write_text(fault, encoding="utf-8")
    ran = subprocess.run([*command, str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert words in ran.stdout + ran.stderr


def test_the_secret_scan_finds_a_key(tmp_path):
    key = "AKIA" + "IOSFODNN7EXAMPLQ"
    (tmp_path / "settings.py").write_text(f'aws_access_key_id = "{key}"\n', encoding="utf-8")
    scan = ["trivy", "fs", "--quiet", "--scanners=secret", "--exit-code=1", str(tmp_path)]
    assert subprocess.run(scan, capture_output=True, check=False).returncode == 1
