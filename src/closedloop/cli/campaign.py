"""The command line of campaigns: the list of customers to call, and what came of it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from closedloop.cli.options import (
    PARAMS,
    REASONS_MAX,
    SERVING,
    AsOfOption,
    Commands,
    JsonOption,
    ParamsOption,
    locate_given,
    locate_path,
    print_json,
    read_date,
    read_now,
    shorten,
    with_json,
)
from closedloop.errors import ConfigError, count_noun

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext
    from closedloop.loop.campaigns.report import Report
    from closedloop.store.actions import Campaign

REPORTS = Path("reports/campaigns")
CapacityOption = Annotated[
    int | None, typer.Option(min=1, help="How many customers can be called; default: value.capacity.")
]
HoldoutOption = Annotated[
    float, typer.Option(min=0, max=0.9, help="Share of the chosen customers that is left alone, to compare with.")
]
SegmentOption = Annotated[
    str | None, typer.Option(help="The column of the report's segments; default: the first categorical one.")
]
RankByOption = Annotated[
    Literal["score", "uplift"],
    typer.Option(help="By churn score, or by the effect of an offer where closed campaigns show that it keeps more."),
]
app = typer.Typer()
campaign_app = typer.Typer(
    cls=Commands, help="List the customers to call, and report what the calls changed.", no_args_is_help=True
)
app.add_typer(campaign_app, name="campaign", rich_help_panel=SERVING)


@campaign_app.command("start")
@with_json
def campaign_start(
    as_of: AsOfOption,
    output: Annotated[str, typer.Option(help="The list: a Parquet or CSV file, or a table: ADDRESS#TABLE.")],
    capacity: CapacityOption = None,
    holdout: HoldoutOption = 0.1,
    segment: SegmentOption = None,
    reasons: Annotated[int, typer.Option(min=1, max=REASONS_MAX, help="Reasons of each customer in the list.")] = 3,
    rank_by: RankByOption = "score",
    params: ParamsOption = PARAMS,
) -> Any:
    """Choose customers, hold out a random part of them, record it once, and write the list."""
    from closedloop.bootstrap import build_actions, build_campaign_start, hold_working_files, load_run, open_slot
    from closedloop.loop.campaigns.start import CampaignRules, require_target, write_campaign

    target = locate_given(output)
    require_target(target)
    context = load_run(params, overrides={"as_of": as_of})
    context.database.upgrade()
    by = segment or next(iter(context.dataset.columns.categorical), None)
    rules, store = CampaignRules(_read_capacity(capacity, context), holdout, rank_by), build_actions(context)
    with hold_working_files(context), open_slot(context, None) as slot:
        found = build_campaign_start(context, slot, segment=by, reasons=reasons)(rules, now=read_now())
    write_campaign(found, store.list_actions(found), target)
    for line in _describe_start(found, target):
        typer.echo(line, err=True)
    return found


def _describe_start(campaign: Campaign, target: str) -> Iterator[str]:
    from closedloop.loop.campaigns.ranking import describe_ranking

    yield f"{count_noun(campaign.treated, 'customer')} to call, {campaign.held_out:,} left alone: {target}"
    if told := describe_ranking(campaign.ranking):
        yield told
    if not campaign.held_out:
        remedy = "a larger --holdout has one" if campaign.holdout else "--holdout 0.1 has one"
        yield f"without a hold-out nothing will tell what this campaign did: {remedy}"


def _read_capacity(given: int | None, context: RunContext) -> int:
    value = context.dataset.value
    capacity = given or (value.capacity if value else None)
    if capacity is None:
        raise ConfigError(
            f"--capacity: say how many customers can be called, here or as value.capacity in "
            f"configs/datasets/{context.dataset.name}.yaml"
        )
    return capacity


@campaign_app.command("report")
def campaign_report(
    as_of: AsOfOption,
    started: Annotated[str | None, typer.Option(help="UTC date of the campaign; default: the newest one.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the picture.", callback=locate_path)] = REPORTS,
    params: ParamsOption = PARAMS,
    as_json: JsonOption = False,
) -> None:
    """Report what a campaign changed: the customers kept, and what that was worth."""
    from closedloop.bootstrap import build_actions, load_run
    from closedloop.loop.campaigns.report import draw_report, find_campaign, report_campaign

    day = None if started is None else dt.datetime.combine(read_date("--started", started), dt.time(), dt.UTC)
    context = load_run(params, overrides={"as_of": as_of})
    store, clock = build_actions(context), context.params.as_of_at
    campaign = find_campaign(store, context.dataset.model_name, as_of=clock, started=day)
    report = report_campaign(store, campaign, as_of=clock)
    folder = output / context.dataset.model_name / f"{campaign.as_of:%Y-%m-%d}"
    picture = draw_report(report, folder)
    if as_json:
        print_json(_describe(report, picture))
        return
    _show(report, picture)


def _describe(report: Report, picture: Path | None) -> dict[str, Any]:
    def spell(effect: Any) -> Any:
        parts = effect._asdict()
        return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in parts.items()}

    return {
        "campaign": report.campaign,
        "waits": report.waits,
        "unknown": report.unknown,
        "effect": None if report.effect is None else spell(report.effect),
        "groups": {name: {key: spell(one) for key, one in some.items()} for name, some in report.groups.items()},
        "picture": None if picture is None else str(picture),
    }


def _show(report: Report, picture: Path | None) -> None:
    from closedloop.core.actions.effect import describe_effect
    from closedloop.loop.campaigns.ranking import describe_ranking

    campaign = report.campaign
    typer.echo(f"campaign of {campaign.as_of:%Y-%m-%d}, model version {campaign.model_version}")
    if told := describe_ranking(campaign.ranking):
        typer.echo(f"  {told}")
    for line in [report.waits or ""] if report.effect is None else describe_effect(report.effect):
        typer.echo(f"  {line}")
    if report.effect is not None and report.unknown:
        typer.echo(f"  without an outcome, and left out: {count_noun(report.unknown, 'customer')}")
    if picture is not None:
        typer.echo(f"  picture: {shorten(picture)}")
