"""MLflow's runs: one experiment a data set, and what is logged of the run that is open."""

from __future__ import annotations

import ast
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import closedloop
from closedloop.adapters.mlflow_store import MlflowStore

if TYPE_CHECKING:
    import pandas as pd

    from closedloop.core.training.deciding import DecidingModel

MODEL_PATH = "model"  # of the pipeline among a run's artifacts
PUBLIC_REQUIREMENTS = ("scikit-learn", "skops", "pandas", "numpy")  # MLflow adds itself
EXTENDED_PACKAGE = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"


class Runs(MlflowStore):
    """The runs of one data set's experiment."""

    @contextmanager
    def start_run(
        self, name: str, *, run_id: str | None = None, tags: Mapping[str, str] | None = None
    ) -> Iterator[str]:
        """Open a new or an earlier run of the data set's experiment; yield its id."""
        with self.explain_errors():
            mlflow = self.open()
            if mlflow.get_experiment_by_name(self.model_name) is None:
                mlflow.create_experiment(
                    self.model_name,
                    artifact_location=f"{self.artifacts.rstrip('/')}/{self.model_name}",
                    tags={"mlflow.experimentKind": "custom_model_development"},  # else the UI opens its GenAI pages
                )
            mlflow.set_experiment(self.model_name)
            run = mlflow.start_run(run_id=run_id, run_name=None if run_id else name, tags=dict(tags or {}))
        with self.explain_errors(files=False), run:
            yield run.info.run_id

    @contextmanager
    def start_trial(self, number: int) -> Iterator[None]:
        """A run nested in the open one, for one trial of the search."""
        import mlflow

        with mlflow.start_run(nested=True, run_name=f"trial {number}"):
            yield

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log parameters of the open run; nested mappings get names with dots."""
        import mlflow

        mlflow.log_params(dict(_flatten(params)))

    def log_metrics(self, metrics: Mapping[str, float], *, prefix: str = "") -> None:
        """Log metrics of the open run in one call (one by one is 30 times slower)."""
        import mlflow

        mlflow.log_metrics({f"{prefix}{name}": float(value) for name, value in metrics.items() if value == value})

    def log_curves(self, curves: pd.DataFrame) -> None:
        """Log metrics of the open run by step: column ``step``, and one column for each metric."""
        import mlflow

        for row in curves.to_dict("records"):
            step = int(row.pop("step"))
            mlflow.log_metrics(row, step=step)

    def log_inputs(self, frames: Mapping[str, tuple[pd.DataFrame, Path, str]]) -> None:
        """Log data set inputs of the open run: by name, the frame, its file and the file's digest."""
        import mlflow
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.data.sources import LocalArtifactDatasetSource

        for name, (frame, path, digest) in frames.items():
            # from_pandas would profile every row, which takes longer than the fit
            schema = _infer_signature(frame.head(100)).inputs
            source = LocalArtifactDatasetSource(str(path))
            mlflow.log_input(MetaDataset(source, name=name, digest=digest[:36], schema=schema), context=name)

    def log_files(self, paths: Mapping[str, Path]) -> None:
        """Log files or folders as artifacts of the open run, by their target folder ("" is the top)."""
        import mlflow

        for folder, path in paths.items():
            if path.is_dir():
                mlflow.log_artifacts(str(path), folder or None)
            elif path.exists():
                mlflow.log_artifact(str(path), folder or None)

    def log_pipeline(self, pipeline: DecidingModel, example: pd.DataFrame, model_type: str) -> str:
        """Log the fitted pipeline with its threshold as a model of the open run (skops, no pickle); return its URI."""
        import mlflow

        from closedloop.adapters.skops import SERVED_TYPE, list_trusted
        from closedloop.core.training.model_types import MODULES, find_model_type

        signature = _infer_signature(example, pipeline.predict(example))
        owners = packages_distributions()
        names = [*PUBLIC_REQUIREMENTS, *(owners[one][0] for one in find_model_type(model_type).requirements)]
        modules = [
            "closedloop.core.training.deciding",
            "closedloop.core.training.encoding",
            *([MODULES[model_type]] if model_type in MODULES else []),
        ]
        with tempfile.TemporaryDirectory() as folder:
            info = mlflow.sklearn.log_model(
                pipeline,
                name=MODEL_PATH,
                signature=signature,
                input_example=example,
                serialization_format="skops",
                skops_trusted_types=[*list_trusted(model_type), SERVED_TYPE],
                pip_requirements=[f"{name}=={version(name)}" for name in names],
                code_paths=[str(_copy_code(Path(folder), modules))],
            )
        uri: str = info.model_uri
        return uri

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the open run."""
        import mlflow

        mlflow.set_tags(dict(tags))


def _infer_signature(example: pd.DataFrame, answer: Any = None) -> Any:
    """MLflow's, without its hint on whole numbers: no row that the contract takes lacks one that training rows have."""
    import warnings

    from mlflow.models import infer_signature

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Hint: Inferred schema contains integer column", UserWarning)
        return infer_signature(example, answer)


def _copy_code(folder: Path, modules: Sequence[str]) -> Path:
    """Copy modules of ours with those that they import, so that MLflow serves a model that calls them without us.

    A requirement of our name would fetch whatever a package index has by that name. The copied packages look for their
    other modules where they are installed.
    """
    package, waiting, copied = Path(closedloop.__file__).parent, list(modules), set()
    while waiting:
        module = waiting.pop()
        if module not in copied:
            copied.add(module)
            place = Path(*module.split(".")).with_suffix(".py")
            text = (package.parent / place).read_text(encoding="utf-8")
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(text, encoding="utf-8")
            imports = [node.module or "" for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
            waiting += [name for name in imports if name.startswith(f"{package.name}.")]
    for part in [folder / package.name, *(folder / package.name).rglob("*/")]:
        (part / "__init__.py").write_text(EXTENDED_PACKAGE, encoding="utf-8")
    return folder / package.name


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
