"""The campaign in a replay of the simulated shop: whom the shop calls, and what came of it."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

from closedloop import bootstrap
from closedloop.config.params import PARAMS_FILE
from closedloop.config.yaml import format_yaml, read_yaml
from closedloop.core.actions.effect import describe_effect
from closedloop.errors import DataError, count_noun
from closedloop.files import write_text
from closedloop.loop.campaigns.report import Report, report_campaign
from closedloop.loop.campaigns.start import CampaignRules, write_list
from closedloop.simulator.regimes import OFFERS_SAVE

FOLDER = Path("calls")
RULES = CampaignRules(capacity=1_000, holdout=0.3)
DAYS, SHARE = 30, 0.4  # of the purchases that a kept customer is worth


class Calls:
    """The replay's one campaign: started once, and reported as soon as its outcomes are known."""

    def __init__(self) -> None:
        self._report: Report | None = None

    def start(self, run: bootstrap.RunContext, now: dt.datetime) -> tuple[str, str, str]:
        """Start the campaign as of the run's date, and leave its list where the shop finds it.

        Returns the event: its kind, what was done, and why. A replay goes on where no customer is worth an offer.
        """
        segment = next(iter(run.dataset.columns.categorical), None)
        try:
            with bootstrap.hold_working_files(run), bootstrap.open_slot(run, None) as slot:
                campaign = bootstrap.build_campaign_start(run, slot, segment=segment, reasons=1)(RULES, now=now)
        except DataError as error:
            return "no campaign", "the shop calls nobody", str(error)
        actions = bootstrap.build_actions(run)
        write_list(campaign, actions.list_actions(campaign), str(FOLDER / f"{run.params.as_of}.parquet"))
        self._report = report_campaign(actions, campaign, as_of=run.params.as_of_at)
        return (
            "campaign",
            f"the shop calls {count_noun(campaign.treated, 'customer')}",
            f"those with the highest expected value; {campaign.held_out:,} more, chosen at random, are left alone",
        )

    def report(self, run: bootstrap.RunContext) -> tuple[str, str] | None:
        """The campaign's effect, told once: as soon as it is known."""
        if self._report is None or self._report.effect is not None:
            return None
        self._report = report_campaign(bootstrap.build_actions(run), self._report.campaign, as_of=run.params.as_of_at)
        if self._report.effect is None:
            return None
        first, *others = describe_effect(self._report.effect)
        return first, "; ".join(others)

    def tell(self) -> dict[str, Any] | None:
        """The campaign for the page: its date, its arms, and what is known of its effect; None before its start."""
        if self._report is None:
            return None
        campaign, effect = self._report.campaign, self._report.effect
        told = [self._report.waits] if effect is None else describe_effect(effect)
        arms = {"treated": campaign.treated, "held_out": campaign.held_out}
        return {"at": f"{campaign.as_of:%Y-%m-%d}", **arms, "told": told}


def open_calls(folder: Path, dataset: str) -> None:
    """Let the simulated shop of a project's folder call the customers on the lists in `FOLDER`, and earn by it.

    Where its config says no ``value``, a kept customer is worth a part of the purchases of about 30 days.
    """
    (folder / FOLDER).mkdir()
    path = folder / PARAMS_FILE
    params = read_yaml(path)
    params["simulator"] = {**params.get("simulator", {}), "calls": str(FOLDER)}
    write_text(path, format_yaml(params))
    path = folder / "configs/datasets" / f"{dataset}.yaml"
    days = min(params.get("features", {}).get("window_days", [DAYS]), key=lambda one: abs(one - DAYS))
    value = {"kept": {"amount_of_days": days, "share": SHARE}, "offer_cost": 1, "save_rate": OFFERS_SAVE}
    write_text(path, format_yaml({"value": value} | read_yaml(path)))
