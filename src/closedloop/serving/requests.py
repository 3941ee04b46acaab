"""What a request may say: JSON checked against the model's contract, every breach named in one documented shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from closedloop.contract import CategoricalFeature, ModelContract, NumericFeature

ID_LENGTH_MAX = 200
Value = float | str | None  # of a feature: a number, a category, or missing
Check = Callable[[Any], tuple[Value, float]]


class Breach(msgspec.Struct, frozen=True):
    """One rule that a request breaks; ``value`` is what was found, shortened."""

    field: str
    value: Any
    rule: str


class RefusedRequest(Exception):
    """A request that is answered with ``status`` and its breaches, and is not scored."""

    def __init__(
        self, code: str, message: str, breaches: tuple[Breach, ...] = (), *, status: int = 400, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.breaches = code, message, breaches
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, slots=True)
class ScoringRequest:
    """A checked request; ``packed`` and ``values`` are None where the features come from the online store.

    ``values`` is what is logged, ``packed`` the same as the graph takes it, both in the contract's order.
    """

    request_id: str
    customer_id: str | None
    values: tuple[Value, ...] | None = None
    packed: list[float] | None = None


class RequestChecker:
    """Checks for one contract, prepared once.

    Parameters
    ----------
    contract
        Whose features are asked for.
    range_margin
        How far a number may leave the range seen in training, in widths of that range; a feature that was never
        negative stays so.
    """

    def __init__(self, contract: ModelContract, range_margin: float) -> None:
        self.contract = contract
        self._names = contract.feature_names
        self._known = frozenset(self._names)
        self._checks = [
            (
                feature.name,
                _check_category(feature)
                if isinstance(feature, CategoricalFeature)
                else _check_number(*find_range(feature, range_margin), nullable=feature.nullable),
            )
            for feature in contract.features
        ]

    def check(self, body: Any, request_id: str) -> ScoringRequest:
        """A decoded JSON value as a request.

        Raises
        ------
        RefusedRequest
            With every breach that was found.
        """
        if type(body) is not dict:
            raise RefusedRequest("invalid_request", "a JSON object is expected", (Breach("", shorten(body), "object"),))
        breaches = list_unknown(body, _FIELDS)
        own_id = body.get("request_id")
        if own_id is not None:
            request_id = _take_id("request_id", own_id, breaches) or request_id
        customer = body.get("customer_id")
        if customer is not None:
            customer = _take_id("customer_id", customer, breaches)
        features = body.get("features")
        values, packed = (None, None) if features is None else self._take_features(features, breaches)
        if features is None and body.get("customer_id") is None:
            breaches.append(Breach("customer_id", None, "customer_id or features is required"))
        if breaches:
            raise RefusedRequest("invalid_request", f"{len(breaches)} rules are broken", tuple(breaches))
        return ScoringRequest(request_id, customer, values, packed)

    def _take_features(
        self, features: Any, breaches: list[Breach]
    ) -> tuple[tuple[Value, ...] | None, list[float] | None]:
        if type(features) is not dict:
            breaches.append(Breach("features", shorten(features), "object"))
            return None, None
        values: list[Value] = []
        packed: list[float] = []
        for name, check in self._checks:
            try:
                value, code = check(features[name])
            except KeyError:
                breaches.append(Breach(f"features.{name}", None, "is required; null where it is unknown"))
            except ValueError as error:
                breaches.append(Breach(f"features.{name}", shorten(features[name]), str(error)))
            else:
                values.append(value)
                packed.append(code)
        if len(features) > len(self._names) or len(values) < len(self._names):
            breaches += list_unknown(features, self._known, "features.")
        return tuple(values), packed


_FIELDS = frozenset({"customer_id", "features", "request_id"})


def find_range(feature: NumericFeature, margin: float) -> tuple[float, float]:
    """The least and largest value that is accepted, both finite in float32."""
    if feature.minimum is None or feature.maximum is None:
        return -3e38, 3e38
    width = margin * max(feature.maximum - feature.minimum, 1.0)
    low = feature.minimum - width
    return (max(low, 0.0) if feature.minimum >= 0 else max(low, -3e38)), min(feature.maximum + width, 3e38)


def _check_number(low: float, high: float, *, nullable: bool) -> Check:
    def check(value: Any) -> tuple[Value, float]:
        kind = type(value)
        if (kind is float or kind is int) and low <= value <= high:
            return float(value), float(value)
        if value is None and nullable:
            return None, math.nan
        if kind is not float and kind is not int:
            raise ValueError("number or null" if nullable else "number")
        raise ValueError(f"from {low:g} to {high:g}")

    return check


def _check_category(feature: CategoricalFeature) -> Check:
    # JSON has no NaN, so no other value than null can mean "missing"; missing is coded as unknown, as in training
    codes: Mapping[Any, float] = {name: float(code) for code, name in enumerate(feature.categories)}
    rule = f"one of {', '.join(feature.categories[:20])}" + (" or null" if feature.nullable else "")

    def check(value: Any) -> tuple[Value, float]:
        if type(value) is str:
            code = codes.get(value)
            if code is not None:
                return value, code
        elif value is None and feature.nullable:
            return None, -1.0
        raise ValueError(rule)

    return check


def _take_id(name: str, value: Any, breaches: list[Breach]) -> str | None:
    """An id as it came; None, and a breach, where it is not one."""
    if type(value) is str and 0 < len(value) <= ID_LENGTH_MAX and value.isprintable():
        return value
    breaches.append(Breach(name, shorten(value), f"a text of 1 to {ID_LENGTH_MAX} printable characters"))
    return None


def list_unknown(body: Mapping[str, Any], known: frozenset[str], prefix: str = "") -> list[Breach]:
    """A breach for each of the first 20 names that are not known, so that an answer never grows with its request."""
    names = sorted(body.keys() - known)[:20]
    return [Breach(prefix + name[:80], shorten(body[name]), "is not known") for name in names]


def shorten(value: Any) -> Any:
    """What was found, in at most 80 characters, so that an answer never repeats a large body."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)[:80]
    if isinstance(value, str):
        return value[:80]
    return type(value).__name__.replace("dict", "object").replace("list", "array")
