"""Alarms that are seldom wrong: counts by hand, p values against SciPy, rates by simulation."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from closedloop.core.monitoring.drift import Shift, compare, find_beyond_limits, find_drifted, sketch

FEW = st.lists(st.sampled_from([0.0, 1.0, 2.5, None]), min_size=1, max_size=30)


def measure_distance(one: pd.Series, other: pd.Series) -> float:
    """Kolmogorov and Smirnov's, from its definition."""
    return max(abs((one <= at).mean() - (other <= at).mean()) for at in {*one, *other})


def test_counts_by_hand():
    found = sketch(pd.Series([3.0, 1.0, None, 1.0, 2.0]))
    # below 1, 1, between, 2, between, 3, above, missing
    assert found.counts.tolist() == [0, 2, 0, 1, 0, 1, 0, 1]
    assert found.count(pd.Series([0.5, 1.5, 1.0, 9.0, None, None])).tolist() == [1, 1, 1, 0, 0, 0, 1, 2]
    colours = sketch(pd.Series(["red", "blue", None, "grey"], dtype=object), ["blue", "red"])
    assert colours.counts.tolist() == [1, 1, 1, 1]  # blue, red, other, missing


@given(FEW, FEW)
def test_few_values_keep_their_exact_distance(reference, window):
    one, other = pd.Series(reference, dtype=float), pd.Series(window, dtype=float)
    found = sketch(one)
    known = (one.dropna(), other.dropna())
    gap = abs(one.isna().mean() - other.isna().mean())
    distance = measure_distance(*known) if all(map(len, known)) else 0.0
    assert compare(found, found.count(other)).effect == pytest.approx(max(distance, gap))


def test_p_values_are_scipys():
    rng = np.random.default_rng(5)
    one, other = pd.Series(rng.standard_normal(4_000)), pd.Series(rng.standard_normal(900) + 0.05)
    found, exact = sketch(one), stats.ks_2samp(one, other)
    shift = compare(found, found.count(other))
    assert len(found.counts) <= 258
    assert exact.statistic - 1 / 128 <= shift.effect <= exact.statistic
    assert shift.p_value == pytest.approx(exact.pvalue, abs=0.15)
    names = pd.Series(rng.choice(list("abc"), 3_000)), pd.Series(rng.choice(list("abc"), 700, p=[0.4, 0.3, 0.3]))
    colours = sketch(names[0], list("abc"))
    table = [series.value_counts().sort_index() for series in names]
    expected = stats.chi2_contingency(table)
    assert compare(colours, colours.count(names[1])).p_value == pytest.approx(expected.pvalue)


def test_rare_categories_are_pooled():
    """Each of 40 alone would have an expected count far below 5, where the distribution is not chi-square."""
    names = [f"c{number}" for number in range(40)]
    found = sketch(pd.Series(["big"] * 960 + names), ["big", *names])
    shift = compare(found, found.count(pd.Series(["big"] * 99 + ["c3"])))
    assert shift.p_value > 0.01


def test_a_feature_that_goes_missing_is_a_shift():
    found = sketch(pd.Series(np.arange(1_000.0)))
    window = pd.Series(np.r_[np.arange(0, 1_000, 2.0), [np.nan] * 100])
    assert compare(found, found.count(window)).effect == pytest.approx(1 / 6)
    assert compare(found, found.count(window)).p_value < 1e-9
    assert compare(found, found.count(pd.Series([np.nan] * 600))).effect == 1.0


@pytest.mark.parametrize(
    ("rate", "drifted"), [(0.061, ["b", "c", "d"]), (0.059, ["b"]), (0.019, []), (0.201, [*"bcda"])]
)
def test_holms_correction_by_hand(rate, drifted):
    """Adjusted, these p values are .2, .02, .06 and .06."""
    p_values = {"a": 0.2, "b": 0.005, "c": 0.02, "d": 0.02}
    shifts = {name: Shift(0.5 - place / 10, p_values[name]) for place, name in enumerate("bcda")}
    assert find_drifted(shifts, false_alarm_rate=rate, effect_min=0.1) == drifted


def test_an_alarm_needs_certainty_and_size():
    shifts = {
        "certain": Shift(0.05, 1e-9),
        "large": Shift(0.4, 0.2),
        "both": Shift(0.2, 1e-6),
        "most": Shift(0.3, 1e-4),
    }
    assert find_drifted(shifts, false_alarm_rate=0.01, effect_min=0.1) == ["most", "both"]
    assert find_drifted(shifts, false_alarm_rate=1e-4, effect_min=0.1) == ["both"]


@pytest.mark.parametrize("rows", [(2_000, 300), (1_000, 1_000)])
def test_false_alarms_are_as_rare_as_asked_for(rows):
    """At a rate of 20%, so that few windows tell; a threshold that forgot the finite reference would alarm in most."""
    rng = np.random.default_rng(11)
    alarms, repeats = 0, 120
    for _ in range(repeats):
        reference, window = (pd.DataFrame(rng.standard_normal((count, 4))) for count in rows)
        sketches = {name: sketch(reference[name]) for name in reference}
        shifts = {str(name): compare(found, found.count(window[name])) for name, found in sketches.items()}
        alarms += bool(find_drifted(shifts, false_alarm_rate=0.2, effect_min=0.0))
    assert 0.08 < alarms / repeats < 0.2 + 3 * (0.2 * 0.8 / repeats) ** 0.5


def test_fixed_limits_name_what_is_beyond_them():
    reference = pd.DataFrame({"spend": np.arange(100.0), "visits": np.arange(100.0) % 7, "plan": ["a", "b"] * 50})
    window = reference.assign(customer_id=[str(number) for number in range(100)])
    assert find_beyond_limits(reference, window, []) == []
    worse = window.assign(spend=window["spend"] + 200, plan=[None] * 5 + ["a"] * 95, customer_id=[None, *"x" * 99])
    found = find_beyond_limits(reference, worse, ["spend"])
    assert found == [
        "drifted share 0.33, below 0.3 is allowed",
        "predictions without customer_id: 1, none is allowed",
        "spend: mean is 6.9 standard deviations off, at most 3",
        "plan: 0.050 missing, below 0.05 is allowed",
    ]
    assert find_beyond_limits(reference, worse, [], mean_sigmas_max=7, missing_share_max=0.06) == found[1:2]
