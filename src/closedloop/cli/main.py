"""The command line: commands in groups, and how each of them ends."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from typing import Annotated

import typer

from closedloop.cli.attach import app as attach_app
from closedloop.cli.backtest import app as backtest_app
from closedloop.cli.campaign import app as campaign_app
from closedloop.cli.demo import app as demo_app
from closedloop.cli.experiment import app as experiment_app
from closedloop.cli.monitoring import app as monitoring_app
from closedloop.cli.options import Commands, be_verbose, fold
from closedloop.cli.release import app as release_app
from closedloop.cli.replay import app as replay_app
from closedloop.cli.serving import app as serving_app
from closedloop.cli.status import app as status_app
from closedloop.cli.store import app as store_app
from closedloop.cli.tools import app as tools_app
from closedloop.cli.training import app as training_app
from closedloop.config.calls import remember_program
from closedloop.config.environment import set_environment
from closedloop.errors import ClosedloopError
from closedloop.extras import explain_missing
from closedloop.processes import end_with_starter

app = typer.Typer(
    cls=Commands,
    help="Train, gate, release, serve, monitor and retrain a churn model. Start with: closedloop run",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
PARTS = (
    *(training_app, demo_app, replay_app, serving_app, campaign_app, status_app, monitoring_app, attach_app),
    *(backtest_app, release_app, experiment_app, store_app, tools_app),
)
for part in PARTS:
    app.add_typer(part)


def tell_version(value: bool) -> None:
    """Print the version, and end."""
    if value:
        from importlib.metadata import version

        typer.echo(f"closedloop {version('closedloop')}")
        raise typer.Exit


@app.callback()
def begin(
    dataset: Annotated[  # noqa: ARG001 - `Commands` reads it, before the command's clock starts
        str | None,
        typer.Option(help="Work in the workspace that 'run --dataset NAME' made.", metavar="NAME"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Let replays show what trainings say.")] = False,
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=tell_version, is_eager=True)
    ] = False,
) -> None:
    """Train, gate, release, serve, monitor and retrain a churn model. Start with: closedloop run."""
    be_verbose(verbose)


class StepHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a step to what is standard error then: a clock that is shown there gives way."""

    stream = property(lambda _: sys.stderr, lambda *_: None)

    def format(self, record: logging.LogRecord) -> str:
        """Format a line: folded on a terminal, whole in a log or where it is a traceback."""
        text = super().format(record)
        return f"{'':14}{text if chr(10) in text else fold_on_terminal(text, 14)}"


def fold_on_terminal(text: str, indent: int = 0) -> str:
    """Fold each line between words where a person reads it, behind its own indent; in a log a line stays whole."""
    if not sys.stderr.isatty():
        return text
    width, folded = shutil.get_terminal_size().columns, []
    for line in text.split("\n"):
        start = len(line) - len(line.lstrip())
        folded.append(line[:start] + fold(line[start:], width, indent + start))
    return "\n".join(folded)


def configure_logging() -> None:
    """Our own steps from INFO on, so that people see where a long stage is; other libraries' from WARNING on."""
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    steps = StepHandler()
    ours = logging.getLogger("closedloop")
    ours.handlers, ours.propagate = [steps], False
    ours.setLevel(os.environ.get("CLOSEDLOOP_LOG_LEVEL", "INFO"))


def main() -> None:
    """Run the command line; our own errors become one message and their exit status."""
    remember_program()
    set_environment()
    configure_logging()
    end_with_starter()
    try:
        app()
    except SystemExit as ended:
        # a wrong command line ends with 2 in most programs; here 2 is a gate that said no
        sys.exit(1 if ended.code == 2 else ended.code)
    except (ClosedloopError, ModuleNotFoundError) as missing_or_ours:
        error = missing_or_ours
        if isinstance(error, ModuleNotFoundError):
            error = explain_missing(error)
        print(fold_on_terminal(f"{type(error).__name__}: {error}"), file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
