"""Scoring: what arrives in one turn of the event loop is scored, logged and answered together.

There is no waiting for company: a lone request is a batch of one, and the busier the loop the larger the batches.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from closedloop.adapters.online import OnlineReader
from closedloop.core.assignment import is_canary
from closedloop.errors import ServiceUnavailable
from closedloop.records import Prediction, Record, Variant, seal_id
from closedloop.serving.models import LoadedModel
from closedloop.serving.requests import Breach, RefusedRequest, ScoringRequest, Value
from closedloop.serving.slots import Serving

logger = logging.getLogger(__name__)


class PredictionLog(Protocol):
    """Where answers are logged before they leave."""

    def append(self, records: Sequence[Record]) -> None:
        """Hand records to the kernel, or raise `ServiceUnavailable`."""


class PredictionMetrics(Protocol):
    """What is counted of predictions."""

    def count_predictions(self, version: str, variant: str, decisions: np.ndarray, seconds: float) -> None:
        """Count decisions (0 or 1, shape (n,)) of a version, and the seconds that scoring took a row."""

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""

    def observe_features(self, matrix: np.ndarray, missing: np.ndarray | None = None) -> None:
        """Count packed rows, float32 (n, n_features), by feature; ``missing`` marks values that were not given."""


@dataclass(slots=True)
class Pending:
    """A request on its way; ``future`` gets the logged prediction."""

    request: ScoringRequest
    serving: Serving
    model: LoadedModel
    variant: Variant
    forced: bool
    arrived: float
    future: asyncio.Future[Prediction]
    values: tuple[Value, ...] = ()
    packed: Sequence[float] = ()
    features_as_of: dt.datetime | None = None


class Batcher:
    """Scores and logs requests.

    Parameters
    ----------
    log
        Written before any answer.
    metrics
        Counted after that.
    id_key
        Seals prediction ids.
    reader
        Gives the reader of the online store for a model; None where requests must carry their features.
    state_of
        "fresh" or "stale" for a snapshot.
    """

    def __init__(
        self,
        log: PredictionLog,
        metrics: PredictionMetrics,
        *,
        id_key: bytes,
        reader: Callable[[LoadedModel], OnlineReader | None],
        state_of: Callable[[dt.datetime], str],
    ) -> None:
        self._log, self._metrics, self._id_key = log, metrics, id_key
        self._reader, self._state_of = reader, state_of
        self._waiting: list[Pending] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(
        self, request: ScoringRequest, serving: Serving, *, arrived: float, version: str | None = None
    ) -> asyncio.Future[Prediction]:
        """The future prediction of a checked request.

        Parameters
        ----------
        arrived
            `time.perf_counter` when the request came.
        version
            The version asked for by header, if one was.

        Raises
        ------
        RefusedRequest
            If that version does not serve.
        """
        model, variant = assign(request, serving, version)
        loop = asyncio.get_running_loop()
        pending = Pending(request, serving, model, variant, version is not None, arrived, loop.create_future())
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append(pending)
        return pending.future

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        inline, by_id = [], []
        for pending in waiting:
            request = pending.request
            if request.values is None or request.packed is None:
                by_id.append(pending)
                continue
            pending.values = request.values
            pending.packed = request.packed
            inline.append(pending)
        if by_id:
            task = asyncio.get_running_loop().create_task(self._fetch(by_id))
            self._tasks.add(task)  # the loop itself holds a task only weakly
            task.add_done_callback(self._tasks.discard)
        if inline:
            self._score(inline)

    async def _fetch(self, waiting: list[Pending]) -> None:
        """Add the online store's rows to requests by id, refuse unknown and stale customers, and score the rest."""
        try:
            reader = self._reader(waiting[0].serving.champion)
            if reader is None:
                raise ServiceUnavailable("no online store is configured: send features instead of customer_id")
            rows = await reader.read([pending.request.customer_id or "" for pending in waiting])
        except Exception as error:
            _fail(waiting, error)
            return
        found = []
        for pending, (values, snapshot_at) in zip(waiting, rows, strict=True):
            refusal = self._refuse_row(pending.request, values, snapshot_at)
            if refusal is not None:
                _fail([pending], refusal)
                continue
            assert values is not None  # noqa: S101 - an unknown customer was refused
            pending.values, pending.features_as_of = values, snapshot_at
            pending.packed = pending.serving.champion.pack(values)
            found.append(pending)
        if found:
            self._score(found)

    def _refuse_row(
        self, request: ScoringRequest, values: tuple[Value, ...] | None, snapshot_at: dt.datetime | None
    ) -> RefusedRequest | None:
        if values is None or snapshot_at is None:
            rule = "is known to the online store"
        elif self._state_of(snapshot_at) == "stale":
            rule = f"has fresh features; those in the online store are of {snapshot_at:%Y-%m-%d}"
        else:
            return None
        breach = Breach("customer_id", request.customer_id, rule)
        return RefusedRequest("no_features", "the online store has no fresh features", (breach,))

    def _score(self, waiting: list[Pending]) -> None:
        """Score, log, count, answer: in this order, so that whatever was answered is logged."""
        groups: dict[tuple[int, str], list[Pending]] = {}
        for pending in waiting:
            groups.setdefault((id(pending.model), pending.variant), []).append(pending)
        for group in groups.values():
            try:
                predictions, seconds = self._predict(group)
                self._log.append(predictions)
            except Exception as error:
                self._metrics.count("model_errors_total", group[0].model.version, group[0].variant, by=len(group))
                _fail(group, error)
                continue
            decisions = np.fromiter((prediction.decision for prediction in predictions), np.int64, len(predictions))
            self._metrics.count_predictions(group[0].model.version, group[0].variant, decisions, seconds)
            self._observe(group)
            for pending, prediction in zip(group, predictions, strict=True):
                if not pending.future.done():
                    pending.future.set_result(prediction)
            challenger = group[0].serving.challenger
            # in canary too: only customers that both have scored tell soon which is better
            if challenger is not None and group[0].model is not challenger:
                took = seconds * len(group)
                asyncio.get_running_loop().call_soon(self._score_shadow, group, predictions, took)

    def _observe(self, group: list[Pending]) -> None:
        """Count features as the champion numbers their categories; a category that was not given is no unknown one."""
        matrix = np.array([pending.packed for pending in group], dtype=np.float32)
        missing = None
        if any(None in pending.values for pending in group):
            missing = np.array([[value is None for value in pending.values] for pending in group])
        self._metrics.observe_features(matrix, missing)

    def _predict(self, group: list[Pending]) -> tuple[list[Prediction], float]:
        """Predictions of one model, and the seconds that scoring took a row."""
        model, serving = group[0].model, group[0].serving
        if model is serving.champion:
            matrix = np.array([pending.packed for pending in group], dtype=np.float32)
        else:  # its categories may be numbered otherwise
            matrix = np.array([model.pack(pending.values) for pending in group], dtype=np.float32)
        start = time.perf_counter()
        scores = model.scorer.score(matrix).tolist()
        now = time.perf_counter()
        moment, threshold = dt.datetime.now(dt.UTC), model.contract.threshold
        name, version = model.contract.model_name, model.version
        predictions = [
            Prediction(
                prediction_id=seal_id(os.urandom(16).hex(), self._id_key),
                request_id=pending.request.request_id,
                model_name=name,
                model_version=version,
                variant=pending.variant,
                source="http",
                predicted_at=moment,
                features=pending.values,
                score=score,
                decision=1 if score >= threshold else 0,
                latency_ms=(now - pending.arrived) * 1e3,
                customer_id=pending.request.customer_id,
                features_as_of=pending.features_as_of,
                forced=pending.forced,
            )
            for pending, score in zip(group, scores, strict=True)
        ]
        return predictions, (now - start) / len(group)

    def _score_shadow(self, group: list[Pending], answered: list[Prediction], took: float) -> None:
        """Let the challenger score what the champion has answered in ``took`` seconds; nobody waits for it."""
        serving = group[0].serving
        challenger = serving.challenger
        chosen = [place for place, pending in enumerate(group) if not pending.forced]
        if challenger is None or not chosen:
            return
        shadows = [
            Pending(
                group[place].request,
                serving,
                challenger,
                "shadow",
                False,
                group[place].arrived,
                group[place].future,
                group[place].values,
                (),
                group[place].features_as_of,
            )
            for place in chosen
        ]
        try:
            predictions, seconds = self._predict(shadows)
            longer = (seconds * len(chosen) - took) * 1e3
            linked = [_link(found, answered[place], longer) for found, place in zip(predictions, chosen, strict=True)]
            self._log.append(linked)
        except Exception:
            self._metrics.count("model_errors_total", challenger.version, "shadow", by=len(chosen))
            logger.exception("the challenger %s could not score in shadow", challenger.version)
            return
        decisions = np.fromiter((prediction.decision for prediction in linked), np.int64, len(linked))
        self._metrics.count_predictions(challenger.version, "shadow", decisions, seconds)


def assign(request: ScoringRequest, serving: Serving, version: str | None) -> tuple[LoadedModel, Variant]:
    """The model that answers a request.

    Raises
    ------
    RefusedRequest
        If the version asked for does not serve.
    """
    champion, challenger, slots = serving.champion, serving.challenger, serving.slots
    if version is not None:
        model = serving.select(version)
        if model is None:
            known = ", ".join(model.version for model in (champion, challenger) if model is not None)
            breach = Breach("x-model-version", version[:80], f"one of {known}")
            raise RefusedRequest("unknown_version", "that version does not serve", (breach,))
        return model, "champion" if model is champion else "canary"
    if challenger is not None and slots.challenger_mode == "canary":
        key = request.customer_id or request.request_id
        if is_canary(slots.salt, key, slots.weight):
            return challenger, "canary"
    return champion, "champion"


def _link(prediction: Prediction, answered: Prediction, longer_ms: float) -> Prediction:
    """With the time that the answer would have taken, had the shadow given it."""
    import msgspec

    latency = max(answered.latency_ms + longer_ms, 0.0)
    return msgspec.structs.replace(prediction, answered_id=answered.prediction_id, latency_ms=latency)


def _fail(waiting: list[Pending], error: Exception) -> None:
    for pending in waiting:
        if not pending.future.done():
            pending.future.set_exception(error)
