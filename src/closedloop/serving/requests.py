"""What a request may say: JSON checked against the model's contract, every breach named in one documented shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import msgspec

from closedloop.contract import CategoricalFeature, ModelContract, NumericFeature

ID_LENGTH_MAX = 200
Value = float | str | None  # of a feature: a number, a category, or missing
Check = Callable[[Any], Value]
_Nothing = Annotated[str, msgspec.Meta(min_length=1, max_length=0)]  # what a feature without categories takes
_decode = msgspec.json.Decoder().decode


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


class ScoringRequest(msgspec.Struct, frozen=True):
    """A checked request; ``values`` are those of its features in the contract's order, None where they come by id."""

    request_id: str
    customer_id: str | None
    values: tuple[Value, ...] | None = None


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
        self._decode = msgspec.json.Decoder(_describe_request(contract, range_margin)).decode

    def read(self, body: bytes, request_id: str) -> ScoringRequest:
        """A request as it came; ``request_id`` is its id unless it names one.

        Raises
        ------
        RefusedRequest
            As `check` does, or if it is no JSON.
        """
        try:  # The decoder checks the same rules at a seventh of the cost, but would name one breach only.
            found = self._decode(body)
        except (msgspec.DecodeError, RecursionError, ValueError):
            return self.check(parse_json(body), request_id)
        own, customer, features = found.request_id, found.customer_id, found.features
        if not f"{own}{customer}".isprintable() or (features is None and customer is None):
            return self.check(parse_json(body), request_id)
        values = None if features is None else msgspec.structs.astuple(features)
        return ScoringRequest(own or request_id, customer, values)

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
        values = None if features is None else self._take_features(features, breaches)
        if features is None and body.get("customer_id") is None:
            breaches.append(Breach("customer_id", None, "customer_id or features is required"))
        if breaches:
            raise RefusedRequest("invalid_request", f"{len(breaches)} rules are broken", tuple(breaches))
        return ScoringRequest(request_id, customer, values)

    def _take_features(self, features: Any, breaches: list[Breach]) -> tuple[Value, ...] | None:
        if type(features) is not dict:
            breaches.append(Breach("features", shorten(features), "object"))
            return None
        values: list[Value] = []
        for name, check in self._checks:
            try:
                values.append(check(features[name]))
            except KeyError:
                breaches.append(Breach(f"features.{name}", None, "is required; null where it is unknown"))
            except ValueError as error:
                breaches.append(Breach(f"features.{name}", shorten(features[name]), str(error)))
        if len(features) > len(self._names) or len(values) < len(self._names):
            breaches += list_unknown(features, self._known, "features.")
        return tuple(values)


_FIELDS = frozenset({"customer_id", "features", "request_id"})


def find_range(feature: NumericFeature, margin: float) -> tuple[float, float]:
    """The least and largest value that is accepted, both finite in float32."""
    if feature.minimum is None or feature.maximum is None:
        return -3e38, 3e38
    width = margin * max(feature.maximum - feature.minimum, 1.0)
    low = feature.minimum - width
    return (max(low, 0.0) if feature.minimum >= 0 else max(low, -3e38)), min(feature.maximum + width, 3e38)


def _check_number(low: float, high: float, *, nullable: bool) -> Check:
    def check(value: Any) -> Value:
        kind = type(value)
        if (kind is float or kind is int) and low <= value <= high:
            return float(value)
        if value is None and nullable:
            return None
        if kind is not float and kind is not int:
            raise ValueError("number or null" if nullable else "number")
        raise ValueError(f"from {low:g} to {high:g}")

    return check


def _check_category(feature: CategoricalFeature) -> Check:
    known = frozenset(feature.categories)
    rule = f"one of {', '.join(feature.categories[:20])}" + (" or null" if feature.nullable else "")

    def check(value: Any) -> Value:
        # JSON has no NaN, so no other value than null can mean "missing"
        if (type(value) is str and value in known) or (value is None and feature.nullable):
            return value
        raise ValueError(rule)

    return check


def _describe_request(contract: ModelContract, margin: float) -> Any:
    """The type of a request that breaks no rule, but for what only `RequestChecker.read` can see."""
    fields: list[tuple[str, Any]] = []
    for number, feature in enumerate(contract.features):
        if isinstance(feature, CategoricalFeature):
            taken: Any = Literal[feature.categories] if feature.categories else _Nothing
        else:
            low, high = find_range(feature, margin)
            taken = Annotated[float, msgspec.Meta(ge=low, le=high)]
        fields.append((f"f{number}", taken | None if feature.nullable else taken))
    names = {name: feature.name for (name, _), feature in zip(fields, contract.features, strict=True)}
    features = msgspec.defstruct("Features", fields, rename=names, forbid_unknown_fields=True, gc=False)
    identity = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_LENGTH_MAX)] | None
    parts = [("request_id", identity, None), ("customer_id", identity, None), ("features", features | None, None)]
    return msgspec.defstruct("Request", parts, forbid_unknown_fields=True)


def parse_json(body: bytes) -> Any:
    """JSON, or a refusal."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        found = str(error)[:120] if isinstance(error, msgspec.DecodeError) else "not UTF-8, or nested too deeply"
        breach = Breach("", None, f"JSON in UTF-8 ({found})")
        raise RefusedRequest("invalid_json", "the body is not JSON", (breach,)) from None


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
