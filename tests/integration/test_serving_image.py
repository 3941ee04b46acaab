"""The service does all its work with what its image has: no other package of this environment is found."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from closedloop.bootstrap import RunContext, build_predictions, load_run
from closedloop.errors import ClosedloopError
from tests.http_service import run_service, wait_until
from tests.model_folders import ROWS, write_model_folder

ROOT = Path(__file__).parents[2]
HOOK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def list_missing() -> set[str]:
    """The top-level modules of packages that are installed here, and not in the serving image."""
    lock = (ROOT / "docker/serving.lock").read_text(encoding="utf-8")
    there = {name.lower().replace("_", "-") for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    owners = importlib.metadata.packages_distributions()
    return {
        module
        for module, names in owners.items()
        if module.isidentifier() and not {name.lower().replace("_", "-") for name in names} & {*there, "closedloop"}
    }


def list_stored(run: RunContext) -> Iterator[str]:
    with contextlib.suppress(ClosedloopError):  # the agent makes the tables
        for chunk in build_predictions(run).read_predictions("shop_churn"):
            yield from (one.prediction_id for one in chunk)


def test_an_answer_is_stored_by_what_the_serving_image_has(project, tmp_path):
    """An import too many in the agent, and it ends again and again, while the workers go on answering."""
    missing = list_missing()
    assert {"pandas", "sklearn", "mlflow"} & missing
    write_model_folder(tmp_path / "model", model_name="shop_churn")
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(missing=missing), encoding="utf-8")
    run = load_run(project.root / "params.yaml", root=project.root)
    with run_service(project.root, "--model", str(tmp_path / "model"), PYTHONPATH=str(tmp_path)) as service:
        status, answer = service.call("POST", "/predict", {"features": ROWS[0]})
        assert status == 200
        wait_until(lambda: list(list_stored(run)) == [answer["prediction_id"]], "the answer in the store")
