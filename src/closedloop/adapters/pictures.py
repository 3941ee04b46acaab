"""Matplotlib: the pictures of a model, as PNG files without dates or versions in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.core.charts import tabulate_lift
from closedloop.core.metrics import CALIBRATION_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, ACCENT, SECOND, QUIET = "#1f2933", "#0b7285", "#e8590c", "#adb5bd"


def draw_scores(folder: Path, labels: np.ndarray, scores: np.ndarray, threshold: float, *, rows_name: str) -> None:
    """ROC, precision-recall, calibration, confusion and lift of scored rows, one PNG each.

    Parameters
    ----------
    labels, scores
        bool and probability of churn in [0, 1], shape (n,).
    rows_name
        Which rows they are, for the titles.
    """
    from sklearn.calibration import CalibrationDisplay
    from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

    def confusion(axes: Axes) -> None:
        names = ("stayed", "churned")
        ConfusionMatrixDisplay.from_predictions(
            labels, scores >= threshold, display_labels=names, values_format=",", cmap="GnBu", colorbar=False, ax=axes
        )
        axes.set(xlabel="predicted", ylabel="actual", title=f"Decisions at threshold {threshold:.2f} ({rows_name})")

    def calibration(axes: Axes) -> None:
        CalibrationDisplay.from_predictions(
            labels, scores, n_bins=CALIBRATION_BINS, strategy="quantile", name="model", ax=axes
        )
        axes.set(xlabel="mean score of the bin", ylabel="share that churned", title=f"Calibration ({rows_name})")

    def roc(axes: Axes) -> None:
        RocCurveDisplay.from_predictions(labels, scores, name="model", plot_chance_level=True, ax=axes)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", title=f"ROC curve ({rows_name})")

    def precision_recall(axes: Axes) -> None:
        PrecisionRecallDisplay.from_predictions(labels, scores, name="model", plot_chance_level=True, ax=axes)
        axes.set(xlabel="recall", ylabel="precision", title=f"Precision and recall ({rows_name})")

    def lift(axes: Axes) -> None:
        table = tabulate_lift(labels, scores)
        axes.bar(table["decile"], table["lift"])
        axes.axhline(1, color=QUIET, linestyle="--")
        axes.set(xlabel="decile by score (1 = highest)", ylabel="churn rate over average", title=f"Lift ({rows_name})")
        axes.set_xticks(table["decile"])

    for draw in (roc, precision_recall, calibration, confusion, lift):
        with _open_figure(folder / f"{draw.__name__}.png") as (axes,):
            draw(axes)


def draw_importance(path: Path, importance: pd.DataFrame) -> None:
    """Permutation importance: the 20 largest of columns feature, mean, standard_deviation (drop in ROC AUC)."""
    top = importance.sort_values("mean").tail(20)
    with _open_figure(path, figsize=(6, 2 + 0.25 * len(top))) as (axes,):
        axes.barh(top["feature"], top["mean"], xerr=top["standard_deviation"], ecolor=INK)
        axes.set(xlabel="drop in ROC AUC when shuffled", title="Feature importance (permutation)")


def draw_training_curve(path: Path, curve: pd.DataFrame) -> None:
    """Log loss of train and validation rows over the steps of ``core.curves.trace_training``."""
    with _open_figure(path) as (axes,):
        for part in ("validation", "train"):
            axes.plot(curve["step"], curve[f"{part}_log_loss"], label=part)
        axes.set(xlabel="trees (rows for a linear model)", ylabel="log loss", title="Training curve")
        axes.legend(frameon=False)


@contextmanager
def _open_figure(path: Path, rows: int = 1, **options: Any) -> Iterator[Any]:
    """The axes of a picture, below each other, to draw on; it is saved at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[str, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
    style["axes.prop_cycle"] = plt.cycler(color=[ACCENT, SECOND, QUIET])
    with plt.rc_context(style):
        figure, axes = plt.subplots(rows, squeeze=False, layout="constrained", **{"figsize": (6, 4.2), **options})
        yield tuple(axes[:, 0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def draw_loop(path: Path, report: dict[str, Any]) -> Path:
    """Both arms' log loss and ROC AUC, the drift statistic, and the main events of a replay, over its days."""
    import datetime as dt

    def day(text: Any) -> dt.date:
        return dt.date.fromisoformat(str(text))

    marks = {
        "bad offered": ("X", SECOND),
        "rolled back": ("v", "#c92a2a"),
        "alert": ("d", "#f08c00"),
        "retrain": ("D", "#f08c00"),
        "refused": ("s", "#868e96"),
        "retrained": ("o", ACCENT),
        "promoted": ("^", "#2b8a3e"),
    }
    shape: dict[str, Any] = {"figsize": (11, 10), "sharex": True, "height_ratios": [3, 3, 2, 2.4]}
    with _open_figure(path, 4, **shape) as (loss, auc, drift, events):
        loss.figure.suptitle(
            f"A frozen model and a closed loop on the same customers: {report['dataset']}", fontsize=14
        )
        changes = [one for one in report["regime_changes"] if day(one["at"]) >= day(report["days"][0])]
        days = [day(arm["snapshot"]) for arm in report["arms"]]
        for axes, figure_name, title in (
            (loss, "log_loss", "log loss\n(lower is better)"),
            (auc, "roc_auc", "ROC AUC"),
        ):
            for arm, colour in (("frozen", SECOND), ("closed", ACCENT)):
                label = {"frozen": "frozen at its first model", "closed": "closed loop"}[arm]
                values = [found[arm][figure_name] for found in report["arms"]]
                dashes, order = ("--", 3) if arm == "frozen" else ("-", 2)  # where they are the same, both are seen
                axes.plot(days, values, color=colour, marker="o", markersize=4, ls=dashes, zorder=order, label=label)
            axes.set_ylabel(title)
        loss.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
        judged = [tick for tick in report["ticks"] if tick.get("drift") is not None]
        drift.bar([day(tick["at"]) for tick in judged], [tick["drift"] for tick in judged], width=9, color=QUIET)
        drift.set_ylabel("largest drift\nof a feature")
        shown = [kind for kind in marks if any(event["kind"] == kind for event in report["events"])]
        for place, kind in enumerate(reversed(shown)):
            marker, colour = marks[kind]
            at = [day(event["at"]) for event in report["events"] if event["kind"] == kind]
            events.scatter(at, [place] * len(at), marker=marker, color=colour, s=70, zorder=3)
        events.set_yticks(range(len(shown)), list(reversed(shown)))
        events.set_ylim(-0.6, max(len(shown), 1) - 0.4)
        events.grid(axis="y", color="#e9ecef")
        for axes in (loss, auc, drift, events):
            for change in changes:
                axes.axvline(day(change["at"]), color=INK, linestyle=":", linewidth=1)
            for event in report["events"]:
                if event["kind"] == "promoted":
                    axes.axvline(day(event["at"]), color="#2b8a3e", linewidth=1, alpha=0.6)
        for change in changes:
            words = f" {change['kind']} change"
            loss.annotate(words, (day(change["at"]), 1.01), xycoords=("data", "axes fraction"), fontsize=9, ha="left")
        events.set_xlabel("simulated day; a snapshot's outcomes are known a horizon later")
    return path
