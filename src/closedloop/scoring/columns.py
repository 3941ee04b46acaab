"""Many rows against the model's contract, a column at a time, with the verdict that the service gives each of them.

Arithmetic on whole columns finds the rows that may break a rule; the check that a request goes through then decides and
words what becomes of those. So a row cannot be good in a batch and bad in a request, or the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from closedloop.contract import ModelContract
from closedloop.errors import DataError
from closedloop.rules import ID_LENGTH_MAX, Breach, FeatureRule, RefusedRequest, Value, read_customer_id
from closedloop.tabular.rows import ColumnKind
from closedloop.tabular.tables import UTC_TIME

CUSTOMER_COLUMN, TIME_COLUMN = "customer_id", "event_timestamp"
NUMBER_PATTERN = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
RESPELT_PATTERN = r"^\s*$|^\s|\s$|\.0+$|[eE]\+|\.[0-9]+[eE][0-9]"  # text that `normalise_code` may change or refuse


class CheckedRows(NamedTuple):
    """The rows of a chunk that hold, and what is wrong with the others.

    ``kept`` are the places in the chunk (int64, ascending) of the n good rows, ``matrix`` packs them (float32,
    shape (n, n_features)), ``columns`` are their features as they came (float64 or text), ``customers`` their ids and
    ``times`` their snapshots where the file has them; ``breaches`` are pairs of place and broken rule.
    """

    kept: np.ndarray
    matrix: np.ndarray
    columns: Sequence[pa.Array]
    customers: pa.Array | None
    times: pa.Array | None
    breaches: Sequence[tuple[int, Breach]]

    def list_values(self, start: int, stop: int) -> list[tuple[Value, ...]]:
        """The features of the good rows from ``start`` to ``stop`` as they are logged: None where one is missing."""
        columns = [column.slice(start, stop - start).to_pylist() for column in self.columns]
        return [tuple(None if value != value else value for value in row) for row in zip(*columns, strict=True)]


class ColumnChecker:
    """The checks of one contract on tables of one schema.

    Parameters
    ----------
    contract
        Whose features are asked for; other columns are left alone but for the customer's id and ``event_timestamp``.
    range_margin
        As `closedloop.rules.FeatureRule` takes it.
    schema
        Of the tables.
    is_text
        Whether numbers stand there as text.
    place
        Where they come from, for errors.
    id_column
        The customer's id in the data set's own files; where there is none, ``customer_id`` is taken for it.

    Raises
    ------
    DataError
        If a column is missing, stands there twice or has another type.
    """

    def __init__(
        self,
        contract: ModelContract,
        range_margin: float,
        schema: pa.Schema,
        *,
        is_text: bool,
        place: str,
        id_column: str = CUSTOMER_COLUMN,
    ) -> None:
        self._is_text = is_text
        self._rules = contract.read_rules(range_margin)
        self.has_times = TIME_COLUMN in schema.names
        kinds = describe_columns(contract, id_column)
        ids = [name for name, kind in kinds.items() if kind == "id" and name in schema.names]
        self.id_column = ids[0] if ids else None
        self.columns = [name for name in kinds if name in schema.names and name not in ids[1:]]
        self.ignored = sorted(set(schema.names) - set(self.columns))
        missing = [name for name in contract.feature_names if name not in schema.names]
        if missing:
            raise DataError(f"{place}: no column {', '.join(missing)}; its columns: {', '.join(schema.names)[:500]}")
        twice = [name for name in self.columns if schema.names.count(name) > 1]
        if twice:
            raise DataError(f"{place}: more than one column {', '.join(twice)}")
        for name in self.columns:
            _require_type(place, schema.field(name), kinds[name], is_text=is_text)

    def check(self, table: pa.Table) -> CheckedRows:
        """Check and pack the rows of a table whose columns are in one piece each."""
        matrix = np.empty((table.num_rows, len(self._rules.features)), dtype=np.float32)
        suspect = np.zeros(table.num_rows, dtype=bool)
        columns = []
        for place, feature in enumerate(self._rules.features):
            column, codes, doubtful = self._read_feature(feature, _take_column(table, feature.name))
            with np.errstate(over="ignore"):  # what float32 cannot hold is out of every range
                matrix[:, place] = codes
            suspect |= doubtful
            columns.append(column)
        customers = None
        if self.id_column is not None:
            customers, doubtful = _read_ids(_take_column(table, self.id_column))
            suspect |= doubtful
        times = _read_times(_take_column(table, TIME_COLUMN)) if self.has_times else None
        if not suspect.any():
            return CheckedRows(np.arange(table.num_rows), matrix, columns, customers, times, ())
        breaches = self._judge(table, columns, suspect)
        refused = np.zeros(table.num_rows, dtype=bool)
        refused[[row for row, _ in breaches]] = True
        kept = np.flatnonzero(~refused)
        columns = [column.take(pa.array(kept)) for column in columns]
        customers, times = (None if found is None else found.take(pa.array(kept)) for found in (customers, times))
        return CheckedRows(kept, matrix[kept], columns, customers, times, breaches)

    def _read_feature(self, feature: FeatureRule, column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        """A column as it is logged and as it is packed, and which of its rows may be wrong."""
        return self._read_numbers(feature, column) if feature.codes is None else _read_categories(feature, column)

    def _read_numbers(self, feature: FeatureRule, column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        numbers = _parse_numbers(column) if self._is_text else pc.cast(column, pa.float64(), safe=False)
        values = numbers.to_numpy(zero_copy_only=False)
        doubtful = ~((values >= feature.low) & (values <= feature.high))
        if feature.nullable and doubtful.any():
            doubtful &= ~np.isnan(values)
            if self._is_text:  # only an empty cell is missing
                doubtful |= np.isnan(values) & _to_mask(column.is_valid())
        return numbers, values, doubtful

    def _judge(self, table: pa.Table, columns: Sequence[pa.Array], suspect: np.ndarray) -> list[tuple[int, Breach]]:
        """The service's own words on the suspect rows."""
        breaches: list[tuple[int, Breach]] = []
        for row in np.flatnonzero(suspect).tolist():
            features: dict[str, Any] = {}
            for feature, column in zip(self._rules.features, columns, strict=True):
                value = None if feature.codes is not None else column[row].as_py()
                if feature.codes is not None or (self._is_text and (value is None or value != value)):
                    value = _list_cells(table[feature.name].slice(row, 1))[0]  # as it is spelt there
                features[feature.name] = None if value != value else value  # NaN is how files say missing
            body: dict[str, Any] = {"features": features}
            if self.id_column is not None:
                body["customer_id"] = _list_cells(table[self.id_column].slice(row, 1))[0]
            try:
                self._rules.check(body, "")
            except RefusedRequest as refused:
                breaches += [(row, breach) for breach in refused.breaches]
        return breaches


def describe_columns(contract: ModelContract, id_column: str) -> dict[str, ColumnKind]:
    """The columns that are read, and what stands in each: the features, and those that a file may lack."""
    kinds: dict[str, ColumnKind] = {feature.name: feature.kind for feature in contract.features}
    return {**kinds, id_column: "id", CUSTOMER_COLUMN: "id", TIME_COLUMN: "time"}


def _list_cells(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Ids or categories as they stand there; None where one is missing, as NaN and a blank text are."""
    if pa.types.is_floating(column.type):  # NumPy's types know how many digits they hold
        return [None if np.isnan(value) else value for value in column.to_numpy(zero_copy_only=False)]
    cells = [str(value) if isinstance(value, Decimal) else value for value in column.to_pylist()]
    return [None if isinstance(value, str) and not value.strip() else value for value in cells]


def _read_categories(feature: FeatureRule, column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """As `ColumnChecker` reads a feature: the rule is asked once for each distinct value."""
    coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    names: list[Value] = []
    doubtful = []
    for value in (*_list_cells(coded.dictionary), None):  # the last stands for null
        try:
            names.append(feature.read(value))
            doubtful.append(False)
        except ValueError:
            names.append(None)
            doubtful.append(True)
    places = coded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)
    codes = np.array([(feature.codes or {}).get(name, -1.0) for name in names])
    return pa.array(names, pa.string()).take(pa.array(places)), codes[places], np.array(doubtful)[places]


def _read_ids(column: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Customers' ids as they are logged, and which may be wrong; all but short, printable ASCII is looked at."""
    ids = pc.cast(column, pa.string())
    if pa.types.is_integer(column.type):
        return ids, np.zeros(len(ids), dtype=bool)
    odd = np.ones(len(ids), dtype=bool)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        short = pc.less_equal(pc.binary_length(ids), ID_LENGTH_MAX)
        plain = pc.and_not(pc.ascii_is_printable(ids), pc.match_substring_regex(ids, RESPELT_PATTERN))
        odd = ~_to_mask(pc.and_(short, plain).fill_null(True))
    doubtful = np.zeros(len(ids), dtype=bool)
    spelt: list[str | None] = []
    for place, value in zip(np.flatnonzero(odd), _list_cells(column.filter(pa.array(odd))), strict=True):
        try:
            spelt.append(None if value is None else read_customer_id(value))
        except ValueError:
            spelt.append(None)
            doubtful[place] = True
    return pc.replace_with_mask(ids, odd, pa.array(spelt, pa.string())) if spelt else ids, doubtful


def _require_type(place: str, field: pa.Field, kind: ColumnKind, *, is_text: bool) -> None:
    kinds = pa.types
    found = field.type.value_type if kinds.is_dictionary(field.type) else field.type
    is_number = kinds.is_integer(found) or kinds.is_floating(found) or kinds.is_decimal(found)
    is_code = is_number or kinds.is_string(found) or kinds.is_large_string(found)
    allowed: dict[ColumnKind, tuple[bool, str]] = {
        "numeric": (is_text or is_number, "numbers"),
        "categorical": (is_code or kinds.is_boolean(found), "text or numbers"),
        "id": (is_code, "text or numbers"),
        "time": (is_text or kinds.is_timestamp(found), "times"),
    }
    fits, wanted = allowed[kind]
    if not fits and not kinds.is_null(found):
        raise DataError(f"{place}: column {field.name} holds {field.type}, expected {wanted}")


def _take_column(table: pa.Table, name: str) -> pa.Array:
    chunked = table.column(name)
    return chunked.chunk(0) if chunked.num_chunks == 1 else chunked.combine_chunks()


def _parse_numbers(column: pa.Array) -> pa.Array:
    """Text to float64: null where it is no number."""
    try:
        return pc.cast(column, pa.float64())
    except pa.ArrowInvalid:
        is_number = pc.match_substring_regex(column, NUMBER_PATTERN)
        return pc.cast(pc.if_else(is_number, column, pa.scalar(None, pa.string())), pa.float64())


def _read_times(column: pa.Array) -> pa.Array:
    """Snapshots in UTC; a time without a zone is taken for UTC, as Feast does."""
    try:
        return pc.cast(column, UTC_TIME, safe=False)
    except pa.ArrowInvalid:
        try:
            return pc.cast(pc.cast(column, pa.timestamp("us")), UTC_TIME)
        except pa.ArrowInvalid as error:
            raise DataError(f"column {TIME_COLUMN}: {error}; allowed: times as 2025-01-31T00:00:00Z") from None


def _to_mask(values: pa.Array) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False))
