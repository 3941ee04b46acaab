"""Tests that may be looked at every day: mixture e-values, valid at all sample sizes at once.

An e-value is a wealth that starts at 1 and, if the null hypothesis holds, is expected never to grow. By Ville's
inequality it ever reaches 1 / alpha with probability alpha at most, however often it is looked at, so that "stop when
it does" keeps the error rate. The mixtures are those of Howard, Ramdas, McAuliffe and Sekhon (2021), "Time-uniform,
nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49(2), propositions 6 and 7; the bets on a
bounded mean those of Waudby-Smith and Ramdas (2024), "Estimating means of bounded random variables by betting", Journal
of the Royal Statistical Society B 86(1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from closedloop.core.evaluation.metrics import check_scores, list_log_losses

# Probabilities are clipped for comparison, so that one customer can weigh at most log(.999 / .001) = 6.9 nats.
LOSS_CLIP = 1e-3
LOSS_GAP_MAX = math.log((1 - LOSS_CLIP) / LOSS_CLIP)
# Stakes per nat, fixed beforehand. Even the largest cannot lose everything on one customer.
BETS = tuple(0.9 / LOSS_GAP_MAX * 2 ** (-step / 2) for step in range(12))


@dataclass(frozen=True)
class PairedLosses:
    """Running sums of per-customer differences of log loss, challenger minus stable, in nats: negative is better.

    Profits are paired too, in nats of their own (`sum_paired_profits`). ``better`` and ``worse`` are the log wealth of
    each of `BETS` on the challenger, and against it.
    """

    customers: int = 0
    total: float = 0.0
    squares: float = 0.0
    better: tuple[float, ...] = (0.0,) * len(BETS)
    worse: tuple[float, ...] = (0.0,) * len(BETS)

    def __add__(self, other: PairedLosses) -> PairedLosses:
        """The sums of both; their customers must differ."""
        better, worse = (np.add(getattr(self, name), getattr(other, name)).tolist() for name in ("better", "worse"))
        sums = self.customers + other.customers, self.total + other.total, self.squares + other.squares
        return PairedLosses(*sums, tuple(better), tuple(worse))

    @property
    def mean(self) -> float:
        """Mean difference; nan without customers."""
        return self.total / self.customers if self.customers else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the differences, nats; nan without customers, never below 0."""
        return math.sqrt(max(self.squares / self.customers - self.mean**2, 0.0)) if self.customers else math.nan


def sum_paired_losses(
    labels: npt.ArrayLike,
    stable_scores: npt.ArrayLike,
    challenger_scores: npt.ArrayLike,
) -> PairedLosses:
    """Sum the paired differences of log loss over customers that both models scored.

    Parameters
    ----------
    labels, stable_scores, challenger_scores : array-like, shape (n,)
        Closed outcomes 0/1 and both probabilities, a row a customer: one customer's outcomes resemble each other.

    Raises
    ------
    UnusableScores
        If lengths differ, or a value is missing or out of range.

    Examples
    --------
    >>> sum_paired_losses([1, 0], [0.5, 0.5], [0.5, 0.25]).total  # log(.5 / .75)
    -0.4054651081081644
    """
    if not np.size(labels):
        return PairedLosses()
    truth, stable = check_scores(labels, stable_scores, both_classes=False)
    _, challenger = check_scores(labels, challenger_scores, both_classes=False)
    return _sum_gaps(list_log_losses(truth, _clip(challenger)) - list_log_losses(truth, _clip(stable)))


def sum_paired_profits(
    gains: npt.NDArray[np.float64],
    stable_offers: npt.NDArray[np.bool_],
    challenger_offers: npt.NDArray[np.bool_],
    *,
    limit: float,
) -> PairedLosses:
    """Sum the paired differences of profit over customers, as losses: what the challenger's offers bring less.

    The bets need bounded differences: ``limit`` is the largest that counts, and stands for `LOSS_GAP_MAX` nats.

    Parameters
    ----------
    gains : ndarray, shape (n,)
        What an offer to each customer brought (`closedloop.core.evaluation.profit.count_profit`).
    stable_offers, challenger_offers : bool array, shape (n,)
        Who gets an offer by either model.
    limit : float
        In money; it must not come from these outcomes.

    Examples
    --------
    >>> found = sum_paired_profits(np.array([15.0]), np.array([True]), np.array([False]), limit=30.0)
    >>> found.total == LOSS_GAP_MAX / 2
    True
    """
    lost = gains * (stable_offers.astype(np.float64) - challenger_offers.astype(np.float64))
    return _sum_gaps(np.clip(lost, -limit, limit) * (LOSS_GAP_MAX / limit))


def _sum_gaps(gaps: npt.NDArray[np.float64]) -> PairedLosses:
    better, worse = (np.log1p(np.outer(side * np.array(BETS), gaps)).sum(axis=1).tolist() for side in (-1, 1))
    return PairedLosses(len(gaps), float(gaps.sum()), float(gaps @ gaps), tuple(better), tuple(worse))


def weigh_share(successes: float, trials: float, share: float, *, planned: float, alpha: float, greater: bool) -> float:
    """Log e-value against "each of the trials succeeds with probability ``share``" (beta-binomial mixture).

    Two-sided it is the test of Lindon and Malek (2022), "Anytime-valid inference for multinomial count data",
    NeurIPS 35, in two arms, with the prior tuned; ``greater`` tests against "at most ``share``".

    Parameters
    ----------
    successes, trials : float
        Counts, ``0 <= successes <= trials``.
    share : float in (0, 1)
    planned : float
        Trials at which the test is at its most sensitive; valid at any number.
    alpha : float in (0, 1)
        The level that it is tuned for; the null is rejected where the result reaches ``log(1 / alpha)``.

    Examples
    --------
    >>> round(weigh_share(500, 10_000, 0.05, planned=10_000, alpha=0.001, greater=False), 2)
    -1.43
    >>> round(weigh_share(650, 10_000, 0.05, planned=10_000, alpha=0.001, greater=False), 2)
    19.03
    """
    from scipy.special import betaincc, betaln

    # r / (g h) in the paper's proposition 7, where g = share and h = 1 - share.
    variance = share * (1 - share)
    concentration = max(tune_mixture(planned * variance, alpha, greater=greater) / variance - 1, 1e-3)
    prior = concentration * share, concentration * (1 - share)
    posterior = prior[0] + successes, prior[1] + trials - successes
    evidence = betaln(*posterior) - betaln(*prior)
    evidence -= successes * math.log(share) + (trials - successes) * math.log1p(-share)
    if greater:
        tail = betaincc(*posterior, share)
        evidence += math.log(tail) - math.log(betaincc(*prior, share)) if tail > 0 else -math.inf
    return float(evidence)


def weigh_split(successes: float, trials: float, share: float, *, planned: float, alpha: float) -> float:
    """Log e-value against "the split deals out ``share``", sharpest at the planned sample.

    Nine tenths of the prior stand on the two shares that a straight boundary finds best by ``planned`` trials; the
    beta mixture of `weigh_share` has the rest, so that a smaller fault is found too, later. Any average of e-values is
    one; of 20,000 customers the beta mixture alone finds a split of 5% that delivers 6% in 98.4%, this in 99.2%.

    Examples
    --------
    >>> round(weigh_split(1200, 20_000, 0.05, planned=20_000, alpha=0.001), 2)
    16.37
    """
    reach = math.sqrt(2 * math.log(2 / alpha) * share * (1 - share) / planned)
    points = [point for point in (share - reach, share + reach) if 0 < point < 1]
    weighed = [math.log(0.1) + weigh_share(successes, trials, share, planned=planned, alpha=alpha, greater=False)]
    for point in points:
        odds = successes * math.log(point / share) + (trials - successes) * math.log((1 - point) / (1 - share))
        weighed.append(math.log(0.9 / len(points)) + odds)
    return float(np.logaddexp.reduce(weighed))


def weigh_sum(total: float, variance: float, *, planned: float, alpha: float) -> float:
    """Log e-value against "the mean is at most 0" (one-sided normal mixture).

    Parameters
    ----------
    total : float
        Sum of the observations.
    variance : float
        Sum of their variances. Estimated, the result is asymptotic: Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas
        (2024), "Time-uniform central limit theory and asymptotic confidence sequences", Annals of Statistics 52(6).
    planned : float
        The variance at which the test is at its most sensitive.

    Examples
    --------
    >>> round(weigh_sum(10, 100, planned=100, alpha=0.05), 4)
    -0.065
    """
    from scipy.special import log_ndtr

    rho = tune_mixture(planned, alpha, greater=True)
    spread = variance + rho
    return float(math.log(4 * rho / spread) / 2 + total**2 / (2 * spread) + log_ndtr(total / math.sqrt(spread)))


def weigh_losses(losses: PairedLosses, *, better: bool, planned: int, deviation: float, alpha: float) -> float:
    """Log e-value against "the challenger is not better" (or, not ``better``: "not worse") in log loss, by betting.

    No variance is estimated and nothing is asymptotic: rare churners, whose losses are large, cannot mislead it early.

    Parameters
    ----------
    planned : int
        Customers at which the test is at its most sensitive.
    deviation : float
        Standard deviation of the differences that was planned with, nats; it must not come from these outcomes.

    Notes
    -----
    The wealth is an average over fixed bets: half of it on the one that is best at ``planned``, the rest spread evenly.
    """
    bet = math.sqrt(2 * math.log(2 / alpha) / planned) / deviation
    best = int(np.argmin(np.abs(np.log(np.array(BETS) / bet))))
    shares = np.full(len(BETS), 0.5 / len(BETS)) + np.where(np.arange(len(BETS)) == best, 0.5, 0.0)
    return float(np.logaddexp.reduce(np.log(shares) + np.array(losses.better if better else losses.worse)))


def bound_mean(losses: PairedLosses, *, planned: int, alpha: float) -> tuple[float, float]:
    """Asymptotic confidence sequence of the mean difference, for people: each end is one-sided at ``alpha``."""
    if not losses.deviation > 0:
        return -math.inf, math.inf
    reach = losses.deviation * find_bound(losses.customers, planned=planned, alpha=alpha) / losses.customers
    return losses.mean - reach, losses.mean + reach


def bound_distribution(rows: int, *, alpha: float) -> float:
    """How far the share of rows below any value ever is from the truth, at all samples at once, but for ``alpha``.

    Howard and Ramdas (2022), "Sequential estimation of quantiles with applications to A/B testing and best-arm
    identification", Bernoulli 28(3), theorem 2 with A = .85; infinite without rows.

    Examples
    --------
    >>> round(bound_distribution(1000, alpha=0.05), 4)
    0.0866
    """
    if not rows:
        return math.inf
    return 0.85 * math.sqrt((math.log(1 + math.log(rows)) + 0.8 * math.log(1612 / alpha)) / rows)


@lru_cache(maxsize=1024)
def find_bound(variance: float, *, planned: float, alpha: float) -> float:
    """The sum at which `weigh_sum` reaches ``log(1 / alpha)``.

    Examples
    --------
    >>> round(find_bound(100, planned=100, alpha=0.05), 5)
    27.66071
    """
    from scipy.optimize import brentq

    # At 0 the log e-value is at most 0, and x**2 / 2 outgrows what the logarithm takes away.
    spread = variance + tune_mixture(planned, alpha, greater=True)
    top = math.sqrt(2 * spread * (math.log(2 / alpha) + math.log1p(spread)))

    def miss(total: float) -> float:
        return weigh_sum(total, variance, planned=planned, alpha=alpha) - math.log(1 / alpha)

    return float(brentq(miss, 0.0, top))


def size_paired(gain: float, deviation: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Customers after which a model that is better by ``gain`` is found with at least ``power``.

    Parameters
    ----------
    gain : float
        Mean reduction of log loss that is worth finding, nats.
    deviation : float
        Standard deviation of the paired differences, nats (`PairedLosses.deviation` of the offline comparison).

    Notes
    -----
    The maximum sample of the design, from the bet that holds half of the wealth of `weigh_losses`, at the last look
    alone; other bets and earlier looks only add to its power. After n customers the log wealth of a bet b is about
    ``b * sum - b**2 * n * deviation**2 / 2``, which must reach ``log(2 / alpha)``.

    Examples
    --------
    >>> size_paired(0.01, 0.2)
    5521
    """
    from scipy.stats import norm

    needed, quantile = math.log(2 / alpha), float(norm.ppf(power))
    customers = ((math.sqrt(2 * needed) + quantile) * deviation / gain) ** 2
    if math.sqrt(2 * needed / customers) / deviation > BETS[0]:
        # A quick decision would need a higher stake than one may bet.
        drift, spread = BETS[0] * gain - (BETS[0] * deviation) ** 2 / 2, BETS[0] * quantile * deviation
        customers = ((spread + math.sqrt(spread**2 + 4 * drift * needed)) / (2 * drift)) ** 2
    return math.ceil(customers)


def tune_mixture(planned: float, alpha: float, *, greater: bool) -> float:
    """The mixture's parameter rho that makes the bound about tightest at variance ``planned`` (paper, section 3.5)."""
    width = -2 * math.log(min(2 * alpha, 0.99) if greater else alpha)
    return planned / (width + math.log1p(width))


def _clip(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.clip(scores, LOSS_CLIP, 1 - LOSS_CLIP)
