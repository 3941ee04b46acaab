"""The lock on the newest Python that it is resolved for, by the commands of the README, in a folder with a space."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.conftest import SMALL_SHOP, SOURCE_ROOT, Project
from tests.docker_engine import AUTHORITIES
from tests.services import require

CLONE = "srv/a clone"
PACKAGES = "ca-certificates,git,make,python3,python3-venv"
PIP_CONFIG = ".config/pip/pip.conf"
COPIED = ("/etc/pip.conf", "/etc/resolv.conf", str(Path.home() / PIP_CONFIG), AUTHORITIES)
MOUNTS = 'mount --bind /dev "$0/dev" && mount -t proc proc "$0/proc" && exec chroot "$0" sh -ec "$1"'


def make_system(root: Path) -> None:
    """Debian's release after the one that the images stand on, with a fresh clone of a small shop."""
    for program in ("debootstrap", "unshare"):
        require(shutil.which(program) if os.geteuid() == 0 else None, f"{program} (for root)")
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "trixie", str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    fill_system(root)


def fill_system(root: Path) -> None:
    for path in map(Path, COPIED):
        if path.is_file():
            (root / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to("/"))
    clone = root / CLONE
    subprocess.run(["git", "clone", "--quiet", str(SOURCE_ROOT), str(clone)], check=True)
    Project(clone).change_params(SMALL_SHOP)


def run_in(root: Path, script: str) -> str:
    """What a script writes in the clone; what it mounts goes with it, and so does each process that it leaves."""
    system = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"}
    trusted = {"SSL_CERT_FILE": AUTHORITIES, "PIP_CERT": AUTHORITIES, "PIP_DEFAULT_TIMEOUT": "180"}
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", MOUNTS, str(root)]
    ran = subprocess.run(
        [*command, f"cd '/{CLONE}'; {script}"], env=system | trusted, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-5_000:] + ran.stderr[-5_000:]
    return ran.stdout + ran.stderr


@pytest.mark.thorough
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_fresh_clone_runs_on_the_newest_python(tmp_path: Path) -> None:
    make_system(tmp_path / "system")
    check_clone(tmp_path / "system")


def check_clone(root: Path) -> None:
    newest = tomllib.loads((SOURCE_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    found = run_in(root, "make install; .venv/bin/python -V")
    assert "Python 3.13." in found
    assert newest == ">=3.11,<3.14"
    shown = run_in(root, "make run")
    assert "shop_churn version 1, alias champion" in shown
    shown = run_in(root, "make demo")
    assert "2,000 requests of a day answered" in " ".join(shown.split())
    assert re.search(r"^(none|watch): version 1 as of 2024-01-02, 2,000 predictions$", shown, re.MULTILINE), shown
