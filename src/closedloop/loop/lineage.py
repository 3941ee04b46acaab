"""Why a customer got a score, and the same score once more from what was recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from closedloop.adapters.journal import Entry, read_entry
from closedloop.adapters.mlflow import BENTO_TAG
from closedloop.contract import REFERENCE_FILE
from closedloop.errors import DataError, GateFailed
from closedloop.records import Prediction
from closedloop.serving.models import LoadedModel, load_model

if TYPE_CHECKING:
    from closedloop.adapters.journal import Journal
    from closedloop.adapters.mlflow import Tracking
    from closedloop.adapters.store import Store

TOLERANCE = 1e-6
CONTRIBUTION_METHOD = "the score less the score with this one feature at its median (most frequent) reference value"


class Registry(Protocol):
    """Where a version's folder is had."""

    def fetch_version(self, version: str, folder: Path) -> tuple[Path, str]:
        """Download a version's folder into ``folder``; returns where it is, and the digest that its tag says."""


class Again(NamedTuple):
    """A recorded score and decision, and those that were computed again."""

    prediction: Prediction
    score: float
    decision: int
    threshold: float


def find_prediction(store: Store, model_name: str, prediction_id: str) -> Prediction:
    """A logged prediction.

    Raises
    ------
    DataError
        If it is not in the store.
    """
    for found in store.read_predictions(model_name, ids=[prediction_id]):
        return found[0]
    raise DataError(
        f"prediction {prediction_id} of {model_name} is not in the operations store: it was purged or erased with its "
        "features, waits in a spool still, or was never given"
    )


def open_model(registry: Registry, version: str, folder: Path) -> LoadedModel:
    """The model of a version, whose folder must have the digest that the registry's tag says.

    Raises
    ------
    DataError
        Saying what is missing, or does not hold.
    """
    if not version.isdecimal():
        raise DataError(
            f"version {version!r} was in no registry: its model folder was given by hand and is not recorded"
        )
    place, digest = registry.fetch_version(version, folder)
    return load_model(place, version=version, folder_sha256=digest)


def score_again(model: LoadedModel, prediction: Prediction) -> Again:
    """Score the logged features with the model that gave the score.

    Raises
    ------
    DataError
        If the features are not those that the contract names.
    """
    names = model.contract.feature_names
    if len(prediction.features) != len(names):
        raise DataError(f"{len(prediction.features)} values were logged, version {model.version} takes {len(names)}")
    score = float(model.scorer.score(model.pack([prediction.features]))[0])
    threshold = model.contract.threshold
    # within the tolerance either side of the threshold is the same score, and the recorded one decided
    decided = prediction.score if abs(score - threshold) <= TOLERANCE else score
    return Again(prediction, score, int(decided >= threshold), threshold)


def reproduce(store: Store, registry: Registry, model_name: str, prediction_id: str) -> Again:
    """Compute a score again from the recorded parts: the version's folder, its digest checked, and the features.

    Raises
    ------
    DataError
        Saying what is missing: a quantised variant is made by each export, and is in no version's folder.
    GateFailed
        If score or decision differ.
    """
    prediction = find_prediction(store, model_name, prediction_id)
    with tempfile.TemporaryDirectory(prefix="closedloop-reproduce-") as folder:
        again = score_again(open_model(registry, prediction.model_version, Path(folder)), prediction)
    if prediction.source == "edge-quantised":
        raise DataError(
            f"prediction {prediction_id}: {prediction.score:.9f} was given on a device by the quantised variant, which "
            f"is not recorded; version {prediction.model_version} itself gives {again.score:.9f}"
        )
    if abs(again.score - prediction.score) > TOLERANCE or again.decision != prediction.decision:
        raise GateFailed(
            f"prediction {prediction_id}: {prediction.score:.9f} was recorded (decision {prediction.decision}), the "
            f"same features give {again.score:.9f} (decision {again.decision})"
        )
    return again


def explain(
    store: Store, journal: Journal, tracking: Tracking, registry: Registry, prediction_id: str, *, top: int = 5
) -> dict[str, Any]:
    """All that led to a prediction, as plain values.

    Raises
    ------
    DataError
        Saying what is missing.
    """
    name = tracking.model_name
    prediction = find_prediction(store, name, prediction_id)
    with tempfile.TemporaryDirectory(prefix="closedloop-why-") as folder:
        model = open_model(registry, prediction.model_version, Path(folder))
        contributions = weigh_features(model, prediction, Path(folder))[:top]
    version, contract = tracking.read_version(prediction.model_version), model.contract
    found = find_entry([(link.sequence, read_entry(link)) for link in journal.read(name)], prediction)
    when = prediction.features_as_of
    return {
        "prediction": {
            field: getattr(prediction, field)
            for field in ("prediction_id", "request_id", "customer_id", "predicted_at", "variant", "source", "forced")
        }
        | {"score": prediction.score, "decision": prediction.decision, "threshold": contract.threshold},
        "features": dict(zip(contract.feature_names, prediction.features, strict=True)),
        "features_as_of": when.isoformat() if when else "sent with the request",
        "feature_service": contract.feature_service,
        "contributions": {"method": CONTRIBUTION_METHOD, "features": contributions},
        "model": {
            "version": prediction.model_version,
            "type": contract.model_type,
            "folder_sha256": model.folder_sha256,
            "mlflow_run": version.run_id,
            "bento_sha256": version.tags.get(BENTO_TAG, "not packaged"),
            **contract.lineage.model_dump(mode="json"),
        },
        "gates": tracking.read_gates(version) or "not recorded",
        "journal": "no entry names it" if found is None else {"entry": found[0], **_describe(found[1])},
    }


def weigh_features(model: LoadedModel, prediction: Prediction, folder: Path) -> list[dict[str, Any]]:
    """What each feature adds to the score, by `CONTRIBUTION_METHOD`, the largest first.

    One at a time, so that features which stand in for each other share the credit in neither.
    """
    import pandas as pd

    reference = pd.read_parquet(next(folder.rglob(REFERENCE_FILE)))
    features, rows = model.contract.features, [prediction.features]
    for place, feature in enumerate(features):
        known = reference[feature.name].dropna()
        usual: Any = None
        if len(known):
            usual = float(known.median()) if feature.kind == "numeric" else str(known.mode().iloc[0])
        rows.append((*prediction.features[:place], usual, *prediction.features[place + 1 :]))
    score, *others = model.scorer.score(model.pack(rows)).tolist()
    weighed = [
        {"feature": feature.name, "value": value, "usual": row[place], "adds": score - other}
        for place, (feature, value, row, other) in enumerate(
            zip(features, prediction.features, rows[1:], others, strict=True)
        )
    ]
    return sorted(weighed, key=lambda one: -abs(one["adds"]))


def find_entry(entries: Sequence[tuple[int, Entry]], prediction: Prediction) -> tuple[int, Entry] | None:
    """The journal's entry that gave the version the place in which it scored; None if there is none."""
    found, before = None, None
    for number, entry in entries:
        if entry.recorded_at > prediction.predicted_at:
            break
        row = entry.row
        held = row.champion_version if prediction.variant == "champion" else row.challenger_version
        if held == prediction.model_version and before != held:
            found = number, entry
        before = held
    return found


def _describe(entry: Entry) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("action", "actor", "recorded_at", "reason")}
