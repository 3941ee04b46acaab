"""skops: fitted pipelines as files without pickle; types that are not on the reviewed list are refused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from closedloop.core.training.model_types import find_model_type
from closedloop.errors import DataError

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

PIPELINE_FILE = "pipeline.skops"
MLFLOW_FILE = "model.skops"  # as MLflow calls it in a model's folder
# Reviewed: our own encoding function, and scikit-learn's containers of trees, bins and calibrations.
TRUSTED_TYPES = [
    "closedloop.core.training.encoding.encode_columns",
    "numpy.dtype",
    "sklearn.calibration._CalibratedClassifier",
    "sklearn.calibration._SigmoidCalibration",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.tree._tree.Tree",
]
SERVED_TYPE = "closedloop.core.training.deciding.DecidingModel"  # around the pipeline, in a model of MLflow's
FORMER_TYPES = ["closedloop.core.training.estimators.encode_columns"]  # where it was when older versions were stored


def list_trusted(model_type: str) -> list[str]:
    """All types on the reviewed list for pipelines of this kind."""
    return [*TRUSTED_TYPES, *find_model_type(model_type).trusted]


def save_pipeline(path: Path, pipeline: Pipeline) -> None:
    """Write a fitted pipeline."""
    import skops.io

    skops.io.dump(pipeline, path)


def load_pipeline(path: Path, model_type: str) -> Pipeline:
    """Read a fitted pipeline whose classifier is of this kind (``model.type``), out of a model of MLflow's too.

    Raises
    ------
    DataError
        If the file is missing or damaged, or holds a type that is not on the list.
    """
    import zipfile

    import skops.io
    from skops.io.exceptions import UntrustedTypesFoundException

    from closedloop.core.training.deciding import DecidingModel

    try:
        found = skops.io.load(path, trusted=[*list_trusted(model_type), *FORMER_TYPES, SERVED_TYPE])
        return found.pipeline if isinstance(found, DecidingModel) else found
    except UntrustedTypesFoundException as error:
        raise DataError(f"{path}: refused, it holds types that are not on the reviewed list: {error}") from error
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a pipeline ({error}); 'closedloop train' writes it") from error
