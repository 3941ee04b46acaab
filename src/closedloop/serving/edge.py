"""A model for where nothing but numpy and ONNX Runtime is: a folder with one script, and its records brought home."""

from __future__ import annotations

import datetime as dt
import shutil
import statistics
import time
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import pyarrow.parquet as pq

from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.adapters.quantisation import quantise_model
from closedloop.adapters.store import Store
from closedloop.contract import (
    CONTRACT_FILE,
    MODEL_FILE,
    REFERENCE_FILE,
    CategoricalFeature,
    ModelContract,
    digest_file,
    encode_row,
)
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.files import replace_folder, write_json
from closedloop.records import Prediction, digest_position, seal_id
from closedloop.serving.downloads import VersionSource, fetch_contract
from closedloop.serving.models import GOLDEN_TOLERANCE, LoadedModel, load_model
from closedloop.serving.requests import ID_LENGTH_MAX
from closedloop.serving.slots import BUNDLED, Slot

SCRIPT_FILE, EDGE_FILE, QUANTISED_FILE = "score.py", "edge.json", "model.quantised.onnx"
SCORE_DIFFERENCE_MAX, DECISIONS_DIFFERENT_MAX = 0.01, 0.005  # what a quantised variant may cost
LATENCY_ROWS = 200
IMPORT_ROWS = 2_000
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_LENGTH_MAX)]


def export_edge(slot: Slot, output: Path, *, range_margin: float) -> dict[str, Any]:
    """Write a folder that scores on its own: model, contract, script, and ``edge.json``, which is also returned.

    A dynamically quantised variant is in it if it changes anything and passes parity on the reference rows: no score
    may differ by more than 0.01, and at most .5% of the decisions. ``edge.json`` has digests, and of both variants
    size and the median latency of a single row, whether or not the quantised one was kept.

    Parameters
    ----------
    slot
        The model.
    output
        A new folder: an old one may hold records that were not imported yet.
    range_margin
        As `RequestChecker` takes it.

    Raises
    ------
    ConfigError
        If the folder is there already and not empty.
    DataError
        If the model does not hold.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output}: exists; give a new folder")
    source = Path(slot.folder)
    model = load_model(source, version=slot.version, folder_sha256=slot.folder_sha256 or None)
    with replace_folder(output) as folder:
        for name in (MODEL_FILE, CONTRACT_FILE):
            shutil.copyfile(source / name, folder / name)
        script = files("closedloop").joinpath("edge_script.py").read_text(encoding="utf-8")
        (folder / SCRIPT_FILE).write_text(script, encoding="utf-8")
        quantised, milliseconds = _add_quantised(model, source, folder)
        described: dict[str, dict[str, Any]] = {
            CONTRACT_FILE: {},
            MODEL_FILE: {"golden_tolerance": GOLDEN_TOLERANCE, "single_row_ms": milliseconds},
        }
        if quantised["kept"]:
            described[QUANTISED_FILE] = {
                "golden_tolerance": SCORE_DIFFERENCE_MAX,
                "single_row_ms": quantised["single_row_ms"],
            }
        for name, values in described.items():
            values |= {"bytes": (folder / name).stat().st_size, "sha256": digest_file(folder / name)}
        export = {
            "model_name": model.contract.model_name,
            "model_version": model.version,
            "folder_sha256": model.folder_sha256,
            "range_margin": range_margin,
            "files": described,
            "quantised": quantised,
        }
        write_json(folder / EDGE_FILE, export)
    return export


def describe_export(export: dict[str, Any]) -> str:
    """Size and latency of both variants, and what became of the quantised one, in one line for people."""
    model, quantised = export["files"][MODEL_FILE], export["quantised"]
    sizes = [f"{one['bytes']:,} bytes, {one['single_row_ms']:.3f} ms a row" for one in (model, quantised)]
    verdict = "kept" if quantised["kept"] else "left out"
    return f"{MODEL_FILE} {sizes[0]}; quantised {sizes[1]}, {verdict}: {quantised['reason']}"


def _add_quantised(model: LoadedModel, source: Path, folder: Path) -> tuple[dict[str, Any], float]:
    """Make the quantised variant and keep it if it passes; what is said of it, and the model's own latency in ms."""
    path = folder / QUANTISED_FILE
    changed = quantise_model(source / MODEL_FILE, path)
    scorer = OnnxScorer(path)
    table = pq.read_table(source / REFERENCE_FILE, columns=list(model.contract.feature_names))
    features = model.contract.features
    matrix = np.concatenate([encode_row(features, row) for row in table.to_pylist()])
    # row by row, since a tensor's numbers share one scale
    after = np.array([scorer.score(matrix[place : place + 1])[0] for place in range(len(matrix))])
    before = model.scorer.score(matrix)
    difference = float(np.abs(before - after).max())
    threshold = model.contract.threshold
    different = float(np.mean((before >= threshold) != (after >= threshold)))
    if not changed:
        reason = "quantisation changes nothing: the model has no operator with weights that it knows, such as a product"
    elif difference > SCORE_DIFFERENCE_MAX:
        reason = f"a score differs by {difference:.4f}, allowed is {SCORE_DIFFERENCE_MAX}"
    elif different > DECISIONS_DIFFERENT_MAX:
        reason = f"a share of {different:.4f} of the decisions differs, allowed is {DECISIONS_DIFFERENT_MAX}"
    else:
        reason = ""
    milliseconds = _measure_latency(model, scorer)
    described = {
        "kept": not reason,
        "reason": reason or "it passed parity",
        "bytes": path.stat().st_size,
        "single_row_ms": milliseconds[1],
        "rows": len(matrix),
        "score_difference_max": difference,
        "score_difference_allowed": SCORE_DIFFERENCE_MAX,
        "decisions_different": different,
        "decisions_different_allowed": DECISIONS_DIFFERENT_MAX,
    }
    if reason:
        path.unlink()
    return described, milliseconds[0]


def _measure_latency(model: LoadedModel, other: OnnxScorer) -> tuple[float, float]:
    """Median milliseconds of a single row in both variants, which take turns, so that a busy moment hits both."""
    rows = [encode_row(model.contract.features, golden.features) for golden in model.contract.golden_rows]
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(LATENCY_ROWS):
        for scorer, taken in zip((model.scorer, other), seconds, strict=True):
            start = time.perf_counter()
            scorer.score(rows[number % len(rows)])
            taken.append(time.perf_counter() - start)
    first, second = (statistics.median(taken) * 1e3 for taken in seconds)
    return first, second


class EdgeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of a record file, as the script writes it."""

    stream: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
    line: Annotated[int, msgspec.Meta(ge=1)]
    request_id: Id
    customer_id: Id | None
    predicted_at: Annotated[dt.datetime, msgspec.Meta(tz=True)]
    model_name: str
    model_version: Id
    features: tuple[float | str | None, ...]
    score: Annotated[float, msgspec.Meta(ge=0, le=1)]
    decision: Literal[0, 1]
    latency_ms: Annotated[float, msgspec.Meta(ge=0)]
    model_file: Literal["model.onnx", "model.quantised.onnx"] = "model.onnx"


class ImportResult(NamedTuple):
    """What became of a record file's lines: (line number, reason) of those refused."""

    stored: int
    duplicates: int
    refused: tuple[tuple[int, str], ...]


def import_records(
    path: Path, store: Store, registry: VersionSource, *, model_name: str, id_key: bytes
) -> ImportResult:
    """Bring a record file into the operations store, under ids that follow from its lines' positions.

    What was imported before is not doubled, and a line that is damaged or of another model is refused on its own; so
    is the last one of a file whose writer lost power, and one whose features are not those of its version.

    Raises
    ------
    DataError
        If the file cannot be read.
    ServiceUnavailable
        If store or registry cannot be used: import the file again later.
    """
    contracts = _Contracts(registry)
    stored = duplicates = 0
    refused: list[tuple[int, str]] = []
    try:
        with path.open("rb") as stream:
            lines = _read_records(stream, model_name, id_key, contracts, refused)
            while batch := dict(islice(lines, IMPORT_ROWS)):
                result = store.insert(list(batch.values()))
                numbers = {record.prediction_id: number for number, record in batch.items()}
                refused += [(numbers[prediction_id], reason) for prediction_id, reason in result.refused]
                stored += result.predictions
                duplicates += result.duplicates
    except OSError as error:
        raise DataError(f"--records {path}: cannot be read ({error.strerror})") from error
    return ImportResult(stored, duplicates, tuple(sorted(refused)))


class _Contracts:
    """What each version's records must hold: the store takes any row, and a check would fail over it later."""

    def __init__(self, registry: VersionSource) -> None:
        self._registry = registry
        self._known: dict[str, ModelContract | str] = {}

    def find_fault(self, record: EdgeRecord) -> str:
        """Why the record cannot be its version's, or nothing; of a model that is in no registry nothing is known."""
        version = record.model_version
        if version == BUNDLED:
            return ""
        if version not in self._known:
            try:
                self._known[version] = fetch_contract(self._registry, version)
            except DataError as error:
                self._known[version] = str(error)
            except OSError as error:  # of this machine's, not of the record file
                raise ServiceUnavailable(f"the contract of version {version}: {error.strerror}") from error
        known = self._known[version]
        return known if isinstance(known, str) else _find_fault(record.features, known)


def _find_fault(values: tuple[float | str | None, ...], contract: ModelContract) -> str:
    if len(values) != len(contract.features):
        return f"features: there are {len(values)}, its version takes {len(contract.features)}"
    for feature, value in zip(contract.features, values, strict=True):
        text = isinstance(feature, CategoricalFeature)
        if not (feature.nullable if value is None else isinstance(value, str) == text):
            rule = f"{'text' if text else 'number'}{' or null' if feature.nullable else ''}"
            return f"features: {feature.name} is {value!r:.80}, allowed is {rule}"
    return ""


def _read_records(
    lines: Iterator[bytes],
    model_name: str,
    id_key: bytes,
    contracts: _Contracts,
    refused: list[tuple[int, str]],
) -> Iterator[tuple[int, Prediction]]:
    decode = msgspec.json.Decoder(EdgeRecord).decode
    for number, line in enumerate(lines, 1):
        try:
            record = decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            refused.append((number, "the line is torn" if not line.endswith(b"\n") else str(error)))
            continue
        if record.model_name != model_name:
            refused.append((number, f"it is of {record.model_name[:80]}, not of {model_name}"))
            continue
        if fault := contracts.find_fault(record):
            refused.append((number, fault))
            continue
        yield (
            number,
            Prediction(
                prediction_id=seal_id(digest_position("edge", record.stream, record.line), id_key),
                request_id=record.request_id,
                model_name=record.model_name,
                model_version=record.model_version,
                variant="champion",
                source="edge" if record.model_file == MODEL_FILE else "edge-quantised",
                predicted_at=record.predicted_at,
                features=record.features,
                score=record.score,
                decision=record.decision,
                latency_ms=record.latency_ms,
                customer_id=record.customer_id,
            ),
        )
