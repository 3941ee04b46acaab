"""Names and codes that real files hold go through every stage, the service and the batch scorer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import yaml

from tests.http_service import run_service

pytestmark = pytest.mark.thorough

FEE, SIZE, PLAN, TOWN = "Monthly fee (EUR)", "größe/m.2 - a%&+b", "2_plan", "Stadt größe"
OURS = ["effect", "probability", "segment"]  # as figures of a campaign's list are called
CLUB = {
    "name": "club",
    "model_name": "club_churn",
    "description": "Members of a club, in a file with odd names.",
    "kind": "table",
    "source": {"type": "parquet"},
    "value": {"kept": {"column": "segment"}, "offer_cost": 0.01, "save_rate": 0.5},
    "columns": {
        "entity_id": "member #",
        "rename": {'plan #1, "old"': PLAN},
        "numeric": [FEE, SIZE, *OURS],
        "categorical": [PLAN, TOWN],
        "sensitive": "Alter & Geschlecht",
        "label": {"column": "left: yes/no", "churned": ["1", "Yes"], "stayed": "0"},
    },
    "expectations": [],
    "gates": {"accuracy_min": 0.5, "f1_weighted_min": 0.5, "roc_auc_min": 0.6, "calibration_error_max": 0.3},
}


def write_members(folder):
    """Two files: codes are whole numbers in the first, and floats in the second, where one is missing."""
    draw, count = np.random.default_rng(3), 1_200
    rows = pd.DataFrame({"member #": np.arange(1, count + 1), FEE: draw.uniform(5, 60, count).round(2)})
    rows[SIZE] = draw.normal(50, 9, count)
    rows['plan #1, "old"'] = draw.integers(1, 4, count)
    rows[TOWN] = draw.choice(['Köln, "Süd"', "São Paulo", "a:b"], count)
    rows["Alter & Geschlecht"] = draw.choice(["f", "m"], count)
    left = draw.random(count) < np.where(rows['plan #1, "old"'] == 1, 0.75, 0.15)
    rows["left: yes/no"] = left.astype(int)
    rows[OURS] = np.tile(draw.integers(0, 2, (count, 1)), len(OURS))
    folder.mkdir()
    rows.head(600).to_parquet(folder / "a.parquet", index=False)
    rest = rows.tail(600).copy()
    rest['plan #1, "old"'] = rest['plan #1, "old"'].astype(float)
    rest.iloc[0, rest.columns.get_loc('plan #1, "old"')] = None
    rest.to_parquet(folder / "b.parquet", index=False)
    return rows


def test_a_table_with_odd_names_is_trained_served_and_scored(project):
    rows = write_members(project.root / "members")
    (project.root / "configs/datasets/club.yaml").write_text(yaml.safe_dump(CLUB), encoding="utf-8")
    project.change_params(
        {"dataset": "club", "data": {"source": "members"}, "model": {"type": "hist_gradient_boosting"}}
    )
    project.run_stages()
    contract = project.read_json("models/candidate/contract.json")
    kinds = {feature["name"]: feature for feature in contract["features"]}
    assert list(kinds) == [FEE, SIZE, *OURS, PLAN, TOWN]
    assert kinds[PLAN]["categories"] == ["1", "2", "3"]
    assert kinds[TOWN]["categories"] == sorted(rows[TOWN].unique())

    features = rows.rename(columns={'plan #1, "old"': PLAN})[[*kinds]].head(50)
    features.assign(customer_id=rows["member #"].head(50)).to_csv(project.root / "in.csv", index=False)
    project.run("score", "--input", "in.csv", "--output", "out.csv", "--no-log")
    scored = pd.read_csv(project.root / "out.csv")
    with run_service(project.root, "--bento", "models/bento") as service:
        items = [{"features": {**row, PLAN: str(row[PLAN])}} for row in features.to_dict("records")]
        status, answer = service.call("POST", "/predict/batch", items)[:2]
    assert status == 200
    np.testing.assert_allclose(scored["score"], [one["probability"] for one in answer["predictions"]], atol=1e-6)

    chosen = ("--as-of", "2025-01-01", "--capacity", "90", "--segment", TOWN)
    project.run("campaign", "start", *chosen, "--output", "list.csv")
    listed = pd.read_csv(project.root / "list.csv")
    assert listed["probability"].between(0, 1).all()
    assert listed["probability"].is_monotonic_decreasing
    np.testing.assert_allclose(listed["expected_value"], 0.5 * listed["probability"] - 0.01)  # nobody else has a value
    assert listed["effect"].isna().all()
    assert set(listed["segment"]) <= set(rows[TOWN])
