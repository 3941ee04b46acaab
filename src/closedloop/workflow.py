"""`closedloop run`: the training graph from the first stage to the last, and a summary for people."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from closedloop.bootstrap import build_tracking, load_run
from closedloop.dataset import FileSource, SqlSource, load_dataset, read_yaml
from closedloop.errors import ConfigError
from closedloop.files import write_text
from closedloop.params import PARAMS_FILE, merge_values, parse_params

if TYPE_CHECKING:
    from rich.console import Console

WORKSPACES = Path("workspaces")
LINKED = ("configs", "src")
METRICS = Path("metrics")


def run_workflow(*, dataset: str | None, source: str | None, as_of: str | None) -> None:
    """Run the graph in the project, or for other data in a workspace of their own, and print the summary.

    Raises
    ------
    GateFailed
        If a gate stopped the line.
    StageFailed
        If a stage ended with an error.
    ConfigError
        If this is no project folder, or a config is wrong.
    """
    from rich.console import Console

    from closedloop.adapters.dvc import reproduce

    if not Path("dvc.yaml").is_file():
        raise ConfigError(f"{Path.cwd()}: there is no dvc.yaml; run this in the project's folder")
    started = time.monotonic()
    folder = Path()
    if dataset is not None or source is not None or as_of is not None:
        folder = prepare_workspace(Path(), dataset=dataset, source=source, as_of=as_of)
    console = Console(highlight=False)
    here = Path.cwd()
    os.chdir(folder)
    try:
        load_run(PARAMS_FILE)  # a config error before the first stage, not inside it
        ran = reproduce(Path())
        stale = find_stale_stage()
        if stale is not None:
            stage, reason = stale
            console.print(f"{reason}; running again from '{stage}'.")
            ran += reproduce(Path(), force_from=stage)
        seconds = time.monotonic() - started
        if not ran:
            console.print(f"Nothing changed: all stages are up to date (checked in {seconds:.1f} s).")
        else:
            console.print(f"{len(ran)} stages ran in {seconds:.0f} s: {', '.join(ran)}.")
        print_summary(console, folder)
    finally:
        os.chdir(here)


def prepare_workspace(
    root: Path, *, dataset: str | None, source: str | None, as_of: str | None, folder: Path | None = None
) -> Path:
    """A folder with the project's code and configs linked, and params and results of its own; returns it.

    The tracked params.yaml and dvc.lock stay as they are: other data never overwrite them.
    """
    base = read_yaml(root / PARAMS_FILE)
    name = dataset or str(base.get("dataset"))
    config = load_dataset(name, root / "configs/datasets")
    given: dict[str, Any] = {"dataset": name}
    if as_of is not None:
        given["as_of"] = as_of
    if source is not None:
        given["data"] = {"source": source}
    params = merge_values(base, dict(config.params), given)
    sources = {"source": config.source, "customers_source": config.customers_source}
    params["data"] = {**params.get("data", {}), **_locate_sources(params.get("data", {}), sources)}
    parse_params(params, f"{PARAMS_FILE} with configs/datasets/{name}.yaml (params)")
    folder = folder or root / WORKSPACES / name
    (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    for link in LINKED:
        if not (folder / link).is_symlink():
            (folder / link).symlink_to(os.path.relpath((root / link).absolute(), folder.absolute()))
    cache = os.path.relpath((root / ".dvc/cache").absolute(), (folder / ".dvc").absolute())
    dvc_config = (root / ".dvc/config").read_text(encoding="utf-8").replace("[core]", "[core]\n    no_scm = true", 1)
    _write_if_changed(folder / ".dvc/config", f"{dvc_config}[cache]\n    dir = {cache}\n")
    _write_if_changed(folder / ".dvcignore", "__pycache__\n")
    _write_if_changed(folder / PARAMS_FILE, yaml.safe_dump(params, sort_keys=False))
    graph = read_yaml(root / "dvc.yaml")
    for role, described in sources.items():
        if isinstance(described, FileSource) and params["data"][role] is not None:
            # so that a changed file is noticed, and with a pattern a new one as well
            graph["stages"]["ingest"]["deps"] += _list_dependencies(params["data"][role], described.type)
        elif isinstance(described, SqlSource):
            graph["stages"]["ingest"]["always_changed"] = True  # what a query returns is known only by asking
    _write_if_changed(folder / "dvc.yaml", yaml.safe_dump(graph, sort_keys=False))
    shutil.copytree(root / "feature_repo", folder / "feature_repo", dirs_exist_ok=True)
    store = (folder / "feature_repo/feature_store.yaml").read_text(encoding="utf-8")
    # one registry and store for all data sets, a project for each
    store = store.replace("../state/", "../../../state/").replace(
        f"project: {read_yaml(root / 'feature_repo/feature_store.yaml')['project']}", f"project: {config.model_name}"
    )
    _write_if_changed(folder / "feature_repo/feature_store.yaml", store)
    return folder


def _locate_sources(given: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, str | None]:
    """Paths of files made absolute, those of the config too, since a workspace is another folder."""
    located: dict[str, str | None] = {}
    for role, described in sources.items():
        path = given.get(role) or (described.path if isinstance(described, FileSource) else None)
        located[role] = str(Path(path).expanduser().absolute()) if path is not None else None
    return located


def _list_dependencies(path: str, suffix: str) -> list[str]:
    from closedloop.adapters.sources import list_files

    return [path] if Path(path).exists() else [str(file) for file in list_files(path, f".{suffix}")]


def find_stale_stage() -> tuple[str, str] | None:
    """The stage to run from, and why, if the tracking store changed since in a way that DVC cannot know.

    It lost the run or the version; or the champion is neither this result nor the one it was compared with, as after
    parameters went back to earlier ones, whose results DVC takes from its cache.
    """
    try:
        folder_sha256 = json.loads((METRICS / "registration.json").read_text(encoding="utf-8"))["folder_sha256"]
        judged_against = json.loads((METRICS / "gates.json").read_text(encoding="utf-8"))["champion"]
    except (OSError, ValueError, KeyError):
        return None
    tracking = build_tracking(load_run(PARAMS_FILE))
    if tracking.find_run(folder_sha256) is None:
        return "train", "The tracking store does not know this result"
    if tracking.find_version(folder_sha256) is None:
        return "register", "The tracking store does not know this version"
    champion = tracking.read_champion_digest()
    if champion not in {None, folder_sha256, (judged_against or {}).get("folder_sha256")}:
        return "evaluate", "This result was not compared with the present champion"
    return None


def print_summary(console: Console, folder: Path) -> None:
    """Rows, gates, the model against the champion, its version, and what to open next."""
    from rich.table import Table

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((METRICS / f"{name}.json").read_text(encoding="utf-8"))
        return content

    ingested, quality, training = read("ingest"), read("data_quality"), read("training_set")
    verdict, registered = read("gates"), read("registration")
    table = Table(title="Gates", title_justify="left", show_edge=False)
    for column in ("gate", "result", "figure and limit"):
        table.add_column(column)
    held = quality["expectations"] - quality["failed_critical"] - quality["failed_warning"]
    result = "[green]passed" if not quality["failed_critical"] else "[red]failed"
    table.add_row(
        "data", result, f"{held} of {quality['expectations']} expectations hold, {quality['failed_warning']} warnings"
    )
    serving = training["serving"]
    compared = (
        f"{serving['compared']:,} customers online = offline"
        if serving["materialized"]
        else "not materialised: older than the store"
    )
    table.add_row("skew", "[green]passed", f"{compared}; features of {serving['snapshot']}")
    for name, gate in verdict["gates"].items():
        mark = "[green]passed" if gate["passed"] else ("[red]failed" if gate["blocking"] else "[yellow]no win")
        table.add_row(name, mark, gate["sentence"].removeprefix(f"{name} "))
    parts = ", ".join(f"{name} {part['rows']:,}" for name, part in training["parts"].items())
    console.print(f"\n[bold]Rows[/bold]   {ingested['rows_read']:,} read, {ingested['rows_kept']:,} kept; {parts}")
    for entry in ingested["dropped"]:
        console.print(
            f"       dropped for {entry['rule']}: {entry['rows']:,} ({entry['first_reason']:,} for this first)"
        )
    for column, count in ingested.get("blank_values", {}).items():
        console.print(f"       blank {column}: {count:,}")
    console.print()
    console.print(table)
    console.print(f"\n[bold]Model[/bold]  {describe_comparison(verdict)}")
    console.print(
        f"       {registered['model_name']} version {registered['version']}, alias [bold]{registered['alias']}"
    )
    where = "" if folder == Path() else f"{folder}/"
    console.print(
        f"[bold]Open[/bold]   make ui (MLflow), {where}reports/model_card.html, {where}reports/data_quality.html"
    )


def describe_comparison(verdict: dict[str, Any]) -> str:
    """The model against the champion, in one sentence."""
    champion, comparison = verdict["champion"], verdict["comparison"]
    if champion is None:
        return "there was no champion to compare with"
    if comparison is not None:
        return f"against champion version {champion['version']}: {comparison['verdict']} ({comparison['reason']})"
    if champion.get("is_candidate"):
        return f"it is the champion, version {champion['version']}"
    return f"not compared with champion version {champion['version']}: {champion['not_compared']}"


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)
