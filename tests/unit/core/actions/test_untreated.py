"""Which rows a model is judged by while campaigns go on."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from closedloop.core.actions.untreated import describe_untreated, find_untreated

DAY = pd.Timedelta(days=1)
START = pd.Timestamp("2024-03-01", tz="UTC")


def make_rows(*rows: tuple[str | None, int]) -> pd.DataFrame:
    """(customer, days after the start of the campaign)."""
    return pd.DataFrame({"customer_id": [who for who, _ in rows], "at": [START + days * DAY for _, days in rows]})


def make_actions(*actions: tuple[str, str, float], days: int = 0) -> pd.DataFrame:
    """(customer, arm, weight)."""
    frame = pd.DataFrame(actions, columns=["customer_id", "arm", "weight"])
    return frame.assign(acted_at=START + days * DAY, horizon_days=30)


def repeat(rows: pd.DataFrame, *actions: pd.DataFrame) -> list[int]:
    return find_untreated(rows, pd.concat(actions), time="at").repeats.tolist()


def test_the_treated_are_left_out_and_the_held_out_stand_for_them():
    rows = make_rows(("a", 0), ("b", 0), ("c", 0), (None, 0))
    actions = make_actions(("a", "treated", 3.0), ("b", "held_out", 3.0))
    found = find_untreated(rows, actions, time="at")
    assert found.repeats.tolist() == [0, 3, 1, 1]
    assert found.tell() == {"treated": 1, "held_out": 1, "blinded": 0}
    taken = found.take(rows)
    assert taken["customer_id"].fillna("-").tolist() == ["b", "b", "b", "c", "-"]
    assert taken["repeats"].tolist() == [3, 3, 3, 1, 1]
    assert "1 row of treated customers left out" in describe_untreated(found.tell())[0]


@pytest.mark.parametrize(("days", "touched"), [(-30, False), (-29, True), (0, True), (29, True), (30, False)])
def test_an_action_touches_snapshots_whose_horizon_overlaps_its_own(days, touched):
    rows = make_rows(("a", days), ("b", days))
    actions = make_actions(("a", "treated", 2.0), ("b", "held_out", 2.0))
    assert repeat(rows, actions) == ([0, 2] if touched else [1, 1])


def test_who_was_held_out_of_two_campaigns_stands_for_the_product():
    rows = make_rows(("a", 15), ("b", 15))
    first = make_actions(("a", "held_out", 2.0), ("b", "held_out", 2.0))
    second = make_actions(("a", "held_out", 5.0), ("b", "treated", 5.0), days=31)
    assert repeat(rows, first, second) == [10, 0]


def test_a_snapshot_of_a_campaign_without_a_hold_out_says_nothing():
    rows = make_rows(("a", 0), ("b", 0), ("b", 40))
    found = find_untreated(rows, make_actions(("a", "treated", np.nan)), time="at")
    assert found.repeats.tolist() == [0, 0, 1]
    assert found.blinded == 2
    assert "cannot be told apart from the campaign" in describe_untreated(found.tell())[0]


def test_fractions_of_a_weight_come_out_on_average_and_the_same_again():
    rows = make_rows(*((f"C{number}", 0) for number in range(4_000)))
    actions = make_actions(*((f"C{number}", "held_out", 9.3) for number in range(4_000)))
    first = find_untreated(rows, actions, time="at").repeats
    assert set(first) == {9, 10}
    assert first.mean() == pytest.approx(9.3, abs=0.03)
    shuffled = rows.sample(frac=1, random_state=1)
    assert (find_untreated(shuffled, actions, time="at").repeats == first[shuffled.index]).all()


def test_without_actions_every_row_counts_once():
    rows = make_rows(("a", 0), ("b", 0))
    found = find_untreated(rows, make_actions(), time="at")
    assert (found.repeats.tolist(), found.tell(), describe_untreated(found.tell())) == ([1, 1], {}, [])


def test_the_weighted_rows_have_the_figures_of_the_untreated_world():
    """60,000 customers, the 10,000 with the highest risk treated but for a tenth; 30 % of the treated are saved."""
    rng = np.random.default_rng(11)
    score = np.sort(rng.beta(1, 4, 60_000))[::-1]
    rows = make_rows(*((f"C{number}", 0) for number in range(60_000))).assign(score=score)
    would_leave = rng.random(60_000) < score
    held_out = np.zeros(60_000, dtype=bool)
    held_out[rng.permutation(10_000)[:1_000]] = True
    treated = (np.arange(60_000) < 10_000) & ~held_out
    rows["outcome"] = would_leave & ~(treated & (rng.random(60_000) < 0.3))
    arms = np.where(held_out, "held_out", "treated")
    actions = make_actions(*((f"C{number}", arms[number], 10.0) for number in range(10_000)))
    taken = find_untreated(rows, actions, time="at").take(rows)
    assert len(taken) == 60_000
    error = 0.5 * (10_000 * 10) ** 0.5 / 60_000  # of the held out, who stand for ten each
    assert taken["outcome"].mean() == pytest.approx(would_leave.mean(), abs=4 * error)
    assert rows["outcome"].mean() < would_leave.mean() - 4 * error
    assert taken["score"].mean() == pytest.approx(score.mean(), abs=0.005)
