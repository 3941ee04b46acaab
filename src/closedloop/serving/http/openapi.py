"""The OpenAPI description of the service, from the types that it decodes and encodes, and a page that shows it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Annotated, Any

import msgspec

from closedloop.adapters.jinja import read_page
from closedloop.contract import ModelContract
from closedloop.rules import FeatureRule, RefusedRequest, find_code
from closedloop.serving.http import answers
from closedloop.serving.requests import describe_request

PAGE = read_page("openapi.html").encode()
EXAMPLE_ID = "0" * 32  # of a prediction: the page puts the last answer's id there
REFERENCE = "#/components/schemas/{name}"
TEXT, OBJECT = {"type": "string"}, {"type": "object"}
MODEL_INFO: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("model_name", "model_version", "source"), TEXT),
    **dict.fromkeys(("slots", "refused", "contract"), OBJECT),
    "revision": {"type": "integer"},
    "notes": {"type": "array", "items": TEXT},
}
DOCUMENT: dict[str, dict[str, Any]] = {"openapi": TEXT, "info": OBJECT, "paths": OBJECT, "components": OBJECT}


def describe_service(
    contract: ModelContract, *, range_margin: float, batch_items_max: int, with_tokens: bool
) -> dict[str, Any]:
    """An OpenAPI 3.1 document; limits and categories are those that requests are checked against."""
    security: list[dict[str, list[str]]] = [{"token": []}] if with_tokens else []
    examples = _list_examples(contract, range_margin)
    outcome = {"prediction_id": EXAMPLE_ID, "outcome": 1}
    paths = {
        "/predict": {"post": _post("Score one customer", "ScoringRequest", "PredictAnswer", examples[:1])},
        "/predict/batch": {"post": _post("Score many, each with its own result", "Batch", "BatchAnswer", [examples])},
        "/outcomes": {"post": _post("Report what really happened", "Outcomes", "OutcomesAnswer", [outcome], "202")},
        "/health": {"get": _get("Alive, and what is loaded", "Health") | {"security": []}},
        "/readyz": {"get": _get("Ready to answer", "Ready") | {"security": []}},
        "/model/info": {"get": _get("What serves, with its contract", "ModelInfo")},
        "/openapi.json": {"get": _get("This document", "Document")},
    }
    for path in ("/predict", "/predict/batch"):
        paths[path]["post"]["parameters"] = [
            {
                "name": "x-model-version",
                "in": "header",
                "required": False,
                "schema": {"type": "string"},
                "description": "Force a version that serves (scope admin); logged as forced.",
            }
        ]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"closedloop: {contract.model_name}",
            "version": contract.contract_version,
            "description": "Probability of churn over HTTP; there is no gRPC.",
        },
        "security": security,
        "paths": paths,
        "components": {
            "schemas": _describe_schemas(contract, range_margin, batch_items_max),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe_schemas(contract: ModelContract, range_margin: float, items_max: int) -> dict[str, Any]:
    rules = contract.read_rules(range_margin)
    request: Any = describe_request(rules)
    some = msgspec.Meta(min_length=1, max_length=items_max)
    reports = answers.OutcomeReport | Annotated[list[answers.OutcomeReport], some]
    kinds: list[Any] = [request, Annotated[list[request], some], reports, *answers.DOCUMENTED]
    (_, batch, outcomes, *_), schemas = msgspec.json.schema_components(kinds, ref_template=REFERENCE)
    # what a type cannot say
    schemas["ScoringRequest"]["anyOf"] = [{"required": ["customer_id"]}, {"required": ["features"]}]
    for feature in rules.features:
        if numbers := _list_numbers(feature):
            missing = [None] if feature.nullable else []
            schemas["Features"]["properties"][feature.name] = {"enum": [*(feature.codes or ()), *numbers, *missing]}
    described = {name: _object(**parts) for name, parts in (("ModelInfo", MODEL_INFO), ("Document", DOCUMENT))}
    return {**schemas, "Batch": batch, "Outcomes": outcomes, **described}


def _object(**parts: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all of these."""
    return {"type": "object", "properties": parts, "required": [*parts]}


def _list_examples(contract: ModelContract, range_margin: float) -> list[dict[str, Any]]:
    """Requests with the features of two customers of the reference rows, whose ids the contract does not hold."""
    rules, found = contract.read_rules(range_margin), list[dict[str, Any]]()
    for row in contract.golden_rows:
        body = {"features": row.features}
        with suppress(RefusedRequest):  # a reference row may lie beyond the range seen in training
            rules.check(body, "example")
            found.append(body)
    return found[:2]


def _list_numbers(feature: FeatureRule) -> list[float]:
    """The numbers that are taken for a category: 1 for "1"."""
    found = []
    for category in feature.codes or ():
        try:
            number = json.loads(str(category))
        except ValueError:
            continue
        if isinstance(number, int | float) and find_code(number) == category:
            found.append(number)
    return found


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=name)}}}


REFUSALS = {
    "400": "A rule is broken: field, value and rule",
    "401": "No valid token",
    "403": "The token lacks the scope",
    "404": "Unknown prediction",
    "408": "The body came too slowly",
    "413": "The body is too large, or has more outcomes than are ever taken at once",
    "415": "The body is said to be something else than JSON",
    "429": "Too many requests or outcomes; see Retry-After",
    "503": "No model, no online store, or no room to log",
}


def _post(summary: str, body: str, answer: str, examples: list[Any], status: str = "200") -> dict[str, Any]:
    refusals = {code: {"description": text, "content": _content("Refusal")} for code, text in REFUSALS.items()}
    content = _content(body)
    if examples:
        content["application/json"]["example"] = examples[0]
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": content},
        "responses": {status: {"description": "Done", "content": _content(answer)}, **refusals},
    }


def _get(summary: str, answer: str) -> dict[str, Any]:
    refusals = {code: {"description": REFUSALS[code], "content": _content("Refusal")} for code in ("401", "429", "503")}
    return {
        "summary": summary,
        "responses": {"200": {"description": "Done", "content": _content(answer)}, **refusals},
    }
