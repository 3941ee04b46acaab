"""The exported folder in an environment of nothing but numpy and ONNX Runtime, and its records brought home."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from closedloop import rules
from closedloop.contract import digest_file, digest_folder, read_contract
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.records import digest_position, is_issued, seal_id
from closedloop.rules import CUSTOMER_ID_RULE, RefusedRequest, ScoringRequest
from closedloop.scoring import edge_script
from closedloop.scoring.edge import export_edge, import_records
from closedloop.serving.models import load_model
from closedloop.serving.requests import RequestChecker
from closedloop.serving.slots.slots import Slot
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from tests.model_folders import ROWS, expected_score, pack_row, write_model_folder

pytestmark = pytest.mark.thorough

KEY = b"a secret"
MARGIN = 0.5
GOOD = {"features": ROWS[0], "customer_id": "C1", "request_id": "mine"}


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """A Python that has these two packages alone."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python3*/site-packages"))
    for name in ("numpy", "onnxruntime"):
        found = Path(importlib.util.find_spec(name).origin).parent
        for part in (found, *found.parent.glob(f"{name}.libs")):  # wheels keep shared libraries beside
            (packages / part.name).symlink_to(part)
    return folder / "bin/python"


@pytest.fixture(scope="module")
def slot(tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp("model") / "folder")
    return Slot("7", str(folder), digest_folder(folder))


@pytest.fixture(scope="module")
def exported(slot, tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("edge") / "folder"
    export_edge(slot, folder, range_margin=MARGIN)
    return folder


@pytest.fixture
def edge(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "edge"))


class OneFolder:
    """A registry with one version, or an outage."""

    def __init__(self, slot: Slot) -> None:
        self.slot, self.asked, self.down = slot, [], False

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        self.asked.append(version)
        if self.down:
            raise ServiceUnavailable("no route to the registry")
        if version != self.slot.version:
            raise DataError(f"test_churn has no version {version}")
        return Path(shutil.copytree(self.slot.folder, folder / "model")), self.slot.folder_sha256


@pytest.fixture
def registry(slot):
    return OneFolder(slot)


def run(python, edge: Path, lines: list[object], *arguments: str, status: int = 0):
    """Answers of the script, and what it said on stderr."""
    content = b"".join(line if isinstance(line, bytes) else msgspec.json.encode(line) + b"\n" for line in lines)
    command = [str(python), "-I", str(edge / "score.py"), *arguments]
    ran = subprocess.run(command, input=content, capture_output=True, check=False, cwd=edge.parent)
    assert ran.returncode == status, ran.stderr.decode()
    return [json.loads(line) for line in ran.stdout.splitlines()], ran.stderr.decode()


def read_records(edge: Path) -> list[dict]:
    return [json.loads(line) for line in (edge / "records.jsonl").read_text().splitlines()]


def read_store(store: Predictions) -> dict:
    return {found.prediction_id: found for some in store.read_predictions("test_churn") for found in some}


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["closedloop", "pandas", "sklearn", "onnx", "msgspec", "pyarrow", "skl2onnx"])
def test_the_environment_is_bare(bare_python, name):
    ran = subprocess.run([bare_python, "-I", "-c", f"import {name}"], capture_output=True, text=True, check=False)
    assert f"No module named '{name}'" in ran.stderr


def test_no_record_is_kept_of_a_devices_use(bare_python, edge, tmp_path, monkeypatch):
    """ONNX Runtime would write the machine's id, and what it is to send, below the user's folder."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert len(run(bare_python, edge, [GOOD])[0]) == 1
    assert [*(tmp_path / "home").rglob("*")] == []


def test_a_line_is_answered_with_its_score(bare_python, edge):
    requests = [{"features": row} for row in ROWS]
    answers, said = run(bare_python, edge, [GOOD, *requests])
    assert said == ""
    assert answers[0].items() >= {"line": 1, "prediction": 1, "model_version": "7", "request_id": "mine"}.items()
    expected = [expected_score(row) for row in (ROWS[0], *ROWS)]
    np.testing.assert_allclose([answer["probability"] for answer in answers], expected, rtol=0, atol=1e-6)
    assert [answer["prediction"] for answer in answers] == [int(value >= 0.5) for value in expected] == [1, 1, 0, 0]
    records = read_records(edge)
    assert [record["line"] for record in records] == [1, 2, 3, 4]
    assert len({record["stream"] for record in records}) == 1
    assert records[0].items() >= {"customer_id": "C1", "request_id": "mine", "features": [6.0, 40.0, "plus"]}.items()
    assert records[3].items() >= {"customer_id": None, "features": [20.0, 80.0, None], "decision": 0}.items()
    assert [record["score"] for record in records] == [answer["probability"] for answer in answers]


def test_bad_lines_are_answered_one_by_one_and_not_recorded(bare_python, edge):
    bad = {"features": {"visits_30d": 31, "plan": "gold", "colour": 1}, "customer_id": ""}
    twice = b'{"features": {"age": 40, "age": 41}}\n'
    lines = [b"{", b"\n", b'{"features": NaN}\n', b"\xff\n", [], {"customer_id": "C1"}, bad, GOOD, twice, b"7"]
    answers, said = run(bare_python, edge, [b"{\n", *lines[1:]])
    assert said == ""
    assert [answer["line"] for answer in answers] == list(range(1, 11))
    assert [answer.get("error", {}).get("code") for answer in answers] == [
        *["invalid_json"] * 4,
        *("invalid_request", "no_features", "invalid_request"),
        None,
        "invalid_json",
        "invalid_request",
    ]
    assert answers[8]["error"]["details"][0]["rule"] == 'JSON in UTF-8 ("age" stands twice in one object)'
    assert answers[6]["error"] == {
        "code": "invalid_request",
        "message": "5 rules are broken",
        "details": [
            {"field": "customer_id", "value": "", "rule": CUSTOMER_ID_RULE},
            {"field": "features.visits_30d", "value": 31, "rule": "from 0 to 30"},
            {"field": "features.age", "value": None, "rule": "is required; null where it is unknown"},
            {"field": "features.plan", "value": "gold", "rule": 'one of "basic", "plus" or null'},
            {"field": "features.colour", "value": 1, "rule": "is not known"},
        ],
    }
    assert [record["line"] for record in read_records(edge)] == [8]


def test_files_in_and_out(bare_python, edge, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(msgspec.json.encode(GOOD) + b"\n" + msgspec.json.encode(GOOD))
    names = [f"--{name}={tmp_path / name}.jsonl" for name in ("output", "records")]
    answers, _ = run(bare_python, edge, [], f"--input={tmp_path / 'in.jsonl'}", *names)
    assert answers == []
    written = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]
    assert [answer["line"] for answer in written] == [1, 2]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2
    assert not (edge / "records.jsonl").exists()


def test_nothing_is_answered_that_is_not_recorded(bare_python, edge):
    answers, said = run(bare_python, edge, [GOOD], "--records=/dev/full", status=1)
    assert answers == []
    assert "No space left on device" in said
    assert "Traceback" not in said


def test_the_real_model_gives_the_golden_scores(bare_python, small_shop, tmp_path):
    folder = small_shop.root / "models/candidate"
    export_edge(Slot("1", str(folder), ""), tmp_path / "edge", range_margin=1.0)
    golden = read_contract(folder).golden_rows
    answers, _ = run(bare_python, tmp_path / "edge", [{"features": row.features} for row in golden])
    found = [answer["probability"] for answer in answers]
    np.testing.assert_allclose(found, [row.score for row in golden], rtol=0, atol=1e-6)


def flip_model(edge: Path) -> None:
    content = bytearray((edge / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (edge / "model.onnx").write_bytes(content)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def seal_again(edge: Path, *names: str) -> None:
    """Let edge.json and contract.json say what is there, as somebody would who tampers with care."""
    if "model.onnx" in names:
        change_json(edge / "contract.json", model_sha256=digest_file(edge / "model.onnx"))
    files = json.loads((edge / "edge.json").read_text())["files"]
    for name in ("contract.json", *names):
        files[name]["sha256"] = digest_file(edge / name)
    change_json(edge / "edge.json", files=files)


def change_threshold(edge: Path) -> None:
    change_json(edge / "contract.json", threshold=0.1)


def replace_model(edge: Path) -> None:
    other = write_model_folder(edge.parent / "other", bias=0.001)
    shutil.copy(other / "model.onnx", edge)
    seal_again(edge, "model.onnx")


def replace_model_and_digest(edge: Path) -> None:
    """The digest of the file list alone: the contract names another."""
    shutil.copy(write_model_folder(edge.parent / "other", bias=0.001) / "model.onnx", edge)
    files = json.loads((edge / "edge.json").read_text())["files"]
    files["model.onnx"]["sha256"] = digest_file(edge / "model.onnx")
    change_json(edge / "edge.json", files=files)


def raise_version(edge: Path) -> None:
    change_json(edge / "contract.json", contract_version="2.0")
    seal_again(edge)


def drop_golden_rows(edge: Path) -> None:
    change_json(edge / "contract.json", golden_rows=[])
    seal_again(edge)


def break_model(edge: Path) -> None:
    (edge / "model.onnx").write_bytes(b"no model")
    seal_again(edge, "model.onnx")


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (flip_model, "model.onnx: its SHA-256 is"),
        (change_threshold, "contract.json: its SHA-256 is"),
        (replace_model_and_digest, "model.onnx: its SHA-256 is"),
        (replace_model, "golden rows: row 0 scores 0.5746"),
        (raise_version, "contract_version is 2.0, this script reads 1.x"),
        (drop_golden_rows, "golden rows: the contract has none"),
        (break_model, "ONNX Runtime cannot load the model"),
        (lambda edge: (edge / "contract.json").unlink(), "contract.json: cannot be read (No such file"),
        (lambda edge: (edge / "edge.json").write_text("{}"), "is damaged"),
        (lambda edge: (edge / "edge.json").write_text('{"files": {"../../../evil": {}}}'), "only names of files in"),
    ],
)
def test_what_was_not_exported_like_that_is_refused(bare_python, edge, tamper, message):
    tamper(edge)
    answers, said = run(bare_python, edge, [GOOD], status=1)
    assert answers == []
    assert message in said
    assert "Traceback" not in said
    assert not (edge / "records.jsonl").exists()


VALUES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3)
    | st.sampled_from([0, 30, 30.1, 111, -0.0, 80.5, "basic", "plus", "x" * 90, [], {}, 2**53])
)
BODIES = VALUES | st.fixed_dictionaries(
    {"features": VALUES | st.dictionaries(st.sampled_from(["visits_30d", "age", "plan", "no", "é"]), VALUES)},
    optional={"customer_id": VALUES, "request_id": VALUES, "other": VALUES},
)


@given(body=BODIES)
@settings(deadline=None, max_examples=400)
def test_the_script_reads_as_the_service_does(exported, slot, body):
    """But for requests by customer, which need the online store."""
    model = edge_script.EdgeModel(exported)
    line = msgspec.json.encode(body)
    checker = RequestChecker(read_contract(Path(slot.folder)), MARGIN)
    if isinstance(body, dict) and body.get("features") is None:
        with pytest.raises(RefusedRequest):
            model.read(line, "own")
        return
    expected, found = outcome(lambda: checker.read(line, "own")), outcome(lambda: model.read(line, "own"))
    assert found == expected
    if isinstance(found, ScoringRequest):
        row = dict(zip(("visits_30d", "age", "plan"), expected.values, strict=True))
        np.testing.assert_array_equal(model.rules.pack([found.values]), pack_row(checker.contract.features, row))


def outcome(read):
    """A request, or the words and breaches of a refusal."""
    try:
        return read()
    except RefusedRequest as refused:
        return refused.code, refused.message, sorted(map(repr, refused.breaches))


LINES = [
    b"", b"{", b"[" * 100_000, b"\xff", b'"\\ud800"', b"NaN", b"Infinity", b"1e999", b"9" * 5000,
    *(b'{"features": {"visits_30d": %s, "age": 40, "plan": null}}' % value for value in (b"NaN", b"-1e999", b"1e-999")),
    b'{"customer_id": "\\ud800", "features": {"visits_30d": 1, "age": 40, "plan": null}}',
    b'{"features": {"visits_30d": 1, "visits_30d": 2, "age": 40, "plan": null}} ',
    b'\xef\xbb\xbf{"features": {"visits_30d": 1, "age": 40, "plan": null}}',
]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_the_script_takes_and_refuses_the_json_that_the_service_does(exported, slot, line):
    model, checker = edge_script.EdgeModel(exported), RequestChecker(read_contract(Path(slot.folder)), MARGIN)
    expected, found = outcome(lambda: checker.read(line, "own")), outcome(lambda: model.read(line, "own"))
    assert found == expected if isinstance(expected, ScoringRequest) else not isinstance(found, ScoringRequest)


# --- the export -------------------------------------------------------------------------------------------------------


def test_what_is_exported(exported, slot):
    assert {path.name for path in exported.iterdir()} == {
        *("model.onnx", "contract.json", "edge.json", "score.py", "rules.py"),
    }
    source = Path(slot.folder)
    for name in ("model.onnx", "contract.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()
    assert (exported / "rules.py").read_bytes() == Path(rules.__file__).read_bytes()
    assert (exported / "score.py").read_bytes() == Path(edge_script.__file__).read_bytes()
    export = json.loads((exported / "edge.json").read_text())
    assert (export["model_name"], export["model_version"]) == ("test_churn", "7")
    assert (export["folder_sha256"], export["range_margin"]) == (slot.folder_sha256, MARGIN)
    for name, described in export["files"].items():
        assert described["bytes"] == (exported / name).stat().st_size
        assert described["sha256"] == digest_file(exported / name)
    assert set(export["files"]) == {"contract.json", "model.onnx", "score.py", "rules.py"}


def test_nothing_is_overwritten(slot, edge):
    before = {path.name: path.read_bytes() for path in edge.iterdir()}
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        export_edge(slot, edge, range_margin=MARGIN)
    assert {path.name: path.read_bytes() for path in edge.iterdir()} == before
    (edge.parent / "empty").mkdir()
    export_edge(slot, edge.parent / "empty", range_margin=MARGIN)
    assert (edge.parent / "empty/score.py").is_file()


def test_a_model_that_does_not_hold_is_not_exported(tmp_path):
    folder = write_model_folder(tmp_path / "model", golden_shift=0.01)
    with pytest.raises(DataError, match="golden rows"):
        export_edge(Slot("7", str(folder), ""), tmp_path / "edge", range_margin=MARGIN)
    assert not (tmp_path / "edge").exists()


# --- the import -------------------------------------------------------------------------------------------------------


def test_records_are_imported_once(bare_python, edge, store, registry):
    answers = run(bare_python, edge, [GOOD, {"features": ROWS[2]}])[0] + run(bare_python, edge, [GOOD])[0]
    records = read_records(edge)
    for stored, duplicates in ((3, 0), (0, 3)):
        result = import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
        assert result == (stored, duplicates, ())
    found = read_store(store)
    ids = [seal_id(digest_position("edge", record["stream"], record["line"]), KEY) for record in records]
    assert set(found) == set(ids)
    assert all(is_issued(prediction_id, KEY) for prediction_id in ids)
    assert [prediction_id[:32] for prediction_id in ids] == [answer["record_id"] for answer in answers]
    for prediction_id, record in zip(ids, records, strict=True):
        stored = found[prediction_id]
        assert list(stored.features) == record["features"]
        assert (stored.score, stored.decision) == (record["score"], record["decision"])
        assert (stored.source, stored.variant, stored.model_version) == ("edge", "champion", "7")
        assert (stored.customer_id, stored.request_id) == (record["customer_id"], record["request_id"])
        assert stored.predicted_at.isoformat() == record["predicted_at"]


def test_records_of_an_earlier_script_are_imported(bare_python, edge, store, registry):
    """It named the model's file, and wrote ids as they came."""
    run(bare_python, edge, [GOOD])
    (now,) = read_records(edge)
    before = now | {"line": 2, "model_file": "model.onnx", "customer_id": "17.0"}
    with (edge / "records.jsonl").open("a") as file:
        file.write(json.dumps(before) + "\n" + json.dumps(before | {"line": 3, "model_file": "other.onnx"}) + "\n")
    result = import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
    assert (result.stored, [number for number, _ in result.refused]) == (2, [3])
    assert {found.customer_id for found in read_store(store).values()} == {"C1", "17"}


def test_a_line_that_lost_power_spoils_nothing(bare_python, edge, store, registry):
    run(bare_python, edge, [GOOD, GOOD])
    path = edge / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    torn = import_records(path, store, registry, model_name="test_churn", id_key=KEY)
    assert torn == (1, 0, ((2, "the line is torn"),))
    run(bare_python, edge, [GOOD])
    after = import_records(path, store, registry, model_name="test_churn", id_key=KEY)
    assert (after.stored, after.duplicates, [number for number, _ in after.refused]) == (1, 1, [2])


def test_lines_that_no_script_wrote_are_refused_alone(edge, store, registry, bare_python):
    run(bare_python, edge, [GOOD])
    good = read_records(edge)[0]
    wrong = [
        {"score": 1.5},
        {"decision": 2},
        {"stream": "x"},
        {"line": 0},
        {"predicted_at": "2024-01-01T00:00:00"},
        {"customer_id": ""},
        {"prediction_id": "0" * 48},
        {"model_name": "other"},
    ]
    lines = [json.dumps(good | change) for change in wrong] + ["no JSON", "[]", json.dumps(good | {"line": 2})]
    lines.append(lines[-1][:-1] + ', "score": 0.1}')
    (edge / "records.jsonl").write_text("\n".join(lines) + "\n")
    result = import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
    assert (result.stored, [number for number, _ in result.refused]) == (1, [*range(1, 11), 12])
    reasons = dict(result.refused)
    assert reasons[12] == '"score" stands twice in one object'
    assert reasons[8] == "it is of other, not of test_churn"
    assert "score" in reasons[1]
    assert [found.customer_id for found in read_store(store).values()] == ["C1"]


def test_a_full_disk_is_no_fault_of_the_record_file(edge, store, bare_python):
    class Full:
        def fetch_version(self, version, folder):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(bare_python, edge, [GOOD])
    with pytest.raises(ServiceUnavailable, match="the contract of version 7: No space left on device"):
        import_records(edge / "records.jsonl", store, Full(), model_name="test_churn", id_key=KEY)


def test_a_line_whose_features_are_not_its_versions_is_refused_alone(edge, store, registry, bare_python):
    """The store takes any row, and every later check of the version would fail over it."""
    run(bare_python, edge, [GOOD])
    good = read_records(edge)[0]
    changes = [
        {"features": [6.0, 40.0, "plus", 1.0]},
        {"features": [6.0, 40.0]},
        {"features": [6.0, "plus", 40.0]},
        {"features": [6.0, 40.0, None]},
        {"model_version": "8"},
        {"model_version": "8"},
        {"model_version": "bundled", "features": [1.0]},
        {"model_version": "../../../evil"},
    ]
    lines = [json.dumps(good | {"line": number} | change) for number, change in enumerate(changes, 2)]
    (edge / "records.jsonl").write_text("\n".join([json.dumps(good), *lines]) + "\n")
    result = import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
    assert result.refused == (
        (2, "features: there are 4, its version takes 3"),
        (3, "features: there are 2, its version takes 3"),
        (4, "features: age is 'plus', allowed is number"),
        (6, "test_churn has no version 8"),
        (7, "test_churn has no version 8"),
        (9, "model_version: '../../../evil' is no number of the registry"),
    )
    assert (result.stored, registry.asked) == (3, ["7", "8"])
    stored = {found.features for found in read_store(store).values() if found.model_version == "7"}
    assert stored == {(6.0, 40.0, "plus"), (6.0, 40.0, None)}


def test_records_wait_for_a_registry_that_is_away(edge, store, registry, bare_python):
    run(bare_python, edge, [GOOD])
    registry.down = True
    with pytest.raises(ServiceUnavailable, match="no route to the registry"):
        import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
    assert read_store(store) == {}


def test_a_store_that_is_away_and_a_file_that_is_not_there(edge, registry, bare_python, tmp_path):
    run(bare_python, edge, [GOOD])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/operations.db").mkdir()
    with (
        contextlib.closing(Database(f"sqlite:///{tmp_path / 'folder/operations.db'}")) as database,
        pytest.raises(ServiceUnavailable),
    ):
        import_records(edge / "records.jsonl", Predictions(database), registry, model_name="test_churn", id_key=KEY)
    with pytest.raises(DataError, match=r"--records .*nothing.jsonl: cannot be read"):
        import_records(tmp_path / "nothing.jsonl", Predictions(database), registry, model_name="test_churn", id_key=KEY)


def test_the_exported_model_is_the_one_that_serves(exported, slot):
    """The same graph on the same packed row, to the bit."""
    served = load_model(Path(slot.folder), version="7", folder_sha256=slot.folder_sha256)
    model = edge_script.EdgeModel(exported)
    for row in ROWS:
        request = model.read(msgspec.json.encode({"features": row}), "own")
        assert model.score(request) == served.scorer.score(served.pack([request.values]))[0]
