"""The work folder of a batch: what an earlier run has finished, and whether this one may go on with it."""

from __future__ import annotations

import datetime as dt
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from closedloop.errors import ConfigError, ServiceUnavailable
from closedloop.files import replace_file, take_lock

LOCK_FILE = "lock"


class Job(msgspec.Struct, frozen=True):
    """The inputs that must be the same for a run to be resumed.

    ``key`` tells whether ids are sealed with the same key. ``prediction_log`` names the store, without its password,
    that has the predictions of what is finished ("" for none): they are not logged again.
    """

    input_sha256: str
    model_sha256: str
    model_version: str
    chunk_rows: int
    range_margin: float
    key: str
    id_column: str
    prediction_log: str = ""
    reasons: int = 0
    as_of: dt.date | None = None


def require_same_job(path: Path, job: Job) -> None:
    """Write down what is being done, or see that it is what an earlier run did.

    Raises
    ------
    ConfigError
        If it is not.
    """
    if not path.exists():
        with replace_file(path) as beside:
            beside.write_bytes(msgspec.json.encode(job))
        return
    before = msgspec.json.decode(path.read_bytes(), type=Job)
    differing = [name for name in job.__struct_fields__ if getattr(job, name) != getattr(before, name)]
    if differing:
        raise ConfigError(
            f"--resume: the unfinished run in {path.parent} had another {', '.join(differing)}; "
            "start again without --resume"
        )


@contextmanager
def open_work(folder: Path, *, resume: bool) -> Iterator[None]:
    """The work folder, locked; it goes when the block succeeds, or when nothing in it is worth resuming.

    Raises
    ------
    ConfigError
        If it cannot be made.
    ServiceUnavailable
        If another process holds it, or the disk fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = take_lock(folder / LOCK_FILE)
    except BlockingIOError:
        raise ServiceUnavailable(f"{folder}: another process writes this output") from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made beside the output ({error.strerror})") from error
    try:
        if not resume:
            for path in folder.iterdir():
                if path.name != LOCK_FILE:
                    path.unlink()
        try:
            yield
        except OSError as error:
            raise ServiceUnavailable(f"{folder}: {error}; what is finished stays there for --resume") from error
    except BaseException:
        if not any(path.suffix in (".part", ".parquet") for path in folder.iterdir()):
            shutil.rmtree(folder)
        raise
    else:
        shutil.rmtree(folder)
    finally:
        os.close(lock)
