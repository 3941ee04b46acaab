"""Requests read from JSON: msgspec takes good ones at a seventh of the cost, `closedloop.rules` refuses the others."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec

from closedloop.contract import ModelContract
from closedloop.rules import (
    ID_LENGTH_MAX,
    REASONS_MAX,
    Breach,
    RefusedRequest,
    Rules,
    ScoringRequest,
    find_code,
    read_object,
)

# An id is printable as Unicode says; a pattern can only name the control characters.
Text = Annotated[
    str,
    msgspec.Meta(min_length=1, max_length=ID_LENGTH_MAX, extra_json_schema={"pattern": r"^[^\u0000-\u001f\u007f]+$"}),
]
Explain = Annotated[
    int, msgspec.Meta(ge=1, le=REASONS_MAX, description="How many reasons the answer has, the strongest first.")
]
_Nothing = Annotated[str, msgspec.Meta(min_length=1, max_length=0)]  # what a feature without categories takes
_decode = msgspec.json.Decoder().decode


class RequestChecker:
    """Reads the requests of one contract, prepared once.

    Parameters
    ----------
    contract
        Whose features are asked for.
    range_margin
        As `closedloop.rules.FeatureRule` takes it.
    """

    def __init__(self, contract: ModelContract, range_margin: float) -> None:
        self.contract = contract
        rules = contract.read_rules(range_margin, explains=True)
        self.check = rules.check
        self._decode = msgspec.json.Decoder(describe_request(rules)).decode

    def read(self, body: bytes, request_id: str) -> ScoringRequest:
        """A request as it came; ``request_id`` is its id unless it names one.

        Raises
        ------
        RefusedRequest
            As `closedloop.rules.Rules.check` does, or if it is no JSON.
        """
        try:  # The decoder knows the same rules, but would name one breach only.
            found = self._decode(body)
        except (msgspec.DecodeError, RecursionError, ValueError):
            return self.check(parse_json(body), request_id)
        parts = own, asked, features, explain = msgspec.structs.astuple(found)
        values = msgspec.structs.astuple(features) if features else ()
        names = len(parts) - parts.count(msgspec.UNSET) + len(values)
        if body.count(b":") != names:  # a name stands twice, or a colon in a text
            refuse_repeats(body, names + [type(value) for value in (own, asked, *values)].count(str))
        customer = None if asked is msgspec.UNSET else find_code(asked)
        if not f"{own}{customer}".isprintable() or (customer is None and (asked or not features)):
            return self.check(parse_json(body), request_id)
        return ScoringRequest(own or request_id, customer, values or None, explain or 0)


def describe_request(rules: Rules) -> Any:
    """The type of a request that breaks no rule, but for what only `RequestChecker.read` can see."""
    fields: list[tuple[str, Any]] = []
    for number, feature in enumerate(rules.features):
        if feature.codes is None:
            taken: Any = Annotated[float, msgspec.Meta(ge=feature.low, le=feature.high)]
        else:
            taken = Literal[tuple(feature.codes)] if feature.codes else _Nothing
        fields.append((f"f{number}", taken | None if feature.nullable else taken))
    names = {name: feature.name for (name, _), feature in zip(fields, rules.features, strict=True)}
    features = msgspec.defstruct("Features", fields, rename=names, forbid_unknown_fields=True, gc=False)
    parts = [
        ("request_id", Text | None | msgspec.UnsetType, msgspec.UNSET),
        ("customer_id", Text | int | None | msgspec.UnsetType, msgspec.UNSET),
        ("features", features | None | msgspec.UnsetType, msgspec.UNSET),
        ("explain", Explain | None | msgspec.UnsetType, msgspec.UNSET),
    ]
    return msgspec.defstruct("ScoringRequest", parts, forbid_unknown_fields=True)


def parse_json(body: bytes) -> Any:
    """JSON in which no object has a name twice, or a refusal."""
    try:
        found = _decode(body)
        texts = _count_texts(found)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        reason = str(error) if isinstance(error, msgspec.DecodeError) else "not UTF-8, or nested too deeply"
        raise _refuse_json(reason) from None
    refuse_repeats(body, texts)
    return found


def refuse_repeats(body: bytes, texts: int) -> None:
    """Refuse JSON in which a name stands twice, of which msgspec keeps the last value.

    ``texts`` were decoded, names and values: with two quotes for each there is no other name. Quotes inside of texts
    count too; only where there are more quotes, the body is read a second time.

    Raises
    ------
    RefusedRequest
        With the first name that stands twice in its object.
    """
    if body.count(b'"') == 2 * texts:
        return
    try:
        json.loads(body, object_pairs_hook=read_object, parse_int=str)  # a number's digits may be very many
    except (ValueError, RecursionError) as error:
        raise _refuse_json(str(error)) from None


def _count_texts(found: Any) -> int:
    kind = type(found)
    if kind is dict:
        return len(found) + sum(map(_count_texts, found.values()))
    return sum(map(_count_texts, found)) if kind is list else kind is str


def _refuse_json(reason: str) -> RefusedRequest:
    breach = Breach("", None, f"JSON in UTF-8 ({reason[:120]})")
    return RefusedRequest("invalid_json", "the body is not JSON", (breach,))
