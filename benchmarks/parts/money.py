"""Money of `benchmarks/actions.py`: the threshold against a search of all, and how often the test of profit errs."""

from __future__ import annotations

from typing import Any

import numpy as np
import release

from closedloop.core.evaluation.profit import count_profit, read_kept
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.training.calibration import choose_threshold
from parts.targets import Target

VALUE = CustomerValue(kept=KeptCustomer(amount_of_days=90, share=0.3), offer_cost=1.0, save_rate=0.2)
EQUAL_LIMIT = 0.05


def search_threshold(test: Any, scores: np.ndarray) -> dict[str, float]:
    """What the chosen threshold earns on the test rows, and what the best of all thresholds does."""
    labels = test["churned"].to_numpy()
    widest = [name for name in test.columns if name.startswith("purchase_sum_")][-1:]  # 90 days in the shop
    gains = count_profit(labels, read_kept(VALUE.kept, test, widest), VALUE)
    chosen = choose_threshold(labels, scores, "profit", gains)
    earned = {float(each): float(gains[scores >= each].sum()) for each in [*np.unique(scores), 1.1]}
    return {
        "threshold": chosen,
        "earned": float(gains[scores >= chosen].sum()),
        "earned_by_search": max(earned.values()),
    }


def measure_money(runs: int, test: Any, scores: np.ndarray) -> tuple[dict[str, Any], list[Target]]:
    """All figures, and what they must reach."""
    policy, _ = release.design()
    found = {
        "search": search_threshold(test, scores),
        "equal": release.simulate_profit(policy, runs, 31, noise=release.STABLE_NOISE),
        "poorer": release.simulate_profit(
            policy, max(runs // 10, 20), 32, noise=release.POORER_NOISE, wrong=release.POORER_ODDS
        ),
    }
    caught = found["poorer"]["by_profit"]
    gap = found["search"]["earned_by_search"] - found["search"]["earned"]
    targets = [
        Target("profit of the best of all thresholds, above the chosen one's", abs(gap), "<=", 1e-6),
        Target("equal models promoted, 30 looks", found["equal"]["promoted"], "<=", EQUAL_LIMIT),
        Target("equal models called better in profit, 30 looks", found["equal"]["more"], "<=", EQUAL_LIMIT),
        Target("equal models called worse in profit, 30 looks", found["equal"]["less"], "<=", policy.guard_alpha),
        Target("challengers with a higher AUC and an eighth less profit, taken back by it", caught, ">=", 0.4),
    ]
    return found, targets
