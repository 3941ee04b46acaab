"""The command line of experiments: how many units are needed, and what they said."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from closedloop.cli.options import RELEASE, Commands, JsonOption, locate_path, print_json
from closedloop.errors import DataError, GateFailed, Undecided, count_noun

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.core.release.experiments import Counts

app = typer.Typer()
experiment_app = typer.Typer(
    cls=Commands, help="Compute sample sizes, and verdicts on measured experiments.", no_args_is_help=True
)
app.add_typer(experiment_app, name="experiment", rich_help_panel=RELEASE)

AlphaOption = Annotated[float, typer.Option(help="Two-sided level.")]


@experiment_app.command()
def size(
    baseline: Annotated[float, typer.Option(help="The rate as it is, between 0 and 1.")],
    mde: Annotated[float, typer.Option(help="Absolute change of the rate that is worth finding.")],
    alpha: AlphaOption = 0.05,
    power: Annotated[float, typer.Option(help="Probability to find it.")] = 0.8,
    ratio: Annotated[float, typer.Option(help="Treatment units per control unit.")] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Compute how many units each arm needs."""
    from closedloop.core.release.experiments import size_proportions

    control, treatment = size_proportions(baseline, mde, alpha=alpha, power=power, ratio=ratio)
    if as_json:
        print_json({"control": control, "treatment": treatment})
        return
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
    as_json: JsonOption = False,
) -> None:
    """Compare two proportions: adopt (status 0), keep (2), undecided (3), or a broken split (1)."""
    from closedloop.core.release.experiments import analyze_proportions

    found = analyze_proportions(
        _read_counts("--control", control),
        _read_counts("--treatment", treatment),
        alpha=alpha,
        min_sample=min_sample,
        ratio=ratio,
        margin=margin,
        lower_is_better=lower_is_better,
    )
    if as_json:
        print_json(found)
        _end(found.verdict)
        return
    typer.echo(f"control     {found.control_rate:.4%}\ntreatment   {found.treatment_rate:.4%}")
    typer.echo(
        f"difference  {found.difference:+.4%}  ({found.interval.low:+.4%} to {found.interval.high:+.4%}, Newcombe)"
    )
    typer.echo(f"lift        {found.lift:+.2%}\nz           {found.z:.3f}\np           {found.p_value:.4f}")
    if found.margin_p is not None:
        typer.echo(f"not worse   p {found.margin_p:.4f}\nequivalent  p {found.equivalence_p:.4f}")
    typer.echo(f"{found.verdict}: {found.reason}")
    _end(found.verdict)


@experiment_app.command()
def paired(
    scores: Annotated[
        Path,
        typer.Argument(help="CSV: label, champion, challenger; customer_id where ids repeat.", callback=locate_path),
    ],
    threshold: Annotated[float, typer.Option(min=0, max=1, help="Decisions, for McNemar's test.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare two models on the same customers, by a paired bootstrap and McNemar's test.

    The exit statuses are those of analyze.
    """
    from closedloop.core.evaluation.bootstrap import Bootstrap
    from closedloop.core.evaluation.comparison import compare_models

    table = _read_scores(scores)
    found = compare_models(
        table["label"],
        table["champion"],
        table["challenger"],
        champion_threshold=threshold,
        challenger_threshold=threshold,
        bootstrap=Bootstrap(seed, customers=table.get("customer_id")),
    )
    verdict = {"win": "adopt", "lose": "keep", "inconclusive": "undecided"}[found.verdict]
    if as_json:
        print_json(asdict(found) | {"verdict": verdict})
        _end(verdict)
        return
    for name in ("log_loss", "auc"):
        low, high = getattr(found, f"{name}_interval")
        typer.echo(f"{name:<9} {getattr(found, f'{name}_difference'):+.5f}  ({low:+.5f} to {high:+.5f})")
    typer.echo(
        f"accuracy  {found.accuracy_difference:+.5f}  (McNemar's p {found.mcnemar_p:.4f}), "
        f"{count_noun(found.rows, 'row')}"
    )
    typer.echo(f"{verdict}: {found.reason}")
    _end(verdict)


def _read_scores(path: Path) -> pd.DataFrame:
    """The file's rows: ``label`` (bool), two columns of scores, and ``customer_id`` where there is one."""
    import pandas as pd

    from closedloop.config.sources import FileSource
    from closedloop.core.features.parsing import parse_ids, parse_labels, parse_numbers
    from closedloop.tabular.rows import RowFile

    file, wanted = RowFile(path, FileSource(type="csv")), ["label", "champion", "challenger"]
    if missing := [name for name in wanted if name not in file.schema.names]:
        raise DataError(f"{path}: no column {', '.join(missing)}; found {', '.join(file.schema.names)}")
    wanted += [name for name in file.schema.names if name == "customer_id"][:1]
    parts = [table.to_pandas() for table in file.read_chunks(wanted, 500_000)]
    rows = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=wanted)
    place: dict[str, Any] = {"place": str(path), "row_numbers": pd.Series(rows.index + 1)}
    read = pd.DataFrame({"label": parse_labels(rows["label"], churned=["1", "True"], stayed=["0", "False"], **place)})
    for name in wanted[1:]:
        read[name] = (parse_ids if name == "customer_id" else parse_numbers)(rows[name], **place)
    return read


def _read_counts(option: str, text: str) -> Counts:
    from closedloop.core.release.experiments import Counts

    events, _, total = text.replace("_", "").partition("/")
    if not (events.strip().isdecimal() and total.strip().isdecimal()):
        raise DataError(f"{option}: found {text!r}, allowed is events/total as 520/10000")
    return Counts(int(events), int(total))


def _end(verdict: str) -> None:
    if verdict == "broken":
        raise DataError("the split is broken: repair it, and run the experiment again")
    if verdict == "keep":
        raise GateFailed("the treatment is not adopted")
    if verdict == "undecided":
        raise typer.Exit(Undecided.exit_status)
