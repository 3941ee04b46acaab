"""Components of `kfp.local` as forks of one process that has imported what they need: half of their time is imports."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

# The heavy ones, in the order of their cost; whatever is missing here a stage imports for itself.
PRELOADED = (
    "feast",
    "great_expectations",
    "mlflow.sklearn",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "skops.io",
    "sklearn.ensemble",
    "sklearn.inspection",
    "skl2onnx",
    "scipy.stats",
    "matplotlib.pyplot",
    "ibis",
    "bentoml._internal.bento.bento",
    "kfp.dsl.executor_main",
)


@contextlib.contextmanager
def warm_components(*modules: str) -> Iterator[None]:
    """Let local components be forked for the length of the block; each is a process of its own as before.

    Parameters
    ----------
    modules
        What the components import beside the tools, by name.
    """
    from kfp.local import subprocess_task_handler as handler

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *modules])

    def run(full_command: list[str]) -> int:
        source, *arguments = full_command[3:]  # behind `sh -ec SCRIPT`
        reader, writer = context.Pipe(duplex=False)
        given = (writer, source, arguments, dict(os.environ), str(Path.cwd()))
        process = context.Process(target=_run_component, args=given)
        process.start()
        writer.close()
        with open(reader.fileno(), encoding="utf-8", errors="replace", closefd=False) as lines:
            for line in lines:
                print(line, end="")
        process.join()
        return process.exitcode or 0

    before = handler.run_local_subprocess
    handler.run_local_subprocess = run
    try:
        yield
    finally:
        handler.run_local_subprocess = before


def _run_component(
    writer: Connection, source: str, arguments: list[str], environment: Mapping[str, str], cwd: str
) -> None:
    """What KFP's own command does, in a process that is there already."""
    from kfp.dsl.executor_main import executor_main

    for stream in (1, 2):
        os.dup2(writer.fileno(), stream)
    writer.close()
    os.environ.clear()
    os.environ.update(environment, _KFP_RUNTIME="true")
    os.chdir(cwd)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ephemeral_component.py"
        path.write_text(source, encoding="utf-8")
        sys.argv = ["executor_main", "--component_module_path", str(path), *arguments]
        executor_main()
