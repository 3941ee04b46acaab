"""Feast: one definition for training rows (offline) and serving rows (online)."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import datetime as dt
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop.contract import JOIN_KEY
from closedloop.errors import ConfigError, DataError, ServiceUnavailable, hide_passwords
from closedloop.featureset import FeatureSet
from closedloop.params import merge_values
from closedloop.settings import Settings

if TYPE_CHECKING:
    import pandas as pd
    from feast import FeatureStore

ENTITY = "customer"
TIMESTAMP = "event_timestamp"
ROW = "__row"
CHUNK_ROWS = 1_000
DRIVERS = ("redis", "sqlalchemy", "sqlite3")


@dataclass(frozen=True)
class OnlineRows:
    """Rows from the online store, in the order asked for.

    ``state`` is "fresh", "stale" (older than allowed: the store itself never expires a row) or "unknown".
    """

    features: pd.DataFrame
    snapshot_at: pd.Series
    state: pd.Series


class Features:
    """One data set's project in the feature store.

    Parameters
    ----------
    settings
        Where registry and stores live.
    project
        The data set's ``model_name``: projects share a store, but nothing in it.
    features
        The definition.
    max_age_days
        A row older than this is stale.
    """

    def __init__(self, settings: Settings, *, project: str, features: FeatureSet, max_age_days: int) -> None:
        self.features = features
        self._settings = settings
        self.project = project
        self.max_age_days = max_age_days
        self.offline_dir = settings.locate(settings.features.offline) / project / features.service
        self._config = read_store_config(settings, project)

    def with_definition(self, features: FeatureSet) -> Features:
        """The same project under another definition of its features."""
        return Features(self._settings, project=self.project, features=features, max_age_days=self.max_age_days)

    def build_objects(self, source: str) -> list[Any]:
        """Entity, source, view and service of this definition; ``source`` is a path or glob of Parquet files."""
        from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
        from feast.types import Float64, String

        name = self.features.service
        entity = Entity(name=ENTITY, join_keys=[JOIN_KEY], value_type=ValueType.STRING)
        rows = FileSource(name=f"{name}_rows", path=source, timestamp_field=TIMESTAMP)
        schema = [Field(name=JOIN_KEY, dtype=String)]
        schema += [Field(name=column, dtype=Float64) for column in self.features.numeric]
        schema += [Field(name=column, dtype=String) for column in self.features.categorical]
        ttl = dt.timedelta(days=self.max_age_days)
        view = FeatureView(name=name, entities=[entity], schema=schema, source=rows, ttl=ttl, online=True)
        return [entity, rows, view, FeatureService(name=name, features=[view])]

    def read_historical(self, entity_rows: pd.DataFrame, features_dir: Path) -> pd.DataFrame:
        """Point-in-time join of ``entity_rows`` (customer_id, event_timestamp, ...) with the rows in ``features_dir``.

        A registry of its own, in memory, so that the result depends on the two arguments alone.

        Returns
        -------
        DataFrame
            ``entity_rows`` in their order, with one column a feature.

        Raises
        ------
        DataError
            If the store returns another number of rows than it was asked for.
        """
        import pandas as pd

        with _quiet():
            store = _open_store({**self._config, "registry": {"registry_type": "sql", "path": "sqlite://"}})
            store.apply(self.build_objects(str(features_dir.resolve() / "*.parquet")))
            asked = entity_rows.reset_index(drop=True)
            asked[ROW] = range(len(asked))
            service = store.get_feature_service(self.features.service)
            joined = store.get_historical_features(
                entity_df=asked[[JOIN_KEY, TIMESTAMP, ROW]], features=service
            ).to_df()
        # offline stores differ: one drops rows without a match, one keeps them, and none keeps the order
        if len(joined) != len(asked) or joined[ROW].nunique() != len(asked):
            raise DataError(
                f"{features_dir}: the point-in-time join returned {len(joined)} rows for {len(asked)} asked for; "
                "each customer must occur once a snapshot"
            )
        names = list(self.features.names)
        joined = joined.sort_values(ROW, ignore_index=True)[names]
        rows: pd.DataFrame = pd.concat([asked.drop(columns=ROW), joined], axis=1)
        return rows

    def read_published(self, entity_rows: pd.DataFrame) -> pd.DataFrame | None:
        """As `read_historical`, from the published rows; None unless exactly these snapshots were published.

        A join would otherwise fall back to an older snapshot without a word.
        """
        days = {f"{time:%Y-%m-%d}.parquet" for time in entity_rows[TIMESTAMP].drop_duplicates()}
        if not all((self.offline_dir / day).is_file() for day in days):
            return None
        return self.read_historical(entity_rows, self.offline_dir)

    def publish(self, features_dir: Path) -> None:
        """Make the rows in ``features_dir`` (one file a snapshot) those of the shared offline store, and apply."""
        self.offline_dir.mkdir(parents=True, exist_ok=True)
        for file in sorted(features_dir.glob("*.parquet")):
            beside = self.offline_dir / f".{file.name}.{os.getpid()}"
            beside.write_bytes(file.read_bytes())
            beside.replace(self.offline_dir / file.name)
        with _quiet():
            self._store().apply(self.build_objects(str(self.offline_dir / "*.parquet")))

    def materialize(self, snapshot_at: dt.datetime) -> bool:
        """Bring the published rows of one snapshot online; False if a customer of it has newer ones there already.

        What is online says so: the registry's intervals may end later than their newest row
        (`feast materialize-incremental` ends them at the wall clock), and another machine may have written.
        """
        times = self._read_online_times(snapshot_at)
        if any(time > snapshot_at for time in times):
            return False
        online = dict(self._config["online_store"])
        if online["type"] == "redis" and snapshot_at in times:
            online["skip_dedup"] = True  # else Feast leaves out rows of the time that is there, corrected or not
        with _quiet(), _let_read_while_writing(online):
            # materialize_incremental would start from the wall clock, and silently write nothing for past dates
            second = dt.timedelta(seconds=1)
            store = _open_store({**self._config, "online_store": online})
            store.materialize(snapshot_at - second, snapshot_at + second, feature_views=[self.features.service])
        return True

    def _read_online_times(self, snapshot_at: dt.datetime) -> set[dt.datetime]:
        """The snapshots that the customers of a published one have online."""
        from closedloop.adapters.online import open_online_reader
        from closedloop.adapters.tables import read_table

        path = self.offline_dir / f"{snapshot_at:%Y-%m-%d}.parquet"
        customers = read_table(path, [JOIN_KEY], made_by="closedloop features")[JOIN_KEY].tolist()
        reader = open_online_reader(self._config, self.project, self.features.service, (), timeout_seconds=60)

        async def read() -> set[dt.datetime]:
            times = set()
            try:
                for start in range(0, len(customers), CHUNK_ROWS):
                    rows = await reader.read(customers[start : start + CHUNK_ROWS])
                    times |= {row.snapshot_at for row in rows if row.snapshot_at is not None}
            finally:
                await reader.close()
            return times

        try:
            return asyncio.run(read())
        except ServiceUnavailable as error:
            raise ServiceUnavailable(f"feature store: {error}: {error.__cause__}") from None

    def read_online(self, customer_ids: list[str], *, as_of: dt.datetime) -> OnlineRows:
        """Rows of customers from the online store, with their state at ``as_of``.

        Raises
        ------
        ServiceUnavailable
            If the store cannot be reached or does not hold this definition.
        """
        import pandas as pd
        from feast.errors import FeastObjectNotFoundException

        try:
            with _quiet():
                store = self._store()
                service = store.get_feature_service(self.features.service)
                rows = [{JOIN_KEY: customer} for customer in customer_ids]
                answer = store.get_online_features(features=service, entity_rows=rows)
        except FeastObjectNotFoundException as error:
            raise ServiceUnavailable(
                f"feature store: no service {self.features.service}; train or refresh first"
            ) from error
        values = answer.to_df(include_event_timestamps=True)
        features = values[list(self.features.names)].copy()
        stamps = values[[f"{name}__ts" for name in self.features.names]].max(axis=1)
        snapshot_at = pd.to_datetime(stamps.where(stamps > 0), unit="s", utc=True)
        age = pd.Timestamp(as_of) - snapshot_at
        state = pd.Series("fresh", index=values.index)
        state = state.mask(age > pd.Timedelta(days=self.max_age_days), "stale").mask(snapshot_at.isna(), "unknown")
        return OnlineRows(features, snapshot_at, state)

    def has_service(self, name: str) -> bool:
        """Whether a feature service, and the views behind it, still exist in this project's registry."""
        from feast.errors import FeastObjectNotFoundException

        try:
            with _quiet():
                store = self._store()
                for view in store.get_feature_service(name).feature_view_projections:
                    store.get_feature_view(view.name)
        except FeastObjectNotFoundException:
            return False
        return True

    def find_service(self) -> str:
        """The service of this definition, as the registry has it.

        Raises
        ------
        ServiceUnavailable
            If the registry cannot be read.
        ConfigError
            If it does not hold the service.
        """
        try:
            with _quiet():
                names = [service.name for service in self._store().list_feature_services()]
        except Exception as error:  # SQLAlchemy's, the driver's, or Feast's own
            text = re.sub(r"//[^@/\s]*@", "//***@", " ".join(str(error).split()))
            raise ServiceUnavailable(f"Feast's registry: {text}") from None
        if self.features.service not in names:
            raise ConfigError(f"Feast's registry holds no feature service {self.features.service} of {self.project}")
        return self.features.service

    def describe_online(self) -> str:
        """Look a customer up that nobody is, and whether there is anybody at all.

        Raises
        ------
        ServiceUnavailable
            If the online store does not answer.
        """
        from closedloop.adapters.online import open_online_reader

        reader = open_online_reader(self._config, self.project, self.features.service, ["-"], timeout_seconds=3)

        async def ask() -> str:
            try:
                await reader.read(["-"])
                empty = await reader.is_empty()
            finally:
                await reader.close()
            return "reachable, but empty: `closedloop refresh` brings features online" if empty else "reachable"

        try:
            return asyncio.run(ask())
        except ServiceUnavailable as error:
            raise ServiceUnavailable(f"{error}: {error.__cause__ or ''}") from None

    def _store(self) -> FeatureStore:
        return _open_store(self._config)


def read_store_config(settings: Settings, project: str) -> dict[str, Any]:
    """``feature_repo/feature_store.yaml`` with the profile's overrides, its relative paths made absolute.

    An override that names a store's ``type`` replaces the store: Feast refuses one type's keys with another's.
    """
    from closedloop.dataset import read_yaml

    repo, overrides = settings.root / "feature_repo", settings.features.overrides
    base = {
        name: value
        for name, value in read_yaml(repo / "feature_store.yaml").items()
        if "type" not in overrides.get(name, {})
    }
    config = copy.deepcopy(merge_values(base, overrides, {"project": project}))
    try:
        registry, online = config["registry"], config["online_store"]
        prefix = "sqlite:///"
        if registry["path"].startswith(prefix) and not registry["path"].startswith(prefix + "/"):
            registry["path"] = prefix + str((repo / registry["path"].removeprefix(prefix)).resolve())
            Path(registry["path"].removeprefix(prefix)).parent.mkdir(parents=True, exist_ok=True)
        if online["type"] == "sqlite":
            online["path"] = str((repo / online["path"]).resolve())
            Path(online["path"]).parent.mkdir(parents=True, exist_ok=True)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{repo / 'feature_store.yaml'}: registry.path and online_store.type are required") from error
    return config


def build_repo_objects(root: Path) -> dict[str, Any]:
    """Objects for ``feast apply``: the current definition, and those of the registry that earlier models use."""
    from closedloop.bootstrap import build_features, load_run

    run = load_run(root / "params.yaml", root=root)
    features = build_features(run)
    kept: dict[str, Any] = {}
    with _quiet():
        store = features._store()
        for found in [*store.list_feature_views(), *store.list_feature_services()]:
            kept[f"kept_{type(found).__name__}_{found.name}"] = found
            if hasattr(found, "batch_source"):
                kept[f"kept_source_{found.name}"] = found.batch_source
    current = features.build_objects(str(features.offline_dir / "*.parquet"))
    objects = {f"current_{type(item).__name__}": item for item in current}
    names = {(type(item).__name__, item.name) for item in current}
    return objects | {key: item for key, item in kept.items() if (type(item).__name__, item.name) not in names}


def _open_store(config: dict[str, Any]) -> FeatureStore:
    from feast import FeatureStore, RepoConfig

    # registry stays a mapping: the SQL registry refuses the typed object
    return FeatureStore(config=RepoConfig(**copy.deepcopy(config)))


@contextmanager
def _let_read_while_writing(online: dict[str, Any]) -> Iterator[None]:
    """SQLite's default journal locks readers out for as long as Feast writes: seconds, in one transaction."""
    if online["type"] != "sqlite":
        yield
        return
    with contextlib.closing(sqlite3.connect(online["path"], isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        yield
        # a log left beside the file would be taken for a part of any other file put in its place; where Feast's own
        # connection is still open there is nothing to wait for: the log goes when that is closed
        connection.execute("PRAGMA busy_timeout=0")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@contextmanager
def _quiet() -> Iterator[None]:
    """Feast prints what it materialises, and its Ibis store warns of its own deprecated calls.

    Raises
    ------
    ServiceUnavailable
        If registry or online store throw: Feast lets through what their drivers say.
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
        if type(error).__module__.split(".")[0] not in DRIVERS:  # by name: redis is installed with its extra alone
            raise
        raise ServiceUnavailable(f"feature store: {hide_passwords(' '.join(str(error).split()))}") from None
