"""Real PostgreSQL and Redis for tests, on free ports of the loopback interface; never as root."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from closedloop.processes import start_process

PASSWORD = "s3cret-w0rd"
UNPRIVILEGED = {"user": "postgres", "group": "postgres", "extra_groups": ()} if os.geteuid() == 0 else {}


@dataclass
class PostgresServer:
    """A cluster of its own; ``stop`` and ``start`` make an outage, after which all that was committed is there."""

    binaries: Path
    data: Path
    port: int
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["-p", str(self.port), "-k", str(self.data), "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with (self.data / "log").open("ab") as log:  # not by pg_ctl, whose server would outlive this process
            command = [str(self.binaries / "postgres"), "-D", str(self.data), *options]
            self._process = start_process(command, cwd="/", stdout=log, stderr=log, **UNPRIVILEGED)
        ready = [self.binaries / "pg_isready", "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        while subprocess.run(ready, check=False).returncode:
            assert self._process.poll() is None, (self.data / "log").read_text(encoding="utf-8")
            time.sleep(0.05)

    def stop(self, mode: str = "fast") -> None:
        """Stop it and wait; ``fast`` cuts connections off, ``immediate`` is a crash."""
        self.run("pg_ctl", "stop", "--wait", "--silent", "--mode", mode)
        if self._process is not None:
            self._process.wait(180)

    def create_database(self) -> str:
        """An empty database; returns its address, with a password that the server does not ask for."""
        name = f"test_{uuid.uuid4().hex}"
        self.run("createdb", "--host", "127.0.0.1", "--port", str(self.port), "--username", "closedloop", name)
        return f"postgresql://closedloop:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def run(self, program: str, *arguments: str) -> None:
        environment = {**os.environ, "PGDATA": str(self.data)}
        command = [str(self.binaries / program), *arguments]
        # to a file, since a server that stays would hold the other end of a pipe
        with tempfile.TemporaryFile("w+") as output:
            ran = subprocess.run(
                command, env=environment, cwd="/", stdout=output, stderr=subprocess.STDOUT, check=False, **UNPRIVILEGED
            )
            output.seek(0)
            assert ran.returncode == 0, f"{program}: {output.read()}"


@dataclass
class RedisServer:
    """A server whose content ``stop`` loses, unless it ``keeps`` it on disk, as those of the overlays do."""

    folder: Path
    port: int
    keeps: bool = False
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """Host and port, as Feast wants them."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        options += ["--appendonly", "yes" if self.keeps else "no"]
        self._process = start_process(["redis-server", *options], stdout=subprocess.PIPE, text=True)
        lines = iter(self._process.stdout or ())
        assert any("Ready to accept connections" in line for line in lines), "redis-server did not start"

    def stop(self) -> None:
        """Kill it and wait."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


@contextmanager
def run_postgres(folder: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL server for the length of the block; ``folder`` gets its log.

    Its files lie elsewhere: its user cannot reach what pytest makes for root.
    """
    binaries = find_postgres()
    require(binaries, "PostgreSQL")
    assert binaries is not None
    with tempfile.TemporaryDirectory(prefix="closedloop-postgres-") as home:
        data = Path(home) / "data"
        data.mkdir()
        if UNPRIVILEGED:
            shutil.chown(home, "postgres")
            shutil.chown(data, "postgres")
        server = PostgresServer(binaries, data, find_free_port())
        server.run("initdb", "--username", "closedloop", "--auth", "trust", "--encoding", "UTF8", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            if (data / "postmaster.pid").exists():
                server.stop("immediate")
            shutil.copy(data / "log", folder / "postgres.log")


@contextmanager
def run_redis(folder: Path, *, keeps: bool = False) -> Iterator[RedisServer]:
    """A Redis server for the length of the block."""
    require(shutil.which("redis-server"), "Redis")
    server = RedisServer(folder, find_free_port(), keeps)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def find_postgres() -> Path | None:
    """The folder of the newest PostgreSQL's programs: where Debian puts them, or else on the PATH."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    found = versions[-1] if versions else shutil.which("pg_ctl")
    return None if found is None else Path(found).resolve().parent


# below those that the kernel gives to anybody, a range for each worker of pytest, and none of them twice
_PORTS = iter(range(20_000 + 1_500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]), 32_000))


def find_free_port() -> int:
    """A port that nobody listens on, and that nobody is given until it is used."""
    for port in _PORTS:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def require(found: Any, what: str) -> None:
    """Skip where a service cannot be had; CI must have it."""
    if not found and os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    if not found:
        pytest.skip(f"{what} is not installed")
