"""The profit of a model's offers to the test rows, with and without a champion beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from closedloop.config.dataset import DatasetConfig
from closedloop.config.featureset import list_value_columns
from closedloop.config.params import Params
from closedloop.core.evaluation import gates as gate
from closedloop.core.evaluation.bootstrap import Bootstrap, Floats, Interval
from closedloop.core.evaluation.profit import (
    choose_offers,
    compare_profit,
    count_profit,
    measure_profit,
    read_kept,
    tabulate_capacity,
    tabulate_profit,
)
from closedloop.core.evaluation.value import CustomerValue
from closedloop.stages.parts.candidate import LABEL, Candidate


class Stake(NamedTuple):
    """Costs and returns of offers to labelled rows; arrays have shape (n,), and ``cycles`` are the rows' snapshots."""

    value: CustomerValue
    kept: Floats
    gains: Floats
    cycles: npt.NDArray[Any]

    def choose(self, scores: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether each customer gets an offer by these scores, shape (n,)."""
        return choose_offers(scores, self.kept, self.value, self.cycles)


class Money(NamedTuple):
    """Profit of the model's offers for each test row; ``interval`` is that of ``figures["profit"]``.

    ``offers`` and ``capacity`` are counts on the test rows.
    """

    figures: dict[str, float]
    interval: Interval
    offers: int
    capacity: int | None


def read_stake(params: Params, dataset: DatasetConfig, rows: pd.DataFrame) -> Stake | None:
    """The money at stake on labelled rows, such as the test rows; None if the data set's config has no ``value``.

    Where a share of the customers is held out, it has that share of the capacity.
    """
    value = dataset.value
    if value is None:
        return None
    held_out = dataset.columns.time is None or params.split.by == "customer"
    if held_out and value.capacity is not None:
        value = value.model_copy(update={"capacity": max(round(value.capacity * params.split.test_fraction), 1)})
    kept = read_kept(value.kept, rows, list_value_columns(params, dataset))
    return Stake(value, kept, count_profit(rows[LABEL], kept, value), rows["event_timestamp"].to_numpy())


def measure_money(stake: Stake, scores: Floats, threshold: float, bootstrap: Bootstrap) -> Money:
    """Profit of the offers by expected profit, of those by the threshold in use, and of offers to everyone."""
    offered = stake.choose(scores)
    profit, interval = measure_profit(stake.gains, offered, bootstrap)
    figures = {
        "profit": profit,
        "profit_at_threshold": float(np.where(scores >= threshold, stake.gains, 0.0).mean()),
        "profit_of_all": float(stake.gains.mean()),
        "offered_share": float(offered.mean()),
    }
    return Money(figures, interval, int(offered.sum()), stake.value.capacity)


def judge_profit(
    stake: Stake | None, scores: Floats, champion: Floats | None, bootstrap: Bootstrap, reason: str = ""
) -> list[gate.GateResult]:
    """The gate ``profit``: no result without a ``stake``; without the champion's scores it says the ``reason``."""
    if stake is None:
        return []
    if champion is None:
        return [gate.gate_profit(None, reason)]
    offered = stake.choose(champion), stake.choose(scores)
    return [gate.gate_profit(compare_profit(stake.gains, *offered, bootstrap), "")]


def draw_money(stake: Stake, candidate: Candidate, bootstrap: Bootstrap, plots: Path, pictures: Path) -> None:
    """Draw the profit curve and the capacity curve: as tables in ``plots``, and as pictures."""
    from closedloop.adapters.matplotlib import draw_profit

    rows = candidate.labels, candidate.scores, stake.kept, stake.value, bootstrap
    curves = {"profit": tabulate_profit(*rows), "capacity": tabulate_capacity(*rows)}
    for name, table in curves.items():
        table.to_csv(plots / f"{name}.csv", index=False)
    draw_profit(pictures / "profit.png", curves["profit"], "threshold", candidate.contract.threshold)
    offered = float(stake.choose(candidate.scores).mean())
    draw_profit(pictures / "capacity.png", curves["capacity"], "offered_share", offered)
