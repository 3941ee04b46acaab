"""Loading a model to serve: nothing takes its place before digest, contract and golden rows have held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.contract import MODEL_FILE, ModelContract, check_digest, digest_folder, read_contract
from closedloop.errors import DataError, count_noun
from closedloop.rules import Rules, Value

if TYPE_CHECKING:
    from closedloop.core.reasons.explainer import Explainer

GOLDEN_SECONDS = 30.0  # for a row that takes microseconds: the rest is for a busy machine


class OtherFeatures(DataError):
    """A model that holds, but cannot answer the requests that the serving one answers."""


@dataclass(frozen=True)
class LoadedModel:
    """A checked model that has scored its golden rows; ``folder_sha256`` is what the registry's tag said.

    ``path`` is the graph's.
    """

    version: str
    folder_sha256: str
    contract: ModelContract
    scorer: OnnxScorer
    path: Path

    @cached_property
    def rules(self) -> Rules:
        """How its rows are packed."""
        return self.contract.read_rules()

    @cached_property
    def explainer(self) -> Explainer:
        """Gives reasons for its scores; made when the first ones are asked for.

        Raises
        ------
        DataError
            If this version can give none.
        """
        from closedloop.adapters.onnx_explainer import open_explainer

        return open_explainer(self.path, self.contract)

    def pack(self, rows: Sequence[Sequence[Value]]) -> NDArray[np.float32]:
        """As `closedloop.rules.Rules.pack`."""
        return self.rules.pack(rows)

    def find_missing(self, rows: Sequence[Sequence[Value]]) -> NDArray[np.bool_] | None:
        """Which values were not given, in the shape that `pack` returns; None if all categories were.

        A number that is missing is NaN in the packed row already.
        """
        places = [place for place, feature in enumerate(self.contract.features) if feature.kind == "categorical"]
        if not any(row[place] is None for place in places for row in rows):
            return None
        return np.array([[value is None for value in row] for row in rows])


def load_model(folder: Path, *, version: str, folder_sha256: str | None) -> LoadedModel:
    """Load a model folder and prove that it is what was registered and scores as it did when it was trained.

    Parameters
    ----------
    folder
        With the contract, the graph and the reference rows.
    folder_sha256
        What the registry says; None for a bundled model, whose digest has been checked when it was bundled.

    Raises
    ------
    DataError
        If the digest differs, the contract is unknown or another's, or a golden row does not reproduce within 1e-6.
    """
    found = digest_folder(folder) if folder_sha256 is None else check_digest(folder, folder_sha256)
    contract = read_contract(folder)
    scorer = OnnxScorer(folder / MODEL_FILE)
    if scorer.n_features != len(contract.features):
        raise DataError(
            f"contract: it has {count_noun(len(contract.features), 'feature')}, the graph takes {scorer.n_features}"
        )
    model = LoadedModel(version, found, contract, scorer, folder / MODEL_FILE)
    try:
        golden = [(row.features, row.score) for row in contract.golden_rows]
        model.rules.check_golden_rows(golden, partial(scorer.score, seconds=GOLDEN_SECONDS))
    except DataError as error:  # the graph does not end
        raise DataError(f"golden rows: {error}") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    return model


def check_compatible(model: LoadedModel, serving: ModelContract) -> None:
    """Whether a model can answer the requests that the serving one answers: the same names, in the same types.

    Raises
    ------
    DataError
        If it is of another data set.
    OtherFeatures
        If it takes other features: whoever asks must know of them first.
    """
    new, old = model.contract, serving
    if new.model_name != old.model_name:
        raise DataError(f"contract: a model of {new.model_name} cannot take the place of {old.model_name}")
    wanted = {feature.name: feature.kind for feature in old.features}
    found = {feature.name: feature.kind for feature in new.features}
    differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if differing:
        raise OtherFeatures(f"contract: features differ from those being served: {', '.join(differing[:10])}")
    if new.feature_service != old.feature_service:
        raise OtherFeatures(
            f"contract: features are of {new.feature_service}, those being served of {old.feature_service}"
        )
    if new.feature_names != old.feature_names:
        raise OtherFeatures("contract: features stand in another order than those being served")
