"""Chunks of a file scored on a cluster: its machines read them, and check and score as this one would."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from closedloop.contract import CONTRACT_FILE, MODEL_FILE, REFERENCE_FILE
from closedloop.errors import DataError
from closedloop.records import Prediction
from closedloop.scoring.batch import BatchOptions, open_file, open_scorer
from closedloop.scoring.chunks import ChunkScorer, FinishedChunk
from closedloop.serving.models import LoadedModel, load_model
from closedloop.tabular.rows import RowFile, decode_part, encode_part

if TYPE_CHECKING:
    from closedloop.adapters.spark import SparkEngine

ChunkAnswer = tuple[bytes, list[list[Prediction]]]


@dataclass(frozen=True, eq=False)
class RemoteJob:
    """A batch as a machine needs it: the input, the files of the model, and how to score; sent once to each."""

    path: Path
    size: int
    files: dict[str, bytes]
    version: str
    folder_sha256: str
    options: BatchOptions
    input_sha256: str
    logs: bool


def spread_chunks(
    engine: SparkEngine, path: Path, model: LoadedModel, options: BatchOptions, input_sha256: str
) -> Callable[[int], FinishedChunk | None]:
    """Return a function that has the chunk of a number scored on the cluster; None is a chunk after the file's end."""
    names = (MODEL_FILE, CONTRACT_FILE, REFERENCE_FILE)
    files = {name: (model.path.parent / name).read_bytes() for name in names}
    there = replace(options, store=None, spread=None)
    logs = options.store is not None
    path = path.resolve()
    job = RemoteJob(path, path.stat().st_size, files, model.version, model.folder_sha256, there, input_sha256, logs)
    call = engine.spread(score_chunk, job)

    def score(number: int) -> FinishedChunk | None:
        part, predictions = msgspec.msgpack.decode(call(number), type=ChunkAnswer)
        return FinishedChunk(decode_part(part), predictions) if part else None

    return score


def score_chunk(job: RemoteJob, number: int) -> bytes:
    """Score a chunk, on the machine that this runs on.

    Raises
    ------
    DataError
        If the file here is missing or another, or the model does not score as it did when it was trained.
    """
    rows, scorer = _open(job)
    skip = number * job.options.chunk_rows
    table = next(rows.read_chunks(scorer.columns, job.options.chunk_rows, skip), None)
    if table is None:
        return msgspec.msgpack.encode((b"", []))
    found = scorer.finish(skip + 1, table, logs=job.logs)
    return msgspec.msgpack.encode((encode_part(found.part), list(found.predictions)))


@lru_cache(maxsize=1)
def _open(job: RemoteJob) -> tuple[RowFile, ChunkScorer]:
    """Open file and model, once a process: a job is sent to it once, and is the same object for all its chunks."""
    if not job.path.is_file() or job.path.stat().st_size != job.size:
        raise DataError(f"{job.path}: is missing or another on a machine of the cluster; all must see the same file")
    with tempfile.TemporaryDirectory(prefix="closedloop-model-") as made:
        for name, content in job.files.items():
            (Path(made) / name).write_bytes(content)
        model = load_model(Path(made), version=job.version, folder_sha256=job.folder_sha256)
        if job.options.reasons:
            _ = model.explainer  # while its files are there
    rows = open_file(job.path, model, job.options)
    return rows, open_scorer(rows, model, job.options, job.input_sha256)
