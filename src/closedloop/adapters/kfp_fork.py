"""Fork the components of `kfp.local` from one process with their imports, which take half of a component's time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

# The libraries with the slowest imports, slowest first; a stage imports any other module itself.
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
def fork_components(*modules: str) -> Iterator[None]:
    """Fork local components within the block; each still is a process of its own.

    Parameters
    ----------
    modules
        Names of further modules that the components import.
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
    """Run a component as KFP's command does, but in the forked process."""
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
