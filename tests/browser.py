"""A real browser that reaches nobody: Chromium, by playwright."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.services import require

AXE = "axe-core@4.14.1"
OFFLINE = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def require_chromium() -> str:
    """Where it is; the test is skipped without it, except in CI."""
    found = shutil.which("chromium")
    require(found, "Chromium")
    return str(found)


@contextmanager
def open_browser(*, loopback: bool = False) -> Iterator[Browser]:
    """A browser without any name to resolve, 127.0.0.1 excepted where ``loopback`` is given."""
    rule = f"--host-resolver-rules=MAP * ~NOTFOUND{', EXCLUDE 127.0.0.1' if loopback else ''}"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=require_chromium(), args=[*OFFLINE, rule])
        yield started
        started.close()


def keep_pictures(tmp_path: Path) -> Path:
    """Where screenshots go: CI keeps them."""
    folder = Path(os.environ.get("CLOSEDLOOP_ARTIFACTS", tmp_path)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def install_axe(folder: Path) -> Path:
    """axe-core, the accessibility checker, from npm; the test is skipped where it cannot be had, except in CI."""
    npm = shutil.which("npm")
    require(npm, "npm, which fetches axe-core,")
    command = [str(npm), "install", "--silent", "--no-save", "--ignore-scripts", "--prefix", str(folder), AXE]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    found = folder / "node_modules/axe-core/axe.min.js"
    require(found.is_file(), f"{AXE}, by npm ({installed.stderr.strip()[:300]}),")
    return found
