"""`closedloop init`: a project's files in a folder of its own, outside the clone."""

from __future__ import annotations

import re
from pathlib import Path

from closedloop.errors import ConfigError
from closedloop.files import replace_file

PACKAGE = Path(__file__).parents[1]
FILES = (
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
    "configs/datasets/*.yaml",
    "configs/local.yaml",
    "configs/production.yaml",
    "dvc.yaml",
    "feature_repo/*.py",
    "feature_repo/*.yaml",
    "params.yaml",
    "pipelines/*.py",
)


def init_project(folder: Path) -> list[Path]:
    """Lay a project out in ``folder``; returns its files.

    In a clone the graph's stages depend on the package's sources; here these are installed, and no part of the project.

    Raises
    ------
    ConfigError
        If one of the files is there already: nothing is written then.
    """
    bundled = PACKAGE / "project"  # in a wheel; an editable installation reads the clone
    root = bundled if bundled.is_dir() else PACKAGE.parents[1]
    found = sorted({file for pattern in FILES for file in root.glob(pattern)})
    taken = [str(file.relative_to(root)) for file in found if (folder / file.relative_to(root)).exists()]
    if taken:
        raise ConfigError(f"{folder}: {', '.join(taken)} is there already; give a new folder")
    for file in found:
        text = file.read_text(encoding="utf-8")
        if file.name == "dvc.yaml":
            text = re.sub(r"^ +- src/.*\n", "", text, flags=re.MULTILINE)
        with replace_file(folder / file.relative_to(root)) as beside:
            beside.write_text(text, encoding="utf-8")
    return [folder / file.relative_to(root) for file in found]
