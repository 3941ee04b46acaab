"""Where a data set's rows come from, and how its files are written."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from closedloop.core.features.time_formats import NAMES_A_DAY, UNIX_UNITS

WORKBOOK_RULE = "an Excel workbook (.xlsx) is source.type: excel, with source.sheet for another sheet than the first"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


class SimulatorSource(_Frozen):
    """The built-in shop; its scale and seed stand in params.yaml."""

    type: Literal["simulator"]


class FileSource(_Frozen):
    """CSV, Parquet or Excel: a file, a folder (every file in it) or a glob pattern; ``data.source`` in params wins.

    ``na_values`` are texts that mean a missing value. Encoding, delimiter and decimal mark are of CSV files,
    ``sheet`` is of workbooks (None: the first one).
    ``time_format`` says how times are written that are not ISO 8601: in `strptime`'s letters, or counted from 1970.
    """

    type: Literal["csv", "parquet", "excel"]
    path: str | None = None
    sheet: str | None = None
    encoding: str = "utf-8"
    delimiter: str = ","
    decimal: Literal[".", ","] = "."
    na_values: tuple[str, ...] = ()
    time_format: str | None = None

    @model_validator(mode="after")
    def _sheets_are_of_workbooks(self) -> FileSource:
        if self.sheet is not None and self.type != "excel":
            raise ValueError(f"sheet: {WORKBOOK_RULE}")
        return self

    @field_validator("encoding")
    @classmethod
    def _encoding_exists(cls, name: str) -> str:
        try:
            codecs.lookup(name)
        except LookupError as error:
            raise ValueError(f"{name!r} is no encoding that Python knows, such as utf-8 or cp1252") from error
        return name

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_one_character(cls, text: str) -> str:
        if len(text.encode()) != 1 or text in '"\r\n':
            raise ValueError(
                'must be one character and no pattern, such as ";" or "|", or "\\t" (in double quotes) for a tab; '
                "convert a file with several spaces between its cells first"
            )
        return text

    @field_validator("time_format")
    @classmethod
    def _time_format_names_a_day(cls, text: str | None) -> str | None:
        if text is not None and text not in UNIX_UNITS and not NAMES_A_DAY.match(text):
            raise ValueError(
                "must have a letter for day, month and year each, such as %d.%m.%Y %H:%M, or be one of "
                f"{', '.join(UNIX_UNITS)}"
            )
        return text


class SqlSource(_Frozen):
    """A query; the database's address is a secret and comes from the environment variable named here."""

    type: Literal["sql"]
    url_variable: str
    query: str


DataSource = Annotated[SimulatorSource | FileSource | SqlSource, Field(discriminator="type")]
