"""reports/index.html: what stands, in one paragraph, and a link to each page that there is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closedloop.adapters.jinja import render_page
from closedloop.config.calls import list_calls
from closedloop.config.layout import Layout
from closedloop.errors import count_noun
from closedloop.extras import find_missing
from closedloop.files import write_text
from closedloop.loop.status.last_run import read_last_run
from closedloop.loop.status.status import describe_money
from closedloop.stages.parts.card import PICTURES

if TYPE_CHECKING:
    from closedloop.loop.status.overview import Overview

PAGE = Layout().card.parent / "index.html"
ENDS = {"registered": "made a version", "refused": "was refused by a gate", "failed": "failed"}


class ReportLink(NamedTuple):
    """A page that is there, relative to the start page, and what it shows."""

    title: str
    href: str
    text: str


def write_start_page(view: Overview, *, root: Path, monitoring: Path, replay: Path, tracking: Path | None) -> Path:
    """Write the page into the working directory, a project's folder; returns its path.

    Parameters
    ----------
    root
        The project's folder; the working directory is that, or a data set's workspace in it.
    monitoring
        The folder with the reports of this model's checks, by date.
    replay
        The page of this data set's last replay.
    tracking
        MLflow's database, if it is a file.
    """
    layout = Layout()
    links = list_links(layout, monitoring, replay)
    has_tracking = tracking is not None and tracking.is_file()
    told = " ".join(describe(view, layout))
    values = {"model_name": view.model_name, "told": told, "links": links, "has_tracking": has_tracking}
    write_text(PAGE, render_page("index.html", **values, calls=list_next_calls(layout, root)))
    return PAGE


def list_next_calls(layout: Layout, root: Path) -> dict[str, str]:
    """The commands, typed in the project's folder, that serve, score, watch and release the last run's model."""
    serving, here = _read(layout.training_set_metrics).get("serving"), Path.cwd()
    if not serving or not here.is_relative_to(root.resolve()):
        return {}
    folder = here.relative_to(root.resolve())
    features = folder / layout.features / f"{serving['snapshot']}.parquet"
    return list_calls(folder.name or None, features, by_make=(root / "Makefile").is_file(), missing=find_missing())


def list_links(layout: Layout, monitoring: Path, replay: Path) -> list[ReportLink]:
    """Those of the pages that exist."""
    checks = sorted(monitoring.glob("*/report.html"))
    pictures = [(f"Picture: {title}", layout.test_figures / f"{name}.png") for name, (title, _) in PICTURES.items()]
    pages = [
        ("Model card", layout.card, "what the model is, how good, for whom, and its limits"),
        ("Data quality", layout.data_quality_page, "every expectation, every dropped row"),
        ("Data Docs", layout.data_docs / "index.html", "Great Expectations' own pages; their index needs the network"),
        ("Plots", Path("dvc_plots/index.html"), "the curves of this run beside earlier ones, by DVC"),
        *(
            (title, path, f"{path.stem.replace('_', ' ').replace('roc', 'ROC')} of the test rows")
            for title, path in pictures
        ),
        *(("Monitoring", path, f"the check as of {path.parent.name}") for path in checks[-1:]),
        ("Loop", Path("loop.html") if Path("loop.html").is_file() else replay, "the whole loop on a simulated clock"),
    ]
    here = PAGE.parent.resolve()
    return [
        ReportLink(title, os.path.relpath(path.resolve(), here), text) for title, path, text in pages if path.is_file()
    ]


def describe(view: Overview, layout: Layout) -> list[str]:
    """The state of the model, in sentences."""
    ran, row, check = read_last_run(view.model_name, layout), view.row, view.check
    figures = _read(layout.eval_metrics)
    told = []
    if row is not None:
        since = view.serves_since or row.updated_at
        told.append(
            f"Version {row.champion_version} of {view.model_name} has been the champion since {since:%F %H:%M} UTC."
        )
    elif ran.registered:
        told.append(f"Version {ran.registered} of {view.model_name} is registered, and none is released.")
    else:
        told.append(f"No version of {view.model_name} is registered.")
    if ran.stopped_by:
        told.append(f"The last run was stopped by {ran.stopped_by}.")
    elif figures:
        told.append(
            f"The last run's model has a ROC AUC of {figures['roc_auc']:.3f} and an accuracy of "
            f"{figures['accuracy']:.1%} on the test rows."
        )
    if view.rollout is not None:
        told.append(f"Version {view.rollout.version} is being released: {view.rollout.step}.")
    if check is not None:
        reasons = "; ".join(check.evidence.get("reasons", ()))
        told.append(
            f"The last check, as of {check.as_of:%F}, says '{check.verdict}' of version {check.model_version} after "
            f"{count_noun(check.predictions, 'prediction')}{f': {reasons}' if reasons else ''}."
        )
    else:
        told.append("No check was made yet.")
    if view.money:
        told.append(f"{describe_money(view.money)[:1].upper()}{describe_money(view.money)[1:]}.")
    if view.retraining is not None:
        told.append(f"The last retraining {ENDS.get(view.retraining.state, 'has not ended')}.")
    return told


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found
