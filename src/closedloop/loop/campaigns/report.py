"""The result of a campaign: whether its outcomes are known, the effect, and the picture of it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from closedloop.core.actions.effect import Effect, measure_effect, measure_groups
from closedloop.errors import DataError, count_noun
from closedloop.store.actions import Actions, Campaign

if TYPE_CHECKING:
    import pandas as pd

OUTCOMES_SHARE_MIN = 0.95


class Report(NamedTuple):
    """A campaign's effect, of all its customers and by group; None where it ``waits``, which says for what."""

    campaign: Campaign
    effect: Effect | None
    groups: Mapping[str, Mapping[str, Effect]]
    unknown: int
    waits: str | None


def report_campaign(actions: Actions, campaign: Campaign, *, as_of: dt.datetime) -> Report:
    """Compare the arms of a campaign, if the horizon of its customers has closed by ``as_of``."""
    if as_of < campaign.closes_at:
        waits = f"too early: the outcomes are known from {campaign.closes_at:%Y-%m-%d} on"
        return Report(campaign, None, {}, campaign.treated + campaign.held_out, waits)
    results = actions.read_results(campaign)
    unknown = int(results["outcome"].isna().sum())
    if not has_outcomes(results):
        waits = (
            f"too early: {unknown:,} of {count_noun(len(results), 'customer')} have no outcome yet; store them with "
            f"`closedloop outcomes --as-of {as_of:%Y-%m-%d}`"
        )
        return Report(campaign, None, {}, unknown, waits)
    effect = measure_effect(results, offer_cost=campaign.offer_cost)
    return Report(campaign, effect, measure_groups(results), unknown, None)


def has_outcomes(results: pd.DataFrame) -> bool:
    """Whether so few of a campaign's customers have no outcome that they may be left out."""
    return bool(results["outcome"].isna().sum() <= (1 - OUTCOMES_SHARE_MIN) * len(results))


def find_campaign(actions: Actions, model_name: str, *, as_of: dt.datetime, started: dt.datetime | None) -> Campaign:
    """The campaign that started on a date, else the newest one that had by ``as_of``.

    Raises
    ------
    DataError
        If there is none.
    """
    found = actions.list_campaigns(model_name, until=as_of)
    chosen = [one for one in found if started in (None, one.as_of)]
    if chosen:
        return chosen[0]
    dates = ", ".join(f"{one.as_of:%Y-%m-%d}" for one in found) or "none"
    wanted = "" if started is None else f" of {started:%Y-%m-%d}"
    raise DataError(
        f"{model_name}: there is no campaign{wanted} by {as_of:%Y-%m-%d} (there is: {dates}); "
        "`closedloop campaign start` starts one"
    )


def draw_report(report: Report, folder: Path) -> Path | None:
    """The effect by tenth of the score and by segment, as a picture; None where there is nothing to draw."""
    from closedloop.adapters.matplotlib import draw_effects

    if report.effect is None or report.effect.effect is None:
        return None
    path = folder / "effect.png"
    draw_effects(path, {"all": {"": report.effect}, **report.groups})
    return path
