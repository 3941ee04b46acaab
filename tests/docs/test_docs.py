"""The pages say what the code does: nothing that a reader may type or meet is missing from them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click
import numpy as np
import pytest
import typer
import yaml
from pydantic import BaseModel

from closedloop.cli import app
from closedloop.core.limits import GateLimits
from closedloop.core.metrics import measure_classification
from closedloop.core.rollout import STEPS, RolloutPolicy
from closedloop.environment import TELEMETRY_OFF
from closedloop.loop.exporter import GAUGES
from closedloop.params import Params
from closedloop.serving.app import Application
from closedloop.serving.config import WorkerConfig
from closedloop.serving.metrics import METRICS
from closedloop.serving.worker import Worker
from closedloop.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
EXPERIMENTS = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
OBSERVABILITY = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
GRAPH = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
FREE_FORM = {"tuning.space", "model.params", "features.overrides"}


def list_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += list_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def list_commands() -> list[str]:
    """As they are typed; hidden ones are for other processes."""

    def walk(group: click.Group, prefix: str = "") -> list[str]:
        found = []
        for name, command in group.commands.items():
            if isinstance(command, click.Group):
                found += walk(command, f"{prefix}{name} ")
            elif not command.hidden:
                found.append(f"{prefix}{name}")
        return found

    return walk(typer.main.get_command(app))


@pytest.mark.parametrize("command", list_commands())
def test_every_command_is_in_the_reference(command):
    assert f"`closedloop {command}" in REFERENCE


def test_no_command_is_documented_that_does_not_exist():
    pages = README + "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    named = re.findall(r"`closedloop ([a-z][a-z-]+(?: [a-z][a-z-]+)?)", pages)
    assert len(named) > 50
    commands = set(list_commands())
    assert [name for name in named if name not in commands and name.split()[0] not in commands] == []


@pytest.mark.parametrize("key", list_keys(Params))
def test_every_parameter_is_in_the_reference_and_in_params_yaml(key):
    assert f"`{key}`" in REFERENCE
    section: object = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    if not key.startswith("simulator.") or key in ("simulator.start_date", "simulator.customers"):
        for part in key.split("."):
            assert isinstance(section, dict)
            assert part in section
            section = section[part]


@pytest.mark.parametrize("key", [key for key in list_keys(Settings) if key not in ("profile", "root")])
def test_every_setting_is_in_the_reference(key):
    assert f"`{key}`" in REFERENCE


@pytest.mark.parametrize("name", list(GateLimits.model_fields))
def test_every_gate_limit_is_in_the_reference_with_its_default(name):
    default = GateLimits.model_fields[name].default
    assert f"| `{name}` | {'null' if default is None else default} |" in REFERENCE


@pytest.mark.parametrize("field", dataclasses.fields(RolloutPolicy), ids=lambda field: field.name)
def test_every_rule_of_a_rollout_is_documented_with_its_default(field):
    default = f"{len(STEPS)} steps" if field.name == "steps" else field.default
    assert f"| `{field.name}` | {default} |" in EXPERIMENTS


@pytest.mark.parametrize("figure", [*measure_classification(np.array([0, 1]), np.array([0.2, 0.7]), 0.5), "intervals"])
def test_every_figure_is_in_the_reference(figure):
    assert f"| `{figure}` |" in REFERENCE


@pytest.mark.parametrize("target", re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
def test_every_make_target_is_documented(target):
    assert target == "help" or f"`make {target}`" in REFERENCE


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_is_documented_as_it_is_shown(name):
    labels = ", ".join(f"`{label}`" for label in METRICS[name].labels)
    assert f"| `{name}` | {METRICS[name].type} | {labels} | {METRICS[name].help} |" in SERVING


@pytest.mark.parametrize("name", list(GAUGES))
def test_every_figure_of_the_loop_is_documented_as_it_is_shown(name):
    labels = ", ".join(f"`{label}`" for label in GAUGES[name].labels)
    assert f"| `{name}` | gauge | {labels} | {GAUGES[name].help} |" in OBSERVABILITY


def test_the_routes_are_documented(tmp_path):
    application = Application(Worker(WorkerConfig("test_churn", str(tmp_path))))
    documented = dict(reversed(route) for route in re.findall(r"^\| `(GET|POST) (/\S+)` \|", SERVING, re.MULTILINE))
    assert documented == {path: method for path, (method, *_) in application._routes.items()}


def test_the_stage_table_has_the_stages_of_the_graph_in_order():
    table = README.split("| stage |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([a-z_]+)` \|", table, re.MULTILINE) == list(GRAPH)


def test_the_picture_of_the_graph_has_its_edges():
    drawn = set(re.findall(r"^\s+(\w+) --> (\w+)$", README, re.MULTILINE))
    assert drawn == set(list_edges())


def list_edges() -> list[tuple[str, str]]:
    def names(entries: list[object]) -> list[str]:
        return [next(iter(entry)) if isinstance(entry, dict) else str(entry) for entry in entries]

    made = {}
    for stage, body in GRAPH.items():
        made |= dict.fromkeys(names(body.get("outs", []) + body.get("metrics", [])), stage)
    return [(made[dep], stage) for stage, body in GRAPH.items() for dep in names(body["deps"]) if dep in made]


@pytest.mark.parametrize("variable", list(TELEMETRY_OFF))
def test_every_telemetry_switch_is_in_the_readme(variable):
    assert variable in README


def test_every_file_of_the_annotated_tree_exists():
    tree = README.split("## The tree")[1].split("```")[1]
    for line in tree.strip().splitlines():
        indent = "src/closedloop/" if line.startswith("  ") else ""
        for name in re.findall(r"[\w./]+(?:/|\.\w+)(?=[ ,]|$)", line.strip().split("  ")[0]):
            assert (ROOT / indent / name).exists() or (ROOT / name).exists(), name


def test_the_tests_that_the_untested_table_points_at_are_there():
    text = (ROOT / "docs/untested.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|k8s)/[\w/.-]+)`", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def find_missing_tests(page: str) -> list[str]:
    """Rows of a page's table that point at no test, and tests that are not where it says."""
    missing = []
    for row in re.findall(r"^\| .* \|$", page, re.MULTILINE)[1:]:
        file, named = "", re.findall(r"`([\w/.-]*)::(\w+)`", row)
        for path, test in named:
            file = path or file
            if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8"):
                missing.append(f"{file}::{test}")
        if not named:
            missing.append(row)
    return missing


def test_every_threat_points_at_a_test_that_is_there():
    page = (ROOT / "docs/threat-model.md").read_text(encoding="utf-8")
    assert page.count("\n| ") > 15
    assert find_missing_tests(page) == []
    assert find_missing_tests(page.replace("::test_a_pickle_is", "::test_no_pickle_is")) == [
        "tests/integration/test_skops.py::test_no_pickle_is_never_loaded"
    ]
    assert len(find_missing_tests(page + "| a | b | c | trust |\n")) == 1


def read_commands(title: str) -> dict[str, str]:
    """The shell blocks of a section of the runbook, by their first line, a comment."""
    section = read_runbook().split(f"## {title}\n")[1].split("\n## ")[0]
    return {name: commands for language, name, commands in list_blocks(section) if language == "sh"}


def read_inline(start: str) -> str:
    """The one command in the runbook's text that begins so."""
    (found,) = {line for line in list_inline(read_runbook()) if line.startswith(f"{start} ")}
    return found


def read_runbook() -> str:
    return (ROOT / "docs/runbook.md").read_text(encoding="utf-8")


def list_blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, name and text of each block; a comment on the first line begins with the name."""
    blocks = re.findall(r"^```(\w+)\n(?:# ([^\n]*)\n)?(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [(language, name.split(",")[0], text) for language, name, text in blocks]


def list_inline(page: str) -> list[str]:
    """Commands between backticks: a program's name and what it is told."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [one for one in re.findall(r"`([^`]*)`", text) if re.match(r"[a-z][\w-]*\s", one)]


# which test runs each command of the runbook; what asks a cluster stands in docs/untested.md
RUN_BY = {
    "closedloop doctor": "tests/e2e/test_production.py",
    "closedloop monitor": "tests/e2e/test_monitoring.py",
    "closedloop outcomes": "tests/e2e/test_monitoring.py",
    "closedloop refresh": "tests/e2e/test_refresh.py",
    "closedloop release check": "tests/e2e/test_release.py",
    "closedloop release history": "tests/e2e/test_release.py",
    "closedloop release promote": "tests/production.py",  # with which the tests of production begin
    "closedloop release rollback": "tests/e2e/test_release.py",
    "closedloop release step": "tests/e2e/test_release.py",
    "closedloop release verify": "tests/e2e/test_release.py",
    "closedloop retrain": "tests/e2e/test_retrain.py",
    "closedloop status": "tests/e2e/test_observability.py",
    "closedloop store erase": "tests/integration/test_store.py",
    "closedloop store upgrade": "tests/integration/test_store.py",
    "make cluster-job": "tests/integration/test_cluster_job.py",
    "make images": "tests/unit/test_docker.py",  # its command lines; tests/e2e/test_pipeline_workflow.py runs it
}


# which test runs what else stands there, a block by section and name, a command in the text by how it begins
READ_BY = {
    ("On one machine", "a first version"): "tests/e2e/test_images.py",
    ("Deploy", "make the Secrets"): "tests/integration/test_secrets.py",
    ("Roll out images", "roll out"): "tests/integration/test_manifests.py",
    ("Give the service a role of its own", ""): "tests/integration/test_roles.py",
    ("Back up and restore", "back up"): "tests/e2e/test_production.py",
    ("Back up and restore", "restore"): "tests/e2e/test_production.py",
    ("Back up and restore", "prove it"): "tests/e2e/test_production.py",
    ("Erase a customer", "look at what DVC would forget"): "tests/integration/test_copies.py",
    "rm -f": "tests/integration/test_copies.py",
    "redis-cli": "tests/integration/test_copies.py",
}


def find_unrun(page: str) -> list[str]:
    """Commands of a page that no test runs, though nobody says so."""
    return [
        *(line for line in list_lines(page) if not is_named(line)),
        *(f"{section}: {name}" for section, name in list_foreign_blocks(page) if not is_read((section, name))),
    ]


def list_lines(page: str) -> list[str]:
    """What is typed by itself: what stands in the text, and the lines of blocks that are a command of ours."""
    lines = "\n".join(text for _, _, text in list_blocks(page))
    return list_inline(page) + re.findall(r"^(?:closedloop|make|kubectl) .*", lines, re.MULTILINE)


def list_foreign_blocks(page: str) -> list[tuple[str, str]]:
    """Section and name of each block that has more than requests to a cluster."""
    found = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        for _, name, text in list_blocks(section):
            if not all(line.startswith("kubectl ") for line in text.splitlines()):
                found.append((section.splitlines()[0], name))
    return found


def is_named(line: str) -> bool:
    words = [word for word in line.split() if not word.startswith("-")]
    if words[0] in ("kubectl", "docker"):
        untested = (ROOT / "docs/untested.md").read_text(encoding="utf-8")
        return any(f"`{' '.join(some)}`" in untested for some in (words[:2], words[:3], words[1:2], words[1:3]))
    if words[0] in ("closedloop", "make"):
        named = " ".join(words[: 3 if words[1] in ("release", "store") else 2])
        return named in RUN_BY and is_run(named, (ROOT / RUN_BY[named]).read_text(encoding="utf-8"))
    return any(is_read(start) for start in READ_BY if isinstance(start, str) and line.startswith(f"{start} "))


def is_read(key: str | tuple[str, str]) -> bool:
    """Whether the test that is named takes the words from the runbook itself."""
    if key not in READ_BY:
        return False
    test = (ROOT / READ_BY[key]).read_text(encoding="utf-8")
    if isinstance(key, str):
        return f'read_inline("{key}")' in test
    section, name = key
    return f'["{name}"]' in test and f'read_commands("{section}")' in test if name else "```sql" in test


def test_every_command_of_the_runbook_is_run_by_a_test_or_said_not_to_be():
    page = read_runbook()
    assert find_unrun(page) == []
    assert len(list_foreign_blocks(page)) == sum(isinstance(key, tuple) for key in READ_BY)
    more = """
## Elsewhere
Say `dvc gc --workspace` and `closedloop score`, `kubectl delete pod` or:
```sh
# drop it, all of it
dropdb closedloop
```
"""
    unrun = ["dvc gc --workspace", "closedloop score", "kubectl delete pod", "Elsewhere: drop it"]
    assert find_unrun(page + more) == unrun


def is_run(command, test):
    """Whether a test's source has the words of a command one after the other."""
    program, *words = command.split()
    return re.search(rf'"(?:{program} )?{" ".join(words)}["\s]', re.sub(r'",\s*"', " ", test)) is not None


def test_a_function_of_that_name_is_no_run_of_a_command():
    assert is_run("closedloop store erase", 'run("store", "erase", "--customer-id", "anna")')
    assert is_run("closedloop store erase", 'sh("store erase --customer-id anna")')
    assert not is_run("closedloop store erase", 'Store(url).erase("anna"); "store"; "erase"')
