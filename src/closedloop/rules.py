"""The model contract's rules: what a row may hold, how it is packed, and the golden rows that prove a model.

The service, the stream, the batch scorer and the edge script all use this one file, and `closedloop edge export` copies
it: therefore it imports numpy and the standard library alone.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

GOLDEN_TOLERANCE, ID_LENGTH_MAX = 1e-6, 200
TEXT_ID_RULE = f"a text of 1 to {ID_LENGTH_MAX} printable characters"
CUSTOMER_ID_RULE = f"{TEXT_ID_RULE}, or a whole number that has all its digits"
FIELDS = frozenset({"customer_id", "features", "request_id"})
REASONS_MAX = 20  # in one answer
EXPLAIN_RULE = f"whole number from 1 to {REASONS_MAX}"
Value = float | str | None  # of a feature: a number, a category, or missing
_CATEGORIES_SHOWN, _FLOAT32_MAX, _SAFE_INTEGER = 20, 3e38, 2**53
_FLOATS, _INTEGERS = (float, np.floating), (bool, np.bool_, int, np.integer)
_WHOLE_FLOAT = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")
_EXPONENT = re.compile(r"-?[0-9](?:\.[0-9]+)?[eE]\+[0-9]+")  # pandas from 1e16 on, spreadsheets from 12 digits on
# Java and Spark from 1e7 on: 12345678 is 1.2345678E7; Julia from 1e6 on, Polars from 1e16 on: with a small e
_BARE_EXPONENT = re.compile(r"-?[1-9]\.[0-9]+[Ee][0-9]{1,2}")


@dataclass(frozen=True, slots=True)
class Breach:
    """One rule that a row breaks; ``value`` is what was found, shortened."""

    field: str
    value: Any
    rule: str


class RefusedRequest(Exception):
    """A request that is not scored: its breaches, and the HTTP status that the service answers."""

    def __init__(
        self, code: str, message: str, breaches: Sequence[Breach] = (), *, status: int = 400, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.breaches = code, message, tuple(breaches)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """A checked request; ``values`` are those of its features in the contract's order, None where they come by id.

    ``explain`` is how many reasons the answer has.
    """

    request_id: str
    customer_id: str | None
    values: tuple[Value, ...] | None = None
    explain: int = 0


class FeatureRule:
    """The rule for the values of one feature.

    ``codes`` has each category's code, which is its place in the contract, and is None for a number; ``low`` and
    ``high`` are the least and largest number that is accepted, both finite in float32.

    Parameters
    ----------
    described
        The feature as the contract writes it in JSON.
    range_margin
        How far a number may leave the range seen in training, in widths of that range; a feature that was never
        negative stays so.
    """

    def __init__(self, described: Mapping[str, Any], range_margin: float) -> None:
        self.name: str = described["name"]
        self.nullable: bool = described["nullable"]
        self.codes: dict[Value, float] | None = None
        self.low, self.high = -_FLOAT32_MAX, _FLOAT32_MAX
        if described["kind"] == "categorical":
            self.codes = {category: float(code) for code, category in enumerate(described["categories"])}
            self._alike = {find_code(category): category for category in self.codes}
            self.rule = _describe_categories(described["categories"], nullable=self.nullable)
            return
        least, largest = described["minimum"], described["maximum"]
        if least is not None and largest is not None:
            width = range_margin * max(largest - least, 1.0)
            self.low = max(least - width, 0.0 if least >= 0 else -_FLOAT32_MAX)
            self.high = min(largest + width, _FLOAT32_MAX)
        self.rule = "number or null" if self.nullable else "number"

    def read(self, value: Any) -> Value:
        """The value of a request as it is logged; ValueError with the rule that it breaks."""
        kind = type(value)
        if value is None and self.nullable:
            return None
        if self.codes is not None:
            code = value if kind is str and value in self.codes else self._alike.get(find_code(value))
            if code is None:
                raise ValueError(self.rule)
            return code
        if kind is not float and kind is not int:
            raise ValueError(self.rule)
        if not self.low <= value <= self.high:
            raise ValueError(f"from {self.low:g} to {self.high:g}")
        return float(value)


class Rules:
    """The rules of one contract, prepared once; the parameters are those of `FeatureRule`, for all features.

    ``explains`` says whether a request may ask for reasons.
    """

    def __init__(
        self, features: Iterable[Mapping[str, Any]], range_margin: float = 0.0, *, explains: bool = False
    ) -> None:
        self._fields = FIELDS | {"explain"} if explains else FIELDS
        self.features = tuple(FeatureRule(described, range_margin) for described in features)
        self._checks = [(feature.name, feature.read) for feature in self.features]
        self._names = frozenset(feature.name for feature in self.features)
        self._codes = [(place, one.codes) for place, one in enumerate(self.features) if one.codes is not None]

    def check(self, body: Any, request_id: str) -> ScoringRequest:
        """A decoded JSON value as a request; ``request_id`` is its id unless it names one.

        Raises
        ------
        RefusedRequest
            With every breach that was found.
        """
        if type(body) is not dict:
            raise RefusedRequest("invalid_request", "a JSON object is expected", [Breach("", shorten(body), "object")])
        breaches = list_unknown(body, self._fields)
        ids: dict[str, str | None] = {}
        for name, read in (("request_id", read_request_id), ("customer_id", read_customer_id)):
            found = body.get(name)
            try:
                ids[name] = None if found is None else read(found)
            except ValueError as error:
                breaches.append(Breach(name, shorten(found), str(error)))
        explain = body.get("explain") if "explain" in self._fields else None
        if explain is not None and (type(explain) is not int or not 1 <= explain <= REASONS_MAX):
            breaches.append(Breach("explain", shorten(explain), EXPLAIN_RULE))
        features = body.get("features")
        values = None if features is None else self._read_features(features, breaches)
        if features is None and body.get("customer_id") is None:
            breaches.append(Breach("customer_id", None, "customer_id or features is required"))
        if breaches:
            raise refuse_breaches(breaches)
        return ScoringRequest(ids["request_id"] or request_id, ids["customer_id"], values, explain or 0)

    def _read_features(self, features: Any, breaches: list[Breach]) -> tuple[Value, ...] | None:
        if type(features) is not dict:
            breaches.append(Breach("features", shorten(features), "object"))
            return None
        values: list[Value] = []
        for name, read in self._checks:
            try:
                values.append(read(features[name]))
            except KeyError:
                breaches.append(Breach(f"features.{name}", None, "is required; null where it is unknown"))
            except ValueError as error:
                breaches.append(Breach(f"features.{name}", shorten(features[name]), str(error)))
        if len(features) > len(self._names) or len(values) < len(self._names):
            breaches += list_unknown(features, self._names, "features.")
        return tuple(values)

    def pack(self, rows: Iterable[Sequence[Value]]) -> np.ndarray:
        """Rows in the contract's order as the graph takes them: float32, shape (n, n_features).

        A missing number is NaN; a category that is missing or unknown is -1.
        """
        packed = [list(row) for row in rows]
        for place, codes in self._codes:
            for row in packed:
                row[place] = codes.get(row[place], -1.0)
        return np.array(packed, dtype=np.float32).reshape(-1, len(self.features))

    def pack_named(self, rows: Iterable[Mapping[str, Value]]) -> np.ndarray:
        """`pack` of rows that name their features; other names are left alone, and what is not there is missing."""
        return self.pack([row.get(feature.name) for feature in self.features] for row in rows)

    def check_golden_rows(
        self, golden: Sequence[tuple[Mapping[str, Value], float]], score: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Score each golden row as in training, and a row of which all is missing that may be.

        Parameters
        ----------
        golden
            Rows, and the score of each within 1e-6.
        score
            The model: packed rows in, one probability a row out.

        Raises
        ------
        ValueError
            If there is none, one differs, or the row with missing values gets no score.
        """
        if not golden:
            raise ValueError("golden rows: the contract has none, so the model cannot be proved")
        for number, (row, expected) in enumerate(golden):
            found = float(score(self.pack_named([row]))[0])
            if not abs(found - expected) <= GOLDEN_TOLERANCE:
                raise ValueError(f"golden rows: row {number} scores {found:.7f}, the contract says {expected:.7f}")
        known = golden[0][0]
        missing = {one.name: None if one.nullable else known[one.name] for one in self.features}
        if not np.isfinite(score(np.repeat(self.pack_named([missing]), 16, axis=0))).all():
            raise ValueError("contract: features may be missing, but the model has no score where they are")


def normalise_code(value: Any) -> str | None:
    """An id or a category as text, spelt the same whatever type its column had; None where it is missing.

    A missing value turns a column of whole numbers into one of floats, and a file does not say whether a text was a
    float once: ``1``, ``1.0`` and ``"1.0"`` are all ``"1"``, and Java's ``"1.2E7"`` is ``"12000000"``. A letter and
    its mark are one character (Unicode's NFC), as most programs write them and macOS may not. Other text stays, but for
    white space around it.

    Raises
    ------
    ValueError
        If the value may have lost digits (a float from 2**53 on, or a text such as ``2e+16``), or is neither text nor a
        finite number.

    Examples
    --------
    >>> [normalise_code(value) for value in (7, 7.0, "7.0", " A1 ", "007", 1.5, "", None)]
    ['7', '7', '7', 'A1', '007', '1.5', None, None]
    >>> normalise_code(2e16)
    Traceback (most recent call last):
        ...
    ValueError: 2e+16 may have lost digits; store such ids as text or as 64-bit integers
    """
    code, has_lost = "", False
    if isinstance(value, str):
        code = value.strip()
        if not code.isascii():
            code = unicodedata.normalize("NFC", code)
        if code.endswith("0") and (whole := _WHOLE_FLOAT.fullmatch(code)):
            code, has_lost = str(int(whole[1])), abs(int(whole[1])) >= _SAFE_INTEGER
        elif "+" in code:
            has_lost = _EXPONENT.fullmatch(code) is not None
        elif "." in code and _BARE_EXPONENT.fullmatch(code) and (number := Decimal(code)) == int(number):
            code, has_lost = str(int(number)), abs(number) >= _SAFE_INTEGER
    elif isinstance(value, _FLOATS) and np.isfinite(value):
        digits = np.finfo(type(value)).nmant + 1 if isinstance(value, np.floating) else 53
        code, has_lost = (str(int(value)), abs(int(value)) >= 2**digits) if value == int(value) else (str(value), False)
    elif isinstance(value, _INTEGERS):
        code = str(value)
    elif isinstance(value, Decimal) and value.is_finite():
        code = str(int(value)) if value == int(value) else f"{value.normalize():f}"
    elif value is not None and not (isinstance(value, _FLOATS) and np.isnan(value)):
        raise ValueError(f"{str(value)[:60]} is neither text nor a finite number")
    if has_lost:
        raise ValueError(f"{value!s:.60} may have lost digits; store such ids as text or as 64-bit integers")
    return code or None


def find_code(value: Any) -> str | None:
    """`normalise_code`, or None where it refuses."""
    try:
        return normalise_code(value)
    except ValueError:
        return None


def read_object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``json.loads`` as its ``object_pairs_hook``: by itself it keeps a repeated name's last value.

    Raises
    ------
    ValueError
        If a name stands twice: two readers could take two values from it.

    Examples
    --------
    >>> json.loads('{"age": 40, "plan": {"age": 1}}', object_pairs_hook=read_object)
    {'age': 40, 'plan': {'age': 1}}
    >>> json.loads('{"age": 40, "age": 41}', object_pairs_hook=read_object)
    Traceback (most recent call last):
        ...
    ValueError: "age" stands twice in one object
    """
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{json.dumps(name[:60], ensure_ascii=False)} stands twice in one object")
        members[name] = value
    return members


def refuse_breaches(breaches: Sequence[Breach]) -> RefusedRequest:
    """The refusal of a request that breaks these rules."""
    message = "1 rule is broken" if len(breaches) == 1 else f"{len(breaches)} rules are broken"
    return RefusedRequest("invalid_request", message, breaches)


def list_unknown(body: Mapping[str, Any], known: frozenset[str], prefix: str = "") -> list[Breach]:
    """A breach for each of the first 20 names that are not known, so that an answer never grows with its request."""
    names = sorted(body.keys() - known)[:20]
    return [Breach(prefix + name[:80], shorten(body[name]), "is not known") for name in names]


def shorten(value: Any) -> Any:
    """The value that was found, in at most 80 characters of JSON, so that an answer never repeats a large body."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, _FLOATS):
        return float(value) if np.isfinite(value) else str(value)
    if isinstance(value, int):
        return value if abs(value) < _SAFE_INTEGER else str(value)[:80]
    if isinstance(value, str):
        return value[:80]
    return type(value).__name__.replace("dict", "object").replace("list", "array")


def read_request_id(value: Any) -> str:
    """A request's own id, as it came; ValueError with the rule if it is none."""
    if type(value) is str and 0 < len(value) <= ID_LENGTH_MAX and value.isprintable():
        return value
    raise ValueError(TEXT_ID_RULE)


def read_customer_id(value: Any) -> str:
    """A customer's id with one spelling; ValueError with the rule if it is none."""
    is_truth = isinstance(value, bool | np.bool_)
    is_part = isinstance(value, _FLOATS) and value != value // 1
    found = None if is_truth or is_part else find_code(value)
    if found and len(found) <= ID_LENGTH_MAX and found.isprintable():
        return found
    raise ValueError(CUSTOMER_ID_RULE)


def _describe_categories(categories: Sequence[str], *, nullable: bool) -> str:
    """The rule in words; quotes show that categories are text."""
    or_null = " or null" if nullable else ""
    if not categories:
        return f"no category{or_null}: training saw none"
    shown = ", ".join(json.dumps(category, ensure_ascii=False) for category in categories[:_CATEGORIES_SHOWN])
    more = len(categories) - _CATEGORIES_SHOWN
    return f"one of {shown}{f' and {more} more' if more > 0 else ''}{or_null}"
