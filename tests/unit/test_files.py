"""Whole files or none: what was there stays until the new is complete, and nothing half-written is left."""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from closedloop.errors import DataError
from closedloop.files import (
    find_sqlite_file,
    locate_sqlite,
    read_json,
    replace_file,
    replace_folder,
    write_json,
    write_text,
)


class Interrupted(BaseException):
    """Not an Exception, as Ctrl-C is not."""


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new/report.txt"
    for text in ("first", "second"):
        with replace_file(path) as beside:
            assert beside.parent == path.parent  # a rename is whole only within a file system
            beside.write_text(text, encoding="utf-8")
            assert not path.exists() if text == "first" else path.read_text(encoding="utf-8") == "first"
        assert path.read_text(encoding="utf-8") == text
    assert list_names(path.parent) == ["report.txt"]


def write_half_a_file(path: Path, error: type[BaseException]) -> None:
    with replace_file(path) as beside:
        beside.write_text("half", encoding="utf-8")
        raise error


@pytest.mark.parametrize("error", [ValueError, Interrupted])
@pytest.mark.parametrize("old", ["old", None])
def test_a_file_stays_as_it_was_if_the_block_raises(
    tmp_path: Path, old: str | None, error: type[BaseException]
) -> None:
    path = tmp_path / "report.txt"
    if old is not None:
        path.write_text(old, encoding="utf-8")
    with pytest.raises(error):
        write_half_a_file(path, error)
    assert list_names(tmp_path) == ([] if old is None else ["report.txt"])
    assert old is None or path.read_text(encoding="utf-8") == old


def test_a_block_that_writes_nothing_is_an_error_and_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), replace_file(path):
        pass
    assert path.read_text(encoding="utf-8") == "old"


def fill(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep/model"
    with replace_folder(path) as folder:
        fill(folder, a="1", b="1")
        assert not path.exists()
    with replace_folder(path) as folder:
        assert list_names(folder) == []
        fill(folder, b="2", c="2")
        assert list_names(path) == ["a", "b"]  # readers still see the old one
    assert {file.name: file.read_text(encoding="utf-8") for file in path.iterdir()} == {"b": "2", "c": "2"}
    assert list_names(path.parent) == ["model"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o755  # others may read it, as any folder


def fill_half_a_folder(path: Path, error: type[BaseException]) -> None:
    with replace_folder(path) as folder:
        fill(folder, a="2", b="2")
        raise error


@pytest.mark.parametrize("error", [ValueError, Interrupted])
@pytest.mark.parametrize("old", [True, False])
def test_a_folder_stays_as_it_was_if_the_block_raises(tmp_path: Path, old: bool, error: type[BaseException]) -> None:
    path = tmp_path / "model"
    if old:
        with replace_folder(path) as folder:
            fill(folder, a="1")
    with pytest.raises(error):
        fill_half_a_folder(path, error)
    assert list_names(tmp_path) == (["model"] if old else [])
    assert not old or {file.name: file.read_text(encoding="utf-8") for file in path.iterdir()} == {"a": "1"}


def test_what_a_killed_process_left_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    for name in (".model.abc.partial", ".model.abc.before.partial", ".models.abc.partial", "model.partial"):
        (tmp_path / name).mkdir()
        fill(tmp_path / name, a="1")
    with replace_folder(tmp_path / "model") as folder:
        fill(folder, a="2")
    assert list_names(tmp_path) == [".models.abc.partial", "model", "model.partial"]


def test_json_is_written_for_people_and_read_back(tmp_path: Path) -> None:
    content = {"path": tmp_path, "figure": 0.1, "none": None, "list": [1, "ü"]}
    write_json(tmp_path / "report.json", content)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert text.startswith('{\n  "path": ')
    assert text.endswith("}\n")
    assert read_json(tmp_path / "report.json", made_by="a stage") == {**content, "path": str(tmp_path)}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_keeps_the_file(tmp_path: Path, number: float) -> None:
    write_json(tmp_path / "report.json", {"figure": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "report.json", {"figure": number})
    assert read_json(tmp_path / "report.json", made_by="a stage") == {"figure": 1}


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (remove, r"cannot be read \(No such file or directory\); 'closedloop train' writes it"),
        (cut, r"is not JSON \(.*\); run 'closedloop train' again"),
        (scramble, r"is not JSON \(.*\); run 'closedloop train' again"),
    ],
)
def test_json_that_is_missing_or_damaged_says_who_writes_it(
    tmp_path: Path, fault: Callable[[Path], Any], words: str
) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"figure": 1})
    fault(path)
    with pytest.raises(DataError, match=rf"report\.json: {words}"):
        read_json(path, made_by="closedloop train")


def test_two_processes_write_beside_each_other(tmp_path: Path) -> None:
    """The path to write to belongs to the process: the one that ends last wins with a whole file."""
    path = tmp_path / "report.txt"
    code = "import sys, pathlib, closedloop.files as f; f.write_text(pathlib.Path(sys.argv[1]), 'child')"
    with replace_file(path) as mine, mine.open("w", encoding="utf-8") as file:
        file.write("par")
        file.flush()
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        assert path.read_text(encoding="utf-8") == "child"
        file.write("ent")
    assert path.read_text(encoding="utf-8") == "parent"
    assert list_names(tmp_path) == ["report.txt"]


@pytest.mark.parametrize("name", ["plain", "a b%2Fc", "a?b#c", "a+b%", "ö&=;"])
def test_a_sqlite_file_lies_in_its_folder_whatever_that_is_called(tmp_path, name):
    """SQLAlchemy, which decodes the address, opens the file that the address was made of."""
    folder = tmp_path / name
    folder.mkdir()
    address = locate_sqlite("sqlite:///some%20place/store.db?timeout=5", folder)
    assert sa.make_url(address).database == str(folder / "some place/store.db")
    assert dict(sa.make_url(address).query) == {"timeout": "5"}
    assert find_sqlite_file(locate_sqlite("sqlite:///store.db", folder)) == folder / "store.db"


@pytest.mark.parametrize("address", ["sqlite:////state/store.db", "postgresql://host/name", "http://host"])
def test_an_address_that_is_whole_stays_as_it_is(address):
    assert locate_sqlite(address, Path("/elsewhere")) == address
    assert find_sqlite_file("postgresql://host/name") is None
    assert find_sqlite_file("sqlite:////state/store.db?mode=ro") is None
