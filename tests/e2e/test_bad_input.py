"""Broken data: an error of one screen that names the place and the rule, and earlier results as they were."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

SCREEN_LINES = 25
TABLE = {
    "name": "members",
    "model_name": "members_churn",
    "description": "Members of a club, one row each.",
    "kind": "table",
    "source": {"type": "csv"},
    "columns": {
        "entity_id": "id",
        "numeric": ["visits", "fee"],
        "categorical": ["plan"],
        "label": {"column": "left", "churned": "yes", "stayed": "no"},
    },
    "expectations": [
        {"table": "customers", "type": "expect_column_values_to_be_unique", "kwargs": {"column": "customer_id"}}
    ],
}
EVENTS = {
    "name": "corner",
    "model_name": "corner_churn",
    "description": "Sales of a corner shop, and its clients.",
    "kind": "events",
    "source": {"type": "csv"},
    "customers_source": {"type": "csv"},
    "timezone": "Europe/Berlin",
    "columns": {"entity_id": "client", "time": "at", "amount": "price", "since": "joined", "numeric": ["age"]},
    "event_types": {"purchase": {"has_amount": True}},
    "label": {
        "event_type": "purchase",
        "horizon_days": 30,
        "active_days": 60,
        "snapshot_every_days": 30,
        "warmup_days": 60,
    },
    "expectations": TABLE["expectations"],
}


def write_members(path):
    draw = np.random.default_rng(3)
    rows = pd.DataFrame({"id": [f"m{number:03}" for number in range(300)]})
    rows["visits"] = draw.integers(0, 30, 300)
    rows["fee"] = draw.uniform(10, 90, 300).round(2)
    rows["plan"] = draw.choice(["basic", "family"], 300)
    rows["left"] = np.where(draw.uniform(size=300) < 0.3, "yes", "no")
    rows.to_csv(path, index=False)


def write_sales(events_path, clients_path):
    """Half of the clients buy every week, the others once every seven weeks: each 30 days some stay away."""
    rows = []
    for client in range(60):
        for day in range(client * 5 % 49, 330, 7 if client % 2 else 49):
            time = pd.Timestamp("2024-01-01 10:00") + pd.Timedelta(days=day, minutes=client)
            rows.append({"client": f"c{client:02}", "at": f"{time}", "price": 5 + client})
    pd.DataFrame(rows).sort_values("at").to_csv(events_path, index=False)
    clients = {"client": [f"c{client:02}" for client in range(60)], "joined": "2023-12-01", "age": range(20, 80)}
    pd.DataFrame(clients).to_csv(clients_path, index=False)


def describe_dataset(project, config):
    path = project.root / f"configs/datasets/{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@pytest.fixture(scope="module")
def sound_members(make_project, tmp_path_factory):
    """A table that goes through every stage up to training."""
    made = make_project(tmp_path_factory.mktemp("members") / "project")
    describe_dataset(made, TABLE)
    write_members(made.root / "members.csv")
    made.change_params({"dataset": "members", "data": {"source": "members.csv"}})
    made.run_stages("ingest", "validate", "features", "training-set")
    return made


@pytest.fixture(scope="module")
def sound_corner(make_project, tmp_path_factory):
    """An event log with a file of customers that goes through every stage up to training."""
    made = make_project(tmp_path_factory.mktemp("corner") / "project")
    describe_dataset(made, EVENTS)
    write_sales(made.root / "sales.csv", made.root / "clients.csv")
    sources = {"source": "sales.csv", "customers_source": "clients.csv"}
    made.change_params({"dataset": "corner", "as_of": "2024-11-01", "data": sources})
    made.change_params({"features": {"window_days": [7, 30], "aggregations": ["count", "sum"]}})
    made.run_stages("ingest", "validate", "features", "training-set")
    return made


@pytest.fixture
def members(sound_members, tmp_path):
    return sound_members.copy(tmp_path / "project")


@pytest.fixture
def corner(sound_corner, tmp_path):
    return sound_corner.copy(tmp_path / "project")


def digest_results(project):
    files = [path for name in ("data", "metrics") for path in (project.root / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(project.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def list_left_overs(project):
    """Files and folders that a broken write would leave behind."""
    found = [path for name in ("data", "metrics", "reports") for path in (project.root / name).rglob("*")]
    return [path for path in found if path.name.startswith(".") or path.name.endswith((".partial", ".tmp"))]


def refuse(project, stage, *words, status=1, own_outputs=()):
    """The stage must refuse on one screen, with these words, and leave all results but its own as they were."""
    before = digest_results(project)
    output = project.run(stage, status=status).output
    text = " ".join(output.split())
    assert len(output.splitlines()) <= SCREEN_LINES
    assert "Traceback" not in output
    for word in words:
        assert word in text
    after = digest_results(project)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.startswith(own_outputs or "-")} == set()
    assert not list_left_overs(project)


def replace_line(number, text):
    """Replace a line of a file; line 1 is the header."""

    def edit(path):
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return edit


def keep_lines(count):
    return lambda path: path.write_text(
        "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:count]), encoding="utf-8"
    )


def append_bytes(content):
    return lambda path: path.write_bytes(path.read_bytes() + content)


def forget_ids(path):
    pd.read_csv(path).assign(id=None).to_csv(path, index=False)


MEMBERS_FAULTS = {
    "missing file": (Path.unlink, ["data.source 'members.csv': no such file"]),
    "empty file": (lambda path: path.write_bytes(b""), ["members.csv: the file is empty", "a header line"]),
    "header only": (keep_lines(1), ["there are column names, but no rows"]),
    "wrong column": (
        replace_line(1, "id,visit,fee,plan,left"),
        ["members.csv: no column 'visits'", "its columns: id, visit, fee, plan, left"],
    ),
    "bad number": (
        replace_line(8, "m006,3,twelve,basic,no"),
        ["DataError: members.csv, row 7, column 'fee': must be a number, found 'twelve'"],
    ),
    "infinite number": (replace_line(8, "m006,inf,12,basic,no"), ["row 7, column 'visits': must be a number"]),
    "not utf-8": (
        append_bytes("m300,1,1,grün,no\n".encode("latin-1")),
        ["members.csv, line 302: holds bytes that are not utf-8"],
    ),
    "binary": (
        lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" * 40),
        ["DataError: members.csv, line 1: holds bytes that are not utf-8"],
    ),
    "ragged row": (
        replace_line(8, "m006,3,12,basic,no,too,many"),
        ["members.csv, line 8: the number of cells is 7, but 5"],
    ),
    "open quote": (replace_line(8, 'm006,3,12,"basic,no'), ["members.csv, line 8: a quoted value does not end"]),
    "strange label": (
        replace_line(8, "m006,3,12,basic,maybe"),
        ["row 7, column 'left': must be 'yes' (churned) or 'no' (stayed), found 'maybe'"],
    ),
    "blank label": (replace_line(8, "m006,3,12,basic,"), ["row 7, column 'left': must be 'yes' (churned)"]),
    "no ids": (forget_ids, ["DataError: data.source: no row", "is left (300 rows read"]),
}


@pytest.mark.parametrize("fault", MEMBERS_FAULTS)
def test_a_broken_table_is_refused(members, fault):
    edit, words = MEMBERS_FAULTS[fault]
    edit(members.root / "members.csv")
    refuse(members, "ingest", "DataError: ", *words)


SALES_FAULTS = {
    "bad date": ("sales.csv", replace_line(6, "c03,2024-02-30,8"), ["sales.csv, row 5, column 'at': must be a date"]),
    "no date": ("sales.csv", replace_line(6, "c03,,8"), ["sales.csv, row 5, column 'at': must be a date"]),
    "bad amount": ("sales.csv", replace_line(6, "c03,2024-01-04,8 EUR"), ["row 5, column 'price': must be a number"]),
    "all later": (
        "sales.csv",
        lambda path: path.write_text(path.read_text(encoding="utf-8").replace("2024-", "2028-"), encoding="utf-8"),
        ["no event before as_of 2024-11-01 is left"],
    ),
    "no customers file": ("clients.csv", Path.unlink, ["clients.csv': no such file"]),
    "customers without the id": (
        "clients.csv",
        replace_line(1, "name,joined,age"),
        ["clients.csv: no column 'client'"],
    ),
    "bad signup": ("clients.csv", replace_line(4, "c02,soon,22"), ["clients.csv, row 3, column 'joined'"]),
    "bad age": ("clients.csv", replace_line(4, "c02,2023-12-01,old"), ["clients.csv, row 3, column 'age'"]),
}


@pytest.mark.parametrize("fault", SALES_FAULTS)
def test_a_broken_event_log_is_refused(corner, fault):
    name, edit, words = SALES_FAULTS[fault]
    edit(corner.root / name)
    refuse(corner, "ingest", "DataError: ", *words)


def test_the_missing_customers_file_is_named_by_its_own_key(corner):
    (corner.root / "clients.csv").unlink()
    refuse(corner, "ingest", "DataError: data.customers_source 'clients.csv': no such file")


def test_times_without_a_zone_need_one(corner):
    describe_dataset(corner, {**EVENTS, "timezone": None})
    refuse(corner, "ingest", "ConfigError: timezone: sales.csv has times without a zone")


@pytest.mark.parametrize(("name", "line"), [("members", "m006,3,12,basic,no"), ("corner", "c06,2023-12-01,26")])
def test_a_customer_who_occurs_twice_is_the_data_gates_business(request, name, line):
    project = request.getfixturevalue(name)
    append_bytes(f"{line}\n".encode())(project.root / ("members.csv" if name == "members" else "clients.csv"))
    project.run("ingest")
    customer = line.split(",")[0]
    words = ["data gate: failed critical expectations: 1 of ", "customers.customer_id", "2 of", f"={customer}"]
    refuse(project, "validate", *words, status=2, own_outputs=("metrics/data_quality.json",))
    assert project.read_json("metrics/data_quality.json")["failed_critical"] == 1


@pytest.mark.parametrize("name", ["members", "corner"])
def test_a_customer_who_occurs_twice_is_refused_where_nobody_expected_it(request, name):
    project = request.getfixturevalue(name)
    config, line = (TABLE, "m006,3,12,basic,no") if name == "members" else (EVENTS, "c06,2023-12-01,26")
    describe_dataset(project, {**config, "expectations": []})
    append_bytes(f"{line}\n".encode())(project.root / ("members.csv" if name == "members" else "clients.csv"))
    project.run("ingest")
    refuse(project, "features", "DataError: data/raw/customers.parquet: customer_id must be unique")


def test_a_label_of_one_class_trains_nothing(members):
    path = members.root / "members.csv"
    pd.read_csv(path).assign(left="no").to_csv(path, index=False)
    members.run_stages("ingest", "features")
    refuse(members, "training-set", "DataError: training set: the train part has", "rows, all of one class")


def test_three_members_train_nothing(members):
    keep_lines(4)(members.root / "members.csv")
    members.run_stages("ingest", "features")
    refuse(members, "training-set", "DataError: training set: the ", "both churned and stayed customers are needed")


def test_three_clients_train_nothing(corner):
    for name, column in (("sales.csv", "client"), ("clients.csv", "client")):
        rows = pd.read_csv(corner.root / name)
        rows[rows[column].isin(["c01", "c03", "c05"])].to_csv(corner.root / name, index=False)
    corner.run_stages("ingest", "features")
    refuse(corner, "training-set", "DataError: training set: the train part has", "rows, all of one class")


def test_too_short_a_history_has_no_snapshot(corner):
    corner.change_params({"as_of": "2024-02-15"})
    corner.run("ingest")
    refuse(
        corner,
        "features",
        "DataError: data/raw/events: events begin on 2024-01-01",
        "a snapshot needs 60 days of history",
    )


@pytest.mark.parametrize("name", ["o'brien's data/new \"best\" members.csv", "data [2024]/members*.csv", "größe.csv"])
def test_a_path_with_spaces_quotes_and_brackets_is_read(members, name):
    expected = members.read_json("metrics/ingest.json")
    path = members.root / name
    path.parent.mkdir(exist_ok=True)
    (members.root / "members.csv").rename(path)
    members.change_params({"data": {"source": name}})
    members.run("ingest")
    assert members.read_json("metrics/ingest.json") == expected


def test_a_folder_without_such_files_is_refused(members):
    (members.root / "folder").mkdir()
    members.change_params({"data": {"source": "folder"}})
    refuse(members, "ingest", "DataError: data.source 'folder': no such file, no .csv file in such a folder")


def test_a_source_that_nobody_named_is_asked_for(members):
    members.change_params({"data": {"source": None}})
    refuse(members, "ingest", "ConfigError: data.source: this data set has no path of its own; give one")


@pytest.mark.parametrize("stage", ["validate", "features", "training-set", "train", "evaluate", "register"])
def test_a_stage_before_its_turn_names_the_one_that_is_missing(project, stage):
    made_by = {"validate": "ingest", "features": "ingest", "training-set": "features", "train": "validate"}
    output = project.run(stage, status=1).output
    assert "DataError: " in output
    assert "Traceback" not in output
    assert len(output.splitlines()) <= SCREEN_LINES
    assert f"closedloop {made_by.get(stage, 'train')}" in " ".join(output.split())
    assert not (project.root / "data").exists() or not list_left_overs(project)
