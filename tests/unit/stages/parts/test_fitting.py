"""What is chosen on validation rows once a pipeline is fitted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.config.featureset import FeatureSet
from closedloop.config.params import parse_params
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.stages.parts.fitting import fit

VALUE = CustomerValue(kept=KeptCustomer(column="income"), offer_cost=1, save_rate=0.2)


def draw_rows(rows: int, seed: int) -> pd.DataFrame:
    """Customers whose age says who leaves, and whose income says nothing of that."""
    generator = np.random.default_rng(seed)
    age = generator.normal(size=rows)
    churned = generator.random(rows) < 1 / (1 + np.exp(1 - 2 * age))
    ids = [f"C{number}" for number in range(rows)]
    columns = {"customer_id": ids, "age": age, "income": generator.gamma(2, 60, rows), "churned": churned}
    return pd.DataFrame(columns)


def test_a_threshold_by_profit_earns_most_on_the_validation_rows() -> None:
    features = FeatureSet(("age", "income"), (), "s", {}, VALUE, ("income",))
    rows, thresholds = {"train": draw_rows(400, 1), "validation": draw_rows(400, 2)}, {}
    for rule in (0.5, "profit"):
        model = {"type": "logistic_regression", "threshold": rule}
        params = parse_params({"dataset": "d", "as_of": "2024-05-31", "seed": 7, "model": model}, "params.yaml")
        fitted = fit(params, features, {}, rows)
        thresholds[rule] = fitted.threshold
    validation = rows["validation"]
    gains = np.where(validation["churned"], 0.2 * validation["income"], 0.0) - 1
    scores = fitted.pipeline.predict_proba(validation)[:, 1]
    earned = {rule: gains[scores >= threshold].sum() for rule, threshold in thresholds.items()}
    assert earned["profit"] == pytest.approx(max(gains[scores >= each].sum() for each in [*scores, 1.1]))
    assert earned["profit"] > earned[0.5] > 0
