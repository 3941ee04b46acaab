"""Scoring: what arrives in one turn of the event loop after another is scored, logged and answered together.

No clock is waited for: the first turn that brings nothing more ends a batch, so that a lone request is a batch of one,
and the busier the loop the larger the batches.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from closedloop.adapters.online_store import OnlineReader
from closedloop.errors import DataError, ServiceUnavailable
from closedloop.records import BODY_DIGITS, Prediction, Source, Variant, seal_id
from closedloop.rules import Breach, RefusedRequest, ScoringRequest, Value
from closedloop.serving.clock import WALL_CLOCK
from closedloop.serving.models import LoadedModel
from closedloop.serving.slots.slots import Serving, assign

if TYPE_CHECKING:
    from closedloop.serving.log.spool import SpoolWriter
    from closedloop.serving.metrics import WorkerMetrics

logger = logging.getLogger(__name__)
# Features are counted many rows at once, which costs a tenth of one by one.
OBSERVED_ROWS, OBSERVED_SECONDS = 256, 0.2
FAILED_CUSTOMERS_MAX = 100_000
BATCH_ROWS = 64  # the graph's time for one row hardly falls any further


class Pending(msgspec.Struct):
    """A request on its way; ``future`` gets the logged prediction."""

    request: ScoringRequest
    serving: Serving
    model: LoadedModel
    variant: Variant
    forced: bool
    arrived: float
    future: asyncio.Future[Prediction]
    values: tuple[Value, ...] = ()
    features_as_of: dt.datetime | None = None
    client: str | None = None

    @property
    def counted_as(self) -> str:
        """The variant in metrics; what was forced upon a version stands apart, since it is not judged by that."""
        return "forced" if self.forced else self.variant


class Batcher:
    """Scores and logs requests; `source` is where they come from.

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
    is_stale
        Whether a snapshot is too old to score by.
    sent_features
        Whether statistics count requests that carry their features.
    """

    source: Source = "http"

    def __init__(
        self,
        log: SpoolWriter,
        metrics: WorkerMetrics,
        *,
        id_key: bytes,
        reader: Callable[[LoadedModel], OnlineReader | None],
        is_stale: Callable[[dt.datetime], bool],
        clock: Callable[[], dt.datetime] = WALL_CLOCK,
        sent_features: bool = False,
    ) -> None:
        self._clock, self._sent_features = clock, sent_features
        self._failed: set[tuple[int, str, str, str]] = set()
        self._log, self._metrics, self._id_key = log, metrics, id_key
        self._reader, self._is_stale = reader, is_stale
        self._waiting: list[Pending] = []
        self._unobserved: list[tuple[Value, ...]] = []
        self._observed: LoadedModel | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(
        self,
        request: ScoringRequest,
        serving: Serving,
        *,
        arrived: float,
        version: str | None = None,
        client: str | None = None,
    ) -> asyncio.Future[Prediction]:
        """The future prediction of a checked request.

        Parameters
        ----------
        arrived
            `time.perf_counter` when the request came.
        version
            The version asked for by header, if one was.
        client
            Who asks, by a digest of its token.

        Raises
        ------
        RefusedRequest
            If that version does not serve.
        """
        model, variant = assign(request, serving, version)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Prediction] = loop.create_future()
        values = request.values or ()
        pending = Pending(request, serving, model, variant, version is not None, arrived, future, values, client=client)
        if not self._waiting:
            loop.call_soon(self._flush, 0)
        self._waiting.append(pending)
        return future

    def _flush(self, before: int) -> None:
        if before < len(self._waiting) < BATCH_ROWS:
            asyncio.get_running_loop().call_soon(self._flush, len(self._waiting))
            return
        waiting, self._waiting = self._waiting, []
        by_id = [pending for pending in waiting if pending.request.values is None]
        inline = [pending for pending in waiting if pending.request.values is not None]
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
            found.append(pending)
        if found:
            self._score(found)

    def _refuse_row(
        self, request: ScoringRequest, values: tuple[Value, ...] | None, snapshot_at: dt.datetime | None
    ) -> RefusedRequest | None:
        if snapshot_at is None:
            rule = "is known to the online store"
        elif values is None:
            rule = "has features that can be read; the online store holds others"
        elif self._is_stale(snapshot_at):
            rule = f"has fresh features; those in the online store are of {snapshot_at:%Y-%m-%d}"
        else:
            return None
        breach = Breach("customer_id", request.customer_id, rule)
        return RefusedRequest("no_features", "the online store has no fresh features", (breach,))

    def _score(self, waiting: list[Pending]) -> None:
        groups: dict[tuple[int, str], list[Pending]] = {}
        for pending in waiting:
            groups.setdefault((id(pending.model), pending.counted_as), []).append(pending)
        for group in groups.values():
            self._answer(group)

    def _answer(self, group: list[Pending]) -> None:
        """Score, log, count, answer: in this order, so that whatever was answered is logged."""
        try:
            predictions, took = self._predict(group)
        except (DataError, ValueError) as error:
            for pending in group if len(group) > 1 else ():  # the others are not to suffer from one
                self._answer([pending])
            if len(group) == 1:
                logger.error("no score: %s", error, extra={"request_id": group[0].request.request_id})
                refused = RefusedRequest("no_score", "the model gives no probability for this request", status=500)
                self._fail_model(group, refused)
            return
        except ServiceUnavailable as error:  # the log's disk is full: no model is judged by that
            _fail(group, error)
            return
        except Exception as error:
            self._fail_model(group, error)
            return
        if not group[0].forced:
            self._observe(group)
        for pending, prediction in zip(group, predictions, strict=True):
            if not pending.future.done():
                pending.future.set_result(prediction)
        challenger = group[0].serving.challenger
        # in canary too: only customers that both have scored tell soon which is better
        if challenger is not None and group[0].model is not challenger and not group[0].forced:
            asyncio.get_running_loop().call_soon(self._score_shadow, challenger, group, predictions, took)

    def _fail_model(self, group: list[Pending], error: Exception) -> None:
        self._count_failed(group, group[0].model.version, group[0].counted_as)
        _fail(group, error)

    def _count_failed(self, group: list[Pending], version: str, variant: str) -> None:
        """Count the rows, and the customers: each once in a revision, so that none is counted for asking often."""
        self._metrics.count("model_errors_total", version, variant, by=len(group))
        if len(self._failed) > FAILED_CUSTOMERS_MAX:
            self._failed.clear()
        known = [pending for pending in group if self._sent_features or pending.features_as_of is not None]
        failed = {
            (one.serving.slots.revision, version, variant, one.request.customer_id or one.request.request_id)
            for one in known
        } - self._failed
        self._failed |= failed
        if failed:
            self._metrics.count("model_failed_customers_total", version, variant, by=len(failed))

    def _observe(self, group: list[Pending]) -> None:
        if not self._unobserved:
            asyncio.get_running_loop().call_later(OBSERVED_SECONDS, self.observe)
        self._unobserved += [pending.values for pending in group]
        self._observed = group[0].serving.champion
        if len(self._unobserved) >= OBSERVED_ROWS:
            self.observe()

    def observe(self) -> None:
        """Count the features of what was answered, as the champion numbers their categories."""
        rows, self._unobserved = self._unobserved, []
        if rows and self._observed is not None:
            self._metrics.observe_features(self._observed.pack(rows), self._observed.find_missing(rows))

    def _predict(
        self, group: list[Pending], answered: Sequence[Prediction] = (), took: float = 0.0
    ) -> tuple[list[Prediction], float]:
        """Logged and counted predictions of one model, and the seconds that it took to score them.

        In shadow: of what the champion ``answered`` in ``took`` seconds, with the latency of an answer by this model.
        """
        model, variant = group[0].model, group[0].variant
        matrix = model.pack([pending.values for pending in group])
        start = time.perf_counter()
        scores = model.scorer.score(matrix).tolist()
        now, moment = time.perf_counter(), self._clock()
        seconds, threshold, name = now - start, model.contract.threshold, model.contract.model_name
        decisions = [1 if score >= threshold else 0 for score in scores]
        _require_probabilities(scores, model.version)
        predictions = [
            Prediction(
                prediction_id=seal_id(body, self._id_key),
                request_id=pending.request.request_id,
                model_name=name,
                model_version=model.version,
                variant=variant,
                source=self.source,
                predicted_at=moment,
                features=pending.values,
                score=score,
                decision=decision,
                latency_ms=max(answered[place].latency_ms + (seconds - took) * 1e3, 0.0)
                if answered
                else (now - pending.arrived) * 1e3,
                customer_id=pending.request.customer_id,
                features_as_of=pending.features_as_of,
                answered_id=answered[place].prediction_id if answered else None,
                forced=pending.forced,
                client=pending.client,
                revision=pending.serving.slots.revision,
            )
            for place, (pending, body, score, decision) in enumerate(
                zip(group, self._draw_ids(group), scores, decisions, strict=True)
            )
        ]
        self._log.append(predictions)
        self._metrics.count_predictions(model.version, group[0].counted_as, decisions, seconds / len(group))
        return predictions, seconds

    def _draw_ids(self, group: Sequence[Pending]) -> list[str]:
        """The bodies of the predictions' ids, by one call of the kernel for all."""
        digits = os.urandom(BODY_DIGITS // 2 * len(group)).hex()
        return [digits[start : start + BODY_DIGITS] for start in range(0, len(digits), BODY_DIGITS)]

    def _score_shadow(self, model: LoadedModel, group: list[Pending], answers: list[Prediction], took: float) -> None:
        """Let the challenger score what the champion has answered in ``took`` seconds; nobody waits for it."""
        shadows = [msgspec.structs.replace(pending, model=model, variant="shadow") for pending in group]
        try:
            self._predict(shadows, answers, took)
        except ServiceUnavailable as error:
            logger.warning("scores in shadow that are not logged: %d (%s)", len(shadows), error)
        except Exception:
            self._count_failed(group, model.version, "shadow")
            logger.exception("the challenger %s could not score in shadow", model.version)


def _fail(waiting: list[Pending], error: Exception) -> None:
    for pending in waiting:
        if not pending.future.done():
            pending.future.set_exception(error)


def _require_probabilities(scores: Sequence[float], version: str) -> None:
    if not all(0 <= score <= 1 for score in scores):
        raise DataError(f"version {version} gives {scores}, which must be probabilities")
