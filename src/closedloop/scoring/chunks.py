"""A chunk of a batch: checked, scored, sealed, and what is logged of it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from closedloop.errors import DataError
from closedloop.records import BODY_DIGITS, SEAL_DIGITS, Prediction
from closedloop.scoring.columns import CUSTOMER_COLUMN, CheckedRows, ColumnChecker
from closedloop.scoring.reasons import describe_reasons, list_reasons
from closedloop.serving.models import LoadedModel

SCORE_TOLERANCE = 1e-6  # what a row's score may differ by among many rows and alone
LOG_ROWS = 2_000
ROW_COLUMN, ID_COLUMN, DATE_COLUMN = "row", "prediction_id", "as_of"


class ScoredChunk(NamedTuple):
    """``table`` holds the good rows' scores, ``rejects`` a line of JSON for each rule that one of the others breaks.

    ``first_row`` is the number of its first row in the input, from 1; ``seconds`` is how long it took.
    """

    first_row: int
    rows: int
    table: pa.Table
    rejects: bytes
    checked: CheckedRows
    seconds: float


class FinishedChunk(NamedTuple):
    """The result of a chunk: the part that is kept, with its rows and rejects, and what is logged of it."""

    part: pa.Table
    predictions: Iterable[list[Prediction]]


class ChunkScorer:
    """Scores the chunks of one input with one model, from any number of threads at once.

    Parameters
    ----------
    input_sha256
        Of the input: with the model's digest and a row's number it makes that row's prediction id.
    id_key
        Seals prediction ids.
    clock
        The time of a prediction.
    reasons
        How many reasons each score has.
    as_of
        A date that stands in a column beside each score; None: no such column.
    """

    def __init__(
        self,
        model: LoadedModel,
        checker: ColumnChecker,
        *,
        input_sha256: str,
        id_key: bytes,
        clock: Callable[[], dt.datetime],
        reasons: int = 0,
        as_of: dt.date | None = None,
    ) -> None:
        self._model, self._checker, self._id_key, self._clock = model, checker, id_key, clock
        self._reasons, self._as_of = reasons, as_of
        self._input_sha256 = input_sha256
        self.columns, self.ignored = checker.columns, checker.ignored
        key = (CUSTOMER_COLUMN, pa.string()) if checker.id_column is not None else (ROW_COLUMN, pa.int64())
        others = [("score", pa.float64()), ("decision", pa.int8()), ("model_version", pa.string())]
        types = {str: pa.string(), float: pa.float64()}
        added = [(name, types[kind]) for name, kind in describe_reasons(reasons).items()]
        dates = [] if as_of is None else [(DATE_COLUMN, pa.date32())]
        self.schema = pa.schema([key, *others, (ID_COLUMN, pa.string()), *dates, *added])

    def score(self, first_row: int, table: pa.Table) -> ScoredChunk:
        """Check and score rows; a customer is named by ``customer_id``, where there is none a row by its number.

        Raises
        ------
        DataError
            If the model gives no probability, which its golden rows should have shown.
        """
        start = time.perf_counter()
        checked = self._checker.check(table)
        scores, decisions = self._score(checked.matrix)
        rows = checked.kept + first_row
        for place in np.flatnonzero(~((scores >= 0) & (scores <= 1)))[:1]:
            raise DataError(f"row {rows[place]}: the model gives {scores[place]}, which is no probability")
        ids = seal_rows(("batch", self._input_sha256, self._model.folder_sha256), rows.tolist(), self._id_key)
        key = pa.array(rows) if checked.customers is None else checked.customers
        version = pa.repeat(self._model.version, len(ids))
        seconds = time.perf_counter() - start  # of a score: reasons are no part of it
        added = [] if self._as_of is None else [pa.repeat(pa.scalar(self._as_of), len(ids))]
        added += list_reasons(self._model, checked, self._reasons) if self._reasons else []
        scored = pa.Table.from_arrays(
            [key, pa.array(scores), pa.array(decisions), version, pa.array(ids, pa.string()), *added],
            schema=self.schema,
        )
        lines = [
            msgspec.json.encode({"row": first_row + place, **dataclasses.asdict(breach)}) + b"\n"
            for place, breach in checked.breaches
        ]
        return ScoredChunk(first_row, table.num_rows, scored, b"".join(lines), checked, seconds)

    def _score(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores (float64) and decisions (int8), shape (n,) each, of packed rows.

        Among many rows a score may differ from that of a lone request in its last digits: where that could turn the
        decision, the row is scored as the service does.
        """
        threshold = self._model.contract.threshold
        scores = self._model.scorer.score(matrix)
        for row in np.flatnonzero(np.abs(scores - threshold) <= SCORE_TOLERANCE):
            scores[row] = self._model.scorer.score(matrix[row : row + 1])[0]
        return scores, (scores >= threshold).astype(np.int8)

    def finish(self, first_row: int, table: pa.Table, *, logs: bool) -> FinishedChunk:
        """As `score`, ready to be written; with ``logs`` its predictions, built when they are asked for."""
        chunk = self.score(first_row, table)
        part = chunk.table.replace_schema_metadata({"rows": str(chunk.rows), "rejects": chunk.rejects})
        return FinishedChunk(part, self.list_predictions(chunk) if logs else ())

    def list_predictions(self, chunk: ScoredChunk) -> Iterator[list[Prediction]]:
        """The log records of a chunk, some at a time; a row's share of its seconds is the latency."""
        moment = self._clock()
        checked = chunk.checked
        for start in range(0, chunk.table.num_rows, LOG_ROWS):
            some = chunk.table.slice(start, LOG_ROWS)
            stop = start + some.num_rows
            nobody = [None] * some.num_rows
            customers = nobody if checked.customers is None else checked.customers[start:stop].to_pylist()
            times = nobody if checked.times is None else checked.times[start:stop].to_pylist()
            yield [
                Prediction(
                    prediction_id=prediction_id,
                    request_id=f"batch-{self._input_sha256[:16]}-{chunk.first_row + place}",
                    model_name=self._model.contract.model_name,
                    model_version=self._model.version,
                    variant="champion",
                    source="batch",
                    predicted_at=moment,
                    features=values,
                    score=score,
                    decision=decision,
                    latency_ms=chunk.seconds * 1e3 / chunk.rows,
                    customer_id=customer,
                    features_as_of=as_of,
                )
                for prediction_id, place, values, score, decision, customer, as_of in zip(
                    some[ID_COLUMN].to_pylist(),
                    checked.kept[start:stop].tolist(),
                    checked.list_values(start, stop),
                    some["score"].to_pylist(),
                    some["decision"].to_pylist(),
                    customers,
                    times,
                    strict=True,
                )
            ]


def seal_rows(position: tuple[str, ...], rows: Iterable[int], key: bytes) -> list[str]:
    """``seal_id(digest_position(*position, row), key)`` of each row, in half the time: hashes are begun only once."""
    text = "".join(f"{part}\x1f" for part in position)
    begin_body = hashlib.blake2b(text.encode(), digest_size=BODY_DIGITS // 2).copy
    begin_seal = hashlib.blake2b(key=key, digest_size=SEAL_DIGITS // 2).copy
    ids = []
    for row in rows:
        hashed = begin_body()
        hashed.update(b"%d" % row)
        body = hashed.hexdigest()
        seal = begin_seal()
        seal.update(body.encode())
        ids.append(body + seal.hexdigest())
    return ids
