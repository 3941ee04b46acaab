"""The commands beside the service: files and tables are scored as it scores them, a device's records come home."""

from __future__ import annotations

import collections
import contextlib
import json
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from closedloop.bootstrap import build_predictions, load_run
from closedloop.processes import start_process
from tests.http_service import run_service, wait_until

pytestmark = pytest.mark.thorough

NAME = "shop_churn"
SNAPSHOT = "data/features/2024-01-01.parquet"
ASKED = 300
COPIES = 30


def read_log(shop):
    """The predictions in the operations store."""
    store = build_predictions(load_run(shop.root / "params.yaml", root=shop.root))
    found = [one for some in store.read_predictions(NAME) for one in some]
    store.database.close()
    return found


def test_without_a_file_everybody_who_is_active_at_the_date_is_scored(shop_copy):
    """The same customers and scores as of the file that the training's features have of that day, without that file."""
    given = ("score", "--input", SNAPSHOT, "--output", "given.csv", "--no-log")
    shop_copy.run(*given)
    (shop_copy.root / SNAPSHOT).unlink()
    told = json.loads(shop_copy.run("score", "--as-of", "2024-01-01", "--output", "active.csv", "--json").stdout)
    active, expected = (pd.read_csv(shop_copy.root / f"{name}.csv", dtype=str) for name in ("active", "given"))
    scored = ["customer_id", "score", "decision", "model_version"]
    pd.testing.assert_frame_equal(active[scored], expected[scored])
    assert told == {"rows": len(active), "scored": len(active), "rejected": 0, "resumed": 0, "rejects": None}
    assert set(active["as_of"]) == {"2024-01-01"}
    assert "as_of" not in expected
    assert {f"{one.predicted_at:%Y-%m-%d}" for one in read_log(shop_copy)} == {"2024-01-01"}
    said = shop_copy.run("score", "--output", "active.csv", status=1).output
    assert "--input: name a file or a table; without one --as-of DATE scores all who are active then" in said


def test_files_and_tables_are_scored_as_the_service_scores_them(shop_copy):
    rows = pd.read_parquet(shop_copy.root / SNAPSHOT)
    said = shop_copy.run("score", "--input", SNAPSHOT, "--output", "scores.csv").output
    assert f"{len(rows):,} of {len(rows):,} rows scored" in said
    scored = pd.read_csv(shop_copy.root / "scores.csv", dtype={"customer_id": str, "model_version": str})
    assert scored["customer_id"].tolist() == rows["customer_id"].tolist()
    assert set(scored["model_version"]) == {"1"}
    with run_service(shop_copy.root, "--bento", "models/bento") as service:
        items = [{"customer_id": customer} for customer in rows["customer_id"].head(ASKED)]
        answers = service.call("POST", "/predict/batch", items)[1]["predictions"]
        wait_until(lambda: len(read_log(shop_copy)) == len(rows) + ASKED, "all answers in the store", seconds=300)
    np.testing.assert_allclose(
        scored["score"].head(ASKED), [answer["probability"] for answer in answers], rtol=0, atol=1e-6
    )
    assert scored["decision"].head(ASKED).tolist() == [answer["prediction"] for answer in answers]
    assert {0, 1} == set(scored["decision"].head(ASKED))

    with contextlib.closing(sqlite3.connect(shop_copy.root / "club.db")) as club:
        rows.to_sql("members", club, index=False)
        tables = "sqlite:///club.db#members", "sqlite:///club.db#scores"
        shop_copy.run("score", "--input", tables[0], "--output", tables[1], "--no-log")
        again = pd.read_sql("SELECT * FROM scores ORDER BY customer_id", club)
    scored = scored.sort_values("customer_id")  # a table has no order of its own
    for column in ("customer_id", "decision", "model_version"):
        assert again[column].tolist() == scored[column].tolist()
    np.testing.assert_allclose(again["score"], scored["score"], rtol=0, atol=1e-6)

    log = read_log(shop_copy)
    logged = collections.Counter((one.source, one.model_version) for one in log)
    assert logged == {("batch", "1"): len(rows), ("http", "1"): ASKED}
    why = shop_copy.run("why", "--json", log[0].prediction_id).output
    assert shop_copy.read_json("metrics/package.json")["bento_sha256"] in why
    gone = shop_copy.run("store", "erase", "--customer-id", rows["customer_id"][0]).output
    assert "deleted: 2 predictions and 0 outcomes" in gone
    gone = shop_copy.run("store", "purge", "--as-of", "2999-01-01").output
    assert f"deleted: {len(log) - 2:,} predictions and 0 outcomes" in gone
    assert read_log(shop_copy) == []


def test_a_run_killed_half_way_and_resumed_writes_the_same_file(shop_copy):
    rows = pd.read_parquet(shop_copy.root / SNAPSHOT)
    pd.concat([rows] * COPIES).to_parquet(shop_copy.root / "in.parquet", index=False)
    arguments = ("score", "--input", "in.parquet", "--no-log", "--output")
    shop_copy.run(*arguments, "whole.parquet")
    with (shop_copy.root / "killed.log").open("wb") as log:
        command = [sys.executable, "-m", "closedloop.cli.main", *arguments, "killed.parquet"]
        process = start_process(command, cwd=shop_copy.root, stdout=log, stderr=log)
    work = shop_copy.root / ".killed.parquet.batch"
    wait_until(lambda: len(list(work.glob("*.part"))) > 2 or process.poll() is not None, "some parts")
    process.kill()
    assert process.wait() == -signal.SIGKILL, (shop_copy.root / "killed.log").read_text()
    assert not (shop_copy.root / "killed.parquet").exists()
    said = shop_copy.run(*arguments, "killed.parquet", "--resume").output
    assert f"{COPIES * len(rows):,} of {COPIES * len(rows):,} rows scored" in said
    assert (shop_copy.root / "killed.parquet").read_bytes() == (shop_copy.root / "whole.parquet").read_bytes()


def test_a_devices_folder_is_exported_and_its_records_are_imported_once(shop_copy):
    said = shop_copy.run("edge", "export", "--output", "device").output
    export = json.loads((shop_copy.root / "device/edge.json").read_text(encoding="utf-8"))
    size = export["files"]["model.onnx"]["bytes"]
    assert f"device: model.onnx has {size:,} bytes; score.py takes JSON lines" in said
    golden = json.loads((shop_copy.root / "device/contract.json").read_text(encoding="utf-8"))["golden_rows"]
    lines = "".join(json.dumps({"features": row["features"]}) + "\n" for row in golden)
    ran = subprocess.run(
        [sys.executable, "-I", "device/score.py"], cwd=shop_copy.root, input=lines, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    found = [json.loads(line)["probability"] for line in ran.stdout.splitlines()]
    np.testing.assert_allclose(found, [row["score"] for row in golden], rtol=0, atol=1e-6)
    imported = ("edge", "import", "--records", "device/records.jsonl")
    assert f"{len(golden)} stored, 0 there already, 0 refused" in shop_copy.run(*imported).output
    again = shop_copy.run(*imported, "--json").stdout
    assert json.loads(again) == {"stored": 0, "duplicates": len(golden), "refused": []}
    path = shop_copy.root / "device/records.jsonl"
    damaged = json.loads(path.read_text(encoding="utf-8").splitlines()[0]) | {
        "features": [1.0],
        "line": len(golden) + 1,
    }
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(damaged) + "\n")
    said = shop_copy.run(*imported).output
    assert f"device/records.jsonl, line {len(golden) + 1}: features: there are 1, its version takes " in said
    assert [(one.source, one.model_version) for one in read_log(shop_copy)] == [("edge", "1")] * len(golden)
