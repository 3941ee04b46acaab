"""openpyxl: the sheets of an Excel workbook, row by row, each cell as the text that it would be in a CSV file."""

from __future__ import annotations

import datetime as dt
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError
from zipfile import BadZipFile

from closedloop.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
REMEDY = "save the sheet as CSV UTF-8 (File, Save As), and name that file"


def read_rows(path: Path, sheet: str | None = None) -> Iterator[tuple[int, list[str | None]]]:
    """Each row that is not empty: its number in the sheet, from 1, and its cells, None where there is nothing.

    Whole numbers have no decimal point, dates are ISO 8601, and of a formula it is the value that Excel last saved.

    Parameters
    ----------
    sheet
        Its name; None: the first one.

    Raises
    ------
    DataError
        If the file is no workbook, is damaged, or has no such sheet.
    ConfigError
        If openpyxl is not installed.
    """
    with _open(path) as book:
        names = book.sheetnames
        if sheet is not None and sheet not in names:
            raise DataError(f"{path}: there is no sheet {sheet!r}; its sheets: {', '.join(map(repr, names))}")
        table = book[names[0] if sheet is None else sheet]
        table.reset_dimensions()  # what some programs write there is wrong
        for number, values in enumerate(table.iter_rows(values_only=True), 1):
            cells = [_spell(value) for value in values]
            if any(cell is not None for cell in cells):
                yield number, cells


def list_sheets(path: Path) -> list[str]:
    """The names of the sheets that hold cells, in their order.

    Raises
    ------
    DataError
        If the file is no workbook, or is damaged.
    ConfigError
        If openpyxl is not installed.
    """
    with _open(path) as book:
        return [table.title for table in book.worksheets]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import openpyxl
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{path}: is a workbook, which openpyxl reads, and that is not installed: install closedloop[excel], "
            f"or {REMEDY}"
        ) from error
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of styles and validations, which are not read
            book = openpyxl.load_workbook(stream, read_only=True, data_only=True)
            try:
                yield book
            finally:
                book.close()
    except (OSError, BadZipFile, KeyError, ValueError, TypeError, ParseError, EOFError) as error:
        why = "it is of before 2007, has a password, or is damaged" if isinstance(error, BadZipFile) else error
        raise DataError(f"{path}: cannot be read as a workbook ({why}); {REMEDY}") from error


def _spell(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, dt.datetime):
        return f"{value.date()}" if value.time() == dt.time() else value.isoformat(" ")
    return str(value)
