"""A Docker engine of the tests' own, on a private socket and data folder, with a base image that needs no registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from closedloop.processes import start_process
from tests.http_service import wait_until
from tests.services import require

BASE = "python:3.11-slim"
# What the public image of that name has beside Debian's Python: its links, and no mark of an outside manager.
BASE_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
BASE_ENVIRONMENT = (
    f"ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin PIP_CERT={AUTHORITIES} "
    f"SSL_CERT_FILE={AUTHORITIES}"
)


@dataclass(frozen=True)
class Engine:
    """The client's address of a running engine."""

    socket: Path

    def run(self, *arguments: str, status: int | None = 0) -> str:
        """Run ``docker``; returns all that it writes. Any exit status is taken where ``status`` is None."""
        client = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
        environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
        ran = subprocess.run(
            [client, "--host", f"unix://{self.socket}", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert status in (None, ran.returncode), f"docker {' '.join(arguments)}:\n{ran.stdout[-5000:]}"
        return ran.stdout

    def is_up(self) -> bool:
        """Whether it answers."""
        return "Server Version" in self.run("info", status=None)


@contextmanager
def run_engine() -> Iterator[Engine]:
    """An engine with the base image, for the length of the block; CLOSEDLOOP_TEST_DOCKER names a socket of your own."""
    named = os.environ.get("CLOSEDLOOP_TEST_DOCKER")
    if named:
        yield Engine(Path(named))
        return
    for program in ("dockerd", "debootstrap", "runc", "iptables"):
        require(shutil.which(program) if os.geteuid() == 0 else None, f"{program} (for root)")
    with tempfile.TemporaryDirectory(prefix="closedloop-docker-", ignore_cleanup_errors=True) as home:
        folder = Path(home)
        engine = Engine(folder / "docker.sock")
        command = ["dockerd", f"--data-root={folder}/data", f"--exec-root={folder}/exec", f"--pidfile={folder}/pid"]
        with (folder / "log").open("wb") as log:
            process = start_process([*command, f"--host=unix://{engine.socket}"], stdout=log, stderr=log)
        try:
            wait_until(lambda: process.poll() is not None or engine.is_up(), "start of the Docker engine")
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            import_base(engine, folder)
            yield engine
        finally:
            process.terminate()
            process.wait(180)


def import_base(engine: Engine, folder: Path) -> None:
    """Debian's Python under the name of the public image, so that the Dockerfile is built as it is."""
    root = folder / "root"
    command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name, target in (("python", "python3"), ("python3", "python3"), ("pip", "pip3")):
        (root / "usr/local/bin" / name).symlink_to(f"/usr/bin/{target}")
    for path in (*root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"), *root.glob("var/cache/apt/archives/*.deb")):
        path.unlink()
    shutil.copy(AUTHORITIES, root / AUTHORITIES.lstrip("/"))
    archive = folder / "root.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    engine.run("import", "--change", BASE_ENVIRONMENT, str(archive), BASE)
    shutil.rmtree(root)
    archive.unlink()
