"""The model card: what a model finds, by which columns, and what the gates said, on one page that opens offline."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from closedloop.adapters.mlflow import CHALLENGER, CHAMPION
from closedloop.config.dataset import DatasetConfig
from closedloop.config.layout import Layout
from closedloop.config.params import Params
from closedloop.contract import MODEL_FILE
from closedloop.core.evaluation.metrics import rank_top
from closedloop.core.monitoring.policy import describe_policy
from closedloop.errors import count_noun
from closedloop.stages.parts.candidate import Candidate
from closedloop.stages.parts.measure import Measured, choose_examples, measure_importance, open_reasons
from closedloop.tabular.tables import count_rows

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking

IMPORTANCE_SHOWN = 15
LIST_SHARES, LIST_CUSTOMERS_MIN = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3), 10
# Name, caption and alternative text of each picture, the most useful first.
PICTURES = {
    "lift": (
        "Who to call first",
        "The customers in ten equal parts, the highest scores first. A bar says which share of the part left; the "
        "dashed line is the share of all customers.",
    ),
    "calibration": (
        "Whether a score means what it says",
        "Customers in ten equal parts by score: mean score against the share that left. On the dotted diagonal both "
        "are the same.",
    ),
    "confusion": ("What the decisions were worth", "Customers by what was decided and what happened."),
    "precision_recall": (
        "The price of finding more",
        "Recall is the share of leavers that is found, precision the share of alarms that is right. The dashed line is "
        "a model that guesses; the point is the threshold in use.",
    ),
    "roc": (
        "How well leavers rank above stayers",
        "The share of leavers found against the share of stayers called by mistake. The dashed diagonal is a model "
        "that guesses; the point is the threshold in use.",
    ),
}

MONEY_PICTURES = {
    "profit": (
        "What a threshold earns",
        "Profit of offers to all customers at or above a threshold, spread over all customers, with its interval. The "
        "dashed line is the threshold in use.",
    ),
    "capacity": (
        "What a number of offers earns",
        "Profit of offers to the customers with the highest expected profit, spread over all customers, with its "
        "interval. The dashed line is the share that the model offers to.",
    ),
}


def render_card(
    params: Params,
    dataset: DatasetConfig,
    candidate: Candidate,
    measured: Measured,
    verdict: dict[str, Any],
    standing: str,
    layout: Layout,
    pictures: Path,
) -> str:
    """Return the page with its pictures inside; ``pictures`` is the folder of those of the test rows."""
    from closedloop.adapters.jinja import render_page

    shown = PICTURES | (MONEY_PICTURES if measured.money else {})
    images = {name: base64.b64encode((pictures / f"{name}.png").read_bytes()).decode() for name in shown}
    explainer = open_reasons(layout.model / MODEL_FILE, candidate)
    importance = [] if explainer is None else measure_importance(explainer, candidate, params.seed)
    return render_page(
        "model_card.html",
        params=params,
        dataset=dataset,
        contract=candidate.contract,
        measured=measured,
        verdict=verdict,
        standing=standing,
        compared=describe_champion(verdict),
        found=summarise_lists(candidate.labels, candidate.scores, candidate.contract.threshold),
        lists=measure_lists(candidate.labels, candidate.scores),
        importance=importance[:IMPORTANCE_SHOWN],
        examples=[] if explainer is None else choose_examples(explainer, candidate),
        pictures=[(images[name], *words) for name, words in shown.items()],
        next_period=candidate.next_period,
        draw=candidate.draw,
        rows={part: count_rows(layout.training / f"{part}.parquet") for part in ("train", "validation", "test")},
    )


def summarise_lists(labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float) -> dict[str, float]:
    """The churners found by calling the highest scores.

    Returns
    -------
    dict
        ``customers``, ``leavers``, ``alarms``, ``right`` (alarms that are right): counts. ``tenth`` and ``fifth``: the
        share of the leavers among that part of the customers, those with the highest scores.

    Examples
    --------
    >>> found = summarise_lists([0] * 8 + [1] * 2, [0.1] * 8 + [0.9, 0.8], 0.85)
    >>> found["alarms"], found["right"], found["tenth"], found["fifth"]
    (1, 1, 0.5, 1.0)
    """
    left, decided = np.asarray(labels).astype(bool), np.asarray(scores) >= threshold
    every = np.ones(len(left))
    shares = {name: rank_top(left, scores, share)[1](every) * share for name, share in (("tenth", 0.1), ("fifth", 0.2))}
    counts = {"customers": len(left), "leavers": left.sum(), "alarms": decided.sum(), "right": (left & decided).sum()}
    return {name: int(count) for name, count in counts.items()} | {
        name: round(float(share), 6) for name, share in shares.items()
    }


def measure_lists(labels: npt.ArrayLike, scores: npt.ArrayLike) -> list[dict[str, float]]:
    """The churners on lists of several sizes, the highest scores first; those below 10 customers are left out.

    Returns
    -------
    list of dict
        ``share`` of all customers, ``customers`` on the list, ``right``: the share of these that left, ``found``: the
        share of all leavers that stand on it.

    Examples
    --------
    >>> lists = measure_lists([1] * 15 + [0] * 85, [0.9] * 10 + [0.5] * 10 + [0.1] * 80)
    >>> lists[:2]  # doctest: +NORMALIZE_WHITESPACE
    [{'share': 0.1, 'customers': 10, 'right': 1.0, 'found': 0.666667},
     {'share': 0.2, 'customers': 20, 'right': 0.75, 'found': 1.0}]
    """
    left = np.asarray(labels).astype(bool)
    every, lists = np.ones(len(left)), []
    for share in LIST_SHARES:
        customers = round(share * len(left))
        if customers >= LIST_CUSTOMERS_MIN and left.any():
            lift = rank_top(left, scores, share)[1](every)
            right, found = round(float(lift * left.mean()), 6), round(float(lift * share), 6)
            lists.append({"share": share, "customers": customers, "right": right, "found": found})
    return lists


def describe_standing(
    tracking: Tracking, folder_sha256: str, verdict: dict[str, Any], policy: str, *, auto_promote: bool
) -> str:
    """Version, alias, and the policy by which the model is retrained."""
    version = _describe_version(tracking, folder_sha256, verdict, auto_promote=auto_promote)
    return f"{version}; {describe_policy(policy)} (monitoring.policy: {policy})"


def _describe_version(tracking: Tracking, folder_sha256: str, verdict: dict[str, Any], *, auto_promote: bool) -> str:
    """Version and alias of the model: what it has, or what it gets when it is registered, which follows."""
    version = tracking.find_version(folder_sha256)
    if version is None and not verdict["passed"]:
        return "no version: it is not registered"
    if version is None:
        won = verdict["champion"] is None or (verdict["comparison"] or {}).get("verdict") == "win"
        alias = CHAMPION if auto_promote and won else CHALLENGER
        return f"version {tracking.read_newest_version() + 1}, {alias} as soon as it is registered"
    for alias in (CHAMPION, CHALLENGER):
        holder = tracking.read_alias(alias)
        if holder is not None and holder.version == version.version:
            return f"version {version.version}, {alias}"
    return f"version {version.version}, without an alias"


def describe_champion(verdict: dict[str, Any]) -> str:
    """The comparison with the champion in words."""
    champion, comparison = verdict["champion"], verdict["comparison"]
    if champion is None:
        return "No champion yet"
    version = f"version {champion['version']}"
    if champion.get("is_candidate"):
        return f"This model is the champion ({version})"
    if comparison is None:
        return f"Not compared with {version}: {champion['not_compared']}; the champion stays"
    words = {"win": "Won against", "lose": "Lost to", "inconclusive": "Neither better nor worse than"}
    return f"{words[comparison['verdict']]} {version}: {comparison['reason']}"


def describe_run(
    dataset: DatasetConfig, candidate: Candidate, measured: Measured, verdict: dict[str, Any], run_id: str
) -> str:
    """Describe the run and its version for MLflow, in Markdown: model, data, figures, pictures, card, promotion."""
    contract, figures = candidate.contract, measured.figures
    found = summarise_lists(candidate.labels, candidate.scores, contract.threshold)
    alarms = f"{100 * found['right'] / found['alarms']:.0f}% of the alarms are right" if found["alarms"] else "no alarm"
    address = f"get-artifact?run_uuid={run_id}&path=evaluation/figures"
    shown = " ".join(f"![{PICTURES[name][0]}]({address}/{name}.png)" for name in ("lift", "calibration"))
    return (
        f"**Model**: {contract.model_name}, {contract.model_type}. {dataset.description}\n\n"
        f"**Data**: {contract.lineage.dataset} as known at {contract.lineage.as_of}; "
        f"{count_noun(len(candidate.train), 'row')} to train, {len(candidate.test):,} to test; "
        f"commit {contract.lineage.git_commit[:12]}.\n\n"
        f"**Figures** on test rows: ROC AUC {figures['roc_auc']:.3f}, log loss {figures['log_loss']:.4f}, "
        f"accuracy {figures['accuracy']:.3f}. The 10% with the highest scores hold {100 * found['tenth']:.0f}% "
        f"of those who left, the highest 20% hold {100 * found['fifth']:.0f}%; {alarms}. "
        f"Gates: {'passed' if verdict['passed'] else 'failed'}. {describe_champion(verdict)}.\n\n"
        f"{shown}\n\n"
        "**Model card**: `evaluation/model_card.html` among this run's artifacts, and `reports/model_card.html` in the "
        "project.\n\n"
        "**Promotion** goes through `closedloop release start VERSION`. An alias that is changed here by hand does not "
        "change what serves."
    )
