"""Score JSON lines with numpy and ONNX Runtime alone: `closedloop edge export` writes this file as score.py.

    python score.py < requests.jsonl > answers.jsonl
    python score.py --input requests.jsonl --output answers.jsonl --records records.jsonl

A line in is a request with its features, as POST /predict takes it; the line out is its answer, or its error. A
prediction is appended to the record file before it is answered, and `closedloop edge import --records FILE` brings the
record file into the operations store, each prediction once however often it is imported. Nothing is scored before the
digests, the contract and its golden rows have held: otherwise there is a message, and exit status 1.
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import json
import math
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

CONTRACT_MAJOR = "1"
MODEL_FILE, QUANTISED_FILE = "model.onnx", "model.quantised.onnx"
CONTRACT_FILE, EDGE_FILE = "contract.json", "edge.json"
ID_LENGTH_MAX = 200
FIELDS = ("customer_id", "features", "request_id")


class UnusableModelError(Exception):
    """The folder does not hold what was exported."""


class RefusedLineError(Exception):
    """A line that is not scored; ``details`` are the rules it breaks, each with its field and value."""

    def __init__(self, code: str, message: str, details: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.code, self.message, self.details = code, message, details


class Request(NamedTuple):
    """A checked request: ``values`` as they are recorded, ``packed`` as the graph takes them."""

    request_id: str | None
    customer_id: str | None
    values: list[float | str | None]
    packed: list[float]


class EdgeModel:
    """An exported model, proved to be what was exported; ``quantised`` takes the smaller variant.

    Raises
    ------
    UnusableModelError
        If a digest, the contract's version or a golden row does not hold.
    """

    def __init__(self, folder: Path, *, quantised: bool = False) -> None:
        name = QUANTISED_FILE if quantised else MODEL_FILE
        try:
            self.export: dict[str, Any] = json.loads((folder / EDGE_FILE).read_bytes())
            if name not in self.export["files"]:
                raise UnusableModelError(f"{folder} has no {name}; {EDGE_FILE} says why")
            files = {file: (folder / file).read_bytes() for file in (CONTRACT_FILE, name)}
            for file, content in files.items():
                _require_digest(folder / file, content, self.export["files"][file]["sha256"])
            self.contract: dict[str, Any] = json.loads(files[CONTRACT_FILE])
            if not quantised:
                _require_digest(folder / name, files[name], self.contract["model_sha256"])
        except OSError as error:
            raise UnusableModelError(f"{error.filename}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UnusableModelError(f"{folder}: {EDGE_FILE} or {CONTRACT_FILE} is damaged ({error})") from error
        version = str(self.contract["contract_version"])
        if version.split(".")[0] != CONTRACT_MAJOR:
            raise UnusableModelError(f"contract_version is {version}, this script reads {CONTRACT_MAJOR}.x")
        self._session = _open_session(files[name])
        self._features = [_describe(feature, self.export["range_margin"]) for feature in self.contract["features"]]
        self._check_golden_rows(self.export["files"][name]["golden_tolerance"])

    def _check_golden_rows(self, tolerance: float) -> None:
        for number, golden in enumerate(self.contract["golden_rows"]):
            packed = [feature.pack(golden["features"][feature.name]) for feature in self._features]
            score = self.score(packed)
            if not abs(score - golden["score"]) <= tolerance:
                raise UnusableModelError(
                    f"golden rows: row {number} scores {score:.7f}, the contract says {golden['score']:.7f}"
                )
        if not self.contract["golden_rows"]:
            raise UnusableModelError("golden rows: the contract has none, so the model cannot be proved")

    def score(self, packed: list[float]) -> float:
        """The probability of churn."""
        matrix = np.array([packed], dtype=np.float32)
        score = float(self._session.run(["probability"], {"features": matrix})[0][0])
        if not 0 <= score <= 1:
            raise UnusableModelError(f"the model gives {score}, which is no probability")
        return score

    def check(self, line: bytes) -> Request:
        """A line as a request.

        Raises
        ------
        RefusedLineError
            With every rule that it breaks.
        """
        try:
            body = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            details = [_breach("", None, f"JSON in UTF-8 ({str(error)[:120]})")]
            raise RefusedLineError("invalid_json", "the line is not JSON", details) from None
        if type(body) is not dict:
            details = [_breach("", body, "object")]
            raise RefusedLineError("invalid_request", "a JSON object is expected", details)
        unknown = sorted(body.keys() - FIELDS)[:20]
        details = [_breach(name[:80], body[name], "is not known") for name in unknown]
        request_id = _take_id("request_id", body.get("request_id"), details)
        customer_id = _take_id("customer_id", body.get("customer_id"), details)
        values, packed = self._take_features(body.get("features"), details)
        if details:
            raise RefusedLineError("invalid_request", f"{len(details)} rules are broken", details)
        return Request(request_id, customer_id, values, packed)

    def _take_features(self, found: Any, details: list[dict[str, Any]]) -> tuple[list[float | str | None], list[float]]:
        values: list[float | str | None] = []
        packed: list[float] = []
        if type(found) is not dict:
            details.append(_breach("features", found, "object"))
            return values, packed
        for feature in self._features:
            field = f"features.{feature.name}"
            if feature.name not in found:
                details.append(_breach(field, None, "is required; null where it is unknown"))
                continue
            value = found[feature.name]
            rule = feature.find_broken_rule(value)
            if rule:
                details.append(_breach(field, value, rule))
                continue
            values.append(value if value is None or isinstance(value, str) else float(value))
            packed.append(feature.pack(value))
        known = {feature.name for feature in self._features}
        unknown = sorted(found.keys() - known)[:20]
        details.extend(_breach(f"features.{name[:80]}", found[name], "is not known") for name in unknown)
        return values, packed


class Number(NamedTuple):
    """A numeric feature, and the range that is accepted."""

    name: str
    low: float
    high: float
    nullable: bool

    def pack(self, value: Any) -> float:
        """As the graph takes it."""
        return math.nan if value is None else float(value)

    def find_broken_rule(self, value: Any) -> str:
        """The rule that a value breaks, or nothing."""
        if value is None and self.nullable:
            return ""
        if type(value) is not float and type(value) is not int:
            return "number or null" if self.nullable else "number"
        return "" if self.low <= value <= self.high else f"from {self.low:g} to {self.high:g}"


class Category(NamedTuple):
    """A categorical feature, and the code of each category."""

    name: str
    codes: dict[str, int]
    nullable: bool

    def pack(self, value: Any) -> float:
        """As the graph takes it: what is missing or unknown is -1."""
        return float(self.codes.get(value, -1))

    def find_broken_rule(self, value: Any) -> str:
        """The rule that a value breaks, or nothing."""
        if (value is None and self.nullable) or (type(value) is str and value in self.codes):
            return ""
        return f"one of {', '.join(list(self.codes)[:20])}" + (" or null" if self.nullable else "")


def _describe(feature: dict[str, Any], range_margin: float) -> Number | Category:
    """A feature of the contract with the rule that the service applies to it."""
    name, nullable = feature["name"], feature["nullable"]
    if feature["kind"] == "categorical":
        return Category(name, {category: code for code, category in enumerate(feature["categories"])}, nullable)
    minimum, maximum = feature["minimum"], feature["maximum"]
    if minimum is None or maximum is None:
        return Number(name, -3e38, 3e38, nullable)
    width = range_margin * max(maximum - minimum, 1.0)
    low = minimum - width
    low = max(low, 0.0) if minimum >= 0 else max(low, -3e38)
    return Number(name, low, min(maximum + width, 3e38), nullable)


def _open_session(model: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no public base class
        raise UnusableModelError(f"ONNX Runtime cannot load the model ({error})") from error


def _require_digest(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UnusableModelError(f"{path}: its SHA-256 is {found[:12]}..., exported was {expected[:12]}...")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _take_id(name: str, value: Any, details: list[dict[str, Any]]) -> str | None:
    if value is None or (type(value) is str and 0 < len(value) <= ID_LENGTH_MAX and value.isprintable()):
        return value
    details.append(_breach(name, value, f"a text of 1 to {ID_LENGTH_MAX} printable characters"))
    return None


def _breach(field: str, value: Any, rule: str) -> dict[str, Any]:
    """A broken rule, with what was found in at most 80 characters."""
    if isinstance(value, float):
        value = value if math.isfinite(value) else None
    elif isinstance(value, int) and not isinstance(value, bool):
        value = value if abs(value) < 2**53 else str(value)[:80]
    elif isinstance(value, str):
        value = value[:80]
    elif isinstance(value, (dict, list)):
        value = "object" if isinstance(value, dict) else "array"
    return {"field": field, "value": value, "rule": rule}


class Recorder:
    """Appends predictions to the record file; ``stream`` is this run's name, and with a line's number its position."""

    def __init__(self, path: Path) -> None:
        self.stream = os.urandom(16).hex()
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")  # a line that a power cut has torn must not spoil the next one

    def append(self, record: dict[str, Any]) -> None:
        """Hand a record to the kernel."""
        left = json.dumps(record, allow_nan=False).encode() + b"\n"
        while left:
            left = left[os.write(self._file, left) :]

    def close(self) -> None:
        """Wait until the disk has it all."""
        os.fsync(self._file)
        os.close(self._file)


def answer_line(model: EdgeModel, recorder: Recorder, number: int, line: bytes) -> dict[str, Any]:
    """Check, score, record, answer."""
    start = time.perf_counter()
    try:
        request = model.check(line)
    except RefusedLineError as refused:
        return {"line": number, "error": {"code": refused.code, "message": refused.message, "details": refused.details}}
    score = model.score(request.packed)
    record = {
        "stream": recorder.stream,
        "line": number,
        "request_id": request.request_id or f"edge-{recorder.stream}-{number}",
        "customer_id": request.customer_id,
        "predicted_at": dt.datetime.now(dt.UTC).isoformat(),
        "model_name": model.contract["model_name"],
        "model_version": model.export["model_version"],
        "features": request.values,
        "score": score,
        "decision": int(score >= model.contract["threshold"]),
        "latency_ms": (time.perf_counter() - start) * 1e3,
    }
    recorder.append(record)
    return {
        "line": number,
        "prediction": record["decision"],
        "probability": score,
        "model_version": record["model_version"],
        "record_id": name_record(recorder.stream, number),
        "request_id": record["request_id"],
        "latency_ms": record["latency_ms"],
    }


def name_record(stream: str, number: int) -> str:
    """The first 32 digits of the prediction id that the import gives: only the service has the key to the others."""
    position = "\x1f".join(("edge", stream, str(number)))
    return hashlib.blake2b(position.encode(), digest_size=16).hexdigest()


def main() -> int:
    """Answer every line; 1 if the model or a file cannot be used."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=here, help="what was exported (default: beside this script)")
    parser.add_argument("--input", type=Path, help="JSON lines (default: standard input)")
    parser.add_argument("--output", type=Path, help="JSON lines (default: standard output)")
    parser.add_argument("--records", type=Path, default=here / "records.jsonl", help="appended to")
    parser.add_argument("--quantised", action="store_true", help="the quantised variant, if there is one")
    arguments = parser.parse_args()
    try:
        model = EdgeModel(arguments.folder, quantised=arguments.quantised)
        recorder = Recorder(arguments.records)
        with ExitStack() as stack:
            reader = stack.enter_context(arguments.input.open("rb")) if arguments.input else sys.stdin.buffer
            writer = stack.enter_context(arguments.output.open("wb")) if arguments.output else sys.stdout.buffer
            for number, line in enumerate(reader, 1):
                answer = answer_line(model, recorder, number, line)
                writer.write(json.dumps(answer, allow_nan=False).encode() + b"\n")
                writer.flush()
        recorder.close()
    except (UnusableModelError, OSError) as error:
        print(f"score.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
