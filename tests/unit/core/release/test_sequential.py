from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import beta, binom, norm

from closedloop.core.release.sequential import (
    BETS,
    LOSS_GAP_MAX,
    PairedLosses,
    bound_mean,
    find_bound,
    size_paired,
    sum_paired_losses,
    sum_paired_profits,
    tune_mixture,
    weigh_losses,
    weigh_share,
    weigh_split,
    weigh_sum,
)
from closedloop.errors import DataError

# Figures that the first author of Howard et al. (2021) published with the paper's reference implementation (in R):
# variance 100, tuned for 100 at level .05, a sum of 10, and the sum at which the e-value is 20.
VARIANCE, SUM, LEVEL = 100.0, 10.0, 0.05


def weigh_published(total: float, *, greater: bool) -> float:
    """Their beta-binomial mixture with g = .2, h = .8: trials succeed with .2, and the sum is centred."""
    trials = VARIANCE / (0.2 * 0.8)
    return weigh_share(total + 0.2 * trials, trials, 0.2, planned=trials, alpha=LEVEL, greater=greater)


def test_the_published_figures_of_the_normal_mixture() -> None:
    assert tune_mixture(VARIANCE, LEVEL, greater=False) == pytest.approx(12.60056, abs=1e-5)
    assert weigh_sum(SUM, VARIANCE, planned=VARIANCE, alpha=LEVEL) == pytest.approx(-0.06502391, abs=1e-5)
    assert find_bound(VARIANCE, planned=VARIANCE, alpha=LEVEL) == pytest.approx(27.66071, abs=1e-5)


def test_the_published_figures_of_the_beta_binomial_mixture() -> None:
    assert weigh_published(SUM, greater=False) == pytest.approx(-0.6941012, abs=1e-5)
    assert weigh_published(SUM, greater=True) == pytest.approx(-0.07134019, abs=1e-5)
    assert weigh_published(31.4308, greater=False) == pytest.approx(math.log(20), abs=1e-4)
    assert weigh_published(28.41238, greater=True) == pytest.approx(math.log(20), abs=1e-4)


@pytest.mark.parametrize(("successes", "trials"), [(3, 20), (9, 40), (0, 30), (30, 30)])
@pytest.mark.parametrize("greater", [False, True])
def test_evidence_on_a_share_is_the_likelihood_ratio_integrated(successes: int, trials: int, greater: bool) -> None:
    share, planned = 0.2, 100.0
    weight = tune_mixture(planned * 0.16, LEVEL, greater=greater) / 0.16 - 1
    prior = beta(weight * share, weight * (1 - share))

    def ratio(p: float) -> float:
        likelihood = (p / share) ** successes * ((1 - p) / (1 - share)) ** (trials - successes)
        return float(likelihood * prior.pdf(p))

    low = share if greater else 0.0
    expected = quad(ratio, low, 1.0, epsabs=1e-12)[0] / prior.sf(low)
    found = weigh_share(successes, trials, share, planned=planned, alpha=LEVEL, greater=greater)
    assert found == pytest.approx(math.log(expected), rel=1e-6)


@pytest.mark.parametrize(("share", "planned"), [(0.05, 500.0), (0.5, 200.0), (0.05, 100.0)])
def test_a_right_split_is_expected_to_give_no_evidence(share: float, planned: float) -> None:
    """The expected e-value over all counts is exactly 1, also where only one of both points is a share."""
    expected = sum(
        binom.pmf(count, 60, share) * math.exp(weigh_split(count, 60, share, planned=planned, alpha=0.001))
        for count in range(61)
    )
    assert expected == pytest.approx(1.0)


@given(st.floats(-60, 60), st.floats(1, 500))
def test_evidence_on_a_sum_is_the_likelihood_ratio_integrated(total: float, variance: float) -> None:
    rho = tune_mixture(100.0, LEVEL, greater=True)

    def ratio(mean: float) -> float:
        return float(math.exp(mean * total - mean**2 * variance / 2) * 2 * norm.pdf(mean, scale=rho**-0.5))

    # The integrand is a normal density around total / (variance + rho): the range holds it.
    peak, width = max(total / (variance + rho), 0.0), (variance + rho) ** -0.5
    expected = quad(ratio, max(peak - 12 * width, 0.0), peak + 12 * width, epsabs=0, epsrel=1e-10)[0]
    assert weigh_sum(total, variance, planned=100.0, alpha=LEVEL) == pytest.approx(math.log(expected), abs=1e-6)


def test_a_bound_is_where_the_evidence_suffices() -> None:
    for variance, planned, alpha in [(1.0, 1.0, 0.05), (10.0, 5000.0, 0.05), (9000.0, 50.0, 0.001)]:
        bound = find_bound(variance, planned=planned, alpha=alpha)
        assert weigh_sum(bound, variance, planned=planned, alpha=alpha) == pytest.approx(math.log(1 / alpha))


def test_sums_of_losses_by_hand() -> None:
    found = sum_paired_losses([1, 0, 1], [0.5, 0.5, 0.8], [0.6, 0.7, 0.8])
    gaps = np.array([math.log(0.5 / 0.6), math.log(0.5 / 0.3), 0.0])
    assert found.customers == 3
    assert (found.total, found.squares) == pytest.approx((gaps.sum(), (gaps**2).sum()))
    assert (found.mean, found.deviation) == pytest.approx((gaps.mean(), gaps.std()))


def test_one_customer_cannot_weigh_more_than_the_clip_allows() -> None:
    assert sum_paired_losses([1], [0.999], [0.0]).total == pytest.approx(math.log(999))


def test_sums_of_profits_by_hand() -> None:
    gains, every = np.array([15.0, -5.0, -5.0, 90.0]), np.full(4, True)
    found = sum_paired_profits(gains, every, np.array([False, False, True, False]), limit=30.0)
    unit = LOSS_GAP_MAX / 30
    # lost: 15 of a churner who gets no offer, -5 of a stayer who gets none, nothing, and 90, which counts as 30
    assert (found.customers, found.total) == (4, pytest.approx(40 * unit))
    assert found.worse[0] == pytest.approx(sum(math.log1p(BETS[0] * unit * lost) for lost in (15, -5, 0, 30)))
    mirrored = sum_paired_profits(gains, np.array([False, False, True, False]), every, limit=30.0)
    assert (mirrored.better, mirrored.total) == (pytest.approx(found.worse), pytest.approx(-found.total))


def test_no_outcomes_are_no_evidence_and_bad_ones_are_refused() -> None:
    nothing = sum_paired_losses([], [], [])
    assert nothing == PairedLosses()
    assert math.isnan(nothing.mean)
    assert weigh_losses(nothing, better=True, planned=100, deviation=0.2, alpha=LEVEL) == pytest.approx(0)
    assert bound_mean(nothing, planned=100, alpha=LEVEL) == (-math.inf, math.inf)
    with pytest.raises(DataError, match="probabilities"):
        sum_paired_losses([1, 0], [0.5, 0.5], [0.5, 1.5])


SETTINGS = {"planned": 1000, "deviation": 0.2, "alpha": LEVEL}


def test_the_wealth_is_what_the_bets_win_by_hand() -> None:
    """One half on the bet nearest to the best one at the planned sample, the other spread over all."""
    found = sum_paired_losses([1, 0, 1], [0.5, 0.5, 0.8], [0.6, 0.7, 0.8])
    gaps = [math.log(0.5 / 0.6), math.log(0.5 / 0.3), 0.0]
    wealth = [math.prod(1 - bet * gap for gap in gaps) for bet in BETS]
    assert math.sqrt(2 * math.log(40) / 1000) / 0.2 > BETS[0]
    expected = (wealth[0] + sum(wealth) / len(BETS)) / 2
    assert weigh_losses(found, better=True, **SETTINGS) == pytest.approx(math.log(expected))
    slow = {**SETTINGS, "planned": 100_000}
    nearest = min(range(len(BETS)), key=lambda place: abs(BETS[place] - math.sqrt(2 * math.log(40) / 100_000) / 0.2))
    expected = (wealth[nearest] + sum(wealth) / len(BETS)) / 2
    assert weigh_losses(found, better=True, **slow) == pytest.approx(math.log(expected))


@pytest.mark.parametrize(("stable", "challenger"), [(0.3, 0.1), (0.02, 0.0), (0.5, 0.9)])
def test_nothing_is_won_in_a_fair_game(stable: float, challenger: float) -> None:
    """With labels that make both models' expected losses equal, the expected wealth over all outcomes is exactly 1."""
    churned, stayed = (sum_paired_losses([label], [stable], [challenger]).total for label in (1, 0))
    rate = stayed / (stayed - churned)
    assert 0 < rate < 1
    for better in (True, False):
        expected = 0.0
        for labels in itertools.product((0, 1), repeat=6):
            chance = math.prod(rate if label else 1 - rate for label in labels)
            sums = sum_paired_losses(labels, [stable] * 6, [challenger] * 6)
            expected += chance * math.exp(weigh_losses(sums, better=better, **SETTINGS))
        assert expected == pytest.approx(1.0)


def test_rare_churners_do_not_promote_a_model_whose_scores_are_too_low() -> None:
    """Both models lose as much on average, the challenger most of it on the few who churn.

    While nobody churns it looks better every time: a test that estimates the variance promotes it in most runs.
    """
    generator, promoted, asymptotic, runs = np.random.default_rng(1), 0, 0, 300
    for _ in range(runs):
        stable = generator.uniform(0.005, 0.02, 600)
        challenger = stable / 4
        churned, stayed = np.log(stable / challenger), np.log1p(-stable) - np.log1p(-challenger)
        labels = generator.random(600) < stayed / (stayed - churned)
        sums, proved, misled = PairedLosses(), False, False
        for look in np.split(np.arange(600), 12):
            sums += sum_paired_losses(labels[look], stable[look], challenger[look])
            proved |= weigh_losses(sums, better=True, planned=600, deviation=0.15, alpha=LEVEL) >= math.log(20)
            misled |= bound_mean(sums, planned=600, alpha=LEVEL)[1] < 0
        promoted, asymptotic = promoted + proved, asymptotic + misled
    assert promoted <= runs * (LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / runs))
    assert asymptotic > runs / 2


def test_better_and_worse_mirror_each_other() -> None:
    labels = np.tile([0, 0, 0, 1], 250)
    blind, sharp = np.full(1000, 0.25), np.where(labels == 1, 0.3, 0.2)
    good, bad = sum_paired_losses(labels, blind, sharp), sum_paired_losses(labels, sharp, blind)
    assert weigh_losses(good, better=True, **SETTINGS) == weigh_losses(bad, better=False, **SETTINGS) > math.log(20)
    assert weigh_losses(good, better=False, **SETTINGS) < 0
    low, high = bound_mean(good, planned=1000, alpha=LEVEL)
    assert low < good.mean < high < 0


def test_sums_of_two_parts_add_up() -> None:
    labels, stable, challenger = [1, 0, 1, 0], [0.5, 0.4, 0.9, 0.1], [0.6, 0.3, 0.7, 0.2]
    parts = [sum_paired_losses(labels[part], stable[part], challenger[part]) for part in (slice(0, 1), slice(1, 4))]
    whole, found = sum_paired_losses(labels, stable, challenger), parts[0] + parts[1]
    assert found.customers == whole.customers
    assert (found.total, found.squares) == pytest.approx((whole.total, whole.squares))
    assert found.better == pytest.approx(whole.better)
    assert found.worse == pytest.approx(whole.worse)


@pytest.mark.parametrize("gain", [0.002, 0.05])
def test_the_paired_sample_gives_its_power_at_the_last_look(gain: float) -> None:
    """By normal draws of the sum: the bet is the best one, or where that is too high, the largest."""
    deviation = 0.25
    customers = size_paired(gain, deviation, alpha=LEVEL, power=0.8)
    bet = min(math.sqrt(2 * math.log(40) / customers) / deviation, BETS[0])
    assert (bet == BETS[0]) is (gain == 0.05)
    # bet * sum - bet**2 / 2 * variance >= log(40), where the sum is normal
    needed = math.log(40) / bet + bet * customers * deviation**2 / 2
    power = norm.sf((needed - gain * customers) / (deviation * math.sqrt(customers)))
    assert 0.8 <= power < 0.802


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.01, 0.001])
def test_the_bound_of_a_distribution_keeps_its_level_by_the_papers_formula(alpha: float) -> None:
    """Theorem 2: an error of at most 4 exp(-g^2 C) (1 + 1 / ((g^2 - 1) log h)), the least over h."""
    constant = 0.8 * math.log(1612 / alpha)
    h = np.linspace(1.0005, 1.2, 4_000)
    g = np.sqrt(2 / h) * (0.85 - np.sqrt(2 * (h - 1) / constant))
    valid = g > 1
    h, g = h[valid], g[valid]
    errors = 4 * np.exp(-(g**2) * constant) * (1 + 1 / ((g**2 - 1) * np.log(h)))
    assert 0.5 * alpha < errors.min() <= alpha
