"""The pages say what the code does: nothing that a reader may type or meet is missing from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import typer
import yaml
from pydantic import BaseModel
from typer.core import TyperGroup

from closedloop.cli.main import app
from closedloop.config.environment import TELEMETRY_OFF
from closedloop.config.params import Params
from closedloop.config.settings import Settings
from closedloop.core.evaluation.excuses import EXCUSABLE
from closedloop.core.evaluation.gates import REMEDIES
from closedloop.core.evaluation.limits import GateLimits
from closedloop.core.evaluation.metrics import measure_classification
from closedloop.core.evaluation.value import CustomerValue, KeptCustomer
from closedloop.core.features.windows import AGGREGATIONS
from closedloop.core.release.policy import ReleasePolicy
from closedloop.core.training.model_types import MODEL_TYPES
from closedloop.loop.status.exporter import GAUGES
from closedloop.serving.config import WorkerConfig
from closedloop.serving.exposition import PREFIX
from closedloop.serving.http.app import Application
from closedloop.serving.metric_docs import METRICS
from closedloop.serving.worker import Worker

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
EXPERIMENTS = (ROOT / "docs/experiments.md").read_text(encoding="utf-8")
OBSERVABILITY = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
YOUR_DATA = (ROOT / "docs/your-data.md").read_text(encoding="utf-8")
SERVING = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
# what the rows of the reference's tables are about: the names in their first cells
CELLS = [row.replace(r"\|", "or").split("|")[1] for row in REFERENCE.splitlines() if row.startswith("|")]
DESCRIBED = {name for cell in CELLS for name in re.findall(r"`([^`]+)`", cell)}
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

    def walk(group: TyperGroup, prefix: str = "") -> list[str]:
        found = []
        for name, command in group.commands.items():
            if isinstance(command, TyperGroup):  # Typer carries a click of its own
                found += walk(command, f"{prefix}{name} ")
            elif not command.hidden:
                found.append(f"{prefix}{name}")
        return found

    return walk(cast(TyperGroup, typer.main.get_command(app)))


@pytest.mark.parametrize("command", list_commands())
def test_every_command_is_in_the_reference(command):
    assert any(f"{name} ".startswith(f"closedloop {command} ") for name in DESCRIBED)


def test_no_command_is_documented_that_does_not_exist():
    pages = README + "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md")))
    named = re.findall(r"`closedloop ([a-z][a-z-]+(?: [a-z][a-z-]+)?)", pages)
    assert len(named) > 50
    assert find_unknown(named) == []
    assert find_unknown(["run shop", "release", "release undo", "relase"]) == ["release undo", "relase"]


def find_unknown(named: list[str]) -> list[str]:
    """Commands that do not exist; the second word may be an argument, but not of a group."""
    commands = set(list_commands())
    groups = {name.split()[0] for name in commands if " " in name}
    return [
        name
        for name in named
        if name not in commands | groups and (name.split()[0] in groups or name.split()[0] not in commands)
    ]


@pytest.mark.parametrize("key", list_keys(Params))
def test_every_parameter_is_in_the_reference_and_in_params_yaml(key):
    assert key in DESCRIBED
    section: object = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    if not key.startswith("simulator.") or key in ("simulator.start_date", "simulator.customers"):
        for part in key.split("."):
            assert isinstance(section, dict)
            assert part in section
            section = section[part]


@pytest.mark.parametrize("name", [*MODEL_TYPES, *AGGREGATIONS])
def test_every_model_type_and_aggregation_is_in_the_reference(name):
    rows = re.findall(r"^\| `(?:model\.type|features\.window_days)`.*$", REFERENCE, flags=re.MULTILINE)
    assert re.search(rf"\b{name}\b", " ".join(rows))


@pytest.mark.parametrize("key", [key for key in list_keys(Settings) if key not in ("profile", "root")])
def test_every_setting_is_in_the_reference(key):
    assert key in DESCRIBED


@pytest.mark.parametrize("name", list(GateLimits.model_fields))
def test_every_gate_limit_is_in_the_reference_with_its_default(name):
    default = GateLimits.model_fields[name].default
    assert f"| `{name}` | {'null' if default is None else default} |" in REFERENCE


@pytest.mark.parametrize("name", [*CustomerValue.model_fields, *KeptCustomer.model_fields])
def test_every_key_of_a_value_is_described(name):
    rows = [row for row in YOUR_DATA.splitlines() if row.startswith("| `value.")]
    said = {"number": "a number"}.get(name, name)
    assert any(said in row for row in rows)


def test_every_gate_has_a_remedy_and_the_reference_says_when_it_blocks():
    limits, rest = REFERENCE.split("\n## Gates\n")[1].split("\n| gate | blocks |\n")
    judged = {gate for cell in re.findall(r"\| `([\w, ]+)`: ", limits) for gate in cell.split(", ")}
    blocking = set(re.findall(r"`(\w+)`", rest.split("\n\n")[0]))
    assert judged <= set(REMEDIES) <= blocking


def test_the_reference_names_the_gates_that_a_champion_excuses():
    sentence = re.search(
        r"Where there is a champion and a retrained model wins against it, (.*?) are \*\*excused", REFERENCE, re.DOTALL
    )
    assert sentence is not None
    assert set(re.findall(r"`(\w+)`", sentence[1])) == EXCUSABLE


@pytest.mark.parametrize("name", list(ReleasePolicy.model_fields))
def test_every_rule_of_a_release_is_documented_with_its_default(name):
    default = ReleasePolicy.model_fields[name].default
    shown = ", ".join(default) if name == "steps" else "null" if default is None else default
    assert f"| `{name}` | {shown} |" in EXPERIMENTS


@pytest.mark.parametrize("figure", [*measure_classification(np.array([0, 1]), np.array([0.2, 0.7]), 0.5), "intervals"])
def test_every_figure_is_in_the_reference(figure):
    assert f"| `{figure}` |" in REFERENCE


@pytest.mark.parametrize("target", re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
def test_every_make_target_is_documented(target):
    assert target == "help" or f"`make {target}`" in REFERENCE


@pytest.mark.parametrize("name", list(METRICS))
def test_every_metric_is_documented_as_it_is_shown(name):
    labels = ", ".join(f"`{label}`" for label in METRICS[name].labels)
    assert f"| `{PREFIX}{name}` | {METRICS[name].type} | {labels} | {METRICS[name].help} |" in SERVING


@pytest.mark.parametrize("name", list(GAUGES))
def test_every_figure_of_the_loop_is_documented_as_it_is_shown(name):
    labels = ", ".join(f"`{label}`" for label in GAUGES[name].labels)
    assert f"| `{PREFIX}{name}` | gauge | {labels} | {GAUGES[name].help} |" in OBSERVABILITY


def test_the_routes_are_documented(tmp_path):
    application = Application(Worker(WorkerConfig(model_name="test_churn", state_dir=tmp_path)))
    documented = dict(reversed(route) for route in re.findall(r"^\| `(GET|POST) (/\S+)` \|", SERVING, re.MULTILINE))
    assert documented == {path: method for path, (method, *_) in application.routes.items()}


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


def test_every_gate_is_in_the_readme_with_a_test_that_is_there():
    table = README.split("\n## Gates\n")[1].split("\n## ")[0]
    assert find_missing_tests(table) == []
    assert find_missing_tests(table.replace("::test_labels_that_say", "::test_no_labels_say")) == [
        "tests/e2e/test_model_gates.py::test_no_labels_say_nothing"
    ]
    named = {name for row in table.splitlines() if row.startswith("| ") for name in re.findall(r"`(\w+)`", row)}
    assert set(REMEDIES) | {"data", "skew", "champion_challenger"} <= named


def test_the_readme_is_short():
    assert len(README.splitlines()) < 250


def read_code(page: str) -> list[tuple[str, ...]]:
    """What the blocks of a page hold, without comments: shell lines as they stand, of the tree the names alone."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [tuple(filter(None, (read_line(kind, line) for line in text.splitlines()))) for kind, text in blocks]


def read_line(kind: str, line: str) -> str:
    if kind == "sh":
        return line.partition(" # ")[0].strip()
    return re.split(r"\s{2,}", line.strip())[0] if not kind and not line.startswith("    ") else kind and line


def test_the_japanese_readme_has_the_same_commands_files_and_links():
    japanese = (ROOT / "README.ja.md").read_text(encoding="utf-8")
    assert read_code(japanese) == read_code(README)
    assert len(read_code(README)) == 7

    def list_links(page: str) -> list[str]:
        return [link for link in re.findall(r"\]\(([^)]+)\)", page) if not link.startswith("README")]

    assert sorted(list_links(japanese)) == sorted(list_links(README))
    assert set(list_words(japanese)) == set(list_words(README))
    for page in (README, japanese):
        for link in re.findall(r"\]\(([^)#]+)", page):
            assert (ROOT / link).exists(), link


def list_headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def find_dead_links(page: Path) -> list[str]:
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (heading and heading not in list_headings(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], ids=lambda page: page.name)
def test_every_link_between_the_pages_leads_to_a_file_and_a_heading(page):
    assert find_dead_links(page) == []


def test_every_page_that_the_code_names_is_there():
    files = [file for folder in ("src", "k8s", "tests") for file in (ROOT / folder).rglob("*") if file.is_file()]
    named = {page for file in files for page in re.findall(rb"\bdocs/[a-z0-9/-]+\.md", file.read_bytes())}
    assert len(named) > 10
    assert [page for page in sorted(named) if not (ROOT / page.decode()).exists()] == []


def list_words(page: str) -> list[str]:
    """What stands between backticks outside of blocks: commands, files, gates."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL))


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
    ("First model in a cluster", "a first model"): "tests/e2e/test_job_secrets.py",
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


def list_expressions() -> dict[str, str]:
    """What Prometheus is asked in a cluster, by file."""
    folder = ROOT / "k8s/base/observability"
    places = [folder / "rules.yaml", folder / "adapter.yaml", *sorted(folder.glob("dashboards/*.json"))]
    places += sorted((ROOT / "k8s/base").rglob("horizontalpodautoscaler.yaml"))
    return {str(place.relative_to(ROOT)): place.read_text(encoding="utf-8") for place in places}


@pytest.mark.parametrize(("place", "text"), list_expressions().items(), ids=list_expressions())
def test_what_a_cluster_asks_for_is_on_a_page_by_its_present_name(place, text):
    known = {**{name: doc.type for name, doc in METRICS.items()}, **dict.fromkeys(GAUGES, "gauge")}
    ends = ("_bucket", "_sum", "_count", "")  # the last: what prometheus-adapter makes of two of them
    shown = {name + end for name, kind in known.items() for end in (ends if kind == "histogram" else ("",))}
    asked = set(re.findall(rf"\b{PREFIX}(\w+)", text))
    assert asked, place
    assert asked <= shown, place
    assert not re.findall(rf"\b(?:{'|'.join(known)})(?:_bucket|_sum|_count)?\b", text), "a deprecated name"


def list_alerts() -> dict[str, dict]:
    groups = yaml.safe_load((ROOT / "k8s/base/observability/rules.yaml").read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


@pytest.mark.parametrize(("name", "rule"), list_alerts().items())
def test_every_alert_has_a_severity_a_page_in_the_runbook_and_cases(name, rule):
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    assert f"\n## {name}\n" in read_runbook()
    assert f'\n    "{name}": [' in (ROOT / "tests/integration/test_alerts.py").read_text(encoding="utf-8")


def test_the_runbook_has_no_alert_that_does_not_exist():
    alerts = read_runbook().split("# Alerts")[1].split("\n# ")[0]
    assert re.findall(r"^## (\w+)$", alerts, re.MULTILINE) == list(list_alerts())
