"""Options that several commands have."""

from __future__ import annotations

import datetime as dt
import difflib
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from closedloop import waiting
from closedloop.errors import ConfigError
from closedloop.files import names_table
from closedloop.processes import to_standard_error

if TYPE_CHECKING:
    from closedloop.bootstrap import RunContext

# The headings of `closedloop --help`.
WORKFLOW, SERVING, MONITORING = "Workflow", "Serving", "Monitoring"
RELEASE, STORE, TOOLS = "Release", "Store", "Tools"
PARAMS = Path("params.yaml")
REASONS_MAX = 20  # as in closedloop.rules, whose import would cost every command NumPy's
ParamsOption = Annotated[
    Path, typer.Option("--params", help="The parameters of the model and the name of the data set.")
]
AsOfOption = Annotated[str, typer.Option(help="UTC date: only events before it are used.")]
ClockOption = Annotated[
    str | None, typer.Option("--as-of", help="The data's clock: a UTC date, or 'now' (production's default).")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]


# What a mistyped command may be taken for: nothing that a person could not want to have run.
READ_ONLY = frozenset(
    ["analyze", "check", "doctor", "history", "paired", "reproduce", "size", "skew", "status", "verify", "why"]
)


# Commands that run until they are stopped, or that show by themselves how far they are.
WITHOUT_CLOCK = frozenset(
    ["serve", "serve-agent", "stream", "exporter", "ui", "run", "demo", "replay", "score", "backtest"]
)
# How long commands took here, beside DVC's own notes, and until then how long the shop's stages take on a laptop.
DURATIONS = Path(".dvc/tmp/seconds.json")
USUAL_SECONDS = {"ingest": 20, "validate": 15, "features": 15, "training-set": 25, "train": 60, "evaluate": 40}
USUAL_SECONDS |= {"register": 10, "package": 20}


@contextmanager
def show_clock(name: str) -> Iterator[None]:
    """Show a clock while a command runs, with how long it took last; note how long it took now."""
    began = time.monotonic()
    with waiting.show_clock(name, waiting.read_usual(DURATIONS, name, USUAL_SECONDS.get(name))):
        try:
            yield
        except typer.Exit as ended:  # so the program ends, whatever its status is
            if ended.exit_code:
                raise
        seconds = time.monotonic() - began
        if seconds >= waiting.SHOWN_AFTER_SECONDS and DURATIONS.parent.is_dir():  # a help text is no measure
            waiting.note_usual(DURATIONS, name, seconds)


class Commands(TyperGroup):
    """A group whose commands show a clock; it suggests only commands that change nothing for one that is mistyped."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find a command, as Typer does but for its suggestions, and go where it works."""
        self.suggest_commands = False
        try:
            name, command, rest = super().resolve_command(ctx, args)
        except Exception as error:
            offered = [name for name, one in self.commands.items() if name in READ_ONLY or isinstance(one, TyperGroup)]
            if args and (close := difflib.get_close_matches(args[0], offered)):
                error.message = f"{str(error).rstrip('.')}. Did you mean {' or '.join(map(repr, close))}?"  # type: ignore[attr-defined]
            raise
        if ctx.parent is None:  # before the clock, which reads and notes durations where the command works
            _before[:] = [ctx.params.get("dataset")]
            makes_workspaces = command is not None and any(one.name == "dataset" for one in command.params)
            enter_workspace(None if makes_workspaces else _before[0])
        ends = name not in WITHOUT_CLOCK and not any(one.startswith("--every") for one in rest)
        if ends and not isinstance(command, TyperGroup):
            ctx.with_resource(show_clock(f"{ctx.info_name} {name}" if ctx.parent else str(name)))
        return name, command, rest


_before: list[str | None] = []  # the data set that was given before the command
_verbose = [False]


def be_verbose(wanted: bool) -> None:
    """Keep whether a person wants to see what trainings say."""
    _verbose[0] = wanted


def is_verbose() -> bool:
    """Whether a person wants to see what trainings say."""
    return _verbose[0]


# Where a person typed the command: `enter_workspace` goes elsewhere, and paths that are given are of here.
_began_in: list[Path] = []


def enter_workspace(name: str | None) -> None:
    """Go into a data set's workspace; the data set of params.yaml may have its results here. None: stay.

    Raises
    ------
    ConfigError
        If the data set has no workspace yet.
    """
    _began_in.clear()  # of an earlier command of this process
    if name is None:
        return
    from closedloop.config.calls import name_call, remember_dataset
    from closedloop.config.dataset import load_dataset
    from closedloop.config.yaml import read_yaml

    load_dataset(name, Path("configs/datasets"))  # refuses an unknown one, and a path
    folder = Path("workspaces") / name
    _began_in[:] = [Path.cwd()]
    if (folder / PARAMS).is_file():
        os.chdir(folder)
    elif read_yaml(PARAMS).get("dataset") != name:
        raise ConfigError(f"{folder}: {name} has no results yet; make them: {name_call(f'run --dataset {name}')}")
    remember_dataset(name)


def read_dataset() -> str | None:
    """The data set that was given before a command; one that makes workspaces is not in it."""
    return _before[0] if _before else None


def locate_given(text: str) -> str:
    """A path that was given, as it is from the present folder; an address of a table stays as it is."""
    if not _began_in or "://" in text or names_table(text):
        return text
    return str(_began_in[0] / Path(text).expanduser())


def locate_path(path: Path | None) -> Path | None:
    """`locate_given` for an option that takes a path."""
    return path and Path(locate_given(str(path)))


ModelOption = Annotated[
    Path | None, typer.Option(help="A model folder, instead of the released version.", callback=locate_path)
]


def shorten(path: Path) -> Path:
    """A path as a person types it from where the command was typed; one that lies elsewhere stays as it is."""
    here = _began_in[0] if _began_in else Path.cwd()
    path = path.absolute()
    return path.relative_to(here) if path.is_relative_to(here) else path


def print_json(content: Any) -> None:
    """Print for programs: a named tuple by its names, a path as text, a number of numpy as a number."""
    import msgspec

    def translate(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else str(value)

    named = content._asdict() if hasattr(content, "_asdict") else content
    typer.echo(msgspec.json.format(msgspec.json.encode(named, enc_hook=translate)).decode())


def with_json(command: Callable[..., Any]) -> Callable[..., None]:
    """Give a command the option ``--json``: standard output then has what the command returns, and nothing else."""

    @wraps(command)
    def run(as_json: bool, **given: Any) -> None:
        with to_standard_error() if as_json else nullcontext():
            found = command(**given)
        if as_json:
            print_json(found)

    # Typer reads the options from the signature; annotations are text until they are evaluated where they were written
    own = inspect.signature(command, eval_str=True)
    added = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption)
    signature = own.replace(parameters=[*own.parameters.values(), added])
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: one.annotation for name, one in signature.parameters.items()}
    return run


def tell(name: str, text: str) -> None:
    """Write a stage's message, behind its name, on standard error; further lines stand below the first."""
    from rich.console import Console

    heading, width = f"{name:>12}  ", Console(stderr=True).width
    shown = typer.style(heading, bold=True) if sys.stderr.isatty() else heading
    # neither by a console nor by typer.echo: both pass by what takes the line of a bar away
    print(shown + fold(text, width), file=sys.stderr)


def fold(text: str, width: int, indent: int = 14) -> str:
    """A text behind a heading of ``indent`` columns, in lines of that width with the heading; a word is left whole."""
    from rich.cells import cell_len  # a Chinese or Japanese sign takes two columns

    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and cell_len(longer) > max(width - indent, 20):
            lines.append(word)
        else:
            lines[-1] = longer
    return f"\n{'':{indent}}".join(lines)


def read_now() -> dt.datetime:
    """The wall clock, UTC."""
    return dt.datetime.now(dt.UTC)


def read_clock(text: str | None, context: RunContext) -> dt.date | None:
    """The date that ``--as-of`` takes for today; None is the wall clock, which production goes by."""
    if text is None:
        return None if context.settings.profile == "production" else context.params.as_of
    return None if text == "now" else read_date("--as-of", text, ", or 'now'")


def read_clock_at(text: str | None, context: RunContext, now: dt.datetime) -> dt.datetime:
    """The data's clock as `read_clock` reads it: a midnight (UTC), or ``now``."""
    day = read_clock(text, context)
    return now if day is None else dt.datetime.combine(day, dt.time(), dt.UTC)


def read_date(option: str, text: str, others: str = "") -> dt.date:
    """The date that an option gives.

    Raises
    ------
    ConfigError
        If it is none.
    """
    try:
        return dt.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: a date as 2025-01-31{others}") from error


def check_model(model: Path | None) -> Path | None:
    """A model folder, if one is given.

    Raises
    ------
    ConfigError
        If the folder is none.
    """
    if model is not None and not (model / "contract.json").is_file():
        raise ConfigError(f"--model {model}: there is no contract.json; give a folder that 'closedloop train' made")
    return model
