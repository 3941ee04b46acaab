"""Outcomes that clients report: only for predictions that were given, and only so many a minute."""

from __future__ import annotations

import datetime as dt
import time
from typing import Any

from closedloop.errors import count_noun
from closedloop.records import Outcome, is_issued
from closedloop.rules import Breach, RefusedRequest, list_unknown, refuse_breaches, shorten
from closedloop.serving.log.spool import SpoolWriter

_FIELDS = frozenset({"prediction_id", "outcome"})


class OutcomeIntake:
    """Checks reported outcomes and logs them; the store keeps the first value, and later ones as corrections.

    Parameters
    ----------
    per_minute
        How many one worker takes: poisoned labels in bulk must not start a retraining.
    id_key
        With which prediction ids were sealed.
    """

    def __init__(self, log: SpoolWriter, per_minute: int, id_key: bytes) -> None:
        self._log, self._id_key = log, id_key
        self._per_minute, self._per_second = per_minute, per_minute / 60
        self._allowance_max = float(per_minute)
        self._allowance, self._counted_at = self._allowance_max, time.monotonic()

    def take(self, items: list[Any], client: str | None = None) -> list[tuple[int, RefusedRequest]]:
        """Log what is right, as reported by ``client``; returns the number and refusal of each item that is not.

        Raises
        ------
        RefusedRequest
            If there are more than may come now, or ever at once; none is taken then.
        """
        self._spend(len(items))
        now = dt.datetime.now(dt.UTC)
        taken: list[Outcome] = []
        refused: list[tuple[int, RefusedRequest]] = []
        for number, item in enumerate(items):
            try:
                taken.append(self._check(item, now, client))
            except RefusedRequest as error:
                refused.append((number, error))
        if taken:
            self._log.append(taken)
        return refused

    def _spend(self, count: int) -> None:
        if count > self._per_minute:
            breach = Breach(
                "", count, f"at most {count_noun(self._per_minute, 'outcome')}, which is what may come in a minute"
            )
            raise RefusedRequest("too_large", "more outcomes than are ever taken at once", (breach,), status=413)
        now = time.monotonic()
        earned = (now - self._counted_at) * self._per_second
        self._allowance, self._counted_at = min(self._allowance_max, self._allowance + earned), now
        if count > self._allowance:
            wait = int((count - self._allowance) / self._per_second) + 1
            raise RefusedRequest("too_many_outcomes", "outcomes come too fast", status=429, retry_after=wait)
        self._allowance -= count

    def _check(self, item: Any, now: dt.datetime, client: str | None) -> Outcome:
        if type(item) is not dict:
            raise RefusedRequest("invalid_request", "an outcome is an object", (Breach("", shorten(item), "object"),))
        breaches = list_unknown(item, _FIELDS)
        value, prediction_id = item.get("outcome"), item.get("prediction_id")
        if type(value) is not int or value not in (0, 1):  # JSON's true would do for a 1
            breaches.append(Breach("outcome", shorten(value), "0 (stayed) or 1 (churned)"))
        if not isinstance(prediction_id, str):
            breaches.append(Breach("prediction_id", shorten(prediction_id), "text"))
        if breaches:
            raise refuse_breaches(breaches)
        if not is_issued(str(prediction_id), self._id_key):
            breach = Breach("prediction_id", shorten(prediction_id), "the id of a prediction that was given here")
            raise RefusedRequest("unknown_prediction", "no such prediction", (breach,), status=404)
        return Outcome(str(prediction_id), 1 if value else 0, now, client)
