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

CONTRACT_MAJOR, ID_LENGTH_MAX = "1", 200
MODEL_FILE, QUANTISED_FILE = "model.onnx", "model.quantised.onnx"
CONTRACT_FILE, EDGE_FILE = "contract.json", "edge.json"
FIELDS = ("customer_id", "features", "request_id")


class UnusableModelError(Exception):
    """The folder does not hold what was exported."""


class RefusedLineError(Exception):
    """A line that is not scored; its argument is what is answered: code, message and the rules that it breaks."""

    def __init__(self, code: str, message: str, details: list[dict[str, Any]]) -> None:
        super().__init__({"code": code, "message": message, "details": details})


class EdgeModel:
    """An exported model, proved to be what was exported; ``quantised`` takes the smaller variant.

    Raises
    ------
    UnusableModelError
        If a digest, the contract's version or a golden row does not hold.
    """

    def __init__(self, folder: Path, *, quantised: bool = False) -> None:
        self.file = name = QUANTISED_FILE if quantised else MODEL_FILE
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
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(files[name], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no public base class
            raise UnusableModelError(f"ONNX Runtime cannot load the model ({error})") from error
        self._features = [_describe(feature, self.export["range_margin"]) for feature in self.contract["features"]]
        self._check_golden_rows(self.export["files"][name]["golden_tolerance"])

    def _check_golden_rows(self, tolerance: float) -> None:
        for number, golden in enumerate(self.contract["golden_rows"]):
            score = self.score([feature.pack(golden["features"][feature.name]) for feature in self._features])
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

    def check(self, line: bytes) -> tuple[dict[str, Any], list[float]]:
        """What is recorded of a line, and the row as the graph takes it; RefusedLineError if it breaks a rule."""
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
        return {"request_id": request_id, "customer_id": customer_id, "features": values}, packed

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


class Feature(NamedTuple):
    """A feature, and the values that are accepted: a range, or categories with their codes."""

    name: str
    nullable: bool
    codes: dict[str, int] | None
    low: float
    high: float

    def pack(self, value: Any) -> float:
        """As the graph takes it; a category that is missing or unknown is -1."""
        if self.codes is not None:
            return float(self.codes.get(value, -1))
        return math.nan if value is None else float(value)

    def find_broken_rule(self, value: Any) -> str:
        """The rule that a value breaks, or nothing."""
        or_null = " or null" if self.nullable else ""
        if value is None and self.nullable:
            return ""
        if self.codes is not None:
            known = type(value) is str and value in self.codes
            return "" if known else f"one of {', '.join(list(self.codes)[:20])}{or_null}"
        if type(value) is not float and type(value) is not int:
            return f"number{or_null}"
        return "" if self.low <= value <= self.high else f"from {self.low:g} to {self.high:g}"


def _describe(feature: dict[str, Any], range_margin: float) -> Feature:
    """A feature of the contract with the rule that the service applies to it."""
    name, nullable, low, high, codes = feature["name"], feature["nullable"], -3e38, 3e38, None
    if feature["kind"] == "categorical":
        codes = {category: code for code, category in enumerate(feature["categories"])}
    elif feature["minimum"] is not None and feature["maximum"] is not None:
        width = range_margin * max(feature["maximum"] - feature["minimum"], 1.0)
        low = max(feature["minimum"] - width, 0.0 if feature["minimum"] >= 0 else low)
        high = min(feature["maximum"] + width, high)
    return Feature(name, nullable, codes, low, high)


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
        request, packed = model.check(line)
    except RefusedLineError as refused:
        return {"line": number, "error": refused.args[0]}
    score = model.score(packed)
    record = {
        "stream": recorder.stream,
        "line": number,
        **request,
        "request_id": request["request_id"] or f"edge-{recorder.stream}-{number}",
        "predicted_at": dt.datetime.now(dt.UTC).isoformat(),
        "model_name": model.contract["model_name"],
        "model_version": model.export["model_version"],
        "model_file": model.file,
        "score": score,
        "decision": int(score >= model.contract["threshold"]),
        "latency_ms": (time.perf_counter() - start) * 1e3,
    }
    recorder.append(record)
    # the first digits of the prediction id that the import gives: only the service has the key to the others
    record_id = hashlib.blake2b(f"edge\x1f{recorder.stream}\x1f{number}".encode(), digest_size=16).hexdigest()
    return {
        "line": number,
        "prediction": record["decision"],
        "probability": score,
        "model_version": record["model_version"],
        "record_id": record_id,
        "request_id": record["request_id"],
        "latency_ms": record["latency_ms"],
    }


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
