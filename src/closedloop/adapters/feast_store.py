"""Feast's registry and stores: their addresses, their locks and their errors."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from closedloop.config.params import merge_values
from closedloop.config.settings import Settings
from closedloop.errors import ConfigError, ServiceUnavailable, hide_passwords
from closedloop.files import find_sqlite_file, locate_sqlite

if TYPE_CHECKING:
    from feast import FeatureStore

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
LOCK_WAIT_SECONDS, LOCK_LOOK_SECONDS = 120, 0.2
DRIVERS = ("redis", "sqlalchemy", "sqlite3")


def read_store_config(settings: Settings, project: str) -> dict[str, Any]:
    """Read ``feature_repo/feature_store.yaml``, apply the profile's overrides, and make relative paths absolute.

    An override with a ``type`` replaces a store's whole section: Feast refuses the keys of another type.
    """
    from closedloop.config.yaml import read_yaml

    repo, overrides = settings.root / "feature_repo", settings.features.overrides
    base = {
        name: value
        for name, value in read_yaml(repo / "feature_store.yaml").items()
        if "type" not in overrides.get(name, {})
    }
    config = copy.deepcopy(merge_values(base, overrides, {"project": project}))
    try:
        registry, online = config["registry"], config["online_store"]
        registry["path"] = locate_sqlite(registry["path"], repo)
        if file := find_sqlite_file(registry["path"]):
            file.parent.mkdir(parents=True, exist_ok=True)
        if online["type"] == "sqlite":
            online["path"] = str((repo / online["path"]).resolve())
            Path(online["path"]).parent.mkdir(parents=True, exist_ok=True)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{repo / 'feature_store.yaml'}: registry.path and online_store.type are required") from error
    return config


def open_store(config: dict[str, Any]) -> FeatureStore:
    """Feast's own object of this registry and these stores."""
    from feast import FeatureStore, RepoConfig

    # registry stays a mapping: the SQL registry refuses the typed object
    return wait_while_locked(lambda: FeatureStore(config=RepoConfig(**copy.deepcopy(config))))


def wait_while_locked(call: Callable[[], ResultT]) -> ResultT:
    """Call again while another process writes: data sets share an embedded store; SQLite gives up after 5 seconds."""
    until, is_told = time.monotonic() + LOCK_WAIT_SECONDS, False
    while True:
        try:
            return call()
        except Exception as error:
            driver_error = getattr(error, "orig", error)  # SQLAlchemy wraps the registry's driver errors
            locked = getattr(driver_error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
            if not locked or time.monotonic() > until:
                raise
            if not is_told:
                logger.warning("another process writes to the feature store: waiting for its end")
                is_told = True
            time.sleep(LOCK_LOOK_SECONDS)  # SQLite does not wait for every kind of lock


@contextmanager
def allow_reads_while_writing(online: dict[str, Any]) -> Iterator[None]:
    """Let readers in while Feast writes: with SQLite's default journal its one transaction blocks them for seconds."""
    if online["type"] != "sqlite":
        yield
        return
    from feast.infra.online_stores.sqlite import adapt_datetime_epoch

    # Feast stores times as numbers, by a rule of the whole process that pandas' to_sql replaces
    sqlite3.register_adapter(dt.datetime, adapt_datetime_epoch)
    with contextlib.closing(sqlite3.connect(online["path"], isolation_level=None)) as connection:
        wait_while_locked(lambda: connection.execute("PRAGMA journal_mode=WAL"))
        yield
        # empty the log: SQLite would take it for a part of any other file put in this place. Do not wait for Feast's
        # own connection if that is still open: the log goes when it closes.
        connection.execute("PRAGMA busy_timeout=0")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Feast's progress output and its Ibis store's deprecation warnings; turn driver errors into ours.

    Raises
    ------
    ServiceUnavailable
        If a driver of the registry or online store raises an error, which Feast does not wrap.
    """
    import io
    import warnings

    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        if type(error).__module__.split(".")[0] not in DRIVERS:  # compare names: redis is only installed with its extra
            raise
        raise ServiceUnavailable(f"feature store: {hide_passwords(' '.join(str(error).split()))}") from None
