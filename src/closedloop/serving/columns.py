"""Many rows against the model's contract, a column at a time, with the verdict that the service gives each of them.

Arithmetic on whole columns finds the rows that might break a rule; what becomes of those is decided, and worded, by
the check that a request goes through. So a row cannot be good in a batch and bad in a request, or the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from closedloop.adapters.rows import ColumnKind
from closedloop.adapters.tables import UTC_TIME
from closedloop.contract import CategoricalFeature, Feature, ModelContract, NumericFeature
from closedloop.errors import DataError
from closedloop.serving.requests import ID_LENGTH_MAX, Breach, RefusedRequest, RequestChecker, Value, find_range

CUSTOMER_COLUMN, TIME_COLUMN = "customer_id", "event_timestamp"
NUMBER_PATTERN = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


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
        Whose features are asked for; other columns are left alone but for ``customer_id`` and ``event_timestamp``.
    range_margin
        As `RequestChecker` takes it.
    schema
        Of the tables.
    is_text
        Whether numbers stand there as text.
    place
        Where they come from, for errors.

    Raises
    ------
    DataError
        If a column is missing, stands there twice or has another type.
    """

    def __init__(
        self, contract: ModelContract, range_margin: float, schema: pa.Schema, *, is_text: bool, place: str
    ) -> None:
        self._contract, self._is_text, self._range_margin = contract, is_text, range_margin
        self._requests = RequestChecker(contract, range_margin)
        self.has_customers, self.has_times = CUSTOMER_COLUMN in schema.names, TIME_COLUMN in schema.names
        kinds = describe_columns(contract)
        self.columns = [name for name in kinds if name in schema.names]
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
        matrix = np.empty((table.num_rows, len(self._contract.features)), dtype=np.float32)
        suspect = np.zeros(table.num_rows, dtype=bool)
        columns = []
        for place, feature in enumerate(self._contract.features):
            column, codes, doubtful = self._read_feature(feature, _take_column(table, feature.name))
            with np.errstate(over="ignore"):  # what float32 cannot hold is out of every range
                matrix[:, place] = codes
            suspect |= doubtful
            columns.append(column)
        customers = pc.cast(_take_column(table, CUSTOMER_COLUMN), pa.string()) if self.has_customers else None
        times = _read_times(_take_column(table, TIME_COLUMN)) if self.has_times else None
        if customers is not None:
            suspect |= _find_odd_ids(customers)
        if not suspect.any():
            return CheckedRows(np.arange(table.num_rows), matrix, columns, customers, times, ())
        breaches = self._judge(table, columns, customers, suspect)
        refused = np.zeros(table.num_rows, dtype=bool)
        refused[[row for row, _ in breaches]] = True
        kept = np.flatnonzero(~refused)
        columns = [column.take(pa.array(kept)) for column in columns]
        customers, times = (None if found is None else found.take(pa.array(kept)) for found in (customers, times))
        return CheckedRows(kept, matrix[kept], columns, customers, times, breaches)

    def _read_feature(self, feature: Feature, column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        """A column as it is logged and as it is packed, and which of its rows may be wrong."""
        if isinstance(feature, CategoricalFeature):
            names = pc.cast(column, pa.string())
            codes = _encode_names(feature, names)
            unknown = codes < 0
            if feature.nullable and unknown.any():
                unknown &= _to_mask(names.is_valid())
            return names, codes, unknown
        return self._read_numbers(feature, column)

    def _read_numbers(self, feature: NumericFeature, column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
        numbers = _parse_numbers(column) if self._is_text else pc.cast(column, pa.float64(), safe=False)
        values = numbers.to_numpy(zero_copy_only=False)
        low, high = find_range(feature, self._range_margin)
        doubtful = ~((values >= low) & (values <= high))
        if feature.nullable and doubtful.any():
            doubtful &= ~np.isnan(values)
            if self._is_text:  # only an empty cell is missing
                doubtful |= np.isnan(values) & _to_mask(column.is_valid())
        return numbers, values, doubtful

    def _judge(
        self, table: pa.Table, columns: Sequence[pa.Array], customers: pa.Array | None, suspect: np.ndarray
    ) -> list[tuple[int, Breach]]:
        """What the service would say of the suspect rows."""
        breaches: list[tuple[int, Breach]] = []
        for row in np.flatnonzero(suspect).tolist():
            features: dict[str, Any] = {}
            for name, column in zip(self._contract.feature_names, columns, strict=True):
                value = column[row].as_py()
                if value is None or value != value:  # NaN is how files say missing, but for one that is spelt out
                    value = table[name][row].as_py() if self._is_text else None
                features[name] = value
            customer = None if customers is None else customers[row].as_py()
            try:
                self._requests.check({"features": features, "customer_id": customer}, "")
            except RefusedRequest as refused:
                breaches += [(row, breach) for breach in refused.breaches]
        return breaches


def describe_columns(contract: ModelContract) -> dict[str, ColumnKind]:
    """The columns that are read, and what stands in each: the features, and two that a file may lack."""
    kinds: dict[str, ColumnKind] = {feature.name: feature.kind for feature in contract.features}
    return {**kinds, CUSTOMER_COLUMN: "id", TIME_COLUMN: "time"}


def _encode_names(feature: CategoricalFeature, names: pa.Array) -> np.ndarray:
    """The code of each category, -1 for what is unknown or missing."""
    return np.asarray(pc.index_in(names, pa.array(feature.categories, pa.string())).fill_null(-1).to_numpy())


def _require_type(place: str, field: pa.Field, kind: ColumnKind, *, is_text: bool) -> None:
    kinds = pa.types
    found = field.type.value_type if kinds.is_dictionary(field.type) else field.type
    textual = kinds.is_string(found) or kinds.is_large_string(found)
    allowed: dict[ColumnKind, tuple[bool, str]] = {
        "numeric": (
            is_text or kinds.is_integer(found) or kinds.is_floating(found) or kinds.is_decimal(found),
            "numbers",
        ),
        "categorical": (textual, "text"),
        "id": (textual or kinds.is_integer(found), "text"),
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


def _find_odd_ids(customers: pa.Array) -> np.ndarray:
    """Ids that are not short, printable ASCII, and so have to be looked at."""
    length = pc.binary_length(customers)
    plain = pc.and_(
        pc.ascii_is_printable(customers), pc.and_(pc.greater(length, 0), pc.less_equal(length, ID_LENGTH_MAX))
    )
    return ~_to_mask(plain.fill_null(True))  # a row may be without a customer


def _to_mask(values: pa.Array) -> np.ndarray:
    return np.asarray(values.to_numpy(zero_copy_only=False))
