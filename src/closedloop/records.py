"""What is logged of a prediction and of what really happened: one record each, the same in spool, store and files."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from typing import Annotated, Literal

import msgspec

BODY_DIGITS, SEAL_DIGITS = 32, 16
Moment = Annotated[dt.datetime, msgspec.Meta(tz=True)]  # one without a zone is refused when it is read
Source = Literal["http", "batch", "stream", "edge", "edge-quantised"]
Variant = Literal["champion", "canary", "shadow"]


class Prediction(msgspec.Struct, frozen=True, tag="prediction", tag_field="kind"):
    """One scored customer.

    ``features`` are the values in the order of the contract (numbers, category names, None for missing);
    ``score`` is the probability of churn, ``decision`` 1 at or above the threshold; ``variant`` is "shadow" for
    a challenger's score that nobody was answered, with ``answered_id`` naming the prediction that was;
    ``forced`` marks a version asked for by header, which statistics leave out.
    """

    prediction_id: str
    request_id: str
    model_name: str
    model_version: str
    variant: Variant
    source: Source
    predicted_at: Moment
    features: tuple[float | str | None, ...]
    score: float
    decision: int
    latency_ms: float
    customer_id: str | None = None
    features_as_of: Moment | None = None
    answered_id: str | None = None
    forced: bool = False


class Outcome(msgspec.Struct, frozen=True, tag="outcome", tag_field="kind"):
    """What really happened to the customer of a prediction: 1 churned, 0 stayed."""

    prediction_id: str
    outcome: int
    reported_at: Moment


Record = Prediction | Outcome


def seal_id(body: str, key: bytes) -> str:
    """A prediction id: 32 hexadecimal digits and 16 more that only the holder of ``key`` can compute.

    An id that this service never gave is so refused without asking the store.

    Parameters
    ----------
    body
        32 lower-case hexadecimal digits: random for a request, `digest_position` for a row of a file or topic.
    key
        The service's secret, at most 64 bytes.
    """
    return body + hashlib.blake2b(body.encode(), key=key, digest_size=SEAL_DIGITS // 2).hexdigest()


def is_issued(prediction_id: str, key: bytes) -> bool:
    """Whether `seal_id` made this id with this key."""
    if len(prediction_id) != BODY_DIGITS + SEAL_DIGITS or not prediction_id.isascii():
        return False
    return hmac.compare_digest(seal_id(prediction_id[:BODY_DIGITS], key), prediction_id)


def digest_position(*position: str | int) -> str:
    """The body of an id that follows from where a row stands (file digest and row, topic and offset)."""
    text = "\x1f".join(str(part) for part in position)
    return hashlib.blake2b(text.encode(), digest_size=BODY_DIGITS // 2).hexdigest()
