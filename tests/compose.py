"""compose.yaml without Compose: our own services of it as containers, other people's as processes of this machine."""

from __future__ import annotations

import re
import shlex
import socketserver
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_connection, socket
from typing import Any

import yaml

from tests.docker_engine import Engine
from tests.services import run_postgres, run_redis

ROOT = Path(__file__).parents[1]
NETWORK = "closedloop-compose"
SUBSTITUTES = {"POSTGRES_PASSWORD": "s3cret", "CLOSEDLOOP_SERVING__TOKENS": '{"a-token": ["predict", "admin"]}'}


class _Forward(socketserver.BaseRequestHandler):
    """One connection, passed on to the server's ``target`` port of the loopback interface."""

    def handle(self) -> None:
        with create_connection(("127.0.0.1", self.server.target)) as inner:  # type: ignore[attr-defined]
            back = threading.Thread(target=_copy, args=(inner, self.request), daemon=True)
            back.start()
            _copy(self.request, inner)
            back.join()


def _copy(source: socket, target: socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(1)
    except OSError:
        pass


@contextmanager
def _forward(host: str, port: int, target: int) -> Iterator[None]:
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server((host, port), _Forward) as server:
        server.target = target  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def read_services() -> dict[str, Any]:
    """The services as they stand there."""
    services: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]
    return services


def fill(value: str) -> str:
    """A variable's value, as Compose fills it in."""
    return re.sub(r"\$\{(\w+):\?[^}]*\}", lambda name: SUBSTITUTES[name[1]], value)


ASK = """
import sys, urllib.request
_, address, body = sys.argv
headers = {"Authorization": "Bearer a-token", "Content-Type": "application/json"}
request = urllib.request.Request(address, body.encode() or None, headers)
print(urllib.request.urlopen(request, timeout=20).read().decode())
"""


@dataclass(frozen=True)
class Compose:
    """Our images on one network with ``postgres`` and ``redis``."""

    engine: Engine
    gateway: str

    def run(self, name: str, *command: str, options: tuple[str, ...] = (), status: int | None = 0) -> str:
        """A container of a service of compose.yaml, with another command if one is given; what it wrote."""
        service = read_services()[name]
        given = [f"--env={key}={fill(value)}" for key, value in service["environment"].items()]
        given += [f"--volume={NETWORK}-{volume}" for volume in service["volumes"]]  # the engine's data goes with it
        given += [f"--tmpfs={place}" for place in service["tmpfs"]]
        given += [f"--cap-drop={one}" for one in service["cap_drop"]]
        given += [f"--security-opt={one}" for one in service["security_opt"]]
        given += [f"--add-host={host}:{self.gateway}" for host in ("postgres", "redis")]
        if service["read_only"]:
            given.append("--read-only")
        if "mem_limit" in service:
            given.append(f"--memory={service['mem_limit']}")
        program, *words = service.get("entrypoint", [""])
        if program:
            given.append(f"--entrypoint={program}")
        return self.engine.run(
            "run", f"--network={NETWORK}", f"--pids-limit={service['pids_limit']}", *given, *options, service["image"],
            *(command or (*words, *service.get("command", []))), status=status,
        )  # fmt: skip

    def follow(self, commands: str, options: tuple[str, ...] = ()) -> str:
        """Lines of a page, each `docker compose run --rm SERVICE COMMAND...`; what they wrote."""
        told = []
        for line in commands.splitlines():
            name, *command = shlex.split(line.removeprefix("docker compose run --rm "))
            told.append(self.run(name, *command, options=("--rm", *options)))
        return "".join(told)

    def start(self, name: str) -> None:
        """A service that stays, under its own name."""
        self.run(name, options=("--detach", f"--name={name}", f"--network-alias={name}"))

    def ask(self, name: str, address: str, body: str = "") -> str:
        """What an address answers inside a service's container; empty if nothing does."""
        answer = self.engine.run("exec", name, "python", "-c", ASK, address, body, status=None)
        return "" if "Traceback" in answer else answer


@contextmanager
def run_compose(engine: Engine, folder: Path) -> Iterator[Compose]:
    """The network with what other people's images stand for; the containers on it are removed at the end."""
    engine.run("network", "create", NETWORK)
    place = "{{(index .IPAM.Config 0).Gateway}}"
    gateway = engine.run("network", "inspect", f"--format={place}", NETWORK).strip()
    try:
        with ExitStack() as stack:
            postgres, redis = stack.enter_context(run_postgres(folder)), stack.enter_context(run_redis(folder))
            databases = re.findall(
                r"CREATE DATABASE (\w+)", (ROOT / "docker/databases.sql").read_text(encoding="utf-8")
            )
            for name in ("closedloop", *databases):
                postgres.run("createdb", "--host=127.0.0.1", f"--port={postgres.port}", "--username=closedloop", name)
            stack.enter_context(_forward(gateway, 5432, postgres.port))
            stack.enter_context(_forward(gateway, 6379, redis.port))
            yield Compose(engine, gateway)
    finally:
        for name in ("serving", "exporter", "mlflow"):
            engine.run("rm", "--force", "--volumes", name, status=None)
        engine.run("network", "rm", NETWORK, status=None)
