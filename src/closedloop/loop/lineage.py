"""Explain a logged score, and compute it again from the recorded model version and features."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from closedloop.adapters.mlflow import BENTO_TAG
from closedloop.core.release.entries import Entry
from closedloop.errors import DataError, GateFailed, count_noun
from closedloop.records import Prediction, is_version
from closedloop.serving.models import LoadedModel, load_model
from closedloop.serving.slots.slots import load_slot, read_slots
from closedloop.store.journal import read_entry

if TYPE_CHECKING:
    from closedloop.adapters.mlflow import Tracking
    from closedloop.core.reasons.explainer import Explained
    from closedloop.serving.slots.downloads import VersionSource
    from closedloop.store.journal import Journal
    from closedloop.store.predictions import Predictions

TOLERANCE = 1e-6
METHOD = "SHAP values of the raw score: base and the contributions of all features sum to it"


class Recomputed(NamedTuple):
    """A recorded prediction, with its score and decision computed found."""

    prediction: Prediction
    score: float
    decision: int
    threshold: float


def find_prediction(store: Predictions, model_name: str, prediction_id: str) -> Prediction:
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
        "features, still waits in a spool, or this service never gave that id"
    )


def open_model(registry: VersionSource, version: str, folder: Path) -> LoadedModel:
    """Load the model of a version; its folder must have the digest in the registry's tag.

    Raises
    ------
    DataError
        If a part is missing or was changed; the message names it.
    """
    if not is_version(version):
        raise DataError(
            f"version {version!r} was in no registry: its model folder was given by hand and is not recorded"
        )
    place, digest = registry.fetch_version(version, folder)
    return load_model(place, version=version, folder_sha256=digest)


def find_model(state_dir: Path, registry: VersionSource, version: str, folder: Path) -> LoadedModel:
    """Load the model of a version: the service's own folder where it serves here, else a download (`open_model`).

    Raises
    ------
    DataError
        If neither can be used.
    """
    slots = read_slots(state_dir)
    for slot in (slots.champion, slots.challenger) if slots is not None else ():
        if slot is not None and slot.version == version and Path(slot.folder).is_dir():
            return load_slot(slot, None)
    return open_model(registry, version, folder)


def score_again(model: LoadedModel, prediction: Prediction) -> Recomputed:
    """Score the logged features with the model that gave the score.

    Raises
    ------
    DataError
        If the features are not those that the contract names.
    """
    names = model.contract.feature_names
    if len(prediction.features) != len(names):
        raise DataError(
            f"the log has {count_noun(len(prediction.features), 'value')}, version {model.version} takes {len(names)}"
        )
    score = float(model.scorer.score(model.pack([prediction.features]))[0])
    threshold = model.contract.threshold
    # rounding may put a score this close to the threshold on its other side: then the recorded score decides
    decided = prediction.score if abs(score - threshold) <= TOLERANCE else score
    return Recomputed(prediction, score, int(decided >= threshold), threshold)


def reproduce(store: Predictions, registry: VersionSource, model_name: str, prediction_id: str) -> Recomputed:
    """Compute a score again from the recorded parts: the version's folder, its digest checked, and the features.

    Raises
    ------
    DataError
        If a part is missing; the message names it.
    GateFailed
        If score or decision differ.
    """
    prediction = find_prediction(store, model_name, prediction_id)
    with tempfile.TemporaryDirectory(prefix="closedloop-reproduce-") as folder:
        found = score_again(open_model(registry, prediction.model_version, Path(folder)), prediction)
    if abs(found.score - prediction.score) > TOLERANCE or found.decision != prediction.decision:
        raise GateFailed(
            f"prediction {prediction_id}: {prediction.score:.9f} was recorded (decision {prediction.decision}), the "
            f"same features give {found.score:.9f} (decision {found.decision})"
        )
    return found


def explain(
    store: Predictions,
    journal: Journal,
    tracking: Tracking,
    registry: VersionSource,
    prediction_id: str,
    *,
    top: int = 5,
) -> dict[str, Any]:
    """Return everything that led to a prediction, as plain values.

    Raises
    ------
    DataError
        If a part is missing; the message names it.
    """
    name = tracking.model_name
    prediction = find_prediction(store, name, prediction_id)
    with tempfile.TemporaryDirectory(prefix="closedloop-why-") as folder:
        model = open_model(registry, prediction.model_version, Path(folder))
        contributions = describe_reasons(model, prediction, top)
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
        "contributions": contributions,
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


def give_reasons(model: LoadedModel, prediction: Prediction, top: int) -> Explained:
    """The strongest reasons of a prediction, by the model that gave its score.

    Raises
    ------
    DataError
        If this version can give none.
    """
    values = [prediction.features]
    return model.explainer.explain(model.pack(values), values, top)[0]


def describe_reasons(model: LoadedModel, prediction: Prediction, top: int) -> dict[str, Any]:
    """`give_reasons` as plain values, or why there are none."""
    try:
        found = give_reasons(model, prediction, top)
    except DataError as error:
        return {"method": f"none: {error}", "features": []}
    reasons = [one._asdict() for one in found.reasons]
    return {"method": METHOD, "raw_score": found.raw_score, "base": found.base, "features": reasons}


def find_entry(entries: Sequence[tuple[int, Entry]], prediction: Prediction) -> tuple[int, Entry] | None:
    """The journal entry that gave the version the role in which it scored; None if there is none."""
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
