"""The command line explains itself, quickly: no help text needs the heavy libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import yaml

HEAVY = [
    "dvc",
    "duckdb",
    "feast",
    "great_expectations",
    "ibis",
    "matplotlib",
    "mlflow",
    "onnx",
    "onnxruntime",
    "optuna",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "skl2onnx",
    "skops",
    "statsmodels",
]
# One process for all help texts: what it has imported in the end, any of them needed.
SCRIPT = """
import contextlib, io, json, sys
from closedloop import cli
texts = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["closedloop", *([command] if command else []), "--help"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, (command, ended.code)
    texts[command] = output.getvalue()
print(json.dumps({"texts": texts, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def test_help_lists_every_command_and_explains_each_without_heavy_imports(project):
    stages = [
        name.replace("_", "-")
        for name in yaml.safe_load((project.root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    ]
    commands = [*stages, "refresh", "run"]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(["", *commands])],
        capture_output=True,
        text=True,
        cwd=project.root,
        check=True,
    )
    found = json.loads(ran.stdout)
    for command in commands:
        assert f" {command} " in found["texts"][""]
        assert f"Usage: closedloop {command}" in found["texts"][command]
    for stage in stages:
        assert "--params" in found["texts"][stage]
    assert set(HEAVY) & set(found["modules"]) == set()
    assert list(project.root.glob("data")) == []
