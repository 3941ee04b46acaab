"""The command line of the operations store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from closedloop.cli.options import PARAMS, STORE, AsOfOption, Commands, ParamsOption, with_json
from closedloop.errors import ServiceUnavailable, count_noun

if TYPE_CHECKING:
    from closedloop.store.predictions import Removed

app = typer.Typer()
store_app = typer.Typer(
    cls=Commands, help="Create the tables, purge old predictions, erase a customer.", no_args_is_help=True
)
app.add_typer(store_app, name="store", rich_help_panel=STORE)


@store_app.command()
def upgrade(params: ParamsOption = PARAMS) -> None:
    """Create the tables, or migrate them to this release."""
    from closedloop.bootstrap import load_run

    load_run(params).database.upgrade()
    typer.echo("the operations store is up to date", err=True)


@store_app.command()
@with_json
def purge(as_of: AsOfOption, params: ParamsOption = PARAMS) -> Any:
    """Delete predictions older than operations.predictions_keep_days, and their outcomes."""
    from closedloop.bootstrap import build_predictions, load_run

    context = load_run(params, overrides={"as_of": as_of})
    name, keep_days = context.dataset.model_name, context.settings.operations.predictions_keep_days
    return _tell_removed(build_predictions(context).purge(name, keep_days=keep_days, as_of=context.params.as_of_at))


@store_app.command()
@with_json
def erase(
    customer_id: Annotated[str, typer.Option(help="Delete all rows of this customer, in every data set.")],
    params: ParamsOption = PARAMS,
) -> Any:
    """Delete a customer: features, working files, predictions, outcomes and actions."""
    from closedloop.adapters.feast_store import read_store_config
    from closedloop.adapters.online_erasure import erase_online, is_anybody_online
    from closedloop.bootstrap import build_predictions, hold_working_files, load_run
    from closedloop.loop.erasure import erase_published, erase_working_files
    from closedloop.store.predictions import list_spellings

    context = load_run(params)
    settings, spellings = context.settings, list_spellings(customer_id)
    store_config = read_store_config(settings, context.dataset.model_name)["online_store"]
    offline_dir = settings.locate(settings.features.offline)
    unfinished: list[str] = []
    with hold_working_files(context):  # a refresh that read before the source forgot must not publish after this
        _attempt(lambda: erase_working_files(settings.root), unfinished)
        # features first: whom the service does not know, it logs no predictions of
        online = _attempt(lambda: erase_online(store_config, spellings), unfinished)
        published = _attempt(lambda: erase_published(offline_dir, spellings), unfinished)
    if published is None:
        typer.echo(f"deleted rows of features: online {online}; nothing is published in {offline_dir}", err=True)
    else:
        typer.echo(f"deleted rows of features: online {online}, published {published}, in {offline_dir}", err=True)
    removed = _attempt(lambda: _tell_removed(build_predictions(context).erase(customer_id)), unfinished)
    if published is None and _attempt(lambda: is_anybody_online(store_config), unfinished):
        unfinished.append(
            f"features are online, so they were published, but not in {offline_dir}: run it where those files lie"
        )
    if unfinished:
        raise ServiceUnavailable("; ".join(unfinished))
    return {"features_online": online, "features_published": published, **asdict(removed)}


def _attempt(step: Callable[[], Any], unfinished: list[str]) -> Any:
    """Return a step's result; one that cannot be finished, or tidied up after, does not keep others from running."""
    try:
        return step()
    except ServiceUnavailable as error:
        unfinished.append(str(error))
        return "an unknown number"


def _tell_removed(removed: Removed) -> Removed:
    predictions, outcomes = count_noun(removed.predictions, "prediction"), count_noun(removed.outcomes, "outcome")
    actions = f" and {count_noun(removed.actions, 'action')} of campaigns" if removed.actions else ""
    typer.echo(f"deleted: {predictions} and {outcomes}{actions}", err=True)
    if removed.left:
        raise ServiceUnavailable(removed.left)
    return removed
