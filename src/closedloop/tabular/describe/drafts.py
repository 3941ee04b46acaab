"""A data set's config while it is put together, and what both kinds of data sets need for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from closedloop.core.features.parsing import parse_times
from closedloop.core.features.profiles import Profile
from closedloop.core.features.roles import Roles
from closedloop.rules import find_code

BETWEEN = "column_values_to_be_between"


@dataclass
class Draft:
    """The rows, what their columns hold and do, and the config so far; ``comments`` stand above its keys."""

    frame: pd.DataFrame
    profiles: dict[str, Profile]
    roles: Roles
    content: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Say this to the person who asked."""
        self.roles.notes.append(text)

    def expect(self, table: str, rule: str, severity: str = "warning", **kwargs: Any) -> None:
        """Add an expectation of the data gate."""
        found = {"table": table, "type": f"expect_{rule}", "severity": severity, "kwargs": kwargs}
        self.content.setdefault("expectations", []).append(found)

    def spell(self, name: str) -> pd.Series:
        """A column as categories or ids."""
        return self.frame[name].map(
            lambda value: str(value) if isinstance(value, bool | np.bool_) else find_code(value)
        )

    def read_numbers(self, name: str) -> pd.Series:
        """A column as numbers, NaN where there is none."""
        values = self.frame[name]
        if values.dtype == object:
            values = values.astype("string").str.replace(",", ".")
        return pd.to_numeric(values, errors="coerce").astype("float64")

    def read_times(self) -> pd.Series:
        """The times of all rows, UTC; NaT where there is none."""
        name = str(self.roles.time)
        known = self.frame[name].dropna()
        where: dict[str, Any] = {"place": "the source", "row_numbers": pd.Series(known.index + 1, index=known.index)}
        form = self.profiles[name].time_format
        return parse_times(known, timezone="UTC", time_format=form, **where).reindex(self.frame.index)

    def add_cleaning(self, needed: list[str]) -> None:
        """Drop rows without a value in these columns, and rows that equal another."""
        cleaning: dict[str, Any] = {}
        if blank := [name for name in needed if self.profiles[name].missing]:
            cleaning["require_value"] = blank
        for name in blank:
            self.note(
                f"{name!r}: rows without a value: {self.profiles[name].missing:,}, dropped (cleaning.require_value)"
            )
        if twice := int(self.frame.astype("string").duplicated().sum()):
            cleaning["drop_duplicates"] = True
            self.note(f"rows that equal another in every column: {twice:,}, dropped (cleaning.drop_duplicates)")
        if self.roles.entity_id is not None and (missing := int(self.frame[self.roles.entity_id].isna().sum())):
            self.note(f"{self.roles.entity_id!r}: rows without an id: {missing:,}, dropped")
        if cleaning:
            self.content["cleaning"] = cleaning


def day_after(times: pd.Series) -> str:
    """The date after the last of these times."""
    return str((times.max().floor("D") + pd.Timedelta(days=1)).date())
