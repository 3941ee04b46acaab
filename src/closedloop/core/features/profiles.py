"""The content of the columns of a strange table: numbers, times or texts, and how these are written."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from closedloop.core.features.cleaning import MISSING_WORDS, is_blank
from closedloop.core.features.parsing import CONTROL, TIME, read_format
from closedloop.core.features.time_formats import CLOCKS, DAYS
from closedloop.rules import find_code

POINT = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")  # 007 is a code
COMMA = re.compile(r"[+-]?(?:0|[1-9]\d*),\d+")
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")
DRESSED = re.compile(r"[€$£¥]?\s*[+-]?\d{1,3}(?:[.,'\u2019\s]?\d{3})*(?:[.,]\d+)?\s*(?:[%€$£¥円]|EUR|USD|CHF|GBP)?")
SPREADSHEET = {"#value!", "#wert!", "#ref!", "#n/v", "#div/0!"}
MISSING = (
    MISSING_WORDS
    | SPREADSHEET
    | {"-", "--", "\u2013", "\u2014", ".", "n.a.", "k.a.", "keine angabe", "不明", "未入力", "未回答"}
)
SENTINELS = (-999, -9999, -99999, 9999, 99999, 999999)
MOSTLY, STRAYS_MAX, FORMS_TRIED = 0.8, 10, 500
EPOCHS = {"unix_seconds": (9e8, 2.2e9), "unix_milliseconds": (9e11, 2.2e12)}
EPOCH_NAME = re.compile(r"time|_ts_|epoch|date|_at_|zeit|datum")


@dataclass(frozen=True)
class Profile:
    """A column: its kind, how it is written, and what a run would stumble over (``notes``, ``trouble``).

    ``words`` are texts that stand for a missing value; ``trouble`` says why the column cannot be used as it is.
    """

    name: str
    kind: Literal["number", "time", "text", "nothing"]
    rows: int
    missing: int
    values: tuple[str, ...]
    is_whole: bool = False
    decimal: str = ""
    time_format: str | None = None
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    trouble: str = ""

    @property
    def different(self) -> int:
        """The number of different values."""
        return len(self.values)

    @property
    def is_id_like(self) -> bool:
        """Whether texts or whole numbers stand there, of which hardly one repeats."""
        known = self.rows - self.missing
        return (self.kind == "text" or self.is_whole) and known > 0 and self.different >= 0.9 * known


def simplify_name(name: str) -> str:
    """A name as words between ``_``, without case and accents.

    >>> simplify_name("Kündigungs-Datum"), simplify_name("customerID")
    ('_kundigungs_datum_', '_customer_id_')
    """
    import unicodedata

    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    plain = "".join(one for one in unicodedata.normalize("NFKD", parted) if not unicodedata.combining(one))
    return "_" + "_".join(re.findall(r"[^\W_]+", plain.casefold())) + "_"


def profile_column(values: pd.Series) -> Profile:
    """Look at every value of a column, in which blanks are missing.

    Examples
    --------
    >>> found = profile_column(pd.Series(["1,5", "2,25", "-", "3,0"] * 5, name="fee"))
    >>> found.kind, found.decimal, found.words, found.missing
    ('number', ',', ('-',), 5)
    """
    name, rows = str(values.name), len(values)
    known = values[~is_blank(values)] if values.dtype == object else values.dropna()
    if any(isinstance(one, list | dict | bytes) or getattr(one, "shape", ()) for one in known.head(100)):
        return Profile(name, "nothing", rows, 0, (), trouble="holds lists or bytes, and no single values")
    if any(isinstance(one, dt.timedelta | dt.time) for one in known.head(100)):
        return Profile(name, "nothing", rows, 0, (), trouble="holds spans or times of day: make numbers of them")
    counts = known.map(_write).value_counts()
    words = tuple(word for word in counts.index if word.casefold() in MISSING)
    counts = counts.drop(list(words))
    missing = rows - int(counts.sum())
    found = Profile(name, "text", rows, missing, tuple(sorted(counts.index)), words=words)
    if counts.empty:
        return replace(found, kind="nothing", trouble="is empty")
    if pd.api.types.is_datetime64_any_dtype(values):
        return replace(found, kind="time")
    found = _find_numbers(found, counts) or _find_times(found, counts) or _find_texts(found, counts)
    if found.different == 1 and not found.trouble:
        found = replace(
            found, trouble=f"holds nothing but {found.values[0]!r:.40}" + (" and blanks" if missing else "")
        )
    return found


def _write(value: Any) -> str:
    """A value as text: a whole number without a fraction."""
    if isinstance(value, str):
        return value.strip()
    return find_code(value) or str(value)


def _find_numbers(found: Profile, counts: pd.Series) -> Profile | None:
    for mark, pattern in (("", POINT), (",", re.compile(f"{POINT.pattern}|{COMMA.pattern}"))):
        taken = _take(found, counts, {text for text in counts.index if pattern.fullmatch(text)})
        if taken is None:
            continue
        if not mark:
            mark = "." if any("." in text for text in taken.values) else ""
        elif all(THOUSANDS.fullmatch(text) for text in taken.values if "," in text):
            return None  # rather thousands than thousandths
        elif any("." in text for text in taken.values):
            return replace(taken, kind="text", trouble="holds numbers with a decimal comma and with a decimal point")
        numbers = pd.to_numeric(pd.Series(taken.values).str.replace(",", "."))
        taken = replace(taken, kind="number", decimal=mark, is_whole=bool((numbers % 1 == 0).all()))
        for unit, (low, high) in EPOCHS.items():
            if EPOCH_NAME.search(simplify_name(found.name)) and numbers.between(low, high).all():
                return replace(taken, kind="time", time_format=unit, is_whole=False)
        if (
            taken.is_whole
            and EPOCH_NAME.search(simplify_name(found.name))
            and numbers.between(19000101, 21000101).all()
        ):
            return None  # days such as 20240531
        if shown := [str(one) for one in SENTINELS if counts.get(str(one), 0) >= 3]:
            advice = "if that means a missing value, add it to source.na_values"
            taken = replace(taken, notes=(*taken.notes, f"holds {', '.join(shown)} several times: {advice}"))
        return taken
    return None


def _find_times(found: Profile, counts: pd.Series) -> Profile | None:
    texts = [text for text in counts.index if any(character.isdigit() for character in text)]
    if len(texts) < MOSTLY * len(counts):
        return None
    if any(TIME.match(text) for text in texts[:FORMS_TRIED]):
        plain = pd.to_datetime(pd.Series(texts), format="ISO8601", errors="coerce", utc=True)
        fits = {text for text, time in zip(texts, plain, strict=True) if TIME.match(text) and not pd.isna(time)}
        if (taken := _take(found, counts, fits)) is not None:
            return replace(taken, kind="time")
    sample, fitting = pd.Series(texts[:FORMS_TRIED]), []
    for form in (day + clock for day in DAYS for clock in CLOCKS):
        if read_format(sample, form).notna().mean() >= MOSTLY:
            read = read_format(pd.Series(texts), form)
            taken = _take(found, counts, {text for text, time in zip(texts, read, strict=True) if not pd.isna(time)})
            fitting += [replace(taken, kind="time", time_format=form)] if taken is not None else []
    if not fitting:
        return None
    best = max(fitting, key=lambda one: one.different)  # the first of the best
    others = [one.time_format for one in fitting if one is not best and one.different == best.different]
    if others:
        note = f"can be read as {best.time_format} and as {' and '.join(map(str, others))}: the first is taken"
        best = replace(best, notes=(*best.notes, note))
    return best


def _find_texts(found: Profile, counts: pd.Series) -> Profile:
    if any(CONTROL.search(text) for text in counts.index):
        return replace(found, trouble="holds control characters, such as NUL")
    dressed = [text for text in counts.index if DRESSED.fullmatch(text) and not text.isdigit()]
    if len(dressed) >= MOSTLY * len(counts):
        advice = "write plain numbers, without marks between thousands, currencies and percent signs"
        return replace(found, trouble=f"holds numbers such as {dressed[0]!r}: {advice}")
    spellings: dict[str, list[str]] = {}
    for text in counts.index:
        spellings.setdefault(text.casefold(), []).append(text)
    twice = [" and ".join(map(repr, sorted(same))) for same in spellings.values() if len(same) > 1]
    if twice and len(counts) <= 100:
        found = replace(found, notes=(f"spells one value in several ways: {'; '.join(sorted(twice)[:3])}",))
    return found


def _take(found: Profile, counts: pd.Series, fits: Iterable[str]) -> Profile | None:
    """The profile with the values that fit, if those are nearly all; the few others count as missing."""
    fits = set(fits)
    strays = [text for text in counts.index if text not in fits]
    share = float(counts[[text for text in counts.index if text in fits]].sum()) / float(counts.sum())
    if len(strays) > STRAYS_MAX or len(fits) < 3 * len(strays) or share < MOSTLY:
        return None
    stray_rows = int(counts[strays].sum())
    notes: tuple[str, ...] = ()
    if strays:
        shown = ", ".join(map(repr, strays[:5]))
        notes = (f"unlike its other values, and taken for missing: {shown} (rows: {stray_rows:,})",)
    return replace(
        found,
        values=tuple(sorted(fits)),
        missing=found.missing + stray_rows,
        words=(*found.words, *strays),
        notes=notes,
    )
