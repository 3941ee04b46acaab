"""The result of the last training run in the working directory: a registered version, or the gate that stopped it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from closedloop.config.layout import Layout
from closedloop.errors import count_noun


class LastRun(NamedTuple):
    """``registered`` is a version, or None; ``stopped_by`` names gates and the page about them, or is ""."""

    registered: str | None = None
    stopped_by: str = ""


def read_last_run(model_name: str, layout: Layout | None = None) -> LastRun:
    """Read the reports of the stages; what is missing, or of another model, says nothing."""
    layout = layout or Layout()
    registered, gates = _read(layout.registration), _read(layout.gates)
    version = registered.get("version") if registered.get("model_name") == model_name else None
    failed = [name for name, one in gates.get("gates", {}).items() if one["blocking"] and not one["passed"]]
    stopped_by = f"the gate {', '.join(failed)} ({layout.card})" if failed else ""
    if critical := _read(layout.data_quality).get("failed_critical"):
        stopped_by = f"the data gate ({count_noun(critical, 'expectation')}, {layout.data_quality_page})"
    return LastRun(None if version is None else str(version), stopped_by)


def list_with_results(workspaces: Path) -> list[str]:
    """The data sets with a workspace in which a run came as far as a model, or was stopped by a gate."""
    return sorted(folder.name for folder in workspaces.glob("*") if has_results(folder))


def has_results(folder: Path) -> bool:
    """Whether a run in a project's folder came as far as a model, or was stopped by a gate; one that failed did not."""
    layout = Layout()
    stopped = _read(folder / layout.data_quality).get("failed_critical", 0) > 0
    return stopped or (folder / layout.train_metrics).is_file()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
