"""Scoring a file or table of any size: in chunks, on some threads, resumable, with the service's checks and decisions.

What is finished stands in a work folder, a part a chunk: its predictions are logged first, then the part gets its
name. Parts are joined in their order, so that a run that was killed and resumed writes the same bytes as one that was
not. Tables are files on the way: an input table is copied first, and an output table is filled last.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.adapters.fsspec import put_file, require_storage
from closedloop.config.sources import DataSource
from closedloop.contract import NumericFeature, digest_file
from closedloop.errors import ConfigError, DataError, count_noun
from closedloop.records import Prediction, seal_id
from closedloop.scoring.chunks import DATE_COLUMN, ID_COLUMN, ROW_COLUMN, ChunkScorer, FinishedChunk
from closedloop.scoring.columns import CUSTOMER_COLUMN, ColumnChecker, describe_columns
from closedloop.scoring.jobs import Job, open_work, require_same_job
from closedloop.scoring.reasons import describe_reasons
from closedloop.serving.clock import WALL_CLOCK
from closedloop.serving.models import LoadedModel, load_model
from closedloop.serving.slots.slots import Slot
from closedloop.store.predictions import Predictions
from closedloop.tabular.row_tables import RowTable, find_table, insert_rows, read_rows, require_table
from closedloop.tabular.rows import (
    RowFile,
    RowWriter,
    open_rows,
    read_part,
    require_file,
    require_suffix,
    write_part,
    write_rows,
)

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)
OBJECT_START = "s3://"
CHUNK_ROWS, TABLE_ROWS = 20_000, 5_000
REJECTED_SHARE_MAX = 0.01
OUTPUT_TYPES = {CUSTOMER_COLUMN: str, ROW_COLUMN: int, "score": float, "decision": int, "model_version": str}
OUTPUT_TYPES |= {ID_COLUMN: str, DATE_COLUMN: dt.date}
PLAIN_COLUMNS = (CUSTOMER_COLUMN, ROW_COLUMN, "score", ID_COLUMN)  # of values that hardly repeat


@dataclass(frozen=True)
class BatchOptions:
    """How to score.

    ``range_margin`` and ``id_key`` are the service's, ``store`` None logs nothing; ``id_column`` has the customers' ids
    in the data set's own files; ``threads`` score at once; a run is stopped when more than ``rejected_share_max`` of
    its rows break the contract; ``clock`` gives the time of a prediction; ``reasons`` is how many each score has.
    A file may be written as the data set's ``source``, with names as before ``rename``. ``as_of`` is a date that the
    output has in a column; a table's earlier rows of that date are replaced. ``spread`` is what a cluster scores
    chunks with, ``threads`` at a time (`closedloop.scoring.remote`); None: they are scored here.
    """

    range_margin: float
    id_key: bytes
    store: Predictions | None = None
    id_column: str = CUSTOMER_COLUMN
    chunk_rows: int = CHUNK_ROWS
    threads: int = 2
    resume: bool = False
    rejected_share_max: float = REJECTED_SHARE_MAX
    show_progress: bool = False
    clock: Callable[[], dt.datetime] = WALL_CLOCK
    reasons: int = 0
    source: DataSource | None = None
    rename: Mapping[str, str] = field(default_factory=dict)
    as_of: dt.date | None = None
    spread: Spread | None = None


# from the input's path, model, options and the input's digest: a function that scores the chunk of a number
Spread = Callable[[Path, LoadedModel, BatchOptions, str], Callable[[int], FinishedChunk | None]]


@dataclass(frozen=True)
class BatchResult:
    """Rows read, scored and rejected, how many of them an earlier run had finished; ``rejects`` is None if all held."""

    rows: int
    scored: int
    rejected: int
    resumed: int
    rejects: Path | None


def score_batch(source: str, target: str, slot: Slot, options: BatchOptions, *, state_dir: Path) -> BatchResult:
    """Score a file or table into a file, an object of S3 or a table, which is there whole or not at all.

    The output has ``customer_id`` where the input has ids, else ``row`` (its number in the input, from 1), ``score``,
    ``decision``, ``model_version``, ``prediction_id`` and the columns of `describe_reasons`. Rows that break the
    contract are not in it: they stand in a file ``*.rejects.jsonl`` beside the output (of a table or an object: in
    ``state_dir``), a line for each broken rule.

    Parameters
    ----------
    source, target
        Paths of Parquet or CSV files, or tables as `find_table` reads them; ``target`` may be an address s3://.
    slot
        The model.
    state_dir
        The service's state folder.

    Raises
    ------
    ConfigError
        If an argument is wrong, or a run is resumed whose input or model was another.
    DataError
        If the input cannot be read, lacks a column, or too many of its rows break the contract.
    ServiceUnavailable
        If a database cannot be reached, or another process writes the same output. Resume it later.
    """
    source_table, target_table = find_table(source), find_table(target)
    work_dir, output, rejects = _choose_places(target, target_table, state_dir)
    if source_table is None and not Path(source).is_file():
        raise DataError(f"--input {source}: there is no such file; a table is named ADDRESS#TABLE")
    if output.resolve() == Path(source).resolve():
        raise ConfigError(f"--output {target}: is the input")
    model = load_model(Path(slot.folder), version=slot.version, folder_sha256=slot.folder_sha256 or None)
    if options.reasons:
        _ = model.explainer  # before anything is written: a version may give none
    fixed = [name for name in _list_types(options) if name not in (CUSTOMER_COLUMN, ROW_COLUMN)]
    if target_table is not None:
        require_table(target_table, fixed, ID_COLUMN)
    with open_work(work_dir, resume=options.resume):
        if source_table is not None:
            path = work_dir / f"{_name(source_table.place)}.parquet"
            _copy_table(source_table, path, model, options.id_column)
            rows = RowFile(path)
        else:
            rows = open_file(Path(source), model, options)
        run = _Run(rows, model, options, work_dir)
        if target_table is not None:  # again: by now it is known whether customers or row numbers come
            require_table(target_table, run.columns, ID_COLUMN)
        result = run.write(output, rejects)
        if target_table is not None:
            _fill_table(target_table, output, _list_types(options), options.as_of)
        elif target.startswith(OBJECT_START):
            put_file(output, target)
    return result


def _list_types(options: BatchOptions) -> dict[str, type]:
    """The columns that an output may have, and what they hold."""
    kinds = OUTPUT_TYPES | describe_reasons(options.reasons)
    return {name: kind for name, kind in kinds.items() if name != DATE_COLUMN or options.as_of is not None}


def _choose_places(target: str, table: RowTable | None, state_dir: Path) -> tuple[Path, Path, Path]:
    """The work folder, the output file and that of the rejects: of what is no file here, below ``state_dir``."""
    if table is None and not target.startswith(OBJECT_START):
        output = require_file(target)
        return output.parent / f".{output.name}.batch", output, output.with_suffix(".rejects.jsonl")
    if table is None:
        require_storage(target)
    output = Path(target) if table is None else Path("output.parquet")
    require_suffix(output)
    work_dir = state_dir / "batch" / _name(target if table is None else table.place)
    return work_dir, work_dir / f"output{output.suffix}", work_dir.with_suffix(".rejects.jsonl")


class _Run:
    """One run over one file."""

    def __init__(self, source: RowFile, model: LoadedModel, options: BatchOptions, work_dir: Path) -> None:
        self._source, self._options, self._work_dir = source, options, work_dir
        job = Job(
            input_sha256=digest_file(source.path),
            model_sha256=model.folder_sha256,
            model_version=model.version,
            chunk_rows=options.chunk_rows,
            range_margin=options.range_margin,
            key=seal_id("batch", options.id_key),
            id_column=options.id_column,
            prediction_log="" if options.store is None else options.store.database.name,
            reasons=options.reasons,
            as_of=options.as_of,
        )
        self._scorer = open_scorer(source, model, options, job.input_sha256)
        if self._scorer.ignored:
            logger.info("columns that the model does not take: %s", ", ".join(self._scorer.ignored))
        require_same_job(work_dir / "job.json", job)
        spread = options.spread
        self._score_there = None if spread is None else spread(source.path, model, options, job.input_sha256)
        self._rows = self._scored = self._resumed = 0

    @property
    def columns(self) -> list[str]:
        """Of the output."""
        return list(self._scorer.schema.names)

    def write(self, output: Path, rejects: Path) -> BatchResult:
        """Score what is not scored yet, and put output and rejects in place."""
        beside, rejects_beside = self._work_dir / "output", self._work_dir / "rejects"
        writer = RowWriter(beside, self._scorer.schema, suffix=output.suffix, plain=PLAIN_COLUMNS)
        first = b""
        with (
            closing(writer),
            closing(self._score_parts()) as parts,
            rejects_beside.open("wb") as lines,
            _show_rows(self._source.rows_max, show=self._options.show_progress) as show,
        ):
            for part in parts:
                found = part.schema.metadata
                lines.write(found[b"rejects"])
                first = first or found[b"rejects"].partition(b"\n")[0]
                self._rows += int(found[b"rows"])
                self._scored += part.num_rows
                if self._rows - self._scored > self._options.rejected_share_max * self._source.rows_max:
                    break  # it would be too many whatever is still to come
                writer.write(part.replace_schema_metadata(None))
                show(self._rows)
        rejected = self._rows - self._scored
        if rejected:
            rejects_beside.replace(rejects)
        else:
            rejects.unlink(missing_ok=True)
        if rejected > self._options.rejected_share_max * self._rows:
            raise DataError(
                f"{self._source.path}: {rejected:,} of the {count_noun(self._rows, 'row')} read break the contract, "
                f"allowed is a share of {self._options.rejected_share_max:g}; the first: {first.decode()}; "
                f"all of them: {rejects}"
            )
        beside.replace(output)
        return BatchResult(self._rows, self._scored, rejected, self._resumed, rejects if rejected else None)

    def _score_parts(self) -> Generator[pa.Table]:
        """The parts in order; each of them is logged and on disk."""
        waiting: deque[tuple[Path, Future[FinishedChunk | None] | None]] = deque()
        pool = ThreadPoolExecutor(self._options.threads, thread_name_prefix="score")
        try:
            for number, score in enumerate(self._list_chunks()):
                path = self._work_dir / f"{number:08d}.part"
                waiting.append((path, None if path.exists() else pool.submit(score)))
                if len(waiting) > self._options.threads + 1:
                    yield from self._finish(*waiting.popleft())
            while waiting:
                yield from self._finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _list_chunks(self) -> Iterator[Callable[[], FinishedChunk | None]]:
        """One function a chunk: it scores rows that were read here, or on a cluster, whose machines read them."""
        chunk_rows, logs = self._options.chunk_rows, self._options.store is not None
        if self._score_there is not None:
            for number in range(-(-self._source.rows_max // chunk_rows)):
                yield partial(self._score_there, number)
            return
        first_row = 1
        for rows in self._source.read_chunks(self._scorer.columns, chunk_rows):
            yield partial(self._scorer.finish, first_row, rows, logs=logs)
            first_row += rows.num_rows

    def _finish(self, path: Path, future: Future[FinishedChunk | None] | None) -> Iterator[pa.Table]:
        """Log a chunk and give its part its name, unless an earlier run did; there is none after a file's end."""
        if future is None:
            part = read_part(path)
            self._resumed += int(part.schema.metadata[b"rows"])
            yield part
        elif (chunk := future.result()) is not None:
            for predictions in chunk.predictions:
                self._log(predictions)
            beside = path.with_suffix(".partial")
            write_part(beside, chunk.part)
            beside.replace(path)
            yield chunk.part

    def _log(self, predictions: list[Prediction]) -> None:
        assert self._options.store is not None  # noqa: S101 - nothing else asks for predictions
        refused = self._options.store.insert(predictions).refused
        if refused:
            raise DataError(f"the operations store refuses prediction {refused[0][0]}: {refused[0][1]}")


def open_scorer(source: RowFile, model: LoadedModel, options: BatchOptions, input_sha256: str) -> ChunkScorer:
    """Open the scorer that checks and scores a file's chunks.

    Raises
    ------
    DataError
        If the file lacks a column that the model takes, or one has another type.
    """
    checker = ColumnChecker(
        model.contract,
        options.range_margin,
        source.schema,
        is_text=source.is_text,
        place=str(source.path),
        id_column=options.id_column,
    )
    return ChunkScorer(
        model,
        checker,
        input_sha256=input_sha256,
        id_key=options.id_key,
        clock=options.clock,
        reasons=options.reasons,
        as_of=options.as_of,
    )


def _name(place: str) -> str:
    """A file name for a table or an object, whatever characters its own has."""
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def open_file(path: Path, model: LoadedModel, options: BatchOptions) -> RowFile:
    """The rows to score, as the data set's own file where they are written so."""
    features = model.contract.features
    numeric = [one.name for one in features if isinstance(one, NumericFeature)]
    needed = model.contract.feature_names
    return open_rows(path, options.source, options.rename, needed=needed, numeric=numeric)


def _copy_table(table: RowTable, path: Path, model: LoadedModel, id_column: str) -> None:
    """Copy the rows of a table, unless an earlier run did."""
    if path.exists():
        return
    kinds = describe_columns(model.contract, id_column)
    required = model.contract.feature_names
    names, chunks = read_rows(table, required, [name for name in kinds if name not in required])
    write_rows(path, {name: kinds[name] for name in names}, chunks, place=table.place)


def _fill_table(table: RowTable, path: Path, types: Mapping[str, type], as_of: dt.date | None) -> None:
    """Insert what is not in the table yet; rows of a date take the place of its earlier ones."""
    file = RowFile(path)
    columns = {name: types[name] for name in file.schema.names}
    chunks = (rows.to_pylist() for rows in file.read_chunks(list(columns), TABLE_ROWS))
    insert_rows(table, columns, ID_COLUMN, chunks, replaced=None if as_of is None else {DATE_COLUMN: as_of})


@contextmanager
def _show_rows(total: int, *, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar; its function takes how many rows are done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not show) as bar:
        task = bar.add_task(f"score {count_noun(total, 'row')}", total=total)
        yield lambda rows: bar.update(task, completed=rows)
