"""Requests read from JSON: msgspec takes good ones at a seventh of the cost, `closedloop.rules` refuses the others."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from closedloop.contract import ModelContract
from closedloop.rules import ID_LENGTH_MAX, REASONS_MAX, Breach, RefusedRequest, Rules, ScoringRequest, find_code

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
        own, features = found.request_id, found.features
        customer = None if found.customer_id is None else find_code(found.customer_id)
        if not f"{own}{customer}".isprintable() or (customer is None and (features is None or found.customer_id)):
            return self.check(parse_json(body), request_id)
        values = features and msgspec.structs.astuple(features)
        return ScoringRequest(own or request_id, customer, values, found.explain or 0)


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
        ("request_id", Text | None, None),
        ("customer_id", Text | int | None, None),
        ("features", features | None, None),
        ("explain", Explain | None, None),
    ]
    return msgspec.defstruct("ScoringRequest", parts, forbid_unknown_fields=True)


def parse_json(body: bytes) -> Any:
    """JSON, or a refusal."""
    try:
        return _decode(body)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        found = str(error)[:120] if isinstance(error, msgspec.DecodeError) else "not UTF-8, or nested too deeply"
        breach = Breach("", None, f"JSON in UTF-8 ({found})")
        raise RefusedRequest("invalid_json", "the body is not JSON", (breach,)) from None
