"""DVC: run the training graph, and say what ran."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from closedloop.errors import ClosedloopError, ConfigError, GateFailed, ServiceUnavailable, hide_passwords


class StageFailed(ClosedloopError):
    """A stage ended with an error, which it has already printed."""


def reproduce(folder: Path, *, force_from: str | None = None) -> list[str]:
    """Run the stages of ``folder``'s dvc.yaml whose inputs changed; returns their names in order.

    Parameters
    ----------
    force_from
        A stage to run, with all that follow it, although nothing changed.

    Raises
    ------
    GateFailed
        If a stage ended with exit status 2.
    StageFailed
        If it ended with another one.
    ServiceUnavailable
        If another run holds the repository's lock.
    """
    from dvc.exceptions import DvcException, ReproductionError
    from dvc.lock import LockError
    from dvc.repo import Repo

    logging.getLogger("dvc").propagate = False  # it prints for itself
    logging.getLogger("dvc.repo.scm_context").setLevel(logging.ERROR)
    logging.getLogger("dvc.dvcfile").setLevel(logging.WARNING)
    try:
        with Repo(str(folder)) as repo:
            if force_from is None:
                ran = repo.reproduce()
            else:
                ran = repo.reproduce(force_from, downstream=True, force=True)
    except ReproductionError as error:
        status = re.search(r"exited with (\d+)", str(error.__cause__))
        message = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise (GateFailed if status and status[1] == "2" else StageFailed)(message) from error
    except LockError as error:
        raise ServiceUnavailable(f"{folder}: another run is going on here: {' '.join(str(error).split())}") from error
    except DvcException as error:
        raise StageFailed(f"{folder}: {error}") from error
    return [stage.addressing for stage in ran]


def set_plot_template(folder: Path, template: Path) -> None:
    """Let `dvc plots` in ``folder`` fill this template; the setting is local to this checkout, as the file is.

    Set in the tracked config, `dvc plots` would fail wherever the file has not been made yet.
    """
    from dvc.config import Config

    dvc_dir = folder.resolve() / ".dvc"
    with Config(dvc_dir=str(dvc_dir)).edit("local") as values:
        values.setdefault("plots", {})["html_template"] = str(template.resolve().relative_to(dvc_dir))


def find_remote(remote: str) -> str:
    """The remote, once it was listed; by the account of the environment, as DVC does.

    Raises
    ------
    ServiceUnavailable
        If it cannot be listed; a folder is made by the first push, a bucket is not.
    ConfigError
        If the address is of a kind that is not installed.
    """
    from fsspec.core import url_to_fs

    name = hide_passwords(remote)
    try:
        files, path = url_to_fs(remote, skip_instance_cache=True)
        files.ls(path)
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # S3's own answer: the bucket is missing, and not what would lie in it
            raise ServiceUnavailable(f"{name}: {error}") from None
        return f"{name}, where nothing was pushed yet"
    except (ImportError, ValueError) as error:
        raise ConfigError(f"data.remote {name}: {error}") from None
    except Exception as error:  # each kind of remote has errors of its own
        raise ServiceUnavailable(hide_passwords(f"{remote}: {error}")) from None
    return name
