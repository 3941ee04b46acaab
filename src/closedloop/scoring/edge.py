"""A model for where nothing but numpy and ONNX Runtime is: a folder with one script, and its records brought home."""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from closedloop.contract import CONTRACT_FILE, MODEL_FILE, CategoricalFeature, ModelContract, digest_file
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.files import replace_folder, write_json
from closedloop.records import Prediction, digest_position, is_version, seal_id
from closedloop.rules import ID_LENGTH_MAX, find_code, read_object
from closedloop.serving.models import load_model
from closedloop.serving.slots.downloads import VersionSource, fetch_contract
from closedloop.serving.slots.slots import BUNDLED, Slot
from closedloop.store.predictions import Predictions

EDGE_FILE = "edge.json"
SCRIPTS = {"score.py": "scoring/edge_script.py", "rules.py": "rules.py"}
IMPORT_ROWS = 2_000
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_LENGTH_MAX)]


def export_edge(slot: Slot, output: Path, *, range_margin: float) -> dict[str, Any]:
    """Write a folder that scores on its own: model, contract, the script with the contract's rules, and ``edge.json``.

    Returns what ``edge.json`` holds: name and version of the model, and each file's size and digest.

    Parameters
    ----------
    slot
        The model.
    output
        A new folder: an old one may hold records that were not imported yet.
    range_margin
        As `closedloop.rules.FeatureRule` takes it.

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
        for name, module in SCRIPTS.items():
            (folder / name).write_bytes(files("closedloop").joinpath(module).read_bytes())
        export = {
            "model_name": model.contract.model_name,
            "model_version": model.version,
            "folder_sha256": model.folder_sha256,
            "range_margin": range_margin,
            "files": {
                name: {"bytes": (folder / name).stat().st_size, "sha256": digest_file(folder / name)}
                for name in (MODEL_FILE, CONTRACT_FILE, *SCRIPTS)
            },
        }
        write_json(folder / EDGE_FILE, export)
    return export


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
    model_file: Literal["model.onnx"] = "model.onnx"  # earlier scripts wrote it


class ImportResult(NamedTuple):
    """The result of importing a record file's lines: (line number, reason) of those refused."""

    stored: int
    duplicates: int
    refused: tuple[tuple[int, str], ...]


def import_records(
    path: Path, store: Predictions, registry: VersionSource, *, model_name: str, id_key: bytes
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
    """The contract that a version's records must keep: the store takes any row, and a check would fail on it later."""

    def __init__(self, registry: VersionSource) -> None:
        self._registry = registry
        self._known: dict[str, ModelContract | str] = {}

    def find_fault(self, record: EdgeRecord) -> str:
        """Why the record cannot be its version's, or nothing; of a model that is in no registry nothing is known."""
        version = record.model_version
        if version == BUNDLED:
            return ""
        if not is_version(version):
            return f"model_version: {version!r:.60} is no number of the registry"
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
            json.loads(line, object_pairs_hook=read_object)
        except (msgspec.MsgspecError, ValueError) as error:  # ValueError: not UTF-8, or a name that stands twice
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
                source="edge",
                predicted_at=record.predicted_at,
                features=record.features,
                score=record.score,
                decision=record.decision,
                latency_ms=record.latency_ms,
                customer_id=record.customer_id and find_code(record.customer_id),
            ),
        )
