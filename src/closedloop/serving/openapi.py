"""The OpenAPI description of the service, made from the served contract, and a page that shows it without a network."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from closedloop.contract import CategoricalFeature, Feature, ModelContract
from closedloop.serving.requests import ID_LENGTH_MAX, find_range

PAGE = files("closedloop").joinpath("pages/openapi.html").read_bytes()
TEXT = {"type": "string"}
# an id is printable as Unicode says; a pattern can only name the control characters
ID = {"type": ["string", "null"], "minLength": 1, "maxLength": ID_LENGTH_MAX, "pattern": r"^[^\u0000-\u001f\u007f]+$"}


def describe_service(
    contract: ModelContract, *, range_margin: float, batch_items_max: int, with_tokens: bool
) -> dict[str, Any]:
    """An OpenAPI 3.1 document; limits and categories are those that requests are checked against."""
    security: list[dict[str, list[str]]] = [{"token": []}] if with_tokens else []
    paths = {
        "/predict": {"post": _post("Score one customer", "ScoringRequest", "Prediction", "200")},
        "/predict/batch": {"post": _post("Score many, each with its own result", "Batch", "BatchAnswer", "200")},
        "/outcomes": {"post": _post("Report what really happened", "Outcomes", "OutcomesAnswer", "202")},
        "/health": {"get": _get("Alive, and what is loaded", "Health") | {"security": []}},
        "/readyz": {"get": _get("Ready to answer", "Ready") | {"security": []}},
        "/model/info": {"get": _get("What serves, with its contract", "ModelInfo")},
        "/openapi.json": {"get": _get("This document", "Any")},
    }
    for path in ("/predict", "/predict/batch"):
        paths[path]["post"]["parameters"] = [
            {
                "name": "x-model-version",
                "in": "header",
                "required": False,
                "schema": TEXT,
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
    features = {
        "type": ["object", "null"],
        "properties": {feature.name: _describe_feature(feature, range_margin) for feature in contract.features},
        "required": list(contract.feature_names),
        "additionalProperties": False,
    }
    outcome = _object({"prediction_id": TEXT, "outcome": {"type": "integer", "enum": [0, 1]}})
    error = _object(
        {
            "code": TEXT,
            "message": TEXT,
            "details": {"type": "array", "items": _object({"field": TEXT, "value": {}, "rule": TEXT})},
        }
    )
    prediction = _object(
        {
            "prediction": {"type": "integer", "enum": [0, 1]},
            "probability": {"type": "number", "minimum": 0, "maximum": 1},
            "model_version": TEXT,
            "variant": {"type": "string", "enum": ["champion", "canary"]},
            "prediction_id": TEXT,
            "request_id": TEXT,
            "features_as_of": {"type": ["string", "null"], "format": "date-time"},
            "latency_ms": {"type": "number", "minimum": 0},
        }
    )
    request = {
        "type": "object",
        "properties": {"customer_id": ID, "features": features, "request_id": ID},
        "anyOf": [{"required": ["customer_id"]}, {"required": ["features"]}],
        "additionalProperties": False,
    }
    count = {"type": "integer", "minimum": 0}
    failed = _object({"error": error})
    return {
        "ScoringRequest": request,
        "Prediction": prediction,
        "Batch": {"type": "array", "items": _ref("ScoringRequest"), "minItems": 1, "maxItems": items_max},
        "BatchAnswer": _object(
            {
                "predictions": {"type": "array", "items": {"anyOf": [_ref("Prediction"), failed]}},
                "count": count,
                "total_latency_ms": {"type": "number"},
            }
        ),
        "Outcome": outcome,
        "Outcomes": {
            "anyOf": [
                _ref("Outcome"),
                {"type": "array", "items": _ref("Outcome"), "minItems": 1, "maxItems": items_max},
            ]
        },
        "OutcomesAnswer": _object(
            {"accepted": count, "refused": {"type": "array", "items": _object({"item": count, "error": error})}}
        ),
        "Health": _object(
            {"status": TEXT, "model_loaded": {"type": "boolean"}, "model_version": {"type": ["string", "null"]}}
        ),
        "Ready": _object({"status": TEXT}),
        "ModelInfo": {"type": "object", "required": ["model_version", "slots", "refused", "contract"]},
        "Any": {"type": "object"},
        "Refusal": _object({"error": error, "request_id": TEXT}),
    }


def _describe_feature(feature: Feature, range_margin: float) -> dict[str, Any]:
    if isinstance(feature, CategoricalFeature):
        return {"enum": [*feature.categories, None] if feature.nullable else list(feature.categories)}
    low, high = find_range(feature, range_margin)
    return {"type": ["number", "null"] if feature.nullable else "number", "minimum": low, "maximum": high}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


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


def _post(summary: str, body: str, answer: str, status: str) -> dict[str, Any]:
    refusals = {code: {"description": text, "content": _content("Refusal")} for code, text in REFUSALS.items()}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _content(body)},
        "responses": {status: {"description": "Done", "content": _content(answer)}, **refusals},
    }


def _get(summary: str, answer: str) -> dict[str, Any]:
    refusals = {code: {"description": REFUSALS[code], "content": _content("Refusal")} for code in ("401", "429", "503")}
    return {
        "summary": summary,
        "responses": {"200": {"description": "Done", "content": _content(answer)}, **refusals},
    }
