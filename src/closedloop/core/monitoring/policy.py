"""When a figure of the monitor is an alarm, and when alarms retrain."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

POLICY_PATTERN = r"^(own|never|drift|outcomes|recalibrate|every_[1-9][0-9]{0,3}_days)$"

WORDS = {
    "own": "retrain when the product's own rule asks for it",
    "never": "do not retrain",
    "drift": "retrain on drift alone",
    "outcomes": "retrain on outcomes alone",
    "recalibrate": "recalibrate on outcomes alone, and train nothing",
}


def describe_policy(policy: str) -> str:
    """A policy in words.

    >>> describe_policy("never"), describe_policy("every_30_days")
    ('do not retrain', 'retrain every 30 days')
    """
    return WORDS.get(policy, f"retrain {policy.replace('_', ' ')}")


class MonitoringPolicy(BaseModel):
    """The limits of the monitor's verdict; the settings section ``monitoring`` embeds it.

    Attributes
    ----------
    policy
        What retrains: ``own``, all that stands below; ``drift`` alone, whatever outcomes say; ``outcomes`` alone;
        ``recalibrate``, outcomes alone, and a retraining recalibrates the champion and trains nothing;
        ``every_30_days`` or another number, the calendar; ``never``. `closedloop backtest` says which one pays.
    false_alarm_rate
        Share of checks of unchanged customers that may alarm, all tests of a check together.
    effect_min, estimate_drop_min
        Smaller changes are no alarm, however certain: of a feature's distribution, and of the estimated accuracy.
    gain_min
        Log loss, nats, that a recalibration must at least win back on closed outcomes, at the interval's lower end.
    limits
        Calibrated tests alarm, the fixed limits that follow, or both.
    drifted_share_max, missing_share_max, mean_sigmas_max
        The fixed limits: share of features that drifted, of missing values, and how far a mean is off.
    accuracy_threshold
        Realised accuracy below it is an alarm; None: no such limit.
    window_rows_min, outcome_rows_min
        Fewer rows are not judged.
    window_days_max, sample_rows_max
        The longest window that is looked at, and about how many rows of it are read.
    breaches, of_checks
        Drift that comes with a fall of the estimate retrains after so many of the last checks.
    outcome_breaches, outcome_of_checks
        Realised figures that are worse than expected retrain after so many of the last checks with outcomes.
    model_age_days_max
        An older model is retrained; None: age alone never retrains.
    cooldown_days, retrainings_per_month
        How long a retraining waits for the one before, and how many there may be. The wait doubles with each
        challenger in a row that did not become champion, up to a horizon; it is ``cooldown_days`` again once a
        recalibration would win back ``gain_min`` more than when the last one was asked for. The first that does not
        win after a trained challenger that won does not double it yet.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    policy: str = Field(default="own", pattern=POLICY_PATTERN)
    false_alarm_rate: float = Field(default=0.01, gt=0, lt=0.5)
    effect_min: float = Field(default=0.1, ge=0, le=1)
    limits: Literal["calibrated", "fixed", "both"] = "calibrated"
    drifted_share_max: float = Field(default=0.3, gt=0, le=1)
    missing_share_max: float = Field(default=0.05, gt=0, le=1)
    mean_sigmas_max: float = Field(default=3.0, gt=0)
    estimate_drop_min: float = Field(default=0.02, ge=0, le=1)
    gain_min: float = Field(default=0.002, ge=0, le=1)
    accuracy_threshold: float | None = Field(default=None, ge=0, le=1)
    window_rows_min: int = Field(default=500, ge=50)
    outcome_rows_min: int = Field(default=500, ge=50)
    window_days_max: int = Field(default=31, ge=1)
    sample_rows_max: int = Field(default=20_000, ge=1_000)
    breaches: int = Field(default=3, ge=1)
    of_checks: int = Field(default=3, ge=1)
    outcome_breaches: int = Field(default=1, ge=1)
    outcome_of_checks: int = Field(default=1, ge=1)
    model_age_days_max: int | None = Field(default=365, ge=1)
    cooldown_days: int = Field(default=14, ge=0)
    retrainings_per_month: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _breaches_fit(self) -> MonitoringPolicy:
        if self.breaches > self.of_checks or self.outcome_breaches > self.outcome_of_checks:
            raise ValueError("breaches must not be more than of_checks, nor outcome_breaches than outcome_of_checks")
        return self

    def heeds(self, evidence: Literal["drift", "outcomes"]) -> bool:
        """Whether this kind of evidence may retrain."""
        return self.policy in {"drift": ("own", "drift"), "outcomes": ("own", "outcomes", "recalibrate")}[evidence]

    @property
    def calendar_days(self) -> int | None:
        """Days from retraining to retraining where the calendar decides, else None."""
        return int(self.policy.split("_")[1]) if self.policy.startswith("every_") else None
