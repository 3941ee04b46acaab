"""Git: which commit is running."""

from __future__ import annotations

import os
import subprocess

COMMIT_VARIABLE = "CLOSEDLOOP_GIT_COMMIT"  # for images, which carry no repository


def read_commit() -> tuple[str, bool]:
    """The commit and whether tracked files differ from it; ("unknown", True) where there is no repository."""
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given, False
    try:
        commit = _run("rev-parse", "HEAD")
        # a lock that DVC is just rewriting is no change of the code
        changed = _run("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)dvc.lock")
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit, bool(changed)


def _run(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
