"""The limits of the model gates, as a data set's config gives them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class GateLimits(BaseModel):
    """The limits that a model must keep to be registered; the defaults are those of the shop data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    accuracy_min: float = Field(0.85, ge=0, le=1, description="Accuracy on test rows is at least this.")
    f1_weighted_min: float = Field(0.80, ge=0, le=1, description="Weighted F1 on test rows is at least this.")
    accuracy_max: float = Field(
        0.99, ge=0, le=1.01, description="Accuracy is below this: a better one is a leak until proved otherwise."
    )
    roc_auc_min: float = Field(0.75, ge=0, le=1, description="The AUC interval's lower end is at least this.")
    roc_auc_max: float | None = Field(
        None, ge=0.5, le=1.01, description="AUC is below this (too good to be true); null: not judged."
    )
    group_accuracy_min: float = Field(0.75, ge=0, le=1, description="Accuracy of the worst group is at least this.")
    group_rows_min: int = Field(200, ge=1, description="Groups with fewer test rows than this are not judged.")
    noise_scale: float = Field(
        0.01, ge=0, description="Noise added to each numeric feature, in its standard deviations."
    )
    noise_agreement_min: float = Field(
        0.95, ge=0, le=1, description="Share of decisions that noise leaves as they are is at least this."
    )
    rate_difference_max: float = Field(
        0.2, ge=0, le=1, description="Predicted and actual churn rate differ by at most this."
    )
    calibration_error_max: float = Field(
        0.05, ge=0, le=1, description="Expected calibration error (10 equal-count bins) is at most this."
    )
    latency_ratio_max: float = Field(
        1.0, gt=0, description="Scoring one row with ONNX takes at most this many times scikit-learn's time."
    )
    parity_max: float = Field(
        1e-4, ge=0, description="Scores of the ONNX and the scikit-learn model differ by at most this."
    )
    cutoff_mismatches_max: int = Field(
        0, ge=0, description="Rows whose features differ from those recomputed from events before the snapshot."
    )
    trivial_margin_min: float = Field(
        0.01,
        ge=0,
        le=1,
        description="The share of the best trivial rule's log loss that is saved exceeds this, at the interval's lower "
        "end.",
    )
    average_precision_gain_min: float = Field(
        0.0, ge=0, le=1, description="Average precision exceeds the churn rate by more than this, at the lower end."
    )
    lift_min: float = Field(
        1.0,
        ge=0,
        description="The tenth with the highest scores has more than this many times the churn rate of all, at the "
        "lower end.",
    )
    single_column_auc_max: float = Field(
        0.95,
        ge=0.5,
        le=1.01,
        description="No column alone ranks the label with this cross-fitted AUC or more.",
    )
    column_pair_auc_max: float = Field(
        0.99,
        ge=0.5,
        le=1.01,
        description="No two columns together do; asked only of a model beyond the limit above.",
    )
    single_column_allowed: tuple[str, ...] = Field(
        (), description="Features that may rank the label alone: what they say is known at the time of a prediction."
    )
    class_rows_min: int = Field(10, ge=1, description="Test rows of the smaller class, below which nothing is proved.")
    rare_class_rate_max: float = Field(
        0.1,
        ge=0,
        le=0.5,
        description="Up to this share of the smaller class, accuracy and weighted F1 are reported and not judged.",
    )
