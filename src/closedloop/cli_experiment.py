"""The command line of experiments: how many units are needed, and what they said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from closedloop.errors import DataError, GateFailed

if TYPE_CHECKING:
    from closedloop.core.experiments import Counts

app = typer.Typer()
experiment_app = typer.Typer(help="Sample sizes, and verdicts on what was measured.", no_args_is_help=True)
app.add_typer(experiment_app, name="experiment")

UNDECIDED = 3
AlphaOption = Annotated[float, typer.Option(help="Two-sided level.")]


@experiment_app.command()
def size(
    baseline: Annotated[float, typer.Option(help="The rate as it is, between 0 and 1.")],
    mde: Annotated[float, typer.Option(help="Absolute change of the rate that is worth finding.")],
    alpha: AlphaOption = 0.05,
    power: Annotated[float, typer.Option(help="Probability to find it.")] = 0.8,
    ratio: Annotated[float, typer.Option(help="Treatment units per control unit.")] = 1.0,
) -> None:
    """How many units each arm needs."""
    from closedloop.core.experiments import size_proportions

    control, treatment = size_proportions(baseline, mde, alpha=alpha, power=power, ratio=ratio)
    typer.echo(f"control    {control:>12,}\ntreatment  {treatment:>12,}")


@experiment_app.command()
def analyze(
    control: Annotated[str, typer.Option(help="Events/total, for example 520/10000.")],
    treatment: Annotated[str, typer.Option(help="Events/total.")],
    alpha: AlphaOption = 0.05,
    min_sample: Annotated[int, typer.Option(min=0, help="Fewer units in an arm decide nothing.")] = 0,
    ratio: Annotated[float, typer.Option(help="Planned treatment units per control unit; the split is tested.")] = 1.0,
    margin: Annotated[float | None, typer.Option(help="Non-inferiority: worse by less than this is adopted.")] = None,
    lower_is_better: Annotated[bool, typer.Option("--lower-is-better", help="Events are bad, as churn is.")] = False,
) -> None:
    """What two proportions say: adopt (status 0), keep (2), undecided (3), or a broken split (1)."""
    from closedloop.core.experiments import analyze_proportions

    found = analyze_proportions(
        _read_counts("--control", control),
        _read_counts("--treatment", treatment),
        alpha=alpha,
        min_sample=min_sample,
        ratio=ratio,
        margin=margin,
        lower_is_better=lower_is_better,
    )
    typer.echo(f"control     {found.control_rate:.4%}\ntreatment   {found.treatment_rate:.4%}")
    typer.echo(
        f"difference  {found.difference:+.4%}  ({found.interval.low:+.4%} to {found.interval.high:+.4%}, Newcombe)"
    )
    typer.echo(f"lift        {found.lift:+.2%}\nz           {found.z:.3f}\np           {found.p_value:.4f}")
    if found.margin_p is not None:
        typer.echo(f"not worse   p {found.margin_p:.4f}\nequivalent  p {found.equivalence_p:.4f}")
    _end(found.verdict, found.reason)


@experiment_app.command()
def paired(
    scores: Annotated[Path, typer.Argument(help="CSV: label, champion, challenger; customer_id where ids repeat.")],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Decisions, for McNemar's test.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Compare two models on the same customers: paired bootstrap and McNemar's test; statuses as of analyze."""
    import pandas as pd

    from closedloop.core.comparison import compare_models

    try:
        table = pd.read_csv(scores)
    except (OSError, ValueError) as error:
        raise DataError(f"{scores}: cannot be read as CSV ({error})") from error
    missing = [name for name in ("label", "champion", "challenger") if name not in table]
    if missing:
        raise DataError(f"{scores}: no column {', '.join(missing)}; found {', '.join(table.columns)}")
    found = compare_models(
        table["label"],
        table["champion"],
        table["challenger"],
        champion_threshold=threshold,
        challenger_threshold=threshold,
        seed=seed,
        customers=table.get("customer_id"),
    )
    for name in ("log_loss", "auc"):
        low, high = getattr(found, f"{name}_interval")
        typer.echo(f"{name:<9} {getattr(found, f'{name}_difference'):+.5f}  ({low:+.5f} to {high:+.5f})")
    typer.echo(f"accuracy  {found.accuracy_difference:+.5f}  (McNemar's p {found.mcnemar_p:.4f}), {found.rows:,} rows")
    _end({"win": "adopt", "lose": "keep", "inconclusive": "undecided"}[found.verdict], found.reason)


def _read_counts(option: str, text: str) -> Counts:
    from closedloop.core.experiments import Counts

    events, _, total = text.replace("_", "").partition("/")
    if not (events.strip().isdecimal() and total.strip().isdecimal()):
        raise DataError(f"{option}: found {text!r}, allowed is events/total as 520/10000")
    return Counts(int(events), int(total))


def _end(verdict: str, reason: str) -> None:
    typer.echo(f"{verdict}: {reason}")
    if verdict == "broken":
        raise DataError("the split is broken: repair it, and run the experiment again")
    if verdict == "keep":
        raise GateFailed("the treatment is not adopted")
    if verdict == "undecided":
        raise typer.Exit(UNDECIDED)
