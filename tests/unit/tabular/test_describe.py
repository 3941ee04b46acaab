"""`closedloop describe` reads strange files: what it notices, what it guesses, and that the config can be used."""

from __future__ import annotations

import csv
import datetime as dt
import random
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from closedloop.config.dataset import DatasetConfig, load_dataset
from closedloop.core.evaluation.metrics import measure_classification
from closedloop.errors import ConfigError, DataError
from closedloop.tabular.describe.config import describe_source, write_config
from closedloop.tabular.describe.table import estimate_chance_error

START, END = dt.datetime(2023, 1, 1, 8), dt.datetime(2024, 7, 1)  # noqa: DTZ001  local times, as files have them


def write_csv(
    path: Path, header: list[str], rows: list[list[Any]], *, delimiter: str = ",", encoding: str = "utf-8"
) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def describe(path: Path | str, **given: Any) -> tuple[DatasetConfig, str]:
    notes: list[str] = []
    text = describe_source(str(path), "strange", notes, **given)
    return DatasetConfig.model_validate(yaml.safe_load(text)), "\n".join(notes)


def comma(number: float) -> str:
    return f"{number:.2f}".replace(".", ",")


def write_german_table(path: Path, rows: int = 400) -> Path:
    """Semicolons, decimal commas, Latin-1, German dates, "-" for a blank, an id, a leak and a near-leak."""
    draw, lines = random.Random(3), []  # noqa: S311
    for number in range(rows):
        plan, months = draw.choice(["Monat", "Jahr"]), draw.randint(0, 60)
        left = draw.random() < (0.6 if plan == "Monat" else 0.1)
        since = dt.date(2024, 1, 1) - dt.timedelta(days=30 * months)
        fee = "-" if months == 0 else comma(draw.gauss(25, 5))
        gone = since + dt.timedelta(days=900)
        lines.append(
            [
                f"M{number:05}",
                plan,
                months,
                fee,
                draw.choice(["männlich", "weiblich"]),
                f"{since:%d.%m.%Y}",
                f"{gone:%d.%m.%Y}" if left else "",
                "EUR",
                f"{draw.randint(1, 9)}.{draw.randint(100, 999)},50",
                int(left),
                "ja" if left else "nein",
            ]
        )
    header = "Kunden-Nr.;Abo;Monate;Beitrag: £;Geschlecht;Mitglied seit;Austritt am;Währung;Umsatz;Restschuld;Gekündigt"
    return write_csv(path, header.split(";"), lines, delimiter=";", encoding="latin-1")


def write_german_log(path: Path, customers: int = 150) -> Path:
    draw, lines = random.Random(7), []  # noqa: S311
    for customer in range(1, customers + 1):
        at, every = START + dt.timedelta(days=draw.uniform(0, 250)), draw.choice([4, 12, 40])
        end = at + dt.timedelta(days=draw.expovariate(1 / 300))
        while (at := at + dt.timedelta(days=draw.gammavariate(4, every / 4))) < min(end, END):
            lines.append(
                [len(lines), customer, f"{at:%d.%m.%Y %H:%M}", comma(draw.choice([2.8, 4.5])), draw.randint(1, 3)]
            )
    lines.append(["Summe", "", "", "", ""])
    header = ["Bestellung", "Kunde", "Zeitpunkt", "Preis", "Menge"]
    return write_csv(path, header, lines, delimiter=";", encoding="utf-8-sig")


def write_parquet(path: Path, rows: int = 300) -> Path:
    draw = random.Random(5)  # noqa: S311
    stayed = [draw.random() < 0.7 for _ in range(rows)]
    frame = pd.DataFrame(
        {
            "user_id": range(10**9, 10**9 + rows),
            "visits": [draw.gauss(1 if one else 0, 1) for one in stayed],
            "plan": pd.Categorical([draw.choice("ab") for _ in range(rows)]),
            "joined": pd.Timestamp("2024-01-01"),
            "tags": [["a"]] * rows,
            "score": [draw.randint(1, 9) for _ in range(rows)],
            "is_active": stayed,
        }
    )
    frame.to_parquet(path)
    return path


def test_a_german_table(tmp_path):
    config, notes = describe(write_german_table(tmp_path / "k.csv"))
    source = config.source.model_dump(exclude_defaults=True, exclude={"path"})
    assert source == {"type": "csv", "encoding": "cp1252", "delimiter": ";", "decimal": ",", "na_values": ("-",)}
    columns = config.columns
    assert (config.kind, columns.entity_id, columns.sensitive) == ("table", "Kunden-Nr.", "Geschlecht")
    assert (columns.numeric, columns.categorical) == (("Monate", "Beitrag"), ("Abo",))
    assert columns.rename == {"Beitrag: £": "Beitrag"}
    assert columns.label is not None
    assert (columns.label.column, columns.label.churned, columns.label.stayed) == ("Gekündigt", ("ja",), ("nein",))
    for named in (
        "'Restschuld' is left out: alone it ranks the label with ROC AUC 1.000",
        "'Austritt am' is left out: a date is no feature",
        "whether it is blank tells the label",
        "'Währung' is left out: holds nothing but 'EUR'",
        "'Umsatz' is left out: holds numbers such as",
        "'-': taken for missing values",
        "no UTF-8 but cp1252",
        "parted by ';'",
        "a decimal comma",
    ):
        assert named in notes


def test_a_german_log_of_events(tmp_path):
    config, notes = describe(write_german_log(tmp_path / "b.csv"))
    columns = config.columns
    assert (config.kind, columns.entity_id, columns.time) == ("events", "Kunde", "Zeitpunkt")
    assert (columns.amount, columns.quantity) == ("Preis", "Menge")
    assert config.source.time_format == "%d.%m.%Y %H:%M"  # type: ignore[union-attr]
    assert config.cleaning.require_value == ("Zeitpunkt",)
    assert config.event_types["purchase"].has_amount
    assert config.params["as_of"] == "2024-07-01"
    assert "unlike its other values, and taken for missing: 'Summe'" in notes
    assert "'Zeitpunkt': rows without a value: 1, dropped" in notes


def test_a_parquet_table(tmp_path):
    config, notes = describe(write_parquet(tmp_path / "m.parquet"))
    columns = config.columns
    assert (columns.entity_id, columns.numeric, columns.categorical) == (
        "user_id",
        ("visits", "column score"),
        ("plan",),
    )
    assert columns.rename == {"score": "column score"}  # `score` is a column of our own
    assert columns.label is not None
    assert (columns.label.churned, columns.label.stayed) == (("False",), ("True",))
    assert "'tags' is left out: holds lists or bytes" in notes
    assert "'joined' is left out: a date is no feature" in notes


def test_a_span_and_a_time_of_day_are_left_out_as_ingest_takes_neither(tmp_path):
    frame = pd.read_parquet(write_parquet(tmp_path / "m.parquet"))
    frame["tenure"] = pd.to_timedelta(range(len(frame)), unit="D")
    frame["paused"] = [dt.timedelta(days=row % 3) for row in range(len(frame))]
    frame["calls_at"] = [dt.time(row % 20) for row in range(len(frame))]
    frame.to_parquet(tmp_path / "n.parquet")
    config, notes = describe(tmp_path / "n.parquet")
    assert not {"tenure", "paused", "calls_at"} & {*config.columns.numeric, *config.columns.categorical}
    for name in ("tenure", "paused", "calls_at"):
        assert f"'{name}' is left out: holds spans or times of day" in notes


def test_a_table_of_a_database(tmp_path, monkeypatch):
    frame = pd.read_parquet(write_parquet(tmp_path / "m.parquet")).drop(columns="tags")
    with sqlite3.connect(tmp_path / "m.db") as connection:
        frame.to_sql("members", connection, index=False)
    monkeypatch.setenv("MEMBERS_DATABASE", f"sqlite:///{tmp_path}/m.db")
    config, _ = describe("MEMBERS_DATABASE#members")
    assert config.source.model_dump() == {
        "type": "sql",
        "url_variable": "MEMBERS_DATABASE",
        "query": "SELECT * FROM members",
    }
    monkeypatch.delenv("MEMBERS_DATABASE")
    with pytest.raises(ConfigError, match="MEMBERS_DATABASE is not set"):
        describe("MEMBERS_DATABASE#members")


def make_rows(header: str, *, label: Any, rows: int = 300) -> list[list[Any]]:
    draw = random.Random(2)  # noqa: S311
    return [[n, *(round(draw.random(), 3) for _ in header.split(",")[2:]), label(draw)] for n in range(rows)]


def test_spellings_and_blanks_of_a_label_are_one_label(tmp_path):
    header = "id,fee,churned"
    rows = make_rows(header, label=lambda draw: draw.choice(["Yes", "yes", "Y", "no", "NO", ""]))
    config, notes = describe(write_csv(tmp_path / "a.csv", header.split(","), rows))
    assert config.columns.label is not None
    assert set(config.columns.label.churned) == {"Yes", "yes", "Y"}
    assert config.cleaning.require_value == ("churned",)
    assert "spells one value in several ways" in notes


@pytest.mark.parametrize(
    ("values", "churned"),
    [(("Attrited Customer", "Existing Customer"), "Attrited Customer"), (("Churned", "Joined", "Stayed"), "Churned")],
)
def test_labels_in_words(tmp_path, values, churned):
    rows = make_rows("id,fee,state", label=lambda draw: draw.choice(values))
    config, _ = describe(write_csv(tmp_path / "a.csv", ["id", "fee", "state"], rows))
    assert config.columns.label is not None
    assert config.columns.label.churned == (churned,)


def test_columns_that_come_from_the_label_are_left_out(tmp_path):
    rows = make_rows("id,fee,churn_score,churn", label=lambda draw: draw.choice("01"))
    config, notes = describe(write_csv(tmp_path / "a.csv", ["id", "fee", "churn_score", "churn"], rows))
    assert config.columns.attributes == ("fee",)
    assert "'churn_score' is left out: its name says that it comes from the label" in notes


def test_a_label_of_yes_and_no_goes_before_a_reason_for_leaving_that_is_mostly_blank(tmp_path):
    rows = [[n, n % 7, *(("yes", "price" if n % 2 else "moved") if n % 3 == 0 else ("no", ""))] for n in range(300)]
    config, notes = describe(write_csv(tmp_path / "a.csv", ["id", "visits", "churned", "churn reason"], rows))
    assert config.columns.label is not None
    assert config.columns.label.column == "churned"
    assert "'churn reason' could be it too" in notes


def test_one_of_two_possible_labels_must_be_named(tmp_path):
    header = ["id", "a", "b"]
    rows = [[n, n % 7, "yes" if n % 3 else "no", "yes" if n % 5 else "no"] for n in range(300)]
    path = write_csv(tmp_path / "a.csv", ["id", "n", "a", "b"], rows)
    with pytest.raises(DataError, match=r"which column is the label.*--label COLUMN"):
        describe(path)
    config, _ = describe(path, label="a")
    assert config.columns.label is not None
    assert config.columns.label.column == "a"
    with pytest.raises(DataError, match="no such column; its columns: id, n, a, b"):
        describe(path, label=header[1] + "x")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("id,b\n", "column names, but no rows"),
        ("Report 2024\n\nid,b,churn\n1,2,yes\n2,3,no\n", "line 1 has 1 cell, most others have 3"),
        ("1,2,0\n2,3,1\n3,4,0\n", "a header line with column names is required"),
        ("id,b,churn\n1,2,yes\n2,3\n3,4,no,x\n4,5,no\n", r"(?s)line 3: .*line 4: "),
        ("id,b\n" + "".join(f"{n},{n % 7}\n" for n in range(99)), "no column has two values"),
        ("id,b,churned\n" + "".join(f"{n},{n % 7},{'' if n % 3 else 'x'}\n" for n in range(99)), "'x' and 66 blanks"),
        ("id,churned\n" + "".join(f"{n},{'no' if n % 3 else 'yes'}\n" for n in range(99)), "could be a feature"),
    ],
    ids=["empty", "no-rows", "title", "no-header", "cells", "no-label", "label-or-blank", "no-feature"],
)
def test_what_cannot_be_described_is_refused_with_place_and_rule(tmp_path, content, said):
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        describe(tmp_path / "a.csv")


def test_a_workbook_of_another_kind_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "a.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    with pytest.raises(DataError, match=r"save it as \.xlsx, or its sheet as CSV UTF-8"):
        describe(tmp_path / "a.xls")


def write_japanese_table(path: Path, rows: int = 400, *, encoding: str = "cp932") -> Path:
    """As a Japanese office saves it: its encoding, column names and labels, a word for a blank, a date in words."""
    draw, lines = random.Random(3), []  # noqa: S311
    for number in range(rows):
        left = draw.random() < 0.3
        lines.append(
            [
                f"会員{number:05}",
                draw.choice(["標準", "プレミアム"]),
                "不明" if number % 9 == 0 else draw.randint(0, 60),
                f"{draw.randint(30, 90) * 100}円",
                draw.choice(["男", "女"]),
                f"2023年{draw.randint(1, 12)}月{draw.randint(1, 28)}日",
                "解約" if left else "継続",
            ]
        )
    header = ["会員番号", "料金プラン", "契約月数", "月額・円", "性別", "契約日", "状態"]
    return write_csv(path, header, lines, encoding=encoding)


@pytest.mark.parametrize("encoding", ["cp932", "utf-8", "euc_jp"])
def test_a_japanese_table(tmp_path, encoding):
    config, notes = describe(write_japanese_table(tmp_path / "解約.csv", encoding=encoding))
    assert config.source.encoding == encoding  # type: ignore[union-attr]
    assert config.source.na_values == ("不明",)  # type: ignore[union-attr]
    columns = config.columns
    assert (columns.entity_id, columns.sensitive, columns.numeric) == ("会員番号", "性別", ("契約月数",))
    assert columns.categorical == ("料金プラン",)
    assert columns.label is not None
    assert (columns.label.column, columns.label.churned, columns.label.stayed) == ("状態", ("解約",), ("継続",))
    assert "'契約日' is left out: a date is no feature" in notes
    assert "'月額・円' is left out: holds numbers such as" in notes


@pytest.mark.parametrize(
    ("encoding", "cities"),
    [
        ("cp1252", ["Köln", "München", "Zürich"]), ("cp1251", ["Москва", "Казань", "Самара", "Омск", "Пермь"]),
        ("cp1253", ["Αθήνα", "Πάτρα"]), ("gb18030", ["北京", "上海"]), ("big5", ["臺北", "高雄"]),
        ("cp949", ["서울", "부산"]), ("cp1250", ["Łódź", "Gdańsk"]), ("cp1250", ["Plzeň", "Děčín", "Příbram"]),
        ("cp1252", ["São Luís", "Belém"]), ("cp1252", ["Årsta", "Tromsø"]), ("cp1254", ["Muğla", "Şile"]),
        ("cp1257", ["Rīga", "Ķegums", "Šķūņi"]), ("iso8859_2", ["Śrem", "Łęczyca", "Źródła"]),
    ],
)  # fmt: skip
def test_texts_are_read_in_the_encoding_of_the_file(tmp_path, encoding, cities):
    """The first MiB is plain ASCII: the bytes that tell stand after it."""
    rows = [[n, "x" * 50, "Oslo", n % 7, "yes" if n % 3 else "no"] for n in range(18_000)]
    rows += [[n, "x" * 50, cities[n % len(cities)], n % 7, "yes" if n % 3 else "no"] for n in range(18_000, 20_000)]
    path = write_csv(tmp_path / "a.csv", ["id", "note", "city", "visits", "left"], rows, encoding=encoding)
    assert path.stat().st_size > 1 << 20
    config, _ = describe(path)
    assert config.source.encoding == encoding  # type: ignore[union-attr]
    (found,) = (one.kwargs["value_set"] for one in config.expectations if "value_set" in one.kwargs)
    assert set(found) == {"Oslo", *cities}


def test_a_column_with_a_control_character_is_named_in_the_config(tmp_path):
    header = ["id", "be\x01gun\x85on", "fee", "left"]
    rows = [[n, f"2024-01-{n % 28 + 1:02}", n % 7, "yes" if n % 3 else "no"] for n in range(300)]
    text = describe_source(str(write_csv(tmp_path / "a.csv", header, rows)), "strange", [])
    write_config(tmp_path / "strange.yaml", text)
    assert r"#   be\x01gun on: a date is no feature" in text


@pytest.mark.parametrize(("delimiter", "encoding"), [("\t", "utf-16"), ("|", "utf-8"), (";", "utf-8-sig")])
def test_delimiters_and_encodings(tmp_path, delimiter, encoding):
    rows = make_rows("id,fee,left", label=lambda draw: draw.choice(["yes", "no"]))
    path = write_csv(tmp_path / "a.csv", ["id", "fee", "left"], rows, delimiter=delimiter, encoding=encoding)
    config, _ = describe(path)
    assert (config.columns.entity_id, config.columns.numeric) == ("id", ("fee",))


def test_dates_that_can_be_read_in_two_ways_are_told(tmp_path):
    rows = [[n % 20, f"{n % 12 + 1}/{n % 11 + 1}/2023"] for n in range(400)]
    config, notes = describe(write_csv(tmp_path / "a.csv", ["customer_id", "day"], rows))
    assert config.source.time_format == "%d/%m/%Y"  # type: ignore[union-attr]
    assert "can be read as %d/%m/%Y and as %m/%d/%Y" in notes


def test_a_config_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "strange.yaml"
    with pytest.raises(ConfigError, match="is required"):
        write_config(path, "name: strange\n")
    assert list(tmp_path.iterdir()) == []
    notes: list[str] = []
    write_config(path, describe_source(str(write_german_table(tmp_path / "k.csv")), "strange", notes))
    assert load_dataset("strange", tmp_path).model_name == "strange_churn"


@pytest.mark.parametrize("end", ["\r", "\n"])
def test_a_large_file_with_a_long_cell_and_any_line_ends_is_read(tmp_path, end):
    """Larger than the part by which the delimiter is found, with a cell that is longer than Python's reader takes."""
    lines = [f"K{number:05},{number % 2},{'x' * (200_000 if number == 3 else 900)}" for number in range(10_000)]
    path = tmp_path / "a.csv"
    path.write_bytes(end.join(["customer,churned,note", *lines, ""]).encode())
    config, _ = describe(path)
    assert config.columns.entity_id == "customer"


MORE_SIZES = [pytest.param(*one, marks=pytest.mark.thorough) for one in [(60, 0.33), (185, 0.33), (2000, 0.33)]]


@pytest.mark.parametrize(("rows", "rate"), [(60, 0.1), (185, 0.2), *MORE_SIZES])
def test_scores_that_are_true_pass_the_calibration_that_a_draft_begins_with(rows, rate):
    """A sound model of a small shop was refused: with few test rows chance alone has an error above .1."""
    draw = np.random.default_rng(1)
    errors = []
    for _ in range(300):
        score = draw.beta(2, 2 / rate - 2, rows)
        churned = draw.random(rows) < score
        errors.append(measure_classification(churned, score, 0.5)["expected_calibration_error"])
    limit = estimate_chance_error(rows, rate)
    assert np.mean(np.array(errors) > limit) <= 0.08
    assert limit <= 1.6 * np.quantile(errors, 0.95)
