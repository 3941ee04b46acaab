"""Models of the offline loop: trained on what is known at a tick, chosen and judged by the product's own functions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from closedloop.config.settings import RetrainingSettings
from closedloop.core.evaluation.comparison import compare_models
from closedloop.core.evaluation.excuses import describe_excused
from closedloop.core.evaluation.gates import failed_gates
from closedloop.core.monitoring.evidence import Baseline, build_baseline
from closedloop.core.release.guardrails import count_scores
from closedloop.core.training.estimators import score
from closedloop.errors import DataError, count_noun
from closedloop.loop.backtest.history import History
from closedloop.loop.retrain import plan_retraining
from closedloop.stages.parts.challengers import (
    choose_best,
    complete_recalibration,
    fit_best,
    fit_recent,
    list_newest,
    refit,
)
from closedloop.stages.parts.fitting import Fitted
from closedloop.stages.parts.judge import Champion, excuse, judge_scores
from closedloop.stages.parts.measure import choose_bootstrap, measure_scores
from closedloop.stages.parts.money import judge_profit, read_stake
from closedloop.stages.training_set import LABEL, PARTS, assign_parts, draw_parts

Parts = dict[str, pd.DataFrame]


class Model:
    """A fitted model with the monitor's baseline of its test rows; it scores each snapshot once."""

    def __init__(self, history: History, parts: Parts, as_of: dt.datetime, fitted: Fitted) -> None:
        self.history, self.parts, self.as_of, self.fitted = history, parts, as_of, fitted
        reference = parts["test"].assign(score=score(fitted.pipeline, parts["test"]))
        categories = {one.name: getattr(one, "categories", None) for one in fitted.features}
        self.baseline: Baseline = build_baseline(reference, categories, fitted.threshold)
        self.reference_scores = count_scores(reference["score"])
        self._scores: dict[dt.datetime, np.ndarray] = {}

    def score(self, at: dt.datetime) -> np.ndarray:
        """Scores of a snapshot's rows."""
        if at not in self._scores:
            self._scores[at] = score(self.fitted.pipeline, self.history.rows[at])
        return self._scores[at]


class Judgement(NamedTuple):
    """Whether the gates let a challenger be registered, whether it won against the champion, and why."""

    registered: bool
    won: bool
    reason: str


class Trainer:
    """Trains on a history; what does not depend on the champion is trained once for all policies."""

    def __init__(self, history: History, how: RetrainingSettings) -> None:
        self.history, self.how = history, how
        self._trained: dict[dt.datetime, list[Model]] = {}

    def train_first(self) -> Model:
        """The model that `closedloop run` makes at the first tick."""
        at, params = self.history.ticks[0], self.history.params
        parts = self._split(at, retraining=False)
        return Model(self.history, parts, at, fit_best(params, self.history.features, dict(params.model.params), parts))

    def list_trained(self, at: dt.datetime) -> list[Model]:
        """The models that a retraining at ``at`` trains: on all its snapshots, and on the newest alone."""
        if at not in self._trained:
            params, features = self.history.params, self.history.features
            parts = self._split(at, retraining=True)
            whole = fit_best(params, features, dict(params.model.params), parts)
            found = [whole, *fit_recent(params, features, whole, parts)]
            self._trained[at] = [Model(self.history, parts, at, one) for one in found]
        return self._trained[at]

    def retrain(self, at: dt.datetime, champion: Model, *, recalibrates_only: bool = False) -> Model:
        """The challenger of a retraining at ``at``.

        Raises
        ------
        DataError
            If a part of the rows is empty or has one class.
        """
        trained = self.list_trained(at) if not recalibrates_only else []
        parts = trained[0].parts if trained else self._split(at, retraining=True)
        other = self._recalibrate(champion, parts)
        candidates = [one.fitted for one in trained] + ([] if isinstance(other, str) else [other])
        if not candidates:
            raise DataError(f"not recalibrated: {other}")
        best = choose_best(candidates, parts["validation"])
        own = next((one for one in trained if one.fitted is best), None)
        return own or Model(self.history, parts, at, best)

    def _recalibrate(self, champion: Model, parts: Parts) -> Fitted | str:
        params, features = self.history.params, self.history.features
        newest = list_newest(parts["train"], by_day=self.history.dataset.label is None)
        other = refit(1, champion.fitted.pipeline, champion.fitted.features, newest)
        return other if isinstance(other, str) else complete_recalibration(params, features, other, parts["validation"])

    def _split(self, at: dt.datetime, *, retraining: bool) -> Parts:
        history, how = self.history, self.how
        params = history.params.model_copy(update={"as_of": at.date()})
        if retraining:
            params = plan_retraining(params, history.dataset, window_days=how.window_days, split=how.split)
        rows = join_rows(history, history.list_closed(at))
        first, last = params.data.start_date or dt.date.min, params.data.end_date or dt.date.max
        days = rows["event_timestamp"].dt.date
        rows = rows[(days >= first) & (days <= last)].reset_index(drop=True)
        part = assign_parts(params, history.dataset, rows)
        rows, _ = draw_parts(params, rows.assign(part=part).dropna(subset="part"))
        parts = {name: rows[rows["part"] == name].drop(columns="part").reset_index(drop=True) for name in PARTS}
        for name, some in parts.items():
            if some[LABEL].nunique() < 2:
                found = count_noun(len(some), "row")
                raise DataError(f"the {name} part of {at:%Y-%m-%d} has {found}, not of both classes")
        return parts


def join_rows(history: History, snapshots: Sequence[dt.datetime]) -> pd.DataFrame:
    """The rows of these snapshots, whose outcomes are known."""
    return pd.concat([history.rows[at] for at in snapshots], ignore_index=True).astype({LABEL: bool})


def judge_challenger(champion: Model, challenger: Model) -> Judgement:
    """The gates that need labels and scores alone, and the champion-challenger gate."""
    history, parts = challenger.history, challenger.parts
    test, params = parts["test"], history.params
    labels, scores = test[LABEL].to_numpy(), score(challenger.fitted.pipeline, test)
    measured = measure_scores(params, history.dataset, parts, scores, challenger.fitted.threshold)
    others, threshold = score(champion.fitted.pipeline, test), champion.fitted.threshold
    found = compare_models(
        labels,
        others,
        scores,
        champion_threshold=threshold,
        challenger_threshold=challenger.fitted.threshold,
        bootstrap=choose_bootstrap(params, test),
    )
    results = judge_scores(params, history.dataset, labels, measured)
    results += judge_profit(read_stake(params, history.dataset, test), scores, others, choose_bootstrap(params, test))
    results = excuse(params, history.dataset, parts, results, Champion(others, threshold, found))
    if failed := failed_gates(results):
        return Judgement(
            registered=False, won=False, reason="; ".join([*(one.sentence() for one in failed), found.reason])
        )
    excused = describe_excused([one.name for one in results if one.excused])
    return Judgement(
        registered=True, won=found.verdict == "win", reason="; ".join([found.reason, *filter(None, [excused])])
    )
