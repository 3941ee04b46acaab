"""A real Spark cluster on the loopback interface: a standalone master, and workers that can be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from subprocess import STDOUT, Popen
from typing import Any

from closedloop.config.settings import SparkSettings
from closedloop.processes import end_process, start_process
from tests.services import find_free_port, require

HERE = {"SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
SMALL = {"spark.sql.shuffle.partitions": "4", "spark.driver.host": "127.0.0.1", "spark.executor.cores": "1"}
LOCAL = SparkSettings(master="local[2]", properties=SMALL)


def require_spark() -> None:
    """Skip where PySpark or Java is missing; CI must have both."""
    require(find_spec("pyspark"), "PySpark (make install-spark)")
    require(shutil.which("java"), "Java")
    os.environ.update(HERE)


@dataclass
class Cluster:
    """A master and its workers, each of a core and a gigabyte."""

    folder: Path
    port: int = field(default_factory=find_free_port)
    page: int = field(default_factory=find_free_port)
    processes: dict[str, Popen[bytes]] = field(default_factory=dict)

    @property
    def settings(self) -> SparkSettings:
        """An application whose executors take all of it."""
        return SparkSettings(
            master=f"spark://127.0.0.1:{self.port}", properties=SMALL | {"spark.executor.memory": "512m"}
        )

    def start(self, workers: int) -> None:
        """Start all, and wait until the master has the workers."""
        master = ["--host", "127.0.0.1", "--port", str(self.port), "--webui-port", str(self.page)]
        self._start("master", "org.apache.spark.deploy.master.Master", *master)
        self._wait_for_workers(0)
        for number in range(1, workers + 1):
            place = ["--host", "127.0.0.1", "--port", str(find_free_port()), "--webui-port", str(find_free_port())]
            size = ["--cores", "1", "--memory", "1g", "--work-dir", str(self.folder / f"worker{number}")]
            of = f"spark://127.0.0.1:{self.port}"
            self._start(f"worker{number}", "org.apache.spark.deploy.worker.Worker", *place, *size, of)
        self._wait_for_workers(workers)

    def kill(self, name: str) -> int:
        """``kill -9`` of a worker and of what it runs; returns how many executors that were."""
        process = self.processes.pop(name)
        children = list_children(process.pid)
        for pid in (process.pid, *children):
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return len(children)

    def stop(self) -> None:
        """End all that still run."""
        for process in reversed(self.processes.values()):
            end_process(process)

    def _start(self, name: str, *command: str) -> None:
        pyspark = find_spec("pyspark")
        assert pyspark is not None
        program = Path(str(pyspark.origin)).parent / "bin/spark-class"
        with (self.folder / f"{name}.log").open("wb") as log:
            environment = {**os.environ, **HERE, "SPARK_DAEMON_MEMORY": "256m"}
            self.processes[name] = start_process([str(program), *command], env=environment, stdout=log, stderr=STDOUT)

    def _wait_for_workers(self, count: int) -> None:
        while self._count_workers() != count:
            for name, process in self.processes.items():
                assert process.poll() is None, (self.folder / f"{name}.log").read_text(encoding="utf-8")
            time.sleep(0.2)

    def _count_workers(self) -> int | None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.page}/json/", timeout=60) as page:
                state: Any = json.load(page)
        except OSError:
            return None
        return sum(worker["state"] == "ALIVE" for worker in state["workers"])


def list_children(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    path = Path(f"/proc/{pid}/task")
    children = [int(one) for task in path.iterdir() for one in (task / "children").read_text().split()]
    return [found for child in children for found in (child, *list_children(child))]


@contextmanager
def run_cluster(folder: Path, *, workers: int = 2) -> Iterator[Cluster]:
    """A cluster for the length of the block; ``folder`` gets its logs."""
    require_spark()
    cluster = Cluster(folder)
    try:
        cluster.start(workers)
        yield cluster
    finally:
        cluster.stop()
