"""Pictures show what they are about, whatever it is called."""

from __future__ import annotations

import datetime as dt
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.dates import date2num
from matplotlib.image import imread

from closedloop.adapters.matplotlib import draw_importance, draw_loop
from tests.integration.test_pages import tell_story


def draw(path: Path, *names: str) -> tuple[int, int]:
    """Width and height of the picture of the importance of columns with these names."""
    values = {"mean": range(1, len(names) + 1), "standard_deviation": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where names leave no room, and cuts them
        draw_importance(path, pd.DataFrame({"feature": names, **values}))
    height, width, _ = imread(path).shape
    return width, height


@pytest.mark.parametrize("length", [20, 60, 150])
def test_long_names_are_not_cut(tmp_path: Path, length: int) -> None:
    short = draw(tmp_path / "short.png", "age", "plan")
    name = ("card_category_contacts_count_12_mon_" * 5)[:length]
    long = draw(tmp_path / "long.png", f"{name}_1", f"{name}_2")
    assert long[0] > short[0]
    assert (long[1] > short[1]) == (length > 40)


def test_a_name_in_signs_that_no_font_has_is_drawn_without_a_warning(tmp_path: Path) -> None:
    assert draw(tmp_path / "importance.png", "月額料金", "age") > (0, 0)


def test_a_promotion_in_the_loop_is_told_by_its_shape_and_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plt, "close", lambda _: None)
    draw_loop(tmp_path / "loop.png", tell_story())
    axes = plt.gcf().axes
    monkeypatch.undo()
    day = date2num(dt.date(2024, 6, 20))
    for one in axes:
        (mark,) = [line for line in one.lines if line.get_marker() == "^" and len(line.get_xdata())]
        assert {float(date2num(at)) for at in mark.get_xdata()} == {day}
    legend = axes[0].get_legend()
    assert legend is not None
    assert "a retrained version is promoted" in [text.get_text() for text in legend.get_texts()]
    plt.close("all")
