"""The command line of the policy backtest."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from closedloop.cli.options import (
    MONITORING,
    PARAMS,
    JsonOption,
    ParamsOption,
    is_verbose,
    print_json,
    read_date,
    tell,
)
from closedloop.errors import ConfigError, count_noun

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext
    from closedloop.loop.backtest.history import History

REPORTS = Path("reports/backtest")
app = typer.Typer()


@app.command(rich_help_panel=MONITORING)
def backtest(
    params: ParamsOption = PARAMS,
    first: Annotated[
        str | None, typer.Option("--from", help="UTC date of the first model (default: a third of the history).")
    ] = None,
    as_of: Annotated[str | None, typer.Option(help="UTC date: only events before it are used.")] = None,
    every: Annotated[int | None, typer.Option(help="Days from check to check, and between snapshots.", min=1)] = None,
    retrain_days: Annotated[int, typer.Option(help="Days of the policy that retrains by the calendar.", min=1)] = 30,
    horizon_days: Annotated[
        int | None, typer.Option(help="Horizon in days, in place of the label rule's.", min=1)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Replay retraining policies on the history: which one pays, and how much."""
    from closedloop.adapters.matplotlib import draw_backtest
    from closedloop.bootstrap import load_run
    from closedloop.files import write_json
    from closedloop.loop.backtest.backtest import compare_loops, list_policies, run_policies

    context = load_run(params, overrides={} if as_of is None else {"as_of": as_of})
    begin = None if first is None else read_date("--from", first)
    history, policies = load_history(context, begin, every, horizon_days), list_policies(retrain_days)
    settings, days = context.settings, [f"{at:%Y-%m-%d}" for at in (history.ticks[0], history.ticks[-1])]
    tell("history", f"{count_noun(len(history.ticks), 'check')}, {' to '.join(days)}")
    with show_progress(len(policies) * len(history.ticks)) as tell_progress:
        loops = run_policies(
            history,
            policies,
            monitoring=settings.monitoring,
            releasing=settings.release,
            retraining=settings.retraining,
            tell_progress=tell_progress,
        )
    report = compare_loops(history, loops, until=context.params.as_of_at)
    write_json(REPORTS / "backtest.json", report)
    picture = draw_backtest(REPORTS / "backtest.png", report)
    if as_json:
        print_json(report)
        return
    print_table(report)
    typer.echo(f"\n{report['sentence']}\n\n{picture}, {REPORTS / 'backtest.json'}")


def load_history(context: RunContext, first: dt.date | None, every: int | None, horizon_days: int | None) -> History:
    """The history that the options ask for.

    Raises
    ------
    ConfigError
        If a horizon is given for a table, whose labels came with its rows.
    """
    from closedloop.bootstrap import build_engine, read_actions
    from closedloop.loop.backtest.history import choose_ticks, read_history

    dataset = context.dataset
    if horizon_days is not None:
        if dataset.label is None:
            raise ConfigError(f"--horizon-days {horizon_days}: {dataset.name} has no label rule, so it has no horizon")
        rule = dataset.label.model_copy(update={"horizon_days": horizon_days})
        dataset = dataset.model_copy(update={"label": rule})
    work_dir = context.settings.locate("state/backtest") / dataset.model_name
    actions = read_actions(context)
    with build_engine(context) as engine:
        history = read_history(context.params, dataset, engine, work_dir=work_dir, every_days=every, actions=actions)
    return choose_ticks(history, first)


@contextmanager
def show_progress(steps: int) -> Iterator[Callable[[str, dt.datetime], None]]:
    """A bar on standard error, which names the policy and the day that are being replayed."""
    from rich.console import Console

    from closedloop.waiting import build_bar

    if not is_verbose():  # a line of each of some hundred trainings would push the bar away
        logging.getLogger("closedloop.stages").setLevel(logging.WARNING)
    with build_bar(Console(stderr=True)) as progress:
        bar = progress.add_task("the first model is trained", total=steps)

        def tell_progress(policy: str, at: dt.datetime) -> None:
            progress.update(bar, advance=1, description=f"{policy}, {at:%Y-%m-%d}")

        yield tell_progress


def print_table(report: Mapping[str, Any]) -> None:
    """A row a policy."""
    from rich.console import Console
    from rich.table import Table

    share = f"{100 * report['level']:g}%, {count_noun(report['comparisons'], 'comparison')} together"
    caption = (
        f"{count_noun(report['rows'], 'known outcome')} of {count_noun(report['customers'], 'customer')}, "
        f"{report['snapshots'][0]} to {report['snapshots'][-1]}; * picked; intervals: {share}"
    )
    # an interval stands below its figure: beside it, both would be broken at 80 columns
    table = Table(
        title=f"Policies on the history of {report['dataset']}",
        caption=caption,
        title_justify="left",
        caption_justify="left",
    )
    table.show_edge = False
    for column in ("policy", "log\nloss", "saved\nagainst never", "promoted\nof trained", "leavers\nin the lists"):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for name, own in report["policies"].items():
        gain, found = own.get("gain"), own.get("found")
        saved = "" if gain is None else f"{gain['mean']:+.4f}\n{gain['low']:.4f} to {gain['high']:.4f}"
        more = "" if found is None else f"\n{found['low']:+,.0f} to {found['high']:+,.0f}"
        style = "bold green" if name == report["picked"] else None
        mark = " *" if style else ""  # seen without colours too
        cells = f"{own['log_loss']:.4f}", saved, f"{own['promoted']} of {own['retrainings']}"
        table.add_row(f"{name}{mark}", *cells, f"{own['leavers_found']:,.0f}{more}", style=style)
    Console().print(table)
