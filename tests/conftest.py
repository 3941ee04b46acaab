"""A project folder to run real stages in, and one that has been run already."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import settings

from closedloop.config.environment import keep_environment, set_environment
from closedloop.processes import STARTER_VARIABLE, end_with_starter

for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C does: fixtures end what they have started
end_with_starter()
os.environ[STARTER_VARIABLE] = str(os.getpid())  # commands of ours end with the tests, even where these are killed
set_environment()  # before anything numerical is imported
settings.register_profile("closedloop", deadline=None)  # how long an example takes says more of the machine
settings.load_profile("closedloop")
for name in ("CLOSEDLOOP_PROGRAM", "MAKELEVEL"):
    os.environ.pop(name, None)  # the tests are the same whether make started them or a person did
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # dvc, mlflow, feast

from closedloop.config.params import merge_values
from closedloop.files import hold_lock

SOURCE_ROOT = Path(__file__).parent.parent
STAGES = ("ingest", "validate", "features", "training-set", "train", "evaluate", "register", "package")
# Smaller and shorter than the default, large enough for every gate to pass.
SMALL_SHOP: dict[str, Any] = {
    "as_of": "2024-01-01",
    "simulator": {"customers": 14_000},
    "split": {"train_snapshots_max": 4},
    "tuning": {"trials": 0},
    "features": {"window_days": [7, 30], "aggregations": ["count", "days", "sum"]},
    "evaluation": {"bootstrap_samples": 200},
}


# What a test may wait for on top of its own limit, as the first to need them: they run every stage.
FIXTURE_SECONDS = {"small_shop": 1800, "dvc_shop": 2700}


@pytest.fixture(scope="module", autouse=True)
def _freeze_older_objects() -> None:
    """Let no garbage collection look at what former modules left: statsmodels collects in every call, a second each."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give tests the time that their fixtures take, since pytest-timeout counts both together."""
    for item in items:
        more = sum(FIXTURE_SECONDS.get(name, 0) for name in getattr(item, "fixturenames", ()))
        if more:
            mark = item.get_closest_marker("timeout")
            own = float(mark.args[0] if mark else config.getini("timeout"))
            item.add_marker(pytest.mark.timeout(own + more), append=False)


@dataclass(frozen=True)
class Outcome:
    """What a command did: ``output`` is all that it said, ``stdout`` what a program would read."""

    status: int
    output: str
    stdout: str


class _Heard(io.StringIO):
    """Keeps what is written, and writes it to another stream too."""

    def __init__(self, other: io.StringIO) -> None:
        super().__init__()
        self._other = other

    def write(self, text: str) -> int:
        self._other.write(text)
        return super().write(text)


@contextlib.contextmanager
def keep_logging() -> Iterator[None]:
    """Put the loggers back as they were: what a command sets up for people is not the next test's."""
    loggers = [logging.getLogger(), logging.getLogger("closedloop")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


@dataclass(frozen=True)
class Project:
    """A folder laid out like the repository, with results of its own."""

    root: Path

    def run(self, *arguments: str, status: int = 0) -> Outcome:
        """Run ``closedloop`` here, in this process; the exit status must be ``status``."""
        from closedloop.cli import main as cli

        output, before, code = io.StringIO(), Path.cwd(), 0
        stdout = _Heard(output)
        os.chdir(self.root)
        try:
            with (
                mock.patch("sys.argv", ["closedloop", *arguments]),
                keep_environment(),  # MLflow names this project's store there, for processes that are started
                keep_logging(),
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(output),
            ):
                try:
                    cli.main()
                except SystemExit as ended:
                    code = int(ended.code or 0)
        finally:
            os.chdir(before)
        assert code == status, f"closedloop {' '.join(arguments)} exited with {code}:\n{output.getvalue()}"
        return Outcome(code, output.getvalue(), stdout.getvalue())

    def run_stages(self, *names: str) -> None:
        """Run these stages, all of them by default."""
        for name in names or STAGES:
            self.run(name)

    def read_json(self, path: str) -> Any:
        """A report, parsed."""
        return json.loads((self.root / path).read_text(encoding="utf-8"))

    def change_params(self, values: dict[str, Any]) -> None:
        """Merge values into params.yaml."""
        path = self.root / "params.yaml"
        merged = merge_values(yaml.safe_load(path.read_text(encoding="utf-8")), values)
        path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")

    def change_dataset(self, name: str, values: dict[str, Any]) -> None:
        """Merge values into a data set's config."""
        path = self.root / "configs/datasets" / f"{name}.yaml"
        merged = merge_values(yaml.safe_load(path.read_text(encoding="utf-8")), values)
        path.write_text(yaml.safe_dump(merged, sort_keys=False), encoding="utf-8")

    def add_sources(self, *names: str) -> None:
        """Folders of the repository, without what running leaves in them."""
        ignored = shutil.ignore_patterns("__pycache__", "cache", "tmp", "*.local", "plots_template.html")
        for name in names:
            shutil.copytree(SOURCE_ROOT / name, self.root / name, ignore=ignored)

    def copy(self, root: Path) -> Project:
        """The same with all results, to break something in; absolute paths in stores are moved along."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        move_artifacts(root / "mlflow.db", str(self.root.resolve()), str(root.resolve()))
        return Project(root)


def move_artifacts(database: Path, old: str, new: str) -> None:
    """Let a copied tracking store point at the copied artifacts: else a copy would write into its original."""
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                if kind.startswith(("VARCHAR", "TEXT")):
                    moved = f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?)"
                    connection.execute(moved, (old, new, old))


def create_project(root: Path) -> Project:
    """A project folder without results: configs, params, graph and feature repository, the package being installed."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("configs", "feature_repo"):
        shutil.copytree(SOURCE_ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(SOURCE_ROOT / name, root / name)
    return Project(root)


@pytest.fixture(scope="session")
def make_project() -> Callable[[Path], Project]:
    """`create_project`, for fixtures of any scope."""
    return create_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project folder without results, with the default parameters."""
    return create_project(tmp_path / "project")


def share_folder(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """A folder that one process of this test run fills and the others, which wait for it, find filled.

    Under pytest-xdist each worker has a temporary folder of its own inside the run's. A worker that fails to fill it
    leaves it to the next one, which starts anew.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with hold_lock(base / f"{name}.lock"):
        if not (base / f"{name}.done").exists():
            shutil.rmtree(base / name, ignore_errors=True)
            fill(base / name)
            (base / f"{name}.done").touch()
    return base / name


@pytest.fixture(scope="session")
def small_shop(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A small shop that went through all stages, once a test run; read only: copy it to change it."""

    def fill(root: Path) -> None:
        made = create_project(root)
        made.change_params(SMALL_SHOP)
        made.run_stages()

    return Project(share_folder(tmp_path_factory, "small_shop", fill))


@pytest.fixture
def shop_copy(small_shop: Project, tmp_path: Path) -> Project:
    """A copy of the small shop with its results, to change."""
    return small_shop.copy(tmp_path / "project")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is not named."""
    named = os.environ.get("CLOSEDLOOP_REAL_DATA")
    if not named:
        pytest.skip("CLOSEDLOOP_REAL_DATA does not name a folder with real data")
    return Path(named).resolve()


@pytest.fixture(scope="session")
def dvc_shop(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The small shop in a Git repository without a commit yet, run by `dvc repro` once a test run; read only.

    Unlike ``small_shop``: one process a stage, another hash seed, and one thread.
    """

    def fill(root: Path) -> None:
        made = create_project(root)
        made.change_params(SMALL_SHOP)
        made.add_sources("src", ".dvc")
        shutil.copy(SOURCE_ROOT / ".gitignore", made.root / ".gitignore")
        subprocess.run(["git", "init", "--quiet"], cwd=made.root, check=True)
        different = {"PYTHONHASHSEED": "1", "CLOSEDLOOP_ENGINE__THREADS": "1"}
        ran = subprocess.run(
            ["dvc", "repro"], cwd=made.root, env=os.environ | different, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr

    return Project(share_folder(tmp_path_factory, "dvc_shop", fill))
