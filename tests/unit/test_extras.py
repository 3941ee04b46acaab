"""A package that is not installed is named with the extra that brings it, wherever it is imported."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from closedloop.cli import main as cli
from closedloop.config.sources import SqlSource
from closedloop.errors import ConfigError
from closedloop.extras import COLLECTIONS, NEEDED, find_extra, find_missing, require_modules
from closedloop.tabular.sources import read_chunks

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BUNDLED = {"fsspec", "requests", "urllib3", "scipy", "redis"}  # by DVC, MLflow, kfp, scikit-learn, Feast
OWN = {"rules"}  # the edge script lies beside it


def list_imports() -> set[str]:
    """Packages of others that the package imports."""
    found = set()
    for path in (ROOT / "src/closedloop").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {name.name.partition(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"closedloop", "__future__"}


def test_every_import_is_in_the_base_or_in_an_extra_that_a_message_can_name(monkeypatch):
    extras = PROJECT["optional-dependencies"].items()  # an environment may be older
    told = [f"{text}; extra == '{extra}'" for extra, texts in extras for text in texts]
    monkeypatch.setitem(find_extra.__globals__, "requires", lambda _: told)
    base = {re.split(r"[^\w.-]", text)[0].lower().replace("-", "_") for text in PROJECT["dependencies"]}
    base |= {"sklearn", "yaml", "ibis", "google"}
    missing = {name for name in list_imports() - BUNDLED - OWN if name.lower() not in base and find_extra(name) is None}
    assert missing == set()


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("mlflow", "track"),
        ("dvc", "versions"),
        ("feast", "features"),
        ("evidently", "monitor"),
        ("kfp", "kfp"),
        ("pyspark", "spark"),
        ("xgboost", "boost"),
    ],
)
def test_a_missing_package_ends_the_command_with_its_extra(module, extra, monkeypatch, capsys):
    def fail() -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert f"{module}, which is not installed: install closedloop[{extra}]" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["bigquery", "snowflake"])
def test_a_database_without_its_driver_names_the_extra(kind, monkeypatch):
    monkeypatch.setenv("STORE", f"{kind}://user:sesame@host/db")
    source = SqlSource(type="sql", url_variable="STORE", query="SELECT 1")
    with pytest.raises(ConfigError, match=rf"install closedloop\[{kind}\]") as error:
        list(read_chunks(source, None, ["a"]))
    assert "sesame" not in str(error.value)


def test_the_extras_are_in_the_page_of_levels():
    page = (ROOT / "docs/levels.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z0-9]+)`", page[page.index("## Extras") :]))
    assert set(PROJECT["optional-dependencies"]) - set(COLLECTIONS) <= named


def test_a_command_that_is_offered_says_at_once_which_extra_it_needs(monkeypatch):
    assert find_missing() == {}
    monkeypatch.setitem(find_missing.__globals__, "has_module", lambda name: name not in ("feast", "httptools", "kfp"))
    assert find_missing() == {"demo": "serve,features", "retrain": "kfp", "serve": "serve"}
    with pytest.raises(ConfigError, match=r"install closedloop\[kfp\]"):
        require_modules("retrain")
    with pytest.raises(ConfigError, match=r"\(httptools, feast\): install closedloop\[serve,features\]"):
        require_modules("demo")
    monkeypatch.undo()
    for command in NEEDED:
        require_modules(command)
