"""The service's answers as types: it encodes them, and its OpenAPI description follows from them."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Annotated, Any, Literal

import msgspec

from closedloop.errors import ServiceUnavailable
from closedloop.records import Prediction
from closedloop.rules import Breach, RefusedRequest

logger = logging.getLogger(__name__)
Count = Annotated[int, msgspec.Meta(ge=0)]
encode = msgspec.json.Encoder().encode


class ReasonAnswer(msgspec.Struct, frozen=True):
    """A feature's part in a score: ``contribution`` in units of the raw score, above 0 towards churn.

    ``feature`` is the feature of the reason that contributes most, and ``value`` is its value.
    """

    reason: str
    feature: str
    value: float | str | None
    contribution: float


class Explanation(msgspec.Struct, frozen=True):
    """The strongest reasons; ``base`` and the contributions of all features sum to ``raw_score``."""

    raw_score: float
    base: float
    reasons: list[ReasonAnswer]


class PredictAnswer(msgspec.Struct, frozen=True):
    """The answer to one prediction request."""

    prediction: Literal[0, 1]
    probability: Annotated[float, msgspec.Meta(ge=0, le=1)]
    model_version: str
    variant: Literal["champion", "canary"]
    prediction_id: str
    request_id: str
    features_as_of: Annotated[str, msgspec.Meta(extra_json_schema={"format": "date-time"})] | None
    latency_ms: Annotated[float, msgspec.Meta(ge=0)]
    explanation: Explanation | msgspec.UnsetType = msgspec.UNSET


class Error(msgspec.Struct, frozen=True):
    """Why something is refused."""

    code: str
    message: str
    details: tuple[Breach, ...] = ()


class Refusal(msgspec.Struct, frozen=True):
    """The answer to a request that is refused."""

    error: Error
    request_id: str


class FailedItem(msgspec.Struct, frozen=True):
    """The answer to one item of a batch that is refused."""

    error: Error


# A union of two objects that no field tells apart: msgspec could not decode it, and so does not describe it.
_EITHER = {"anyOf": [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (PredictAnswer, FailedItem)]}
BatchItem = Annotated[Any, msgspec.Meta(extra_json_schema=_EITHER)]


class BatchAnswer(msgspec.Struct, frozen=True):
    """One answer or error an item, in their order."""

    predictions: list[BatchItem]
    count: Count
    total_latency_ms: float


class OutcomeReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An outcome as a client reports it: 1 churned, 0 stayed."""

    prediction_id: str
    outcome: Literal[0, 1]


class RefusedOutcome(msgspec.Struct, frozen=True):
    """The number of an item that is refused, and why."""

    item: Count
    error: Error


class OutcomesAnswer(msgspec.Struct, frozen=True):
    """How many outcomes were taken, and which were not."""

    accepted: Count
    refused: list[RefusedOutcome]


class Health(msgspec.Struct, frozen=True):
    """That the process is alive, and what it has loaded."""

    status: Literal["ok"]
    model_loaded: bool
    model_version: str | None
    model_name: str
    folder_sha256: str | None


class Ready(msgspec.Struct, frozen=True):
    """That requests are answered."""

    status: Literal["ready"]


DOCUMENTED = (PredictAnswer, FailedItem, BatchAnswer, OutcomesAnswer, Refusal, Health, Ready)


def describe(
    prediction: Prediction, arrived: float, explanation: Explanation | msgspec.UnsetType = msgspec.UNSET
) -> PredictAnswer:
    """A prediction as it is answered."""
    as_of = prediction.features_as_of
    return PredictAnswer(
        1 if prediction.decision else 0,
        prediction.score,
        prediction.model_version,
        "canary" if prediction.variant == "canary" else "champion",
        prediction.prediction_id,
        prediction.request_id,
        as_of.isoformat() if as_of else None,
        (time.perf_counter() - arrived) * 1e3,
        explanation,
    )


def describe_item(
    future: asyncio.Future[Prediction] | RefusedRequest,
    arrived: float,
    explanation: Explanation | msgspec.UnsetType = msgspec.UNSET,
) -> PredictAnswer | FailedItem:
    """One item of a batch: its answer or its error."""
    error = future if isinstance(future, RefusedRequest) else future.exception()
    if error is None:
        assert isinstance(future, asyncio.Future)  # noqa: S101 - narrows the type
        return describe(future.result(), arrived, explanation)
    if isinstance(error, RefusedRequest):
        return FailedItem(error_of(error))
    if isinstance(error, ServiceUnavailable):
        return FailedItem(Error("unavailable", str(error)))
    logger.error("an item of a batch failed", exc_info=error)
    return FailedItem(Error("internal", "an error of this service"))


def error_of(refused: RefusedRequest) -> Error:
    """The documented shape of a refusal."""
    return Error(refused.code, refused.message, refused.breaches)
