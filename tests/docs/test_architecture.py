"""The page about the architecture cannot go stale: its picture and its file names are held against the package."""

from __future__ import annotations

import ast
import collections
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import grimp
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/closedloop"
PAGE = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
LINES_MAX, PARAMETERS_MAX = 40, 8
EVERYWHERE = {"msgspec", "numpy", "pandas", "pydantic"}  # what rows and records are made of


def list_rooms() -> set[str]:
    """The folders and files directly in the package, as the pages name them."""
    folders = {f"{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    return folders | {path.name for path in PACKAGE.glob("[!_]*.py")}


def read_contracts() -> list[dict[str, Any]]:
    """The import contracts of `lint-imports`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = project["tool"]["importlinter"]["contracts"]
    return found


def test_the_picture_is_that_of_the_imports() -> None:
    subprocess.run([sys.executable, ROOT / "docs/rooms.py", "--check"], check=True, cwd=ROOT)


def test_every_room_is_described_and_every_file_is_there() -> None:
    named = re.findall(r"`([\w/]+(?:\.(?:py|md|yaml)|/))`", PAGE)
    missing = [
        name for name in named if not any((base / name).exists() for base in (PACKAGE, ROOT)) and "NAME" not in name
    ]
    assert missing == []
    assert list_rooms() - set(named) == set()


def test_the_readmes_show_every_room() -> None:
    for name in ("README.md", "README.ja.md"):
        tree = (ROOT / name).read_text(encoding="utf-8").split("src/closedloop/")[1].split("```")[0]
        assert list_rooms() - set(re.findall(r"\w+(?:/|\.py)", tree)) == set(), name


def test_a_room_without_a_place_among_the_layers_breaks_the_contract() -> None:
    (layers,) = (contract for contract in read_contracts() if contract["type"] == "layers")
    assert layers["exhaustive"]
    assert layers["containers"] == ["closedloop"]


def test_unit_tests_lie_in_the_rooms_of_what_they_test() -> None:
    folders = {path.parent.relative_to(ROOT / "tests/unit") for path in (ROOT / "tests/unit").rglob("test_*.py")}
    assert len(folders) > 10
    assert [str(folder) for folder in folders if not (PACKAGE / folder).is_dir()] == []


def test_the_names_that_an_addition_goes_to_are_in_their_files() -> None:
    found = re.findall(r"`([A-Z]\w+)` in `([\w/]+\.py)`", PAGE)
    assert len(found) >= 3
    places = {file: PACKAGE / file if (PACKAGE / file).exists() else ROOT / file for _, file in found}
    texts = {file: place.read_text(encoding="utf-8") for file, place in places.items()}
    missing = [one for one in found if not re.search(rf"^(class )?{one[0]}\b", texts[one[1]], re.MULTILINE)]
    assert missing == []


def test_of_every_package_that_is_imported_a_contract_says_who_may() -> None:
    graph = grimp.build_graph("closedloop", include_external_packages=True, exclude_type_checking_imports=True)
    found = {name for name in graph.modules if graph.is_module_squashed(name)}
    packages = found - sys.stdlib_module_names - {"rules"}  # a file that lies beside the edge script
    contracts = read_contracts()
    named = {name for contract in contracts for name in contract.get("protected_modules", ())}
    assert {"mlflow", "redis"} <= packages
    assert packages - named == EVERYWHERE
    assert not any("ignore_imports" in contract for contract in contracts)


def measure(node: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, int]:
    """Lines without the docstring, and parameters without ``self``."""
    first = node.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) and first.end_lineno else 0
    given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return (node.end_lineno or 0) - node.lineno + 1 - docstring, len(
        [one for one in given if one.arg not in ("self", "cls")]
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_function_is_long(path: Path) -> None:
    if path.parent.name == "versions":
        return  # a migration is a list of steps
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    found = {node.name: measure(node) for node in functions}
    assert {name: size for name, size in found.items() if size[0] > LINES_MAX or size[1] > PARAMETERS_MAX} == {}


def list_nouns(tree: ast.Module) -> list[str]:
    """The classes and types that a module defines for others; names of one file alone begin with an underscore."""
    aliases = [node for node in tree.body if isinstance(node, ast.Assign) and "TypeVar" not in ast.unparse(node.value)]
    names = [ast.unparse(node.targets[0]) for node in aliases]
    names += [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return [name for name in names if re.fullmatch(r"[A-Z][a-z]\w*", name) and name != "Floats"]


def test_no_two_classes_or_types_of_the_package_have_one_name() -> None:
    """A reader who searches for a noun finds its one home."""
    files = sorted(PACKAGE.rglob("*.py"))
    names = [name for file in files for name in list_nouns(ast.parse(file.read_text(encoding="utf-8")))]
    assert len(names) > 100
    assert [name for name, count in collections.Counter(names).items() if count > 1] == []
