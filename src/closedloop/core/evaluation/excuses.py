"""Which missed gates stop no challenger: those that the champion misses too on the same rows, with no better figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from closedloop.core.evaluation.gates import GateResult, format_pair

if TYPE_CHECKING:
    from closedloop.core.evaluation.comparison import Comparison

# How good a model is. Leaks, too few rows, groups of customers, noise and the export have no excuse: there a champion's
# fault does not make the challenger's smaller. Nor has profit: it compares with the champion already.
EXCUSABLE = frozenset(
    {
        "accuracy",
        "f1_weighted",
        "roc_auc",
        "average_precision",
        "lift",
        "better_than_trivial",
        "trivial_accuracy",
        "class_balance",
        "calibration",
    }
)


def excuse_beside_champion(
    results: Iterable[GateResult], champions: Sequence[GateResult], comparison: Comparison | None
) -> list[GateResult]:
    """The results; where the challenger wins, a gate that the champion misses too stops nothing.

    To refuse such a challenger would keep a model in force that misses the same limit and loses to it, which protects
    no customer. A challenger whose figure is worse than the champion's is not excused, whatever its log loss.

    Parameters
    ----------
    champions
        The champion's results, of the same gates on the same rows; empty: none was measured.
    comparison
        Of both models on these rows; None: there is no champion, and every limit holds.

    Examples
    --------
    >>> from closedloop.core.evaluation.gates import gate_roc_auc
    >>> from types import SimpleNamespace
    >>> won = SimpleNamespace(verdict="win")
    >>> [found] = excuse_beside_champion([gate_roc_auc(0.74, 0.75)], [gate_roc_auc(0.69, 0.75)], won)
    >>> found.passed, found.blocking
    (False, False)
    """
    if comparison is None or comparison.verdict != "win":
        return list(results)
    of_champion = {one.name: one for one in champions}
    return [_excuse(one, of_champion.get(one.name)) for one in results]


def describe_excused(names: Sequence[str]) -> str:
    """The journal's words on the gates that stop nothing because of the champion; empty without any.

    >>> describe_excused(["roc_auc"])
    'roc_auc is missed and stops nothing: the champion misses it too, and loses to this version'
    """
    if not names:
        return ""
    one, words = len(names) == 1, ", ".join(names)
    verbs, them = ("is missed and stops", "it") if one else ("are missed and stop", "them")
    return f"{words} {verbs} nothing: the champion misses {them} too, and loses to this version"


def _excuse(result: GateResult, champion: GateResult | None) -> GateResult:
    missed = result.blocking and not result.passed and result.name in EXCUSABLE
    if not missed or champion is None or champion.passed or not _is_no_worse(result, champion):
        return result
    figure, _ = format_pair(champion.figure, champion.limit)
    return result.excuse(f"the champion misses it too ({figure}), and loses to this version")


def _is_no_worse(result: GateResult, champion: GateResult) -> bool:
    """Whether the figure is at least as good as the champion's; one that could not be measured is not."""
    if math.isnan(result.figure) or math.isnan(champion.figure):
        return False
    higher_is_better = result.rule in (">=", ">")
    return result.figure >= champion.figure if higher_is_better else result.figure <= champion.figure
