"""Logged predictions explained and computed once more, many of them without a download for each."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path
from typing import Any

from closedloop.bootstrap import build_predictions, build_releases, load_run
from closedloop.loop.lineage import TOLERANCE, explain, reproduce
from closedloop.store.journal import read_entry


class Cached:
    """A registry that downloads each version once: MLflow takes a third of a second."""

    def __init__(self, inner: Any, folder: Path) -> None:
        self._inner, self._folder, self._found = inner, folder, {}  # type: ignore[var-annotated]

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        if version not in self._found:
            self._found[version] = self._inner.fetch_version(version, self._folder / version)
        place, digest = self._found[version]
        return Path(shutil.copytree(place, folder / "contract")), digest


def check_some(root: Path, folder: Path, *, count: int) -> dict[str, int]:
    """Explain and reproduce about ``count`` predictions of a project, as many of each version; how many of which."""
    run = load_run(root / "params.yaml", root=root)
    name, store, releases = run.dataset.model_name, build_predictions(run), build_releases(run)
    registry, entries = Cached(releases.tracking, folder), releases.journal.read(name)
    by_version = collections.defaultdict(list)
    for some in store.read_predictions(name):
        for one in some:
            by_version[one.model_version].append(one)
    checked = {}
    for version, known in sorted(by_version.items()):
        chosen = known[:: max(len(known) // -(-count // len(by_version)), 1)]
        checked[version] = len(chosen)
        for one in chosen:
            again = reproduce(store, registry, name, one.prediction_id)
            assert abs(again.score - one.score) <= TOLERANCE
            assert again.decision == one.decision
            found = explain(store, releases.journal, releases.tracking, registry, one.prediction_id)
            assert found["model"]["version"] == version
            assert found["model"]["mlflow_run"]
            assert one.features_as_of is not None
            assert found["features_as_of"] == one.features_as_of.isoformat()
            entry = read_entry(entries[found["journal"]["entry"] - 1])
            row = entry.row
            assert version == (row.champion_version if one.variant == "champion" else row.challenger_version)
            assert entry.recorded_at <= one.predicted_at
    store.database.close()
    return checked
