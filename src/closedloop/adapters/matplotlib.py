"""Matplotlib: draw the pictures of a model as PNG files without dates or versions in them."""

from __future__ import annotations

import datetime as dt
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from closedloop.core.evaluation.curves import tabulate_lift
from closedloop.core.evaluation.metrics import CALIBRATION_BINS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from closedloop.core.actions.effect import Effect

NAME_WIDTH = 40
# For names whose signs Matplotlib's own font lacks, where one of these is installed.
MORE_FONTS = ("Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "WenQuanYi Zen Hei", "Noto Sans Arabic")
INK, ACCENT, SECOND, QUIET = "#1f2933", "#0b7285", "#e8590c", "#adb5bd"
RED, GREEN = "#c92a2a", "#2b8a3e"
POLICY_COLOURS = (INK, SECOND, "#f08c00", ACCENT, "#862e9c", GREEN)


def draw_scores(folder: Path, labels: np.ndarray, scores: np.ndarray, threshold: float, *, rows_name: str) -> None:
    """ROC, precision-recall, calibration, confusion and churn rate by score of scored rows, one PNG each.

    Parameters
    ----------
    labels, scores
        bool and probability of churn in [0, 1], shape (n,).
    rows_name
        Which rows they are, for the titles.
    """
    pictures = {
        "roc": (_draw_roc, "ROC curve"),
        "precision_recall": (_draw_precision_recall, "Precision and recall"),
        "calibration": (_draw_calibration, "Calibration"),
        "confusion": (_draw_confusion, f"Decisions at threshold {threshold:.2f}"),
        "lift": (_draw_lift, "Churn rate by score"),
    }
    for name, (draw, title) in pictures.items():
        with _open_figure(folder / f"{name}.png") as (axes,):
            draw(axes, labels, scores, threshold)
            axes.set_title(f"{title} ({rows_name})")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=9)


def _draw_roc(axes: Axes, labels: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    from sklearn.metrics import RocCurveDisplay

    RocCurveDisplay.from_predictions(labels, scores, name="model", plot_chance_level=True, ax=axes)
    decided = scores >= threshold
    _mark_threshold(axes, decided[~labels].mean(), decided[labels].mean(), threshold)
    axes.set(xlabel="false positive rate", ylabel="true positive rate")


def _draw_precision_recall(axes: Axes, labels: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    from sklearn.metrics import PrecisionRecallDisplay

    PrecisionRecallDisplay.from_predictions(labels, scores, name="model", plot_chance_level=True, ax=axes)
    decided = scores >= threshold
    if decided.any():
        _mark_threshold(axes, decided[labels].mean(), labels[decided].mean(), threshold)
    axes.set(xlabel="recall", ylabel="precision")


def _draw_calibration(axes: Axes, labels: np.ndarray, scores: np.ndarray, _: float) -> None:
    from sklearn.calibration import CalibrationDisplay

    CalibrationDisplay.from_predictions(
        labels, scores, n_bins=CALIBRATION_BINS, strategy="quantile", name="model", ax=axes
    )
    axes.set(xlabel="mean score of the bin", ylabel="share that churned")


def _draw_confusion(axes: Axes, labels: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    from sklearn.metrics import ConfusionMatrixDisplay

    names = ("stayed", "churned")
    ConfusionMatrixDisplay.from_predictions(
        labels, scores >= threshold, display_labels=names, values_format=",", cmap="GnBu", colorbar=False, ax=axes
    )
    axes.set(xlabel="predicted", ylabel="actual")


def _draw_lift(axes: Axes, labels: np.ndarray, scores: np.ndarray, _: float) -> None:
    table, mean = tabulate_lift(labels, scores), 100 * labels.mean()
    axes.bar_label(axes.bar(table["decile"], 100 * table["churn_rate"]), fmt="%.0f", padding=2)
    axes.axhline(mean, color=INK, linestyle="--", label=f"all customers: {mean:.0f}%")
    axes.set(xlabel="tenth of the customers (1 = highest scores)", ylabel="share that left in %")
    axes.set_xticks(table["decile"])


def _mark_threshold(axes: Axes, x: float, y: float, threshold: float) -> None:
    axes.plot([x], [y], "o", color=SECOND, label=f"threshold {threshold:.2f}", zorder=4)


def draw_importance(path: Path, importance: pd.DataFrame) -> None:
    """Permutation importance: the 20 largest of columns feature, mean, standard_deviation (drop in ROC AUC).

    The picture's size follows the longest name, so that all names are readable in full.
    """
    top = importance.sort_values("mean").tail(20)
    names = [textwrap.wrap(name, NAME_WIDTH) for name in top["feature"]]
    lines, longest = sum(map(len, names)), max(len(line) for name in names for line in name)
    with _open_figure(path, figsize=(4.5 + 0.09 * longest, 2 + 0.25 * lines)) as (axes,):
        axes.barh(top["feature"], top["mean"], xerr=top["standard_deviation"], ecolor=INK)
        axes.set_yticks(range(len(top)), ["\n".join(name) for name in names])
        axes.set(xlabel="drop in ROC AUC when shuffled", title="Feature importance (permutation)")


def draw_training_curve(path: Path, curve: pd.DataFrame) -> None:
    """Log loss of train and validation rows over the steps of ``core.curves.trace_training``."""
    with _open_figure(path) as (axes,):
        for part in ("validation", "train"):
            axes.plot(curve["step"], curve[f"{part}_log_loss"], label=part)
        axes.set(xlabel="trees (rows for a linear model)", ylabel="log loss", title="Training curve")
        axes.legend(frameon=False)


def draw_profit(path: Path, curve: pd.DataFrame, column: str, mark: float) -> None:
    """Profit for each customer with its interval over a column, with a line at what is in use.

    Parameters
    ----------
    curve
        From `closedloop.core.evaluation.profit`.
    column
        ``threshold`` or ``offered_share``.
    """
    words = {"threshold": "threshold", "offered_share": "share of the customers who get an offer, best first"}
    with _open_figure(path) as (axes,):
        axes.fill_between(curve[column], curve["low"], curve["high"], color=ACCENT, alpha=0.2, linewidth=0)
        axes.plot(curve[column], curve["profit"], label="profit, with its interval")
        axes.axhline(0, color=INK, linewidth=1)
        axes.axvline(mark, color=SECOND, linestyle="--", label=f"in use: {mark:.2f}")
        axes.set(
            xlabel=words[column],
            ylabel="profit for each customer",
            title=f"Profit by {words[column].split()[0]} (test)",
        )
        axes.legend(frameon=False, fontsize=9)


@contextmanager
def _open_figure(path: Path, rows: int = 1, **options: Any) -> Iterator[Any]:
    """Yield the axes of a picture, one below the other; save the picture at the end of the block."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[str, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
    style["axes.prop_cycle"] = plt.cycler(color=[ACCENT, SECOND, QUIET])
    installed = matplotlib.font_manager.get_font_names()
    style["font.family"] = ["DejaVu Sans", *(name for name in MORE_FONTS if name in installed)]
    with plt.rc_context(style), warnings.catch_warnings():
        # a sign that no font has is drawn as a box; docs/your-data.md names fonts
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure, axes = plt.subplots(rows, squeeze=False, layout="constrained", **{"figsize": (5.2, 3.9), **options})
        yield tuple(axes[:, 0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})
        plt.close(figure)


# Marker and colour of the events of a replay that its picture shows.
MARKS = {
    "campaign": ("P", INK),
    "bad offered": ("X", SECOND),
    "rolled back": ("v", RED),
    "alert": ("d", "#f08c00"),
    "retrain": ("D", "#f08c00"),
    "refused": ("s", "#868e96"),
    "retrained": ("o", ACCENT),
    "promoted": ("^", GREEN),
}


# A promotion is a triangle on a line, in colour and without.
PROMOTION: dict[str, Any] = {"color": GREEN, "marker": MARKS["promoted"][0], "linewidth": 1}


def draw_loop(path: Path, report: dict[str, Any]) -> Path:
    """Both arms' log loss and ROC AUC, the drift statistic, and the main events of a replay, over its days."""
    shape: dict[str, Any] = {"figsize": (5.6, 8.4), "sharex": True, "height_ratios": [3, 3, 2, 2.4]}
    promoted = [_day(event["at"]) for event in report["events"] if event["kind"] == "promoted"]
    with _open_figure(path, 4, **shape) as (loss, auc, drift, events):
        loss.figure.suptitle(f"A frozen model and a closed loop: {report['dataset']}", fontsize=11)
        _draw_arms(loss, report["arms"], "log_loss", "log loss\n(lower is better)", promoted)
        _draw_arms(auc, report["arms"], "roc_auc", "ROC AUC", promoted)
        days = [_day(arm["snapshot"]) for arm in report["arms"]]
        constant = [arm["constant_log_loss"] for arm in report["arms"]]
        loss.plot(days, constant, color=QUIET, marker=".", label="one score for all: the churn rate")
        if promoted:
            loss.plot([], [], **PROMOTION, label="a retrained version is promoted")
        loss.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.08), fontsize=9)
        _draw_drift(drift, report)
        _draw_events(events, report["events"])
        changes = [one for one in report["regime_changes"] if _day(one["at"]) >= _day(report["days"][0])]
        for axes in (loss, auc, drift, events):
            for change in changes:
                axes.axvline(_day(change["at"]), color=INK, linestyle=":", linewidth=1)
            _mark_promotions(axes, promoted)
        for change in changes:
            # upright, since changes may lie close to each other
            place = (_day(change["at"]), 0.03)
            style: dict[str, Any] = {"fontsize": 9, "rotation": 90, "ha": "right", "va": "bottom"}
            auc.annotate(f"{change['kind']} change ", place, xycoords=("data", "axes fraction"), **style)
        events.set_xlabel("simulated day")
        events.tick_params(axis="x", rotation=45)
    return path


def draw_backtest(path: Path, report: dict[str, Any]) -> Path:
    """Log loss of each policy by snapshot with its promotions, and what each is worth against never retraining."""
    days = [_day(text) for text in report["snapshots"]]
    policies, others = report["policies"], [name for name in report["policies"] if name != "never"]
    shape: dict[str, Any] = {"figsize": (6.4, 7.2), "height_ratios": [3, 2]}
    with _open_figure(path, 2, **shape) as (loss, worth):
        for place, (name, own) in enumerate(policies.items()):
            colour, picked = POLICY_COLOURS[place % len(POLICY_COLOURS)], name == report["picked"]
            width = 2.6 if picked else 1.2
            style: dict[str, Any] = {"color": colour, "linewidth": width, "zorder": 3 if picked else 2}
            loss.plot(days, own["log_loss_by_snapshot"], label=f"{name} (picked)" if picked else name, **style)
            at = [_day(event["at"]) for event in own["events"] if event["what"] == "promoted"]
            for day in at:
                loss.axvline(day, color=colour, linewidth=1, alpha=0.5)
        loss.set(ylabel="log loss (lower is better)", title=f"Policies on the history of {report['dataset']}")
        loss.tick_params(axis="x", rotation=45)
        loss.legend(frameon=False, fontsize=9, ncols=2)
        gains = [policies[name]["gain"] for name in others]
        errors = [[one["mean"] - one["low"] for one in gains], [one["high"] - one["mean"] for one in gains]]
        worth.errorbar(
            [one["mean"] for one in gains], range(len(others)), xerr=errors, fmt="o", color=ACCENT, capsize=3
        )
        worth.axvline(0, color=INK, linestyle=":", linewidth=1)
        worth.set_yticks(range(len(others)), others)
        worth.invert_yaxis()
        worth.set_xlabel("log loss saved a prediction against never retraining, with the interval for all together")
    return path


def draw_effects(path: Path, groups: Mapping[str, Mapping[str, Effect]]) -> Path:
    """The effect of a campaign by group, one below the other, with intervals; a group without two arms is left out."""
    shown = [
        (f"{name} {key}".strip(), effect.effect)
        for name, some in groups.items()
        for key, effect in some.items()
        if effect.effect is not None
    ]
    with _open_figure(path, figsize=(6.4, 1.6 + 0.3 * len(shown))) as (axes,):
        for place, (_, one) in enumerate(shown):
            ends = [[100 * (one.value - one.low)], [100 * (one.high - one.value)]]
            colour = GREEN if one.low > 0 else RED if one.high < 0 else INK
            axes.errorbar([100 * one.value], [place], xerr=ends, fmt="o", color=colour, capsize=3)
        axes.axvline(0, color=INK, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(shown)), [name for name, _ in shown])
        axes.invert_yaxis()
        axes.set_xlabel(
            "customers kept of 100 treated, with the 95% interval\ngreen: kept, red: lost, black: undecided"
        )
        axes.set_title("What the campaign changed")
    return path


def _draw_arms(axes: Axes, arms: list[dict[str, Any]], figure_name: str, title: str, promoted: list[Any]) -> None:
    """A line of each arm; that of the closed loop ends at each promotion, since no snapshot lies between."""
    days = [_day(arm["snapshot"]) for arm in arms]
    frozen = [found["frozen"][figure_name] for found in arms]
    closed = [found["closed"][figure_name] for found in arms]
    axes.plot(
        days, frozen, color=SECOND, marker="o", markersize=4, ls="--", zorder=3, label="frozen at its first model"
    )
    versions = [sum(day < snapshot for day in promoted) for snapshot in days]
    for version in sorted(set(versions)):
        own = [place for place, one in enumerate(versions) if one == version]
        label = "closed loop" if version == versions[0] else None
        points = [days[place] for place in own], [closed[place] for place in own]
        axes.plot(*points, color=ACCENT, marker="o", markersize=5, zorder=2, label=label)
    axes.set_ylabel(title)


def _mark_promotions(axes: Axes, days: list[Any]) -> None:
    """A line at each day, with a triangle above the picture's frame."""
    for day in days:
        height = axes.get_xaxis_transform()
        axes.plot([day, day], [0, 1.03], **PROMOTION, markevery=[1], markersize=7, transform=height, clip_on=False)


def _draw_drift(axes: Axes, report: dict[str, Any]) -> None:
    judged = [tick for tick in report["ticks"] if tick.get("drift") is not None]
    axes.bar([_day(tick["at"]) for tick in judged], [tick["drift"] for tick in judged], width=9, color=QUIET)
    axes.axhline(report["drift_limit"], color=RED, linestyle="--", linewidth=1, label="limit of an alarm")
    axes.legend(framealpha=0.9, edgecolor="none", loc="upper left", fontsize=9)
    axes.set_ylabel("largest drift\nof a feature")


def _draw_events(axes: Axes, events: list[dict[str, Any]]) -> None:
    shown = [kind for kind in MARKS if any(event["kind"] == kind for event in events)]
    for place, kind in enumerate(reversed(shown)):
        marker, colour = MARKS[kind]
        at = [_day(event["at"]) for event in events if event["kind"] == kind]
        axes.scatter(at, [place] * len(at), marker=marker, color=colour, s=70, zorder=3)
    axes.set_yticks(range(len(shown)), list(reversed(shown)))
    axes.set_ylim(-0.6, max(len(shown), 1) - 0.4)
    axes.grid(axis="y", color="#e9ecef")


def _day(text: Any) -> Any:  # a date; matplotlib's type stubs do not accept one
    return dt.date.fromisoformat(str(text))
