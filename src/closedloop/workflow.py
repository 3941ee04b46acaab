"""`closedloop run`: the training graph from the first stage to the last, and a summary for people."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from closedloop import waiting
from closedloop.bootstrap import build_tracking, load_run, write_start_page
from closedloop.config.calls import list_calls, name_call
from closedloop.config.dataset import load_dataset
from closedloop.config.layout import READS, Layout
from closedloop.config.params import PARAMS_FILE, Choices, Params, merge_values, parse_params
from closedloop.config.sections import depend_on_sections
from closedloop.config.sources import FileSource, SqlSource
from closedloop.config.yaml import format_yaml, read_yaml
from closedloop.errors import ConfigError, GateFailed, StageFailed, count_noun
from closedloop.extras import find_missing, has_module
from closedloop.files import write_json, write_text
from closedloop.processes import run_process
from closedloop.tabular.day_files import DAY, REMOTE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WORKSPACES = Path("workspaces")
START_PAGE = Layout().card.parent / "index.html"
GIVEN = "given.json"  # in a workspace: what its last run was given
WIN = "champion_challenger"
LINKED = ("configs", "src")


def recall_given(name: str, source: str | None, as_of: str | None) -> tuple[str | None, str | None, str | None]:
    """The data set (None: the project's own), source and date of a run: those given, else those of the last run."""
    if not (WORKSPACES / name).is_dir() and read_yaml(PARAMS_FILE).get("dataset") == name:
        return None, source, as_of
    try:
        before = _read(WORKSPACES / name / GIVEN)
    except (OSError, ValueError):
        before = {}
    return name, source or before.get("source"), as_of or before.get("as_of")


def run_workflow(
    *, dataset: str | None, source: str | None, as_of: str | None, until: str | None = None
) -> dict[str, Any]:
    """Run the graph in the project folder, or for other data in a workspace, and print the summary.

    ``until`` is the last stage to run; without BentoML the package is left out. Returns what ran, and what it made.

    Raises
    ------
    GateFailed
        If a gate stopped the run.
    StageFailed
        If a stage ended with an error.
    ConfigError
        If the working directory is no project folder, or a config is wrong.
    """
    if until not in (None, *READS):
        raise ConfigError(f"--until {until}: a stage, one of {', '.join(READS)}")
    if not Path("dvc.yaml").is_file():
        raise ConfigError(f"{Path.cwd()}: there is no dvc.yaml; run this in the project's folder")
    folder = Path()
    if dataset is not None or source is not None or as_of is not None:
        folder = prepare_workspace(Path(), dataset=dataset, source=source, as_of=as_of)
        write_json(folder / GIVEN, {"source": source, "as_of": as_of})
    with contextlib.chdir(folder):
        try:
            return _run_here(folder, until or (None if has_module("bentoml") else "register"))
        except GateFailed as error:
            write_start_page(load_run(PARAMS_FILE), dt.datetime.now(dt.UTC))
            raise GateFailed(f"{error}; figures and pictures so far are in {folder / Layout().card.parent}") from error


def _run_here(folder: Path, until: str | None) -> dict[str, Any]:
    """Run the graph of the working directory, which people call ``folder``."""
    from rich.console import Console

    console, started = Console(highlight=False), time.monotonic()
    _require_hyper_parameters(load_run(PARAMS_FILE).params)  # report a wrong config before the first stage runs
    ran = _reproduce(until) if has_module("dvc") else _run_stages(until)
    stale = find_stale_stage() if has_module("dvc") else None
    if stale is not None:
        stage, reason = stale
        console.print(f"{reason}; running again from '{stage}'.")
        ran += _reproduce(until, force_from=stage)
    seconds = time.monotonic() - started
    if not ran:
        console.print(f"Nothing changed: all stages are up to date (checked in {seconds:.1f} s).")
    else:
        console.print(f"{count_noun(len(ran), 'stage')} ran in {seconds:.0f} s: {', '.join(ran)}.")
    write_start_page(load_run(PARAMS_FILE), dt.datetime.now(dt.UTC))
    if until in (None, "register", "package"):
        print_summary(console, folder)
    else:
        console.print(f"Ended after {until}. Its runs: {_name_ui(folder)}. More: docs/levels.md.", soft_wrap=True)
    return {"folder": folder, "ran": ran, "seconds": round(seconds, 1), **_list_reports(Layout())}


def _list_reports(layout: Layout) -> dict[str, Any]:
    """The verdict on the model and the version that it became; None where no run came that far."""
    files = {"gates": layout.gates, "registration": layout.registration}
    return {name: _read(path) if path.is_file() else None for name, path in files.items()}


def _name_ui(folder: Path) -> str:
    return name_call("ui", None if folder == Path() else folder.name)


def _reproduce(until: str | None, *, force_from: str | None = None) -> list[str]:
    from closedloop.adapters.dvc import import_dvc, reproduce

    with waiting.show_clock("stages", 5):
        import_dvc()
    return reproduce(Path(), force_from=force_from, until=until)


def _run_stages(until: str | None) -> list[str]:
    """Run the stages one after the other, all of them each time: DVC, which knows what changed, is not installed."""
    ran = []
    for stage in READS:
        command = [sys.executable, "-m", "closedloop.cli.main", stage.replace("_", "-")]
        status = run_process(command, check=False).returncode
        if status:
            raise (GateFailed if status == 2 else StageFailed)(f"stage {stage} exited with {status}")
        ran.append(stage)
        if stage == until:
            break
    return ran


def prepare_workspace(
    root: Path, *, dataset: str | None, source: str | None, as_of: str | None, folder: Path | None = None
) -> Path:
    """Make a folder that links to the project's code and configs and has its own params and results; return it.

    Runs on other data never change the project's tracked params.yaml and dvc.lock.
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
        if (root / link).exists() and not (folder / link).is_symlink():  # an installed package has no sources here
            (folder / link).symlink_to(os.path.relpath((root / link).absolute(), folder.absolute()))
    cache = os.path.relpath((root / ".dvc/cache").absolute(), (folder / ".dvc").absolute())
    dvc_config = (root / ".dvc/config").read_text(encoding="utf-8").replace("[core]", "[core]\n    no_scm = true", 1)
    _write_if_changed(folder / ".dvc/config", f"{dvc_config}[cache]\n    dir = {cache}\n")
    _write_if_changed(folder / ".dvcignore", "__pycache__\n")
    _write_if_changed(folder / PARAMS_FILE, format_yaml(params))
    graph = _describe_graph(read_yaml(root / "dvc.yaml"), params["data"], sources)
    sections = read_yaml(root / f"configs/datasets/{name}.yaml")
    depend_on_sections(graph, "configs/datasets/${dataset}.yaml", sections)
    _write_if_changed(folder / "dvc.yaml", format_yaml(graph))
    _copy_feature_repo(root, folder, config.model_name)
    return folder


def _describe_graph(graph: dict[str, Any], data: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, Any]:
    """Add the source files to the dependencies of ingest, so that DVC notices changed files and new matching ones."""
    for role, described in sources.items():
        if isinstance(described, FileSource) and data[role] is not None and REMOTE in data[role]:
            graph["stages"]["ingest"]["always_changed"] = True  # only ingest asks the storage what changed
        elif isinstance(described, FileSource) and data[role] is not None:
            graph["stages"]["ingest"]["deps"] += _list_dependencies(data[role], described.type)
        elif isinstance(described, SqlSource):
            graph["stages"]["ingest"]["always_changed"] = True  # DVC cannot tell whether a query's result changed
    return graph


def _copy_feature_repo(root: Path, folder: Path, model_name: str) -> None:
    """Copy the feature repository: data sets share one registry and store, and each has its own Feast project."""
    shutil.copytree(root / "feature_repo", folder / "feature_repo", dirs_exist_ok=True)
    path = folder / "feature_repo/feature_store.yaml"
    store = path.read_text(encoding="utf-8").replace("../state/", "../../../state/")
    project = read_yaml(root / "feature_repo/feature_store.yaml")["project"]
    _write_if_changed(path, store.replace(f"project: {project}", f"project: {model_name}"))


def _require_hyper_parameters(params: Params) -> None:
    """Build the estimator with these hyper-parameters, or the search's lowest, before the stages take their time."""
    from closedloop.core.training.estimators import require_hyper_parameters

    space = params.tuning.space.get(params.model.type, {}) if params.tuning.trials else {}
    searched = {name: one.choices[0] if isinstance(one, Choices) else one.low for name, one in space.items()}
    require_hyper_parameters(params.model.type, {**params.model.params, **searched})


def _locate_sources(given: Mapping[str, Any], sources: Mapping[str, Any]) -> dict[str, str | None]:
    """Make the paths of source files absolute: a workspace is another folder, where relative ones would not hold."""
    located: dict[str, str | None] = {}
    for role, described in sources.items():
        path = given.get(role) or (described.path if isinstance(described, FileSource) else None)
        is_remote = path is None or REMOTE in path
        located[role] = path if is_remote else str(Path(f"{path}").expanduser().absolute())
    return located


def _list_dependencies(path: str, suffix: str) -> list[str]:
    from closedloop.tabular.sources import list_files

    if DAY in path:  # the folder above the days: DVC notices new and changed ones
        return [str(Path(re.split(r"[*{]", path)[0] + "day").parent)]
    return [path] if Path(path).exists() else [str(file) for file in list_files(path, f".{suffix}")]


def find_stale_stage() -> tuple[str, str] | None:
    """Return the stage to run again from, and the reason, after a change of the tracking store that DVC cannot see.

    The store may have lost the run or the version. Or the champion is neither this result nor the version that it was
    compared with: DVC took the result of earlier parameters from its cache.
    """
    try:
        registration = _read(Layout().registration)
        folder_sha256 = registration["folder_sha256"]
        judged_against = _read(Layout().gates)["champion"]
    except (OSError, ValueError, KeyError):
        return None
    tracking = build_tracking(load_run(PARAMS_FILE))
    if tracking.find_run(folder_sha256) is None:
        return "train", "The tracking store does not know this result"
    if registration["version"] is None:
        return "register", "This result was an experiment of DVC, which registers no version"
    if tracking.find_version(folder_sha256) is None:
        return "register", "The tracking store does not know this version"
    champion = tracking.read_champion_digest()
    if champion not in {None, folder_sha256, (judged_against or {}).get("folder_sha256")}:
        return "evaluate", "This result was not compared with the present champion"
    return None


def print_summary(console: Console, folder: Path) -> None:
    """Print rows, gates, the comparison with the champion, the version, and the pages to open next."""
    from rich.markup import escape

    layout = Layout()
    ingested, training = _read(layout.ingest_metrics), _read(layout.training_set_metrics)
    verdict, registered = _read(layout.gates), _read(layout.registration)
    parts = ", ".join(f"{name} {part['rows']:,}" for name, part in training["parts"].items())
    console.print(
        f"\n[bold]Rows[/bold]   {ingested['rows_read']:,} read, {ingested['rows_kept']:,} kept\n       {parts}"
    )
    for entry in ingested["dropped"]:
        console.print(
            f"       dropped for {entry['rule']}: {entry['rows']:,} ({entry['first_reason']:,} for this first)"
        )
    for column, count in ingested.get("blank_values", {}).items():
        console.print(f"       blank {column}: {count:,}", markup=False)
    console.print()
    console.print(tabulate_gates(_read(layout.data_quality), training["serving"], verdict["gates"]))
    console.print(f"\n[bold]Model[/bold]  {escape(describe_comparison(verdict))}")
    if (baseline := verdict["baseline"])["verdict"] == "lose":
        reason = escape(baseline["reason"])
        console.print(f"       [yellow]a simple {baseline['model_type']} is better[/yellow]: {reason}")
    console.print(
        f"       {registered['model_name']} version {registered['version']}, alias [bold]{registered['alias']}"
    )
    where = "" if folder == Path() else escape(f"{folder}/")
    console.print(f"[bold]Open[/bold]    {where}{START_PAGE}, which links to the others", soft_wrap=True)
    newest = folder / layout.features / f"{training['serving']['snapshot']}.parquet"
    name = None if folder == Path() else folder.name
    for title, call in list_calls(name, newest, by_make="MAKELEVEL" in os.environ, missing=find_missing()).items():
        console.print(f"[bold]{title:7}[/bold] {escape(call)}", soft_wrap=True)  # so that it can be copied


def tabulate_gates(quality: dict[str, Any], serving: dict[str, Any], gates: dict[str, Any]) -> Table:
    """Return a table with one line for each gate: the data gate, the skew gate, and the model gates."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Gates", title_justify="left", show_edge=False)
    for column in ("gate", "result", "figure and limit"):
        table.add_column(column)
    held = quality["expectations"] - quality["failed_critical"] - quality["failed_warning"]
    hold = f"{held} of {count_noun(quality['expectations'], 'expectation')} hold"
    result = "[green]passed" if not quality["failed_critical"] else "[red]failed"
    table.add_row(
        "data",
        result,
        f"{hold}, {count_noun(quality['failed_warning'], 'warning')}",
    )
    compared = (
        f"{count_noun(serving['compared'], 'customer')} online = offline"
        if serving["materialized"]
        else f"not materialised: {serving['reason']}"
    )
    table.add_row("skew", "[green]passed", f"{compared}; features of {serving['snapshot']}")
    for name, gate in gates.items():
        quiet = "no win" if name == WIN else "excused" if gate.get("excused") else "reported"
        unmet = "[red]failed" if gate["blocking"] else f"[yellow]{quiet}"
        mark = "[green]passed" if gate["passed"] else unmet
        table.add_row(name, mark, escape(gate["sentence"].removeprefix(f"{name} ")))
    return table


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def describe_comparison(verdict: dict[str, Any]) -> str:
    """Return one sentence on how the model compares with the champion."""
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
