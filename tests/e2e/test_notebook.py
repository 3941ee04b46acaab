"""The notebook runs from its first cell to its last, and is kept without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "notebooks/explore.ipynb"


def read_notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert len(cells) >= 6
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.thorough
@pytest.mark.timeout(2400)
def test_every_cell_runs_on_a_trained_project(small_shop, monkeypatch, tmp_path):
    monkeypatch.setenv("CLOSEDLOOP_PROJECT", str(small_shop.root))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):  # of another project, as a shell may have them
        monkeypatch.setenv(name, f"sqlite:///{tmp_path}/other.db")
    notebook = read_notebook()
    NotebookClient(notebook, timeout=600).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in shown if output.output_type == "error"] == []
    assert "score" in str(shown)
