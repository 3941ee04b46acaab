"""Loading a model to serve: nothing takes its place before digest, contract and golden rows have held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from closedloop.adapters.onnxruntime import OnnxScorer
from closedloop.contract import (
    MODEL_FILE,
    CategoricalFeature,
    ModelContract,
    check_digest,
    digest_folder,
    encode_row,
    read_contract,
)
from closedloop.errors import DataError
from closedloop.serving.requests import Value

GOLDEN_TOLERANCE = 1e-6


class OtherFeatures(DataError):
    """A model that holds, but cannot answer the requests that the serving one answers."""


@dataclass(frozen=True)
class LoadedModel:
    """A checked and warmed model; ``folder_sha256`` is what the registry's tag said."""

    version: str
    folder_sha256: str
    contract: ModelContract
    scorer: OnnxScorer

    @cached_property
    def _codes(self) -> list[tuple[int, dict[Value, float]]]:
        """Where categories stand, and their codes; one that is missing is coded as one that is unknown."""
        return [
            (place, {name: float(code) for code, name in enumerate(feature.categories)})
            for place, feature in enumerate(self.contract.features)
            if isinstance(feature, CategoricalFeature)
        ]

    def pack(self, rows: Sequence[Sequence[Value]]) -> NDArray[np.float32]:
        """Rows in the contract's order as the graph takes them, shape (n, n_features): -1 is no known category."""
        packed = [list(row) for row in rows]
        for place, codes in self._codes:
            for row in packed:
                row[place] = codes.get(row[place], -1.0)
        return np.array(packed, dtype=np.float32)  # None becomes NaN

    def find_missing(self, rows: Sequence[Sequence[Value]]) -> NDArray[np.bool_] | None:
        """Where categories were not given, in the shape that `pack` returns; None if all were."""
        if not any(row[place] is None for place, _ in self._codes for row in rows):
            return None
        return np.array([[value is None for value in row] for row in rows])


def load_model(folder: Path, *, version: str, folder_sha256: str | None, threads: int = 1) -> LoadedModel:
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
    scorer = OnnxScorer(folder / MODEL_FILE, threads)
    if scorer.n_features != len(contract.features):
        raise DataError(
            f"contract: {len(contract.features)} features are described, the graph takes {scorer.n_features}"
        )
    check_golden_rows(contract, scorer)
    return LoadedModel(version, found, contract, scorer)


def check_golden_rows(contract: ModelContract, scorer: OnnxScorer) -> None:
    """Score the golden rows, which warms the model too, and a row of which nothing is known that may be unknown.

    Raises
    ------
    DataError
        If there is none, or one differs by more than 1e-6, or the unknown row gets no score.
    """
    if not contract.golden_rows:
        raise DataError("golden rows: the contract has none, so the model cannot be proved")
    for number, golden in enumerate(contract.golden_rows):
        score = float(scorer.score(encode_row(contract.features, golden.features))[0])
        if not abs(score - golden.score) <= GOLDEN_TOLERANCE:
            raise DataError(f"golden rows: row {number} scores {score:.7f}, the contract says {golden.score:.7f}")
    known = contract.golden_rows[0].features
    unknown = {feature.name: None if feature.nullable else known[feature.name] for feature in contract.features}
    scores = scorer.score(np.repeat(encode_row(contract.features, unknown), 16, axis=0))
    if not np.isfinite(scores).all():
        raise DataError("contract: features may be missing, but the model has no score where they are")


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
