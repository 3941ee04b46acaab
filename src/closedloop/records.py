"""Records of predictions and outcomes; the spool, the operations store and record files hold the same ones."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
from typing import Annotated, Literal

import msgspec

BODY_DIGITS, SEAL_DIGITS = 32, 16
Moment = Annotated[dt.datetime, msgspec.Meta(tz=True)]  # a time without a zone is refused when it is read
# The registry numbers its versions. Check the pattern: a version read from a database becomes part of a path, an
# address or a command.
Version = Annotated[str, msgspec.Meta(pattern=r"^[1-9][0-9]{0,17}\Z")]
Source = Literal["http", "batch", "stream", "edge"]
LABEL_RULE = "label rule"  # cannot be a client's digest
Variant = Literal["champion", "canary", "shadow"]


class Prediction(msgspec.Struct, frozen=True, tag="prediction", tag_field="kind"):
    """One scored customer.

    ``features`` are the values in the order of the contract (numbers, category names, None for missing);
    ``score`` is the probability of churn, ``decision`` 1 at or above the threshold; ``variant`` is "shadow" for
    a challenger's score that no client received, and ``answered_id`` names the prediction that the client received;
    ``forced`` marks a version that the client chose by a header, and statistics leave it out. ``client`` is a digest
    of the request's token, None without one. ``revision`` is that of the deployment row by which a worker answered;
    None where no row says which version scores, as in a batch.
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
    client: str | None = None
    revision: int | None = None


class Outcome(msgspec.Struct, frozen=True, tag="outcome", tag_field="kind", omit_defaults=True):
    """The outcome of a prediction's customer: 1 churned, 0 stayed.

    ``reported_by`` is `LABEL_RULE` if the outcome comes from the data set's events, else the reporting client, as in
    `Prediction.client`.
    """

    prediction_id: str
    outcome: int
    reported_at: Moment
    reported_by: str | None = None


Record = Prediction | Outcome


def is_version(text: str) -> bool:
    """Whether a text is a number of the registry's, as `Version` describes it."""
    try:
        msgspec.convert(text, Version)
    except msgspec.ValidationError:
        return False
    return True


def seal_id(body: str, key: bytes) -> str:
    """Make a prediction id: 32 hexadecimal digits, and 16 more that only the holder of ``key`` can compute.

    The service thereby refuses an id that it never gave without a query to the store.

    Parameters
    ----------
    body
        32 lower-case hexadecimal digits: random for a request, `digest_position` for a row of a file or topic.
    key
        The service's secret, at most 64 bytes.
    """
    return body + hashlib.blake2b(body.encode(), key=key, digest_size=SEAL_DIGITS // 2).hexdigest()


def name_client(token: str, key: bytes) -> str:
    """The client's name in records: 8 hexadecimal digits of a digest of its token, keyed with ``key``."""
    return hashlib.blake2b(token.encode(), key=key, digest_size=4).hexdigest()


def is_issued(prediction_id: str, key: bytes) -> bool:
    """Whether `seal_id` made this id with this key."""
    if len(prediction_id) != BODY_DIGITS + SEAL_DIGITS or not prediction_id.isascii():
        return False
    return hmac.compare_digest(seal_id(prediction_id[:BODY_DIGITS], key), prediction_id)


def digest_position(*position: str | int) -> str:
    """The body of an id, computed from a row's position (file digest and row number, or topic and offset)."""
    text = "\x1f".join(str(part) for part in position)
    return hashlib.blake2b(text.encode(), digest_size=BODY_DIGITS // 2).hexdigest()
