"""The features of a table from their files alone, where Feast is not installed: nothing goes online."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.adapters.feast import TIMESTAMP, Features
from closedloop.contract import JOIN_KEY
from closedloop.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.config.featureset import FeatureSet


class FeatureFiles(Features):
    """A table's features: a row of the file is a customer at a day, so that the join needs no search in time."""

    is_online = False

    def with_definition(self, features: FeatureSet) -> FeatureFiles:
        """The same project under another definition of its features."""
        return FeatureFiles(self._settings, project=self.project, features=features, max_age_days=self.max_age_days)

    def read_historical(self, entity_rows: pd.DataFrame, features_dir: Path) -> pd.DataFrame:
        """Join ``entity_rows`` (customer_id, event_timestamp, ...) with the rows in ``features_dir``.

        Raises
        ------
        DataError
            If a customer occurs twice at a time, or not at all.
        """
        import pandas as pd

        names = [JOIN_KEY, TIMESTAMP, *self.features.names]
        files = sorted(features_dir.glob("*.parquet"))
        found = pd.concat([pd.read_parquet(file, columns=names) for file in files], ignore_index=True)
        joined = entity_rows.merge(found, on=[JOIN_KEY, TIMESTAMP], how="left", indicator=True)
        missing = int((joined["_merge"] != "both").sum())
        if missing or len(joined) != len(entity_rows):
            raise DataError(
                f"{features_dir}: rows asked for {len(entity_rows)}, without features {missing}, joined {len(joined)}; "
                "each customer must occur once a day"
            )
        return joined.drop(columns="_merge")

    def publish(self, features_dir: Path) -> None:
        """Keep the rows for later comparisons, where Feast would find them too."""
        self.copy_rows(features_dir)

    def materialize(self, snapshot_at: dt.datetime) -> bool:
        """Raise an error: `is_online` says that there is no store."""
        raise ConfigError(f"features of {snapshot_at:%Y-%m-%d}: there is no online store without Feast")
