"""Beside the offline loop: a model every month without a gate, and an oracle trained on the world after the change."""

from __future__ import annotations

import numpy as np
import pandas as pd

from closedloop.core.evaluation.metrics import list_log_losses
from closedloop.loop.backtest.models import Model, Trainer
from closedloop.stages.parts.challengers import fit_best
from parts.recovery_logs import Log
from parts.worlds import DAY


def serve_monthly(log: Log, trainer: Trainer, first: Model) -> list[np.ndarray]:
    """A model every 30 days, by the same recipe, without a gate; it serves from the tick after."""
    serving, trained_at, found = first, log.ticks[0], []
    for at in log.ticks:
        found.append(serving.score(at))
        if at - trained_at >= 30 * DAY:
            serving, trained_at = trainer.list_trained(at)[0], at
    return found


def serve_oracle(log: Log) -> list[np.ndarray]:
    """Trained on the world after the change, by halves of the customers: each is scored by the other half's model."""
    from closedloop.core.training.splits import hash_shares

    after = [at for at in log.ticks if log.change is None or at >= log.change]
    rows = pd.concat([log.rows[at] for at in after], ignore_index=True).astype({"churned": bool})
    half = hash_shares(rows["customer_id"], "oracle") < 0.5
    models = []
    for side in (half, ~half):
        own = rows[side]
        held = hash_shares(own["customer_id"], "validation") < 0.2
        parts = {"train": own[~held], "validation": own[held], "test": own[held]}
        fitted = fit_best(log.params, log.features, dict(log.params.model.params), parts)
        models.append(Model(log, parts, after[0], fitted))
    found = []
    for at in log.ticks:
        first = hash_shares(log.rows[at]["customer_id"], "oracle") < 0.5
        found.append(np.where(first, models[1].score(at), models[0].score(at)))
    return found


def list_losses(log: Log, served: list[np.ndarray]) -> np.ndarray:
    """Mean log loss of each tick."""
    return np.array(
        [
            list_log_losses(log.rows[at]["churned"].to_numpy(np.int8), scores).mean()
            for at, scores in zip(log.ticks, served, strict=True)
        ]
    )
