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
import dataclasses
import datetime as dt
import hashlib
import json
import math
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "true")  # ONNX Runtime reads it as it is imported
import onnxruntime

if TYPE_CHECKING or __package__:
    from closedloop.rules import Breach, RefusedRequest, Rules, ScoringRequest, read_object
else:  # on an edge machine the rules lie beside this script, wherever it is started from
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from rules import Breach, RefusedRequest, Rules, ScoringRequest, read_object

CONTRACT_MAJOR = "1"
MODEL_FILE, CONTRACT_FILE, EDGE_FILE = "model.onnx", "contract.json", "edge.json"


class UnusableModelError(Exception):
    """The folder does not hold what was exported."""


class EdgeModel:
    """An exported model, proved to be what was exported.

    Raises
    ------
    UnusableModelError
        If a digest, the contract's version or a golden row does not hold.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self.export: dict[str, Any] = json.loads((folder / EDGE_FILE).read_bytes())
            names = list(self.export["files"])
            if any(Path(name).name != name for name in names):
                raise ValueError(f"files: only names of files in this folder are allowed, found {names!r:.200}")
            files = {name: (folder / name).read_bytes() for name in names}
            for name, content in files.items():
                _require_digest(folder / name, content, self.export["files"][name]["sha256"])
            self.contract: dict[str, Any] = json.loads(files[CONTRACT_FILE])
            _require_digest(folder / MODEL_FILE, files[MODEL_FILE], self.contract["model_sha256"])
            self.rules = Rules(self.contract["features"], self.export["range_margin"])
            golden = [(row["features"], row["score"]) for row in self.contract["golden_rows"]]
            version = str(self.contract["contract_version"])
        except OSError as error:
            raise UnusableModelError(f"{error.filename}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UnusableModelError(f"{folder}: {EDGE_FILE} or {CONTRACT_FILE} is damaged ({error})") from error
        if version.split(".")[0] != CONTRACT_MAJOR:
            raise UnusableModelError(f"contract_version is {version}, this script reads {CONTRACT_MAJOR}.x")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(files[MODEL_FILE], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors share no public base class
            raise UnusableModelError(f"ONNX Runtime cannot load the model ({error})") from error
        try:
            self.rules.check_golden_rows(golden, self._run)
        except ValueError as error:
            raise UnusableModelError(str(error)) from error

    def _run(self, matrix: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run(["probability"], {"features": matrix})[0], dtype=np.float64).reshape(-1)

    def score(self, request: ScoringRequest) -> float:
        """The probability of churn."""
        score = float(self._run(self.rules.pack([request.values or ()]))[0])
        if not 0 <= score <= 1:
            raise UnusableModelError(f"the model gives {score}, which is no probability")
        return score

    def read(self, line: bytes, request_id: str) -> ScoringRequest:
        """A line as a request with features; RefusedRequest if it breaks a rule."""
        request = self.rules.check(parse_json(line), request_id)
        if request.values is None:
            breach = Breach("features", None, "is required: there is no online store")
            raise RefusedRequest("no_features", "there is no online store", [breach])
        return request


def parse_json(line: bytes) -> Any:
    """JSON as the service reads it: UTF-8, without NaN, numbers beyond a double and repeated names; or a refusal."""
    try:
        text, read_number = line.decode("utf-8"), _read_float
        return json.loads(text, parse_constant=read_number, parse_float=read_number, object_pairs_hook=read_object)
    except (ValueError, RecursionError) as error:
        breach = Breach("", None, f"JSON in UTF-8 ({str(error)[:120]})")
        raise RefusedRequest("invalid_json", "the line is not JSON", [breach]) from None


def _read_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is no number in JSON")
    return number


def _require_digest(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UnusableModelError(f"{path}: its SHA-256 is {found[:12]}..., exported was {expected[:12]}...")


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
        request = model.read(line, f"edge-{recorder.stream}-{number}")
    except RefusedRequest as refused:
        details = [dataclasses.asdict(breach) for breach in refused.breaches]
        return {"line": number, "error": {"code": refused.code, "message": refused.message, "details": details}}
    score = model.score(request)
    record = {
        "stream": recorder.stream,
        "line": number,
        "request_id": request.request_id,
        "customer_id": request.customer_id,
        "features": request.values,
        "predicted_at": dt.datetime.now(dt.UTC).isoformat(),
        "model_name": model.contract["model_name"],
        "model_version": model.export["model_version"],
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
    arguments = parser.parse_args()
    try:
        model = EdgeModel(arguments.folder)
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
