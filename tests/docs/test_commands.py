"""Commands that the pages tell a reader to type: each exists with its options, and a test runs it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import cast

import pytest
import typer
from typer.core import TyperGroup

from closedloop.cli.main import app
from tests.docs.test_docs import RUN_BY, is_run
from tests.unit.test_messages import list_options

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "README.ja.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS = list_options(cast(TyperGroup, typer.main.get_command(app)))
OPTION = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")
# which test runs each command that stands in a block; those of the runbook are looked at in test_docs.py
TYPED_IN = RUN_BY | {
    "closedloop attach": "tests/integration/test_attach.py",
    "closedloop backtest": "tests/e2e/test_backtest.py",
    "closedloop campaign report": "tests/e2e/test_campaigns.py",
    "closedloop campaign start": "tests/e2e/test_campaigns.py",
    "closedloop describe": "tests/e2e/test_describe.py",
    "closedloop experiment analyze": "tests/unit/cli/test_experiment.py",
    "closedloop experiment paired": "tests/unit/cli/test_experiment.py",
    "closedloop experiment size": "tests/unit/cli/test_experiment.py",
    "closedloop init": "tests/e2e/test_levels.py",
    "closedloop run": "tests/e2e/test_your_data.py",
    "closedloop score": "tests/e2e/test_score.py",
    "closedloop why": "tests/e2e/test_actions.py",
    "make demo": "tests/e2e/test_pythons.py",
    "make loop": "tests/e2e/test_loop.py",
    "make run": "tests/e2e/test_pythons.py",
    "make score": "tests/integration/test_make.py",
    "make serve": "tests/integration/test_make.py",
    "make status": "tests/integration/test_make.py",  # among the targets that are given a data set
}
# what stands in a block and is no command of ours: who runs it, or why nobody does
OTHERS = {
    "curl": "tests/e2e/test_readme.py and test_actions.py send such requests",
    "pip": "tests/e2e/test_levels.py builds the wheel and installs it with its extras, by uv",
    "python3": "the same makes an environment by uv",
    ".": "activates it",
}


def list_typed(page: str) -> list[str]:
    """The lines of a page's blocks that are typed, each whole, without comments and the data set's option."""
    typed = []
    for language, text in re.findall(r"^```(\w+)[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        lines = text.replace("\\\n", " ").splitlines()
        if language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        elif language not in ("sh", "bash"):
            continue
        parted = [part for line in lines for part in re.split(r"\s&&\s", re.split(r"\s#|^#", line)[0])]
        typed += [part.strip().removeprefix(".venv/bin/") for part in parted if part.strip()]
    return [re.sub(r"^(closedloop) --dataset \w+", r"\1", line) for line in typed if not line.startswith("cd ")]


def list_mentioned(page: str) -> list[str]:
    """Calls of ours between backticks, in which options may stand in brackets."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`(closedloop [a-z][^`]*)`", text)


def find_wrong_options(line: str) -> list[str]:
    """Options of a call of ours that the command does not have."""
    line = re.sub(r"\$\([^)]*\)", "", line)  # another program's
    words = line.split()[1:]
    name = next((" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in OPTIONS), None)
    return [f"{line}: no such command"] if name is None else sorted(set(OPTION.findall(line)) - OPTIONS[name])


def find_unread(line: str) -> list[str]:
    """Variables that a call of make gives to a target that does not read them."""
    words = shlex.split(line)
    recipes = re.findall(rf"^{re.escape(words[1])}:(.*?)(?=^\S|\Z)", MAKEFILE, re.MULTILINE | re.DOTALL)
    if not recipes:
        return [f"{line}: no such target"]
    given = [name for name, sign, _ in (word.partition("=") for word in words[2:]) if sign]
    read = (
        " ".join(recipes)
        .replace("(of)", "DATASET")
        .replace("(tag)", "TAG")
        .replace("(job)", "JOB")
        .replace("(changed)", "MODEL_VERSION")
    )
    return [f"{line}: {name}" for name in given if name not in read]


def name_command(line: str) -> str:
    """The program with its command, as `RUN_BY` has it."""
    words = [word for word in line.split() if not word.startswith("-")]
    return " ".join(words[: 3 if words[1] in ("release", "store", "experiment", "edge", "campaign") else 2])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_says_to_type_exists_as_it_stands(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    calls = [line for line in list_typed(text) if line.startswith("closedloop ")] + list_mentioned(text)
    assert [wrong for line in calls for wrong in find_wrong_options(line)] == []
    assert [wrong for line in list_typed(text) if line.startswith("make ") for wrong in find_unread(line)] == []


def find_untested(text: str) -> list[str]:
    """Lines of blocks that no test runs, though nothing says why."""
    untested = []
    for line in list_typed(text):
        if line.split()[0] not in ("closedloop", "make"):
            untested += [line] if line.split()[0] not in OTHERS else []
            continue
        name = name_command(line)
        program = name if name in TYPED_IN else ""
        # a test calls a group's commands by a function of its own: run("size", ...)
        short = f"closedloop {name.split()[-1]}" if " experiment " in name else name
        test = (ROOT / TYPED_IN[program]).read_text(encoding="utf-8") if program else ""
        if not is_run(short, test):
            untested.append(line)
    return untested


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("runbook.md", "untested.md")],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_a_test_runs_what_a_page_says_to_type(page: Path) -> None:
    assert find_untested(page.read_text(encoding="utf-8")) == []


def test_the_searches_find_what_is_wrong() -> None:
    page = "Say `closedloop monitor --model FOLDER`.\n```sh\nmake status INPUT=a\nmake nothing\nclosedloop upset\n```\n"
    assert [wrong for line in list_mentioned(page) for wrong in find_wrong_options(line)] == ["--model"]
    one, other, third = list_typed(page)
    assert [*find_unread(one), *find_unread(other), *find_wrong_options(third)] == [
        "make status INPUT=a: INPUT",
        "make nothing: no such target",
        "closedloop upset: no such command",
    ]
    assert find_untested("```console\n$ closedloop store purge --as-of 2024-01-01\nanswer\n$ dvc gc\n```\n") == [
        "closedloop store purge --as-of 2024-01-01",
        "dvc gc",
    ]


# calls of other programs in the text: the test that makes them with the words that it has, or why no test does
CALLED = {
    "bentoml build": ("tests/integration/test_bentoml.py", r"bentoml build|\"build\""),
    "bentoml serve": ("tests/integration/test_bentoml.py", r"bentoml serve|\"serve\""),
    "dvc config --local core.no_scm true": ("tests/integration/test_dvc.py", "no_scm"),
    "dvc exp run": ("tests/e2e/test_dvc.py", '"exp", "run"'),
    "dvc metrics": ("tests/e2e/test_dvc.py", '"metrics", "(show|diff)"'),
    "dvc plots": ("tests/integration/test_pages.py", '"dvc", "plots", "show"'),
    "dvc pull": ("tests/e2e/test_production.py", '"pull"'),
    "dvc push": ("tests/e2e/test_production.py", '"push"'),
    "dvc repro": ("tests/e2e/test_dvc.py", '"repro"'),
    "python k8s/dashboards/generate.py": ("tests/integration/test_manifests.py", "generate"),
    "python make_coffee.py": ("tests/e2e/test_your_data.py", "make_coffee"),
}
NOT_CALLED = {
    "apt-get": "of the system",
    "docker build": "docs/untested.md; tests/e2e/test_images.py builds by the engine's interface",
    "explorer.exe": "opens a page on a desktop",
    "git": "Git's own",
    "kubectl": "docs/untested.md",
    "mlflow": "MLflow's own: test_mlflow_ui.py opens its pages, test_mlflow.py scores as its server does",
    "open": "opens a page on a desktop",
    "pytest": "runs tests",
    "python benchmarks/": "measures for minutes or hours; docs/benchmarks.md says when each was run",
    "xdg-open": "opens a page on a desktop",
}
PROGRAMS = (
    "apt-get|bentoml|docker|dvc|explorer.exe|feast|git|kubectl|mlflow|npm|open|pip|promtool|pytest|python|uv|xdg-open"
)


def find_unexplained(text: str) -> list[str]:
    """Calls of other programs between backticks that no test makes, though nothing says why."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    calls = re.findall(rf"`((?:{PROGRAMS}) [^`]*)`", text)
    return [call for call in calls if not call.startswith((*CALLED, *NOT_CALLED))]


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name not in ("runbook.md", "untested.md")],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_a_call_of_another_program_in_the_text_is_made_by_a_test_or_carries_a_reason(page: Path) -> None:
    assert find_unexplained(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("call", CALLED)
def test_the_test_that_is_named_makes_the_call(call: str) -> None:
    file, words = CALLED[call]
    assert re.search(words, (ROOT / file).read_text(encoding="utf-8"))
    assert find_unexplained(f"`{call} x` and `dvc gc --workspace`") == ["dvc gc --workspace"]
