"""The data set config: roles that fit, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from closedloop.config.dataset import NAME_PATTERN, load_dataset
from closedloop.config.params import merge_values, parse_params
from closedloop.config.yaml import read_yaml
from closedloop.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs/datasets"
EVENTS: dict[str, Any] = {
    "name": "sales",
    "model_name": "sales_churn",
    "description": "Sales.",
    "kind": "events",
    "source": {"type": "csv"},
    "timezone": "UTC",
    "columns": {"entity_id": "id", "time": "at", "amount": "price"},
    "event_types": {"purchase": {"has_amount": True}},
    "label": {"event_type": "purchase", "horizon_days": 30, "active_days": 60, "snapshot_every_days": 30},
    "expectations": [],
}
TABLE: dict[str, Any] = {
    "name": "sales",
    "model_name": "sales_churn",
    "description": "Sales.",
    "kind": "table",
    "source": {"type": "csv"},
    "columns": {
        "entity_id": "id",
        "numeric": ["age"],
        "label": {"column": "left", "churned": "yes", "stayed": "no"},
    },
    "expectations": [],
}


def save(folder: Path, values: dict[str, Any], name: str = "sales") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [path.stem for path in sorted(CONFIGS.glob("*.yaml"))])
def test_every_shipped_config_loads_with_params_that_fit(name):
    config = load_dataset(name, CONFIGS)
    base = read_yaml(CONFIGS.parents[1] / "params.yaml")
    params = parse_params(merge_values(base, config.params, {"dataset": name}), name)
    assert params.dataset == name
    assert {expectation.severity for expectation in config.expectations} == {"critical", "warning"}


def test_shipped_configs_share_no_model_name():
    names = [load_dataset(path.stem, CONFIGS).model_name for path in CONFIGS.glob("*.yaml")]
    assert len(set(names)) == len(names) >= 3


@pytest.mark.parametrize("values", [EVENTS, TABLE])
def test_the_least_config_of_each_kind(tmp_path, values):
    save(tmp_path, values)
    config = load_dataset("sales", tmp_path)
    assert config.kind == values["kind"]
    assert config.gates.roc_auc_min == 0.75


def refused(folder: Path, values: dict[str, Any]) -> str:
    save(folder, values)
    with pytest.raises(ConfigError) as error:
        load_dataset("sales", folder)
    assert str(error.value).startswith(f"{folder / 'sales.yaml'}:")
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "colums: unknown key"),
        ({"columns": {"enity_id": "id"}}, "columns.enity_id: unknown key"),
        ({"gates": {"accuracy": 0.9}}, "gates.accuracy: unknown key"),
        ({"gates": {"accuracy_min": 90}}, "gates.accuracy_min: Input should be less than or equal to 1, found 90"),
        ({"label": {"horizon_days": 0}}, "label.horizon_days: Input should be greater than or equal to 1, found 0"),
        (
            {"source": {"type": "json"}},
            "source: type must be one of 'simulator', 'csv', 'parquet', 'excel', 'sql', found 'json'",
        ),
        ({"source": {"type": "sql", "url": "x"}}, "source.sql.url: unknown key"),
        ({"timezone": "London"}, "timezone: 'London' is not an IANA time zone such as Europe/London"),
        ({"timezone": "../etc"}, "is not an IANA time zone"),
        ({"expectations": [{"table": "sales", "type": "expect_x"}]}, "expectations.0.table: Input should be"),
        ({"expectations": [{"table": "events", "type": "drop"}]}, "expectations.0.type: String should match"),
        ({"model_name": "Sales-Churn"}, "model_name: String should match pattern"),
        ({"label": {"event_type": "visit"}}, "label.event_type 'visit' is not one of event_types"),
        ({"event_types": {"visit": {}}}, "without columns.event_type there must be exactly one event type"),
        ({"event_types": {"Purchase": {}}}, "event_types must differ in more than case"),
        ({"columns": {"amount": None}}, "an event type has an amount, but columns.amount is not given"),
        ({"columns": {"time": None}}, "an 'events' data set needs label, columns.time and event_types"),
        ({"columns": {"numeric": ["age"]}}, "are columns of customers_source: name it"),
        ({"columns": {"since": "joined"}}, "are columns of customers_source: name it"),
        ({"columns": TABLE["columns"]}, "are columns of customers_source: name it"),
        (
            {"columns": {"label": TABLE["columns"]["label"]}},
            "columns.label is for 'table' data sets",
        ),
    ],
)
def test_a_wrong_events_config_names_the_key(tmp_path, change, message):
    assert message in refused(tmp_path, merge_values(EVENTS, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"columns": {"label": None}}, "a 'table' data set needs columns.label and numeric or categorical columns"),
        ({"columns": {"numeric": []}}, "a 'table' data set needs columns.label and numeric or categorical columns"),
        ({"columns": {"categorical": ["age"]}}, "a column may be numeric, categorical or sensitive, once"),
        ({"columns": {"sensitive": "age"}}, "a sensitive one is no feature"),
        # YAML reads a bare yes as true: quote it
        (
            {"columns": {"label": {"churned": True}}},
            "columns.label.churned.0: must be text; YAML reads a bare number, yes",
        ),
        ({"source": {"type": "simulator"}}, "a 'table' data set has one file or query"),
        ({"customers_source": {"type": "csv"}}, "a 'table' data set has one file or query"),
        ({"label": EVENTS["label"]}, "a 'table' data set has one file or query"),
        # each would be overwritten by a column of our own, or be the answer itself
        (
            {"columns": {"numeric": ["score"]}},
            "'score' is the name of a column of our own: give",
        ),
        ({"columns": {"categorical": ["Churned"]}}, "'Churned' is the name of a column of our own"),
        (
            {"columns": {"categorical": ["left"]}},
            "'left' is the label (columns.label.column), the answer itself",
        ),
        ({"columns": {"numeric": ["id"]}}, "'id' is the customer's id (columns.entity_id)"),
        ({"columns": {"time": "age"}}, "'age' is the time (columns.time)"),
        ({"columns": {"label": {"stayed": "yes"}}}, "columns.label: 'yes' means churned and stayed"),
        ({"columns": {"label": {"stayed": ["no", " "]}}}, "columns.label: a blank cell is no value"),
        ({"columns": {"label": {"churned": ["1", "yes"], "stayed": ["no", "1.0"]}}}, "'1' means churned and stayed"),
        ({"columns": {"label": {"churned": []}}}, "columns.label.churned: Value should have at least 1 item"),
        ({"columns": {"numeric": ["age", "Age"]}}, "columns: 'age' and 'Age' differ in case alone"),
        ({"columns": {"sensitive": "AGE"}}, "columns: 'age' and 'AGE' differ in case alone"),
        ({"columns": {"sensitive": "decision"}}, "columns: 'decision' is the name of a column of our own"),
        # it would never be looked at
        (
            {"expectations": [{"table": "events", "type": "expect_table_row_count_to_be_between"}]},
            "a 'table' data set has expectations of the table customers alone",
        ),
    ],
)
def test_a_wrong_table_config_names_the_key(tmp_path, change, message):
    assert message in refused(tmp_path, merge_values(TABLE, change))


@pytest.mark.parametrize(
    "name",
    ['plan #1, "old"', "a:b", "a,b", "a\nb", "a#b", "", " a", "a ", "<b>", "a'b", "a\\b", "$(id)", "a{b}", "x" * 101],
)
@pytest.mark.parametrize("role", ["numeric", "categorical", "sensitive"])
def test_a_name_that_a_later_part_cannot_take_is_refused_with_the_way_out(tmp_path, role, name):
    message = refused(
        tmp_path, merge_values(TABLE, {"columns": {role: name if role == "sensitive" else ["age", name]}})
    )
    assert "columns: " in message
    assert "a name is up to 100 letters, digits, spaces" in message
    assert "columns.rename" in message


@pytest.mark.parametrize("name", ["a:b", 'a"b', "a\nb", ""])
def test_an_event_type_that_a_later_part_cannot_take_is_refused(tmp_path, name):
    values = merge_values(EVENTS, {"columns": {"event_type": "what"}, "event_types": {name: {}}})
    assert "features are called by it" in refused(tmp_path, values)


@pytest.mark.parametrize("name", ["age", "Monthly charges (EUR)", "größe", "2_mon_1", "a.b-c/d%&+", "x" * 100])
def test_an_ordinary_name_is_taken(tmp_path, name):
    save(tmp_path, merge_values(TABLE, {"columns": {"numeric": [name]}}))
    assert load_dataset("sales", tmp_path).columns.numeric == (name,)


def test_a_config_without_an_id_says_what_a_file_without_one_takes(tmp_path):
    columns = {name: value for name, value in TABLE["columns"].items() if name != "entity_id"}
    message = refused(tmp_path, {**TABLE, "columns": columns})
    assert "columns: entity_id is required: the column with the customer's id" in message
    assert "a 'table' without ids takes entity_id: row_number" in message
    events = merge_values(EVENTS, {"columns": {"entity_id": "row_number"}})
    assert "an 'events' data set needs its customers' ids" in refused(tmp_path, events)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"delimiter": r"\s+"}, "source.csv.delimiter: must be one character and no pattern"),
        ({"delimiter": ""}, "source.csv.delimiter: must be one character"),
        ({"delimiter": '"'}, "source.csv.delimiter: must be one character"),
        ({"delimiter": "§"}, "source.csv.delimiter: must be one character"),
        ({"encoding": "latin-99"}, "source.csv.encoding: 'latin-99' is no encoding that Python knows"),
        ({"decimal": ";"}, "source.csv.decimal: Input should be '.' or ','"),
        ({"na_values": "NULL"}, "source.csv.na_values: must be a list, such as [a, b], found 'NULL'"),
        ({"sheet": "May"}, "source.csv: sheet: an Excel workbook (.xlsx) is source.type: excel"),
        ({"type": "xlsx"}, "found 'xlsx'; an Excel workbook (.xlsx) is source.type: excel"),
        ({"sep": ";"}, "source.csv.sep: unknown key"),
    ],
)
def test_a_wrong_way_to_read_a_file_is_named(tmp_path, change, message):
    found = refused(tmp_path, merge_values(TABLE, {"source": change}))
    assert message in found
    for word in ("Value error", "valid tuple", "valid dict", "constrained"):
        assert word not in found


def test_every_wrong_key_is_named_at_once(tmp_path):
    message = refused(tmp_path, merge_values(EVENTS, {"colour": "red", "kind": "stream", "name": "Sales"}))
    assert message.count("\n") == 3


@pytest.mark.parametrize(
    "name", ["../sales", "sales/../sales", "/etc/passwd", "Sales", "1sales", "sa-les", "a" * 49, ""]
)
def test_a_name_is_no_path(tmp_path, name):
    folder = tmp_path / "datasets"
    folder.mkdir()
    save(tmp_path, {**EVENTS, "name": name, "kind": "events"})
    with pytest.raises(ConfigError):
        load_dataset(name, folder)
    with pytest.raises(ConfigError, match="dataset: String should match pattern"):
        parse_params(
            {"dataset": name, "as_of": "2024-01-01", "seed": 1, "model": {"type": "random_forest"}}, "params.yaml"
        )


@pytest.mark.parametrize(
    "name", ["../sales", "a/b", "..", "/etc/x", 'a"; DROP TABLE x; --', "a\nb", "a$(id)", "%2e%2e"]
)
def test_a_model_name_is_no_path_no_sql_and_no_shell(tmp_path, name):
    save(tmp_path, {**EVENTS, "model_name": name})
    with pytest.raises(ConfigError, match="model_name: String should match pattern"):
        load_dataset("sales", tmp_path)


def test_the_pattern_of_names_ends_where_the_name_ends():
    assert NAME_PATTERN.startswith("^")
    with pytest.raises(ConfigError):
        parse_params(
            {"dataset": "shop\n", "as_of": "2024-01-01", "seed": 1, "model": {"type": "random_forest"}}, "params.yaml"
        )


def test_a_missing_config_lists_those_there_are(tmp_path):
    save(tmp_path, EVENTS)
    with pytest.raises(ConfigError, match=r"dataset 'sale': .*sale\.yaml does not exist; data sets here: sales"):
        load_dataset("sale", tmp_path)


def test_the_file_is_called_like_the_data_set(tmp_path):
    save(tmp_path, EVENTS, "other")
    with pytest.raises(ConfigError, match="name is 'sales', but the file is called 'other'"):
        load_dataset("other", tmp_path)


def test_a_copied_config_must_not_keep_the_model_name(tmp_path):
    save(tmp_path, EVENTS)
    save(tmp_path, {**EVENTS, "name": "copy"}, "copy")
    (tmp_path / "broken.yaml").write_text("- no mapping", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"copy\.yaml: model_name 'sales_churn' belongs to sales\.yaml"):
        load_dataset("copy", tmp_path)
