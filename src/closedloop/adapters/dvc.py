"""DVC: run the training graph, and list the stages that ran."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from closedloop.errors import ConfigError, GateFailed, ServiceUnavailable, StageFailed, hide_passwords
from closedloop.processes import name_starter


def import_dvc() -> None:
    """Import DVC, which takes seconds."""
    import dvc.repo.reproduce  # noqa: F401


def reproduce(folder: Path, *, force_from: str | None = None, until: str | None = None) -> list[str]:
    """Run the stages of ``folder``'s dvc.yaml whose inputs changed; returns their names in order.

    Parameters
    ----------
    force_from
        A stage to run, with all later stages, even if its inputs did not change.

    until
        The last stage to run; None: all of them.

    Raises
    ------
    GateFailed
        If a stage ended with exit status 2.
    StageFailed
        If a stage ended with another non-zero status.
    ConfigError
        If the folder lies in no Git repository, which DVC needs.
    ServiceUnavailable
        If another run holds the repository's lock.
    """
    from dvc.exceptions import DvcException, ReproductionError
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    logging.getLogger("dvc").propagate = False  # it prints for itself
    logging.getLogger("dvc.repo.scm_context").setLevel(logging.ERROR)
    logging.getLogger("dvc.dvcfile").setLevel(logging.WARNING)
    try:
        with Repo(str(folder)) as repo, name_starter():
            if force_from is None:
                ran = repo.reproduce(until)
            else:
                ran = repo.reproduce(force_from, downstream=True, force=True)
    except ReproductionError as error:
        status = re.search(r"exited with (\d+)", str(error.__cause__))
        message = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise (GateFailed if status and status[1] == "2" else StageFailed)(message) from error
    except LockError as error:
        raise ServiceUnavailable(f"{folder}: another run is going on here: {' '.join(str(error).split())}") from error
    except SCMError as error:
        remedy = "run 'git init', or, to do without Git, 'dvc config --local core.no_scm true'"
        raise ConfigError(f"{folder.resolve()}: DVC cannot use Git here ({error}); {remedy}") from error
    except DvcException as error:
        raise StageFailed(f"{folder}: {error}") from error
    return [stage.addressing for stage in ran]


def set_plot_template(folder: Path, template: Path) -> None:
    """Let `dvc plots` in ``folder`` fill this template; the setting is local to this checkout, like the file.

    If the tracked config had the setting, `dvc plots` would fail in every checkout that has not made the file yet.
    """
    from dvc.config import Config

    dvc_dir = folder.resolve() / ".dvc"
    with Config(dvc_dir=str(dvc_dir)).edit("local") as values:
        values.setdefault("plots", {})["html_template"] = str(template.resolve().relative_to(dvc_dir))


def find_remote(remote: str) -> str:
    """Describe the remote after listing it, with the credentials that DVC takes from the environment.

    Raises
    ------
    ServiceUnavailable
        If it cannot be listed. The first push makes a missing folder, but not a missing bucket.
    ConfigError
        If the DVC extra for this kind of address is not installed.
    """
    from fsspec.core import url_to_fs

    name = hide_passwords(remote)
    try:
        files, path = url_to_fs(remote, skip_instance_cache=True)
        files.ls(path)
    except FileNotFoundError as error:
        if error.__cause__ is not None:  # the bucket does not exist (a missing object has no cause here)
            raise ServiceUnavailable(f"{name}: {error}") from None
        return f"{name}, where nothing was pushed yet"
    except (ImportError, ValueError) as error:
        raise ConfigError(f"data.remote {name}: {error}") from None
    except Exception as error:  # each kind of remote raises its own error classes
        raise ServiceUnavailable(hide_passwords(f"{remote}: {error}")) from None
    return name
