"""Pictures show what they are about, whatever it is called."""

from __future__ import annotations

import warnings
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.image import imread

from closedloop.adapters.matplotlib import draw_importance


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
