"""Each stage killed in the middle: every output is absent, the old one or the new one, and the next run makes it good.

The moments are fixed by what the process is about to do to the file system (an audit hook in the process kills it just
before), or by what has just appeared on disk; what is asserted holds for every other moment as well.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from closedloop.processes import start_process

pytestmark = pytest.mark.thorough

# A process that has imported everything and forks one child a command: a child starts at once, and is killed as any
# process is. Numbers of a child's file operations follow from the code alone, unlike times.
SPAWNER = """
import glob, json, os, sqlite3, sys, time
from closedloop.config.environment import set_environment
set_environment()
for name in sys.argv[1:]:
    __import__(name)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def watch(task):
    root = os.getcwd()
    trace = os.open(task["trace"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    def tell(event, arguments):
        if event == "open":
            path, mode, flags = arguments
            if not isinstance(path, (str, bytes)) or not (flags & WRITES if flags else mode and mode[0] in "wxa"):
                return
            paths = [path]
        elif event == "os.rename":
            paths = list(arguments[:2])
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            paths = [arguments[0]]
        else:
            return
        paths = [os.path.relpath(os.path.join(root, os.fsdecode(path)), root) for path in paths]
        if any(path.startswith("..") for path in paths):
            return
        os.write(trace, (json.dumps([event, *paths]) + "\\n").encode())
        if task["until"] and all(word in f"{event} {paths[-1]}" for word in task["until"]):
            os.kill(os.getpid(), 9)
    sys.addaudithook(tell)

def has_ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def is_seen(pattern, query=None, size_bytes=0):
    found = glob.glob(pattern)
    if query is None or not found:
        try:
            return any(os.stat(path).st_size >= size_bytes for path in found)
        except FileNotFoundError:  # a journal that has just gone
            return False
    database = sqlite3.connect(f"file:{found[0]}?mode=ro", uri=True)
    try:
        return database.execute(query).fetchone() is not None
    except sqlite3.Error:
        return False
    finally:
        database.close()

print("ready", flush=True)
for line in sys.stdin:
    task = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(task["folder"])
        output = os.open(task["output"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(output, 1), os.dup2(output, 2)
        watch(task)
        from closedloop.cli import main as cli
        sys.argv, code = ["closedloop", *task["arguments"]], 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 70
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    if task["seen"]:
        while not is_seen(*task["seen"]) and not has_ended(child):
            time.sleep(0.001)
        os.kill(child, 9)  # not reaped yet, so the number is still this child's
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
IMPORTED = (
    "closedloop.cli.main",
    "feast.infra.offline_stores.duckdb",
    "great_expectations",
    "ibis",
    "matplotlib.pyplot",
    "mlflow.sklearn",
    "onnxruntime",
    "skl2onnx",
    "sklearn.ensemble",
    "skops.io",
)
# Outputs that hold times or random ids; they are checked for being whole, not for their bytes.
DIFFERENT_EACH_TIME = {
    "metrics/gates.json",
    "models/pipeline",
    "models/run.json",
    "reports/data_docs",
    "reports/model_card.html",
}
FILE_BY_FILE = {"data/daily"}  # DVC keeps it between runs; each file in it is replaced on its own
FIRST_PARTIAL = ("os.mkdir", ".partial")
# Where each stage is killed: just before an operation on a path, by words of both, or once a file is there ("seen").
MOMENTS: dict[str, list[tuple[Any, ...]]] = {
    "ingest": [FIRST_PARTIAL, ("os.rename", "data/raw"), ("os.rename", "metrics/ingest.json")],
    "validate": [("os.rename", "reports/data_docs"), ("os.rename", "metrics/data_quality.json")],
    "features": [("os.rename", "data/daily/"), FIRST_PARTIAL, ("os.rename", "data/features")],
    "training-set": [
        FIRST_PARTIAL,
        ("seen", "state/feast/online.db-wal", None, 1_000_000),
        ("os.rename", "metrics/training_set"),
    ],
    "train": [("os.rename", "models/candidate"), ("os.rename", "models/run.json")],
    "evaluate": [("os.rename", "reports/test"), ("os.rename", "metrics/gates.json")],
    "register": [
        ("seen", "mlflow.db", "SELECT 1 FROM model_versions"),
        ("open", "metrics/.registration"),
        ("os.rename", "metrics/registration"),
    ],
    "package": [FIRST_PARTIAL, ("os.rename", "models/bento"), ("os.rename", "metrics/package.json")],
}


@dataclass
class Spawner:
    """Starts commands of the package and ends them."""

    process: subprocess.Popen[str]
    folder: Path
    trace: list[list[str]] = field(default_factory=list)

    def run(self, root: Path, *arguments: str, kill: tuple[Any, ...] = ()) -> int:
        """Run a command until its end or the moment ``kill``; returns its exit status, -9 if it was killed."""
        seen = [str(root / kill[1]), *kill[2:]] if kill[:1] == ("seen",) else []
        task = {"folder": str(root), "arguments": arguments, "seen": seen, "until": [] if seen else list(kill)}
        task |= {"trace": str(self.folder / "trace"), "output": str(self.folder / "output")}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        self.trace = [json.loads(line) for line in (self.folder / "trace").read_text().splitlines()]
        return status

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def spawner(tmp_path_factory):
    process = start_process(
        [sys.executable, "-W", "ignore", "-c", SPAWNER, *IMPORTED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield Spawner(process, tmp_path_factory.mktemp("spawner"))
    process.stdin.close()
    process.wait(300)
    process.stdout.close()


@pytest.fixture(scope="module")
def shop(small_shop, tmp_path_factory):
    """The small shop before its model was registered."""
    import mlflow

    copy = small_shop.copy(tmp_path_factory.mktemp("restart") / "project")
    store = f"sqlite:///{copy.root}/mlflow.db"
    # both addresses, since the registry's would else be the last that this process used: the original's
    mlflow.MlflowClient(store, store).delete_registered_model("shop_churn")
    return copy


def list_outputs(root: Path, stage: str) -> list[str]:
    graph = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))
    found = graph["stages"][stage.replace("-", "_")]
    return [
        name
        for out in found.get("outs", []) + found.get("metrics", [])
        for name in ([out] if isinstance(out, str) else out)
    ]


def read_output(root: Path, name: str) -> dict[str, str]:
    """Digests of an output's files by path; nothing if it is not there."""
    place = root / name
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def age_output(root: Path, name: str) -> None:
    """Make an output recognisably an older one."""
    place = root / name
    if place.is_dir():
        (place / "older").write_text("an older output\n", encoding="utf-8")
    else:
        place.write_bytes(place.read_bytes() + b"\n")


def assert_whole(root: Path, name: str) -> None:
    """Every file of an output can be read to its end."""
    for path in [root / name, *(root / name).rglob("*")]:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".skops":
            assert zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".html":
            assert path.read_text(encoding="utf-8").rstrip().endswith("</html>")


def assert_old_or_new(root: Path, stage: str, old: dict[str, Any], new: dict[str, Any], when: object) -> None:
    for name in list_outputs(root, stage):
        now = read_output(root, name)
        if name in FILE_BY_FILE:
            parts = {path: digest for path, digest in now.items() if path.endswith(".parquet")}
            assert parts.items() <= new[name].items(), f"{stage} killed at {when}: {name} holds a partial file"
        elif name in DIFFERENT_EACH_TIME and now != old[name]:
            assert_whole(root, name)
            assert not now or name == "reports/data_docs" or now.keys() == new[name].keys()
        else:
            assert now in ({}, old[name], new[name]), f"{stage} killed at {when}: {name} is neither old nor new"


def assert_never_in_place(root: Path, stage: str, trace: list[list[str]]) -> None:
    """No moment of an undisturbed run could have left a partial output: outputs are only ever renamed to."""
    for name in list_outputs(root, stage):
        inside = [(event, paths) for event, *paths in trace if paths[-1] == name or paths[-1].startswith(f"{name}/")]
        made = [(event, paths) for event, paths in inside if event == "os.rename"]
        allowed = {"os.rename", "os.mkdir"} | ({"os.remove"} if name in FILE_BY_FILE else set())
        assert made or name in FILE_BY_FILE, f"{stage}: {name} was not renamed to"
        for event, paths in inside:
            partial = any(part.startswith(".") for part in Path(paths[-1]).parts)
            assert event in allowed or partial, f"{stage}: {event} of {paths[-1]}, in place"


@pytest.mark.parametrize("stage", MOMENTS)
def test_a_killed_stage_leaves_whole_outputs_and_the_next_run_makes_it_good(stage, shop, small_shop, spawner):
    new = {name: read_output(small_shop.root, name) for name in list_outputs(shop.root, stage)}
    for name in new:
        if name not in FILE_BY_FILE:
            age_output(shop.root, name)
    if stage == "features":
        next((shop.root / "data/daily").iterdir()).unlink()  # so that there is something to roll up
    if stage == "training-set":
        (shop.root / "state/feast/online.db").unlink()  # the same rows would be written over without a trace
    old = {name: read_output(shop.root, name) for name in new}
    for moment in MOMENTS[stage]:
        status = spawner.run(shop.root, stage, kill=moment)
        assert status == -9, f"{stage}: {moment} did not come\n{spawner.output}"
        assert_old_or_new(shop.root, stage, old, new, moment)
    assert spawner.run(shop.root, stage) == 0, spawner.output
    assert_never_in_place(shop.root, stage, spawner.trace)
    for name, content in new.items():
        now = read_output(shop.root, name)
        if name in DIFFERENT_EACH_TIME:
            assert_whole(shop.root, name)
            assert len(now) == len(content)
        else:
            assert now == content
    left = [path for path in shop.root.rglob(".*.partial") if ".venv" not in path.parts]
    assert left == []


def test_after_all_kills_the_registry_holds_one_whole_version(shop, small_shop, tmp_path):
    """Runs of killed trainings stay behind as RUNNING: one that carries a digest had logged all of its model before."""
    import mlflow

    from closedloop.bootstrap import build_tracking, load_run
    from closedloop.contract import digest_folder

    digest = digest_folder(shop.root / "models/candidate")
    assert digest == digest_folder(small_shop.root / "models/candidate")
    tracking = build_tracking(load_run(shop.root / "params.yaml", root=shop.root))
    versions = tracking.client.search_model_versions("name = 'shop_churn'")
    assert [version.tags["closedloop.gates"] for version in versions] == ["passed"]
    assert tracking.read_alias("champion").version == versions[0].version
    assert digest_folder(tracking.fetch_version(versions[0].version, tmp_path)[0]) == digest
    assert mlflow.get_run(versions[0].run_id).info.status == "FINISHED"
    experiment = tracking.client.get_experiment_by_name("shop_churn")
    for run in tracking.client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'"):
        if (tag := run.data.tags.get("closedloop.folder_sha256")) is not None:
            files = tracking.client.download_artifacts(run.info.run_id, "contract", str(tmp_path))
            assert digest_folder(Path(files)) == tag


def test_a_tracking_store_whose_creation_was_killed_is_created_again(small_shop, spawner, tmp_path):
    """The store's tables are made in dozens of steps that no transaction holds together."""
    copy = small_shop.copy(tmp_path / "project")
    (copy.root / "mlflow.db").unlink()
    for size_bytes in (1, 200_000, 500_000):
        assert spawner.run(copy.root, "register", kill=("seen", "mlflow.db*", None, size_bytes)) == -9
    assert spawner.run(copy.root, "train") == 0, spawner.output
    assert spawner.run(copy.root, "evaluate") == 0, spawner.output
    assert spawner.run(copy.root, "register") == 0, spawner.output
    assert copy.read_json("metrics/registration.json")["version"] == 1
