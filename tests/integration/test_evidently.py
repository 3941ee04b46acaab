"""Evidently's reports, on the real tool: its figures are those worked out by hand, and odd columns do not stop it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from closedloop.adapters.evidently import PSI_MAX, write_data_reports, write_outcome_report

pytestmark = pytest.mark.thorough

NUMERIC = ("age", "visits", "score")


def make_rows(seed: int, rows: int = 3_000) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    age, visits = rng.normal(45, 10, rows), rng.poisson(4, rows).astype(float)
    plan = rng.choice(["basic", "plus"], rows, p=[0.7, 0.3])
    return pd.DataFrame({"age": age, "visits": visits, "plan": plan, "score": rng.beta(1, 6, rows)})


def sum_index(current: np.ndarray, reference: np.ndarray) -> float:
    """The population stability index of two columns of counts; an empty bin counts as a ten-thousandth of its rows."""
    shares = [np.where(counts == 0, 1e-4, counts / counts.sum()) for counts in (current, reference)]
    return float(((shares[0] - shares[1]) * np.log(shares[0] / shares[1])).sum())


def write(path: Path, current: pd.DataFrame, reference: pd.DataFrame) -> dict[str, float]:
    pages = path / "data.html", path / "data_all.html"
    return write_data_reports(*pages, current, reference, numeric=NUMERIC, first=["visits", "score"])


def test_an_unchanged_window_is_stable_and_a_shifted_one_is_not(tmp_path):
    reference, same = make_rows(1), make_rows(2)
    found = write(tmp_path, same, reference)
    assert list(found) == ["age", "visits", "plan", "score"]
    assert max(found.values()) < 0.03
    shifted = same.assign(age=same["age"] + 8)
    again = write(tmp_path, shifted, reference)
    assert again["age"] > PSI_MAX
    assert {name: again[name] for name in ("visits", "plan", "score")} == pytest.approx(
        {name: found[name] for name in ("visits", "plan", "score")}
    )


def test_its_index_is_the_one_worked_out_by_hand(tmp_path):
    reference, current = make_rows(1), make_rows(2, 2_000)
    current["age"] -= 6
    current["plan"] = np.where(np.arange(2_000) < 900, "plus", "basic")
    found = write(tmp_path, current, reference)
    plans = [[int((frame["plan"] == name).sum()) for name in ("basic", "plus")] for frame in (current, reference)]
    assert found["plan"] == pytest.approx(sum_index(np.array(plans[0]), np.array(plans[1])), rel=1e-6)
    both = np.r_[current["age"], reference["age"]]
    edges = np.linspace(both.min(), both.max(), int(np.ceil(np.log2(len(both)) + 1)) + 1)  # Sturges' rule
    counts = [np.histogram(frame["age"], edges)[0] for frame in (current, reference)]
    assert found["age"] == pytest.approx(sum_index(counts[0], counts[1]), rel=1e-3)


def test_a_column_that_is_all_missing_is_left_out_of_drift_and_kept_in_quality(tmp_path):
    reference = make_rows(1)
    gone = make_rows(2).assign(age=np.nan, plan=None)
    assert list(write(tmp_path, gone, reference)) == ["visits", "score"]
    assert '"header": "age"' in (tmp_path / "data_all.html").read_text(encoding="utf-8")  # its quality is shown
    assert list(write(tmp_path, reference, reference.assign(visits=np.nan))) == ["age", "plan", "score"]
    nothing = reference.assign(age=np.nan, visits=np.nan, plan=None, score=np.nan)
    assert write(tmp_path, nothing, reference) == {}


def test_its_index_does_not_see_missing_values(tmp_path):
    """Why it is shown beside the monitor's own figures, which do."""
    reference = make_rows(1)
    holes = reference.assign(age=reference["age"].where(np.random.default_rng(3).random(len(reference)) < 0.5))
    assert write(tmp_path, holes, reference)["age"] < 0.03


def test_an_unknown_category_counts_as_drift(tmp_path):
    current = make_rows(2)
    current["plan"] = np.where(np.arange(len(current)) % 2 == 0, "gold", current["plan"])
    assert write(tmp_path, current, make_rows(1))["plan"] > PSI_MAX


def test_one_row_is_enough_for_a_page(tmp_path):
    assert set(write(tmp_path, make_rows(2).head(1), make_rows(1))) == {"age", "visits", "plan", "score"}


def test_outcomes_of_both_kinds_make_a_page_and_of_one_kind_none(tmp_path):
    path, reference = tmp_path / "outcomes.html", make_rows(1)
    reference["churned"] = np.arange(len(reference)) % 5 == 0
    closed = make_rows(2).assign(outcome=0)
    assert not write_outcome_report(path, closed, reference, 0.3)
    assert not write_outcome_report(path, closed.assign(outcome=1), reference, 0.3)
    assert not path.exists()
    closed.loc[:99, "outcome"] = 1
    assert write_outcome_report(path, closed, reference, 0.3)
    assert "Accuracy" in path.read_text(encoding="utf-8")


def test_a_report_that_fails_leaves_no_half_of_it(tmp_path):
    with pytest.raises(Exception, match="zero"):
        write(tmp_path, make_rows(2).head(0), make_rows(1))
    assert list(tmp_path.iterdir()) == []
