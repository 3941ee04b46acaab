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

from closedloop import edge_script
from closedloop.adapters.store import Store
from closedloop.contract import digest_file, digest_folder, encode_row, read_contract
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.records import digest_position, is_issued, seal_id
from closedloop.serving.edge import export_edge, import_records
from closedloop.serving.models import load_model
from closedloop.serving.requests import RefusedRequest, RequestChecker
from closedloop.serving.slots import Slot
from tests.model_folders import REFERENCE_COPIES, ROWS, expected_score, write_model_folder

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


def read_store(store: Store) -> dict:
    return {found.prediction_id: found for some in store.read_predictions("test_churn") for found in some}


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["closedloop", "pandas", "sklearn", "onnx", "msgspec", "pyarrow", "skl2onnx"])
def test_the_environment_is_bare(bare_python, name):
    ran = subprocess.run([bare_python, "-I", "-c", f"import {name}"], capture_output=True, text=True, check=False)
    assert f"No module named '{name}'" in ran.stderr


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
    lines = [b"{", b"\n", b'{"features": NaN}\n', b"\xff\n", [], {"customer_id": "C1"}, bad, GOOD, b"7"]
    answers, said = run(bare_python, edge, [b"{\n", *lines[1:]])
    assert said == ""
    assert [answer["line"] for answer in answers] == list(range(1, 10))
    assert [answer.get("error", {}).get("code") for answer in answers] == [
        *["invalid_json"] * 4,
        *["invalid_request"] * 3,
        None,
        "invalid_request",
    ]
    assert answers[6]["error"] == {
        "code": "invalid_request",
        "message": "5 rules are broken",
        "details": [
            {"field": "customer_id", "value": "", "rule": "a text of 1 to 200 printable characters"},
            {"field": "features.visits_30d", "value": 31, "rule": "from 0 to 30"},
            {"field": "features.age", "value": None, "rule": "is required; null where it is unknown"},
            {"field": "features.plan", "value": "gold", "rule": "one of basic, plus or null"},
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
    export = export_edge(Slot("1", str(folder), ""), tmp_path / "edge", range_margin=1.0)
    golden = read_contract(folder).golden_rows
    answers, _ = run(bare_python, tmp_path / "edge", [{"features": row.features} for row in golden])
    found = [answer["probability"] for answer in answers]
    np.testing.assert_allclose(found, [row.score for row in golden], rtol=0, atol=1e-6)
    assert export["quantised"]["reason"].startswith("quantisation changes nothing")
    assert export["quantised"]["rows"] > 1000


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
def test_the_script_checks_as_the_service_does(exported, slot, body):
    """But for requests by customer, which need the online store."""
    model = edge_script.EdgeModel(exported)
    line = msgspec.json.encode(body)
    checker = RequestChecker(read_contract(Path(slot.folder)), MARGIN)
    if isinstance(body, dict) and body.get("features") is None:
        with pytest.raises(edge_script.RefusedLineError):
            model.check(line)
    elif (refused := find_refusal(checker, line)) is not None:
        with pytest.raises(edge_script.RefusedLineError) as found:
            model.check(line)
        said = found.value.args[0]
        assert (said["code"], said["message"]) == (refused.code, refused.message)
        breaches = [msgspec.to_builtins(breach) for breach in refused.breaches]
        assert sorted(map(repr, said["details"])) == sorted(map(repr, breaches))
    else:
        expected, (request, row) = checker.check(msgspec.json.decode(line), ""), model.check(line)
        assert tuple(request["features"]) == expected.values
        names = ("visits_30d", "age", "plan")
        packed = encode_row(checker.contract.features, dict(zip(names, expected.values, strict=True)))
        np.testing.assert_array_equal([row], packed.astype(np.float64))
        assert (request["customer_id"], request["request_id"] or "") == (expected.customer_id, expected.request_id)


def find_refusal(checker: RequestChecker, line: bytes) -> RefusedRequest | None:
    try:
        checker.check(msgspec.json.decode(line), "")
    except RefusedRequest as refused:
        return refused
    return None


# --- the export -------------------------------------------------------------------------------------------------------


def test_what_is_exported(exported, slot):
    assert {path.name for path in exported.iterdir()} == {
        *("model.onnx", "model.quantised.onnx", "contract.json", "edge.json", "score.py"),
    }
    source = Path(slot.folder)
    for name in ("model.onnx", "contract.json"):
        assert (exported / name).read_bytes() == (source / name).read_bytes()
    export = json.loads((exported / "edge.json").read_text())
    assert (export["model_name"], export["model_version"]) == ("test_churn", "7")
    assert (export["folder_sha256"], export["range_margin"]) == (slot.folder_sha256, MARGIN)
    for name, described in export["files"].items():
        assert described["bytes"] == (exported / name).stat().st_size
        assert described["sha256"] == digest_file(exported / name)
    assert set(export["files"]) == {"contract.json", "model.onnx", "model.quantised.onnx"}
    assert min(export["files"]["model.onnx"]["single_row_ms"], export["quantised"]["single_row_ms"]) > 0


def quantise_by_hand(row: dict, bias: float = 0.0) -> float:
    """The score with 8 bits: the row's numbers share a scale, and so do the weights, the largest of which is 0.5."""
    numbers = np.array([row["visits_30d"], row["age"], {"basic": 0, "plus": 1, None: -1}[row["plan"]]])
    low, high = min(numbers.min(), 0), max(numbers.max(), 0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    numbers = (np.rint(numbers / scale) + zero - zero) * scale
    weights = np.rint(np.array([0.1, -0.02, 0.5]) / (0.5 / 127)) * (0.5 / 127)
    return float(1 / (1 + np.exp(-(numbers @ weights + bias))))


def test_a_quantised_variant_that_passes_is_kept_and_scores(bare_python, edge):
    described = json.loads((edge / "edge.json").read_text())["quantised"]
    by_hand = [quantise_by_hand(row) for row in ROWS]
    worst = max(abs(expected_score(row) - found) for row, found in zip(ROWS, by_hand, strict=True))
    assert described["kept"]
    assert described["score_difference_max"] == pytest.approx(worst, abs=2e-4)
    assert 0.005 < worst < 0.01
    assert described["rows"] == 3 * REFERENCE_COPIES
    answers, _ = run(bare_python, edge, [{"features": row} for row in ROWS], "--quantised")
    np.testing.assert_allclose([answer["probability"] for answer in answers], by_hand, rtol=0, atol=2e-4)


def test_a_quantised_variant_whose_decisions_differ_is_left_out(bare_python, tmp_path):
    bias = -0.285
    folder = write_model_folder(tmp_path / "model", bias=bias)
    assert expected_score(ROWS[0], bias) > 0.5 > quantise_by_hand(ROWS[0], bias)
    described = export_edge(Slot("7", str(folder), ""), tmp_path / "edge", range_margin=MARGIN)["quantised"]
    assert not described["kept"]
    assert described["score_difference_max"] < 0.01
    assert described["reason"] == "a share of 0.3333 of the decisions differs, allowed is 0.005"
    assert not (tmp_path / "edge/model.quantised.onnx").exists()
    _, said = run(bare_python, tmp_path / "edge", [GOOD], "--quantised", status=1)
    assert "has no model.quantised.onnx; edge.json says why" in said


def test_a_quantised_variant_whose_scores_differ_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.model_folders.WEIGHTS", (0.1, -0.02, 5.0))
    folder = write_model_folder(tmp_path / "model")
    described = export_edge(Slot("7", str(folder), ""), tmp_path / "edge", range_margin=MARGIN)["quantised"]
    assert not described["kept"]
    assert described["score_difference_max"] > 0.05
    assert described["reason"].startswith("a score differs by 0.0")


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


def test_records_say_which_variant_scored(bare_python, edge, store, registry):
    """Records of a script that did not say so yet are imported, too."""
    run(bare_python, edge, [GOOD])
    run(bare_python, edge, [GOOD], "--quantised")
    records = read_records(edge)
    assert [record["model_file"] for record in records] == ["model.onnx", "model.quantised.onnx"]
    before = {key: value for key, value in records[0].items() if key != "model_file"} | {"line": 2}
    with (edge / "records.jsonl").open("a") as file:
        file.write(json.dumps(before) + "\n" + json.dumps(before | {"line": 3, "model_file": "other.onnx"}) + "\n")
    result = import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
    assert (result.stored, [number for number, _ in result.refused]) == (3, [4])
    assert sorted(found.source for found in read_store(store).values()) == ["edge", "edge", "edge-quantised"]


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
    (edge / "records.jsonl").write_text("\n".join(lines) + "\n")
    result = import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
    assert (result.stored, [number for number, _ in result.refused]) == (1, list(range(1, 11)))
    reasons = dict(result.refused)
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
        contextlib.closing(Store(f"sqlite:///{tmp_path / 'folder/operations.db'}")) as store,
        pytest.raises(ServiceUnavailable),
    ):
        import_records(edge / "records.jsonl", store, registry, model_name="test_churn", id_key=KEY)
    with pytest.raises(DataError, match=r"--records .*nothing.jsonl: cannot be read"):
        import_records(tmp_path / "nothing.jsonl", store, registry, model_name="test_churn", id_key=KEY)


def test_the_exported_model_is_the_one_that_serves(exported, slot):
    """The same graph on the same packed row, to the bit."""
    served = load_model(Path(slot.folder), version="7", folder_sha256=slot.folder_sha256)
    model = edge_script.EdgeModel(exported)
    for row in ROWS:
        _, packed = model.check(msgspec.json.encode({"features": row}))
        assert model.score(packed) == served.scorer.score(np.array([packed], dtype=np.float32))[0]
