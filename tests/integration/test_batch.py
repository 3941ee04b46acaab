"""Batch scoring on real files and databases: what the service would say, row by row, once, whatever dies when."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st

from closedloop.contract import CategoricalFeature, NumericFeature, digest_file, digest_folder, read_contract
from closedloop.core.release.entries import Deployment
from closedloop.errors import ConfigError, DataError, ServiceUnavailable
from closedloop.files import take_lock
from closedloop.records import digest_position, is_issued, seal_id
from closedloop.rules import CUSTOMER_ID_RULE, Breach, RefusedRequest
from closedloop.scoring.batch import BatchOptions, score_batch
from closedloop.scoring.champion import open_champion
from closedloop.scoring.chunks import ChunkScorer, seal_rows
from closedloop.scoring.columns import ColumnChecker
from closedloop.scoring.jobs import LOCK_FILE
from closedloop.serving.clock import WALL_CLOCK
from closedloop.serving.models import load_model
from closedloop.serving.requests import RequestChecker
from closedloop.serving.slots.slots import Slot, Slots
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.tabular.row_tables import find_table, insert_rows, read_rows
from tests.model_folders import FEATURES, expected_score, pack_row, write_model_folder, write_slots
from tests.production import ACCOUNT, Bucket
from tests.services import PASSWORD, run_postgres

pytestmark = pytest.mark.thorough

KEY = b"a secret"
MARGIN = 0.5
NOON = pd.Timestamp("2024-03-01T12:00:00Z")
COLUMNS = ["customer_id", "score", "decision", "model_version", "prediction_id"]


@pytest.fixture(scope="module")
def slot(tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp("model") / "folder", bias=-0.5)
    return Slot("7", str(folder), digest_folder(folder))


def make_rows(count: int) -> pd.DataFrame:
    """Rows that all hold; every third lacks a plan, every fifth a customer."""
    number = np.arange(count)
    visits = (number % 21).astype(float)
    plan = np.select([number % 3 == 0, number % 3 == 1], ["basic", "plus"], None)
    customers = [f"C{one}" if one % 5 else None for one in number]
    return pd.DataFrame({"customer_id": customers, "visits_30d": visits, "age": 18.0 + number % 63, "plan": plan})


def list_scores(rows: pd.DataFrame) -> list[float]:
    """By hand."""
    values = [{name: row[name] for name in ("visits_30d", "age", "plan")} for row in rows.to_dict("records")]
    return [expected_score(row, bias=-0.5) for row in values]


def score(source, target, slot, tmp_path, **options):
    chosen = {"range_margin": MARGIN, "id_key": KEY, "chunk_rows": 10} | options
    return score_batch(str(source), str(target), slot, BatchOptions(**chosen), state_dir=tmp_path / "state")


def read_ids(store: Predictions) -> Counter[str]:
    return Counter(found.prediction_id for some in store.read_predictions("test_churn") for found in some)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
def test_scores_by_hand(tmp_path, slot, threads):
    rows = make_rows(47)
    rows.to_parquet(tmp_path / "in.parquet", row_group_size=13)
    result = score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path, threads=threads)
    assert (result.rows, result.scored, result.rejected, result.resumed, result.rejects) == (47, 47, 0, 0, None)
    found = pd.read_parquet(tmp_path / "out.parquet")
    expected = np.array(list_scores(rows))
    assert list(found) == COLUMNS
    assert found["customer_id"].tolist() == rows["customer_id"].tolist()
    np.testing.assert_allclose(found["score"], expected, atol=1e-6)
    assert found["decision"].tolist() == (expected >= 0.5).astype(int).tolist()
    assert 5 < found["decision"].sum() < 42
    assert set(found["model_version"]) == {"7"}
    position = ("batch", digest_file(tmp_path / "in.parquet"), slot.folder_sha256)
    assert found["prediction_id"].tolist() == [seal_id(digest_position(*position, n), KEY) for n in range(1, 48)]
    assert is_issued(found["prediction_id"][0], KEY)
    assert {path.name for path in tmp_path.iterdir()} == {"in.parquet", "out.parquet"}


def test_csv_says_the_same_as_parquet(tmp_path, slot):
    rows = make_rows(31)
    rows.to_parquet(tmp_path / "in.parquet")
    rows.to_csv(tmp_path / "in.csv", index=False)
    score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path)
    score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path)
    expected = pd.read_parquet(tmp_path / "out.parquet")
    found = pd.read_csv(tmp_path / "out.csv", float_precision="round_trip", dtype={"model_version": str})
    columns = COLUMNS[:-1]  # another file, so other ids
    pd.testing.assert_frame_equal(
        found[columns], expected[columns].astype({"customer_id": "object"}), check_dtype=False, check_exact=True
    )
    assert found["prediction_id"].nunique() == 31


def test_rows_without_customers_are_named_by_number(tmp_path, slot):
    rows = make_rows(12).drop(columns="customer_id")
    rows.loc[3, "age"] = 999.0
    rows.to_parquet(tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.csv", slot, tmp_path, rejected_share_max=0.1)
    found = pd.read_csv(tmp_path / "out.csv")
    assert found["row"].tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("also", [True, False])
def test_the_output_has_the_ids_of_the_data_sets_own_column(tmp_path, slot, also):
    """A raw file as it is trained on; a column customer_id beside it means something else."""
    rows = make_rows(6).rename(columns={"customer_id": "member"})
    rows["member"] = [7.0, 8.0, None, 9.0, 10.0, 11.0]
    rows = rows.assign(customer_id="other") if also else rows
    rows.to_csv(tmp_path / "in.csv", index=False)
    rows.to_parquet(tmp_path / "in.parquet")
    with contextlib.closing(sqlite3.connect(tmp_path / "club.db")) as connection:
        rows.to_sql("members", connection, index=False)
    for source in ("in.csv", "in.parquet", f"sqlite:///{tmp_path / 'club.db'}#members"):
        place = source if "#" in source else tmp_path / source
        score(place, tmp_path / "out.parquet", slot, tmp_path, id_column="member")
        found = pd.read_parquet(tmp_path / "out.parquet")
        assert sorted(map(str, found["customer_id"])) == sorted(["7", "8", "None", "9", "10", "11"])


def test_other_types_and_columns_that_mean_the_same(tmp_path, slot):
    rows = make_rows(9).assign(customer_id=range(9), colour="red")
    rows = rows.astype({"age": "int32", "plan": "category"})
    table = pa.Table.from_pandas(rows, preserve_index=False)
    decimals = pa.array(rows["visits_30d"].map(str)).cast(pa.decimal128(9, 2))
    table = table.set_column(1, "visits_30d", decimals)
    pq.write_table(table, tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path)
    found = pd.read_parquet(tmp_path / "out.parquet")
    assert found["customer_id"].tolist() == [str(number) for number in range(9)]
    np.testing.assert_allclose(found["score"], list_scores(rows.astype({"plan": "object"})), atol=1e-6)


def test_no_rows(tmp_path, slot):
    make_rows(0).astype({"plan": "object"}).to_csv(tmp_path / "in.csv", index=False)
    assert score(tmp_path / "in.csv", tmp_path / "out.parquet", slot, tmp_path).rows == 0
    assert list(pd.read_parquet(tmp_path / "out.parquet")) == COLUMNS


def test_progress_is_shown(tmp_path, slot, capsys):
    make_rows(25).to_csv(tmp_path / "in.csv", index=False)
    score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path, show_progress=True)
    shown = capsys.readouterr()
    assert "score 25 rows" in shown.err
    assert "100%" in shown.err
    assert shown.out == ""


# --- checks -----------------------------------------------------------------------------------------------------------

NUMBERS = st.none() | st.floats(width=64) | st.sampled_from([-0.0, 30.0, 30.000001, 111.0, 111.1, 0.0, -1e-9, 1e39])
ROWS = st.lists(
    st.tuples(
        NUMBERS,
        NUMBERS,
        st.none() | st.sampled_from(["basic", "plus", "Plus", "", "basic ", "pläs", " "]),
        st.none()
        | st.sampled_from(
            ["", "C1", "C\n", "é", "\u200b", "x" * 200, "x" * 201, "\x7f", " ", "7.0", " C1", "007", "2e+16", "1.25E2"]
        ),
    ),
    min_size=1,
    max_size=30,
)


@example(rows=[(6.0, 30.0, "basic", "1.25E2"), (6.0, 30.0, "plus", "7.0")], nullable=True)
@given(rows=ROWS, nullable=st.booleans())
@settings(deadline=None)
def test_every_row_gets_the_verdict_of_the_service(slot, rows, nullable):
    features = tuple(feature.model_copy(update={"nullable": nullable}) for feature in FEATURES)
    contract = read_contract(Path(slot.folder)).model_copy(update={"features": features})
    names = ["visits_30d", "age", "plan", "customer_id"]
    types = [pa.float64(), pa.float64(), pa.string(), pa.string()]
    arrays = [pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True)]
    table = pa.Table.from_arrays(arrays, names)
    checked = ColumnChecker(contract, MARGIN, table.schema, is_text=False, place="rows").check(table)
    service = RequestChecker(contract, MARGIN)
    kept, packed, values, customers, breaches = [], [], [], [], []
    for place, row in enumerate(rows):
        # files say NaN, or leave a text blank, where JSON can only say null
        given_ = [None if value != value or value in ("", " ") else value for value in row]
        body = {"features": dict(zip(names, given_[:3], strict=False)), "customer_id": given_[3]}
        try:
            request = service.check(body, "")
        except RefusedRequest as refused:
            breaches += [(place, breach) for breach in refused.breaches]
        else:
            kept.append(place)
            customers.append(request.customer_id)
            packed.append(pack_row(contract.features, dict(zip(names, request.values, strict=False)))[0])
            values.append(request.values)
    assert checked.kept.tolist() == kept
    expected = np.array(packed, dtype=np.float32).reshape(-1, 3)
    np.testing.assert_array_equal(checked.matrix, expected)
    assert checked.list_values(0, len(kept)) == values
    assert checked.customers.to_pylist() == customers
    assert list(checked.breaches) == breaches


CELLS = st.none() | st.text("0123456789+-.eEnaif x_", max_size=6) | st.sampled_from(["nan", "inf", "1e999", "٣", "7\n"])


@given(cells=st.lists(CELLS, min_size=1, max_size=20))
@settings(deadline=None)
def test_the_verdict_on_a_cell_of_text_does_not_depend_on_the_others(slot, cells):
    contract = read_contract(Path(slot.folder))
    contract = contract.model_copy(update={"features": (NumericFeature(name="x", minimum=0, maximum=9),)})
    checker = ColumnChecker(contract, MARGIN, pa.schema([("x", pa.string())]), is_text=True, place="rows")

    def check(some):
        checked = checker.check(pa.table({"x": pa.array(some, pa.string())}))
        return dict(zip(checked.kept.tolist(), checked.matrix[:, 0].tolist(), strict=True))

    together = check(cells)
    for place, cell in enumerate(cells):
        alone = check([cell])
        assert (place in together) == (0 in alone), cell
        if alone:
            number = together[place]
            if cell is None or not cell.strip():
                assert math.isnan(alone[0])
                assert math.isnan(number)
            else:
                assert alone[0] == number == np.float32(cell)  # Python reads it so, too


CODES = [0, 1, 2, None]
COLUMNS_OF_CODES = {
    "int64": pa.array(CODES, pa.int64()),
    "int8": pa.array(CODES, pa.int8()),
    "double": pa.array(CODES, pa.float64()),
    "float": pa.array(CODES, pa.float32()),
    "NaN": pa.array([0.0, 1.0, 2.0, math.nan], from_pandas=False),
    "decimal": pa.array(["0.00", "1.00", "2.00", None]).cast(pa.decimal128(9, 2)),
    "text": pa.array(["0", "1", "2", None]),
    "text of floats": pa.array(["0.0", "1.0", "2.0", None]),
    "large text": pa.array(["0.0", " 1", "2", ""], pa.large_string()),
    "dictionary": pa.array(["0", "1.0", "2", None]).dictionary_encode(),
    "dictionary of numbers": pa.array(CODES, pa.float64()).dictionary_encode(),
}


@pytest.mark.parametrize("name", COLUMNS_OF_CODES)
def test_codes_and_ids_are_read_alike_whatever_type_their_column_has(slot, name):
    level = CategoricalFeature(name="level", categories=("0", "1", "2"))
    contract = read_contract(Path(slot.folder)).model_copy(update={"features": (level,)})
    table = pa.table({"level": COLUMNS_OF_CODES[name], "customer_id": COLUMNS_OF_CODES[name]})
    checked = ColumnChecker(contract, MARGIN, table.schema, is_text=False, place="rows").check(table)
    assert list(checked.breaches) == []
    assert checked.matrix[:, 0].tolist() == [0, 1, 2, -1]
    assert checked.list_values(0, 4) == [("0",), ("1",), ("2",), (None,)]
    assert checked.customers.to_pylist() == ["0", "1", "2", None]


def test_a_boolean_is_one_category_at_every_door(slot):
    """As training reads it (`parse_codes`): its text, and neither a number nor one's text."""
    features = (
        CategoricalFeature(name="paid", categories=("False", "True")),
        CategoricalFeature(name="level", categories=("0", "1")),
        NumericFeature(name="age", minimum=0.0, maximum=1.0),
    )
    contract = read_contract(Path(slot.folder)).model_copy(update={"features": features})
    asked = RequestChecker(contract, MARGIN)
    for value, taken in ((True, "True"), ("True", "True"), (False, "False")):
        row = {"paid": value, "level": "1", "age": 1}
        for request in (asked.check({"features": row}, ""), asked.read(json.dumps({"features": row}).encode(), "")):
            assert request.values == (taken, "1", 1.0)
    refused = {"paid": "true", "level": True, "age": True}  # a CSV file's "true" is another text
    with pytest.raises(RefusedRequest) as found:
        asked.read(json.dumps({"features": refused}).encode(), "")
    assert {breach.field for breach in found.value.breaches} == {f"features.{name}" for name in refused}
    for paid, level in (([True, False], [True, False]), (["True", "true"], ["0", "True"])):
        table = pa.table({"paid": paid, "level": level, "age": [1.0, 1.0]})
        checked = ColumnChecker(contract, MARGIN, table.schema, is_text=False, place="rows").check(table)
        bad = {(row, breach.field.removeprefix("features.")) for row, breach in checked.breaches}
        assert bad == ({(0, "level"), (1, "level")} if level[0] is True else {(1, "paid"), (1, "level")})


@pytest.mark.parametrize(
    ("ids", "value"),
    [
        (pa.array([1.0, 2e16]), 2e16),
        (pa.array([1.0, 2.0**24], pa.float32()), 2.0**24),
        (pa.array(["1", "2e+16"]), "2e+16"),
        (pa.array([1.0, 1.5]), 1.5),
    ],
)
def test_an_id_that_has_lost_digits_is_refused(slot, ids, value):
    level = CategoricalFeature(name="level", categories=("0",))
    contract = read_contract(Path(slot.folder)).model_copy(update={"features": (level,)})
    table = pa.table({"level": ["0", "0"], "customer_id": ids})
    checked = ColumnChecker(contract, MARGIN, table.schema, is_text=False, place="rows").check(table)
    assert checked.breaches == [(1, Breach("customer_id", value, CUSTOMER_ID_RULE))]
    assert (checked.kept.tolist(), checked.customers.to_pylist()) == ([0], ["1"])


def test_bad_rows_are_named_and_not_scored(tmp_path, slot):
    rows = make_rows(40)
    rows.loc[4, "visits_30d"] = 31.0
    rows.loc[[17, 39], "plan"] = ["gold", "gold"]
    rows.loc[39, "age"] = np.nan
    rows.loc[22, "customer_id"] = "C\x00"
    rows.to_parquet(tmp_path / "in.parquet")
    result = score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path, rejected_share_max=0.1)
    assert (result.scored, result.rejected, result.rejects) == (36, 4, tmp_path / "out.rejects.jsonl")
    assert [json.loads(line) for line in result.rejects.read_text().splitlines()] == [
        {"row": 5, "field": "features.visits_30d", "value": 31.0, "rule": "from 0 to 30"},
        {"row": 18, "field": "features.plan", "value": "gold", "rule": 'one of "basic", "plus" or null'},
        {"row": 23, "field": "customer_id", "value": "C\x00", "rule": CUSTOMER_ID_RULE},
        {"row": 40, "field": "features.age", "value": None, "rule": "number"},
        {"row": 40, "field": "features.plan", "value": "gold", "rule": 'one of "basic", "plus" or null'},
    ]
    found = pd.read_parquet(tmp_path / "out.parquet")
    good = rows.drop(index=[4, 17, 22, 39])
    assert found["customer_id"].tolist() == good["customer_id"].tolist()
    np.testing.assert_allclose(found["score"], list_scores(good), atol=1e-6)
    rows.loc[[4, 17, 22, 39]] = make_rows(40).loc[[4, 17, 22, 39]]
    rows.to_parquet(tmp_path / "in.parquet")
    assert score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path).rejects is None
    assert not (tmp_path / "out.rejects.jsonl").exists()


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_too_many_bad_rows_stop_the_run(tmp_path, slot, suffix):
    rows = make_rows(200)
    rows.loc[[5, 150], "plan"] = "gold"
    source = tmp_path / f"in.{suffix}"
    rows.to_parquet(source) if suffix == "parquet" else rows.to_csv(source, index=False)
    assert score(source, tmp_path / "out.csv", slot, tmp_path).rejected == 2  # 1% of them
    (tmp_path / "out.csv").unlink()
    rows.loc[20, "plan"] = "gold"
    rows.to_parquet(source) if suffix == "parquet" else rows.to_csv(source, index=False)
    with pytest.raises(
        DataError, match=r"3 of the 160 rows read .* allowed is a share of 0.01; the first: .*features.plan.*gold"
    ):
        score(source, tmp_path / "out.csv", slot, tmp_path)
    assert not (tmp_path / "out.csv").exists()
    lines = (tmp_path / "out.rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [6, 21, 151]
    assert score(source, tmp_path / "out.csv", slot, tmp_path, rejected_share_max=0.015).scored == 197


def write_twice(path):
    table = pa.Table.from_pandas(make_rows(3))
    pq.write_table(table.append_column("age", table["age"]), path)


BAD_FILES = {
    "missing column": (lambda path: make_rows(3).drop(columns="age").to_parquet(path), "no column age; its columns: c"),
    "text": (lambda path: make_rows(3).astype({"age": str}).to_parquet(path), "column age holds .*, expected numbers"),
    "truth": (lambda path: make_rows(3).assign(age=True).to_parquet(path), "column age holds bool, expected numbers"),
    "codes": (
        lambda path: make_rows(3).assign(plan=NOON).to_parquet(path),
        "column plan holds .*, expected text or nu",
    ),
    "ids": (
        lambda path: make_rows(3).assign(customer_id=True).to_parquet(path),
        "customer_id holds bool, expected tex",
    ),
    "times": (lambda path: make_rows(3).assign(event_timestamp="x").to_parquet(path), "event_timestamp holds .* times"),
    "twice": (write_twice, "more than one column age"),
    "no Parquet": (lambda path: path.write_bytes(b"PAR1 no"), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_scored(tmp_path, slot, name):
    write, message = BAD_FILES[name]
    write(tmp_path / "in.parquet")
    with pytest.raises(DataError, match=f"in.parquet: .*{message}"):
        score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.parquet"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; a header line"),
        (b"age,plan\n1,basic\n", "no column visits_30d; its columns: age, plan"),
        (b"age,plan,visits_30d\n40,basic,1\n40,basic\n", "line 3: the number of cells is 2, but 3 in the header"),
        (b"age,plan,visits_30d\n40,b\xff,1\n", "line 2: holds bytes that are not utf-8"),
        (b"age,plan,visits_30d,event_timestamp\n40,basic,1,soon\n", "event_timestamp.*allowed: times as 2025-01-31T"),
    ],
)
def test_csv_that_cannot_be_scored(tmp_path, slot, content, message):
    (tmp_path / "in.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_wrong_arguments(tmp_path, slot):
    make_rows(3).to_csv(tmp_path / "in.csv", index=False)
    for source, target, error, message in [
        ("in.csv", "out.xlsx", ConfigError, "out.xlsx: a file of rows ends in .parquet or .csv"),
        ("in.csv", "in.csv", ConfigError, "--output .*in.csv: is the input"),
        ("in.csv", "in.csv/out.csv", ConfigError, "cannot be made beside the output"),
        ("nothing.csv", "out.csv", DataError, "--input .*nothing.csv: there is no such file"),
    ]:
        with pytest.raises(error, match=message):
            score(tmp_path / source, tmp_path / target, slot, tmp_path)
    with pytest.raises(DataError, match="digest"):
        score(tmp_path / "in.csv", tmp_path / "out.csv", Slot("7", slot.folder, "0" * 64), tmp_path)


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_that_gives_no_probability_stops_the_run(slot):
    scorer = SimpleNamespace(score=lambda _: np.array([0.1, np.nan]))
    contract = read_contract(Path(slot.folder))
    model = SimpleNamespace(contract=contract, version="7", folder_sha256="0" * 64, scorer=scorer)
    table = pa.table({"visits_30d": [1.0, 0.0], "age": [40.0, 41.0], "plan": ["basic", "basic"]})
    checker = ColumnChecker(model.contract, MARGIN, table.schema, is_text=False, place="rows")
    chunks = ChunkScorer(model, checker, input_sha256="0" * 64, id_key=KEY, clock=WALL_CLOCK)
    with pytest.raises(DataError, match="row 22: the model gives nan, which is no probability"):
        chunks.score(21, table)


def test_a_close_decision_is_the_one_of_a_lone_request(slot):
    """Scores may differ in their last digits among many rows, decisions may not."""

    def score_rows(matrix):
        if len(matrix) == 1:
            return 0.5 - 1e-7 * matrix[:, 0].astype(np.float64)
        return np.array([0.5 + 4e-7, 0.5 - 4e-7, 0.500002, 0.1])

    model = SimpleNamespace(
        contract=read_contract(Path(slot.folder)),
        version="7",
        folder_sha256="0" * 64,
        scorer=SimpleNamespace(score=score_rows),
    )
    table = pa.table({"visits_30d": [1.0, 0.0, 1.0, 1.0], "age": [40.0] * 4, "plan": ["basic"] * 4})
    checker = ColumnChecker(model.contract, MARGIN, table.schema, is_text=False, place="rows")
    found = ChunkScorer(model, checker, input_sha256="0" * 64, id_key=KEY, clock=WALL_CLOCK).score(1, table).table
    assert found["decision"].to_pylist() == [0, 1, 1, 0]
    assert found["score"].to_pylist() == [0.5 - 1e-7, 0.5, 0.500002, 0.1]


def test_the_shop_is_scored_as_the_service_scores_it(small_shop, tmp_path):
    """Every feature row of a snapshot, with the trained model: the same score and decision as a request of its own."""
    source = max((small_shop.root / "data/features").glob("*.parquet"))
    folder = small_shop.root / "models/candidate"
    result = score(source, tmp_path / "out.parquet", Slot("1", str(folder), ""), tmp_path, chunk_rows=4000)
    model = load_model(folder, version="1", folder_sha256=None)
    service = RequestChecker(model.contract, MARGIN)
    expected = []
    table = pq.read_table(source)
    for row in table.select(["customer_id", *model.contract.feature_names]).to_pylist():
        customer = row.pop("customer_id")
        request = service.check({"customer_id": customer, "features": row}, "")
        value = float(model.scorer.score(model.pack([request.values]))[0])
        expected.append((customer, value, int(value >= model.contract.threshold)))
    found = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert result.scored == len(expected) > 4000
    assert found["customer_id"] == [customer for customer, _, _ in expected]
    assert found["decision"] == [decision for _, _, decision in expected]
    np.testing.assert_allclose(found["score"], [value for _, value, _ in expected], rtol=0, atol=1e-6)


# --- the log ----------------------------------------------------------------------------------------------------------


def test_every_scored_row_is_logged_once(tmp_path, slot, store):
    rows = make_rows(23).assign(event_timestamp=NOON)
    rows.loc[4, "age"] = 999.0
    rows.to_parquet(tmp_path / "in.parquet")
    for _ in range(2):
        score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path, store=store, rejected_share_max=0.1)
    logged = {found.prediction_id: found for some in store.read_predictions("test_churn") for found in some}
    output = pd.read_parquet(tmp_path / "out.parquet")
    assert logged.keys() == set(output["prediction_id"])
    assert len(logged) == 22
    good = rows.drop(index=4).reset_index()
    for place, row in output.iterrows():
        found, given_ = logged[row["prediction_id"]], good.loc[place]
        assert found.features == (given_["visits_30d"], given_["age"], given_["plan"])
        assert (found.score, found.decision) == (row["score"], row["decision"])
        assert (found.model_version, found.variant, found.source) == ("7", "champion", "batch")
        assert (found.customer_id, found.features_as_of) == (given_["customer_id"], NOON.to_pydatetime())
        assert found.request_id.endswith(f"-{given_['index'] + 1}")
        assert not found.forced


def test_times_without_a_zone_are_utc(tmp_path, slot, store):
    rows = make_rows(4)
    rows.assign(event_timestamp=NOON.tz_localize(None)).to_parquet(tmp_path / "in.parquet")
    rows.assign(event_timestamp="2024-03-01 12:00:00").to_csv(tmp_path / "in.csv", index=False)
    for name in ("in.parquet", "in.csv"):
        score(tmp_path / name, tmp_path / "out.csv", slot, tmp_path, store=store)
    found = [found.features_as_of for some in store.read_predictions("test_churn") for found in some]
    assert found == [NOON.to_pydatetime()] * 8


def test_another_version_gives_other_ids(tmp_path, slot, store):
    make_rows(5).to_parquet(tmp_path / "in.parquet")
    other = write_model_folder(tmp_path / "model", bias=0.25)
    for chosen in (slot, Slot("8", str(other), "")):
        score(tmp_path / "in.parquet", tmp_path / "out.parquet", chosen, tmp_path, store=store)
    assert len(read_ids(store)) == 10


def test_a_store_that_refuses_stops_the_run(tmp_path, slot):
    refused = SimpleNamespace(refused=(("an-id", "no room"),))
    refusing = SimpleNamespace(database=SimpleNamespace(name="a store"), insert=lambda _: refused)
    make_rows(5).to_parquet(tmp_path / "in.parquet")
    with pytest.raises(DataError, match=r"the operations store refuses prediction an-id: no room"):
        score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path, store=refusing)
    assert not (tmp_path / "out.parquet").exists()


@given(st.lists(st.integers(1, 10**9), max_size=5), st.binary(max_size=64))
def test_rows_are_sealed_as_single_ids_are(rows, key):
    position = ("batch", "a" * 64, "b" * 64)
    assert seal_rows(position, rows, key) == [seal_id(digest_position(*position, row), key) for row in rows]


# --- death ------------------------------------------------------------------------------------------------------------

KILL = """
import os, shutil, sys, threading
from itertools import count
from pathlib import Path
from closedloop.tabular import row_tables
from closedloop.tabular import rows
from closedloop.store.database import Database
from closedloop.store.predictions import Predictions
from closedloop.scoring import batch
from closedloop.scoring import jobs
from closedloop.serving.slots.slots import Slot
from closedloop.store.database import Database

folder, target, every = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sources = {module.__file__ for module in (batch, jobs, row_tables, rows)}

def run(case, tracing=None):
    store = Predictions(Database(f"sqlite:///{case / 'operations.db'}"))
    options = batch.BatchOptions(0.5, b"a secret", store, chunk_rows=10, resume=True, rejected_share_max=0.1)
    sys.settrace(tracing)
    batch.score_batch(str(case / "in.parquet"), target.format(case), Slot("7", str(folder / "model"), ""), options,
                      state_dir=case / "state")

def kill_at(step):
    lines = 0
    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in sources:
            return None
        lines += event == "line"
        if lines == step:
            os._exit(9)  # no cleaning up, as by a kill
        return trace
    return trace

shutil.copytree(folder / "template", folder / "first")
run(folder / "first")  # whatever is imported late is there, so that the forks are quick
sys.settrace(None)
for step in count(1, every):
    case = folder / f"{step}"
    shutil.copytree(folder / "template", case)
    child = os.fork()
    if not child:
        run(case, kill_at(step))
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    child = os.fork()
    if not child:
        run(case)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, step
"""


def kill_everywhere(tmp_path, slot, target: str, every: int) -> list[Path]:
    """Folders in which a run was killed at another line each, and resumed."""
    template = tmp_path / "template"
    template.mkdir()
    (tmp_path / "model").symlink_to(slot.folder)
    rows = make_rows(25)
    rows.loc[12, "plan"] = "gold"
    rows.to_parquet(template / "in.parquet")
    made = Predictions(Database(f"sqlite:///{template / 'operations.db'}"))
    made.database.upgrade()
    made.database.close()
    subprocess.run([sys.executable, "-c", KILL, str(tmp_path), target, str(every)], check=True)
    return [path for path in tmp_path.iterdir() if path.name.isdigit()]


def test_a_run_killed_anywhere_and_resumed_writes_the_same_file(tmp_path, slot):
    cases = kill_everywhere(tmp_path, slot, "{}/out.parquet", every=7)
    assert len(cases) > 30
    score(tmp_path / "template/in.parquet", tmp_path / "out.parquet", slot, tmp_path, rejected_share_max=0.1)
    expected = [(tmp_path / name).read_bytes() for name in ("out.parquet", "out.rejects.jsonl")]
    ids = pd.read_parquet(tmp_path / "out.parquet")["prediction_id"].tolist()
    for case in cases:
        assert [(case / name).read_bytes() for name in ("out.parquet", "out.rejects.jsonl")] == expected, case.name
        assert not list(case.glob(".*")), case.name
        with contextlib.closing(Database(f"sqlite:///{case / 'operations.db'}")) as database:
            assert read_ids(Predictions(database)) == Counter(ids), case.name


def test_a_run_killed_anywhere_and_resumed_fills_a_table_once(tmp_path, slot):
    cases = kill_everywhere(tmp_path, slot, "sqlite:///{}/out.db#scores", every=12)
    assert len(cases) > 30
    score(tmp_path / "template/in.parquet", tmp_path / "out.parquet", slot, tmp_path, rejected_share_max=0.1)
    expected = pd.read_parquet(tmp_path / "out.parquet")
    for case in cases:
        found = read_scores(case / "out.db")
        pd.testing.assert_frame_equal(found, expected, check_dtype=False, obj=case.name)


def read_scores(path: Path, order: str = "rowid") -> pd.DataFrame:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return pd.read_sql(f"SELECT * FROM scores ORDER BY {order}", connection)


class Interrupted(Exception):
    pass


def interrupt(tmp_path, slot, store, *, after: int, source=None, target=None):
    """A run that ends when it logs for the ``after``-th time."""
    calls = 0

    def insert(records):
        nonlocal calls
        calls += 1
        if calls == after:
            raise Interrupted
        return store.insert(records)

    files = source or tmp_path / "in.csv", target or tmp_path / "out.csv"
    with pytest.raises(Interrupted):
        score(*files, slot, tmp_path, store=SimpleNamespace(database=store.database, insert=insert))


def test_what_is_finished_is_not_scored_again(tmp_path, slot, store):
    make_rows(45).to_csv(tmp_path / "in.csv", index=False)
    interrupt(tmp_path, slot, store, after=4)
    assert score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path, store=store, resume=True).resumed == 30
    interrupt(tmp_path, slot, store, after=4)
    assert score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path, store=store).resumed == 0
    assert score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path, store=store, resume=True).resumed == 0
    assert set(read_ids(store).values()) == {1}


def test_a_full_disk_stops_a_run_that_can_be_resumed(tmp_path, slot):
    def insert(records):
        if len(logged) == room:
            raise OSError(errno.ENOSPC, "No space left on device")
        logged.append(records)
        return SimpleNamespace(refused=())

    logged, room = [], 2
    store = SimpleNamespace(database=SimpleNamespace(name="a store"), insert=insert)
    make_rows(45).to_csv(tmp_path / "in.csv", index=False)
    files = tmp_path / "in.csv", tmp_path / "out.csv"
    with pytest.raises(ServiceUnavailable, match="No space left on device; what is finished stays there for --resume"):
        score(*files, slot, tmp_path, store=store)
    room = None
    assert score(*files, slot, tmp_path, store=store, resume=True).resumed == 20
    assert [len(records) for records in logged] == [10, 10, 10, 10, 5]


def make_store(name: str) -> SimpleNamespace | None:
    if not name:
        return None
    return SimpleNamespace(database=SimpleNamespace(name=name), insert=lambda _: SimpleNamespace(refused=()))


@pytest.mark.parametrize(("before", "after"), [("", "a store"), ("a store", ""), ("a store", "another store")])
def test_a_run_is_resumed_with_the_log_it_had(tmp_path, slot, before, after):
    """What is finished is not logged again, so that no store would have all of it."""
    rows = make_rows(45)
    rows.loc[40, "plan"] = "gold"
    rows.to_csv(tmp_path / "in.csv", index=False)
    files = tmp_path / "in.csv", tmp_path / "out.csv"
    with pytest.raises(DataError, match="break the contract"):
        score(*files, slot, tmp_path, store=make_store(before), rejected_share_max=0)
    options = {"resume": True, "rejected_share_max": 0.1}
    with pytest.raises(ConfigError, match="had another prediction_log; start again without --resume"):
        score(*files, slot, tmp_path, store=make_store(after), **options)
    assert score(*files, slot, tmp_path, store=make_store(before), **options).resumed == 45


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"chunk_rows": 9}, "chunk_rows"),
        ({"range_margin": 2.0}, "range_margin"),
        ({"id_key": b"another"}, "key"),
        ({"input": 46}, "input_sha256"),
        ({"bias": 0.1}, "model_sha256"),
    ],
)
def test_another_job_is_not_resumed(tmp_path, slot, store, changed, what):
    make_rows(45).to_csv(tmp_path / "in.csv", index=False)
    interrupt(tmp_path, slot, store, after=3)
    if "input" in changed:
        make_rows(changed.pop("input")).to_csv(tmp_path / "in.csv", index=False)
    if "bias" in changed:
        slot = Slot("7", str(write_model_folder(tmp_path / "model", bias=changed.pop("bias"))), "")
    with pytest.raises(ConfigError, match=f"--resume: the unfinished run in .* had another {what}; start again"):
        score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path, store=store, resume=True, **changed)
    assert score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path, store=store, **changed).resumed == 0


def test_one_process_writes_an_output(tmp_path, slot):
    make_rows(5).to_csv(tmp_path / "in.csv", index=False)
    (tmp_path / ".out.csv.batch").mkdir()
    lock = take_lock(tmp_path / ".out.csv.batch" / LOCK_FILE)
    try:
        with pytest.raises(ServiceUnavailable, match="another process writes this output"):
            score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path)
    finally:
        os.close(lock)
    assert score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path).rows == 5


# --- tables -----------------------------------------------------------------------------------------------------------


def write_members(url: str, rows: pd.DataFrame, *, key: bool) -> None:
    """A table, stored backwards; with a primary key it has to be read in that key's order."""
    engine = sa.create_engine(url)
    table = sa.Table(
        "members",
        sa.MetaData(),
        sa.Column("number", sa.Integer, primary_key=key),
        sa.Column("customer_id", sa.Text),
        sa.Column("visits_30d", sa.Numeric),
        sa.Column("age", sa.Integer),
        sa.Column("plan", sa.Text),
        sa.Column("event_timestamp", sa.DateTime(timezone=True)),
    )
    values = rows.assign(number=range(len(rows)), event_timestamp=NOON.to_pydatetime()).astype(object)
    with engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), values.where(values.notna(), None).to_dict("records")[::-1])
    engine.dispose()


@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
def test_a_table_in_its_keys_order(tmp_path, slot, store):
    rows = make_rows(33)
    address = f"sqlite:///{tmp_path / 'club.db'}"
    write_members(address, rows, key=True)
    result = score(f"{address}#members", f"{address}#scores", slot, tmp_path, store=store)
    found = read_scores(tmp_path / "club.db")
    assert result.rows == len(found) == 33
    assert found["customer_id"].tolist() == rows["customer_id"].tolist()
    np.testing.assert_allclose(found["score"], list_scores(rows), atol=1e-6)
    times = {found.features_as_of for some in store.read_predictions("test_churn") for found in some}
    assert times == {NOON.to_pydatetime()}
    assert read_ids(store) == Counter(found["prediction_id"])
    score(f"{address}#members", f"{address}#scores", slot, tmp_path, store=store)
    pd.testing.assert_frame_equal(read_scores(tmp_path / "club.db"), found)


@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
def test_a_copied_table_is_resumed_and_another_is_not(tmp_path, slot, store):
    for name, count in (("a", 30), ("b", 31)):
        write_members(f"sqlite:///{tmp_path / name}.db", make_rows(count), key=True)
    source, target = f"sqlite:///{tmp_path / 'a.db'}#members", tmp_path / "out.parquet"
    interrupt(tmp_path, slot, store, after=3, source=source, target=target)
    with contextlib.closing(sqlite3.connect(tmp_path / "a.db")) as connection, connection:
        connection.execute("DELETE FROM members")
    with pytest.raises(ConfigError, match="had another input_sha256"):
        score(source.replace("a.db", "b.db"), target, slot, tmp_path, store=store, resume=True)
    result = score(source, target, slot, tmp_path, store=store, resume=True)
    assert (result.rows, result.resumed) == (30, 20)
    assert len(read_ids(store)) == 30


@pytest.mark.filterwarnings("ignore:Dialect sqlite.pysqlite does .not. support Decimal")
def test_a_table_without_a_key_is_numbered_the_same_again(tmp_path, slot):
    for name, rows in (("a", make_rows(20)), ("b", make_rows(20).sample(frac=1, random_state=1))):
        write_members(f"sqlite:///{tmp_path / name}.db", rows, key=False)
        score(f"sqlite:///{tmp_path / name}.db#members", tmp_path / f"{name}.parquet", slot, tmp_path)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_tables_of_postgresql(tmp_path, slot, monkeypatch):
    rows = make_rows(33)
    rows.loc[3, "plan"] = "gold"
    with run_postgres(tmp_path) as server:
        url = server.create_database()
        monkeypatch.setenv("CLUB_DATABASE", url)
        write_members(url.replace("postgresql:", "postgresql+psycopg:"), rows, key=True)
        for _ in range(2):
            result = score("CLUB_DATABASE#public.members", "CLUB_DATABASE#scores", slot, tmp_path, rejected_share_max=1)
        engine = sa.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
        found = pd.read_sql("SELECT * FROM scores", engine).set_index("customer_id", drop=False)
        engine.dispose()
        server.stop()
        with pytest.raises(ServiceUnavailable, match="CLUB_DATABASE#members: ") as refused:
            score("CLUB_DATABASE#members", tmp_path / "out.csv", slot, tmp_path)
    assert PASSWORD not in str(refused.value)
    assert json.loads(result.rejects.read_text())["row"] == 4
    good = rows.drop(index=3)
    assert sorted(map(str, found["customer_id"])) == sorted(map(str, good["customer_id"]))
    known = good[good["customer_id"].notna()]
    np.testing.assert_allclose(found.loc[known["customer_id"], "score"], list_scores(known), atol=1e-6)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("sqlite:///{}/club.db#nobody", DataError, "club.db#nobody: there is no such table"),
        ("sqlite:///{}/club.db#few", DataError, "club.db#few: no column visits_30d, plan; its columns: age"),
        (
            "sqlite:///{}/club.db#wrong",
            DataError,
            "#wrong: column age: row 1 holds 'old', expected int or float",
        ),
        ("sqlite:///{}/club.db#truth", DataError, "#truth: column age: row 1 holds True, expected int or float"),
        ("sqlite:////nowhere/club.db#few", ServiceUnavailable, "unable to open database file"),
        ("NO_SUCH_VARIABLE#few", ConfigError, "the environment variable NO_SUCH_VARIABLE is not set"),
        ("mysql://host/club#few", ConfigError, "allowed are sqlite:///file.db#table"),
        ("postgresql://reader:s3cr3t-w0rd@host/club#few", ConfigError, "with a password into an environment variable"),
        ("postgresql://reader:s3cr3t-w0rd@host:x/club#few", ConfigError, "not an address"),
    ],
)
def test_a_table_that_cannot_be_scored(tmp_path, slot, source, error, message):
    with contextlib.closing(sqlite3.connect(tmp_path / "club.db")) as connection, connection:
        connection.execute("CREATE TABLE few (age INTEGER)")
        connection.execute("CREATE TABLE wrong (age INTEGER, visits_30d REAL, plan TEXT)")
        connection.execute("INSERT INTO wrong VALUES ('old', 1, 'basic')")
        connection.execute("CREATE TABLE truth (age BOOLEAN, visits_30d REAL, plan TEXT)")
        connection.execute("INSERT INTO truth VALUES (1, 1, 'basic')")
    with pytest.raises(error, match=message) as refused:
        score(source.format(tmp_path), tmp_path / "out.csv", slot, tmp_path)
    assert "s3cr3t-w0rd" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["club.db"]


@pytest.mark.parametrize("name", ['few"; DROP TABLE few; --', "few'; DROP TABLE few; --", "few]; --", "$(id)"])
def test_a_tables_name_is_a_name_and_no_sql(tmp_path, name):
    with contextlib.closing(sqlite3.connect(tmp_path / "club.db")) as connection, connection:
        connection.execute("CREATE TABLE few (age INTEGER)")
    table = find_table(f"sqlite:///{tmp_path}/club.db#{name}")
    insert_rows(table, {'id"; --': str, "score": float}, 'id"; --', [[{'id"; --': "a'; --", "score": 0.5}]])
    _, chunks = read_rows(table, ['id"; --', "score"], [])
    assert [tuple(row) for chunk in chunks for row in chunk] == [("a'; --", 0.5)]
    with contextlib.closing(sqlite3.connect(tmp_path / "club.db")) as connection:
        found = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert found == {"few", name}


def test_rows_of_a_table_are_seen_all_at_once_and_those_of_a_date_are_replaced(tmp_path):
    table = find_table(f"sqlite:///{tmp_path}/club.db#scores")
    columns, first, second = {"id": str, "as_of": dt.date}, dt.date(2024, 1, 1), dt.date(2024, 1, 2)

    def list_rows(day, *names):
        return [{"id": name, "as_of": day} for name in names]

    def read():
        with contextlib.closing(sqlite3.connect(tmp_path / "club.db")) as connection:
            return sorted(row[0] for row in connection.execute("SELECT id FROM scores"))

    def give(error=None):
        yield list_rows(second, "new 1")
        assert read() == ["first", "old 1", "old 2"], "what is being written is not seen"
        yield list_rows(second, "new 2")
        if error:
            raise error

    insert_rows(table, columns, "id", [list_rows(first, "first"), list_rows(second, "old 1", "old 2")])
    with pytest.raises(DataError, match="the disk broke"):
        insert_rows(table, columns, "id", give(DataError("the disk broke")), replaced={"as_of": second})
    assert read() == ["first", "old 1", "old 2"]
    insert_rows(table, columns, "id", give(), replaced={"as_of": second})
    assert read() == ["first", "new 1", "new 2"]


def test_a_day_that_is_scored_again_takes_the_place_of_its_rows(tmp_path, slot):
    target = f"sqlite:///{tmp_path}/club.db#scores"
    for day, count in ((1, 30), (2, 20), (2, 25)):  # the source learnt of five more
        make_rows(count).to_parquet(tmp_path / "in.parquet")
        score(tmp_path / "in.parquet", target, slot, tmp_path, as_of=dt.date(2024, 1, day))
    found = read_scores(tmp_path / "club.db")
    assert found["as_of"].value_counts().to_dict() == {"2024-01-01": 30, "2024-01-02": 25}
    score(tmp_path / "in.parquet", tmp_path / "out.csv", slot, tmp_path, as_of=dt.date(2024, 1, 2))
    assert set(pd.read_csv(tmp_path / "out.csv")["as_of"]) == {"2024-01-02"}


@pytest.fixture
def bucket(monkeypatch):
    server = Bucket()
    server.start()
    for name, value in (ACCOUNT | {"AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)
    yield server
    server.stop()


def make_bucket(server: Bucket, name: str) -> None:
    server.client().create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})


def test_an_object_of_s3_has_what_a_file_has(bucket, tmp_path, slot):
    make_bucket(bucket, "scores")
    rows = make_rows(200)
    rows.loc[7, "age"] = 500.0
    rows.to_parquet(tmp_path / "in.parquet")
    score(tmp_path / "in.parquet", tmp_path / "out.parquet", slot, tmp_path)
    result = score(tmp_path / "in.parquet", "s3://scores/a/b.parquet", slot, tmp_path)
    sent = bucket.client().get_object(Bucket="scores", Key="a/b.parquet")["Body"].read()
    assert sent == (tmp_path / "out.parquet").read_bytes()
    assert json.loads(result.rejects.read_text())["row"] == 8
    assert [one.suffix for one in (tmp_path / "state/batch").iterdir()] == [".jsonl"], "the work folder is gone"


def test_an_object_that_cannot_be_written_is_an_outage_and_can_be_resumed(bucket, tmp_path, slot):
    make_rows(30).to_parquet(tmp_path / "in.parquet")
    with pytest.raises(ServiceUnavailable, match=r"s3://elsewhere/b\.csv: The specified bucket does not exist"):
        score(tmp_path / "in.parquet", "s3://elsewhere/b.csv", slot, tmp_path)
    make_bucket(bucket, "elsewhere")
    assert score(tmp_path / "in.parquet", "s3://elsewhere/b.csv", slot, tmp_path, resume=True).resumed == 30
    with pytest.raises(ConfigError, match=r"s3:/.*b\.json: "):
        score(tmp_path / "in.parquet", "s3://elsewhere/b.json", slot, tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        "customer_id TEXT PRIMARY KEY, score REAL",
        "customer_id TEXT, score REAL, decision INT, model_version TEXT, prediction_id TEXT",
        "score REAL, decision INT, model_version TEXT, prediction_id TEXT PRIMARY KEY",  # of rows without customers
    ],
)
def test_a_table_of_another_shape_is_refused_before_a_row_is_scored(tmp_path, slot, store, columns):
    with contextlib.closing(sqlite3.connect(tmp_path / "club.db")) as connection, connection:
        connection.execute(f"CREATE TABLE scores ({columns})")
    make_rows(3).to_csv(tmp_path / "in.csv", index=False)
    with pytest.raises(DataError, match=r"needed are .*score, .* with the primary key prediction_id"):
        score(tmp_path / "in.csv", f"sqlite:///{tmp_path / 'club.db'}#scores", slot, tmp_path, store=store)
    assert not read_ids(store)
    assert read_scores(tmp_path / "club.db").empty


def test_a_target_that_cannot_be_written_is_refused_before_a_row_is_scored(tmp_path, slot, store):
    make_rows(3).to_csv(tmp_path / "in.csv", index=False)
    (tmp_path / "out.csv").mkdir()
    with pytest.raises(ConfigError, match=r"out\.csv: it is a folder; name a file"):
        score(tmp_path / "in.csv", tmp_path / "out.csv", slot, tmp_path, store=store)
    nowhere = f"sqlite:///{tmp_path}/nowhere/club.db#scores"
    with pytest.raises(ServiceUnavailable, match="unable to open database file"):
        score(tmp_path / "in.csv", nowhere, slot, tmp_path, store=store)
    with pytest.raises(DataError, match=r"club\.db#other\.scores: there is no such schema"):
        score(tmp_path / "in.csv", f"sqlite:///{tmp_path}/club.db#other.scores", slot, tmp_path, store=store)
    assert not read_ids(store)


# --- the champion -----------------------------------------------------------------------------------------------------


def make_champion(version: str = "3") -> SimpleNamespace:
    row = Deployment("test_churn", 1, version, "salt", NOON.to_pydatetime())
    return SimpleNamespace(read_deployment=lambda name: row if name == "test_churn" else None)


def make_registry(slot, tagged: str) -> SimpleNamespace:
    return SimpleNamespace(
        fetch_version=lambda version, folder: (Path(shutil.copytree(slot.folder, folder / version)), tagged)
    )


def test_the_champion_is_downloaded_for_as_long_as_it_is_needed(tmp_path, slot):
    registry = make_registry(slot, slot.folder_sha256)
    with open_champion(tmp_path, "test_churn", make_champion(), registry) as found:
        assert (found.version, found.folder_sha256) == ("3", slot.folder_sha256)
        assert digest_folder(Path(found.folder)) == slot.folder_sha256
    assert not Path(found.folder).exists()


def test_the_services_own_copy_of_the_champion_is_taken_if_it_is_that_version(tmp_path, slot):
    own = write_slots(tmp_path, Slots(1, "salt", Slot("3", slot.folder, slot.folder_sha256))).champion
    with open_champion(tmp_path, "test_churn", make_champion(), SimpleNamespace()) as found:
        assert found == own
    registry = make_registry(slot, slot.folder_sha256)
    with open_champion(tmp_path, "test_churn", make_champion("4"), registry) as found:
        assert (found.version, found.folder == own.folder) == ("4", False)


def test_no_champion(tmp_path, slot):
    with (
        pytest.raises(ConfigError, match="no version of other is released: 'closedloop run' makes a first one"),
        open_champion(tmp_path, "other", make_champion(), SimpleNamespace()),
    ):
        pass
    with (
        pytest.raises(DataError, match="the registry says 000000000000"),
        open_champion(tmp_path, "test_churn", make_champion(), make_registry(slot, "0" * 64)),
    ):
        pass
