"""Feast: one definition for training rows (offline) and serving rows (online)."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from closedloop.adapters.feast_store import (
    allow_reads_while_writing,
    open_store,
    quiet,
    read_store_config,
    wait_while_locked,
)
from closedloop.config.featureset import FeatureSet
from closedloop.config.settings import Settings
from closedloop.contract import JOIN_KEY
from closedloop.core.features.as_of import ROW
from closedloop.errors import ConfigError, DataError, ServiceUnavailable, count_noun
from closedloop.files import replace_file

if TYPE_CHECKING:
    import pandas as pd
    from feast import FeatureStore

    from closedloop.adapters.online_format import OnlineRow
    from closedloop.adapters.online_store import OnlineReader

logger = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")
ENTITY = "customer"
TIMESTAMP = "event_timestamp"
CHUNK_ROWS = 1_000


class Features:
    """One data set's project in the feature store.

    Parameters
    ----------
    settings
        The locations of registry and stores.
    project
        The data set's ``model_name``: projects share a store, but no rows in it.
    features
        The feature definition.
    max_age_days
        A row older than this is stale.
    """

    is_online = True  # whether rows go into an online store

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
        """Join ``entity_rows`` (customer_id, event_timestamp, ...) point in time with the rows in ``features_dir``.

        This uses its own registry in memory, so that the result depends on the two arguments alone.

        Returns
        -------
        DataFrame
            ``entity_rows`` in their order, with one column a feature.

        Raises
        ------
        DataError
            If the store returns more or fewer rows than ``entity_rows`` has.
        """
        import pandas as pd

        asked = entity_rows.reset_index(drop=True)
        asked[ROW] = range(len(asked))
        join = self._join_on_spark if self._settings.engine.kind == "spark" else self._join
        joined = join(asked[[JOIN_KEY, TIMESTAMP, ROW]], features_dir)
        # offline stores differ: one drops rows without a match, one keeps them, and none keeps the order
        if len(joined) != len(asked) or joined[ROW].nunique() != len(asked):
            raise DataError(
                f"{features_dir}: the point-in-time join returned {count_noun(len(joined), 'row')} for {len(asked)} "
                "asked for; each customer must occur once a snapshot"
            )
        names = list(self.features.names)
        joined = joined.sort_values(ROW, ignore_index=True)[names]
        rows: pd.DataFrame = pd.concat([asked.drop(columns=ROW), joined], axis=1)
        return rows

    def _join(self, asked: pd.DataFrame, features_dir: Path) -> pd.DataFrame:
        with quiet():
            store = open_store({**self._config, "registry": {"registry_type": "sql", "path": "sqlite://"}})
            store.apply(self.build_objects(str(features_dir.resolve() / "*.parquet")))
            service = store.get_feature_service(self.features.service)
            joined: pd.DataFrame = store.get_historical_features(entity_df=asked, features=service).to_df()
        return joined

    def _join_on_spark(self, asked: pd.DataFrame, features_dir: Path) -> pd.DataFrame:
        """As Feast's own Spark store does it, but for any name of a feature (decision record 18)."""
        from closedloop.adapters.spark import SparkEngine

        kinds = dict.fromkeys(self.features.numeric, "float64") | dict.fromkeys(self.features.categorical, "string")
        engine = SparkEngine(self._settings.spark)  # stays open: it is the process' application
        files = sorted(features_dir.glob("*.parquet"))
        return engine.join_as_of(asked, files, kinds, max_age_days=self.max_age_days)

    def read_published(self, entity_rows: pd.DataFrame) -> pd.DataFrame | None:
        """Join as `read_historical` does, from the published rows; None unless all these snapshots are published.

        Otherwise the join would silently fall back to an older snapshot.
        """
        days = {f"{time:%Y-%m-%d}.parquet" for time in entity_rows[TIMESTAMP].drop_duplicates()}
        if not all((self.offline_dir / day).is_file() for day in days):
            return None
        return self.read_historical(entity_rows, self.offline_dir)

    def publish(self, features_dir: Path) -> None:
        """Replace the shared offline store's rows by those in ``features_dir`` (one file a snapshot), and apply."""
        self.copy_rows(features_dir)
        with quiet():
            objects = self.build_objects(str(self.offline_dir / "*.parquet"))
            wait_while_locked(lambda: self.open_store().apply(objects))

    def copy_rows(self, features_dir: Path) -> None:
        """Replace the files of these snapshots in the shared offline store, each whole or not at all."""
        self.offline_dir.mkdir(parents=True, exist_ok=True)
        for file in sorted(features_dir.glob("*.parquet")):
            with replace_file(self.offline_dir / file.name) as beside:
                beside.write_bytes(file.read_bytes())

    def list_objects(self) -> dict[str, Any]:
        """Objects for ``feast apply``: the current definition, and those of the registry that earlier models use."""
        kept: dict[str, Any] = {}
        with quiet():
            store = self.open_store()
            for found in [*store.list_feature_views(), *store.list_feature_services()]:
                kept[f"kept_{type(found).__name__}_{found.name}"] = found
                if hasattr(found, "batch_source"):
                    kept[f"kept_source_{found.name}"] = found.batch_source
        current = self.build_objects(str(self.offline_dir / "*.parquet"))
        objects = {f"current_{type(item).__name__}": item for item in current}
        names = {(type(item).__name__, item.name) for item in current}
        return objects | {key: item for key, item in kept.items() if (type(item).__name__, item.name) not in names}

    def materialize(self, snapshot_at: dt.datetime) -> bool:
        """Write the published rows of one snapshot online; return False if any of its customers has newer ones there.

        The online rows themselves decide this. The registry's intervals may end later than their newest row
        (`feast materialize-incremental` ends them at the wall clock), and another machine may have written rows.
        """
        from closedloop.adapters.online_writer import is_plain_redis

        times = self._read_online_times(snapshot_at)
        if any(time > snapshot_at for time in times):
            return False
        online = dict(self._config["online_store"])
        if online["type"] == "redis" and snapshot_at in times:
            online["skip_dedup"] = True  # else Feast skips a row with the stored time, even a corrected one
        with quiet(), allow_reads_while_writing(online):
            # materialize_incremental would start from the wall clock, and silently write nothing for past dates
            second = dt.timedelta(seconds=1)
            store = open_store({**self._config, "online_store": online})
            span = snapshot_at - second, snapshot_at + second
            if is_plain_redis(online):
                self._write_rows(snapshot_at)
                view = store.get_feature_view(self.features.service)
                wait_while_locked(lambda: store.registry.apply_materialization(view, self.project, *span))
            else:
                wait_while_locked(lambda: store.materialize(*span, feature_views=[self.features.service]))
        return True

    def _write_rows(self, snapshot_at: dt.datetime) -> None:
        """As `feast materialize` does, which takes nine times as long (decision record 19)."""
        from closedloop.adapters.online_writer import write_snapshot

        file = self.offline_dir / f"{snapshot_at:%Y-%m-%d}.parquet"
        place = self._config["online_store"]["connection_string"], self.project, self.features.service
        write_snapshot(*place, file, self.features.numeric, self.features.categorical)

    def _read_online_times(self, snapshot_at: dt.datetime) -> set[dt.datetime]:
        """The snapshot times of the online rows of a published snapshot's customers."""
        import pyarrow.parquet as pq

        path = self.offline_dir / f"{snapshot_at:%Y-%m-%d}.parquet"
        customers = pq.read_table(path, columns=[JOIN_KEY])[JOIN_KEY].to_pylist()
        return {row.snapshot_at for row in self.read_online(customers, ()) if row.snapshot_at is not None}

    def read_online(self, customer_ids: Sequence[str], names: Sequence[str] | None = None) -> list[OnlineRow]:
        """Rows of customers from the online store, by the service's own reader; None: of all features.

        Raises
        ------
        ServiceUnavailable
            If the store cannot be reached or does not hold this definition.
        """

        async def read(reader: OnlineReader) -> list[OnlineRow]:
            starts = range(0, len(customer_ids), CHUNK_ROWS)
            return [row for start in starts for row in await reader.read(customer_ids[start : start + CHUNK_ROWS])]

        try:
            return self._ask_online(read, self.features.names if names is None else names, timeout_seconds=60)
        except ServiceUnavailable as error:
            raise ServiceUnavailable(f"feature store: {error}: {error.__cause__}") from None

    def _ask_online(
        self, ask: Callable[[OnlineReader], Awaitable[ResultT]], names: Sequence[str], *, timeout_seconds: float
    ) -> ResultT:
        from closedloop.adapters.online_store import open_online_reader

        view = self.features.service
        reader = open_online_reader(self._config, self.project, view, names, timeout_seconds=timeout_seconds)

        async def run() -> ResultT:
            try:
                return await ask(reader)
            finally:
                await reader.close()

        return asyncio.run(run())

    def has_service(self, name: str) -> bool:
        """Whether a feature service, and the views behind it, still exist in this project's registry."""
        from feast.errors import FeastObjectNotFoundException

        try:
            with quiet():
                store = self.open_store()
                for view in store.get_feature_service(name).feature_view_projections:
                    store.get_feature_view(view.name)
        except FeastObjectNotFoundException:
            return False
        return True

    def find_service(self) -> str:
        """Return the name of this definition's feature service after finding it in the registry.

        Raises
        ------
        ServiceUnavailable
            If the registry cannot be read.
        ConfigError
            If it does not hold the service.
        """
        try:
            with quiet():
                names = [service.name for service in self.open_store().list_feature_services()]
        except Exception as error:  # SQLAlchemy's, the driver's, or Feast's own
            text = re.sub(r"//[^@/\s]*@", "//***@", " ".join(str(error).split()))
            raise ServiceUnavailable(f"Feast's registry: {text}") from None
        if self.features.service not in names:
            raise ConfigError(f"Feast's registry holds no feature service {self.features.service} of {self.project}")
        return self.features.service

    def describe_online(self) -> str:
        """Look up an id that no customer has, and check whether the store has any row; describe the result.

        Raises
        ------
        ServiceUnavailable
            If the online store does not answer.
        """

        async def ask(reader: OnlineReader) -> str:
            await reader.read(["-"])
            empty = await reader.is_empty()
            return "reachable, but empty: `closedloop refresh` brings features online" if empty else "reachable"

        try:
            return self._ask_online(ask, ["-"], timeout_seconds=3)
        except ServiceUnavailable as error:
            raise ServiceUnavailable(f"{error}: {error.__cause__ or ''}") from None

    def open_store(self) -> FeatureStore:
        """Feast's own object of this project's registry and stores."""
        return open_store(self._config)
