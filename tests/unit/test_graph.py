"""dvc.yaml names the code of each stage: what is not among a stage's deps can be fixed, and no run notices."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GRAPH: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
COMMANDS = ast.parse((ROOT / "src/closedloop/cli/training.py").read_text(encoding="utf-8"))
COMPUTES = ("closedloop.core.", "closedloop.simulator.", "closedloop.stages.", "closedloop.config.featureset")
COMPUTES += ("closedloop.tabular.", "closedloop.rules")


def walk_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads."""
    yield node
    skipped = node.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from walk_run_time(child)


def list_imports(tree: ast.AST) -> set[str]:
    """Files of our modules that are imported at the top or inside a function."""
    names = set()
    for node in walk_run_time(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    paths = {f"src/{name.replace('.', '/')}.py" for name in names if name.startswith(COMPUTES)}
    return {path for path in paths if (ROOT / path).is_file()}


def list_code(stage: str) -> set[str]:
    """What computes in a stage: what its command and its deps import, and what these import."""
    command = next(node for node in COMMANDS.body if isinstance(node, ast.FunctionDef) and node.name == stage)
    code: set[str] = set()
    found = list_imports(command)
    for dep in GRAPH[stage]["deps"]:
        if dep.endswith(".py"):
            found |= list_imports(ast.parse((ROOT / dep).read_text(encoding="utf-8")))
    while found - code:
        path = (found - code).pop()
        code.add(path)
        found |= list_imports(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    return code


@pytest.mark.parametrize("stage", GRAPH)
def test_the_code_that_computes_in_a_stage_is_among_its_deps(stage: str) -> None:
    code, deps = list_code(stage), GRAPH[stage]["deps"]
    assert f"src/closedloop/stages/{stage}.py" in code
    assert sorted(path for path in code if not any(path == dep or path.startswith(f"{dep}/") for dep in deps)) == []


def test_an_import_inside_a_function_counts_and_one_for_types_does_not() -> None:
    source = """
if TYPE_CHECKING:
    from closedloop.core.training.splits import score_fold
else:
    import closedloop.core.features.labels
def run():
    from closedloop.core.evaluation import gates as gate
    from closedloop.stages.features import compute_features
"""
    names = ("core/features/labels", "core/evaluation/gates", "stages/features")
    assert list_imports(ast.parse(source)) == {f"src/closedloop/{name}.py" for name in names}
