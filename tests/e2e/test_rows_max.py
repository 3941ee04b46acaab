"""A bound of the training rows: the stages draw, weigh and train within it, and the card says what that costs."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from tests.conftest import Project

pytestmark = pytest.mark.thorough
BOUND = 6_000


def test_the_stages_draw_within_the_bound_and_the_card_says_what_it_costs(shop_copy: Project) -> None:
    parts = ("train", "validation", "test")
    whole = {part: pd.read_parquet(shop_copy.root / f"data/training/{part}.parquet") for part in parts}
    shop_copy.change_params({"split": {"rows_max": BOUND}})
    for stage in ("training-set", "train", "evaluate"):
        shop_copy.run(stage)
    drawn = {part: pd.read_parquet(shop_copy.root / f"data/training/{part}.parquet") for part in parts}
    assert {part: len(rows) for part, rows in drawn.items()} == {
        part: min(BOUND, len(rows)) for part, rows in whole.items()
    }
    weights = drawn["train"].pop("row_weight")
    assert weights.sum() == pytest.approx(len(whole["train"]))
    keys = ["customer_id", "event_timestamp"]
    for part, rows in drawn.items():
        assert list(rows.columns) == list(whole[part].columns)
        assert rows[keys].merge(whole[part], on=keys, how="inner").equals(rows.reset_index(drop=True))
    assert shop_copy.read_json("metrics/training_set.json")["known_rows"] == {
        part: len(rows) for part, rows in whole.items()
    }
    draw = shop_copy.read_json("metrics/gates.json")["draw"]
    assert (draw["rows"], draw["known_rows"]) == (BOUND, len(whole["train"]))
    assert draw["cost"][1] < draw["cost"][0] < draw["cost"][2]
    card = (shop_copy.root / "reports/model_card.html").read_text(encoding="utf-8")
    assert f"{BOUND:,} of {len(whole['train']):,} training rows were drawn" in card
    assert re.search(r"All rows would change the log loss by about [+-]0\.\d{4}\s+\(95%: [+-]0\.\d{4} to", card)


def test_without_a_bound_the_card_has_no_draw(small_shop: Project) -> None:
    assert small_shop.read_json("metrics/gates.json")["draw"] is None
    assert "What the draw of rows costs" not in (small_shop.root / "reports/model_card.html").read_text(
        encoding="utf-8"
    )
    assert "known_rows" not in small_shop.read_json("metrics/training_set.json")
