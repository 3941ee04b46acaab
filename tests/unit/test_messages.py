"""Messages count in right English: "1 row", "2 rows" (`closedloop.errors.count_noun`)."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import typer
from typer.core import TyperGroup

from closedloop.cli.main import app
from closedloop.errors import count_noun

PACKAGE = Path(__file__).parents[2] / "src/closedloop"
NOUNS = (
    "breaches|cells|challengers|checks|columns|copies|customers|days|distributions|duplicates|entries|errors|events|"
    "expectations|features|files|gates|hours|ids|items|labels|lines|minutes|models|names|outcomes|positions|"
    "predictions|processes|records|rejects|reports|requests|resamples|rows|rules|runs|samples|seconds|series|shadows|"
    "snapshots|stages|steps|ticks|tokens|transactions|units|values|versions|warnings|workers"
)
ADJECTIVES = r"(?:(?!(?:of|the|in|on|from|with|takes)\b)[a-z]+ ){0,2}?"
COUNTED = re.compile(rf" {ADJECTIVES}(?:{NOUNS})\b")
LOGGED = re.compile(rf"%[\d.]*[df] {ADJECTIVES}(?:{NOUNS})\b")
# Figures of these are never 1, or what stands before the noun is no figure.
REVIEWED = {
    "core/evaluation/gates.py: {rows_name} rows",  # "train", "test"
    "core/training/splits.py: {name} rows of a fold hold one class only: use",  # the same
    "rules.py: {len(breaches)} rules are broken",  # beside "1 rule is broken": edge machines have that file alone
}

OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
# The commands that print a message which names an option: each of them must have that option.
PRINTED_BY = {
    "adapters/apscheduler.py: --every": ("monitor", "release step"),
    "cli/attach.py: --as-of": ("attach",),
    "cli/backtest.py: --from": ("backtest",),
    "cli/backtest.py: --horizon-days": ("backtest",),
    "loop/backtest/history.py: --every": ("backtest",),
    "loop/backtest/history.py: --from": ("backtest",),
    "loop/backtest/history.py: --horizon-days": ("backtest",),
    "cli/campaign.py: --capacity": ("campaign start",),
    "cli/campaign.py: --holdout": ("campaign start",),
    "cli/campaign.py: --started": ("campaign report",),
    "cli/serving.py: --input": ("score",),
    "loop/campaigns/report.py: --as-of": ("outcomes",),
    "loop/campaigns/start.py: --segment": ("campaign start",),
    "store/actions.py: --capacity": ("campaign start",),
    "store/actions.py: --holdout": ("campaign start",),
    "store/actions.py: --rank-by": ("campaign start",),
    "cli/experiment.py: --control": ("experiment analyze",),
    "cli/experiment.py: --treatment": ("experiment analyze",),
    "cli/monitoring.py: --as-of": ("monitor",),
    "cli/monitoring.py: --every": ("monitor",),
    "cli/monitoring.py: --fail-on": ("monitor", "attach"),
    "cli/monitoring.py: --since": ("skew",),
    "cli/options.py: --as-of": ("exporter", "serve", "status", "stream"),
    "cli/options.py: --dataset": ("run",),
    "cli/options.py: --every": ("monitor", "release step"),
    "cli/options.py: --model": ("serve", "stream", "score", "edge export"),
    "cli/replay.py: --from": ("replay",),
    "cli/replay.py: --to": ("replay",),
    "cli/serving.py: --as-of": ("score",),
    "cli/serving.py: --bento": ("serve",),
    "cli/serving.py: --model": ("serve",),
    "cli/training.py: --dataset": ("run",),
    "cli/training.py: --force": ("describe",),
    "cli/training.py: --name": ("describe",),
    "config/calls.py: --dataset": ("",),
    "config/calls.py: --input": ("score",),
    "config/calls.py: --output": ("score",),
    "core/features/roles.py: --label": ("describe",),
    "loop/monitor/outcomes.py: --input": ("outcomes",),
    "loop/status/doctor.py: --as-of": ("refresh",),
    "loop/status/next_step.py: --as-of": ("monitor", "outcomes"),
    "loop/status/next_step.py: --dataset": ("",),
    "loop/status/next_step.py: --metrics-port": ("serve",),
    "loop/status/next_step.py: --port": ("serve",),
    "loop/status/next_step.py: --trigger-id": ("retrain",),
    "release/by_hand.py: --to": ("release rollback",),
    "replay/demo.py: --as-of": ("refresh",),
    "scoring/batch.py: --input": ("score",),
    "scoring/batch.py: --output": ("score",),
    "scoring/edge.py: --output": ("edge export",),
    "scoring/edge.py: --records": ("edge import",),
    "scoring/jobs.py: --resume": ("score",),
    "stages/register.py: --model-name": ("register",),
    "stages/register.py: --stage": ("register",),
    "tabular/rows.py: --resume": ("score",),
    "workflow.py: --until": ("run",),
}
# What is handed to other programs, or read by scripts of their own.
HANDED_ON = (
    "adapters/bentoml.py", "adapters/dvc.py", "adapters/git.py", "adapters/kfp_fork.py", "adapters/kubectl.py",
    "adapters/mlflow_store.py", "component.py", "replay/traffic.py", "scoring/edge_script.py",
    "serving/process/children.py",
)  # fmt: skip


def find_options(tree: ast.AST) -> Iterator[str]:
    """Each option that a text names, docstrings and the command line's own declarations left out."""
    left_out: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out.add(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("typer."):
            left_out.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in left_out:
            yield from OPTION.findall(node.value)


def list_options(group: TyperGroup, name: str = "") -> dict[str, set[str]]:
    """The options of each command, by its name; of the program itself under no name."""
    found = {name: {option for one in group.params for option in (*one.opts, *one.secondary_opts)}}
    for word, command in group.commands.items():
        whole = f"{name} {word}".strip()
        if isinstance(command, TyperGroup):
            found |= list_options(command, whole)
        else:
            found[whole] = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    return found


def test_a_message_names_only_options_that_the_command_has_which_prints_it() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {option}"
        for path in PACKAGE.rglob("*.py")
        for option in find_options(ast.parse(path.read_text(encoding="utf-8")))
    }
    ours = {one for one in found if not one.startswith(HANDED_ON)}
    assert sorted(ours - set(PRINTED_BY)) == [], "say in PRINTED_BY which commands print it"
    assert sorted(set(PRINTED_BY) - ours) == [], "no longer in the package"
    options = list_options(cast(TyperGroup, typer.main.get_command(app)))
    wrong = [
        (command, place)
        for place, commands in PRINTED_BY.items()
        for command in commands
        if place.split(": ")[1] not in options[command]
    ]
    assert wrong == []


def test_the_search_for_options_leaves_out_what_declares_them() -> None:
    code = 'def f(a=typer.Option("--a")):\n    "Give --b."\n    raise E(f"{x}: give --c-d FOLDER or e--f, not {y}--gh")'
    assert sorted(find_options(ast.parse(code))) == ["--c-d", "--gh"]


def find_plurals(tree: ast.AST) -> Iterator[str]:
    """Each figure in a message that is followed by a plural, whatever the figure is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for value, text in zip(node.values, node.values[1:], strict=False):
                if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                    found = COUNTED.match(str(text.value))
                    if found and not ast.unparse(value.value).startswith("count_noun("):
                        yield f"{{{ast.unparse(value.value)}}}{str(text.value)[:40].rstrip()}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and LOGGED.search(node.value):
            yield node.value


def test_a_counted_noun_in_a_message_is_plural_only_where_it_may_be() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}: {words}"
        for path in PACKAGE.rglob("*.py")
        for words in find_plurals(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert sorted(found - REVIEWED) == [], "use count_noun, or review the figure and add it to REVIEWED"
    assert sorted(REVIEWED - found) == [], "no longer in the package"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("f'{len(rows)} rows are left'", ["{len(rows)} rows are left"]),
        ("f'{n:,} bad rows'", ["{n} bad rows"]),
        ("logger.info('%s: %d rows', a, b)", ["%s: %d rows"]),
        ("f\"{count_noun(n, 'row')} left, {n} of them bad\"", []),
        ("f'rows: {n}'", []),
    ],
)
def test_the_search_finds_what_it_should(code: str, found: list[str]) -> None:
    assert list(find_plurals(ast.parse(code))) == found


def find_riddles(tree: ast.AST) -> Iterator[str]:
    """First lines of docstrings that have a pronoun in place of the noun they are about."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            said = (ast.get_docstring(node) or "").partition("\n")[0]
            if re.match(r"(What|Who)\b", said):
                yield said


def test_a_docstring_begins_with_the_noun_that_it_is_about() -> None:
    found = {path: list(find_riddles(ast.parse(path.read_text(encoding="utf-8")))) for path in PACKAGE.rglob("*.py")}
    assert {path: said for path, said in found.items() if said} == {}, "say 'The limits of ...', not 'What limits ...'"


def test_the_search_for_pronouns_reads_every_docstring() -> None:
    code = '"""What it does."""\nclass A:\n    """Who."""\n    def f():\n        """Whatever.\n\n        What else."""'
    assert list(find_riddles(ast.parse(code))) == ["What it does.", "Who."]


def test_a_number_with_its_noun() -> None:
    assert [count_noun(number, "row") for number in (0, 1, 2, 1200)] == ["0 rows", "1 row", "2 rows", "1,200 rows"]
    assert count_noun(2, "copy", "copies of it") == "2 copies of it"
    assert [count_noun(2, noun) for noun in ("entry", "copy", "day", "batch")] == [
        "2 entries",
        "2 copies",
        "2 days",
        "2 batches",
    ]
