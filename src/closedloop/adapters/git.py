"""Git: which commit is running."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

DETERMINES = ("configs", "dvc.yaml", "feature_repo", "params.yaml", "pipelines", "src")
COMMIT_VARIABLE = "CLOSEDLOOP_GIT_COMMIT"  # for images, which carry no repository


def read_commit() -> tuple[str, bool]:
    """The commit, and whether files that a run reads differ from it; ("unknown", True) without a repository.

    Changed tracked files count, and so do untracked files below ``DETERMINES``, such as a new data set's config: the
    commit alone does not identify either. Ignored files do not count.
    """
    given = os.environ.get(COMMIT_VARIABLE)
    if given:
        return given, False
    try:
        commit = _run("rev-parse", "HEAD")
        # leave out the lock file, which DVC rewrites during a run: it is no change of the code
        changed = _run("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)dvc.lock")
        places = [str(Path(name).resolve()) for name in DETERMINES if Path(name).exists()]
        new = _run("ls-files", "--others", "--exclude-standard", "--", *places) if places else ""
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    return commit, bool(changed or new)


def _run(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()
