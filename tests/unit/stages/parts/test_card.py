"""What the model card says in words: lists and alarms by hand, and every end of a comparison."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from closedloop.stages.parts.card import describe_champion, summarise_lists


def test_lists_hold_the_leavers_with_the_highest_scores() -> None:
    labels = np.array([1, 0, 1, 0, 0, 0, 0, 1, 0, 1])
    scores = np.linspace(0.95, 0.05, 10)
    found = summarise_lists(labels, scores, 0.7)
    assert found == {"customers": 10, "leavers": 4, "alarms": 3, "right": 2, "tenth": 0.25, "fifth": 0.25}


def test_customers_of_equal_score_count_in_equal_parts() -> None:
    assert summarise_lists([0, 1] * 10, [0.5] * 20, 0.6) == {
        "customers": 20, "leavers": 10, "alarms": 0, "right": 0, "tenth": 0.1, "fifth": 0.2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("champion", "verdict", "said"),
    [
        (None, None, "No champion yet"),
        ({"version": "1", "is_candidate": True}, None, "This model is the champion (version 1)"),
        ({"version": "1", "not_compared": "no rows"}, None, "Not compared with version 1: no rows; the champion stays"),
        ({"version": "1"}, "lose", "Lost to version 1: why"),
        ({"version": "2"}, "win", "Won against version 2: why"),
        ({"version": "2"}, "inconclusive", "Neither better nor worse than version 2: why"),
    ],
)
def test_the_comparison_is_told_in_words(champion: Any, verdict: str | None, said: str) -> None:
    comparison = None if verdict is None else {"verdict": verdict, "reason": "why"}
    assert describe_champion({"champion": champion, "comparison": comparison}) == said
