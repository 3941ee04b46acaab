"""A project folder to run real stages in, and one that has been run already."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
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

from closedloop.environment import set_environment

set_environment()  # before anything numerical is imported
settings.register_profile("closedloop", deadline=None)  # how long an example takes says more of the machine
settings.load_profile("closedloop")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # dvc, mlflow, feast

from closedloop.params import merge_values

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


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    output: str


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
        from closedloop import cli

        output, before, code = io.StringIO(), Path.cwd(), 0
        os.chdir(self.root)
        try:
            with (
                mock.patch("sys.argv", ["closedloop", *arguments]),
                keep_logging(),
                contextlib.redirect_stdout(output),
                contextlib.redirect_stderr(output),
            ):
                try:
                    cli.main()
                except SystemExit as ended:
                    code = int(ended.code or 0)
        finally:
            os.chdir(before)
        assert code == status, f"closedloop {' '.join(arguments)} exited with {code}:\n{output.getvalue()}"
        return Outcome(code, output.getvalue())

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


@pytest.fixture(scope="session")
def small_shop(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A small shop that went through all stages once; read only: copy it to change it."""
    made = create_project(tmp_path_factory.mktemp("small") / "project")
    made.change_params(SMALL_SHOP)
    made.run_stages()
    return made


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
    """The small shop in a Git repository without a commit yet, run by `dvc repro`; read only.

    Unlike ``small_shop``: one process a stage, another hash seed, and one thread.
    """
    made = create_project(tmp_path_factory.mktemp("dvc") / "project")
    made.change_params(SMALL_SHOP)
    made.add_sources("src", ".dvc")
    shutil.copy(SOURCE_ROOT / ".gitignore", made.root / ".gitignore")
    subprocess.run(["git", "init", "--quiet"], cwd=made.root, check=True)
    different = {"PYTHONHASHSEED": "1", "CLOSEDLOOP_ENGINE__THREADS": "1"}
    ran = subprocess.run(
        ["dvc", "repro"], cwd=made.root, env=os.environ | different, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return made
