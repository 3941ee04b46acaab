"""The loop offline: the product's own functions decide, on rows that were computed once; no HTTP, no store."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from closedloop.core.evaluation.profit import read_kept
from closedloop.core.monitoring.evidence import measure_outcomes, measure_window
from closedloop.core.monitoring.policy import MonitoringPolicy
from closedloop.core.monitoring.verdict import PastCheck, PastRetraining, decide, find_judged_at
from closedloop.core.release.assignment import is_canary
from closedloop.core.release.decision import decide_step
from closedloop.core.release.entries import OfferTerms
from closedloop.core.release.guardrails import count_scores
from closedloop.core.release.policy import ReleasePolicy, StepName
from closedloop.core.release.sequential import PairedLosses, sum_paired_losses
from closedloop.core.release.types import ArmEvidence, StepEvidence
from closedloop.errors import DataError
from closedloop.loop.backtest.history import DAY
from closedloop.loop.backtest.models import Model, Trainer, judge_challenger
from closedloop.release.money import find_unit, fix_stake, pair_profits
from closedloop.stages.training_set import LABEL

LATENCY_MS = 5.0
SHARED_STEPS = ("shadow", "champion")  # one version answers every customer


class LoopEvent(NamedTuple):
    """An event of the replay, at a day."""

    at: dt.datetime
    what: str
    why: str


class Paired(NamedTuple):
    """The differences of a release's two models on ``snapshots`` that have closed, in log loss and in profit."""

    snapshots: int = 0
    losses: PairedLosses = PairedLosses()
    profits: PairedLosses = PairedLosses()


@dataclass
class OfflineRollout:
    """A release that is going on: its versions, since when, in which step, and the days of that step.

    ``stake`` is fixed as it begins; None: the data set has no value.
    """

    challenger: Model
    predecessor: Model
    began: dt.datetime
    stake: OfferTerms | None = None
    step: StepName = "shadow"
    days: int = 0
    paired: Paired = field(default_factory=Paired)


class Loop:
    """The ticks of one history under one policy: what is served, and what happened.

    A decision at a moment sees only what is known then: rows of snapshots before it, and outcomes that have closed.
    """

    def __init__(self, trainer: Trainer, first: Model, monitoring: MonitoringPolicy, releasing: ReleasePolicy) -> None:
        self.trainer, self.history, self.champion = trainer, trainer.history, first
        self.monitoring = monitoring
        if releasing.requests_a_day is None:
            releasing = releasing.model_copy(update={"requests_a_day": self.history.requests_a_day})
        self.releasing = releasing
        self.checks: list[tuple[Model, dt.datetime, PastCheck]] = []
        self.retrainings: list[PastRetraining] = []
        self.served: list[tuple[dt.datetime, Model, np.ndarray]] = []
        self.events: list[LoopEvent] = []
        self.rollout: OfflineRollout | None = None

    def run(self, tell_progress: Callable[[dt.datetime], None] = lambda _: None) -> None:
        """Run every tick."""
        ticks = self.history.ticks
        for number, at in enumerate(ticks):
            asked = number > 0 and self._check(at)
            self._serve(at)
            if asked and (self.rollout is None or self.rollout.step == "champion"):
                self._retrain(at)
            until = ticks[number + 1] if number + 1 < len(ticks) else at
            for day in range((until - at).days):
                if self.rollout is not None:
                    self._step(self.rollout, at, at + (day + 1) * DAY)
            tell_progress(at)

    def _tell(self, at: dt.datetime, what: str, why: str) -> None:
        self.events.append(LoopEvent(at, what, why))

    def _serve(self, at: dt.datetime) -> None:
        scores, rollout = self.champion.score(at), self.rollout
        if rollout is not None and rollout.step not in SHARED_STEPS:
            scores = np.where(self._deal(rollout, at), rollout.challenger.score(at), scores)
        self.served.append((at, self.champion, scores))

    def _deal(self, rollout: OfflineRollout, at: dt.datetime) -> np.ndarray:
        """Which customers of a snapshot the challenger answers."""
        weight, salt = self.releasing.find_step(rollout.step).weight, f"{rollout.began:%Y-%m-%d}"
        return np.array([is_canary(salt, str(one), weight) for one in self.history.rows[at]["customer_id"]])

    def _check(self, at: dt.datetime) -> bool:
        """A pass of the monitor; whether it asks for a retraining."""
        before = [(until, check) for model, until, check in self.checks if model is self.champion]
        own = [check for _, check in before]
        judged = [until for until, check in before if "drift" in check.evidence]
        since = max([at - self.monitoring.window_days_max * DAY, *judged])
        evidence = self._measure_window(since, at) | self._measure_outcomes(at, own)
        rule = self.history.dataset.label
        horizon_days = rule.horizon_days if rule else None
        past = [check.evidence for check in own]
        evidence["judged_at"] = find_judged_at(evidence, past, as_of=at, horizon_days=horizon_days).isoformat()
        decision = decide(
            evidence,
            own,
            self.retrainings,
            self.monitoring,
            as_of=at,
            since=since,
            model_as_of=self.champion.as_of,
            horizon_days=horizon_days,
        )
        self.checks.insert(0, (self.champion, at, PastCheck(since, evidence)))
        if decision.verdict != "none":
            self._tell(at, decision.verdict, "; ".join(decision.reasons))
        return decision.verdict == "retrain"

    def _measure_window(self, since: dt.datetime, at: dt.datetime) -> dict[str, Any]:
        mine = [(when, scores) for when, model, scores in self.served if model is self.champion]
        rows = [self.history.rows[when].assign(score=scores) for when, scores in mine if since <= when < at]
        if not rows:
            return {}
        window = self._sample(pd.concat(rows, ignore_index=True).drop_duplicates("customer_id"))
        return measure_window(self.champion.baseline, window, self.monitoring) | {"window_rows": len(window)}

    def _measure_outcomes(self, at: dt.datetime, own: list[PastCheck]) -> dict[str, Any]:
        closed = at - self.history.horizon
        judged = [
            dt.datetime.fromisoformat(one.evidence["outcomes_until"]) for one in own if "realised" in one.evidence
        ]
        after = max(judged, default=self.history.ticks[0] - DAY)
        known = [
            self.history.rows[when][["customer_id", LABEL]].assign(score=scores)
            for when, model, scores in self.served
            if model is self.champion and after < when <= closed
        ]
        if not known:
            return {}
        rows = self._sample(pd.concat(known, ignore_index=True)).rename(columns={LABEL: "outcome"})
        found = measure_outcomes(self.champion.baseline, rows.astype({"outcome": float}), self.monitoring)
        return found | {"outcome_rows": len(rows)} | ({"outcomes_until": closed.isoformat()} if found else {})

    def _sample(self, rows: pd.DataFrame) -> pd.DataFrame:
        most = self.monitoring.sample_rows_max
        return rows if len(rows) <= most else rows.sample(most, random_state=self.history.params.seed)

    def _retrain(self, at: dt.datetime) -> None:
        gain = self.checks[0][2].evidence.get("realised", {}).get("gain", {}).get("mean")
        only = self.monitoring.policy == "recalibrate"
        try:
            challenger = self.trainer.retrain(at, self.champion, recalibrates_only=only)
        except DataError as error:
            self.retrainings.insert(0, PastRetraining(at, "failed", gain=gain))
            self._tell(at, "failed", str(error))
            return
        found, kind = judge_challenger(self.champion, challenger), challenger.fitted.kind
        state, recalibrated = "registered" if found.registered else "refused", kind.startswith("recalibration")
        self.retrainings.insert(0, PastRetraining(at, state, found.won, gain, recalibrated))
        if not found.won:
            self._tell(at, f"refused {kind}", found.reason)
            return
        self._tell(at, f"release of a {kind}", found.reason)
        self.begin_release(challenger, at)

    def begin_release(self, challenger: Model, at: dt.datetime) -> None:
        """Let a challenger go through the steps of a release, against the champion."""
        features, stake = self.history.features, None
        if features.value is not None:
            columns = features.value_columns
            places = [features.names.index(one) for one in columns]
            stake = fix_stake(features.value, challenger.parts["test"][[*columns]], places)
        self.rollout = OfflineRollout(challenger, self.champion, at, stake)

    def _step(self, rollout: OfflineRollout, tick: dt.datetime, now: dt.datetime) -> None:
        """One day of a release."""
        rollout.days += 1
        decision = decide_step(self.releasing, self._gather(rollout, tick, now))
        if decision.verdict == "hold":
            return
        why = "; ".join(decision.reasons)
        if decision.verdict == "roll_back":
            self._tell(now, f"rolled back in {rollout.step}", why)
            self.champion, self.rollout = rollout.predecessor, None
            if rollout.step != "champion":
                self.retrainings[0] = self.retrainings[0]._replace(won=False)
            return
        following = self.releasing.next_step(rollout.step)
        if following is None:
            self.rollout = None
            return
        rollout.step, rollout.days = following.name, 0
        if following.name == "champion":
            self._tell(now, "promoted", why)
            self.champion = rollout.challenger

    def _gather(self, rollout: OfflineRollout, tick: dt.datetime, now: dt.datetime) -> StepEvidence:
        stable, challenger = rollout.predecessor.score(tick), rollout.challenger.score(tick)
        asking = (self.releasing.requests_a_day or 0) / len(stable)  # the share of the customers, a day
        if rollout.step not in SHARED_STEPS:
            dealt = self._deal(rollout, tick)
            stable, challenger = stable[~dealt], challenger[dealt]

        paired = self._pair(rollout, now)

        def describe(scores: np.ndarray) -> ArmEvidence:
            requests = round(rollout.days * asking * len(scores))
            return ArmEvidence(requests, 0, min(len(scores), requests), LATENCY_MS, count_scores(scores))

        return StepEvidence(
            rollout.step,
            rollout.days * 24.0,
            describe(stable),
            describe(challenger),
            paired.losses,
            rollout.challenger.reference_scores,
            profits=paired.profits,
            profit_unit=find_unit(rollout.stake),
            predecessor_scores=rollout.predecessor.reference_scores,
        )

    def _pair(self, rollout: OfflineRollout, now: dt.datetime) -> Paired:
        """The paired differences on outcomes of the release that have closed by now, one a customer."""
        closed = [at for at in self.history.ticks if rollout.began <= at <= now - self.history.horizon]
        if len(closed) != rollout.paired.snapshots:
            pairs = pd.concat([self._list_pairs(rollout, at) for at in closed]).drop_duplicates("customer_id")
            losses = sum_paired_losses(pairs["outcome"], pairs["score"], pairs["score_of_version"])
            profits = PairedLosses() if rollout.stake is None else pair_profits(rollout.stake, pairs)
            rollout.paired = Paired(len(closed), losses, profits)
        return rollout.paired

    def _list_pairs(self, rollout: OfflineRollout, at: dt.datetime) -> pd.DataFrame:
        """The customers of a snapshot, as `closedloop.release.money.pair_profits` takes them."""
        rows, features = self.history.rows[at], self.history.features
        pairs = pd.DataFrame({"customer_id": rows["customer_id"], "outcome": rows[LABEL].astype(int)})
        pairs = pairs.assign(score=rollout.predecessor.score(at), score_of_version=rollout.challenger.score(at))
        if features.value is not None:
            pairs["kept"] = read_kept(features.value.kept, rows, features.value_columns)
        return pairs
